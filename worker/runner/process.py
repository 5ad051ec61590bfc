"""The worker's handle on one runner process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import msgspec

from worker import framing
from worker.runner.output import Output
from worker.runner.protocol import FromRunner, Ping, Pong, Stop, ToRunner, decode_from_runner, frame
from worker.timing import Timing

CHUNK_BYTES = 1 << 16


class RunnerDied(Exception):
    """A runner ended before it was warm."""


class RunnerStuck(Exception):
    """A process survived SIGKILL (deep in a driver); its memory is still held."""


class Unreadable(msgspec.Struct, frozen=True, tag="unreadable"):
    """A frame that is none of the protocol's messages; nothing after it can be read."""


Received = FromRunner | Unreadable | None  # None: the end of the stream


def tag(message: msgspec.Struct) -> str:
    """Return the name of a message in the protocol."""
    return str(message.__struct_config__.tag)


class Runner:
    """One child process, from its start until it is reaped."""

    def __init__(
        self,
        process: ForkServerProcess,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        timing: Timing,
    ) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self.output = Output()
        self.silent_s = 0.0  # for how long it has not answered a ping
        self.exited = asyncio.Event()
        self.status = 0  # once exited, -n is signal n
        self._timing = timing
        self._process = process
        self._reader, self._writer = reader, writer
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()
        self._listening = asyncio.create_task(self._listen())
        self._is_asked = False
        self._collecting: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_exit)

    async def send(self, message: ToRunner) -> None:
        with suppress(ConnectionError, RuntimeError):  # closed, as uvloop says it: `receive` and `exited` tell
            self._writer.write(frame(message))
            await self._writer.drain()

    async def receive(self) -> Received:
        """Return the next message, None at the end of the stream."""
        message = await self._inbox.get()
        if message is None:
            self._inbox.put_nowait(None)
        return message

    def ping(self, since_s: float) -> None:
        """Ask for a sign of life, `since_s` after the last time.  Only that counts as silence: where this process
        was paused, answers may lie unread."""
        if self._is_asked:
            self.silent_s += since_s
            return
        self._is_asked = True
        with suppress(ConnectionError, RuntimeError):
            self._writer.write(frame(Ping()))

    async def _listen(self) -> None:
        try:
            while (data := await framing.read(self._reader)) is not None:
                message = decode_from_runner(data)
                self._is_asked, self.silent_s = False, 0.0  # whatever it says
                if not isinstance(message, Pong):
                    self._inbox.put_nowait(message)
        except msgspec.MsgspecError:
            self._inbox.put_nowait(Unreadable())
        self._inbox.put_nowait(None)

    async def stop(self) -> None:
        """The stop ladder: ask, SIGTERM, SIGKILL to its process group; done when it is reaped and its output is read.

        Safe to repeat.  Raises RunnerStuck if it outlives SIGKILL by `Timing.reap_s`.
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
        """Wait until the process is gone and the last of its output is in `output`."""
        await self.exited.wait()
        if self._collecting is not None:
            await asyncio.wait([self._collecting], timeout=self._timing.grace_s)  # a grandchild may hold the other end
            self._collecting.cancel()
        self._listening.cancel()
        self._inbox.put_nowait(None)
        self._writer.close()

    def kill(self) -> None:
        """SIGKILL, without waiting."""
        self._signal(signal.SIGKILL)

    def _signal(self, signum: int) -> None:
        if self.exited.is_set():
            return
        with suppress(ProcessLookupError):
            try:
                os.killpg(self.pid, signum)
            except ProcessLookupError:  # it has not made its own group yet
                os.kill(self.pid, signum)

    def _on_exit(self) -> None:
        asyncio.get_running_loop().remove_reader(self._process.sentinel)
        self._process.join()
        self.status = self._process.exitcode or 0
        self._process.close()
        self.exited.set()

    def collect(self, output: socket.socket) -> None:
        """Read what it writes to its stdout and stderr into `output`, until `reaped`."""
        self._collecting = asyncio.create_task(self._collect(output))

    async def _collect(self, output: socket.socket) -> None:
        """Line by line, and one of more than CHUNK_BYTES in parts.  A load says hundreds, in few chunks."""
        reader, writer = await asyncio.open_connection(sock=output)
        begun = b""
        try:
            with suppress(ConnectionError):
                while chunk := await reader.read(CHUNK_BYTES):
                    said, end, begun = (begun + chunk).rpartition(b"\n")
                    if len(begun) > CHUNK_BYTES:
                        said, end, begun = said + end + begun, b"\n", b""
                    if end:
                        for line in said.decode("utf-8", "replace").split("\n"):
                            self.output.append(line.rstrip())
            if begun:
                self.output.append(begun.decode("utf-8", "replace").rstrip())
        finally:
            writer.close()
