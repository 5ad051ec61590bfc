"""Restoration in a worker: the file of desired instances, the decision, and an agent that loads them again."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
import redis

import worker.desired
import worker.reconcile
import worker.restore
from shared.errors import ErrorBody
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, State
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.model import FileStat, Model, ModelSettings, Problem
from shared.store.keys import RETAIN_S
from shared.telemetry.trace import parse, root
from tests.integration.conftest import hold
from tests.support.agents import EPOCH, Begin, loaded, reached, record, released, submitted, sweep, warm
from tests.support.runners import is_gone
from tests.support.waiting import until
from worker.agent import Agent
from worker.desired import Desired
from worker.restore import TRIES, Restorer, decide, restoration
from worker.runner.protocol import Pong
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

DEAD = "dead"  # the epoch of a process that has ended
BAD = "p/bad"  # the key of a model that cannot be opened
FILE = "wanted-w.json"
LATER = 2e9 + 0.125  # a time of use, in seconds since the epoch
FIRST_PAUSE_S = Timing().first_pause_s
ERROR = ErrorBody(type="model_load_failed", code="engine_crashed", message="why")


class Lines:
    """A log that keeps the actions of its lines."""

    def __init__(self) -> None:
        self.actions: list[str] = []

    def info(self, _: str, *, action: str, **facts: object) -> None:
        self.actions.append(action)

    warning = error = info


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> Lines:
    found = Lines()
    for module in (worker.desired, worker.restore, worker.reconcile):
        monkeypatch.setattr(module, "_log", found)
    return found


def instance(instance_id: str = "p/m", id_: str = "load_1", **fields: object) -> Instance:
    """Return an instance that was loaded."""
    made = Instance(
        id=id_,
        model="p/m",
        key="p/m@q4_k_m",
        type="llm",
        worker="w",
        request=LoadRequest(model="p/m", context_length=256, flash_attention=False, echo_load_config=True),
        state=State.LOADED,
        epoch=DEAD,
        attempt=2,
        progress=1.0,
        total_size_bytes=8,
        loaded_bytes=8,
        devices=["CPU"],
        started_at=1.0,
        loaded_at=2.0,
        used_at=3.0,
        timing={"weights": 0.5},
        load_time_seconds=0.5,
        load_config=LoadConfig(context_length=256),
        instance_id=instance_id,
        created_at=0.5,
        rev=7,
    )
    return msgspec.structs.replace(made, **fields)


# ---- the file


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / FILE


@pytest.fixture
def desired(path: Path) -> Desired:
    return Desired(path, is_on=True)


def read(path: Path, *, is_on: bool = True) -> dict[str, Instance]:
    """Return what the next process reads from the file."""
    found = Desired(path, is_on=is_on)
    found.read()
    return found.instances


def test_file_is_read_by_the_next_process(desired: Desired, path: Path) -> None:
    two = {"p/m": instance(), "p/m:2": instance("p/m:2", "load_2", restoring=3, not_before=9.5)}
    for one in two.values():
        desired.add(one)
    desired.flush()
    assert read(path) == two


def test_discard_removes_only_the_load_that_ended(desired: Desired, path: Path) -> None:
    """The load that took its place under the same id stays."""
    desired.add(instance())
    desired.add(instance(id_="load_2"))
    desired.discard(instance())
    desired.flush()
    assert [one.id for one in read(path).values()] == ["load_2"]
    desired.discard(instance(id_="load_2"))
    desired.flush()
    assert read(path) == {}


async def test_every_change_is_written_when_it_is_made(desired: Desired, path: Path) -> None:
    """A process that is killed cannot write at its end."""
    keeping = asyncio.create_task(desired.keep())
    desired.add(instance())
    await until(lambda: read(path).keys() == {"p/m"}, "the first one is in the file")
    desired.add(instance("p/m:2", "load_2"))
    await until(lambda: read(path).keys() == {"p/m", "p/m:2"}, "both are")
    desired.discard(instance())
    await until(lambda: read(path).keys() == {"p/m:2"}, "the other one is left")
    keeping.cancel()
    await asyncio.wait({keeping})


def test_failed_write_leaves_the_old_file(
    desired: Desired, path: Path, lines: Lines, monkeypatch: pytest.MonkeyPatch
) -> None:
    desired.add(instance())
    desired.flush()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        desired.discard(instance())
        desired.flush()
    assert lines.actions == ["wanted_unwritable"]
    assert read(path).keys() == {"p/m"}


async def test_failed_write_is_tried_again(path: Path, lines: Lines) -> None:
    desired = Desired(path, is_on=True, timing=Timing(retry_s=0.01))
    path.with_name(f"{FILE}.new").mkdir()  # in the way
    keeping = asyncio.create_task(desired.keep())
    desired.add(instance())
    await until(lambda: len(lines.actions) >= 2, "two attempts")
    assert {*lines.actions} == {"wanted_unwritable"}
    path.with_name(f"{FILE}.new").rmdir()
    await until(lambda: read(path).keys() == {"p/m"}, "it is written at last")
    keeping.cancel()
    await asyncio.wait({keeping})


def test_older_write_does_not_replace_a_newer_one(desired: Desired, path: Path) -> None:
    desired.add(instance())
    slower = desired._encoded()
    desired.discard(instance())
    desired.flush()
    desired._replace(*slower)
    assert read(path) == {}


def test_unfinished_write_is_not_read(desired: Desired, path: Path) -> None:
    path.with_name(f"{FILE}.new").write_bytes(b'[{"id": "load_')
    assert read(path) == {}
    desired.add(instance())
    desired.flush()
    assert read(path).keys() == {"p/m"}


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda _: b"",
    "cut off": lambda whole: whole[: len(whole) // 2],
    "zeroes": lambda whole: bytes(len(whole)),
    "of another shape": lambda _: b'{"instances": []}',
    "of other elements": lambda _: b"[1, null]",
    "without a field": lambda whole: whole.replace(b'"worker"', b'"labourer"'),
    "no UTF-8": lambda whole: whole.replace(b"load_1", b"load_\xff"),
    "nested too deeply": lambda _: b'[{"x": ' + b"[" * 100_000,
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_file_counts_as_none_and_is_logged(desired: Desired, path: Path, lines: Lines, damage: str) -> None:
    desired.add(instance())
    desired.flush()
    path.write_bytes(DAMAGE[damage](path.read_bytes()))
    assert read(path) == {}
    assert lines.actions == ["wanted_unreadable"]


def test_directory_in_place_of_the_file_counts_as_none(path: Path, lines: Lines) -> None:
    path.mkdir()
    assert read(path) == {}
    assert lines.actions == ["wanted_unreadable"]


def test_missing_file_is_not_logged(path: Path, lines: Lines) -> None:
    assert read(path) == {}
    assert lines.actions == []


def test_restore_off_removes_the_file(desired: Desired, path: Path) -> None:
    """Also one from before, which would be restored once the setting is on again."""
    desired.add(instance())
    desired.flush()
    assert read(path, is_on=False) == {}
    assert not path.exists()
    off = Desired(path, is_on=False)
    off.read()
    off.add(instance())
    off.flush()
    assert (off.instances, [*path.parent.iterdir()]) == ({}, [])


# ---- the decision

LOST = instance(state=State.LOST)
TRIED = instance(loaded_at=None, restoring=2, state=State.LOST)  # a restoration that was lost with its worker
REFUSED = msgspec.structs.replace(TRIED, state=State.FAILED, error=ERROR)


@pytest.mark.parametrize(
    ("record", "known", "todo"),
    [
        (None, None, 1),
        (None, "load_2", 1),
        *((instance(state=state), "load_1", "wait") for state in State if state not in TERMINAL),
        (instance(state=State.QUEUED), None, "wait"),
        (LOST, "load_1", 1),
        (LOST, None, "drop"),  # it was unloaded while its worker was away
        (LOST, "load_2", "drop"),  # another load took its place
        (msgspec.structs.replace(LOST, stop_requested=True), "load_1", "drop"),
        (
            msgspec.structs.replace(LOST, restoring=4),
            "load_1",
            1,
        ),  # that restoration was loaded, so that tries are counted anew
        (TRIED, "load_1", 2),  # its worker ended: the model is not to blame
        (msgspec.structs.replace(TRIED, stop_requested=True), "load_1", "drop"),
        (REFUSED, "load_1", 3),
        (REFUSED, None, 3),
        (msgspec.structs.replace(REFUSED, restoring=TRIES - 1), "load_1", TRIES),
        (msgspec.structs.replace(REFUSED, restoring=TRIES), "load_1", "drop"),
        (msgspec.structs.replace(REFUSED, loaded_at=2.0), "load_1", "drop"),  # it crashed after it was loaded
        (msgspec.structs.replace(REFUSED, restoring=0), "load_1", "drop"),  # a client's load: the client has the error
        (instance(state=State.UNLOADED), "load_1", "drop"),
        (instance(state=State.CANCELLED, restoring=1, loaded_at=None), "load_1", "drop"),
        *((instance(state=state, worker="another"), "load_1", "drop") for state in State),
    ],
)
def test_decision_about_a_desired_instance_that_is_not_held(
    record: Instance | None, known: str | None, todo: object
) -> None:
    assert decide(instance(), record, known) == todo


@pytest.mark.parametrize(
    ("record", "known", "todo"),
    [
        (None, None, 1),  # an attempt tells clients why the instance is not there
        (LOST, "load_1", 1),
        (TRIED, "load_1", 2),
        (REFUSED, "load_1", "wait"),
        (REFUSED, None, "drop"),  # it was unloaded
        (msgspec.structs.replace(REFUSED, restoring=TRIES), "load_1", "drop"),
        (instance(state=State.UNLOADED), "load_1", "drop"),
    ],
)
def test_decision_about_an_instance_without_files(record: Instance | None, known: str | None, todo: object) -> None:
    assert decide(instance(), record, known, has_files=False) == todo


def test_restoration_is_a_new_load_of_the_same_request() -> None:
    again = restoration(instance(), "load_2", 1, FIRST_PAUSE_S)
    assert again == Instance(
        id="load_2",
        model="p/m",
        key="p/m@q4_k_m",
        type="llm",
        worker="w",
        request=instance().request,
        traceparent=again.traceparent,
        total_size_bytes=8,
        restoring=1,
        used_at=3.0,
        instance_id="p/m",
    )


def test_restoration_begins_its_own_trace() -> None:
    """The request of the first load may have been answered long ago."""
    old = instance(traceparent=str(root()))
    traces = [parse(restoration(old, "load_2", number, FIRST_PAUSE_S).traceparent) for number in (1, 2)]
    assert len({trace and trace.trace_id for trace in (parse(old.traceparent), *traces)} - {None}) == 3


def test_pause_before_each_try_is_twice_the_last() -> None:
    pauses = []
    for number in range(2, TRIES + 1):
        before = time.time()
        again = restoration(instance(), "load_2", number, FIRST_PAUSE_S)
        assert again.restoring == number
        pauses.append(again.not_before - before)
    assert [round(pause) for pause in pauses] == [FIRST_PAUSE_S * n for n in (1, 2, 4, 8)]


# ---- an agent that comes back


@pytest.fixture
def start(begin: Begin, models: dict[str, Model]) -> Begin:
    """Start worker "w" as the successor of another: a runner is warm, and it acts only when a test calls it."""

    async def started(timing: Timing | None = None, **settings: Any) -> Agent:
        agent = await begin(timing, **settings)
        await agent.publish([*models.values(), unopenable(models["p/llama"])])
        await agent.warm()
        assert await agent.store.workers.renew(agent.snapshot()) == "held"
        return agent

    return started


@pytest.fixture
async def agent(start: Begin) -> Agent:
    return await start()


def unopenable(model: Model) -> Model:
    return msgspec.structs.replace(model, key=BAD, shards=["p/bad/bad.gguf"], files=[FileStat(1, 1, 1)])


async def left_loading(agent: Agent, number: int = 1, key: str = "p/llama") -> Instance:
    """Return a load that a process left `loading` when it died."""
    queued = await record(agent, await submitted(agent, number, key))
    return (await agent.store.instances.commit(queued, queued.after(Event.CLAIM, epoch=DEAD)))[0]


async def left_loaded(agent: Agent, number: int = 1, key: str = "p/llama", used_at: float = 1.0) -> Instance:
    claimed = await left_loading(agent, number, key)
    facts = {"loaded_at": used_at, "used_at": used_at, "load_time_seconds": 1.0}
    done = claimed.after(Event.LOAD, load_config=LoadConfig(context_length=256), progress=1.0, **facts)
    return (await agent.store.instances.commit(claimed, done))[0]


async def lost(agent: Agent, number: int = 1, key: str = "p/llama", used_at: float = 1.0) -> Instance:
    """Return an instance that a process held when it died, after its successor has given it up."""
    left = await left_loaded(agent, number, key, used_at)
    await agent.reconciler.give_up(left)
    return await record(agent, left.id)


async def jobs(agent: Agent) -> list[Instance]:
    """Return every record, oldest first."""
    return [one async for one in agent.store.instances.newest()][::-1]


async def of(agent: Agent, instance_id: str) -> Instance | None:
    """Return the live instance of this name."""
    id_ = await agent.store.instances.named(instance_id)
    return None if id_ is None else await agent.store.instances.get(id_)


async def restored(agent: Agent, instance_id: str) -> Instance:
    """Wait until the instance of this name is loaded, and return it."""

    async def is_there() -> bool:
        found = await of(agent, instance_id)
        return found is not None and found.state is State.LOADED

    await until(is_there, f"{instance_id} is restored")
    found = await of(agent, instance_id)
    assert found is not None
    return found


async def test_lost_instance_is_restored_by_a_new_load_under_its_id(agent: Agent, tmp_path: Path) -> None:
    old = await lost(agent)
    assert (old.state, old.error) == (State.LOST, None)
    await agent.restorer.restore(agent.residents)
    new = await restored(agent, "p/llama")
    assert new.id != old.id
    assert (new.key, new.request, new.worker, new.epoch) == (old.key, old.request, "w", EPOCH)
    assert (new.attempt, new.restoring, new.used_at) == (1, 1, old.used_at)
    assert await record(agent, old.id) == old, "the old record has not changed"
    assert await agent.store.instances.desired("w") == {"p/llama": new.id}
    agent.desired.flush()
    assert [one.id for one in read(tmp_path / FILE).values()] == [new.id]
    await agent.restorer.restore(agent.residents)
    assert len(await jobs(agent)) == 2, "a held instance is not restored"


async def test_last_used_instance_is_restored_first(agent: Agent) -> None:
    for number, key, used_at in ((1, "p/llama", 2.0), (2, "p/moe", 3.0), (3, "p/embedding", 1.0)):
        await lost(agent, number, key, used_at)
    await agent.restorer.restore(agent.residents)
    new = [await restored(agent, key) for key in ("p/moe", "p/llama", "p/embedding")]
    begun = [one.started_at or 0.0 for one in new]
    assert begun == sorted(begun)
    assert [one.created_at for one in new] == sorted(one.created_at for one in new)


async def test_restoration_counts_from_the_last_use_in_redis(agent: Agent) -> None:
    for number, key in ((1, "p/llama"), (2, "p/moe")):
        await lost(agent, number, key, used_at=2.0)
    await agent.store.instances.write_uses("w", {"load_2": 3.5, "load_7": 9.0})
    await agent.restorer.restore(agent.residents)
    new = [await restored(agent, key) for key in ("p/moe", "p/llama")]
    assert [one.used_at for one in new] == [3.5, 2.0]
    assert [one.created_at for one in new] == sorted(one.created_at for one in new)


async def test_each_beat_writes_the_last_uses(agent: Agent, raw: redis.Redis, tmp_path: Path) -> None:
    id_, runner = await loaded(agent)
    await agent.beat_once()
    before = await record(agent, id_)
    assert await agent.store.instances.uses("w") == {id_: before.used_at}
    runner.load = Pong(running=1, used_at=LATER)
    await agent.beat_once()
    assert await agent.store.instances.uses("w") == {id_: LATER}
    raw.delete("used:w", "catalog:w")
    await agent.beat_once()
    assert await agent.store.instances.uses("w") == {id_: LATER}, "again after Redis lost it"
    assert 0 < int(str(raw.ttl("used:w"))) <= RETAIN_S
    assert await record(agent, id_) == before, "no commit"
    agent.desired.flush()
    assert [one.used_at for one in read(tmp_path / FILE).values()] == [LATER]


async def test_restoration_waits_until_the_old_runner_is_gone(agent: Agent) -> None:
    """Two runners never hold one instance."""
    id_, runner = await loaded(agent)
    await sweep(agent, id_)
    await agent.restorer.restore(agent.residents)
    assert await agent.store.instances.named("p/llama") is None, "not yet"
    await agent.reconciler.reconcile()
    await released(agent, id_)
    assert is_gone(runner.pid)
    await agent.restorer.restore(agent.residents)
    assert (await restored(agent, "p/llama")).id != id_


async def test_crash_memory_does_not_refuse_a_restoration(agent: Agent, models: dict[str, Model]) -> None:
    """No client can be asked whether to force it."""
    await agent.crashes.remember(models["p/llama"], "why")
    await lost(agent)
    await agent.restorer.restore(agent.residents)
    await restored(agent, "p/llama")


async def test_file_is_enough_after_redis_was_emptied(agent: Agent, raw: redis.Redis) -> None:
    old = await lost(agent)
    raw.flushall()
    hold(raw, "w")
    await agent.restorer.restore(agent.residents)
    new = await restored(agent, "p/llama")
    assert (new.id != old.id, new.used_at) == (True, old.used_at)


async def test_instance_whose_id_is_taken_is_not_restored(agent: Agent) -> None:
    """A client has loaded it on another worker."""
    await lost(agent)
    other = await submitted(agent, 2, worker_="another")
    for _ in range(2):
        await agent.restorer.restore(agent.residents)
    assert await agent.store.instances.named("p/llama") == other
    assert len(await jobs(agent)) == 2
    assert agent.desired.instances == {}


@pytest.mark.parametrize("when", ["before", "at the same moment"])
async def test_instance_unloaded_meanwhile_is_not_restored(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    await lost(agent)
    known = await agent.store.instances.desired("w")
    assert await agent.store.instances.forget_desired_everywhere("p/llama")
    if when == "at the same moment":

        async def a_moment_ago(_: str) -> dict[str, str]:
            return known

        monkeypatch.setattr(agent.store.instances, "desired", a_moment_ago)
    await agent.restorer.restore(agent.residents)
    assert len(await jobs(agent)) == 1
    assert agent.desired.instances == {}


async def test_restoration_waits_for_the_lease(agent: Agent, raw: redis.Redis) -> None:
    await lost(agent)
    await lost(agent, 2, "p/moe")
    raw.delete("lease:w")
    await agent.restorer.restore(agent.residents)
    assert len(await jobs(agent)) == 2
    assert agent.desired.instances.keys() == {"p/llama", "p/moe"}
    raw.set("lease:w", EPOCH, ex=60)
    await agent.restorer.restore(agent.residents)
    await restored(agent, "p/llama")
    await restored(agent, "p/moe")


async def test_draining_worker_restores_nothing(agent: Agent) -> None:
    await lost(agent)
    agent.ending.set()
    await agent.beat_once()
    assert len(await jobs(agent)) == 1
    assert agent.desired.instances.keys() == {"p/llama"}


async def test_drain_writes_the_file(agent: Agent, tmp_path: Path) -> None:
    """Even right after the load."""
    id_, _ = await loaded(agent)
    await agent.drain()
    assert [one.id for one in read(tmp_path / FILE).values()] == [id_]


# ---- its files


def renamed(model: Model, key: str) -> Model:
    return msgspec.structs.replace(model, key=key)


async def test_instance_is_restored_from_its_files_under_any_key(agent: Agent, models: dict[str, Model]) -> None:
    """A file beside it changed its key while its worker was down, and the key is another model's now."""
    await lost(agent)
    await agent.publish([renamed(models["p/llama"], "p/llama@f16"), renamed(models["p/moe"], "p/llama")])
    await agent.restorer.restore(agent.residents)
    new = await restored(agent, "p/llama")
    assert (new.key, new.source, new.restoring) == ("p/llama@f16", agent.models["p/llama@f16"].source, 1)


