"""An agent with a real Redis and real runners: each way an instance ends, and no runner that outlives its record."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis
from msgspec import UNSET

import shared.store.instances
import worker.runner.warm
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.model import FileStat, Model, Problem
from shared.settings import Settings
from shared.store.store import Store
from shared.synthetic.architectures import TINY
from shared.synthetic.models import tiny_llama
from tests.integration.conftest import hold
from tests.support import gpus
from tests.support.runners import freeze, is_gone
from tests.support.waiting import no_runners, until
from worker.agent import Agent
from worker.memory.nvml import Reading
from worker.runner.process import Received, Runner, RunnerDied
from worker.runner.protocol import Failed, Load, Progress, Ready, ToRunner
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

DEADLINE_S = 10.0
MIB = 1 << 20
SHORT_S = 0.3  # of a rung of the stop ladder, where a runner will not answer
EPOCH = "e"  # of the lease that "w" holds
IMPATIENT = Timing(grace_s=SHORT_S)


Begin = Callable[..., Awaitable[Agent]]


@pytest.fixture
async def begin(store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path) -> AsyncIterator[Begin]:
    """Makes worker "w" with one model of each kind; nothing moves in it but what a test asks for."""
    agents: list[Agent] = []

    async def made(timing: Timing | None = None, **settings: Any) -> Agent:
        given = {"worker_name": "w", "models_dir": models_dir, "data_dir": tmp_path, **settings}
        agents.append(Agent(Settings(**given), store, EPOCH, timing=timing))
        await agents[0].publish([*models.values()])
        return agents[0]

    yield made
    for agent in agents:
        await ended(agent)


@pytest.fixture
async def agent(begin: Begin) -> Agent:
    return await begin()


async def ended(made: Agent) -> None:
    if made.runners.coming is not None:
        await asyncio.wait([made.runners.coming])  # the end of one that is half started is another test's subject
    await made.drain()
    await made.runners.close()
    await until(no_runners, "all runners gone")
    assert (made.residents, made.tasks) == ({}, {})


@pytest.fixture
async def impatient(begin: Begin) -> Agent:
    """One that kills a frozen runner soon."""
    return await begin(IMPATIENT)


async def submitted(agent: Agent, number: int = 1, key: str = "p/llama", worker_: str = "w") -> str:
    """The id of a new record in the queue of a worker."""
    model = agent.models.get(key)
    record = Instance(
        id=f"load_{number}",
        model=key,
        key=key,
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
    found = await agent.store.instances.get(id_)
    assert found is not None
    return found


async def reached(agent: Agent, id_: str, state: State) -> Instance:
    """The record once it is in this state; fails at once where it ended in another."""

    async def is_there() -> bool:
        found = await record(agent, id_)
        assert found.state is state or found.state not in TERMINAL, found
        return found.state is state

    await until(is_there, f"{id_} {state}")
    return await record(agent, id_)


async def released(agent: Agent, id_: str) -> None:
    """Wait until the agent holds nothing of it any more."""
    await until(lambda: id_ not in agent.residents, f"{id_} released")


async def states(agent: Agent, id_: str) -> list[State]:
    """Through which states a record went, in order."""
    found = [past.state for _, past in await agent.store.instances.history(await record(agent, id_))]
    return [found[0], *(b for a, b in pairwise(found) if a is not b)]


async def warm(agent: Agent) -> Runner:
    """The runner that the next load will take."""
    async with asyncio.timeout(DEADLINE_S):
        await agent.runners.warmed()
    assert agent.runners.coming is not None
    return agent.runners.coming.result()


async def frozen(agent: Agent) -> Runner:
    """The same, and it will not answer."""
    runner = await warm(agent)
    await freeze(runner)
    return runner


async def loaded(agent: Agent, number: int = 1, key: str = "p/llama") -> tuple[str, Runner]:
    """A loaded instance and the runner that holds it."""
    runner = await warm(agent)
    id_ = await delivered(agent, number, key)
    await reached(agent, id_, State.LOADED)
    assert not is_gone(runner.pid)
    return id_, runner


async def loading(agent: Agent, number: int = 1) -> tuple[str, Runner]:
    """An instance that stays in its load, and its frozen runner."""
    runner = await frozen(agent)
    id_ = await delivered(agent, number)
    await reached(agent, id_, State.LOADING)
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


# ---- a whole life


@pytest.mark.parametrize("key", ["p/llama", "p/moe", "p/embedding", "p/bert"])
async def test_from_the_queue_into_memory_and_out_again(agent: Agent, key: str) -> None:
    id_, runner = await loaded(agent, key=key)
    found = await record(agent, id_)
    assert (found.epoch, found.phase, found.progress) == (EPOCH, None, 1.0)
    assert found.loaded_bytes == found.total_size_bytes == agent.models[key].size_bytes
    assert found.load_config is not None
    assert found.load_config.context_length == 256
    assert [*found.timing] == ["queue", "spawn", "metadata", "weights", "context", "warmup"]
    assert found.load_time_seconds == sum([*found.timing.values()][2:])
    assert found.started_at is not None
    assert found.loaded_at is not None
    assert found.started_at <= found.loaded_at

    assert await agent.store.instances.request_stop(id_)
    agent.stop(id_)
    await released(agent, id_)
    ended = await record(agent, id_)
    assert ended.state is State.UNLOADED
    assert ended.completed_at is not None
    assert ended.error is None
    assert is_gone(runner.pid)
    assert await states(agent, id_) == [
        State.QUEUED,
        State.LOADING,
        State.LOADED,
        State.UNLOADING,
        State.UNLOADED,
    ]


async def test_progress_in_the_record_never_goes_back(agent: Agent) -> None:
    id_, _ = await loaded(agent)
    past = [old for _, old in await agent.store.instances.history(await record(agent, id_))]
    progress = [old.progress for old in past]
    assert progress == sorted(progress)
    assert all(old.progress < 1 for old in past if old.state is not State.LOADED)
    phases = [old.phase for old in past if old.state is State.LOADING and old.phase is not None]
    assert [*dict.fromkeys(phases)] == ["metadata", "weights", "context", "warmup"]


async def test_a_record_is_unloaded_only_after_its_runner_is_gone(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads "unloaded" may count on the memory."""
    id_, runner = await loaded(agent)
    seen: dict[State, bool] = {}
    commit = agent.store.instances.commit

    async def watched(old: Instance, new: Instance) -> tuple[Instance, float]:
        seen[new.state] = is_gone(runner.pid)
        return await commit(old, new)

    monkeypatch.setattr(agent.store.instances, "commit", watched)
    agent.stop(id_)
    await released(agent, id_)
    assert seen == {State.UNLOADING: False, State.UNLOADED: True}


