"""Deliveries on a real Redis: fast by notification, complete without it, and never unpickled."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Iterable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, cast

import pytest
import redis
from msgspec import msgpack

import worker.deliveries
from api.loads.departures import Departures
from api.loads.records import Records
from api.loads.submit import Intake
from api.pool.roster import Roster
from shared.instance import Instance
from shared.lifecycle import State
from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.schema.snapshot import Sizing, WorkerSnapshot
from shared.settings import Settings
from shared.store import keys
from shared.store.queue import DELIVERY_S, LOAD, as_arq, unpack_job
from shared.store.store import Store
from tests.support.waiting import until
from worker.agent import Agent
from worker.timing import Timing

DEADLINE_S = 60.0
MODEL = Model(key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], max_context_length=512)


class Recording(Agent):
    """An agent that only records its deliveries and stop requests."""

    def __init__(self, store: Store) -> None:
        super().__init__(Settings(worker_name="w"), store, "e", timing=Timing(beat_s=0.02))
        self.delivered: list[str] = []
        self.stopped: list[str] = []
        self.recorded = asyncio.Event()

    def deliver(self, id_: str, not_before: float = 0.0) -> None:
        self.delivered.append(id_)
        self.recorded.set()

    def stop(self, id_: str) -> None:
        self.stopped.append(id_)
        self.recorded.set()

    async def until(self, *ids: str) -> None:
        """Wait until all of `ids` are delivered."""
        async with asyncio.timeout(DEADLINE_S):
            while not set(ids) <= {*self.delivered}:
                self.recorded.clear()
                await self.recorded.wait()


@pytest.fixture
def agent(store: Store) -> Recording:
    return Recording(store)


@pytest.fixture
async def intake(store: Store) -> Intake:
    """An intake with one live worker that has a model."""
    digest = await store.workers.publish_catalog("w", [MODEL], "e")
    await store.workers.renew(WorkerSnapshot(name="w", epoch="e", version="0", catalog=digest or "", residents=0))
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    return Intake(
        roster, store.queue, store.instances, Records(store.instances), Departures(store.instances), at_most=(128, 1024)
    )


@pytest.fixture
def no_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make deliveries depend on notifications."""
    monkeypatch.setattr(worker.deliveries, "FALLBACK_S", 3600.0)


@pytest.fixture
async def working(store: Store, agent: Recording, raw: redis.Redis) -> AsyncIterator[None]:
    """arq and the wake channel as in a worker, once they listen."""
    task = asyncio.create_task(worker.deliveries.take_deliveries(store.redis, agent))
    async with asyncio.timeout(DEADLINE_S):
        while not listeners(raw):
            assert not task.done()
            await asyncio.sleep(0.005)
    yield
    assert not task.done(), "only a cancellation ends the loop"
    await end(task)


async def end(task: asyncio.Task[None]) -> None:
    task.cancel()
    done, _ = await asyncio.wait({task}, timeout=DEADLINE_S)
    assert done, "the task did not end after its cancellation"


async def submit(intake: Intake) -> Instance:
    return await intake.submit(LoadRequest(model="p/m"))


def in_order(instances: Iterable[Instance]) -> list[str]:
    """Return the ids of instances in the order in which Redis accepted them."""
    return [one.id for one in sorted(instances, key=lambda one: one.created_at)]


def listeners(raw: redis.Redis) -> int:
    counts: Any = raw.pubsub_numsub("wake:w")
    return int(counts[0][1])


def is_over(raw: redis.Redis, entry: str) -> bool:
    return raw.zscore(keys.queue("w"), entry) is None


def kill_connections(raw: redis.Redis) -> None:
    """Close all connections except that of `raw`."""
    for kind in ("normal", "pubsub"):
        raw.execute_command("CLIENT", "KILL", "TYPE", kind, "SKIPME", "yes")  # type: ignore[no-untyped-call]


# ---- with notifications


@pytest.mark.usefixtures("no_fallback", "working")
async def test_a_load_is_delivered_at_once(intake: Intake, agent: Recording) -> None:
    for _ in range(5):
        submitted = await submit(intake)
        await agent.until(submitted.id)
    assert len(agent.delivered) == 5


@pytest.mark.usefixtures("no_fallback", "working")
async def test_concurrent_loads_are_each_delivered_once(intake: Intake, agent: Recording, raw: redis.Redis) -> None:
    submitted = await asyncio.gather(*(submit(intake) for _ in range(50)))
    await agent.until(*(one.id for one in submitted))
    assert sorted(agent.delivered) == sorted(one.id for one in submitted)
    arq_keys = [f"arq:{kind}:{one.id}:1" for one in submitted for kind in ("job", "result", "in-progress")]
    await until(lambda: raw.exists(*arq_keys) == 0, "no key of arq is left")
    assert raw.zcard(keys.queue("w")) == 0


