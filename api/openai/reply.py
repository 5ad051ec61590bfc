"""Replies to requests for text, whole or as a stream of events, for the routes of all families."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Protocol

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask, told
from api.channel.answer import Answer
from api.errors import shaped
from api.state import State
from api.waiting import HEARTBEAT_S, EventStream, waited_for
from shared.channel.messages import Delta, Deltas, Ended, Progress, Usage
from shared.errors import QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.telemetry import log


class Form(Protocol):
    """The form of one reply, which is either whole or a stream."""

    def add(self, delta: Delta) -> None:
        """Collect an addition for a whole reply."""

    def whole(self, usage: Usage) -> Struct:
        """Return the whole reply, once every answer has finished."""

    def first(self) -> bytes:
        """Return the first events of a stream."""

    def added(self, delta: Delta) -> bytes:
        """Return the events for an addition."""

    def last(self, usage: Usage) -> bytes:
        """Return the last events of a stream, once every answer has finished."""

    def read(self, share: float) -> bytes:
        """Return the events for a share of the prompt that is processed, if the request wanted to know of it."""

    def waiting(self) -> bytes:
        """Return what keeps the connection of a stream open while there is nothing else to send."""

    def failed(self, error: Struct) -> bytes:
        """Return the last events of a stream that ends with an error, which has the form of the route."""


FormOf = Callable[[Instance, int], Form]  # for the instance that answers, and the number of tokens of the prompt
BeforeEnd = Callable[[Form, Usage], Awaitable[None]]  # what is awaited before the end of a reply is sent
Around = Callable[[Instance, Form], Form]  # makes the form of another API of one of this


def plain(_: Instance, form: Form) -> Form:
    """Return the form of OpenAI's API as it is."""
    return form


async def at_once(_: Form, usage: Usage) -> None:
    """Send the end of a reply at once."""


def check_draining(request: Request[State]) -> None:
    """Refuse a new request while this process shuts down."""
    if request.state["draining"].is_set():
        raise QueueUnavailable("The server is shutting down and accepts no new requests. Try again shortly.")


async def reply(
    request: Request[State], ask: Ask, form_of: FormOf, before_end: BeforeEnd = at_once, *, streams: bool
) -> Response:
    """Ask a model, and reply in a form.

    Everything that can be refused is refused with its status, before the first byte of a stream.
    """
    async with AsyncExitStack() as undo:
        undo.enter_context(request.state["replies"].place(request.state["caller"]))
        instance, answer = await waited_for(request, request.state["answering"].begin(ask, undo))
        headers = {"Loadstone-Instance": instance.instance_id}
        form = form_of(instance, answer.prompt_tokens or 0)
        if streams:
            events = streamed(answer, form, ask.route, before_end)
            return EventStream(events, undo.pop_all(), request.state["closing"], headers)
        whole = await waited_for(request, collected(answer, form, before_end))
    return Response(msgspec.json.encode(whole), headers=headers, media_type="application/json")


async def collected(answer: Answer, form: Form, before_end: BeforeEnd) -> Struct:
    """Return the whole reply to a request that was accepted.  Raises the error of one that fails."""
    async for message in answer:
        match told(message):
            case Deltas(deltas):
                for delta in deltas:
                    form.add(delta)
            case Ended(usage=usage):
                await before_end(form, usage)
                return form.whole(usage)
            case Progress() | None:
                pass
    raise ServiceError("The answer has no end.")


async def streamed(answer: Answer, form: Form, route: str, before_end: BeforeEnd) -> AsyncGenerator[bytes, None]:
    """Yield the events of a reply to a request that was accepted.

    An error ends the stream: its events come instead of the last ones.
    """
    yield form.first()
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):  # a task for each message would cost more than the message
                    message = await anext(answer)
            except TimeoutError:
                yield form.waiting()
                continue
            match told(message):
                case Deltas(deltas):
                    yield b"".join(map(form.added, deltas))
                case Progress(tokens=tokens, of=n):
                    yield form.read(tokens / n)
                case Ended(usage=usage):
                    await before_end(form, usage)
                    yield form.last(usage)
                    return
                case None:
                    pass
    except ServiceError as e:
        body = e.body()
        log.get("api").info("request failed", action="request_failed", type=body.type, reason=body.message)
        yield form.failed(shaped(body, route)[1])
