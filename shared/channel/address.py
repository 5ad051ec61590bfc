"""Where a worker accepts channels."""

from __future__ import annotations

import os
import stat
from functools import cache
from pathlib import Path

from msgspec import Struct

LONGEST_PATH = 107  # bytes of the path of a Unix socket, without the terminating NUL: unix(7)


class Tcp(Struct, frozen=True, kw_only=True):
    """A TCP port that accepts channels in TLS 1.3."""

    host: str  # a name or an IP address
    port: int
    certificate: bytes  # SHA-256 of the certificate of this epoch of the worker


class Address(Struct, frozen=True, kw_only=True):
    """The address of a worker's listener, and the secret that a client of it proves to know."""

    path: str  # of a Unix socket; empty if there is none
    boot_id: str  # of the host: a path means something else on another host
    secret: bytes  # of this epoch of the worker
    tcp: Tcp | None = None

    def __repr__(self) -> str:
        """Mask the secret, since addresses appear in tracebacks."""
        return f"Address(path={self.path!r}, boot_id={self.boot_id!r}, secret=***, tcp={self.tcp!r})"


def route(address: Address) -> Path | Tcp | None:
    """Return how this process connects to a listener: by its Unix socket if it can open it, or else by TCP."""
    if address.path and address.boot_id == boot_id() and _is_our_socket(path := Path(address.path)):
        return path
    return address.tcp


def reachable(address: Address) -> bool:
    """Return whether there is a route to a listener.  It looks at the path, and connects to nothing."""
    return route(address) is not None


def _is_our_socket(path: Path) -> bool:
    """Return whether a socket of this user is there.  Containers of a host share the boot id, but not all paths."""
    try:
        status = path.stat()
    except OSError:
        return False
    return stat.S_ISSOCK(status.st_mode) and status.st_uid == os.geteuid()


@cache
def boot_id() -> str:
    """Return the id of this boot of this host, see random(4).  Containers of a host share it."""
    return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
