"""The worker's handle on one runner process."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
from contextlib import suppress
from multiprocessing.context import ForkServerProcess

import msgspec

from worker.runner.output import Tail
from worker.runner.protocol import LENGTH, FromRunner, Ping, Pong, Stop, ToRunner, decode_from_runner, frame

GRACE_S = 1.0  # of each rung of the stop ladder
CHUNK_BYTES = 1 << 16
REAP_S = 30.0  # after SIGKILL: freeing a large mapping takes a while


class RunnerDied(Exception):
    """A runner ended before it was warm."""


class RunnerStuck(Exception):
    """A process survived SIGKILL (deep in a driver); its memory is still held."""


class Runner:
    """One child process, from its start until it is reaped."""

    def __init__(self, process: ForkServerProcess, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        assert process.pid is not None
        self.pid: int = process.pid
        self.tail = Tail()
        self.silent_s = 0.0  # for how long it has not answered a ping
        self.exited = asyncio.Event()
        self.status = 0  # once exited, -n is signal n
        self._process = process
        self._reader, self._writer = reader, writer
        self._inbox: asyncio.Queue[FromRunner | None] = asyncio.Queue()
        self._listening = asyncio.create_task(self._listen())
        self._is_asked = False
        self._output: asyncio.Task[None] | None = None
        asyncio.get_running_loop().add_reader(process.sentinel, self._on_exit)

    async def send(self, message: ToRunner) -> None:
        with suppress(ConnectionError, RuntimeError):  # closed, as uvloop says it: `receive` and `exited` tell
            self._writer.write(frame(message))
            await self._writer.drain()

    async def receive(self) -> FromRunner | None:
        """The next message, or None at the end of the stream."""
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
        with suppress(asyncio.IncompleteReadError, ConnectionError, msgspec.MsgspecError):
            while True:
                head = await self._reader.readexactly(LENGTH.size)
                message = decode_from_runner(await self._reader.readexactly(LENGTH.unpack(head)[0]))
                self._is_asked, self.silent_s = False, 0.0  # whatever it says
                if not isinstance(message, Pong):
                    self._inbox.put_nowait(message)
        self._inbox.put_nowait(None)

    async def stop(self) -> None:
        """The stop ladder: ask, SIGTERM, SIGKILL to its process group; done when it is reaped and its output is read.

        Safe to repeat.  Raises RunnerStuck if it outlives SIGKILL by REAP_S.
        """
        await self.send(Stop())
        for signum, grace in ((None, GRACE_S), (signal.SIGTERM, GRACE_S), (signal.SIGKILL, REAP_S)):
            if signum is not None:
                self._signal(signum)
            with suppress(TimeoutError):
                async with asyncio.timeout(grace):
                    await self.reaped()
                    return
        raise RunnerStuck(f"process {self.pid} survived SIGKILL")

    async def reaped(self) -> None:
        """Wait until the process is gone and the last of its output is in `tail`."""
        await self.exited.wait()
        if self._output is not None:
            await asyncio.wait([self._output], timeout=GRACE_S)  # a grandchild may hold the other end
            self._output.cancel()
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
                            self.tail.append(line.rstrip())
            if begun:
                self.tail.append(begun.decode("utf-8", "replace").rstrip())
        finally:
            writer.close()
