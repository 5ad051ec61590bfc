"""Costs by the number of models, instances and followers: measured with `python -m bench growth`.  (By the number of
workers: `bench.scale`.)

Redis and the API process are real.  The worker is simulated by what it would write to Redis, and its instances are
records that the store creates as for loads.
"""

from __future__ import annotations

import asyncio
import http.client
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import uvloop
from msgspec import Struct, structs

from api.pool.roster import Roster
from bench.scale import GB, LEASE_S, N_READ, _get, api, model, redis
from bench.subjects import Failure
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.memory import CPU, Device, Holding
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.connection import connected
from shared.store.store import Store

MODELS = (10, 50, 200, 500, 1000, 2000)
INSTANCES = (1, 10, 100, 300, 1000)
FOLLOWERS = (1, 10, 30, 100, 300)
N_QUICK, N_EVENTS = 200, 30
WITHIN_S = 60.0
WORKER = "worker"
STATUS = "/api/v1/models/load/status"

LIST, POLL = "GET /api/v1/models", "GET a job"
PLACE, REFRESH, BEAT = "placing a load", "an API's reading of all workers", "a worker's beat"
DELIVERY = "from a change until the last follower has it"


class Point(Struct, frozen=True, kw_only=True):
    """Seconds of every run of each operation, at one size."""

    n: int
    seconds: dict[str, list[float]]


class Growth(Struct, frozen=True, kw_only=True):
    models: list[Point]
    instances: list[Point]
    followers: list[Point]


def measure(out: Path, say: Callable[[str], None]) -> Growth:
    """Measure all sizes.  Raises Failure and RedisUnavailable."""
    with tempfile.TemporaryDirectory(prefix="data-", dir=out) as data_dir, redis(Path(data_dir)) as (url, _):
        return uvloop.run(_measure(url, out, say))


async def _measure(url: str, out: Path, say: Callable[[str], None]) -> Growth:
    models, instances, followers = [], [], []
    for n in MODELS:
        say(f"{n} models")
        async with _pool(url, n, 1) as store:
            models.append(Point(n=n, seconds=await _costs(store, url, out)))
    for n in INSTANCES:
        say(f"{n} instances")
        async with _pool(url, 200, n) as store:
            instances.append(Point(n=n, seconds=await _costs(store, url, out)))
    for n in FOLLOWERS:
        say(f"{n} followers")
        async with _pool(url, 1, 0) as store:
            followers.append(Point(n=n, seconds={DELIVERY: await _delivery_s(store, url, out, n)}))
    return Growth(models=models, instances=instances, followers=followers)


@asynccontextmanager
async def _pool(url: str, n_models: int, n_instances: int) -> AsyncIterator[Store]:
    """Publish a worker with so many models and instances; empty Redis afterwards."""
    async with connected(url) as client:
        store = Store(client, LEASE_S)
        models = [model(f"bench/{i:04}", GB) for i in range(n_models)]
        held = [
            Holding(
                instance_id=f"{models[i % n_models].key}:{i}",
                key=models[i % n_models].key,
                devices={CPU: GB},
                used_at=0.0,
                is_evictable=False,
            )
            for i in range(n_instances)
        ]
        snapshot = WorkerSnapshot(
            name=WORKER,
            epoch="e" * 32,
            version="1",
            catalog="",
            residents=n_instances,
            devices=[
                Device(
                    id=CPU,
                    kind="cpu",
                    name="CPU",
                    total_bytes=4000 * GB,
                    free_bytes=2000 * GB,
                    available_bytes=2000 * GB,
                )
            ],
            held=held,
            lease_s=LEASE_S,
        )
        digest = await store.workers.publish_catalog(WORKER, models, snapshot.epoch)
        assert digest is not None
        await store.workers.renew(structs.replace(snapshot, catalog=digest))
        for one in held:
            await _loaded(store, snapshot.epoch, one)
        try:
            yield store
        finally:
            await client.flushdb()


