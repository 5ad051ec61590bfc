"""Lua scripts, each of which reads or changes several keys atomically.

Scripts are idempotent: if a script is repeated after a lost reply, it detects this and returns the same reply.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from msgspec import Raw, msgpack
from redis.asyncio import Redis

DIRECTORY = Path(__file__).with_name("scripts")


class Script:
    """Runs a script of the directory scripts/ by name; `parts` are the names of files to prepend.

    Lua receives the named arguments as one msgpack map, `cmsgpack.unpack(ARGV[1])`, in which None is absent (Redis
    documentation, "Lua API reference").
    """

    def __init__(self, redis: Redis, name: str, *parts: str) -> None:
        text = "".join((DIRECTORY / f"{one}.lua").read_text("utf-8") for one in (*parts, name))
        self._script = redis.register_script(text)

    async def __call__(self, *keys: str, **arguments: object) -> Any:
        """Run the script on `keys`.  Raises what UNAVAILABLE lists."""
        packed = {name: _raw(value) if isinstance(value, bytes) else value for name, value in arguments.items()}
        return await self._script(keys=keys, args=[msgpack.encode(packed)])


def _raw(data: bytes) -> Raw:
    """Return bytes as a msgpack string (str 32): Redis' cmsgpack knows no binary type (deps/lua/src/lua_cmsgpack.c)."""
    return Raw(b"\xdb" + len(data).to_bytes(4, "big") + data)