def incomplete(model: Model) -> Model:
    return msgspec.structs.replace(model, problem=Problem(code="invalid_model_file", message="m.gguf is too short"))


@pytest.mark.parametrize("before", ["nothing", "another model", "a part"])
async def test_instance_waits_for_its_files_after_one_try(
    agent: Agent, models: dict[str, Model], lines: Lines, before: str
) -> None:
    """A share is mounted late.  One try tells clients what is missing."""
    old = await lost(agent)
    there = {
        "nothing": [],
        "another model": [renamed(models["p/moe"], "p/llama")],
        "a part": [incomplete(models["p/llama"])],
    }
    await agent.publish(there[before])
    await agent.restorer.restore(agent.residents)
    (_, first) = await jobs(agent)
    failed = await until_terminal(agent, first.id)
    assert failed.error is not None
    assert failed.error.code == "invalid_model_file"
    for _ in range(3 * TRIES):
        await agent.restorer.restore(agent.residents)
    assert (len(await jobs(agent)), [*agent.desired.instances]) == (2, ["p/llama"])
    await agent.publish([*models.values()])
    await agent.restorer.restore(agent.residents)
    new = await restored(agent, "p/llama")
    assert (new.restoring, new.key, new.request) == (2, old.key, old.request)
    assert "restore_given_up" not in lines.actions