async def _queued(store: Store, id_: str, key: str, instance_id: str) -> Instance:
    return await store.instances.create(
        Instance(
            id=id_,
            model=key,
            key=key,
            type="llm",
            worker=WORKER,
            request=LoadRequest(model=key),
            total_size_bytes=GB,
            instance_id=instance_id,
        )
    )


async def _loaded(store: Store, epoch: str, held: Holding) -> None:
    record = await _queued(store, f"load_{abs(hash(held.instance_id)):032x}", held.key, held.instance_id)
    record, _ = await store.instances.commit(record, record.after(Event.CLAIM, epoch=epoch, started_at=time.time()))
    config = LoadConfig(context_length=4096, eval_batch_size=512, flash_attention=True, offload_kv_cache_to_gpu=True)
    now = time.time()
    timing = dict.fromkeys(("queue", "spawn", "metadata", "weights", "context", "warmup"), 0.1)
    await store.instances.commit(
        record,
        record.after(
            Event.LOAD,
            progress=1.0,
            loaded_bytes=GB,
            devices=[CPU],
            loaded_at=now,
            used_at=now,
            timing=timing,
            load_time_seconds=0.4,
            load_config=config,
        ),
    )


async def _costs(store: Store, url: str, out: Path) -> dict[str, list[float]]:
    roster = Roster(store.workers, Settings())
    await roster.refresh()
    (snapshot,) = roster.alive.values()
    (first, *_) = await store.instances.live()
    request = LoadRequest(model="bench/0000")

    async def place() -> None:
        candidates, _ = roster.candidates(request)
        if roster.choose(candidates, request)[1] is None:
            raise Failure("a load was refused although there is room")

    async def beat() -> None:
        await store.workers.renew(snapshot)
        await store.instances.live_at(WORKER)

    async def refresh() -> None:
        await roster.refresh()

    parts: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
        PLACE: (N_QUICK, place),
        REFRESH: (N_QUICK // 4, refresh),
        BEAT: (N_READ, beat),
    }
    seconds: dict[str, list[float]] = {}
    for name, (n, do) in parts.items():
        await do()
        seconds[name] = []
        for _ in range(n):
            started = time.perf_counter()
            await do()
            seconds[name].append(time.perf_counter() - started)
    return seconds | await asyncio.to_thread(_replies, url, out, f"{STATUS}/{first.id}")


def _replies(url: str, out: Path, job: str) -> dict[str, list[float]]:
    with api(url, out) as connection:
        return {LIST: _timed(connection, "/api/v1/models", 8 * N_READ), POLL: _timed(connection, job, N_QUICK)}


def _timed(connection: http.client.HTTPConnection, path: str, n: int) -> list[float]:
    _get(connection, path)
    seconds = []
    for _ in range(n):
        started = time.perf_counter()
        _get(connection, path)
        seconds.append(time.perf_counter() - started)
    return seconds


async def _delivery_s(store: Store, url: str, out: Path, n: int) -> list[float]:
    """Follow one load with `n` event streams of an API process; return the seconds until all have each event."""
    record = await _queued(store, f"load_{n:032x}", "bench/0000", "bench/0000")
    request = f"GET {STATUS}/{record.id}/events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode()
    with api(url, out) as connection:
        streams = [await asyncio.open_connection("127.0.0.1", connection.port) for _ in range(n)]
        try:
            async with asyncio.timeout(WITHIN_S):
                for reader, writer in streams:
                    writer.write(request)
                    await reader.readuntil(b"event: model_load.start")
                record, _ = await store.instances.commit(record, record.after(Event.CLAIM, epoch="e" * 32))
                await _all_received(streams)
                seconds = []
                for i in range(N_EVENTS):
                    new = structs.replace(record, progress=(i + 1) / 100)
                    started = time.perf_counter()
                    record, _ = await store.instances.commit(record, new)
                    await _all_received(streams)
                    seconds.append(time.perf_counter() - started)
        finally:
            for _, writer in streams:
                writer.close()
    return seconds


async def _all_received(streams: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]]) -> None:
    await asyncio.gather(*(reader.readuntil(b"event: model_load.progress") for reader, _ in streams))
