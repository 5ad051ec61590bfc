"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import assert_never

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.channel.answer import Answer
from api.decode import read_any
from api.errors import shaped
from api.openai.answer import DONE, Collected, Completion, Heading
from api.openai.request import ChatRequest, decoded, generate
from api.state import State
from api.waiting import HEARTBEAT_S, EventStream, waited_for
from shared import paths
from shared.channel.messages import Deltas, Ended, Failed, FromRunner, Queued, Refused, Started
from shared.errors import (
    ChatUnavailable,
    InvalidValue,
    ModelUnloaded,
    QueueFull,
    QueueTimeout,
    QueueUnavailable,
    RequestCrashed,
    RequestFailed,
    ServiceError,
    context_length_exceeded,
)
from shared.instance import Instance
from shared.telemetry import log

HEARTBEAT = b":\n\n"  # a bare comment: some clients take ": text" for the end of the stream
MESSAGES = "messages"


async def chat_completions(request: Request[State]) -> Response:
    """Answer a conversation with a loaded LLM, whole or as a stream.

    Everything that can be refused is refused with its status, before the first byte of a stream.
    """
    if request.state["draining"].is_set():
        raise QueueUnavailable("The server is shutting down and accepts no new requests. Try again shortly.")
    asked = decoded(await read_any(request, request.state["max_body_bytes"]))
    channels = request.state["channels"]
    instance = await request.state["loaded"].llm(asked.model, channels.busy)
    choices = _choices(asked, instance)
    heading = Heading(instance.instance_id, request.state["roster"].fingerprint(instance.worker))
    headers = {"Loadstone-Instance": instance.instance_id}
    order = generate(asked, request.state["caller"])
    async with AsyncExitStack() as undo:
        undo.enter_context(request.state["replies"].place())
        answer = await undo.enter_async_context(channels.answering(instance, order, paths.CHAT_COMPLETIONS))
        await waited_for(request, accepted(answer))
        if asked.stream:
            with_usage = asked.stream_options is not None and bool(asked.stream_options.include_usage)
            events = streamed(answer, heading, choices, with_usage=with_usage)
            return EventStream(events, undo.pop_all(), request.state["closing"], headers)
        completion = await waited_for(request, collected(answer, heading, choices))
    return Response(msgspec.json.encode(completion), headers=headers, media_type="application/json")


def _choices(asked: ChatRequest, instance: Instance) -> int:
    """Return the number of answers.  Raises InvalidValue if the instance cannot generate so many at once."""
    config = instance.load_config
    parallel = config.parallel if config is not None and config.parallel is not msgspec.UNSET else 1
    if asked.n is not None and asked.n > parallel:
        raise InvalidValue(
            f"'n': expected at most {parallel}, the 'parallel' of the instance, got {asked.n}.", param="n"
        )
    return asked.n or 1


async def accepted(answer: Answer) -> None:
    """Wait until the runner accepts the request.  Raises the error if it refuses it."""
    message = await anext(answer)
    match message:
        case Queued():
            return
        case Refused():
            raise refusal(message)
        case Failed():
            raise RequestFailed(message.message)
        case Started() | Deltas() | Ended():
            raise ServiceError("The runner began a request that it had not accepted.")
        case _:
            assert_never(message)


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


def told(message: FromRunner) -> Deltas | Ended | None:
    """Return what of a message a client is told, None for nothing.  Raises the error that a message tells."""
    match message:
        case Deltas() | Ended():
            return message
        case Queued() | Started():
            return None
        case Refused():
            raise refusal(message)
        case Failed():
            raise RequestFailed(message.message)
        case _:
            assert_never(message)


def refusal(refused: Refused) -> ServiceError:
    """Return the error for a request that the runner refused."""
    param = refused.param or msgspec.UNSET
    match refused.code:
        case "invalid_request":
            return InvalidValue(refused.message, param=param)
        case "context_length_exceeded":
            return context_length_exceeded(refused.prompt_tokens, refused.context_length, MESSAGES)
        case "queue_full":
            return QueueFull(refused.message, refused.retry_after_s)
        case "queue_timeout":
            return QueueTimeout(refused.message)
        case "chat_unavailable":
            return ChatUnavailable(refused.message)
        case "closing":
            return ModelUnloaded(refused.message)
        case "helper_crashed":
            return RequestCrashed(refused.message)
        case _:
            assert_never(refused.code)
