"""The worker's handle for its listener: the socket that it accepts connections from, and its process."""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Literal

from shared.backoff import Backoff
from shared.channel.address import LONGEST_PATH, Address, boot_id
from shared.telemetry import log
from worker.listener.port import Port
from worker.listener.protocol import BACKLOG, Listen, Offer, Ping, ToListener, Withdraw, encode, pair, receive, send

FIRST_PAUSE_S = 0.1  # before a listener that died is started again; doubles up to LAST_PAUSE_S
LAST_PAUSE_S = 10.0
STABLE_S = 60.0  # a listener that ran this long resets the pause
SILENCE_S = 10.0  # without an answer to a ping; then the listener is killed
SECRET_BYTES = 32

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

_log = log.get("worker")


class Listener:
    """The listener of a worker, and the runners to which it hands connections."""

    def __init__(self, *, log_level: LogLevel = "info", log_format: LogFormat = "console") -> None:
        self._secret = secrets.token_bytes(SECRET_BYTES)
        self._path: Path | None = None
        self._port: Port | None = None
        self._arguments = ("--log-level", log_level, "--log-format", log_format)
        self._listening: socket.socket | None = None
        self._offers: dict[str, socket.socket] = {}  # hand-over sockets, by id of the load
        self._control: socket.socket | None = None
        self._outbox: deque[tuple[ToListener, socket.socket | None]] = deque()  # what the listener did not take yet
        self._child: asyncio.subprocess.Process | None = None
        self._awaits_pong = False
        self._silent_s = 0.0

    @contextmanager
    def bound(self, paths: Iterable[Path], port: Port | None = None) -> Iterator[None]:
        """Listen on a Unix socket at the first of these paths that is possible, and on a port; remove the path at last.

        The caller owns the paths: what is there is a socket of a worker that was killed.  The sockets are this
        process's, so that clients wait while a listener is started again.  If no path is possible and there is no port,
        there is no address: instances are loaded all the same, but no API process has a route to them.
        """
        self._port = port
        bound = _bind([path.absolute() for path in paths])
        if bound is not None:
            self._path, self._listening = bound
        elif port is None:
            _log.error("no socket: requests cannot reach this worker", action="no_route")
        try:
            yield
        finally:
            if self._listening is not None:
                self._listening.close()
            if self._path is not None:
                self._path.unlink(missing_ok=True)
            self._path = self._listening = self._port = None

    @property
    def address(self) -> Address | None:
        """Where the listener is reached, None if nowhere."""
        if self._path is None and self._port is None:
            return None
        path = "" if self._path is None else str(self._path)
        tcp = None if self._port is None else self._port.address
        return Address(path=path, boot_id=boot_id(), secret=self._secret, tcp=tcp)

    def offer(self, load_id: str, hand_over: socket.socket) -> None:
        """Hand connections for a load to the runner at the other end of `hand_over`, until it is withdrawn."""
        self._offers[load_id] = hand_over
        self._send(Offer(load_id), hand_over)

    def withdraw(self, load_id: str) -> None:
        """Hand no more connections to the runner of a load.  Does nothing if there is none."""
        if self._offers.pop(load_id, None) is not None:
            self._send(Withdraw(load_id))

    def watch(self, since_s: float) -> None:
        """Ping the listener, `since_s` after the last call, and kill it if it has been silent for SILENCE_S."""
        if self._control is None or self._child is None:
            return
        if not self._awaits_pong:
            self._awaits_pong, self._silent_s = True, 0.0
            self._send(Ping())
            return
        self._silent_s += since_s
        if self._silent_s >= SILENCE_S:
            _log.warning("listener does not answer", action="listener_silent", pid=self._child.pid)
            with suppress(ProcessLookupError):
                self._child.kill()

    async def run(self) -> None:
        """Keep a listener running, if there is a socket.  Returns once cancelled and the listener is reaped."""
        sockets: list[tuple[Listen, socket.socket]] = []
        if self._listening is not None:
            sockets.append((Listen(self._secret), self._listening))
        if self._port is not None:
            sockets.append((Listen(self._secret, self._port.identity), self._port.listening))
        if not sockets:
            return
        backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S, STABLE_S)
        while True:
            started = time.monotonic()
            try:
                reason = await self._run_once(sockets)
            except OSError as e:
                reason = f"it could not be started: {e.strerror}"
            pause_s = backoff.after(time.monotonic() - started)
            _log.error("listener exited", action="listener_ended", reason=reason, again_in_s=pause_s)
            await asyncio.sleep(pause_s)

    async def _run_once(self, sockets: list[tuple[Listen, socket.socket]]) -> str:
        """Run a listener until it exits; return how it did."""
        control, theirs = pair()
        with control:
            with theirs:
                command = (sys.executable, "-m", "worker.listener.server", *self._arguments)
                self._child = child = await asyncio.create_subprocess_exec(*command, stdin=theirs.fileno())
            loop = asyncio.get_running_loop()
            try:
                self._control, self._awaits_pong = control, False
                loop.add_reader(control, self._read)
                self._outbox.clear()
                for load_id, hand_over in self._offers.items():
                    self._send(Offer(load_id), hand_over)
                for message, listening in sockets:
                    self._send(message, listening)
                return f"exit status {await child.wait()}"
            finally:
                loop.remove_reader(control)
                loop.remove_writer(control)
                self._control = self._child = None
                with suppress(ProcessLookupError):
                    child.kill()  # it has no state that SIGKILL could damage
                await child.wait()

    def _send(self, message: ToListener, passed: socket.socket | None = None) -> None:
        """Send a message, in order and without waiting.  If no listener runs, the next one gets all offers."""
        if self._control is not None:
            self._outbox.append((message, passed))
            self._flush()

    def _flush(self) -> None:
        assert self._control is not None
        loop = asyncio.get_running_loop()
        try:
            while self._outbox:
                message, passed = self._outbox[0]
                if passed is None or passed.fileno() >= 0:  # else the runner was reaped meanwhile
                    send(self._control, encode(message), passed)
                self._outbox.popleft()
            loop.remove_writer(self._control)
        except BlockingIOError:
            loop.add_writer(self._control, self._flush)
        except ConnectionError:  # it has exited: the next one gets all offers
            self._outbox.clear()
            loop.remove_writer(self._control)

    def _read(self) -> None:
        assert self._control is not None
        with suppress(BlockingIOError):
            while True:
                message, _ = receive(self._control)
                if not message:
                    asyncio.get_running_loop().remove_reader(self._control)
                    return
                self._awaits_pong = False


def _bind(paths: list[Path]) -> tuple[Path, socket.socket] | None:
    """Listen at the first path that is short enough, in a directory that can have sockets."""
    for path in paths:
        if len(os.fsencode(path)) > LONGEST_PATH:
            continue
        try:
            return path, _listen_at(path)
        except OSError as e:
            _log.warning("no socket", action="socket_failed", path=str(path), reason=e.strerror)
    return None


def _listen_at(path: Path) -> socket.socket:
    path.unlink(missing_ok=True)
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listening.fileno(), 0o600)  # bind(2) creates the file with the mode of the socket: unix(7)
        listening.setblocking(False)
        listening.bind(str(path))
        listening.listen(BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening
