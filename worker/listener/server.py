"""The listener's process: `python -m worker.listener.server` accepts connections and hands each to its runner.

Its stdin is a socket to the worker (`worker.listener.protocol`); it exits at the end of that.  Of Unix sockets it holds
no connection for longer than the greeting: a runner that has one keeps it, also if the listener dies.  Of TCP it keeps
the connection and takes off TLS (`worker.listener.pump`).
"""

from __future__ import annotations

import argparse
import asyncio
import resource
import secrets
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import assert_never

import msgspec
from msgspec import msgpack

from shared import framing, libc
from shared.channel.trust import (
    MOST_BYTES,
    Challenge,
    Hello,
    Rejected,
    RejectedCode,
    has_our_user,
    is_proven,
    new_nonce,
)
from shared.telemetry import log
from worker.listener import pump
from worker.listener.protocol import (
    TOKEN_BYTES,
    Listen,
    Offer,
    Ping,
    Pong,
    Withdraw,
    decode_to_listener,
    encode,
    receive,
    send,
)
from worker.listener.pump import CLOSE_S, Pump
from worker.sandbox import seccomp

GREETING_S = 5.0  # from the connection to a valid Hello
HAND_OVER_S = 5.0  # until the runner has taken the connection
MOST_GREETINGS = 64  # connections without a valid Hello; one more ends the oldest
MOST_READ = 100  # messages of a runner at one time: a runner that an attacker controls may never stop
RETRY_S = 0.5  # before the next attempt to accept, if this process has too many descriptors

_log = log.get("listener")
_decode_hello = msgpack.Decoder(Hello).decode


class HandOver:
    """A runner, as the listener reaches it."""

    def __init__(self, runner: socket.socket) -> None:
        self._runner = runner
        self._taken: dict[bytes, asyncio.Future[bool]] = {}  # by token
        self.is_closed = False
        asyncio.get_running_loop().add_reader(runner, self._read)

    async def hand(self, connection: socket.socket) -> bool:
        """Give a connection to the runner; return whether it has taken it within HAND_OVER_S."""
        token = secrets.token_bytes(TOKEN_BYTES)
        taken: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._taken[token] = taken
        try:
            send(self._runner, token, connection)
            async with asyncio.timeout(HAND_OVER_S):
                return await taken
        except OSError:  # also TimeoutError, and BlockingIOError: the runner has not read what is there already
            return False
        finally:
            del self._taken[token]

    def _read(self) -> None:
        """Read which connections the runner took.  Unknown tokens are those of a listener before this one."""
        with suppress(BlockingIOError):
            for _ in range(MOST_READ):
                token, passed = receive(self._runner)
                if passed is not None:
                    passed.close()
                if not token:
                    self.close()
                    return
                if (taken := self._taken.get(token)) is not None and not taken.done():
                    taken.set_result(True)

    def close(self) -> None:
        """Forget the runner.  Connections that it did not take yet are rejected."""
        if not self.is_closed:
            self.is_closed = True
            asyncio.get_running_loop().remove_reader(self._runner)
            self._runner.close()
            for taken in self._taken.values():
                if not taken.done():
                    taken.set_result(False)