async def test_instance_unloaded_while_it_waits_for_files_is_dropped(
    agent: Agent, models: dict[str, Model], lines: Lines
) -> None:
    await lost(agent)
    await agent.publish([])
    await agent.restorer.restore(agent.residents)
    (_, first) = await jobs(agent)
    await until_terminal(agent, first.id)
    assert await agent.store.instances.forget_desired_everywhere("p/llama"), "an unload of it succeeds"
    await agent.restorer.restore(agent.residents)
    assert agent.desired.instances == {}
    assert "restore_given_up" not in lines.actions


# ---- restorations that fail


async def all_tries(agent: Agent) -> None:
    """Restore again and again until nothing is desired."""

    async def is_given_up() -> bool:
        await agent.restorer.restore(agent.residents)
        return not agent.desired.instances

    await until(is_given_up, "nothing is desired")


async def test_failing_restoration_is_tried_five_times_with_pauses(start: Begin, lines: Lines, tmp_path: Path) -> None:
    agent = await start(Timing(first_pause_s=0.05))
    await lost(agent, key=BAD)
    await all_tries(agent)
    _, *tries = await jobs(agent)
    assert [one.restoring for one in tries] == [*range(1, TRIES + 1)]
    assert {(one.state, one.instance_id, one.loaded_at) for one in tries} == {(State.FAILED, BAD, None)}
    for number, (before, one) in enumerate(pairwise(tries)):
        assert before.completed_at is not None
        assert one.completed_at is not None
        assert one.completed_at >= one.not_before >= before.completed_at + 0.05 * 2**number
    assert lines.actions.count("restore_given_up") == 1
    agent.desired.flush()
    assert read(tmp_path / FILE) == {}


