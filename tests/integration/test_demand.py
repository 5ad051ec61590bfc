"""Loads on demand by several API processes on a real Redis: one load for all, its request, its outcome."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest
import redis
from msgspec import UNSET, structs

from api.loads.demand import OnDemand, Options
from api.loads.departures import Departures
from api.loads.follow import Follower, ReportedFailure
from api.loads.records import Records
from api.loads.submit import Intake
from api.pool.estimate import estimated
from api.pool.roster import Roster
from shared.errors import (
    LoadFailed,
    LoadFailure,
    LoadInterrupted,
    ModelNotFound,
    NoWorker,
    QueueTimeout,
    QueueUnavailable,
    ServiceError,
)
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.race import racing
from shared.schema.http import LoadRequest
from shared.schema.memory import CPU, Device
from shared.schema.model import Dimensions, FileStat, Model, ModelSettings, Problem, Weights
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.keys import FAILURE_MEMORY_S
from shared.store.store import Store

DEADLINE_S = 60.0
MODEL = Model(
    key="p/m",
    base="p/m",
    variant="",
    shards=["p/m/m.gguf"],
    files=[FileStat(1, 2, 3)],
    architecture="llama",
    max_context_length=100_000,
    dimensions=Dimensions(
        block_count=4,
        embedding_length=64,
        head_count=4,
        head_count_kv=2,
        key_length=16,
        value_length=16,
        feed_forward_length=128,
        vocabulary=500,
    ),
    weights=Weights(
        input_bytes=500,
        repeating_bytes=40_000,
        output_bytes=700,
        has_output=True,
        block_bytes=[10_000] * 4,
    ),
)
AMPLE = 1 << 40


async def alive(store: Store, *models: Model, name: str = "w", free_bytes: int = AMPLE) -> None:
    digest = await store.workers.publish_catalog(name, [*(models or (MODEL,))], "e")
    device = Device(id=CPU, kind="cpu", name="", total_bytes=AMPLE, free_bytes=free_bytes, available_bytes=free_bytes)
    await store.workers.renew(
        WorkerSnapshot(name=name, epoch="e", version="0", catalog=digest or "", residents=0, devices=[device])
    )


class Process:
    """What loads on demand in one API process."""

    def __init__(self, store: Store, settings: Settings) -> None:
        self.follower = Follower(store.instances, store.listen)
        roster, records = Roster(store.workers, settings), Records(store.instances)
        limits = settings.worker_queue_limit, settings.queue_limit
        intake = Intake(roster, store.queue, store.instances, records, Departures(store.instances), at_most=limits)
        self.demand = OnDemand(intake, records, self.follower, roster, store.queue, settings)


@pytest.fixture
async def process(store: Store) -> AsyncIterator[Process]:
    async with asyncio.timeout(DEADLINE_S):
        process = Process(store, Settings())
        async with racing(process.follower.run()):
            yield process


async def under_way(store: Store) -> Instance:
    """Wait for the only load; return its record."""
    async with asyncio.timeout(DEADLINE_S):
        while not (live := await store.instances.live()):  # noqa: ASYNC110
            await asyncio.sleep(0)
    (record,) = live
    return record


async def after(store: Store, record: Instance, event: Event, **changes: Any) -> Instance:
    return (await store.instances.commit(record, record.after(event, **changes)))[0]


async def succeed(store: Store, record: Instance) -> Instance:
    record = await after(store, record, Event.CLAIM, epoch="e")
    return await after(store, record, Event.LOAD, loaded_at=1.0, used_at=1.0)


async def requested(store: Store, process: Process, name: str = "p/m", **options: Any) -> LoadRequest:
    """Load on demand; return the request of the load."""
    async with racing(process.demand.loaded(name, **options)):
        record = await under_way(store)
    await after(store, record, Event.STOP)
    await process.demand.close()
    assert record.on_demand
    return record.request


async def failed(store: Store, process: Process, error: ServiceError) -> ServiceError:
    """Load on demand, and fail the load; return the error that the request gets."""
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        record = await under_way(store)
        await after(store, record, Event.FAIL, error=error.body())
        with pytest.raises(ServiceError) as raised:
            await demanding
    return raised.value


# ---- one load


async def test_a_thousand_requests_at_two_processes_wait_for_one_load(store: Store, process: Process) -> None:
    await alive(store)
    other = Process(store, Settings())
    async with racing(other.follower.run()):
        waiting = [asyncio.create_task((process, other)[n % 2].demand.loaded("P/M")) for n in range(1000)]
        record = await under_way(store)
        for one in waiting[:10]:
            one.cancel()  # a client that leaves
        loaded = await succeed(store, record)
        assert {one.id for one in await asyncio.gather(*waiting[10:])} == {loaded.id}
    assert [one async for one in store.instances.newest()] == [loaded]


async def test_a_load_goes_on_when_nobody_waits(store: Store, process: Process) -> None:
    await alive(store)
    async with racing(process.demand.loaded("p/m")):
        record = await under_way(store)
    assert not record.stop_requested
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        loaded = await succeed(store, record)
        assert await demanding == loaded


async def test_a_request_that_lost_its_instance_loads_another(store: Store, process: Process) -> None:
    await alive(store)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        first = await succeed(store, await under_way(store))
        assert (await demanding).id == first.id
    assert (await process.demand.loaded("p/m")).id == first.id, "as Redis has it"
    async with racing(process.demand.loaded("p/m", without={first.id})) as (demanding,):
        while len(live := await store.instances.live()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        second = await succeed(store, live[1])
        assert (await demanding).id == second.id
    assert second.instance_id == "p/m:2"


async def test_an_unusable_instance_is_not_joined(store: Store, process: Process, raw: redis.Redis) -> None:
    """Its worker holds its lease, but publishes nothing."""
    await alive(store)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        first = await succeed(store, await under_way(store))
        assert await demanding == first
    raw.delete("worker:w")
    await alive(store, name="another")
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        while len(live := await store.instances.live()) < 2:  # noqa: ASYNC110
            await asyncio.sleep(0)
        second = await succeed(store, live[1])
        assert (await demanding).id == second.id
    assert second.worker == "another"


async def test_a_process_that_stops_does_not_stop_the_load(store: Store, process: Process) -> None:
    await alive(store)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        record = await under_way(store)
        await process.demand.close()
        with pytest.raises(QueueUnavailable):
            await demanding
    assert await store.instances.get(record.id) == record


# ---- the request


async def test_the_context_is_the_largest_that_fits(store: Store, process: Process) -> None:
    await alive(store)
    assert (await requested(store, process)).context_length == Settings().jit_context
    few = structs.replace(MODEL, max_context_length=1000)
    await alive(store, few)
    assert (await requested(store, process)).context_length == 1000
    await alive(store, free_bytes=10 << 20)
    estimate = await estimated(LoadRequest(model="p/m"), Roster(store.workers, Settings()), store.queue)
    assert (await requested(store, process)).context_length == estimate.max_context_length_that_fits
    assert 256 < (estimate.max_context_length_that_fits or 0) < Settings().jit_context
    await alive(store, free_bytes=100)
    assert (await requested(store, process)).context_length is UNSET, "none fits: the worker says what is missing"


async def test_an_embedding_model_gets_its_own_context(store: Store, process: Process) -> None:
    await alive(store, structs.replace(MODEL, type="embedding"))
    assert (await requested(store, process)).context_length is UNSET


async def test_the_ttl_is_the_requests_or_the_models_or_the_default(store: Store, process: Process) -> None:
    await alive(store)
    assert (await requested(store, process)).ttl_seconds == Settings().jit_ttl_s == 3600
    assert (await requested(store, process, options=Options(ttl_s=5.0))).ttl_seconds == 5
    await alive(store, structs.replace(MODEL, settings=ModelSettings(ttl_seconds=7)))
    assert (await requested(store, process)).ttl_seconds == 7
    assert (await requested(store, process, options=Options(ttl_s=5.0))).ttl_seconds == 5
    await alive(store, structs.replace(MODEL, settings=ModelSettings(ttl_seconds=7, pin=True)))
    assert (await requested(store, process, options=Options(ttl_s=5.0))).ttl_seconds is UNSET


async def test_the_settings_of_the_model_win(store: Store, process: Process) -> None:
    own = ModelSettings(context_length=2048, parallel=2, kv_cache_type="q8_0")
    await alive(store, structs.replace(MODEL, settings=own, dimensions=None))
    request = await requested(store, process)
    assert (request.context_length, request.parallel, request.kv_cache_type) == (2048, 2, "q8_0")


# ---- failures


@pytest.mark.parametrize("code", ["engine_crashed", "invalid_model_file", "load_stalled", "unsupported_model"])
async def test_a_failure_answers_at_once_for_a_while(store: Store, process: Process, code: LoadFailure) -> None:
    await alive(store)
    failure = LoadFailed(code, "llm", "p/m", "why")
    error = await failed(store, process, failure)
    assert (error.body(), error.retry_after_s) == (failure.body(), None)
    other = Process(store, Settings())
    for one in (process, other):
        with pytest.raises(ReportedFailure) as raised:
            await one.demand.loaded("p/m")
        assert raised.value.body() == failure.body()
    assert await store.instances.live() == []


async def test_a_shortage_of_memory_tells_when_to_retry(store: Store, process: Process, raw: redis.Redis) -> None:
    await alive(store)
    error = await failed(store, process, LoadFailed("insufficient_memory", "llm", "p/m", "why"))
    assert error.retry_after_s == FAILURE_MEMORY_S
    raw.expire(f"failed:{MODEL.fingerprint}", 20)
    with pytest.raises(ReportedFailure) as raised:
        await process.demand.loaded("p/m")
    assert raised.value.retry_after_s in (19, 20)
    raw.delete(f"failed:{MODEL.fingerprint}")  # it expired
    assert (await requested(store, process)).model == "p/m"


async def test_a_load_is_repeated_with_the_context_that_still_fits(store: Store, process: Process) -> None:
    """Two models that are loaded at once were both given the same free memory."""
    await alive(store)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        first = await under_way(store)
        error = LoadFailed("insufficient_memory", "llm", "p/m", "why", largest_context_length=512)
        await after(store, first, Event.FAIL, error=error.body())
        second = await under_way(store)
        assert (first.request.context_length, second.request.context_length) == (Settings().jit_context, 512)
        await after(store, second, Event.FAIL, error=error.body())
        with pytest.raises(ReportedFailure):
            await demanding
    assert await store.instances.live() == [], "twice at most"


async def test_a_load_of_a_client_that_fails_is_followed_by_another(store: Store, process: Process) -> None:
    await alive(store)
    asked = LoadRequest(model="p/m", context_length=99_999)
    theirs = Instance(id="load_1", model="p/m", key="p/m", source=MODEL, type="llm", worker="w", request=asked)
    record = await store.instances.create(theirs)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        while not process.follower.followed:  # noqa: ASYNC110
            await asyncio.sleep(0)
        await after(store, record, Event.FAIL, error=LoadFailed("engine_crashed", "llm", "p/m", "why").body())
        loaded = await succeed(store, await under_way(store))
        assert await demanding == loaded
    assert loaded.on_demand


async def test_an_interrupted_load_may_be_repeated(store: Store, process: Process) -> None:
    await alive(store)
    async with racing(process.demand.loaded("p/m")) as (demanding,):
        await after(store, await under_way(store), Event.STOP)
        with pytest.raises(LoadInterrupted, match="cancelled"):
            await demanding
    error = await failed(store, process, LoadFailed("worker_lost", "llm", "p/m", "why"))
    assert isinstance(error, LoadInterrupted)
    error = await failed(store, process, NoWorker("none"))
    assert (error.body().code, error.retry_after_s) == ("no_worker", NoWorker.retry_after_s)
    assert (await requested(store, process)).model == "p/m"


async def test_a_load_without_progress_is_not_waited_for(store: Store) -> None:
    await alive(store)
    process = Process(store, Settings(stall_limit_s=0.05))
    async with racing(process.follower.run(), process.demand.loaded("p/m")) as (_, demanding):
        record = await under_way(store)
        with pytest.raises(QueueTimeout):
            await demanding
    assert await store.instances.get(record.id) == record, "it goes on"


async def test_what_cannot_be_loaded_is_refused(store: Store, process: Process) -> None:
    broken = structs.replace(MODEL, key="p/b", base="p/b", problem=Problem(code="invalid_model_file", message="why"))
    await alive(store, MODEL, broken)
    with pytest.raises(LoadFailed, match="why"):
        await process.demand.loaded("p/b")
    with pytest.raises(ModelNotFound):
        await process.demand.loaded("p/nothing")
    await store.workers.release("w", "e")
    with pytest.raises(NoWorker):
        await process.demand.loaded("p/m")
    assert await store.instances.live() == []


async def test_a_load_under_way_is_joined_though_the_queue_is_full(store: Store, process: Process) -> None:
    await alive(store)
    full = Process(store, Settings(worker_queue_limit=1))
    async with racing(full.follower.run(), process.demand.loaded("p/m"), full.demand.loaded("p/m")) as (_, one, other):
        loaded = await succeed(store, await under_way(store))
        assert (await one, await other) == (loaded, loaded)
    assert loaded.state is State.LOADED
