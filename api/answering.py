"""Asks a model, for the routes of all families: the core knows no form of a client."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import AsyncExitStack
from typing import TypeVar, assert_never

from msgspec import UNSET, Struct

from api.channel.answer import Answer
from api.channel.channels import Channels
from api.loads.demand import OnDemand, Options, Watch
from api.pool.loaded import Loaded
from shared.channel.messages import (
    Deltas,
    Described,
    Ended,
    Failed,
    FromRunner,
    Progress,
    Queued,
    Refused,
    Started,
    Text,
    Tokens,
    ToModel,
    Vectors,
)
from shared.errors import (
    ChatUnavailable,
    InvalidValue,
    MissingParameter,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
    NoRoute,
    QueueFull,
    QueueTimeout,
    RequestCrashed,
    RequestFailed,
    RunnerLost,
    ServiceError,
    WrongModelType,
    context_length_exceeded,
)
from shared.instance import Instance
from shared.schema.model import ModelType
from shared.telemetry import log

_log = log.get("api")

Reply = TypeVar("Reply", Text, Tokens, Described)


class Ask(Struct, frozen=True, kw_only=True):
    """A request to a model."""

    model: str | None  # as the client wrote it
    type: ModelType | None = "llm"  # of the model that it needs; None: any, but an LLM if it names none
    order: Callable[[Instance], ToModel]  # translates the request for an instance; raises InvalidValue
    route: str
    prompt: str  # the field with the prompt, for errors about it
    beginning: bytes = b""  # of the conversation, for the choice among instances; none if it has none
    ttl_s: float | None = None  # of the instance, if it is loaded for the request; None: the default
    context_length: int | None = None  # the same
    watch: Watch | None = None  # gets the revisions of a load for which the request waits
    traceparent: str = ""


class Answering:
    """Finds an instance for each request, or loads one, and sends it the request.

    `on_demand` is None if models are not loaded on demand.  From the choice of an instance to the acceptance of the
    request, a second attempt included, at most `wait_s` seconds pass.
    """

    def __init__(self, loaded: Loaded, on_demand: OnDemand | None, channels: Channels, wait_s: float) -> None:
        self._loaded = loaded
        self._on_demand = on_demand
        self._channels = channels
        self._wait_s = wait_s

    async def begin(self, ask: Ask, held: AsyncExitStack) -> tuple[Instance, Answer]:
        """Return the answer to a request that a runner accepted, and the instance that gives it.

        Closing `held` ends the request.  A request that an instance lost before accepting it is sent once more: to
        another instance, or to one that is loaded for it.

        Raises the reason why there is no answer, and what UNAVAILABLE lists.
        """
        try:
            instance = await self._loaded.instance(
                ask.model, self._channels.busy, beginning=ask.beginning, type_=ask.type
            )
        except ModelNotLoaded as e:
            if self._on_demand is None:
                raise
            instance = await self._load(self._on_demand, e.key, ask)
        lost: ServiceError | None = None
        try:
            async with asyncio.timeout(self._wait_s):
                try:
                    return instance, await self._accepted(ask, instance, held)
                except (ModelUnloaded, RunnerLost, NoRoute) as e:
                    lost = e
                    other = await self._other(ask, instance, lost)
                    _log.info("request sent again", action="request_sent_again", reason=str(e), to=other.instance_id)
                    return other, await self._accepted(ask, other, held)
        except TimeoutError:
            raise lost or QueueTimeout("The engine process did not accept the request in time.") from None

    async def looked_up(self, ask: Ask, kind: type[Reply]) -> tuple[Instance, Reply]:
        """Return the reply of this type to a `Lookup`, and the instance that gives it.  Raises what `begin` raises."""
        async with AsyncExitStack() as held:
            instance, answer = await self.begin(ask, held)
            async for message in answer:
                if isinstance(message, kind):
                    return instance, message
                told(message)
        raise ServiceError("The runner did not reply.")

    async def _accepted(self, ask: Ask, instance: Instance, held: AsyncExitStack) -> Answer:
        """Send a request, and return its answer once the runner has accepted it."""
        async with AsyncExitStack() as attempt:
            answer = await attempt.enter_async_context(
                self._channels.answering(instance, ask.order(instance), ask.route)
            )
            message = await anext(answer)
            match message:
                case Queued():
                    held.push_async_exit(attempt.pop_all())
                    return answer
                case Refused():
                    raise refusal(message, ask.prompt, has_texts=ask.type == "embedding")
                case Failed():
                    raise RequestFailed(message.message)
                case Started() | Progress() | Deltas() | Vectors() | Text() | Tokens() | Described() | Ended():
                    raise ServiceError("The runner began a request that it had not accepted.")
                case _:
                    assert_never(message)

    async def _other(self, ask: Ask, failed: Instance, error: ModelUnloaded | RunnerLost | NoRoute) -> Instance:
        """Return the instance for the second attempt at a request that `failed` lost.  Raises `error` if there is none.

        If a new channel reaches the runner that seemed lost, only the channel had broken: the same instance is asked.
        """
        without = {failed.id}
        try:
            return await self._loaded.instance(ask.model, self._channels.busy, without, ask.beginning, ask.type)
        except (ModelNotFound, MissingParameter) as e:  # the second: the only model, which the request did not name
            if isinstance(error, RunnerLost) and await self._channels.reaches(failed):
                return failed
            if not isinstance(e, ModelNotLoaded) or isinstance(error, NoRoute) or self._on_demand is None:
                raise error from None
            return await self._load(self._on_demand, e.key, ask, without)

    @staticmethod
    async def _load(on_demand: OnDemand, key: str, ask: Ask, without: Collection[str] = ()) -> Instance:
        options = Options(ttl_s=ask.ttl_s, context_length=ask.context_length)
        return await on_demand.loaded(key, options, without, ask.traceparent, ask.watch)


def told(message: FromRunner) -> Deltas | Progress | Vectors | Ended | None:
    """Return what of a message about an accepted request a client is told, None for nothing.

    Raises the error that a message tells.
    """
    match message:
        case Deltas() | Progress() | Vectors() | Ended():
            return message
        case Queued() | Started():
            return None
        case Refused():
            raise refusal(message)
        case Failed():
            raise RequestFailed(message.message)
        case Text() | Tokens() | Described():
            raise ServiceError("The runner replied to another request.")
        case _:
            assert_never(message)


def refusal(refused: Refused, prompt: str = "", *, has_texts: bool = False) -> ServiceError:
    """Return the error for a request that the runner refused.  `prompt` is the field with the prompt, or with texts."""
    match refused.code:
        case "invalid_request":
            return InvalidValue(refused.message, param=refused.param or UNSET)
        case "wrong_type":
            return WrongModelType(refused.message, param=refused.param or UNSET)
        case "context_length_exceeded":
            return context_length_exceeded(refused.prompt_tokens, refused.context_length, prompt, is_text=has_texts)
        case "queue_full":
            return QueueFull(refused.message, refused.retry_after_s)
        case "queue_timeout":
            return QueueTimeout(refused.message)
        case "closing":
            return ModelUnloaded(refused.message)
        case "chat_unavailable":
            return ChatUnavailable(refused.message)
        case "helper_crashed":
            return RequestCrashed(refused.message)
        case _:
            assert_never(refused.code)
