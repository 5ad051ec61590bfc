"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask, told
from api.channel.answer import Answer
from api.decode import read_any
from api.errors import shaped
from api.openai.answer import DONE, Collected, Completion, Heading
from api.openai.request import ChatRequest, beginning, decoded, generate, ttl_s
from api.pool.roster import Roster
from api.state import State
from api.waiting import HEARTBEAT_S, EventStream, waited_for
from shared import paths
from shared.channel.messages import Deltas, Ended, Generate
from shared.errors import InvalidValue, QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.telemetry import log

HEARTBEAT = b":\n\n"  # a bare comment: some clients take ": text" for the end of the stream
MESSAGES = "messages"


async def chat_completions(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream.

    Everything that can be refused is refused with its status, before the first byte of a stream.
    """
    if request.state["draining"].is_set():
        raise QueueUnavailable("The server is shutting down and accepts no new requests. Try again shortly.")
    asked = decoded(await read_any(request, request.state["max_body_bytes"]))
    choices, caller, roster = asked.n or 1, request.state["caller"], request.state["roster"]
    ask = Ask(
        model=asked.model,
        order=partial(_order, asked, caller, roster),
        route=paths.CHAT_COMPLETIONS,
        prompt=MESSAGES,
        beginning=beginning(asked, caller),
        ttl_s=ttl_s(asked),
        traceparent=request.state["traceparent"],
    )
    async with AsyncExitStack() as undo:
        undo.enter_context(request.state["replies"].place(caller))
        instance, answer = await waited_for(request, request.state["answering"].begin(ask, undo))
        heading = Heading(instance.instance_id, roster.fingerprint(instance.worker))
        headers = {"Loadstone-Instance": instance.instance_id}
        if asked.stream:
            with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            events = streamed(answer, heading, choices, with_usage=with_usage)
            return EventStream(events, undo.pop_all(), request.state["closing"], headers)
        completion = await waited_for(request, collected(answer, heading, choices))
    return Response(msgspec.json.encode(completion), headers=headers, media_type="application/json")


def _order(asked: ChatRequest, client: str, roster: Roster, instance: Instance) -> Generate:
    """Return the order for an instance, with the settings of its model.

    Raises InvalidValue if it cannot generate so many answers at once.
    """
    config = instance.load_config
    parallel = config.parallel if config is not None and config.parallel is not msgspec.UNSET else 1
    if asked.n is not None and asked.n > parallel:
        raise InvalidValue(
            f"'n': expected at most {parallel}, the 'parallel' of the instance, got {asked.n}.", param="n"
        )
    return generate(asked, client, roster.settings_of(instance))


async def collected(answer: Answer, heading: Heading, choices: int) -> Completion:
    """Return the whole reply to a request that was accepted.  Raises the error of one that fails."""
    collection = Collected(heading, choices)
    async for message in answer:
        match told(message):
            case Deltas(deltas):
                for delta in deltas:
                    collection.add(delta)
            case Ended(usage=usage):
                return collection.completion(usage)
            case None:
                pass
    raise ServiceError("The answer has no end.")


async def streamed(answer: Answer, heading: Heading, choices: int, *, with_usage: bool) -> AsyncGenerator[bytes, None]:
    """Yield the events of a reply to a request that was accepted.

    An error ends the stream: an event with the error, without a last chunk and without `[DONE]`.
    """
    yield heading.first(choices)
    try:
        while True:
            try:
                async with asyncio.timeout(HEARTBEAT_S):  # a task for each message would cost more than the message
                    message = await anext(answer)
            except TimeoutError:
                yield HEARTBEAT
                continue
            match told(message):
                case Deltas(deltas):
                    yield b"".join(map(heading.added, deltas))
                case Ended(usage=usage):
                    yield (heading.usage(usage) if with_usage else b"") + DONE
                    return
                case None:
                    pass
    except ServiceError as e:
        body = e.body()
        log.get("api").info("request failed", action="request_failed", type=body.type, reason=body.message)
        yield b"data: %b\n\n" % msgspec.json.encode(shaped(body, paths.CHAT_COMPLETIONS)[1])
