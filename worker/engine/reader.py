"""Reads an answer while it arrives: tells reasoning, content and calls of tools apart.

The template's parser reads each beginning of the answer from its start.  A longer beginning may be read otherwise; what
can still change is not sent.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from bisect import bisect_right
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass, field, replace
from operator import itemgetter
from typing import Any, assert_never

import msgspec
from msgspec import structs

from shared.channel.messages import Delta, Finish, Stop, TokenLogprobs, ToolDelta
from worker.chat.code import ChatError, Message, ToolCall, Trigger
from worker.chat.handle import HelperDied
from worker.chat.protocol import Constraint, Prompt
from worker.engine.job import Piece

PAUSE_S = 0.03  # between two parses of an answer
TAIL = 200  # characters by which the end of what was sent is found in the answer

Parse = Callable[[str, bool], Awaitable[Message]]  # reads an answer, or (True) the beginning of one


@dataclass(slots=True)
class Call:
    """A call of a tool, as far as it was sent."""

    id: str
    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class News:
    """What a reading of an answer says beyond the one before."""

    content: str = ""
    reasoning: str = ""
    tools: list[ToolDelta] = field(default_factory=list)
    is_called: bool = False  # the answer has ended with calls


@dataclass(slots=True)
class Said:
    """What an answer has said so far."""

    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)

    def add(self, now: Message, calls: list[ToolCall], *, is_whole: bool) -> News | None:
        """Add what a reading of the answer says beyond this, with those of its calls that can be sent; return that.

        Returns None if the reading contradicts what was said.  Spaces at the end wait for what follows: a tag takes
        those before it.
        """
        content, reasoning = now.content, now.reasoning_content
        if not is_whole:
            reasoning = reasoning if content.strip() or now.tool_calls else reasoning.rstrip()
            content = content if now.tool_calls else content.rstrip()
        new_content, new_reasoning = _beyond(self.content, content), _beyond(self.reasoning, reasoning)
        if new_content is None or new_reasoning is None or not self._continue(calls):
            return None
        self.content += new_content
        self.reasoning += new_reasoning
        return News(new_content, new_reasoning, self._called(calls))

    def _continue(self, calls: list[ToolCall]) -> bool:
        """Return whether calls are those that were sent, or longer."""
        return len(calls) >= len(self.calls) and all(map(_continues, self.calls, calls))

    def _called(self, now: list[ToolCall]) -> list[ToolDelta]:
        new = []
        for index, call in enumerate(now):
            name, arguments = call.function.name, call.function.arguments
            if index == len(self.calls):
                self.calls.append(Call(f"call_{secrets.token_hex(12)}", name, arguments))
                new.append(ToolDelta(index, self.calls[-1].id, name, arguments))
                continue
            sent = self.calls[index]
            if more := arguments[len(sent.arguments) :]:
                sent.arguments = arguments
                new.append(ToolDelta(index, arguments=more))
        return new


def _beyond(before: str, now: str) -> str | None:
    if now.startswith(before):
        return now[len(before) :]
    return "" if before.startswith(now.rstrip()) and len(before.rstrip()) == len(now.rstrip()) else None


def _continues(sent: Call, now: ToolCall) -> bool:
    return now.function.name == sent.name and now.function.arguments.startswith(sent.arguments)


def is_complete(call: ToolCall) -> bool:
    """Return whether the arguments of a call are an object."""
    try:
        msgspec.json.decode(call.function.arguments, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, RecursionError):
        return False
    return True


class Calls:
    """Says which calls of an answer can be sent."""

    def __init__(self, prompt: Prompt) -> None:
        self._constraint, self._most = prompt.constraint, prompt.most_calls
        self._is_certain = False  # the rest of the answer is made of calls, which the constraint enforces

    def of(self, text: str, message: Message, *, is_whole: bool) -> list[ToolCall]:
        """Return the calls that a reading of a text shows, and that will stay calls whatever follows."""
        named = [call for call in message.tool_calls if call.function.name][: self._most]
        if named and not self._is_certain:
            self._is_certain = self._constraint is not None and applies(self._constraint, text)
        return named if self._is_certain or (is_whole and all(map(is_complete, named))) else []

    def may_hide(self, message: Message) -> bool:
        """Return whether a reading leaves out a text that may be a call, and may be none."""
        is_empty = not message.content and not message.reasoning_content
        return self._most != 0 and (bool(message.tool_calls) or (is_empty and self._constraint is None))


def applies(constraint: Constraint, text: str) -> bool:
    """Return whether a constraint applies to the end of an answer that begins with `text`."""
    return not constraint.lazy or any(_is_in(trigger, text) for trigger in constraint.triggers)


def _is_in(trigger: Trigger, text: str) -> bool:
    match trigger.type:
        case "word" | "token":
            return trigger.value in text
        case "pattern" | "pattern_full":  # it ends where the engine was when it looked
            return re.search(trigger.value.removesuffix("$"), text) is not None
        case _:
            assert_never(trigger.type)


class Reader:
    """Turns the pieces of one answer into deltas.  Belongs to an asyncio loop.

    Text that needs no parser passes straight on.
    """

    def __init__(
        self,
        empty: Delta,
        prompt: Prompt,
        parse: Parse,
        send: Callable[[list[Delta]], None],
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """`empty`: a delta with the ids of the request and the answer.  `send` gets what `add` does not return.
        `start` starts a task."""
        self.reasoning_tokens = 0
        self._empty, self._prompt, self._parse, self._send, self._start = empty, prompt, parse, send, start
        self._said = Said(prompt.before.content, prompt.before.reasoning_content)
        self._calls = Calls(prompt)
        self._passes = prompt.source is None or self._is_open(prompt.before)
        self._text = ""
        self._has_more = False  # than at the last parse
        self._ends: list[tuple[int, int]] = []  # of the pieces: the place in the text, the tokens up to it
        self._logprobs: list[TokenLogprobs] = []
        self._finish: Finish | None = None
        self._stop: Stop | None = None
        self._has_ended = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def add(self, piece: Piece) -> Delta | None:
        """Take a piece.  Returns what can be sent at once."""
        self._stop = piece.stop
        if self._passes:
            text = "" if self._said.calls else piece.text
            return next(iter(self._deltas(text, News(), piece.logprobs, piece.finish)), None)
        self._text += piece.text
        self._has_more = True
        self._ends.append((len(self._text), piece.n_tokens + (self._ends[-1][1] if self._ends else 0)))
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
            news = await self._parsed(text, is_whole)
            content = news.content
            if self._passes:  # also what arrived meanwhile
                content += "" if self._said.calls else self._text[len(text) :]
                is_whole = self._finish is not None
            logprobs, self._logprobs = self._logprobs, []
            finish = self._finish if is_whole else None
            if finish == "stop" and news.is_called:
                finish = "tool_calls"
            if deltas := self._deltas(content, news, logprobs, finish):
                self._send(deltas)
            if self._passes or is_whole or not self._has_more:
                self._task = None
                return
            with suppress(TimeoutError):
                async with asyncio.timeout(PAUSE_S):
                    await self._has_ended.wait()

    async def _parsed(self, text: str, is_whole: bool) -> News:
        """Return what of `text` was not sent."""
        self._has_more = False
        is_cut = self._finish == "length"  # such an answer is a beginning
        try:
            now = await self._parse(text, not is_whole or is_cut)
        except ChatError:
            return News(self._unsent(text)) if is_whole else News()
        except HelperDied:
            self._passes = True
            return News(self._unsent(text))
        if now.reasoning_content and not self._said.content.strip() and not self._said.calls:
            n_pieces = bisect_right(self._ends, _end_of_reasoning(text, now), key=itemgetter(0))
            self.reasoning_tokens = self._ends[n_pieces - 1][1] if n_pieces else 0
        self._passes = self._is_open(now)
        calls = self._calls.of(text, now, is_whole=is_whole and not is_cut)
        news = self._said.add(now, calls, is_whole=is_whole or self._passes)
        if news is None:
            return News(self._unsent(text)) if is_whole else News()
        if is_whole and not calls and self._calls.may_hide(now):
            return replace(news, content=news.content + self._unsent(text))
        return replace(news, is_called=bool(calls) and all(map(is_complete, calls)))

    def _is_open(self, message: Message) -> bool:
        return self._prompt.is_open and bool(message.content.strip())

    def _unsent(self, text: str) -> str:
        """Return what follows in the text after what was sent of it; nothing once a call was sent."""
        if self._said.calls:
            return ""
        before = self._prompt.before
        content = self._said.content[len(before.content) :]
        sent = (content or self._said.reasoning[len(before.reasoning_content) :])[-TAIL:]
        return text[text.rfind(sent) + len(sent) :] if sent else text

    def _deltas(self, content: str, news: News, logprobs: list[TokenLogprobs], finish: Finish | None) -> list[Delta]:
        first = news.tools[0] if news.tools else None
        if not (content or news.reasoning or first or logprobs or finish):
            return []
        deltas = [
            structs.replace(self._empty, text=content, reasoning=news.reasoning, tool=first, logprobs=logprobs),
            *(structs.replace(self._empty, tool=tool) for tool in news.tools[1:]),
        ]
        deltas[-1] = structs.replace(deltas[-1], finish=finish, stop=None if finish is None else self._stop)
        return deltas


def _end_of_reasoning(text: str, now: Message) -> int:
    """Return where the reasoning of an answer ends."""
    if now.content.strip():
        return len(text) - len(now.content)
    tail = now.reasoning_content.rstrip()[-TAIL:]
    return text.rfind(tail) + len(tail)