async def test_abandoned_restoration_is_forgotten_everywhere(start: Begin, lines: Lines) -> None:
    """The next process does not take it up, and an unload of it is refused: it is not loaded."""
    agent = await start(Timing(first_pause_s=0.01))
    await lost(agent, key=BAD)
    await all_tries(agent)
    await agent.restorer.recall()
    assert agent.desired.instances == {}
    assert not await agent.store.instances.forget_desired_everywhere(BAD)
    assert lines.actions.count("restore_given_up") == 1


async def test_waiting_for_the_next_try_holds_up_no_other_instance(agent: Agent) -> None:
    await lost(agent, key=BAD, used_at=2.0)
    await agent.restorer.restore(agent.residents)
    (_, first) = await jobs(agent)
    assert (await until_terminal(agent, first.id)).state is State.FAILED
    await lost(agent, 2)
    await agent.restorer.restore(agent.residents)
    await restored(agent, "p/llama")
    second = await of(agent, BAD)
    assert second is not None
    assert (second.state, second.restoring) == (State.QUEUED, 2)


async def until_terminal(agent: Agent, id_: str) -> Instance:
    async def is_there() -> bool:
        return id_ not in agent.residents and (await record(agent, id_)).state in TERMINAL

    await until(is_there, f"{id_} has ended")
    return await record(agent, id_)


