"""The agent with a real Redis and real runners: every end of an instance, without runners left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

import shared.store.instances
import worker.runner.warm
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadRequest
from shared.schema.model import FileStat, Model, Problem
from shared.schema.snapshot import Sizing
from shared.synthetic.architectures import TINY
from shared.synthetic.models import tiny_llama
from tests.integration.conftest import hold
from tests.support import gpus
from tests.support.agents import (
    DEADLINE_S,
    EPOCH,
    READY,
    SHORT_S,
    Begin,
    Engine,
    check_failed,
    delivered,
    frozen,
    loaded,
    loading,
    reached,
    ready,
    record,
    released,
    states,
    submitted,
    sweep,
    warm,
)
from tests.support.runners import freeze, is_gone
from tests.support.waiting import until
from worker.agent import Agent
from worker.memory.nvml import Reading
from worker.runner.process import Runner, RunnerDied
from worker.runner.protocol import Failed, Load, Progress, ToRunner
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

MIB = 1 << 20
IMPATIENT = Timing(grace_s=SHORT_S)


@pytest.fixture
async def impatient(begin: Begin) -> Agent:
    """An agent that kills a frozen runner soon."""
    return await begin(IMPATIENT)


# ---- a complete life


@pytest.mark.parametrize("key", ["p/llama", "p/moe", "p/embedding", "p/bert"])
async def test_an_instance_is_queued_loaded_and_unloaded(agent: Agent, key: str) -> None:
    id_, runner = await loaded(agent, key=key)
    loaded_record = await record(agent, id_)
    assert (loaded_record.epoch, loaded_record.phase, loaded_record.progress) == (EPOCH, None, 1.0)
    assert loaded_record.loaded_bytes == loaded_record.total_size_bytes == agent.models[key].size_bytes
    assert loaded_record.load_config is not None
    assert loaded_record.load_config.context_length == 256
    assert [*loaded_record.timing] == ["queue", "spawn", "metadata", "weights", "context", "warmup"]
    assert loaded_record.load_time_seconds == sum([*loaded_record.timing.values()][2:])
    assert loaded_record.started_at is not None
    assert loaded_record.loaded_at is not None
    assert loaded_record.started_at <= loaded_record.loaded_at

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
    """A client that reads "unloaded" may rely on the memory being free."""
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


async def test_several_instances_end_independently(agent: Agent) -> None:
    first, kept = await loaded(agent, 1)
    second, stopped = await loaded(agent, 2, "p/moe")
    agent.stop(second)
    await released(agent, second)
    assert is_gone(stopped.pid)
    assert not is_gone(kept.pid)
    assert (await record(agent, first)).state is State.LOADED


# ---- deliveries


async def test_a_load_delivered_twice_is_loaded_once(agent: Agent) -> None:
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


async def test_loads_of_another_worker_are_ignored(agent: Agent) -> None:
    anothers = await submitted(agent, worker_="another")
    for id_ in (anothers, "load_none"):
        agent.deliver(id_)
        await released(agent, id_)
    assert (await record(agent, anothers)).state is State.QUEUED
    assert (await record(agent, anothers)).rev == 1


async def test_a_second_load_waits_for_the_first(impatient: Agent) -> None:
    first, _ = await loading(impatient)
    second = await delivered(impatient, 2)
    await asyncio.gather(*(impatient.store.instances.get(second) for _ in range(20)))  # enough time for a claim
    assert (await record(impatient, second)).state is State.QUEUED
    impatient.stop(first)
    await reached(impatient, second, State.LOADED)
    assert (await record(impatient, first)).state is State.CANCELLED


async def test_a_load_cancelled_in_the_queue_does_not_start(impatient: Agent) -> None:
    first, _ = await loading(impatient)
    second = await delivered(impatient, 2)
    queued = await record(impatient, second)
    await impatient.store.instances.commit(queued, queued.after(Event.STOP))
    impatient.stop(second)
    impatient.stop(first)
    await released(impatient, second)
    assert await states(impatient, second) == [State.QUEUED, State.CANCELLED]


# ---- loads that fail


async def test_a_cancelled_load_stops_its_runner(impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    assert await impatient.store.instances.request_stop(id_)
    impatient.stop(id_)
    await released(impatient, id_)
    assert is_gone(runner.pid)
    ended = await record(impatient, id_)
    assert (ended.state, ended.error, ended.loaded_at) == (State.CANCELLED, None, None)
    assert await states(impatient, id_) == [State.QUEUED, State.LOADING, State.UNLOADING, State.CANCELLED]


async def test_a_stalled_load_fails_and_its_runner_is_killed(begin: Begin) -> None:
    agent = await begin(IMPATIENT, stall_limit_s=0.25)
    runner = await frozen(agent)
    id_ = await delivered(agent)
    check_failed(await reached(agent, id_, State.FAILED), "load_stalled", "0.25 s")
    assert is_gone(runner.pid)


async def test_a_runner_that_dies_during_a_load_fails_it(agent: Agent) -> None:
    id_, runner = await loading(agent)
    runner.kill()
    check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "SIGKILL")
    assert is_gone(runner.pid)


@pytest.mark.parametrize(("signum", "is_remembered"), [(signal.SIGKILL, False), (signal.SIGSEGV, True)])
async def test_only_a_crash_of_the_engine_is_remembered(
    agent: Agent, signum: signal.Signals, is_remembered: bool
) -> None:
    """SIGKILL is an operator's, or the kernel's: the model is not to blame."""
    id_, runner = await loading(agent)
    os.kill(runner.pid, signum)
    with suppress(ProcessLookupError):  # SIGKILL needs no SIGCONT, and its runner may be reaped by now
        os.kill(runner.pid, signal.SIGCONT)
    check_failed(await reached(agent, id_, State.FAILED), "engine_crashed")
    await released(agent, id_)
    assert (agent.crashes.of(agent.models["p/llama"]) is not None) == is_remembered


async def test_a_runner_that_dies_after_a_load_fails_its_instance(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    runner.kill()
    ended = await reached(agent, id_, State.FAILED)
    check_failed(ended, "engine_crashed", "SIGKILL")
    assert ended.loaded_at is not None
    await released(agent, id_)
    await loaded(agent, 2)  # the agent still works


async def test_a_load_of_a_removed_model_fails(agent: Agent) -> None:
    id_ = await delivered(agent, key="p/gone")
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", "gone")
    assert await states(agent, id_) == [State.QUEUED, State.FAILED]


async def test_a_load_is_of_the_same_files_under_another_key(agent: Agent, models: dict[str, Model]) -> None:
    """A file beside it changed its key after the load was accepted, and the key is another model's now."""
    id_ = await submitted(agent)
    await agent.publish(
        [
            msgspec.structs.replace(models["p/llama"], key="p/llama@f16"),
            msgspec.structs.replace(models["p/moe"], key="p/llama"),
        ]
    )
    agent.deliver(id_)
    done = await reached(agent, id_, State.LOADED)
    assert (done.key, done.model, done.instance_id) == ("p/llama@f16", "p/llama", "p/llama")
    assert done.source == agent.models["p/llama@f16"].source
    assert done.loaded_bytes == models["p/llama"].size_bytes
    await agent.publish([*models.values()])
    assert [held.key for held in agent.placer.held()] == ["p/llama"], "it follows the catalog"
    await agent.publish([])
    assert [held.key for held in agent.placer.held()] == ["p/llama@f16"], "the last one that is known"


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        ({}, "no longer in the models directory"),
        ({"shards": ["p/llama/llama-f16.gguf"]}, "replaced by another one"),
    ],
)
async def test_a_load_is_never_of_other_files(
    agent: Agent, models: dict[str, Model], other: dict[str, Any], reason: str
) -> None:
    id_ = await submitted(agent)
    await agent.publish([msgspec.structs.replace(models["p/moe"], key="p/llama", **other)])
    agent.deliver(id_)
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", reason)


