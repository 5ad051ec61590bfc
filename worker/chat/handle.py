"""The runner's handle for its helper.

Messages go to the helper one at a time, from a thread of their own: each takes milliseconds.  A helper that dies takes
only the message that it had; the next ones go to a new helper, which compiles the template again.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import select
import signal
import socket
import time
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from typing import TypeVar

import msgspec
from msgspec import structs

from shared import framing
from shared.channel.messages import Grammar, Schema
from worker.chat import helper
from worker.chat.code import ChatError, Message, ParserSource
from worker.chat.constraint import ConstraintError
from worker.chat.helper import CPU_S, FORK, MEMORY_BYTES, NO_MEMORY, NUMBER, Confine
from worker.chat.protocol import (
    Answer,
    Check,
    Checked,
    Compiled,
    Constraint,
    FromHelper,
    Parse,
    Prompt,
    Rejected,
    Render,
    Template,
    ToHelper,
    Unenforceable,
    decode_from_helper,
    frame,
)

SILENT_S = 60.0  # then the helper is killed; its own limit, in processor time, is far below
CLOSING_S = 5.0  # for the zygote to kill the helper
REPLY_BYTES = 256 << 20  # a longer reply is not read
FATAL_S = 600.0  # for so long, a request that killed a helper is not tried again
FATAL_MOST = 1000  # of these are known

Reply = TypeVar("Reply", Compiled, Prompt, Answer, Checked)


class HelperDied(Exception):
    """The helper died of a message; the message of the exception says how."""


class HelpersEnded(HelperDied):
    """The process that starts helpers has ended: this process can render and parse nothing any more."""


class Helper:
    """Starts helpers, and asks them.  All methods may be called from any thread, except `close`."""

    def __init__(self, confine: Confine, *, cpu_s: float = CPU_S, memory_bytes: int = MEMORY_BYTES) -> None:
        """Fork the zygote.  Only for a process with one thread, which has not used a GPU.

        The limits are those of one message, and of one helper.
        """
        self._cpu_s, self._memory_bytes = cpu_s, memory_bytes
        self._zygote_pid, self._zygote = helper.start(confine, cpu_s, memory_bytes)
        self._thread = ThreadPoolExecutor(1, "chat")
        self._template: Template | None = None
        self._connection: socket.socket | None = None
        self._fatal: dict[bytes, float] = {}  # digests of requests that killed a helper, until when
        self._fork()

    def compile(self, template: Template) -> Future[dict[str, bool]]:
        """Set the template, and find out what it supports.  `render` and `parse` use it from then on.

        The result raises ChatError and HelperDied.
        """
        return self._thread.submit(self._compile, template)

    async def render(self, conversation: bytes, output: Schema | Grammar | None = None) -> Prompt:
        """Render a conversation whose answers have a form.

        Raises ChatError, ConstraintError and HelperDied, the latter at once if it killed a helper before.
        """
        request = Render(conversation, output)
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._render, request)

    async def parse(self, source: ParserSource, answer: str, *, partial: bool) -> Message:
        """Parse an answer, or the beginning of one.  Raises ChatError and HelperDied."""
        request = Parse(source, answer, partial)
        reply = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask, request, Answer)
        return reply.message

    def close(self) -> None:
        """End the helper and the zygote."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        for end in (self._connection, self._zygote):
            if end is not None:
                with suppress(OSError):
                    end.shutdown(socket.SHUT_WR)
        self._zygote.settimeout(CLOSING_S)
        with suppress(OSError):
            while self._zygote.recv(NUMBER.size):  # up to the end of the stream
                pass
            os.waitpid(self._zygote_pid, 0)
        self._zygote.close()
        if self._connection is not None:
            self._connection.close()

    # ---- in the thread

    def _compile(self, template: Template) -> dict[str, bool]:
        self._template = None
        capabilities = self._ask(template, Compiled).capabilities
        self._template = template
        return capabilities

    def _render(self, request: Render) -> Prompt:
        prompt = self._ask_once(request, Prompt, "chat template's process")
        if prompt.constraint is not None:
            try:
                self._check(prompt.constraint)
            except ConstraintError:
                if not prompt.constraint.is_optional:
                    raise
                return structs.replace(prompt, constraint=None)
        return prompt

    def _check(self, constraint: Constraint) -> None:
        try:
            self._ask_once(Check(constraint), Checked, "process that compiles it")
        except HelpersEnded:
            raise
        except HelperDied as e:
            raise ConstraintError(str(e)) from None

    def _ask_once(self, request: Render | Check, expected: type[Reply], process: str) -> Reply:
        """Ask the helper, unless it died of the same request lately.  Raises the same as `_ask`."""
        digest = hashlib.blake2b(frame(request)).digest()
        if time.monotonic() < self._fatal.get(digest, 0):
            raise HelperDied(f"the same request ended the {process} before")
        self._started()
        try:
            return self._ask(request, expected)
        except HelperDied:
            if len(self._fatal) == FATAL_MOST:
                del self._fatal[next(iter(self._fatal))]  # the oldest
            self._fatal[digest] = time.monotonic() + FATAL_S
            raise

    def _ask(self, message: ToHelper, expected: type[Reply]) -> Reply:
        """Ask the helper, and start one if there is none.  Raises ChatError, ConstraintError and HelperDied."""
        connection = self._started()
        reply: FromHelper | None = None
        try:
            connection.sendall(frame(message))
            if (data := _receive(connection)) is not None:
                reply = decode_from_helper(data)
        except (ConnectionError, TimeoutError, msgspec.MsgspecError):
            pass
        match reply:
            case Rejected():
                raise ChatError(reply.reason)
            case Unenforceable():
                raise ConstraintError(reply.reason)
            case None:
                raise HelperDied(self._ended())
            case _:
                assert isinstance(reply, expected)
                return reply

    def _started(self) -> socket.socket:
        """Return the connection to a helper that has compiled the template."""
        if self._connection is not None and select.select([self._connection], [], [], 0)[0]:
            self._ended()  # the end of the stream: it was killed between two messages
        if self._connection is None:
            descriptors = list[int]()
            with suppress(OSError):
                _, descriptors, _, _ = socket.recv_fds(self._zygote, len(FORK), 1)
            if not descriptors:
                raise HelpersEnded("the process that starts helpers has ended")
            self._connection = socket.socket(fileno=descriptors[0])
            self._connection.settimeout(SILENT_S)
            if self._template is not None:
                self._ask(self._template, Compiled)
        return self._connection

    def _ended(self) -> str:
        """Forget the helper, and return how it ended.  The next one starts."""
        assert self._connection is not None
        with suppress(OSError):
            self._connection.shutdown(socket.SHUT_RDWR)  # ends one that lives, such as one that replies too much
        self._connection.close()
        self._connection = None
        status = b""
        with suppress(OSError):
            status = self._zygote.recv(NUMBER.size)
        self._fork()
        return self._reason(*NUMBER.unpack(status)) if status else "its process was killed"

    def _fork(self) -> None:
        """Have the next helper forked, so that no message waits for it."""
        with suppress(OSError):  # `_started` finds out that the zygote has ended
            self._zygote.sendall(FORK)

    def _reason(self, status: int) -> str:
        if status == NO_MEMORY:
            return f"it took more than {self._memory_bytes >> 20:,} MiB of memory"
        if status == -signal.SIGPROF:
            return f"it took longer than {self._cpu_s:g} s"
        if status < 0:
            return f"its process was ended by {signal.Signals(-status).name}"
        return f"its process ended with status {status}"


def _receive(connection: socket.socket) -> bytes | None:
    """Return the next message; None if the connection ends before, or the message is longer than it may be."""
    head = _exactly(connection, framing.LENGTH.size)
    if head is None:
        return None
    (size,) = framing.LENGTH.unpack(head)
    return None if size > REPLY_BYTES else _exactly(connection, size)


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    data = bytearray()
    while len(data) < size:
        if not (chunk := connection.recv(min(size - len(data), 1 << 20))):
            return None
        data += chunk
    return bytes(data)