async def test_several_live_beside_each_other_and_end_alone(agent: Agent) -> None:
    first, kept = await loaded(agent, 1)
    second, stopped = await loaded(agent, 2, "p/moe")
    agent.stop(second)
    await released(agent, second)
    assert is_gone(stopped.pid)
    assert not is_gone(kept.pid)
    assert (await record(agent, first)).state is State.LOADED


# ---- deliveries


async def test_what_is_delivered_twice_is_loaded_once(agent: Agent) -> None:
    id_ = await submitted(agent)
    agent.deliver(id_)
    agent.deliver(id_)
    await reached(agent, id_, State.LOADED)
    agent.deliver(id_)
    assert [*agent.residents] == [id_]
    agent.stop(id_)
    await released(agent, id_)
    agent.deliver(id_)
    await released(agent, id_)
    assert (await states(agent, id_)).count(State.LOADING) == 1
    assert (await record(agent, id_)).state is State.UNLOADED


async def test_what_is_anothers_or_nobodys_is_left_alone(agent: Agent) -> None:
    anothers = await submitted(agent, worker_="another")
    for id_ in (anothers, "load_none"):
        agent.deliver(id_)
        await released(agent, id_)
    assert (await record(agent, anothers)).state is State.QUEUED
    assert (await record(agent, anothers)).rev == 1


async def test_one_load_at_a_time(impatient: Agent) -> None:
    first, _ = await loading(impatient)
    second = await delivered(impatient, 2)
    await asyncio.gather(*(impatient.store.instances.get(second) for _ in range(20)))  # time enough for a claim
    assert (await record(impatient, second)).state is State.QUEUED
    impatient.stop(first)
    await reached(impatient, second, State.LOADED)
    assert (await record(impatient, first)).state is State.CANCELLED


async def test_what_was_cancelled_in_the_queue_is_not_loaded(impatient: Agent) -> None:
    first, _ = await loading(impatient)
    second = await delivered(impatient, 2)
    queued = await record(impatient, second)
    await impatient.store.instances.commit(queued, queued.after(Event.STOP))
    impatient.stop(second)
    impatient.stop(first)
    await released(impatient, second)
    assert await states(impatient, second) == [State.QUEUED, State.CANCELLED]


