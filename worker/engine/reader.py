"""Reads an answer while it arrives: tells reasoning from content.

The template's parser reads each beginning of the answer from its start.  A longer beginning may be read otherwise; what
can still change is not sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from msgspec import structs

from shared.channel.messages import Delta, Finish, Stop, TokenLogprobs
from worker.chat.code import ChatError, Message
from worker.chat.handle import HelperDied
from worker.chat.protocol import Prompt
from worker.engine.job import Piece

PAUSE_S = 0.03  # between two parses of an answer
TAIL = 200  # characters by which the end of what was sent is found in the answer

Parse = Callable[[str, bool], Awaitable[Message]]  # reads an answer, or (True) the beginning of one


@dataclass(slots=True)
class Said:
    """What an answer has said so far."""

    content: str = ""
    reasoning: str = ""

    def add(self, now: Message, *, is_whole: bool) -> tuple[str, str] | None:
        """Add what a reading of the answer says beyond this; return the new content and reasoning.

        Returns None if the reading contradicts what was said.  Spaces at the end wait for what follows: a tag takes
        those before it.
        """
        content, reasoning = now.content, now.reasoning_content
        if not is_whole:
            reasoning = reasoning if content.strip() else reasoning.rstrip()
            content = content.rstrip()
        new_content, new_reasoning = _beyond(self.content, content), _beyond(self.reasoning, reasoning)
        if new_content is None or new_reasoning is None:
            return None
        self.content += new_content
        self.reasoning += new_reasoning
        return new_content, new_reasoning


def _beyond(before: str, now: str) -> str | None:
    if now.startswith(before):
        return now[len(before) :]
    return "" if before.startswith(now.rstrip()) and len(before.rstrip()) == len(now.rstrip()) else None


class Reader:
    """Turns the pieces of one answer into deltas.  Belongs to an asyncio loop.

    Text that needs no parser passes straight on.
    """

    def __init__(
        self,
        empty: Delta,
        prompt: Prompt,
        parse: Parse,
        send: Callable[[Delta], None],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """`empty`: a delta with the ids of the request and the answer.  `send` gets what `add` does not return.
        `start` starts a task."""
        self.reasoning_tokens = 0
        self._empty, self._prompt, self._parse, self._send, self._start = empty, prompt, parse, send, start
        self._said = Said(prompt.before.content, prompt.before.reasoning_content)
        self._passes = prompt.source is None or self._is_open(prompt.before)
        self._text = ""
        self._ends: list[tuple[int, int]] = []  # of the pieces since the last parse: the place in the text, the tokens
        self._logprobs: list[TokenLogprobs] = []
        self._finish: Finish | None = None
        self._stop: Stop | None = None
        self._has_ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, piece: Piece) -> Delta | None:
        """Take a piece.  Returns what can be sent at once."""
        self._stop = piece.stop
        if self._passes:
            return self._delta(piece.text, "", piece.logprobs, piece.finish)
        self._text += piece.text
        self._ends.append((len(self._text), piece.n_tokens))
        self._logprobs += piece.logprobs
        self._finish = piece.finish
        if piece.finish is not None:
            self._has_ended.set()
        if self._task is None:
            self._task = self._start(self._read())
        return None

    def cancel(self) -> None:
        """Send nothing more."""
        if self._task is not None:
            self._task.cancel()

    async def _read(self) -> None:
        """Parse the answer until no more of it has arrived, it has ended, or the rest passes straight on."""
        while True:
            text, is_whole = self._text, self._finish is not None
            content, reasoning = await self._parsed(text, is_whole)
            if self._passes:  # also what arrived meanwhile
                content += self._text[len(text) :]
                is_whole = self._finish is not None
            logprobs, self._logprobs = self._logprobs, []
            if delta := self._delta(content, reasoning, logprobs, self._finish if is_whole else None):
                self._send(delta)
            if self._passes or is_whole or not self._ends:
                self._task = None
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._has_ended.wait()

    async def _parsed(self, text: str, is_whole: bool) -> tuple[str, str]:
        """Return the content and the reasoning in `text` that were not sent."""
        ends, self._ends = self._ends, []
        try:
            # An answer that was cut off is a beginning.
            now = await self._parse(text, not is_whole or self._finish == "length")
        except ChatError:
            return (self._unsent(text), "") if is_whole else ("", "")
        except HelperDied:
            self._passes = True
            return self._unsent(text), ""
        if now.reasoning_content and not self._said.content.strip():
            begins_at = len(text) - len(now.content) if now.content.strip() else len(text)
            self.reasoning_tokens += sum(n_tokens for end, n_tokens in ends if end <= begins_at)
        self._passes = self._is_open(now)
        new = self._said.add(now, is_whole=is_whole or self._passes)
        if new is None:
            return (self._unsent(text), "") if is_whole else ("", "")
        return new

    def _is_open(self, message: Message) -> bool:
        return self._prompt.is_open and bool(message.content.strip())

    def _unsent(self, text: str) -> str:
        """Return what follows in the text after what was sent of it."""
        before = self._prompt.before
        content = self._said.content[len(before.content) :]
        sent = (content or self._said.reasoning[len(before.reasoning_content) :])[-TAIL:]
        return text[text.rfind(sent) + len(sent) :] if sent else text

    def _delta(
        self, content: str, reasoning: str, logprobs: list[TokenLogprobs], finish: Finish | None
    ) -> Delta | None:
        if not (content or reasoning or logprobs or finish):
            return None
        stop = None if finish is None else self._stop
        return structs.replace(
            self._empty, text=content, reasoning=reasoning, logprobs=logprobs, finish=finish, stop=stop
        )