async def test_a_dry_run_is_never_of_other_files(agent: Agent, models: dict[str, Model]) -> None:
    """The API has a catalog of a second ago, in which the key is another model's."""
    request = LoadRequest(model="p/llama", context_length=256)

    async def answer(key: str, source: Model | None = None) -> object:
        question = Sizing(request=request, key=key, source=source, gpus=[], layers=[])
        return msgspec.msgpack.decode(await agent.dry_run.answer(msgspec.msgpack.encode(question)))

    expected = await answer("p/llama")
    moe = msgspec.structs.replace(models["p/moe"], key="p/llama")
    await agent.publish([msgspec.structs.replace(models["p/llama"], key="p/llama@f16"), moe])
    assert await answer("p/llama") != expected
    assert await answer("p/llama", models["p/llama"].source) == expected
    await agent.publish([moe])
    assert await answer("p/llama", models["p/llama"].source) is None


async def test_a_load_that_waits_for_another_finds_moved_files(
    begin: Begin, models_dir: Path, models: dict[str, Model], tmp_path: Path
) -> None:
    agent = await begin(models_dir=tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    model = models["p/llama"]
    (tmp_path / "a/m.gguf").symlink_to(models_dir / model.shards[0])
    (tmp_path / "b/m.gguf").symlink_to(models_dir / model.shards[0])
    await agent.publish([msgspec.structs.replace(model, shards=["a/m.gguf"])])
    id_ = await submitted(agent)
    async with agent.placer.turn(["CPU"], asyncio.Event()):
        agent.deliver(id_)
        await until(lambda: agent.residents[id_].key == "p/llama", "it waits")
        (tmp_path / "a/m.gguf").unlink()
        await agent.publish([msgspec.structs.replace(model, key="p/moved", shards=["b/m.gguf"])])
    assert (await reached(agent, id_, State.LOADED)).key == "p/moved"


async def test_a_load_of_a_model_with_a_problem_fails(agent: Agent) -> None:
    problem = Problem(code="invalid_model_file", message="its header ends early")
    agent.models["p/bad"] = msgspec.structs.replace(agent.models["p/llama"], key="p/bad", problem=problem)
    id_ = await delivered(agent, key="p/bad")
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", problem.message)


async def test_a_load_of_a_missing_file_fails(agent: Agent, models: dict[str, Model]) -> None:
    model = msgspec.structs.replace(models["p/llama"], key="p/late", shards=["p/late/late-f16.gguf"])
    agent.models[model.key] = model
    id_ = await delivered(agent, key=model.key)
    check_failed(await reached(agent, id_, State.FAILED), "invalid_model_file", "cannot be opened")


async def test_a_load_of_a_truncated_file_fails_without_its_path(
    begin: Begin, models: dict[str, Model], tmp_path: Path
) -> None:
    """The reason names the file relative to the models directory."""
    model = msgspec.structs.replace(models["p/llama"], key="p/cut", shards=["p/cut/cut.gguf"])
    cut = tiny_llama(tmp_path / model.shards[0])
    os.truncate(cut, cut.stat().st_size // 2)
    agent = await begin(models_dir=tmp_path)
    agent.models[model.key] = model
    id_ = await delivered(agent, key=model.key)
    ended = await reached(agent, id_, State.FAILED)
    check_failed(ended, "invalid_model_file")
    assert str(tmp_path) not in str(ended.error)


async def test_a_load_without_a_runner_fails_and_the_next_works(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(worker.runner.warm, "run_child", slice)  # anything that returns at once
        id_ = await delivered(agent)
        check_failed(await reached(agent, id_, State.FAILED), "engine_crashed", "no runner could be started")
        await released(agent, id_)
        with pytest.raises(RunnerDied):
            await agent.runners.take()  # the next runner has failed too
    await loaded(agent, 2)


async def test_an_outcome_is_written_after_its_memory_is_published(
    begin: Begin, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads the outcome of a load finds what it took in the list of workers, without waiting a beat."""
    agent = await begin()
    reserved: dict[State, tuple[int, int]] = {}  # when a state was written: what Redis had, and what the ledger has
    commit = agent.store.instances.commit

    async def looked(old: Instance, new: Instance) -> tuple[Instance, float]:
        workers = {worker.name: worker.snapshot for worker in await agent.store.workers.all()}
        published = workers["w"]
        assert published is not None
        reserved[new.state] = published.devices[-1].reserved_bytes, agent.placer.devices()[-1].reserved_bytes
        return await commit(old, new)

    await agent.beat_once()
    monkeypatch.setattr(agent.store.instances, "commit", looked)
    id_, _ = await loaded(agent)
    published, held = reserved[State.LOADED]
    assert published == held > 0
    agent.stop(id_)
    await released(agent, id_)
    assert reserved[State.UNLOADED] == (0, 0)

    await agent.runners.close()
    monkeypatch.setattr(worker.runner.warm, "run_child", slice)  # no further runner starts
    failed = await delivered(agent, 2)
    await released(agent, failed)
    assert (await record(agent, failed)).state is State.FAILED
    assert reserved[State.FAILED] == (0, 0)


# ---- records that changed without the agent


async def test_the_beat_finds_a_missed_stop_request(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    assert await agent.store.instances.request_stop(id_)
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert (await record(agent, id_)).state is State.UNLOADED
    assert is_gone(runner.pid)


async def test_the_beat_does_not_change_a_consistent_instance(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    before = await record(agent, id_)
    await agent.reconciler.reconcile()
    assert not agent.residents[id_].stop.is_set()
    assert await record(agent, id_) == before
    assert not is_gone(runner.pid)


async def test_a_claim_during_a_beat_is_not_undone(impatient: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The beat reads the record while it is queued, and compares it once the instance is claimed."""
    agent = impatient
    await frozen(agent)
    live_at = agent.store.instances.live_at

    async def then_claimed(worker: str, ids: Iterable[str] = ()) -> list[Instance]:
        records = await live_at(worker, ids)
        agent.deliver(id_)
        await reached(agent, id_, State.LOADING)
        return records

    id_ = await submitted(agent)
    with monkeypatch.context() as patched:
        patched.setattr(agent.store.instances, "live_at", then_claimed)
        await agent.reconciler.reconcile()
    assert not agent.residents[id_].stop.is_set()
    assert (await record(agent, id_)).state is State.LOADING


async def test_an_emptied_redis_gets_the_loaded_instances_again(agent: Agent, raw: redis.Redis) -> None:
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


async def test_a_redis_that_lost_recent_writes_gets_them_again(agent: Agent, raw: redis.Redis) -> None:
    """A Redis with an append-only file may be killed before it has written the last seconds."""
    id_, runner = await loaded(agent)
    now, before = await record(agent, id_), (await agent.store.instances.history(await record(agent, id_)))[1][1]
    older = {"rev": before.rev, "doc": shared.store.instances.pack(before), "state": before.state.value}
    raw.hset(f"inst:{id_}", mapping=older)
    await agent.reconciler.reconcile()
    assert await record(agent, id_) == now
    assert not is_gone(runner.pid)


async def test_an_emptied_redis_stops_a_load_in_progress(raw: redis.Redis, impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    raw.flushall()
    await impatient.reconciler.reconcile()
    await released(impatient, id_)
    assert is_gone(runner.pid)
    assert not raw.keys("inst*")


async def test_without_restore_an_emptied_redis_stops_instances(agent: Agent, raw: redis.Redis) -> None:
    agent.desired.is_on = False
    id_, runner = await loaded(agent)
    raw.flushall()
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert not raw.keys("inst*")


async def test_a_name_reused_in_an_emptied_redis_is_not_taken_back(agent: Agent, raw: redis.Redis) -> None:
    id_, runner = await loaded(agent)
    raw.flushall()
    hold(raw, "another")
    other = await submitted(agent, 2, worker_="another")
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert await agent.store.instances.named("p/llama") == other


async def test_a_swept_instance_stays_lost_and_its_runner_stops(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    await sweep(agent, id_)
    swept = await record(agent, id_)
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert await record(agent, id_) == swept


async def test_an_instance_swept_during_its_load_stays_lost(impatient: Agent) -> None:
    id_, runner = await loading(impatient)
    await sweep(impatient, id_)
    await impatient.reconciler.reconcile()
    await released(impatient, id_)
    assert is_gone(runner.pid)
    assert (await record(impatient, id_)).state is State.LOST


async def test_a_load_that_ends_after_the_sweep_is_not_recorded(agent: Agent) -> None:
    """The write of the agent fails, so that it needs no beat."""
    id_, runner = await loading(agent)
    await sweep(agent, id_)
    os.kill(runner.pid, signal.SIGCONT)
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert (await record(agent, id_)).state is State.LOST


async def test_a_claim_whose_reply_was_lost_is_requeued(agent: Agent) -> None:
    """No runner works on the claimed load."""
    queued = await record(agent, await submitted(agent))
    await agent.store.instances.commit(queued, queued.after(Event.CLAIM, epoch=EPOCH))
    await agent.reconciler.reconcile()
    again = await record(agent, queued.id)
    assert (again.state, again.attempt, again.epoch) == (State.QUEUED, 2, None)
    await agent.reconciler.reconcile()
    assert (await reached(agent, queued.id, State.LOADED)).attempt == 2


# ---- drain


async def test_drain_stops_all_runners_in_parallel(begin: Begin) -> None:
    """Each runner takes the complete stop ladder: in sequence they would exceed the limit."""
    agent = await begin(Timing(drain_s=5.0, grace_s=1.0))
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


async def test_drain_requeues_loads_and_leaves_queued_ones(impatient: Agent) -> None:
    first, runner = await loading(impatient)
    second = await delivered(impatient, 2)
    await warm(impatient)
    await impatient.drain()
    back = await record(impatient, first)
    assert (back.state, back.attempt, back.epoch, back.devices) == (State.QUEUED, 2, None, [])
    assert (await record(impatient, second)).state is State.QUEUED
    assert is_gone(runner.pid)


async def test_no_load_is_claimed_after_drain(agent: Agent) -> None:
    await agent.drain()
    id_ = await delivered(agent)
    assert agent.residents == {}
    await agent.reconciler.reconcile()
    assert agent.residents == {}
    assert (await record(agent, id_)).state is State.QUEUED


# ---- revisions of a load


async def directed(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Runner, Engine]:
    """Start a load whose messages come from a test; return its ID, runner and engine."""
    runner = await warm(agent)
    engine = Engine(runner, monkeypatch)
    id_ = await delivered(agent)
    await reached(agent, id_, State.LOADING)
    return id_, runner, engine


async def loading_revisions(agent: Agent, id_: str) -> list[Instance]:
    """Return the revisions of a load between its claim and its end."""
    past = [old for _, old in await agent.store.instances.history(await record(agent, id_))]
    return [old for old in past if old.state is State.LOADING]


async def test_rate_expected_end_and_phases_are_recorded(
    begin: Begin, models: dict[str, Model], tmp_path: Path
) -> None:
    """The file is large enough to be read in several steps."""
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
    past = await loading_revisions(agent, id_)
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
        assert old.timing.items() <= new.timing.items(), "a completed phase keeps its time"

    done = await record(agent, id_)
    assert (done.estimated_completion, done.phase, done.progress) == (None, None, 1.0)
    assert done.bytes_per_second == model.size_bytes / done.timing["weights"]


async def test_a_loaded_record_has_the_times_of_the_engine(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    id_, _, engine = await directed(agent, monkeypatch)
    engine.says(Progress("metadata", 0), ready(agent))
    done = await reached(agent, id_, State.LOADED)
    assert (done.load_time_seconds, done.load_config) == (0.75, READY.config)
    assert done.bytes_per_second == done.total_size_bytes / 0.5
    assert all(done.timing[phase] == seconds for phase, seconds in READY.timing.items())
    assert [*done.timing] == ["queue", "spawn", *READY.timing]


async def test_a_load_without_progress_still_gets_revisions(begin: Begin) -> None:
    assert Timing().commit_s <= 0.5, "at least once a second, also on a busy machine"
    agent = await begin(Timing(commit_s=0.05))
    id_, runner = await loading(agent)
    before = await record(agent, id_)

    async def is_updated() -> bool:
        return (await record(agent, id_)).rev >= before.rev + 4

    await until(is_updated, "four revisions")
    runner.kill()
    past = await loading_revisions(agent, id_)
    assert {(old.loaded_bytes, old.progress, old.bytes_per_second) for old in past} == {(0, 0.0, None)}


async def test_progress_stays_below_1_and_never_goes_back(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages of the engine report decreasing and excessive progress."""
    id_, _, engine = await directed(agent, monkeypatch)
    size = agent.models["p/llama"].size_bytes
    engine.says(
        Progress("weights", size // 2), Progress("context", size // 4), Progress("warmup", 2 * size), ready(agent)
    )
    await reached(agent, id_, State.LOADED)
    progress = {old.phase: round(old.progress, 3) for old in await loading_revisions(agent, id_)}
    assert progress == {None: 0.0, "weights": 0.5, "context": 0.5, "warmup": 0.999}


@pytest.mark.parametrize("end", ["died", "refused", "cancelled", "stalled"])
async def test_an_unsuccessful_load_keeps_its_phase_times(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    agent = await begin(Timing(commit_s=0.05), stall_limit_s=0.1 if end == "stalled" else 60.0)
    id_, _, engine = await directed(agent, monkeypatch)
    engine.says(Progress("metadata", 0), Progress("weights", 1))

    async def in_weights() -> bool:
        current = await record(agent, id_)
        return current.phase == "weights" or current.state is State.FAILED

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


# ---- races of a cancel


async def test_a_cancel_leaves_a_starting_runner_to_the_next_load(
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
    next_runner = agent.runners.next_runner
    assert next_runner is not None
    assert not next_runner.done()

    second = await delivered(agent, 2)
    go.set()
    await reached(agent, second, State.LOADED)
    assert not is_gone(next_runner.result().pid)
    agent.stop(second)
    await released(agent, second)
    assert is_gone(next_runner.result().pid), "the second load used the runner"


async def test_a_cancel_just_before_the_loaded_commit_wins(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client got a confirmation of the stop request, but its notification never reaches the agent."""
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
    await loaded(agent, 2)  # the agent still works


async def test_a_cancel_just_after_the_loaded_commit_has_no_effect(agent: Agent) -> None:
    id_, runner = await loaded(agent)
    assert await agent.store.instances.request_stop(id_, unless_loaded=True) is State.LOADED
    await agent.reconciler.reconcile()
    assert not agent.residents[id_].stop.is_set()
    assert not is_gone(runner.pid)


# ---- output of the engine


async def engine_log(agent: Agent, id_: str) -> str:
    return (await agent.store.instances.engine_log(id_) or b"").decode()


async def test_the_engine_log_of_a_live_instance_can_be_read(agent: Agent, models_dir: Path) -> None:
    id_, _ = await loaded(agent)

    async def is_there() -> bool:
        return "n_ctx" in await engine_log(agent, id_)

    await until(is_there, "the engine's lines about the context")
    assert str(models_dir) not in await engine_log(agent, id_)
    assert "p/llama/llama-f16.gguf" in await engine_log(agent, id_)


async def test_a_failed_load_has_its_engine_log_at_once(
    begin: Begin, models: dict[str, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A client that reads "failed" can read the engine log at once: it is written before the state."""
    agent = await begin(Timing(engine_log_s=3600.0), models_dir=tmp_path)
    model = msgspec.structs.replace(models["p/llama"], key="p/cut", shards=["p/cut/cut.gguf"])
    cut = tiny_llama(tmp_path / model.shards[0])
    os.truncate(cut, cut.stat().st_size // 2)
    agent.models[model.key] = model
    commit, before = agent.store.instances.commit, ""

    async def watched(old: Instance, new: Instance) -> tuple[Instance, float]:
        nonlocal before
        before = await engine_log(agent, old.id)
        return await commit(old, new)

    monkeypatch.setattr(agent.store.instances, "commit", watched)
    id_ = await delivered(agent, key=model.key)
    await reached(agent, id_, State.FAILED)
    assert "not within the file bounds" in before
    assert str(tmp_path) not in before
    assert await engine_log(agent, id_) == before


async def test_a_cancelled_load_has_its_engine_log_at_once(begin: Begin, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = await begin(Timing(engine_log_s=3600.0))
    id_, runner, _ = await directed(agent, monkeypatch)  # the process loads, and the agent receives no messages
    await until(lambda: any("n_ctx" in line for line in runner.output), "the engine has written lines")
    assert await engine_log(agent, id_) == ""
    agent.stop(id_)
    await reached(agent, id_, State.CANCELLED)
    assert "n_ctx" in await engine_log(agent, id_)


async def test_each_load_has_its_own_engine_log(agent: Agent) -> None:
    for number, key in ((1, "p/llama"), (2, "p/moe")):
        id_, _ = await loaded(agent, number, key)
        agent.stop(id_)
        await released(agent, id_)
        assert f"{key}/" in await engine_log(agent, id_)
        assert ("p/llama/" in await engine_log(agent, id_)) == (key == "p/llama")


# ---- concurrent loads


@pytest.fixture
def endless(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep each load in progress until it is stopped: its runner never receives the load."""
    send = Runner.send

    async def all_but_loads(self: Runner, message: ToRunner) -> None:
        if not isinstance(message, Load):
            await send(self, message)

    monkeypatch.setattr(Runner, "send", all_but_loads)


async def check_concurrent_loads(agent: Agent, number: int) -> None:
    """Check that exactly this number of loads run, and that the next one starts when one ends."""
    ids = [await delivered(agent, n) for n in range(1, number + 3)]

    async def of(state: State) -> list[str]:
        return [id_ for id_ in ids if (await record(agent, id_)).state is state]

    async def all_load() -> bool:
        return len(await of(State.LOADING)) >= number

    await until(all_load, f"{number} load")
    await asyncio.gather(*(agent.store.instances.get(ids[0]) for _ in range(20)))  # enough time for one claim too many
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
async def test_the_setting_limits_concurrent_loads(begin: Begin, number: int) -> None:
    agent = await begin(loads_at_once=number)
    await agent.warm()
    await check_concurrent_loads(agent, number)


@pytest.mark.usefixtures("endless")
async def test_a_load_cancelled_while_waiting_releases_its_memory(agent: Agent) -> None:
    await agent.warm()
    first, second = [await delivered(agent, n) for n in (1, 2)]
    await until(lambda: len(agent.placer.ledger.reservations) == 2, "both have their memory reserved")
    waiting = await record(agent, second)
    await agent.store.instances.commit(waiting, waiting.after(Event.STOP))
    agent.stop(second)
    await released(agent, second)
    assert [*agent.placer.ledger.reservations] == [first]
    assert (await record(agent, first)).state is State.LOADING
    agent.stop(first)
    await released(agent, first)
    assert not agent.placer.ledger.reservations


@pytest.mark.usefixtures("endless")
async def test_a_worker_without_gpus_runs_one_load_at_a_time(agent: Agent) -> None:
    await agent.warm()
    assert [device.id for device in agent.placer.devices()] == ["CPU"]
    await check_concurrent_loads(agent, 1)


@pytest.mark.usefixtures("endless")
@pytest.mark.parametrize(("loads_at_once", "number"), [(0, 2), (1, 1)])
async def test_the_default_is_one_concurrent_load_for_each_gpu(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, loads_at_once: int, number: int
) -> None:
    """Each GPU has room for all loads but one, so that both GPUs are used."""
    gpus.install(monkeypatch, tmp_path / "host", *[6 * MIB] * 2)
    agent = await begin(loads_at_once=loads_at_once, device_reserve="0")
    await agent.warm()
    assert [device.id for device in agent.placer.devices()] == ["GPU-fake-0", "GPU-fake-1", "CPU"]
    await check_concurrent_loads(agent, number)


async def test_concurrent_loads_all_succeed(begin: Begin) -> None:
    agent = await begin(loads_at_once=2)
    await agent.warm()
    ids = [await delivered(agent, number, key) for number, key in ((1, "p/llama"), (2, "p/moe"), (3, "p/bert"))]
    records = [await reached(agent, id_, State.LOADED) for id_ in ids]
    assert [instance.devices for instance in records] == [["CPU"]] * 3


# ---- lost replies of Redis


async def test_a_commit_without_a_reply_does_not_end_a_load(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that pauses longer than the reply timeout still executes the command when it continues."""
    commit, unanswered = agent.store.instances.commit, set()

    async def without_reply(old: Instance, new: Instance) -> tuple[Instance, float]:
        done = await commit(old, new)
        if (step := (new.state, new.phase)) not in unanswered:
            unanswered.add(step)
            raise redis.ConnectionError("no answer")
        return done

    monkeypatch.setattr(agent.store.instances, "commit", without_reply)
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


async def test_a_load_swept_during_its_cancel_leaves_no_runner(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
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


async def test_a_host_that_cannot_start_a_process_fails_the_load(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """The worker survives, and the next load succeeds."""

    def full(*_: object) -> None:
        raise OSError(24, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(ForkServerProcess, "start", full)
        id_ = await delivered(agent)
        ended = await reached(agent, id_, State.FAILED)
        await until(
            lambda: agent.runners.next_runner is not None and agent.runners.next_runner.done(),
            "the next runner failed too",
        )
    assert ended.error is not None
    assert (ended.error.code, "Too many open files" in ended.error.message) == ("engine_crashed", True)
    await loaded(agent, 2)


# ---- a hanging driver


async def test_a_hanging_driver_blocks_its_gpus_but_not_the_beat(
    begin: Begin, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    gpus.install(monkeypatch, tmp_path / "host", 6 * MIB)
    agent = await begin(Timing(hang_s=1.0), device_reserve="0")
    read, hangs = agent.devices.read, threading.Event()
    reads = 0

    def hang() -> list[Reading]:
        nonlocal reads
        reads += 1
        hangs.wait(DEADLINE_S)
        return read()

    monkeypatch.setattr(agent.devices, "read", hang)
    for _ in range(2):
        await agent.beat_once()
    assert [device.free_bytes for device in agent.placer.devices() if device.kind == "gpu"] == [0]
    assert reads == 1, "a hanging read is not started again by each beat"
    hangs.set()
    await until(lambda: agent.placer.hanging is not None and agent.placer.hanging.done(), "the driver answers")
    await agent.beat_once()
    assert [device.free_bytes for device in agent.placer.devices() if device.kind == "gpu"] == [6 * MIB]
