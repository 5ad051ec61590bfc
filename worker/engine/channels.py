"""The runner's end of its channels: takes connections from the listener, in a thread with an asyncio loop."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable, Coroutine
from concurrent.futures import wait
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, assert_never

import msgspec
from msgspec.structs import replace

from shared import framing
from shared.channel.messages import (
    ITEM_BYTES,
    MOST_BYTES,
    Closing,
    Delta,
    Deltas,
    Described,
    Ended,
    Failed,
    Finish,
    FromRunner,
    Progress,
    Queued,
    Refused,
    Started,
    Stop,
    Text,
    TokenLogprobs,
    Tokens,
    ToolDelta,
    ToRunner,
    Vectors,
    decode_to_runner,
    frame,
    size_of,
)
from shared.channel.trust import Rejected, Welcome
from worker.listener.protocol import receive, send

BEHIND_BYTES = 4 << 20  # of messages that the API process has not taken; with more, its channel is closed
BUFFER_BYTES = 256 << 10  # of these, in the buffer of the transport; beyond, deltas coalesce
UNREAD = 256  # messages of the API process that may wait to be served; then its socket is not read

Serve = Callable[["Channel"], Coroutine[Any, Any, None]]


class Channel(asyncio.Protocol):
    """A connection to an API process.  Iterates over its messages; belongs to the loop of `Channels`."""

    def __init__(self) -> None:
        self.closed = asyncio.Event()
        self._splitter = framing.Splitter(MOST_BYTES)
        self._inbox: asyncio.Queue[ToRunner | None] = asyncio.Queue()
        self._transport: asyncio.Transport | None = None
        self._is_behind = False
        self._backlog = Backlog()

    async def __aiter__(self) -> AsyncIterator[ToRunner]:
        while (message := await self._inbox.get()) is not None:
            if self._inbox.qsize() == UNREAD // 2 and self._transport is not None:
                self._transport.resume_reading()
            yield message

    def send(self, message: FromRunner) -> None:
        """Send a message.  Never waits: if the API process is behind, the deltas of a request become one.

        Closes the channel if the API process is too far behind.  Drops the message if the channel is closed.
        """
        if self._transport is None or self._transport.is_closing():
            return
        if not self._is_behind:
            self._transport.write(frame(message))
            return
        self._backlog.add(message)
        if self._backlog.n_bytes > BEHIND_BYTES:
            print("channel closed: the API process does not read it", flush=True)  # noqa: T201  into the engine's log
            self._transport.abort()

    def close(self, last: Closing | Rejected) -> None:
        """Send a last message after those that wait, and close the channel."""
        if self._transport is not None:
            for message in self._backlog.taken():
                self._transport.write(frame(message))
            self._transport.write(framing.frame(last))
            self._transport.close()

    # ---- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.set_write_buffer_limits(high=BUFFER_BYTES)
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        assert self._transport is not None
        try:
            for message in self._splitter.feed(data):
                self._inbox.put_nowait(decode_to_runner(message))
        except (framing.TooLong, msgspec.MsgspecError) as e:
            print(f"channel closed: {e}", flush=True)  # noqa: T201
            self._transport.abort()
        if self._inbox.qsize() >= UNREAD:
            self._transport.pause_reading()

    def pause_writing(self) -> None:
        self._is_behind = True

    def resume_writing(self) -> None:
        self._is_behind = False
        for message in self._backlog.taken():
            self.send(message)

    def connection_lost(self, _: Exception | None) -> None:
        self._inbox.put_nowait(None)
        self.closed.set()


@dataclass(slots=True)
class Joined:
    """Deltas of one answer, to be sent as one: the prompt, then the reasoning, then the text, then a call."""

    id: int
    choice: int
    echo: str = ""
    skipped: int = 0
    texts: list[str] = field(default_factory=list)
    reasonings: list[str] = field(default_factory=list)
    tool: ToolDelta | None = None
    arguments: list[str] = field(default_factory=list)  # of the call, without those in `tool`
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: Finish | None = None
    stop: Stop | None = None

    def add(self, delta: Delta) -> None:
        self.echo += delta.echo  # of which there is one
        self.skipped += delta.skipped
        self.texts.append(delta.text)
        self.reasonings.append(delta.reasoning)
        if self.tool is None:
            self.tool = delta.tool
        elif delta.tool is not None:
            self.arguments.append(delta.tool.arguments)
        self.logprobs += delta.logprobs
        self.finish, self.stop = delta.finish, delta.stop

    def can_take(self, delta: Delta) -> bool:
        if self.tool is not None:
            is_same = delta.tool is None or delta.tool.index == self.tool.index
            return is_same and not delta.reasoning and not delta.text
        return not delta.reasoning or not any(self.texts)

    def delta(self) -> Delta:
        return Delta(
            id=self.id,
            choice=self.choice,
            echo=self.echo,
            skipped=self.skipped,
            text="".join(self.texts),
            reasoning="".join(self.reasonings),
            tool=self.tool and replace(self.tool, arguments="".join([self.tool.arguments, *self.arguments])),
            logprobs=self.logprobs,
            finish=self.finish,
            stop=self.stop,
        )


class Backlog:
    """The messages that wait for a transport.  Keeps the order of the messages of each request, and joins deltas."""

    def __init__(self) -> None:
        self.n_bytes = 0  # roughly
        self._before: list[FromRunner] = []  # messages that precede the deltas of their requests
        self._joined: dict[tuple[int, int], list[Joined]] = {}  # by request and answer
        self._after: list[FromRunner] = []  # messages that follow the deltas of their requests, and vectors

    def add(self, message: FromRunner) -> None:
        match message:
            case Refused() | Queued() | Started() | Progress():
                self._before.append(message)
                self.n_bytes += ITEM_BYTES
            case Deltas():
                for delta in message.deltas:
                    self._join(delta)
            case Vectors():
                self._after.append(message)
                self.n_bytes += ITEM_BYTES + len(message.data)
            # A text may be longer than BEHIND_BYTES, and must not close the channel.  Their number is limited.
            case Text() | Tokens() | Described() | Ended() | Failed():
                self._after.append(message)
                self.n_bytes += ITEM_BYTES
            case _:
                assert_never(message)

    def _join(self, delta: Delta) -> None:
        self.n_bytes += size_of(delta)
        joined = self._joined.setdefault((delta.id, delta.choice), [])
        if not joined or not joined[-1].can_take(delta):
            joined.append(Joined(delta.id, delta.choice))
        joined[-1].add(delta)

    def taken(self) -> list[FromRunner]:
        """Return the messages, with all deltas in one, and forget them."""
        deltas = [one.delta() for joined in self._joined.values() for one in joined]
        messages = [*self._before, *([Deltas(deltas)] if deltas else []), *self._after]
        self.n_bytes = 0
        self._before, self._joined, self._after = [], {}, []
        return messages


class Channels:
    """The channels of a runner.  Its methods are for the main thread and the one that reads the control channel."""

    def __init__(self, hand_over: socket.socket) -> None:
        self.loop = asyncio.new_event_loop()
        self._hand_over = hand_over
        self._serve: Serve | None = None
        self._channels: dict[Channel, asyncio.Task[None]] = {}
        self._is_started = False

    def start(self, serve: Serve | None) -> None:
        """Take connections in a thread, where the loop runs for ever.

        `serve` serves one channel until its end; None: this runner serves no requests.
        """
        self._serve = serve
        self._is_started = True
        threading.Thread(target=self._run, name="channels", daemon=True).start()

    def close(self, within_s: float) -> None:
        """Tell all API processes that the instance is unloaded, and wait until they know it, up to `within_s`."""
        if self._is_started:
            closing = asyncio.run_coroutine_threadsafe(self._close(), self.loop)
            wait([closing], within_s)

    def _run(self) -> None:
        self.loop.add_reader(self._hand_over, self._take)
        self.loop.run_forever()

    async def _close(self) -> None:
        self.loop.remove_reader(self._hand_over)
        for channel in (channels := [*self._channels]):
            channel.close(Closing())
        for channel in channels:
            await channel.closed.wait()

    def _take(self) -> None:
        """Take the connections that the listener hands over."""
        with suppress(BlockingIOError):
            while True:
                token, connection = receive(self._hand_over)
                if not token:  # the worker is gone: the thread that reads the control channel ends the process
                    self.loop.remove_reader(self._hand_over)
                    return
                with suppress(ConnectionError):
                    send(self._hand_over, token)
                if connection is not None:
                    self._begin(connection)

    def _begin(self, connection: socket.socket) -> None:
        channel = Channel()
        self._channels[channel] = serving = self.loop.create_task(self._keep(channel, connection))
        serving.add_done_callback(lambda _: self._channels.pop(channel))

    async def _keep(self, channel: Channel, connection: socket.socket) -> None:
        """Serve a channel until its end."""
        transport, _ = await self.loop.connect_accepted_socket(lambda: channel, connection)
        try:
            if self._serve is None:
                channel.close(Rejected("no_requests"))
            else:
                transport.write(framing.frame(Welcome()))
                await self._serve(channel)
        finally:
            transport.close()
            await channel.closed.wait()