@pytest.mark.usefixtures("no_fallback", "working")
async def test_loads_are_delivered_in_the_order_accepted(intake: Intake, agent: Recording) -> None:
    submitted = await asyncio.gather(*(submit(intake) for _ in range(100)))
    await agent.until(*(one.id for one in submitted))
    assert agent.delivered == in_order(submitted)


@pytest.mark.usefixtures("no_fallback")
async def test_waiting_loads_are_delivered_in_the_order_accepted(
    store: Store, intake: Intake, agent: Recording
) -> None:
    """Several are accepted within each millisecond, the unit of arq's scores."""
    submitted = await asyncio.gather(*(submit(intake) for _ in range(100)))
    task = asyncio.create_task(worker.deliveries.take_deliveries(store.redis, agent))
    await agent.until(*(one.id for one in submitted))
    await end(task)
    assert agent.delivered == in_order(submitted)


@pytest.mark.usefixtures("no_fallback")
async def test_a_load_queued_before_the_worker_starts_is_delivered(
    store: Store, intake: Intake, agent: Recording
) -> None:
    submitted = await submit(intake)
    assert agent.delivered == []
    task = asyncio.create_task(worker.deliveries.take_deliveries(store.redis, agent))
    await agent.until(submitted.id)
    await end(task)


@pytest.mark.usefixtures("no_fallback", "working")
async def test_a_stop_request_reaches_the_agent(store: Store, intake: Intake, agent: Recording) -> None:
    submitted = await submit(intake)
    await agent.until(submitted.id)
    assert await store.instances.request_stop(submitted.id)
    async with asyncio.timeout(DEADLINE_S):
        while submitted.id not in agent.stopped:
            agent.recorded.clear()
            await agent.recorded.wait()


@pytest.mark.usefixtures("no_fallback")
async def test_an_entry_queued_twice_is_delivered_once(store: Store, intake: Intake, agent: Recording) -> None:
    submitted = await submit(intake)
    again: dict[str, Any] = {"_job_id": f"{submitted.id}:1", "_queue_name": keys.queue("w"), "_expires": 3600}
    assert await as_arq(store.redis).enqueue_job("load", submitted.id, **again) is None
    last = await submit(intake)
    task = asyncio.create_task(worker.deliveries.take_deliveries(store.redis, agent))
    await agent.until(submitted.id, last.id)
    await end(task)
    assert agent.delivered.count(submitted.id) == 1


@pytest.mark.usefixtures("no_fallback")
async def test_a_cancellation_ends_deliveries_at_any_time(store: Store, intake: Intake, agent: Recording) -> None:
    """A stopping worker waits for this end before it drains, so that a lost cancellation would block it."""
    for _ in range(5):
        submitted = await submit(intake)
        task = asyncio.create_task(worker.deliveries.take_deliveries(store.redis, agent))
        await agent.until(submitted.id)
        await end(task)