class Door:
    """A listening socket, and the clients that it has not handed to a runner yet."""

    def __init__(self, socket_: socket.socket, greeting: Listen, runner_of: Callable[[str], HandOver | None]) -> None:
        """`runner_of` returns the runner of a load, None if there is none."""
        self._socket = socket_
        self._secret = greeting.secret
        self._runner_of = runner_of
        identity = greeting.identity
        self._context = None if identity is None else pump.context(identity.pem)
        self._certificate = b"" if identity is None else identity.digest
        self._serving: set[asyncio.Task[None]] = set()
        self._greetings: dict[asyncio.Task[None], None] = {}  # those that wait for a valid Hello, oldest first

    async def accept(self) -> None:
        """Serve clients until cancelled."""
        with self._socket:
            while True:
                try:
                    connection, _ = await asyncio.get_running_loop().sock_accept(self._socket)
                except OSError as e:
                    _log.warning("no connection accepted", action="accept_failed", reason=e.strerror)
                    await asyncio.sleep(RETRY_S)
                else:
                    self._greet_in_turn(connection)

    def _greet_in_turn(self, connection: socket.socket) -> None:
        """Serve a client.  Ends the oldest greeting if there are too many."""
        if len(self._greetings) >= MOST_GREETINGS:
            oldest = next(iter(self._greetings))
            del self._greetings[oldest]
            oldest.cancel()
        serve = self._serve_local(connection) if self._context is None else self._serve_tls(connection, self._context)
        serving = asyncio.create_task(serve)
        self._serving.add(serving)
        self._greetings[serving] = None
        serving.add_done_callback(self._served)

    def _served(self, serving: asyncio.Task[None]) -> None:
        self._serving.discard(serving)
        self._greetings.pop(serving, None)

    async def _serve_local(self, connection: socket.socket) -> None:
        """Serve a client of a Unix socket."""
        with connection, suppress(OSError):  # the client is gone, or too slow (TimeoutError)
            if has_our_user(connection):
                async with asyncio.timeout(GREETING_S):
                    hello = await self._greet(connection)
                await self._answer(connection, hello)

    async def _serve_tls(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Serve a client of a TCP socket.  It counts as a greeting until it is handed over or closed."""
        pumped = Pump()
        is_handed = False
        try:
            with pumped.plain as plain, suppress(OSError):
                async with asyncio.timeout(GREETING_S):
                    await pumped.begin(connection, context)
                    hello = await self._greet(plain)
                is_handed = await self._answer(plain, hello)
            if not is_handed:
                await asyncio.wait([pumped.ended], timeout=CLOSE_S)  # it may still read why it is rejected
        finally:
            if not is_handed:
                pumped.abort()

    async def _greet(self, connection: socket.socket) -> Hello | RejectedCode | None:
        """Challenge a client.  Returns its Hello, or why it is rejected; None if it sent something else."""
        nonce = new_nonce()
        loop = asyncio.get_running_loop()
        await loop.sock_sendall(connection, framing.frame(Challenge(nonce)))
        (size,) = framing.LENGTH.unpack(await _exactly(connection, framing.LENGTH.size))
        if size > MOST_BYTES:
            return None
        try:
            hello = _decode_hello(await _exactly(connection, size))
        except msgspec.MsgspecError:
            return None
        return hello if is_proven(hello, self._secret, nonce, self._certificate) else "wrong_proof"

    async def _answer(self, connection: socket.socket, hello: Hello | RejectedCode | None) -> bool:
        """Hand a connection to the runner that its Hello names.  Returns False if it was rejected."""
        if not isinstance(hello, Hello):
            if hello is not None:
                await _reject(connection, hello)
            return False
        serving = asyncio.current_task()
        assert serving is not None
        self._greetings.pop(serving, None)  # trusted from here on
        runner = self._runner_of(hello.load_id)
        if runner is None:
            await _reject(connection, "unknown_instance")
            return False
        if not await runner.hand(connection):
            await _reject(connection, "unknown_instance" if runner.is_closed else "runner_silent")
            return False
        return True


class Server:
    """Accepts connections for the runners that the worker offers."""

    def __init__(self, worker: socket.socket) -> None:
        self._worker = worker
        self._runners: dict[str, HandOver] = {}  # by id of the load
        self._accepting: list[asyncio.Task[None]] = []
        self._orphaned = asyncio.Event()

    async def run(self) -> None:
        """Serve until the worker is gone."""
        asyncio.get_running_loop().add_reader(self._worker, self._read_worker)
        await self._orphaned.wait()

    def _read_worker(self) -> None:
        """Read all messages of the worker that are there."""
        with suppress(BlockingIOError):
            while True:
                data, passed = receive(self._worker)
                if not data:
                    self._orphaned.set()
                    return
                self._received(data, passed)

    def _received(self, data: bytes, passed: socket.socket | None) -> None:
        match message := decode_to_listener(data):
            case Offer():
                assert passed is not None
                self._forget(message.load_id)
                self._runners[message.load_id] = HandOver(passed)
            case Withdraw():
                self._forget(message.load_id)
            case Listen():
                assert passed is not None
                door = Door(passed, message, self._runner_of)
                self._accepting.append(asyncio.create_task(door.accept()))
            case Ping():
                with suppress(BlockingIOError):  # the worker does not read; it will see the silence
                    send(self._worker, encode(Pong()))
            case _:
                assert_never(message)

    def _forget(self, load_id: str) -> None:
        if (runner := self._runners.pop(load_id, None)) is not None:
            runner.close()

    def _runner_of(self, load_id: str) -> HandOver | None:
        self._read_worker()  # a client may hear of a load before this process reads its offer
        runner = self._runners.get(load_id)
        return None if runner is None or runner.is_closed else runner


async def _exactly(connection: socket.socket, size: int) -> bytes:
    """Read `size` bytes and no more: the rest of the stream belongs to the runner.  Raises ConnectionError."""
    data = b""
    while len(data) < size:
        more = await asyncio.get_running_loop().sock_recv(connection, size - len(data))
        if not more:
            raise ConnectionError("the client is gone")
        data += more
    return data


async def _reject(connection: socket.socket, code: RejectedCode) -> None:
    """Tell a client why it gets no channel, and end the connection, also for a runner that takes it later."""
    with suppress(OSError):
        async with asyncio.timeout(GREETING_S):
            await asyncio.get_running_loop().sock_sendall(connection, framing.frame(Rejected(code)))
    with suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


def main() -> None:
    """Run the process until the worker is gone."""
    parser = argparse.ArgumentParser(prog="python -m worker.listener.server", description="Accept channels.")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="console")
    arguments = parser.parse_args()
    log.configure(arguments.log_level, arguments.log_format, process="listener")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the worker, which stops the listener
    libc.prctl(libc.PR_SET_PDEATHSIG, signal.SIGKILL)  # it also reaches a stopped process
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core dump would have the secret
    seccomp.outside(accepts=True)
    with socket.socket(fileno=sys.stdin.fileno()) as worker:
        worker.setblocking(False)  # libuv made it blocking
        asyncio.run(Server(worker).run())


if __name__ == "__main__":
    main()
