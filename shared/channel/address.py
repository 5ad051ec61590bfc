"""Where a worker accepts channels."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from msgspec import Struct

LONGEST_PATH = 107  # bytes of the path of a Unix socket, without the terminating NUL: unix(7)


class Address(Struct, frozen=True, kw_only=True):
    """The address of a worker's listener, and the secret that a client of it proves to know."""

    path: str  # of a Unix socket
    boot_id: str  # of the host: a path means something else on another host
    secret: bytes  # of this epoch of the worker

    def __repr__(self) -> str:
        """Mask the secret, since addresses appear in tracebacks."""
        return f"Address(path={self.path!r}, boot_id={self.boot_id!r}, secret=***)"


@cache
def boot_id() -> str:
    """Return the id of this boot of this host, see random(4).  Containers of a host share it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
