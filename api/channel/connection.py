"""A channel to one runner: many requests on one connection."""

from __future__ import annotations

import asyncio
import ssl
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from itertools import count
from typing import assert_never, cast

import msgspec
from msgspec import msgpack, structs

from api.channel.answer import Answer
from shared import framing
from shared.channel import tls
from shared.channel.address import Address, Tcp, boot_id, route
from shared.channel.messages import (
    MOST_BYTES,
    Cancel,
    Closing,
    Delta,
    Deltas,
    Described,
    Ended,
    Failed,
    FromRunner,
    Progress,
    Queued,
    Refused,
    Started,
    Text,
    Tokens,
    ToModel,
    Vectors,
    frame,
)
from shared.channel.trust import Challenge, Hello, Rejected, Welcome, has_our_user, proof
from shared.errors import InvalidRequest, ModelUnloaded, NoRoute, RunnerLost, ServiceError
from shared.settings import variable

CONNECT_S = 5.0  # of GREETING_S, for a connection over TCP: a firewall may drop what is sent
GREETING_S = 10.0  # from the connection to Welcome
IDLE_S = 60.0  # without a request; then the channel is closed

_decode: Callable[[bytes], FromRunner | Closing | Challenge | Welcome | Rejected] = msgpack.Decoder(
    FromRunner | Closing | Challenge | Welcome | Rejected
).decode


class Connection(asyncio.Protocol):
    """A channel.  Its end ends all its requests."""

    def __init__(self, load_id: str, secret: bytes, certificate: bytes = b"") -> None:
        """`certificate`: the digest of the listener's, for a connection over TCP."""
        loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[ServiceError] = loop.create_future()  # why
        self._loop = loop
        self._secret = secret
        self._certificate = certificate
        self._load_id = load_id
        self._welcome: asyncio.Future[None] = loop.create_future()
        self._splitter = framing.Splitter(MOST_BYTES)
        self._transport: asyncio.Transport | None = None
        self._answers: dict[int, Answer] = {}
        self._ids = count(1)
        self._idle: asyncio.TimerHandle | None = None

    async def greeted(self) -> None:
        """Wait until the runner welcomes this connection.  Raises ServiceError."""
        await asyncio.wait((self._welcome, self.ended), return_when=asyncio.FIRST_COMPLETED)
        if self.ended.done():
            raise self.ended.result()
        self._keep_for(IDLE_S)

    def ask(self, request: ToModel, answer: Answer) -> int:
        """Send a request, whose messages go to `answer`; return its id on this connection.  Raises ServiceError."""
        if self.ended.done():
            raise self.ended.result()
        assert self._transport is not None
        if self._transport.get_write_buffer_size() > MOST_BYTES:
            raise RunnerLost("The engine process does not read its requests.")
        if self._idle is not None:
            self._idle.cancel()
        id_ = next(self._ids)
        self._answers[id_] = answer
        self._transport.write(frame(structs.replace(request, id=id_)))
        return id_

    @property
    def n_requests(self) -> int:
        return len(self._answers)

    def drop(self, id_: int) -> None:
        """Forget a request, and cancel it if it has not ended."""
        answer = self._answers.pop(id_, None)
        if self.ended.done() or self._transport is None:
            return
        if answer is not None and not answer.is_complete:
            self._transport.write(frame(Cancel(id_)))
        if not self._answers:
            self._keep_for(IDLE_S)

    def end(self, error: ServiceError) -> None:
        """End the channel and all its requests.  Only the first call counts."""
        if self.ended.done():
            return
        self.ended.set_result(error)
        if self._idle is not None:
            self._idle.cancel()
        for answer in self._answers.values():
            answer.fail(error)
        if self._transport is not None:
            self._transport.abort()

    def _keep_for(self, idle_s: float) -> None:
        self._idle = self._loop.call_later(idle_s, self.end, RunnerLost("The channel was idle."))

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's are not of that class
        connection = transport.get_extra_info("socket")
        if not self._certificate:
            if not has_our_user(connection):
                self.end(NoRoute("The socket of the worker belongs to another user."))
        elif tls.has_certificate(transport.get_extra_info("ssl_object"), self._certificate):
            tls.notice_silence(connection)
        else:  # nothing was sent yet
            self.end(
                NoRoute("The worker's address has another certificate than the worker published. Try again shortly.")
            )

    def data_received(self, data: bytes) -> None:
        try:
            for message in self._splitter.feed(data):
                self._received(_decode(message))
        except (framing.TooLong, msgspec.MsgspecError):
            self.end(RunnerLost("The engine process sent an invalid message."))

    def connection_lost(self, _: Exception | None) -> None:
        what = "The connection to the engine process" if self._certificate else "The engine process"
        self.end(RunnerLost(f"{what} ended."))

    def _received(self, message: FromRunner | Closing | Challenge | Welcome | Rejected) -> None:
        match message:
            case Deltas():
                self._deltas(message.deltas)
            case (
                Refused()
                | Queued()
                | Started()
                | Progress()
                | Vectors()
                | Text()
                | Tokens()
                | Described()
                | Ended()
                | Failed()
            ):
                if (answer := self._answers.get(message.id)) is not None:  # else it was cancelled
                    answer.put(message)
            case Closing():
                self.end(ModelUnloaded("The model was unloaded."))
            case Challenge():
                assert self._transport is not None
                proven = proof(self._secret, message.nonce, self._load_id, self._certificate)
                self._transport.write(framing.frame(Hello(self._load_id, proven)))
            case Welcome():
                if not self._welcome.done():
                    self._welcome.set_result(None)
            case Rejected():
                self.end(_rejected(message))
            case _:
                assert_never(message)

    def _deltas(self, deltas: list[Delta]) -> None:
        by_request: dict[int, list[Delta]] = defaultdict(list)
        for delta in deltas:
            by_request[delta.id].append(delta)
        for id_, own in by_request.items():
            answer = self._answers.get(id_)
            if answer is not None and not answer.is_complete and not answer.extend(own):
                assert self._transport is not None
                self._transport.write(frame(Cancel(id_)))


