"""The form of responses: what was generated becomes items, one after the other, and events that tell of each.

The order and the fields of the events follow what real clients were measured to need: every event has its number, and
each item, and each part of one, is begun before there is more of it, and ends before the next one begins.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, assert_never

from msgspec import Struct, structs

from api.openai.answer import Events, TokenInfo, token_infos
from api.openai.errors import OpenAIErrorReply
from api.responses.events import (
    ArgumentsDelta,
    ArgumentsDone,
    Event,
    ItemAdded,
    ItemDone,
    OutputTextDelta,
    OutputTextDone,
    PartAdded,
    PartDone,
    ReasoningTextDelta,
    ReasoningTextDone,
    ResponseCompleted,
    ResponseCreated,
    ResponseFailed,
    ResponseIncomplete,
    ResponseInProgress,
)
from api.responses.response import (
    CallItem,
    IncompleteDetails,
    Item,
    ItemStatus,
    MessageItem,
    OutputText,
    Part,
    ReasoningItem,
    ReasoningText,
    ResponseError,
    ResponseObject,
    ResponseUsage,
)
from api.waiting import encoded
from shared.channel.messages import Delta, Finish, ToolDelta, Usage


class _Open:
    """The item that is being generated."""

    def __init__(self, item: Item, call: ToolDelta | None = None) -> None:
        self.item = item
        self.call = call
        self.texts: list[str] = []
        self.logprobs: list[TokenInfo] = []


class Responding(Events):
    """The form of one response.  It has one item at a time, so the next one ends it."""

    def __init__(self, response: ResponseObject) -> None:
        """`response`: of which nothing is generated."""
        self._response = response
        self._items: list[Item] = []
        self._open: _Open | None = None
        self._logprobs: list[TokenInfo] = []  # of tokens whose text has not come yet
        self._is_cut = False
        self._n_events = 0
        self._whole: ResponseObject | None = None

    def add(self, delta: Delta) -> None:
        for _ in self._events(delta):
            pass

    def whole(self, usage: Usage) -> ResponseObject:
        """Return the response, once the answer has finished: always the same."""
        if self._whole is None:
            self._whole = self._ended(usage)
        return self._whole

    def is_not_stored(self, usage: Usage) -> None:
        """Let the response say that it is not stored."""
        self._whole = structs.replace(self.whole(usage), store=False)

    def first(self) -> bytes:
        created = ResponseCreated(sequence_number=self._number(), response=self._response)
        return encoded(created) + encoded(ResponseInProgress(sequence_number=self._number(), response=self._response))

    def added(self, delta: Delta) -> bytes:
        return b"".join(map(encoded, self._events(delta)))

    def last(self, usage: Usage) -> bytes:
        kind = ResponseIncomplete if self._is_cut else ResponseCompleted
        return encoded(kind(sequence_number=self._number(), response=self.whole(usage)))

    def failed(self, error: Struct) -> bytes:
        assert isinstance(error, OpenAIErrorReply)
        response = structs.replace(
            self._response,
            status="failed",
            error=ResponseError(error.error.code or error.error.type, error.error.message),
            output=[*self._items],
            store=False,
        )
        return encoded(ResponseFailed(sequence_number=self._number(), response=response))

    def _number(self) -> int:
        self._n_events += 1
        return self._n_events - 1

    def _ended(self, usage: Usage) -> ResponseObject:
        return structs.replace(
            self._response,
            status="incomplete" if self._is_cut else "completed",
            completed_at=None if self._is_cut else int(time.time()),
            incomplete_details=IncompleteDetails() if self._is_cut else None,
            output=[*self._items],
            usage=ResponseUsage.of(usage),
        )

    def _events(self, delta: Delta) -> Iterator[Event]:
        """Yield the events for an addition: of reasoning, then of text, then of a call, then of the end."""
        if delta.reasoning:
            yield from self._reasoned(delta.reasoning)
        if delta.text or not (delta.reasoning or delta.tool):
            self._logprobs += token_infos(delta.logprobs)
        if delta.text:
            yield from self._said(delta.text)
        if delta.tool is not None:
            yield from self._called(delta.tool)
        if delta.finish is not None:
            yield from self._finished(delta.finish)

    def _reasoned(self, text: str) -> Iterator[Event]:
        self._logprobs.clear()
        if self._open is None or not isinstance(self._open.item, ReasoningItem):
            item = ReasoningItem(id=f"rs_{secrets.token_hex(24)}", status="in_progress", content=[])
            yield from self._begin(_Open(item), ReasoningText(text=""))
        assert self._open is not None
        self._open.texts.append(text)
        yield ReasoningTextDelta(**self._place(), delta=text)

    def _said(self, text: str) -> Iterator[Event]:
        if self._open is None or not isinstance(self._open.item, MessageItem):
            yield from self._begin_message()
        assert self._open is not None
        logprobs, self._logprobs = self._logprobs, []
        self._open.texts.append(text)
        self._open.logprobs += logprobs
        yield OutputTextDelta(**self._place(), delta=text, logprobs=logprobs)

    def _begin_message(self) -> Iterator[Event]:
        item = MessageItem(id=f"msg_{secrets.token_hex(24)}", status="in_progress", content=[])
        yield from self._begin(_Open(item), OutputText(text=""))

    def _called(self, tool: ToolDelta) -> Iterator[Event]:
        """Yield the events for a call.  An earlier one than the open one has ended: it could only get white space."""
        if tool.id:
            item = CallItem(
                id=f"fc_{secrets.token_hex(24)}", status="in_progress", call_id=tool.id, name=tool.name, arguments=""
            )
            yield from self._begin(_Open(item, tool))
        opened = self._open
        if tool.arguments and opened is not None and opened.call is not None and opened.call.index == tool.index:
            opened.texts.append(tool.arguments)
            yield ArgumentsDelta(**self._place(), delta=tool.arguments)

    def _begin(self, opened: _Open, part: Part | None = None) -> Iterator[Event]:
        """End the item before this one, and begin it."""
        yield from self._end("completed")
        self._open = opened
        yield ItemAdded(sequence_number=self._number(), output_index=len(self._items), item=opened.item)
        if part is not None:
            yield PartAdded(**self._place(), part=part)

    def _finished(self, finish: Finish) -> Iterator[Event]:
        """End the last item.  An answer without any has an empty message."""
        self._is_cut = finish == "length"
        if not self._items and self._open is None:
            yield from self._begin_message()
        yield from self._end("incomplete" if self._is_cut else "completed")

    def _end(self, status: ItemStatus) -> Iterator[Event]:
        """End the item that is being generated, if there is one."""
        if self._open is None:
            return
        text = "".join(self._open.texts)
        item: Item
        match self._open.item:
            case ReasoningItem() as begun:
                yield ReasoningTextDone(**self._place(), text=text)
                yield PartDone(**self._place(), part=ReasoningText(text=text))
                item = structs.replace(begun, status=status, content=[ReasoningText(text=text)])
            case MessageItem() as begun:
                logprobs, self._logprobs = self._open.logprobs + self._logprobs, []
                part = OutputText(text=text, logprobs=logprobs)
                yield OutputTextDone(**self._place(), text=text, logprobs=logprobs)
                yield PartDone(**self._place(), part=part)
                item = structs.replace(begun, status=status, content=[part])
            case CallItem() as begun:
                yield ArgumentsDone(**self._place(), name=begun.name, arguments=text)
                item = structs.replace(begun, status=status, arguments=text)
            case _:
                assert_never(self._open.item)
        yield ItemDone(sequence_number=self._number(), output_index=len(self._items), item=item)
        self._items.append(item)
        self._open = None

    def _place(self) -> dict[str, Any]:
        """Return the number of an event about the open item, and the place of the item."""
        assert self._open is not None
        return {
            "sequence_number": self._number(),
            "output_index": len(self._items),
            "item_id": self._open.item.id,
        }