# ---- loads that come to nothing


async def test_a_cancelled_load(impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    assert await impatient.store.instances.request_stop(id_)
    impatient.stop(id_)
    await released(impatient, id_)
    assert is_gone(runner.pid)
    ended = await record(impatient, id_)
    assert (ended.state, ended.error, ended.loaded_at) == (State.CANCELLED, None, None)
    assert await states(impatient, id_) == [State.QUEUED, State.LOADING, State.UNLOADING, State.CANCELLED]


async def test_a_stalled_load(begin: Begin) -> None:
    agent = await begin(IMPATIENT, stall_limit_s=0.25)
    runner = await frozen(agent)
    id_ = await delivered(agent)
    check_failed(await reached(agent, id_, State.FAILED), "load_stalled", "0.25 s")
    assert is_gone(runner.pid)


async def test_a_runner_that_dies_in_its_load(agent: Agent) -> None:
    id_, runner = await loading(agent)
    runner.kill()
    check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "SIGKILL")
    assert is_gone(runner.pid)


async def test_a_runner_that_dies_while_it_holds_its_model(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    runner.kill()
    ended = await reached(agent, id_, State.FAILED)
    check_failed(ended, "engine_crashed", "SIGKILL")
    assert ended.loaded_at is not None
    await released(agent, id_)
    await loaded(agent, 2)  # the agent goes on


async def test_a_model_that_left_the_catalog(agent: Agent) -> None:
    id_ = await delivered(agent, key="p/gone")
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", "gone")
    assert await states(agent, id_) == [State.QUEUED, State.FAILED]


async def test_a_model_that_the_catalog_warns_of(agent: Agent) -> None:
    problem = Problem(code="invalid_model_file", message="its header ends early")
    agent.models["p/bad"] = msgspec.structs.replace(agent.models["p/llama"], key="p/bad", problem=problem)
    id_ = await delivered(agent, key="p/bad")
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", problem.message)


async def test_a_file_that_the_catalog_does_not_know_to_be_gone(agent: Agent, models: dict[str, Model]) -> None:
    model = msgspec.structs.replace(models["p/llama"], key="p/late", shards=["p/late/late-f16.gguf"])
    agent.models[model.key] = model
    id_ = await delivered(agent, key=model.key)
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", "cannot be opened")


async def test_a_file_that_is_not_what_its_header_says(begin: Begin, models: dict[str, Model], tmp_path: Path) -> None:
    """Its reason names it by its place under the models directory, not by where that is."""
    model = msgspec.structs.replace(models["p/llama"], key="p/cut", shards=["p/cut/cut.gguf"])
    cut = tiny_llama(tmp_path / model.shards[0])
    os.truncate(cut, cut.stat().st_size // 2)
    agent = await begin(models_dir=tmp_path)
    agent.models[model.key] = model
    id_ = await delivered(agent, key=model.key)
    ended = await reached(agent, id_, State.FAILED)
    check_failed(ended, "invalid_model_file")
    assert str(tmp_path) not in str(ended.error)


async def test_no_runner_can_be_started(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(worker.runner.warm, "run_child", slice)  # anything that returns at once
        id_ = await delivered(agent)
        check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "could not start")
        await released(agent, id_)
        with pytest.raises(RunnerDied):
            await agent.runners.take()  # the next one was begun as well
    await loaded(agent, 2)


# ---- records that moved on without the agent


async def test_a_wish_that_was_not_heard_is_found_by_the_beat(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    assert await agent.store.instances.request_stop(id_)
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert (await record(agent, id_)).state is State.UNLOADED
    assert is_gone(runner.pid)


async def test_the_beat_leaves_alone_what_is_as_it_should_be(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    before = await record(agent, id_)
    await agent.reconciler.reconcile()
    assert not agent.residents[id_].stop.is_set()
    assert await record(agent, id_) == before
    assert not is_gone(runner.pid)


async def test_an_emptied_redis_is_told_again_of_what_is_loaded(agent: Agent, raw: redis.Redis) -> None:
    id_, runner = await loaded(agent)
    before = await record(agent, id_)
    raw.flushall()
    for _ in range(2):
        await agent.reconciler.reconcile()
        assert await record(agent, id_) == before
    assert not is_gone(runner.pid)
    assert await agent.store.instances.named("p/llama") == id_
    assert await agent.store.instances.desired("w") == {"p/llama": id_}
    agent.stop(id_)
    await reached(agent, id_, State.UNLOADED)


async def test_a_redis_that_lost_its_last_seconds_is_told_again(agent: Agent, raw: redis.Redis) -> None:
    """As one that keeps an append-only file, and is killed before it has written the end."""
    id_, runner = await loaded(agent)
    now, before = await record(agent, id_), (await agent.store.instances.history(await record(agent, id_)))[1][1]
    older = {"rev": before.rev, "doc": shared.store.instances.pack(before), "state": before.state.value}
    raw.hset(f"inst:{id_}", mapping=older)
    await agent.reconciler.reconcile()
    assert await record(agent, id_) == now
    assert not is_gone(runner.pid)


async def test_an_emptied_redis_stops_what_was_still_loading(raw: redis.Redis, impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    raw.flushall()
    await impatient.reconciler.reconcile()
    await released(impatient, id_)
    assert is_gone(runner.pid)
    assert not raw.keys("inst*")


async def test_an_emptied_redis_stops_what_is_loaded_where_nothing_is_to_be_restored(
    agent: Agent, raw: redis.Redis
) -> None:
    agent.desired.is_on = False
    id_, runner = await loaded(agent)
    raw.flushall()
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert not raw.keys("inst*")


async def test_a_name_that_an_emptied_redis_gave_away_is_not_taken_back(agent: Agent, raw: redis.Redis) -> None:
    id_, runner = await loaded(agent)
    raw.flushall()
    hold(raw, "another")
    other = await submitted(agent, 2, worker_="another")
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert await agent.store.instances.named("p/llama") == other


async def test_what_was_swept_stays_lost_and_its_runner_stops(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    await sweep(agent, id_)
    swept = await record(agent, id_)
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert await record(agent, id_) == swept


async def test_what_was_swept_in_its_load_stays_lost(impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    await sweep(impatient, id_)
    await impatient.reconciler.reconcile()
    await released(impatient, id_)
    assert is_gone(runner.pid)
    assert (await record(impatient, id_)).state is State.LOST


async def test_a_load_that_ends_after_the_sweep_is_not_recorded(agent: Agent) -> None:
    """The agent learns of it when it writes, without a beat."""
    id_, runner = await loading(agent)
    await sweep(agent, id_)
    os.kill(runner.pid, signal.SIGCONT)
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert (await record(agent, id_)).state is State.LOST


async def test_a_claim_whose_reply_was_lost_is_begun_anew(agent: Agent) -> None:
    """Nobody works on it."""
    queued = await record(agent, await submitted(agent))
    await agent.store.instances.commit(queued, queued.after(Event.CLAIM, epoch=EPOCH))
    await agent.reconciler.reconcile()
    again = await record(agent, queued.id)
    assert (again.state, again.attempt, again.epoch) == (State.QUEUED, 2, None)
    await agent.reconciler.reconcile()
    assert (await reached(agent, queued.id, State.LOADED)).attempt == 2


async def sweep(agent: Agent, id_: str) -> None:
    """What an API process does with the instances of a worker that is silent for too long."""
    while True:
        found = await record(agent, id_)
        if found.state is State.LOST:
            return
        await agent.store.instances.commit(found, found.after(Event.EXPIRE))


# ---- the end


async def test_drain_stops_all_in_parallel_and_they_are_lost(begin: Begin) -> None:
    """Each takes the whole ladder: one after the other they would not be done within the limit."""
    agent = await begin(Timing(drain_s=5 * SHORT_S, grace_s=SHORT_S))
    held = [await loaded(agent, number) for number in (1, 2, 3)]
    next_ = await warm(agent)
    for _, runner in held:
        await freeze(runner)
    async with asyncio.timeout(DEADLINE_S):
        await agent.drain()
    for id_, runner in held:
        ended = await record(agent, id_)
        assert (ended.state, ended.error) == (State.LOST, None)
        assert is_gone(runner.pid)
    await agent.runners.close()
    assert is_gone(next_.pid)
    assert (agent.residents, agent.tasks) == ({}, {})


async def test_drain_hands_back_what_was_loading_and_leaves_what_was_queued(impatient: Agent) -> None:
    first, runner = await loading(impatient)
    second = await delivered(impatient, 2)
    await warm(impatient)
    await impatient.drain()
    back = await record(impatient, first)
    assert (back.state, back.attempt, back.epoch, back.devices) == (State.QUEUED, 2, None, [])
    assert (await record(impatient, second)).state is State.QUEUED
    assert is_gone(runner.pid)


async def test_nothing_is_taken_after_the_end_began(agent: Agent) -> None:
    await agent.drain()
    id_ = await delivered(agent)
    assert agent.residents == {}
    await agent.reconciler.reconcile()
    assert agent.residents == {}
    assert (await record(agent, id_)).state is State.QUEUED


# ---- what followers see of a load


class Engine:
    """Says what a test wants said, in the place of a real runner's messages; its process is real."""

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
    taken=[],
)


def ready(agent: Agent) -> Ready:
    """The same of the file that the catalog has read."""
    return msgspec.structs.replace(READY, files=agent.models["p/llama"].files)


async def directed(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Runner, Engine]:
    """An instance in its load, of which an engine says what a test wants."""
    runner = await warm(agent)
    engine = Engine(runner, monkeypatch)
    id_ = await delivered(agent)
    await reached(agent, id_, State.LOADING)
    return id_, runner, engine


async def of_a_load(agent: Agent, id_: str) -> list[Instance]:
    """The revisions of a load between its claim and its end."""
    past = [old for _, old in await agent.store.instances.history(await record(agent, id_))]
    return [old for old in past if old.state is State.LOADING]


async def test_pace_expected_end_and_phases_of_a_load_are_recorded_as_it_goes(
    begin: Begin, models: dict[str, Model], tmp_path: Path
) -> None:
    """A file that is read in several steps."""
    shape = replace(TINY, embedding_length=512, feed_forward_length=2048, block_count=6)
    path = tiny_llama(tmp_path / "p/large/large-f16.gguf", shape=shape)
    shards = [str(path.relative_to(tmp_path))]
    model = msgspec.structs.replace(
        models["p/llama"],
        key="p/large",
        shards=shards,
        files=[FileStat.of(path.stat())],
        size_bytes=path.stat().st_size,
    )
    agent = await begin(models_dir=tmp_path)
    agent.models[model.key] = model
    id_, _ = await loaded(agent, key=model.key)
    past = await of_a_load(agent, id_)
    sizes = [old.loaded_bytes for old in past]
    assert sizes == sorted(sizes)
    assert any(0 < size < model.size_bytes for size in sizes)
    for old in past:
        assert (old.bytes_per_second is not None) == (old.estimated_completion is not None) == (old.loaded_bytes > 0)
        if old.bytes_per_second is not None and old.estimated_completion is not None:
            assert old.bytes_per_second > 0
            assert old.started_at is not None
            assert old.estimated_completion >= old.started_at
            assert 0 <= old.progress - old.loaded_bytes / model.size_bytes < 0.001 or old.progress == 0.999
    for old, new in pairwise(past):
        assert old.timing.items() <= new.timing.items(), "a phase that is over keeps its time"

    done = await record(agent, id_)
    assert (done.estimated_completion, done.phase, done.progress) == (None, None, 1.0)
    assert done.bytes_per_second == model.size_bytes / done.timing["weights"]


async def test_the_end_of_a_load_says_what_the_engine_measured(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    id_, _, engine = await directed(agent, monkeypatch)
    engine.says(Progress("metadata", 0), ready(agent))
    done = await reached(agent, id_, State.LOADED)
    assert (done.load_time_seconds, done.load_config) == (0.75, READY.config)
    assert done.bytes_per_second == done.total_size_bytes / 0.5
    assert all(done.timing[phase] == seconds for phase, seconds in READY.timing.items())
    assert [*done.timing] == ["queue", "spawn", *READY.timing]


async def test_followers_hear_of_a_load_in_which_nothing_happens(begin: Begin) -> None:
    assert Timing().commit_s <= 0.5, "at least once a second, whatever the machine does beside it"
    agent = await begin(Timing(commit_s=0.05))
    id_, runner = await loading(agent)
    before = await record(agent, id_)

    async def heard() -> bool:
        return (await record(agent, id_)).rev >= before.rev + 4

    await until(heard, "four revisions")
    runner.kill()
    past = await of_a_load(agent, id_)
    assert {(old.loaded_bytes, old.progress, old.bytes_per_second) for old in past} == {(0, 0.0, None)}


async def test_progress_is_never_whole_before_the_load_is_and_never_goes_back(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever an engine says."""
    id_, _, engine = await directed(agent, monkeypatch)
    size = agent.models["p/llama"].size_bytes
    engine.says(
        Progress("weights", size // 2), Progress("context", size // 4), Progress("warmup", 2 * size), ready(agent)
    )
    await reached(agent, id_, State.LOADED)
    progress = {old.phase: round(old.progress, 3) for old in await of_a_load(agent, id_)}
    assert progress == {None: 0.0, "weights": 0.5, "context": 0.5, "warmup": 0.999}


@pytest.mark.parametrize("end", ["died", "refused", "cancelled", "stalled"])
async def test_a_load_that_comes_to_nothing_keeps_the_time_of_the_phase_it_was_in(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    agent = await begin(Timing(commit_s=0.05), stall_limit_s=0.1 if end == "stalled" else 60.0)
    id_, _, engine = await directed(agent, monkeypatch)
    engine.says(Progress("metadata", 0), Progress("weights", 1))

    async def in_weights() -> bool:
        found = await record(agent, id_)
        return found.phase == "weights" or found.state is State.FAILED

    await until(in_weights, "the phase is recorded")
    match end:
        case "died":
            engine.says(None)
        case "refused":
            engine.says(Failed("it will not"))
        case "cancelled":
            agent.stop(id_)
    await released(agent, id_)
    ended = await record(agent, id_)
    assert ended.state is (State.CANCELLED if end == "cancelled" else State.FAILED)
    assert [*ended.timing] == ["queue", "spawn", "metadata", "weights"]
    assert all(0 <= seconds < DEADLINE_S for seconds in ended.timing.values())
    assert ended.timing["weights"] > (0.09 if end == "stalled" else 0)


# ---- cancelled at an awkward moment


async def test_a_cancel_does_not_wait_for_a_runner_that_starts_and_leaves_it_to_the_next(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    go, starts, start = threading.Event(), 0, ForkServerProcess.start

    def slow(self: ForkServerProcess) -> None:
        nonlocal starts
        starts += 1
        go.wait(DEADLINE_S)
        start(self)

    monkeypatch.setattr(ForkServerProcess, "start", slow)
    first = await delivered(agent)
    await reached(agent, first, State.LOADING)
    await agent.store.instances.request_stop(first, unless_loaded=True)
    agent.stop(first)
    await released(agent, first)
    ended = await record(agent, first)
    assert (ended.state, ended.error) == (State.CANCELLED, None)
    assert await states(agent, first) == [State.QUEUED, State.LOADING, State.UNLOADING, State.CANCELLED]
    assert [*ended.timing] == ["queue"]
    assert starts == 1
    coming = agent.runners.coming
    assert coming is not None
    assert not coming.done()

    second = await delivered(agent, 2)
    go.set()
    await reached(agent, second, State.LOADED)
    assert not is_gone(coming.result().pid)
    agent.stop(second)
    await released(agent, second)
    assert is_gone(coming.result().pid), "the second load had taken it"


async def test_a_cancel_that_comes_just_before_the_load_is_recorded_wins(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its waiter was told that the wish was heard; no notification of it ever reaches the agent."""
    commit = agent.store.instances.commit

    async def beaten(old: Instance, new: Instance) -> tuple[Instance, float]:
        if new.state is State.LOADED:
            assert await agent.store.instances.request_stop(old.id, unless_loaded=True) is State.LOADING
        return await commit(old, new)

    monkeypatch.setattr(agent.store.instances, "commit", beaten)
    runner = await warm(agent)
    id_ = await delivered(agent)
    await released(agent, id_)
    ended = await record(agent, id_)
    assert (ended.state, ended.error, ended.loaded_at) == (State.CANCELLED, None, None)
    assert State.LOADED not in await states(agent, id_)
    assert is_gone(runner.pid)
    monkeypatch.setattr(agent.store.instances, "commit", commit)
    await loaded(agent, 2)  # the agent goes on


async def test_a_cancel_that_comes_just_after_the_load_was_recorded_changes_nothing(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    assert await agent.store.instances.request_stop(id_, unless_loaded=True) is State.LOADED
    await agent.reconciler.reconcile()
    assert not agent.residents[id_].stop.is_set()
    assert not is_gone(runner.pid)


# ---- what the engine said


async def said(agent: Agent, id_: str) -> str:
    return (await agent.store.instances.engine_log(id_) or b"").decode()


async def test_what_the_engine_says_of_a_load_can_be_read_while_the_instance_lives(
    agent: Agent, models_dir: Path
) -> None:
    id_, _ = await loaded(agent)

    async def is_there() -> bool:
        return "n_ctx" in await said(agent, id_)

    await until(is_there, "the engine's lines about the context")
    assert str(models_dir) not in await said(agent, id_)
    assert "p/llama/llama-f16.gguf" in await said(agent, id_)


async def test_what_the_engine_said_of_a_load_that_failed_is_there_with_the_failure(
    begin: Begin, models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever reads "failed" may read why at once: nothing is left to a later writer."""
    agent = await begin(Timing(engine_log_s=3600.0), models_dir=tmp_path)
    model = msgspec.structs.replace(models["p/llama"], key="p/cut", shards=["p/cut/cut.gguf"])
    cut = tiny_llama(tmp_path / model.shards[0])
    os.truncate(cut, cut.stat().st_size // 2)
    agent.models[model.key] = model
    commit, before = agent.store.instances.commit, ""

    async def watched(old: Instance, new: Instance) -> tuple[Instance, float]:
        nonlocal before
        before = await said(agent, old.id)
        return await commit(old, new)

    monkeypatch.setattr(agent.store.instances, "commit", watched)
    id_ = await delivered(agent, key=model.key)
    await reached(agent, id_, State.FAILED)
    assert "not within the file bounds" in before
    assert str(tmp_path) not in before
    assert await said(agent, id_) == before


async def test_what_the_engine_said_of_a_load_that_was_cancelled_is_there_with_the_cancel(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = await begin(Timing(engine_log_s=3600.0))
    id_, runner, _ = await directed(agent, monkeypatch)  # its process loads, and nobody hears what came of it
    await until(lambda: any("n_ctx" in line for line in runner.output), "the engine has said something")
    assert await said(agent, id_) == ""
    agent.stop(id_)
    await reached(agent, id_, State.CANCELLED)
    assert "n_ctx" in await said(agent, id_)


async def test_what_one_engine_said_is_not_anothers(agent: Agent) -> None:
    for number, key in ((1, "p/llama"), (2, "p/moe")):
        id_, _ = await loaded(agent, number, key)
        agent.stop(id_)
        await released(agent, id_)
        assert f"{key}/" in await said(agent, id_)
        assert ("p/llama/" in await said(agent, id_)) == (key == "p/llama")


# ---- loads at once


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A load goes on until it is stopped: its runner never hears of it."""
    send = Runner.send

    async def all_but_loads(self: Runner, message: ToRunner) -> None:
        if not isinstance(message, Load):
            await send(self, message)

    monkeypatch.setattr(Runner, "send", all_but_loads)


async def check_loads_at_once(agent: Agent, number: int) -> None:
    """That exactly so many load at the same time, and the next one when one of them has ended."""
    ids = [await delivered(agent, n) for n in range(1, number + 3)]

    async def of(state: State) -> list[str]:
        return [id_ for id_ in ids if (await record(agent, id_)).state is state]

    async def all_load() -> bool:
        return len(await of(State.LOADING)) >= number

    await until(all_load, f"{number} load")
    await asyncio.gather(*(agent.store.instances.get(ids[0]) for _ in range(20)))  # time enough for one claim too many
    assert (len(await of(State.LOADING)), len(await of(State.QUEUED))) == (number, 2)
    first = (await of(State.LOADING))[0]
    agent.stop(first)
    await released(agent, first)
    await until(all_load, "another one loads")
    assert (len(await of(State.LOADING)), len(await of(State.QUEUED))) == (number, 1)
    for id_ in ids:
        agent.stop(id_)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize("number", [1, 2])
async def test_as_many_load_at_once_as_are_allowed(begin: Begin, number: int) -> None:
    agent = await begin(loads_at_once=number)
    await agent.warm()
    await check_loads_at_once(agent, number)


@pytest.mark.usefixtures("endless")
async def test_what_is_cancelled_while_it_waits_gives_back_its_memory_at_once(agent: Agent) -> None:
    await agent.warm()
    first, second = [await delivered(agent, n) for n in (1, 2)]
    await until(lambda: len(agent.placer.ledger.reservations) == 2, "both have their memory reserved")
    found = await record(agent, second)
    await agent.store.instances.commit(found, found.after(Event.STOP))
    agent.stop(second)
    await released(agent, second)
    assert [*agent.placer.ledger.reservations] == [first]
    assert (await record(agent, first)).state is State.LOADING
    agent.stop(first)
    await released(agent, first)
    assert not agent.placer.ledger.reservations


@pytest.mark.usefixtures("endless")
async def test_one_loads_at_once_where_there_is_no_gpu(agent: Agent) -> None:
    await agent.warm()
    assert [device.id for device in agent.placer.devices()] == ["CPU"]
    await check_loads_at_once(agent, 1)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(("loads_at_once", "number"), [(0, 2), (1, 1)])
async def test_one_loads_at_once_on_each_gpu_if_not_told_otherwise(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads_at_once: int, number: int
) -> None:
    """Each GPU has room for all of them but one, so that two are used."""
    gpus.install(monkeypatch, tmp_path / "host", *[6 * MIB] * 2)
    agent = await begin(loads_at_once=loads_at_once, device_reserve="0")
    await agent.warm()
    assert [device.id for device in agent.placer.devices()] == ["GPU-fake-0", "GPU-fake-1", "CPU"]
    await check_loads_at_once(agent, number)


async def test_two_load_at_once_and_both_are_loaded(begin: Begin) -> None:
    agent = await begin(loads_at_once=2)
    await agent.warm()
    ids = [await delivered(agent, number, key) for number, key in ((1, "p/llama"), (2, "p/moe"), (3, "p/bert"))]
    found = [await reached(agent, id_, State.LOADED) for id_ in ids]
    assert [one.devices for one in found] == [["CPU"]] * 3


# ---- where Redis answers late, or not at all


async def test_what_redis_wrote_without_an_answer_is_no_end_of_a_load(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that pauses longer than a reply may take carries out what it was sent, when it wakes."""
    commit, unanswered = agent.store.instances.commit, set()

    async def deaf(old: Instance, new: Instance) -> tuple[Instance, float]:
        done = await commit(old, new)
        if (what := (new.state, new.phase)) not in unanswered:
            unanswered.add(what)
            raise redis.ConnectionError("no answer")
        return done

    monkeypatch.setattr(agent.store.instances, "commit", deaf)
    runner = await warm(agent)
    id_ = await delivered(agent)
    await reached(agent, id_, State.LOADED)
    assert unanswered >= {(State.LOADING, None), (State.LOADING, "metadata"), (State.LOADED, None)}
    assert not is_gone(runner.pid)
    agent.stop(id_)
    await released(agent, id_)
    passed = [State.QUEUED, State.LOADING, State.LOADED, State.UNLOADING, State.UNLOADED]
    assert await states(agent, id_) == passed
    assert is_gone(runner.pid)


async def test_a_load_that_is_taken_away_while_it_is_cancelled_leaves_no_runner(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = agent.store.instances.commit

    async def overtaken(old: Instance, new: Instance) -> tuple[Instance, float]:
        if new.state is State.LOADED:
            await agent.store.instances.request_stop(old.id, unless_loaded=True)
        if new.state is State.UNLOADING:
            await commit(old, old.after(Event.EXPIRE))
        return await commit(old, new)

    monkeypatch.setattr(agent.store.instances, "commit", overtaken)
    runner = await warm(agent)
    id_ = await delivered(agent)
    await released(agent, id_)
    assert (await record(agent, id_)).state is State.LOST
    assert is_gone(runner.pid)


async def test_a_host_without_room_for_another_process_says_so(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker lives on, and the next load may find room."""

    def full(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(ForkServerProcess, "start", full)
        id_ = await delivered(agent)
        ended = await reached(agent, id_, State.FAILED)
        await until(lambda: agent.runners.coming is not None and agent.runners.coming.done(), "the next one failed too")
    assert ended.error is not None
    assert (ended.error.code, "Too many open files" in ended.error.message) == ("engine_crashed", True)
    await loaded(agent, 2)


# ---- a driver


async def test_while_a_driver_hangs_its_gpus_get_nothing_and_the_beat_goes_on(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus.install(monkeypatch, tmp_path / "host", 6 * MIB)
    agent = await begin(Timing(hang_s=SHORT_S), device_reserve="0")
    read, hangs = agent.devices.read, threading.Event()
    asked = 0

    def hang() -> list[Reading]:
        nonlocal asked
        asked += 1
        hangs.wait(DEADLINE_S)
        return read()

    monkeypatch.setattr(agent.devices, "read", hang)
    for _ in range(2):
        await agent.beat_once()
    assert [device.free_bytes for device in agent.placer.devices() if device.kind == "gpu"] == [0]
    assert asked == 1, "no thread for each beat"
    hangs.set()
    await until(lambda: agent.placer.hanging is not None and agent.placer.hanging.done(), "it answers")
    await agent.beat_once()
    assert [device.free_bytes for device in agent.placer.devices() if device.kind == "gpu"] == [6 * MIB]