def _rejected(message: Rejected) -> ServiceError:
    match message.code:
        case "wrong_proof":
            return NoRoute("The worker did not accept this API process. Try again shortly.")
        case "unknown_instance":
            return ModelUnloaded("The model is not loaded any more.")
        case "runner_silent":
            return RunnerLost("The engine process does not answer.")
        case "no_requests":
            return InvalidRequest("The model generates no text.")
        case _:
            assert_never(message.code)


async def connect(address: Address, load_id: str, worker: str) -> Connection:
    """Open a channel to the runner of a load.  Raises ServiceError."""
    where = route(address)
    if where is None:
        what = "is on another host" if address.boot_id != boot_id() else "has a socket that is not in reach"
        raise NoRoute(
            f"Worker '{worker}' {what}, and accepts no connections over TCP: set {variable('worker_listen')} for it."
        )
    tcp = where if isinstance(where, Tcp) else None
    connection = Connection(load_id, address.secret, b"" if tcp is None else tcp.certificate)
    try:
        async with asyncio.timeout(GREETING_S):
            if isinstance(where, Tcp):
                await _open_tls(connection, where)
            else:
                await asyncio.get_running_loop().create_unix_connection(lambda: connection, str(where))
            await connection.greeted()
    except OSError as e:  # also TimeoutError
        reason = _unreachable(worker, tcp, e)
        connection.end(reason)
        raise reason from e
    except BaseException:
        connection.end(NoRoute("The attempt to connect was cancelled."))
        raise
    return connection


async def _open_tls(connection: Connection, tcp: Tcp) -> None:
    async with asyncio.timeout(CONNECT_S):
        await asyncio.get_running_loop().create_connection(
            lambda: connection, tcp.host, tcp.port, ssl=_context(), server_hostname=""
        )


@cache
def _context() -> ssl.SSLContext:
    return tls.context(ssl.PROTOCOL_TLS_CLIENT)


def _unreachable(worker: str, tcp: Tcp | None, error: OSError) -> NoRoute:
    reason = error.strerror or "it does not answer"
    if tcp is None:
        return NoRoute(f"Worker '{worker}' cannot be reached: {reason}.")
    return NoRoute(
        f"Worker '{worker}' cannot be reached at {tcp.host} port {tcp.port}: {reason}. "
        f"{variable('worker_advertise')} sets the address of the worker for API processes."
    )
