"""Which instance gets a request, and what a lost request does: the decisions, with instances that are functions."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from msgspec import UNSET, UnsetType

from api.answering import Answering, Ask
from api.channel.answer import Answer
from api.loads.demand import Options, Watch
from shared.channel.messages import Failed, Generate, Queued, Refused
from shared.errors import (
    ContextLengthExceeded,
    InvalidValue,
    MissingParameter,
    ModelNotFound,
    ModelNotLoaded,
    ModelUnloaded,
    NoRoute,
    QueueFull,
    QueueTimeout,
    RequestFailed,
    RunnerLost,
    ServiceError,
)
from shared.instance import Instance
from shared.schema.http import LoadRequest
from shared.schema.model import ModelType

ACCEPTS = Queued(id=0, prompt_tokens=1, ahead=0)
CLOSING = Refused(id=0, code="closing", message="closing")
NEW = "new"
Reaction = Queued | Refused | Failed | ServiceError | None  # None: silence


def instance(id_: str) -> Instance:
    return Instance(id=id_, model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"))


class Pool:
    """Loaded instances, by what they do with a request; on demand, one that accepts is loaded."""

    def __init__(self, reactions: dict[str, list[Reaction]], missing: ServiceError | None = None) -> None:
        self.reactions = reactions
        self.missing = missing or ModelNotLoaded("not loaded", "p/m")
        self.reachable: set[str] = set()
        self.sent: list[str] = []
        self.loads: list[tuple[str, float | None, set[str]]] = []
        self.open = 0

    async def instance(
        self,
        name: str | None,
        busy: Callable[[Instance], int],
        without: Collection[str] = (),
        beginning: bytes = b"",
        type_: ModelType = "llm",
    ) -> Instance:
        for id_ in self.reactions:
            if id_ not in without:
                return instance(id_)
        raise self.missing

    async def loaded(
        self,
        name: str,
        options: Options,
        without: Collection[str] = (),
        traceparent: str = "",
        watch: Watch | None = None,
    ) -> Instance:
        self.loads.append((name, options.ttl_s, set(without)))
        self.reactions.setdefault(NEW, [ACCEPTS])
        return instance(NEW)

    @asynccontextmanager
    async def answering(self, to: Instance, request: Generate, route: str) -> AsyncIterator[Answer]:
        self.sent.append(to.id)
        reaction = self.reactions[to.id].pop(0)
        answer = Answer()
        if isinstance(reaction, ServiceError):
            answer.fail(reaction)
        elif reaction is not None:
            answer.put(reaction)
        self.open += 1
        try:
            yield answer
        finally:
            self.open -= 1

    async def reaches(self, to: Instance) -> bool:
        return to.id in self.reachable

    def busy(self, _: Instance) -> int:
        return 0


async def begun(pool: Pool, *, jit: bool = True, wait_s: float = 60.0, **fields: Any) -> str:
    """Begin a request; return the id of the instance that accepted it."""
    part: Any = pool
    ask = Ask(
        **{"model": "P/M", "order": lambda _: Generate(id=0, client="", conversation=b""), "route": "/", **fields},
        prompt="messages",
        ttl_s=5.0,
    )
    async with AsyncExitStack() as held:
        answered, _ = await Answering(part, part if jit else None, part, wait_s).begin(ask, held)
        assert pool.open == 1
    assert pool.open == 0
    return answered.id


@pytest.fixture(params=[CLOSING, ModelUnloaded("gone"), RunnerLost("dead")], ids=["closing", "unloaded", "lost"])
def loss(request: pytest.FixtureRequest) -> Reaction:
    reaction: Reaction = request.param
    return reaction


async def test_a_loaded_instance_is_asked() -> None:
    pool = Pool({"a": [ACCEPTS], "b": []})
    assert await begun(pool) == "a"
    assert (pool.sent, pool.loads) == (["a"], [])


async def test_a_model_is_loaded_by_the_name_in_the_list() -> None:
    pool = Pool({})
    assert await begun(pool) == NEW
    assert pool.loads == [("p/m", 5.0, set())]
    with pytest.raises(ModelNotLoaded):
        await begun(Pool({}), jit=False)


async def test_a_lost_request_goes_to_another_instance(loss: Reaction) -> None:
    pool = Pool({"a": [loss], "b": [ACCEPTS]})
    pool.reachable = {"a"}
    assert await begun(pool) == "b"
    assert (pool.sent, pool.loads) == (["a", "b"], [])


async def test_a_lost_request_loads_its_model_again(loss: Reaction) -> None:
    pool = Pool({"a": [loss]})
    assert await begun(pool) == NEW
    assert pool.loads == [("p/m", 5.0, {"a"})]


async def test_a_request_is_sent_twice_at_most(loss: Reaction) -> None:
    pool = Pool({"a": [loss], "b": [loss], "c": [ACCEPTS]})
    with pytest.raises((ModelUnloaded, RunnerLost)):
        await begun(pool)
    assert (pool.sent, pool.loads, pool.open) == (["a", "b"], [], 0)


async def test_without_loads_on_demand_the_first_loss_is_reported(loss: Reaction) -> None:
    with pytest.raises((ModelUnloaded, RunnerLost)):
        await begun(Pool({"a": [loss]}), jit=False)


async def test_an_instance_behind_a_broken_channel_is_asked_again() -> None:
    pool = Pool({"a": [RunnerLost("cut"), ACCEPTS]})
    pool.reachable = {"a"}
    assert await begun(pool) == "a"
    assert (pool.sent, pool.loads) == (["a", "a"], [])
    pool = Pool({"a": [ModelUnloaded("gone"), ACCEPTS]})
    pool.reachable = {"a"}
    assert await begun(pool) == NEW, "its runner said that it ends"


async def test_an_unreachable_worker_is_no_reason_for_a_load() -> None:
    with pytest.raises(NoRoute):
        await begun(Pool({"a": [NoRoute("elsewhere")]}))
    pool = Pool({"a": [NoRoute("elsewhere")], "b": [ACCEPTS]})
    assert await begun(pool) == "b"


@pytest.mark.parametrize("missing", [ModelNotFound("no model of that name"), MissingParameter("no LLM is loaded")])
async def test_a_lost_instance_that_was_meant_itself_is_reported(missing: ServiceError, loss: Reaction) -> None:
    """The name was the id of the instance, or there was none and this was the only LLM."""
    pool = Pool({"a": [loss]}, missing)
    with pytest.raises((ModelUnloaded, RunnerLost)):
        await begun(pool)
    assert pool.loads == []


@pytest.mark.parametrize(
    ("reaction", "error", "param"),
    [
        (Refused(id=0, code="invalid_request", message="no", param="stop"), InvalidValue, "stop"),
        (Refused(id=0, code="queue_full", message="no", retry_after_s=3), QueueFull, UNSET),
        (Refused(id=0, code="context_length_exceeded", message="no"), ContextLengthExceeded, "messages"),
        (Failed(id=0, code="engine_failed", message="no"), RequestFailed, UNSET),
    ],
)
async def test_other_refusals_are_final(
    reaction: Refused | Failed, error: type[ServiceError], param: str | UnsetType
) -> None:
    pool = Pool({"a": [reaction], "b": [ACCEPTS]})
    with pytest.raises(error) as raised:
        await begun(pool)
    assert (pool.sent, pool.open, raised.value.param) == (["a"], 0, param)


async def test_a_request_that_does_not_suit_its_instance_is_refused() -> None:
    def order(_: Instance) -> Generate:
        raise InvalidValue("too many")

    pool = Pool({"a": [ACCEPTS], "b": [ACCEPTS]})
    with pytest.raises(InvalidValue):
        await begun(pool, order=order)
    assert pool.sent == []


@pytest.mark.parametrize(
    ("reactions", "error"),
    [({"a": [None]}, QueueTimeout), ({"a": [CLOSING], "b": [None]}, ModelUnloaded)],  # that of the first attempt
    ids=["first", "second"],
)
async def test_the_wait_for_an_acceptance_is_bounded(
    reactions: dict[str, list[Reaction]], error: type[ServiceError]
) -> None:
    pool = Pool({**reactions})
    with pytest.raises(error):
        await begun(pool, wait_s=0.2)
    assert pool.open == 0


async def test_a_cancelled_request_leaves_nothing() -> None:
    pool = Pool({"a": [None]})
    asking = asyncio.create_task(begun(pool))
    while not pool.open:  # noqa: ASYNC110
        await asyncio.sleep(0)
    asking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asking
    assert pool.open == 0
