"""The roster of an API process on a real Redis: known workers, absences, and the choice for a load."""

from __future__ import annotations

import msgspec
import pytest
import redis
from msgspec import UNSET

import api.pool.roster
from api.pool.roster import PENDING_S, Roster
from shared.errors import NoWorker
from shared.instance import Instance
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import Device
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.keys import RETAIN_S
from shared.store.store import Store

MODEL = Model(key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], max_context_length=2048)


class Clock:
    """A monotonic clock for the roster that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(api.pool.roster, "time", clock)
    return clock


async def alive(store: Store, name: str, *, has_catalog: bool = True) -> None:
    digest = await store.workers.publish_catalog(name, [MODEL], "e") if has_catalog else ""
    await store.workers.renew(WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest or "", residents=0))


def remembered(roster: Roster) -> dict[str, object]:
    """Return all state of the roster that is not empty."""
    return {name: value for name, value in vars(roster).items() if isinstance(value, dict | list) and value}


async def test_the_roster_forgets_a_worker_that_redis_forgot(store: Store, raw: redis.Redis, clock: Clock) -> None:
    """In some pools each worker that starts has a new name."""
    roster = Roster(store.workers, Settings())
    for name, has_catalog in (("w", True), ("without-catalog", False)):
        await alive(store, name, has_catalog=has_catalog)
    await roster.refresh()
    instance = Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"))
    roster.placed(instance, None)
    assert roster.models()
    for name in ("w", "without-catalog"):
        await store.workers.release(name, "e")
    await roster.refresh()
    clock.now += 1
    assert [roster.absent_s(name) for name in ("w", "without-catalog")] == [1, 1]
    raw.delete("workers", "catalog:w")
    clock.now += RETAIN_S + PENDING_S
    await roster.refresh()
    assert roster.models() == []
    assert remembered(roster) == {}


async def test_an_emptied_redis_does_not_remove_workers(store: Store, raw: redis.Redis, clock: Clock) -> None:
    roster = Roster(store.workers, Settings())
    await alive(store, "w")
    await roster.refresh()
    raw.flushall()
    await roster.refresh()
    clock.now += store.workers.lease_s / 2
    await roster.refresh()
    assert [*roster.catalogs] == ["w"]
    await alive(store, "w")
    await roster.refresh()
    assert (roster.absent_s("w"), [*roster.catalogs]) == (0, ["w"])


async def test_an_absence_counts_from_the_first_question(store: Store, raw: redis.Redis, clock: Clock) -> None:
    """The sweep uses this time, also for a worker that Redis does not know."""
    roster = Roster(store.workers, Settings())
    assert roster.absent_s("gone") == 0
    clock.now += 2 * store.workers.lease_s
    await roster.refresh()
    assert roster.absent_s("gone") == 2 * store.workers.lease_s


async def publish_with_gpu(store: Store, name: str, model_bytes: int, gpu_bytes: int) -> None:
    """Publish a worker with one GPU and one model, `p/m`, of these sizes."""
    model = Model(key="p/m", base="p/m", variant="", shards=[], size_bytes=model_bytes, max_context_length=512)
    digest = await store.workers.publish_catalog(name, [model], "e")
    assert digest is not None
    gpu = Device(
        id=f"GPU-{name}", kind="gpu", name="", total_bytes=gpu_bytes, free_bytes=gpu_bytes, available_bytes=gpu_bytes
    )
    await store.workers.renew(
        WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest, residents=0, devices=[gpu])
    )


async def test_a_load_is_placed_by_the_file_of_each_worker(store: Store) -> None:
    """Workers may have files of different sizes under one key: only `small` has room for its own file."""
    await publish_with_gpu(store, "large", 100, gpu_bytes=50)
    await publish_with_gpu(store, "other", 100, gpu_bytes=60)
    await publish_with_gpu(store, "small", 40, gpu_bytes=70)
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    request = LoadRequest(model="p/m")
    candidates, _ = roster.candidates(request)
    assert sorted(one.worker for one in candidates) == ["large", "other", "small"]
    best, placement = roster.choose(candidates, request)
    assert best.worker == "small"
    assert placement is not None
    assert placement.bytes == {"GPU-small": 40}


async def test_the_error_says_whether_a_worker_drains_or_is_away(store: Store) -> None:
    for name, state in (("drains", "draining"), ("has-none", "ready"), ("left", "ready")):
        models = [] if name == "has-none" else [MODEL]
        digest = await store.workers.publish_catalog(name, models, "e")
        assert digest is not None
        snapshot = WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest, residents=0)
        await store.workers.renew(msgspec.structs.replace(snapshot, state=state))
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    await store.workers.release("left", "e")
    await roster.refresh()

    def error(worker: str = "") -> str:
        request = LoadRequest(model="p/m", gpu=GPURequest(worker=worker) if worker else UNSET)
        candidates, known = roster.candidates(request)
        assert candidates == []
        found = roster.nowhere(request, known)
        assert isinstance(found, NoWorker)
        return str(found)

    assert error() == "No worker accepts p/m now: draining: 'drains'. Try again shortly."
    assert error("drains") == "Worker 'drains' is draining and accepts no new loads. Try again shortly."
    assert error("left") == "Worker 'left' is not available. Try again shortly."
    assert error("has-none") == "Worker 'has-none' does not have p/m."
    await store.workers.release("drains", "e")
    await roster.refresh()
    assert error() == "No available worker has p/m. Try again shortly."