@pytest.mark.usefixtures("no_fallback", "working")
async def test_a_delivery_does_not_repeat_a_running_dry_run(
    store: Store, intake: Intake, agent: Recording, raw: redis.Redis, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, answer = [], asyncio.Event()

    async def answer_late(sizing: bytes) -> bytes:
        questions.append(sizing)
        await answer.wait()
        return msgpack.encode(None)

    monkeypatch.setattr(agent.dry_run, "answer", answer_late)
    sizing = Sizing(request=LoadRequest(model="p/m"), key="p/m", gpus=[], layers=[])
    asking = asyncio.create_task(store.queue.sized("w", sizing))
    for _ in range(3):
        submitted = await submit(intake)
        await agent.until(submitted.id)
        await until(partial(is_over, raw, f"{submitted.id}:1"), "arq has finished the entry")
    assert raw.zcard(keys.queue("w")) == 1, "the dry run is not dropped after too many tries"
    answer.set()
    async with asyncio.timeout(DEADLINE_S):
        assert await asking is None
    assert len(questions) == 1


# ---- without notifications


@pytest.mark.usefixtures("working")
async def test_a_delivery_without_notification_arrives_by_polling(store: Store, agent: Recording) -> None:
    record = await store.instances.create(Instance(**QUEUED))
    await as_arq(store.redis).enqueue_job("load", record.id, _job_id=record.id, _queue_name=keys.queue("w"))
    await agent.until(record.id)


QUEUED: dict[str, Any] = {
    "id": "load_1",
    "model": "p/m",
    "key": "p/m",
    "type": "llm",
    "worker": "w",
    "request": LoadRequest(model="p/m"),
}


async def test_the_beat_finds_a_lost_delivery(store: Store, agent: Recording) -> None:
    """The API wrote the record and died before it could enqueue, or Redis lost the queue."""
    own = await store.instances.create(Instance(**QUEUED))
    await store.instances.create(Instance(**{**QUEUED, "id": "load_2", "worker": "another"}))
    beat = asyncio.create_task(agent.beat())
    await agent.until(own.id)
    await end(beat)
    assert set(agent.delivered) == {own.id}


async def test_the_beat_delivers_in_the_order_accepted(store: Store, agent: Recording) -> None:
    created = [await store.instances.create(Instance(**{**QUEUED, "id": f"load_{n}"})) for n in range(20)]
    await agent.reconciler.reconcile()
    assert agent.delivered == in_order(created)


# ---- cut connections


@pytest.mark.usefixtures("no_fallback", "working")
async def test_deliveries_continue_after_all_connections_are_cut(
    store: Store, intake: Intake, agent: Recording, raw: redis.Redis
) -> None:
    for _ in range(4):
        kill_connections(raw)
        submitted = await submit(intake)
        await agent.until(submitted.id)
    kill_connections(raw)
    await until(lambda: listeners(raw) > 0, "the channel of stop requests is open again")
    await store.instances.request_stop(submitted.id)
    async with asyncio.timeout(DEADLINE_S):
        while submitted.id not in agent.stopped:
            agent.recorded.clear()
            await agent.recorded.wait()


@pytest.mark.usefixtures("no_fallback", "working")
async def test_no_load_is_lost_when_connections_are_cut_repeatedly(
    store: Store, intake: Intake, agent: Recording, raw: redis.Redis
) -> None:
    """An arq job may be lost with the reply to its claim; its record is not, and the beat finds it."""
    submitted = []
    for _ in range(10):
        submitted.append(await submit(intake))
        kill_connections(raw)
    missing = {one.id for one in submitted}
    async with asyncio.timeout(DEADLINE_S):
        while not missing <= {*agent.delivered}:
            await agent.reconciler.reconcile()
            await asyncio.sleep(0.05)
    states = {one.state for one in await store.instances.live()}
    assert states == {State.QUEUED}


# ---- entries of the queue


async def test_queue_entries_are_msgpack(intake: Intake, raw: redis.Redis) -> None:
    submitted = await submit(intake)
    job = msgpack.decode(cast(bytes, raw.get(f"arq:job:{submitted.id}:1")))  # raises for a pickle
    assert (job["f"], job["a"], job["k"]) == ("load", [submitted.id], {})


class Crafted:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.usefixtures("no_fallback", "working")
@pytest.mark.parametrize("kind", ["pickle", "noise", "another function", "no arguments"])
async def test_a_crafted_entry_runs_nothing_and_blocks_no_other(
    store: Store, intake: Intake, agent: Recording, raw: redis.Redis, tmp_path: Path, kind: str
) -> None:
    entries = {
        "pickle": pickle.dumps({"t": None, "f": "load", "a": (Crafted(tmp_path / "run"),), "k": {}, "et": 1}),
        "noise": b"\xc1\x00\xff",
        "another function": msgpack.encode({"t": None, "f": "os.system", "a": ["true"], "k": {}, "et": 1}),
        "no arguments": msgpack.encode({"t": None, "f": "load", "a": [], "k": {}, "et": 1}),
    }
    raw.set("arq:job:crafted", entries[kind], ex=60)
    raw.zadd(keys.queue("w"), {"crafted": time.time() * 1000})
    for _ in range(2):
        submitted = await submit(intake)
        await agent.until(submitted.id)
    await until(lambda: is_over(raw, "crafted"), "arq has finished the entry")
    assert not (tmp_path / "run").exists()
    assert set(agent.delivered) <= {one.id for one in await store.instances.live()}


# ---- the format of arq


async def test_an_entry_has_the_format_of_arq(store: Store, raw: redis.Redis) -> None:
    """`shared.store.queue` writes entries without `ArqRedis.enqueue_job`; arq's worker must see no difference."""
    assert metadata.version("arq") == "0.28.0"
    record = Instance(**QUEUED, instance_id="p/m", rev=7)
    await store.queue.deliver(record)
    ours = written(raw, f"{record.id}:7")
    raw.flushall()
    await as_arq(store.redis).enqueue_job(
        LOAD, record.id, _job_id=f"{record.id}:7", _queue_name=keys.queue("w"), _expires=DELIVERY_S
    )
    theirs = written(raw, f"{record.id}:7")
    assert ours.keys() == theirs.keys()
    moments = {"enqueued at", "score", "expires in"}
    assert {name: ours[name] for name in ours.keys() - moments} == {
        name: theirs[name] for name in theirs.keys() - moments
    }
    for name in moments:
        assert abs(ours[name] - theirs[name]) < 10_000, "milliseconds between the two writes"


def written(raw: redis.Redis, id_: str) -> dict[str, Any]:
    """Return the content of one entry in Redis; times in milliseconds."""
    job: Any = raw.get(f"arq:job:{id_}")
    fields = unpack_job(job)
    queue: Any = raw.zrange(keys.queue("w"), 0, -1, withscores=True)
    ((name, score),) = queue
    everything: Any = raw.keys()
    return {
        "keys": sorted(key for key in everything if key.startswith(b"arq:")),
        "enqueued at": fields.pop("et"),
        "call": fields,
        "name": name,
        "score": score,
        "expires in": raw.pttl(f"arq:job:{id_}"),
    }
