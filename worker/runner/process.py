"""The worker's handle for a runner process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from contextlib import suppress
from itertools import count
from multiprocessing.context import ForkServerProcess

import msgspec

from shared import framing
from worker.runner.output import Output
from worker.runner.protocol import (
    Busy,
    Close,
    Closed,
    CloseIfUnused,
    FromRunner,
    Open,
    Ping,
    Pong,
    Stop,
    ToRunner,
    decode_from_runner,
    frame,
)
from worker.runner.rate import Rate
from worker.timing import Timing

CHUNK_BYTES = 1 << 16
MOST_BYTES = 1 << 20  # of a message
MOST_UNREAD = 1000  # messages; a load has some 60, and they are read at once


class RunnerDied(Exception):
    """A runner ended before it was warm."""


class RunnerStuck(Exception):
    """A process survived SIGKILL (deep in a driver); its memory is still held."""


class Unreadable(msgspec.Struct, frozen=True, tag="unreadable"):
    """A frame that is not a message of the protocol, or more messages than a runner sends.  The rest of the stream is
    not read."""


Received = FromRunner | Unreadable | None  # None: the end of the stream


def tag(message: msgspec.Struct) -> str:
    """Return the name of a message in the protocol."""
    return str(message.__struct_config__.tag)


class Runner:
    """A child process, from its start until it is reaped."""

    def __init__(
        self,
        process: ForkServerProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        hand_over: socket.socket,
        timing: Timing,
    ) -> None:
        """`hand_over`: the worker's end of the socket on which the runner takes connections from the listener."""
        assert process.pid is not None
        self.pid: int = process.pid
        self.hand_over = hand_over
        self.load = Pong()  # its requests, as it reported them last
        self._tokens = Rate(time.monotonic())
        self.output = Output()
        self.silent_s = 0.0  # for how long it has not answered a ping
        self.exited = asyncio.Event()
        self.status = 0  # once exited, -n is signal n
        self._timing = timing
        self._process = process
        self._reader, self._writer = reader, writer
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()
        self._listening = asyncio.create_task(self._listen())
        self._awaits_pong = False
        self._ids = count(1)
        self._questions: dict[int, asyncio.Future[bool]] = {}  # whether the runner is closed, by id
        self._collecting: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_exit)

    async def send(self, message: ToRunner) -> None:
        """Send a message.  If the channel is closed, drops it: `receive` and `exited` report the end."""
        with suppress(ConnectionError, RuntimeError):  # uvloop raises RuntimeError if the transport is closed
            self._writer.write(frame(message))
            await self._writer.drain()

    async def receive(self) -> Received:
        """Return the next message; None at the end of the stream, also if called again."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
        return message

    @property
    def tokens_per_second(self) -> float:
        """The rate at which it generated tokens in the last seconds."""
        return self._tokens.per_second() or 0.0

    def ping(self, since_s: float) -> None:
        """Send a ping, or count `since_s`, the time since the last call, as silence if the last one is unanswered.

        The wall clock would not do: while this process was paused, answers may lie unread.
        """
        if self._awaits_pong:
            self.silent_s += since_s
            return
        self._awaits_pong = True
        self._write(Ping())

    async def close_if_unused(self, since: float) -> bool:
        """Have the runner refuse requests from now on, if it had none since a time (seconds since the epoch).

        Returns whether it does.  A runner that does not answer within `Timing.answer_s` counts as busy.
        """
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.answer_s):
                return await self._asked(CloseIfUnused(next(self._ids), since))
        self.open()
        return False

    async def close(self) -> None:
        """Have the runner refuse requests from now on, and wait until its last one has ended, or the runner."""
        await self._asked(Close(next(self._ids)))

    def open(self) -> None:
        """Have the runner take requests again, after `close_if_unused`."""
        self._write(Open())

    async def _asked(self, question: CloseIfUnused | Close) -> bool:
        """Return whether the runner is closed.  False if it ends without an answer."""
        if self._listening.done():
            return False
        answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._questions[question.id] = answer
        self._write(question)
        try:
            return await answer
        finally:
            del self._questions[question.id]

    def _write(self, message: ToRunner) -> None:
        with suppress(ConnectionError, RuntimeError):  # uvloop raises RuntimeError if the transport is closed
            self._writer.write(frame(message))

    def _answered(self, id_: int, *, is_closed: bool) -> None:
        question = self._questions.get(id_)
        if question is not None and not question.done():  # else nobody waits any more
            question.set_result(is_closed)

    async def _listen(self) -> None:
        try:
            while (data := await framing.read(self._reader, MOST_BYTES)) is not None:
                message = decode_from_runner(data)
                self._awaits_pong, self.silent_s = False, 0.0  # any message proves that it is alive
                match message:
                    case Pong():
                        self.load = message
                        self._tokens.add(time.monotonic(), message.generated_tokens)
                    case Closed() | Busy():
                        self._answered(message.id, is_closed=isinstance(message, Closed))
                    case _:
                        self._inbox.put_nowait(message)
                if self._inbox.qsize() > MOST_UNREAD:
                    self._inbox.put_nowait(Unreadable())
                    break
        except (framing.TooLong, msgspec.MsgspecError):
            self._inbox.put_nowait(Unreadable())
        finally:
            for id_ in self._questions:
                self._answered(id_, is_closed=False)
        self._inbox.put_nowait(None)

    async def stop(self) -> None:
        """Stop the process group by the stop ladder: Stop message, SIGTERM, SIGKILL.

        Returns once the process is reaped and its output is read.  Safe to repeat.  Raises RunnerStuck if the process
        survives SIGKILL for `Timing.reap_s`.
        """
        await self.send(Stop())
        grace_s, reap_s = self._timing.grace_s, self._timing.reap_s
        for signum, within_s in ((None, grace_s), (signal.SIGTERM, grace_s), (signal.SIGKILL, reap_s)):
            if signum is not None:
                self._signal(signum)
            with suppress(TimeoutError):
                async with asyncio.timeout(within_s):
                    await self.reaped()
                    return
        raise RunnerStuck(f"process {self.pid} survived SIGKILL")

    async def reaped(self) -> None:
        """Wait until the process is reaped and all of its output is in `output`."""
        await self.exited.wait()
        if self._collecting is not None:
            await asyncio.wait([self._collecting], timeout=self._timing.grace_s)  # a grandchild may keep the pipe open
            self._collecting.cancel()
        self._listening.cancel()
        self._inbox.put_nowait(None)
        self._writer.close()
        self.hand_over.close()

    def kill(self) -> None:
        """Send SIGKILL without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        if self.exited.is_set():
            return
        with suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signum)
            except ProcessLookupError:  # it has not created its process group yet
                os.kill(self.pid, signum)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        self.status = self._process.exitcode or 0
        self._process.close()
        self.exited.set()

    def collect(self, output: socket.socket) -> None:
        """Start to read the process's stdout and stderr from `output` into `self.output`, until `reaped`."""
        self._collecting = asyncio.create_task(self._collect(output))

    async def _collect(self, output: socket.socket) -> None:
        """Append output by line; split lines longer than CHUNK_BYTES.  Reads in chunks: a load writes hundreds of lines
        in few writes."""
        reader, writer = await asyncio.open_connection(sock=output)
        partial = b""
        try:
            with suppress(ConnectionError):
                while chunk := await reader.read(CHUNK_BYTES):
                    complete, end, partial = (partial + chunk).rpartition(b"\n")
                    if len(partial) > CHUNK_BYTES:
                        complete, end, partial = complete + end + partial, b"\n", b""
                    if end:
                        for line in complete.decode("utf-8", "replace").split("\n"):
                            self.output.append(line.rstrip())
            if partial:
                self.output.append(partial.decode("utf-8", "replace").rstrip())
        finally:
            writer.close()
