"""Submitting loads on a real Redis: the choice of a worker, and Retry-After of a full queue."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from itertools import permutations

import pytest
import redis
from msgspec import structs

from api.loads.departures import Departures
from api.loads.records import Records
from api.loads.submit import Intake
from api.pool.roster import Roster
from shared.errors import InvalidValue, LoadFailed, QueueFull
from shared.race import racing
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import Device
from shared.schema.model import FileStat, Model, Problem
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store

MODEL = Model(key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], max_context_length=2048)
BROKEN = Model(
    key="p/m", base="p/m", variant="", shards=["p/m/m.gguf"], problem=Problem(code="invalid_model_file", message="why")
)


async def alive(store: Store, name: str, model: Model, residents: int = 0, devices: Sequence[Device] = ()) -> None:
    digest = await store.workers.publish_catalog(name, [model], "e")
    await store.workers.renew(
        WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest or "", residents=residents, devices=[*devices])
    )


def intake_of(
    store: Store, settings: Settings, roster: Roster | None = None, departures: Departures | None = None
) -> Intake:
    roster = roster or Roster(store.workers, settings)
    departures = departures or Departures(store.instances)
    limits = settings.worker_queue_limit, settings.queue_limit
    return Intake(roster, store.queue, store.instances, Records(store.instances), departures, at_most=limits)


@pytest.fixture
async def departures(store: Store) -> AsyncIterator[Departures]:
    departures = Departures(store.instances)
    async with racing(departures.run()):
        yield departures


@pytest.fixture
def intake(store: Store) -> Intake:
    return intake_of(store, Settings())


async def test_concurrent_loads_are_spread_over_the_workers(store: Store, intake: Intake) -> None:
    """Snapshots are up to a beat old: later placements count too."""
    for name in ("w", "another"):
        await alive(store, name, MODEL)
    placed = [(await intake.submit(LoadRequest(model="p/m"))).worker for _ in range(6)]
    assert Counter(placed) == {"w": 3, "another": 3}


async def test_the_worker_with_the_fewest_residents_is_chosen(store: Store, intake: Intake) -> None:
    await alive(store, "another", MODEL, residents=2)
    await alive(store, "w", MODEL, residents=1)
    assert (await intake.submit(LoadRequest(model="p/m"))).worker == "w"


async def test_a_worker_with_a_readable_file_is_preferred(store: Store, intake: Intake) -> None:
    await alive(store, "another", BROKEN)
    await alive(store, "w", MODEL, residents=9)
    assert (await intake.submit(LoadRequest(model="p/m"))).worker == "w"


async def test_a_file_unreadable_on_all_workers_is_refused(store: Store, intake: Intake) -> None:
    await alive(store, "w", BROKEN)
    with pytest.raises(LoadFailed, match="why"):
        await intake.submit(LoadRequest(model="p/m"))
    assert await store.instances.live() == []


# ---- Retry-After


def departed(raw: redis.Redis, queue: str, seconds_ago: float) -> None:
    """Record that a load left a queue so long ago, which determines the rate of the queue."""
    raw.rpush(queue, round((time.time() - seconds_ago) * 1e6))


async def retry_after_s(intake: Intake) -> int | None:
    with pytest.raises(QueueFull) as refused:
        await intake.submit(LoadRequest(model="p/m"))
    return refused.value.retry_after_s


@pytest.mark.parametrize("ages_s", [*permutations((9.1, 19.1, 29.1))])
async def test_the_shortest_retry_after_of_full_workers_counts(
    store: Store, raw: redis.Redis, ages_s: tuple[float, ...]
) -> None:
    """The order of the workers, by residents, does not matter."""
    intake = intake_of(store, Settings(worker_queue_limit=1))
    names = ("a", "b", "c")
    for residents, (name, age_s) in enumerate(zip(names, ages_s, strict=True)):
        await alive(store, name, MODEL, residents)
        departed(raw, f"pace:{name}", age_s)
    assert {(await intake.submit(LoadRequest(model="p/m"))).worker for _ in names} == {*names}
    assert await retry_after_s(intake) == 10


async def test_the_retry_after_of_a_full_pool_counts_too(store: Store, raw: redis.Redis) -> None:
    intake = intake_of(store, Settings(worker_queue_limit=1, queue_limit=1))
    for residents, name in enumerate(("a", "b")):
        await alive(store, name, MODEL, residents)
    departed(raw, "pace:a", 19.1)
    departed(raw, "pace", 9.1)
    assert (await intake.submit(LoadRequest(model="p/m"))).worker == "a"
    assert await retry_after_s(intake) == 10


async def test_a_worker_full_in_the_second_round_counts(store: Store, raw: redis.Redis) -> None:
    """The first round tries a worker that has just left, the second a worker that has just joined."""
    roster = Roster(store.workers, Settings())
    intake = intake_of(store, Settings(worker_queue_limit=1), roster)
    await alive(store, "gone", MODEL)
    await roster.refresh()
    await store.workers.release("gone", "e")
    await alive(store, "w", MODEL)
    departed(raw, "pace:w", 9.1)
    assert (await intake_of(store, Settings()).submit(LoadRequest(model="p/m"))).worker == "w"
    assert await retry_after_s(intake) == 10


async def test_a_device_of_a_full_worker_is_a_valid_value(store: Store, raw: redis.Redis) -> None:
    """The device exists although its worker is full; the other worker does not have it and is not tried."""
    intake = intake_of(store, Settings(worker_queue_limit=1))
    request = LoadRequest(model="p/m", gpu=GPURequest(devices=["GPU-1"]))
    await alive(store, "w", MODEL, devices=[device("GPU-1")])
    await alive(store, "another", MODEL, devices=[device("GPU-2")])
    departed(raw, "pace:w", 9.1)
    assert (await intake.submit(request)).worker == "w"
    with pytest.raises(QueueFull) as refused:
        await intake.submit(request)
    assert refused.value.retry_after_s == 10


async def test_a_device_that_no_worker_has_is_an_invalid_value(store: Store) -> None:
    await alive(store, "w", MODEL, devices=[device("GPU-1")])
    with pytest.raises(InvalidValue, match="'GPU-9'"):
        await intake_of(store, Settings()).submit(LoadRequest(model="p/m", gpu=GPURequest(devices=["GPU-1", "GPU-9"])))


def device(id_: str) -> Device:
    return Device(id=id_, kind="gpu", name="", total_bytes=1 << 30, free_bytes=1 << 30, available_bytes=1 << 30)


async def test_a_load_that_was_left_is_joined_by_its_caller_only(store: Store, departures: Departures) -> None:
    await alive(store, "w", MODEL)
    intake, request = intake_of(store, Settings(), departures=departures), LoadRequest(model="p/m")
    first = await intake.submit(request, caller="one")
    departures.add(first, "one")
    other = await intake.submit(request, caller="other")
    assert other.id != first.id
    assert (await intake.submit(request, caller="one")).id == first.id
    assert (await intake.submit(request, caller="one")).id not in (first.id, other.id)  # its place is taken


async def test_a_retry_joins_whichever_worker_would_be_chosen(store: Store, departures: Departures) -> None:
    """Copies of a file have other times on other workers, and the worker with the load is not chosen again."""
    for name, at in (("w", 1), ("another", 2)):
        await alive(store, name, structs.replace(MODEL, files=[FileStat(size=1, mtime_ns=at, inode=1)]))
    intake = intake_of(store, Settings(), departures=departures)
    first = await intake.submit(LoadRequest(model="p/m"))
    departures.add(first, "")
    assert (await intake.submit(LoadRequest(model="p/m"))).id == first.id
    assert (await intake.submit(LoadRequest(model="p/m"))).worker != first.worker


async def test_a_retry_joins_also_if_the_queue_is_full(store: Store, departures: Departures) -> None:
    await alive(store, "w", MODEL)
    intake = intake_of(store, Settings(queue_limit=1), departures=departures)
    first = await intake.submit(LoadRequest(model="p/m"))
    departures.add(first, "")
    assert (await intake.submit(LoadRequest(model="p/m"))).id == first.id
    with pytest.raises(QueueFull):
        await intake.submit(LoadRequest(model="p/m"))
