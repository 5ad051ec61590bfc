"""An agent and its instances: records, runners, and the messages of a runner."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from itertools import pairwise

import msgspec
import pytest
from msgspec import UNSET

from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.model import FileStat
from tests.support.runners import freeze, is_gone
from tests.support.waiting import no_runners, until
from worker.agent import Agent
from worker.runner.process import Received, Runner
from worker.runner.protocol import Ready

DEADLINE_S = 60.0
SHORT_S = 0.3  # grace of a rung of the stop ladder for frozen runners
EPOCH = "e"  # of the lease of "w"

Begin = Callable[..., Awaitable[Agent]]  # of the fixture `begin`


async def ended(agent: Agent) -> None:
    if agent.runners.next_runner is not None:
        await asyncio.wait([agent.runners.next_runner])  # another test covers a runner that is still starting
    await agent.drain()
    await agent.runners.close()
    await until(no_runners, "all runners gone")
    assert (agent.residents, agent.tasks) == ({}, {})


async def submitted(agent: Agent, number: int = 1, key: str = "p/llama", worker_: str = "w") -> str:
    """Create a record in the queue of a worker and return its ID."""
    model = agent.models.get(key)
    record = Instance(
        id=f"load_{number}",
        model=key,
        key=key,
        source=None if model is None else model.source,
        type="llm" if model is None else model.type,
        worker=worker_,
        request=LoadRequest(model=key, context_length=256),
        total_size_bytes=1 if model is None else model.size_bytes,
    )
    return (await agent.store.instances.create(record)).id


async def delivered(agent: Agent, number: int = 1, key: str = "p/llama") -> str:
    id_ = await submitted(agent, number, key)
    agent.deliver(id_)
    return id_


async def record(agent: Agent, id_: str) -> Instance:
    instance = await agent.store.instances.get(id_)
    assert instance is not None
    return instance


async def reached(agent: Agent, id_: str, state: State) -> Instance:
    """Return the record once it has this state; fail at once if it ends in another."""

    async def is_there() -> bool:
        current = await record(agent, id_)
        assert current.state is state or current.state not in TERMINAL, current
        return current.state is state

    await until(is_there, f"{id_} {state}")
    return await record(agent, id_)


async def released(agent: Agent, id_: str) -> None:
    """Wait until the agent has released the instance."""
    await until(lambda: id_ not in agent.residents, f"{id_} released")


async def states(agent: Agent, id_: str) -> list[State]:
    """Return the states of a record in order, without repetitions."""
    past = [revision.state for _, revision in await agent.store.instances.history(await record(agent, id_))]
    return [past[0], *(b for a, b in pairwise(past) if a is not b)]


async def warm(agent: Agent) -> Runner:
    """Return the runner that the next load will take."""
    async with asyncio.timeout(DEADLINE_S):
        await agent.runners.warmed()
    assert agent.runners.next_runner is not None
    return agent.runners.next_runner.result()


async def frozen(agent: Agent) -> Runner:
    """Freeze the runner that the next load will take, and return it."""
    runner = await warm(agent)
    await freeze(runner)
    return runner


async def loaded(agent: Agent, number: int = 1, key: str = "p/llama") -> tuple[str, Runner]:
    """Load an instance; return its ID and its runner."""
    runner = await warm(agent)
    id_ = await delivered(agent, number, key)
    await reached(agent, id_, State.LOADED)
    assert not is_gone(runner.pid)
    return id_, runner


async def loading(agent: Agent, number: int = 1) -> tuple[str, Runner]:
    """Start a load that stays in progress; return its ID and its frozen runner."""
    runner = await frozen(agent)
    warmed = agent.runners.next_runner
    id_ = await delivered(agent, number)
    await reached(agent, id_, State.LOADING)
    await until(lambda: agent.runners.next_runner is not warmed, "the load has its runner")
    return id_, runner


def check_failed(instance: Instance, code: str, *words: str) -> None:
    assert instance.state is State.FAILED
    assert instance.error is not None
    assert (instance.error.type, instance.error.code) == ("model_load_failed", code)
    for word in words:
        assert word in instance.error.message
    assert instance.completed_at is not None
    shown = [
        instance.error.message,
        *map(str, ({} if instance.error.detail is UNSET else instance.error.detail).values()),
    ]
    assert not any(word.startswith("/") for text in shown for word in text.split()), shown


async def sweep(agent: Agent, id_: str) -> None:
    """Expire an instance as the sweep of an API process does for a silent worker."""
    while True:
        current = await record(agent, id_)
        if current.state is State.LOST:
            return
        await agent.store.instances.commit(current, current.after(Event.EXPIRE))


# ---- the messages of a runner


class Engine:
    """Replaces the messages of a runner with those of a test; the process of the runner is real."""

    def __init__(self, runner: Runner, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: asyncio.Queue[Received] = asyncio.Queue()
        monkeypatch.setattr(runner, "receive", self.messages.get)

    def says(self, *messages: Received) -> None:
        for message in messages:
            self.messages.put_nowait(message)


READY = Ready(
    config=LoadConfig(context_length=256),
    timing={"metadata": 0.125, "weights": 0.5, "context": 0.0625, "warmup": 0.0625},
    files=[FileStat(0, 0, 0)],
    usage=[],
)


def ready(agent: Agent) -> Ready:
    """Return READY with the files of the catalog."""
    return msgspec.structs.replace(READY, files=agent.models["p/llama"].files)