async def test_cancelled_try_is_the_last(agent: Agent) -> None:
    await lost(agent, key=BAD)
    await agent.restorer.restore(agent.residents)
    (_, first) = await jobs(agent)
    await until_terminal(agent, first.id)
    await agent.restorer.restore(agent.residents)
    second = await of(agent, BAD)
    assert second is not None
    await agent.store.instances.commit(second, second.after(Event.STOP))  # as an API cancels a queued load
    agent.stop(second.id)
    await released(agent, second.id)
    for _ in range(2):
        await agent.restorer.restore(agent.residents)
    assert (len(await jobs(agent)), agent.desired.instances) == (3, {})
    assert await agent.store.instances.desired("w") == {}


async def test_try_that_is_cancelled_while_loading_is_the_last(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    await lost(agent)
    runner = await warm(agent)
    monkeypatch.setattr(
        runner, "receive", asyncio.Event().wait
    )  # its outcome is never read, so that it stays `loading`
    await agent.restorer.restore(agent.residents)
    new = await of(agent, "p/llama")
    assert new is not None
    await reached(agent, new.id, State.LOADING)
    await agent.store.instances.forget_desired_everywhere("p/llama")
    await agent.store.instances.request_stop(new.id)
    agent.stop(new.id)
    await released(agent, new.id)
    assert (await record(agent, new.id)).state is State.CANCELLED
    await agent.restorer.restore(agent.residents)
    assert (len(await jobs(agent)), agent.desired.instances) == (2, {})


async def test_try_whose_worker_ended_is_not_counted(agent: Agent) -> None:
    """The model is not to blame."""
    old = await lost(agent)
    third = restoration(old, "load_third", 3, FIRST_PAUSE_S)
    begun = await agent.store.instances.create(msgspec.structs.replace(third, not_before=0.0), restores=old.id)
    agent.desired.add(begun)
    await agent.store.instances.commit(begun, begun.after(Event.EXPIRE))
    await agent.restorer.restore(agent.residents)
    new = await of(agent, "p/llama")
    assert new is not None
    assert (new.id != begun.id, new.restoring) == (True, 3)


async def test_successor_keeps_the_pause_of_its_predecessor(agent: Agent) -> None:
    """A worker that crashes in a loop must not try a model in a loop."""
    old = await lost(agent)
    waiting = await agent.store.instances.create(restoration(old, "load_second", 2, FIRST_PAUSE_S), restores=old.id)
    agent.desired.instances = {"p/llama": waiting}
    await agent.restorer.restore(agent.residents)
    await agent.reconciler.reconcile()
    assert agent.residents[waiting.id].not_before == waiting.not_before > time.time()
    assert (await record(agent, waiting.id)).state is State.QUEUED
    assert len(await jobs(agent)) == 2


# ---- recall from Redis


async def test_redis_is_enough_without_the_file(agent: Agent) -> None:
    old = await lost(agent)
    agent.desired.instances.clear()
    await agent.restorer.recall()
    assert agent.desired.instances == {"p/llama": old}
    await agent.restorer.restore(agent.residents)
    assert (await restored(agent, "p/llama")).id != old.id


async def test_newer_load_in_redis_wins_over_the_file(agent: Agent) -> None:
    """The file is older, as on a full disk: the load that it names was unloaded since."""
    older = await left_loaded(agent)
    stopped, _ = await agent.store.instances.commit(older, older.after(Event.STOP))
    ended, _ = await agent.store.instances.commit(stopped, stopped.after(Event.EXIT))
    newer = await left_loaded(agent, 2)
    await agent.store.instances.commit(newer, newer.after(Event.EXPIRE))  # as a sweep does it
    agent.desired.instances = {"p/llama": older}
    await agent.restorer.recall()
    for _ in range(2):
        await agent.restorer.restore(agent.residents)
    again = await restored(agent, "p/llama")
    assert again.id not in (ended.id, newer.id)


async def test_desired_id_without_a_record_is_ignored(agent: Agent, raw: redis.Redis) -> None:
    raw.hset("wanted:w", "p/llama", "load_long_ago")
    await agent.restorer.recall()
    assert agent.desired.instances == {}


async def test_instance_of_another_worker_is_not_recalled(agent: Agent) -> None:
    left = await left_loaded(agent)
    agent.desired.instances.clear()
    assert await agent.store.instances.desired("another") == {}
    restorer = Restorer(
        "another", agent.store.instances, agent.desired, agent.deliver, lambda _: True, agent.models, agent.timing
    )
    await restorer.recall()
    assert agent.desired.instances == {}
    assert await agent.store.instances.desired("w") == {"p/llama": left.id}


async def test_restore_off_clears_redis(agent: Agent) -> None:
    await left_loaded(agent)
    agent.desired.is_on = False
    await agent.restorer.recall()
    assert await agent.store.instances.desired("w") == {}
    assert agent.desired.instances == {}
    await agent.restorer.restore(agent.residents)
    assert len(await jobs(agent)) == 1


# ---- preloading


def preloading(agent: Agent) -> None:
    settings = ModelSettings(preload=True, context_length=256)
    agent.models["p/llama"] = msgspec.structs.replace(agent.models["p/llama"], settings=settings)


async def test_a_model_is_preloaded_once(agent: Agent) -> None:
    await agent.restorer.preload()
    assert await jobs(agent) == []
    preloading(agent)
    await agent.restorer.preload()
    loaded = await restored(agent, "p/llama")
    assert (loaded.key, loaded.restoring, loaded.request.context_length) == ("p/llama", 0, 256)
    await agent.store.instances.request_stop(loaded.id)
    agent.stop(loaded.id)
    await until(lambda: loaded.id not in agent.residents, "it is unloaded")
    await agent.restorer.preload()
    assert len(await jobs(agent)) == 1, "what a client unloads stays unloaded"


async def test_a_model_that_is_desired_is_not_preloaded(agent: Agent) -> None:
    preloading(agent)
    agent.desired.add(await lost(agent))
    await agent.restorer.preload()
    assert len(await jobs(agent)) == 1


async def test_a_model_that_is_queued_is_not_preloaded(agent: Agent) -> None:
    preloading(agent)
    await submitted(agent)
    await agent.restorer.preload()
    assert len(await jobs(agent)) == 1


async def test_a_model_is_preloaded_once_the_lease_is_held(agent: Agent) -> None:
    preloading(agent)
    await agent.store.workers.release("w", agent.epoch)
    await agent.restorer.preload()
    assert await jobs(agent) == []
    assert await agent.store.workers.renew(agent.snapshot()) == "held"
    await agent.restorer.preload()
    await restored(agent, "p/llama")


# ---- giving up the loads of a dead process


async def given_up(agent: Agent, left: Instance) -> Instance:
    await agent.reconciler.give_up(left)
    return await record(agent, left.id)


async def wish(agent: Agent, left: Instance) -> Instance:
    assert await agent.store.instances.request_stop(left.id) is not None
    return await record(agent, left.id)


async def test_loaded_instance_of_a_dead_worker_is_lost_and_desired(agent: Agent) -> None:
    left = await left_loaded(agent)
    found = await given_up(agent, left)
    assert (found.state, found.error, found.loaded_at) == (State.LOST, None, left.loaded_at)
    assert agent.desired.instances.keys() == {"p/llama"}


async def test_instance_that_was_to_be_unloaded_is_not_desired(agent: Agent) -> None:
    wished = await given_up(agent, await wish(agent, await left_loaded(agent)))
    begun = await left_loaded(agent, 2)
    unloading, _ = await agent.store.instances.commit(begun, begun.after(Event.STOP))
    stopping = await given_up(agent, await wish(agent, unloading))
    assert (wished.state, stopping.state) == (State.LOST, State.LOST)
    assert agent.desired.instances == {}
    await agent.restorer.restore(agent.residents)
    assert len(await jobs(agent)) == 2


async def test_load_of_a_dead_worker_is_requeued(agent: Agent) -> None:
    left = await left_loading(agent)
    found = await given_up(agent, left)
    assert (found.state, found.attempt, found.epoch, found.started_at) == (State.QUEUED, 2, None, None)
    assert agent.desired.instances == {}
    await agent.reconciler.reconcile()
    assert (await reached(agent, left.id, State.LOADED)).attempt == 2
    assert len(await jobs(agent)) == 1


async def test_load_that_was_to_be_stopped_is_cancelled(agent: Agent) -> None:
    found = await given_up(agent, await wish(agent, await left_loading(agent)))
    assert (found.state, found.error) == (State.CANCELLED, None)
    assert await agent.store.instances.named("p/llama") is None


async def test_load_that_was_begun_too_often_fails(start: Begin) -> None:
    agent = await start(load_attempts=1)
    found = await given_up(agent, await left_loading(agent))
    assert found.state is State.FAILED
    assert found.error is not None
    assert (found.error.code, "attempt 1 of 1" in found.error.message) == ("worker_lost", True)


async def test_load_that_was_moved_meanwhile_is_left_alone(agent: Agent) -> None:
    left = await left_loading(agent)
    moved, _ = await agent.store.instances.commit(left, left.abandoned(3, worker="another"))
    await agent.reconciler.give_up(left)
    assert await record(agent, left.id) == moved


# ---- an emptied Redis


async def test_loaded_instance_is_recorded_again_in_an_emptied_redis(agent: Agent, raw: redis.Redis) -> None:
    id_, runner = await loaded(agent)
    for _ in range(2):
        raw.flushall()
        await agent.reconciler.reconcile()
        assert await agent.store.instances.desired("w") == {"p/llama": id_}
    raw.set("lease:w", EPOCH, ex=60)
    await agent.restorer.restore(agent.residents)
    assert await agent.store.instances.named("p/llama") == id_
    assert not is_gone(runner.pid)
    agent.stop(id_)
    await reached(agent, id_, State.UNLOADED)
    await released(agent, id_)
    assert agent.desired.instances == {}


async def test_unloaded_instance_is_not_recorded_again(agent: Agent, raw: redis.Redis) -> None:
    """Also in a Redis that was emptied while its runner stopped."""
    id_, runner = await loaded(agent)
    assert await agent.store.instances.request_stop(id_) is State.LOADED
    agent.stop(id_)
    await released(agent, id_)
    raw.flushall()
    await agent.reconciler.reconcile()
    assert is_gone(runner.pid)
    assert await agent.store.instances.get(id_) is None


async def test_instance_whose_id_was_given_away_is_stopped(agent: Agent, raw: redis.Redis) -> None:
    id_, _ = await loaded(agent)
    raw.flushall()
    hold(raw, "w", "another")
    other = await submitted(agent, 2, worker_="another")
    await agent.reconciler.reconcile()
    await released(agent, id_)
    for _ in range(2):
        await agent.restorer.restore(agent.residents)
    assert await agent.store.instances.named("p/llama") == other
    assert agent.desired.instances == {}
    assert [one.id for one in await jobs(agent)] == [other]
