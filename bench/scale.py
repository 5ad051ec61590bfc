"""The cost of operations on a whole large pool: measured with `python -m bench scale`.

Workers are simulated by what they would write, in a real Redis, without processes.  Each has 8 GPUs and 10 loaded
instances, whose records the store creates as for loads.  The pool grows from one size to the next.
"""

from __future__ import annotations

import asyncio
import http.client
import os
import random
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvloop
from msgspec import Struct, structs

from api.channel.channels import Channels
from api.pool.loaded import Loaded
from api.pool.roster import Roster
from api.pool.sweep import Sweep
from api.pool.view import View
from bench.processes import cpu_s
from bench.subjects import Failure
from cli import devredis
from shared.channel.address import Address, boot_id
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.memory import CPU, Device, Holding
from shared.schema.model import Dimensions, FileStat, Model, Weights
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import PREFIX, Settings, variable
from shared.store.connection import connected
from shared.store.store import Store
from shared.telemetry.tally import Tally

WORKERS = (10, 30, 100, 300, 1000)
GPUS, INSTANCES = 8, 10  # of each worker
LEASE_S = 3600.0  # not renewed during a run
GB = 10**9
GPU_BYTES = 80 * GB
FREE = (8 * GB, 30 * GB)  # free bytes of a GPU; a single GPU has HOLE
HOLE = 78 * GB
REPLY_S, READY_S, STOP_S = 60.0, 20.0, 10.0

# Loads by their situation in this pool: the bytes of the model.
SITUATIONS = {
    "one GPU has room": 6 * GB,
    "only one GPU of all has room": 70 * GB,
    "several GPUs have room together": 110 * GB,
    "room once others are unloaded": 250 * GB,
    "no room": 2000 * GB,
}
BLOCKS = 80
BEAT, REFRESH, SWEEP = "a worker's beat", "an API's reading of all workers", "an API's sweep"
ROUTE, FIRST_ROUTE = "of a model", "of a model, the first after a beat"
FOLLOW = "an API's view of the loaded instances"
PATHS = ("/api/v1/workers", "/api/v1/models", "/metrics")
N_PLACED, N_BEATS, N_READ, N_ROUTED = 100, 200, 7, 2000


class Size(Struct, frozen=True, kw_only=True):
    """Seconds of every run of each operation on a pool of so many workers.

    `placing_cpu_s` is the CPU time of placing, without the time of other processes on its core; `redis_s` is the
    average CPU time of Redis for each operation.
    """

    workers: int
    placing_s: dict[str, list[float]]
    placing_cpu_s: dict[str, list[float]]
    beating_s: dict[str, list[float]]
    routing_s: dict[str, list[float]]
    redis_s: dict[str, float]
    reading_s: dict[str, list[float]]
    reply_bytes: dict[str, int]


def measure(out: Path, say: Callable[[str], None]) -> list[Size]:
    """Measure all sizes.  Raises Failure and RedisUnavailable."""
    with tempfile.TemporaryDirectory(prefix="data-", dir=out) as data_dir, redis(Path(data_dir)) as (url, pid):
        return uvloop.run(_measure(url, pid, out, say))


@contextmanager
def redis(data_dir: Path) -> Iterator[tuple[str, int]]:
    """Run an embedded Redis; yield its URL and its pid."""
    with (
        devredis.prepared(data_dir) as server,
        subprocess.Popen(server.argv, pass_fds=server.pass_fds, stderr=subprocess.DEVNULL) as process,
    ):
        try:
            until = time.monotonic() + READY_S
            while reason := asyncio.run(devredis.missing(server.socket)):
                if time.monotonic() > until:
                    raise Failure(f"Redis is not ready: {reason}")
                time.sleep(0.01)
            yield server.url, process.pid
        finally:
            process.terminate()


async def _measure(url: str, redis_pid: int, out: Path, say: Callable[[str], None]) -> list[Size]:
    sizes = []
    async with connected(url) as client:
        pool = Pool(Store(client, LEASE_S))
        for n in WORKERS:
            say(f"pool of {n} workers")
            await pool.grow(n)
            placing_s, placing_cpu_s = await pool.placing()
            beating_s, redis_s = await pool.beating(lambda: cpu_s(redis_pid))
            routing_s = await pool.routing()
            reading_s, reply_bytes = await asyncio.to_thread(_reading, url, out)
            sizes.append(
                Size(
                    workers=n,
                    placing_s=placing_s,
                    placing_cpu_s=placing_cpu_s,
                    beating_s=beating_s,
                    routing_s=routing_s,
                    redis_s=redis_s,
                    reading_s=reading_s,
                    reply_bytes=reply_bytes,
                )
            )
    return sizes


# ---- the pool


def model(key: str, n_bytes: int) -> Model:
    """Return a model whose layers have equal sizes."""
    block = n_bytes // (BLOCKS + 1)
    return Model(
        key=key,
        base=key,
        variant="",
        shards=[f"{key}.gguf"],
        size_bytes=n_bytes,
        publisher="bench",
        display_name=key,
        architecture="llama",
        quantization="Q8_0",
        bits_per_weight=8.5,
        params_string="70B",
        max_context_length=131_072,
        files=[FileStat(n_bytes, 1, 1)],
        dimensions=Dimensions(
            block_count=BLOCKS,
            embedding_length=8192,
            head_count=64,
            head_count_kv=8,
            key_length=128,
            value_length=128,
            feed_forward_length=28672,
            vocabulary=128_256,
        ),
        weights=Weights(
            input_bytes=block // 2, repeating_bytes=block * BLOCKS, output_bytes=block // 2, has_output=True
        ),
    )


MODELS = [model(f"bench/{i}", n_bytes) for i, n_bytes in enumerate(SITUATIONS.values())]
KEYS = dict(zip(SITUATIONS, (one.key for one in MODELS), strict=True))


class Pool:
    """The simulated workers in Redis, and the measured operations of an API process and a worker."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.roster = Roster(store.workers, Settings())
        self.view = View(self.roster, store.instances)
        self.chance = random.Random(1)  # fixed seed: the same pool in every run
        self.snapshots: list[WorkerSnapshot] = []

    async def grow(self, n: int) -> None:
        for i in range(len(self.snapshots), n):
            snapshot = self._snapshot(i)
            digest = await self.store.workers.publish_catalog(snapshot.name, MODELS, snapshot.epoch)
            assert digest is not None
            snapshot = structs.replace(snapshot, catalog=digest)
            await self.store.workers.renew(snapshot)
            await asyncio.gather(*(self._load(snapshot, held) for held in snapshot.held))
            self.snapshots.append(snapshot)

    def _snapshot(self, i: int) -> WorkerSnapshot:
        """Return a snapshot with mostly used GPUs; the last GPU of the first worker is nearly free."""
        free = [self.chance.randrange(*FREE) for _ in range(GPUS)]
        if i == 0:
            free[-1] = HOLE
        ids = [f"GPU-{i:08x}-0000-0000-0000-{gpu:012x}" for gpu in range(GPUS)]
        shares = [GPU_BYTES - n_bytes for n_bytes in free]
        held = [
            Holding(
                instance_id=f"{(one := MODELS[j % 2]).key}:{i * INSTANCES + j + 1}",
                key=one.key,
                devices={ids[j % GPUS]: shares[j % GPUS] // (2 if j % GPUS < INSTANCES - GPUS else 1)},
                used_at=1.7e9 + self.chance.random() * 1e6,
                is_evictable=j % 4 != 3,
            )
            for j in range(INSTANCES)
        ]
        devices = [
            Device(
                id=id_,
                kind="gpu",
                name="NVIDIA H100 80GB HBM3",
                total_bytes=GPU_BYTES,
                free_bytes=n_bytes,
                reserved_bytes=GPU_BYTES - n_bytes,
                available_bytes=n_bytes,
            )
            for id_, n_bytes in zip(ids, free, strict=True)
        ]
        host = Device(
            id=CPU,
            kind="cpu",
            name="Intel(R) Xeon(R) Platinum 8481C",
            total_bytes=2000 * GB,
            free_bytes=1800 * GB,
            available_bytes=1800 * GB,
        )
        return WorkerSnapshot(
            name=f"worker-{i:04}",
            epoch=f"{i:032x}",
            version="1",
            catalog="",
            residents=INSTANCES,
            devices=[*devices, host],
            held=held,
            lease_s=LEASE_S,
            channels=Address(path="", boot_id=boot_id(), secret=b""),
        )

    async def _load(self, worker: WorkerSnapshot, held: Holding) -> None:
        """Create the record of an instance, with the states that a load writes."""
        now = time.time()
        record = await self.store.instances.create(
            Instance(
                id=f"load_{self.chance.getrandbits(128):032x}",
                model=held.key,
                key=held.key,
                type="llm",
                worker=worker.name,
                request=LoadRequest(model=held.key, context_length=8192),
                total_size_bytes=sum(held.devices.values()),
                instance_id=held.instance_id,
            )
        )
        record, _ = await self.store.instances.commit(
            record, record.after(Event.CLAIM, epoch=worker.epoch, started_at=now)
        )
        await self.store.instances.commit(
            record,
            record.after(
                Event.LOAD,
                progress=1.0,
                loaded_bytes=record.total_size_bytes,
                bytes_per_second=2e9,
                devices=[*held.devices],
                loaded_at=now,
                used_at=now,
                timing=dict.fromkeys(("queue", "spawn", "metadata", "weights", "context", "warmup"), 0.123456),
                load_time_seconds=1.234567,
                load_config=LoadConfig(
                    context_length=8192,
                    eval_batch_size=512,
                    parallel=1,
                    flash_attention=True,
                    offload_kv_cache_to_gpu=True,
                ),
            ),
        )

    # ---- the measured operations

    async def placing(self) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
        """Place loads as an API process does.  Raises Failure if a placement does not match its situation."""
        await self.roster.refresh()
        seconds: dict[str, list[float]] = {name: [] for name in SITUATIONS}
        cpu: dict[str, list[float]] = {name: [] for name in SITUATIONS}
        for name in [*SITUATIONS] * N_PLACED:
            request = LoadRequest(model=KEYS[name])
            cpu_started, started = time.process_time(), time.perf_counter()
            candidates, _ = self.roster.candidates(request)
            _, placement = self.roster.choose(candidates, request)
            seconds[name].append(time.perf_counter() - started)
            cpu[name].append(time.process_time() - cpu_started)
            met = (
                "no room"
                if placement is None
                else "room once others are unloaded"
                if placement.evicts
                else "several GPUs have room together"
                if len(placement.gpus) > 1
                else name
            )
            if met != name:
                raise Failure(
                    f"with {len(self.snapshots)} workers the situation of a load was '{met}' instead of '{name}'"
                )
        return seconds, cpu

    async def beating(self, redis_cpu_s: Callable[[], float]) -> tuple[dict[str, list[float]], dict[str, float]]:
        """Measure what each worker and each API process does once a second."""
        sweep = Sweep(
            self.roster,
            self.view,
            self.store.instances,
            self.store.queue,
            self.store.listen,
            lease_s=0.0,  # do not wait for a lease to expire
            load_attempts=Settings().load_attempts,
        )

        async def beat() -> None:
            worker = self.chance.choice(self.snapshots)
            await self.store.workers.renew(worker)
            if len(await self.store.instances.live_at(worker.name)) != INSTANCES:
                raise Failure("a worker has read the wrong number of instances")

        async def refresh() -> None:
            await self.roster.refresh()

        async def follow() -> None:
            await self.view.follow(await self.store.instances.heads())

        parts: dict[str, tuple[int, Callable[[], Awaitable[None]]]] = {
            BEAT: (N_BEATS, beat),
            REFRESH: (N_READ, refresh),
            SWEEP: (N_READ, sweep.beat),
            FOLLOW: (N_READ, follow),
        }
        seconds: dict[str, list[float]] = {}
        redis_s: dict[str, float] = {}
        for name, (n, do) in parts.items():
            await do()
            before, seconds[name] = redis_cpu_s(), []
            for _ in range(n):
                started = time.perf_counter()
                await do()
                seconds[name].append(time.perf_counter() - started)
            redis_s[name] = (redis_cpu_s() - before) / n
        return seconds, redis_s

    async def routing(self) -> dict[str, list[float]]:
        """Find the instance for requests to the models with the most copies, as an API process does."""
        loaded = Loaded(self.roster, self.view)
        channels = Channels(self.roster.last_seen, Tally())
        seconds: dict[str, list[float]] = {ROUTE: [], FIRST_ROUTE: []}
        for i in range(N_ROUTED):
            if is_first := i % (N_ROUTED // N_READ) == 0:
                await self.roster.refresh()
            name, beginning = MODELS[i % 2].key, str(self.chance.random()).encode()
            started = time.perf_counter()
            await loaded.instance(name, channels.busy, beginning=beginning)
            seconds[FIRST_ROUTE if is_first else ROUTE].append(time.perf_counter() - started)
        return seconds


# ---- an API process


def _reading(url: str, out: Path) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Return seconds and sizes of replies about the whole pool, from an API process that refreshes and sweeps
    meanwhile."""
    with api(url, out) as connection:
        seconds: dict[str, list[float]] = {path: [] for path in PATHS}
        sizes = {path: len(_get(connection, path)) for path in PATHS}
        for path in [*PATHS] * N_READ:
            started = time.perf_counter()
            _get(connection, path)
            seconds[path].append(time.perf_counter() - started)
    return seconds, sizes


@contextmanager
def api(url: str, out: Path) -> Iterator[http.client.HTTPConnection]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    environ |= {variable("redis_url"): url, variable("lease_s"): str(LEASE_S)}
    with (out / "scale.log").open("w") as log, socket.create_server(("127.0.0.1", 0)) as listening:
        argv = [sys.executable, "-m", "api", "--fd", str(listening.fileno())]
        with subprocess.Popen(argv, pass_fds=[listening.fileno()], stderr=log, env=environ) as process:
            connection = http.client.HTTPConnection("127.0.0.1", listening.getsockname()[1], timeout=REPLY_S)
            try:
                _get(connection, "/readyz")
                yield connection
            finally:
                connection.close()
                process.terminate()
                try:
                    process.wait(STOP_S)
                except subprocess.TimeoutExpired:
                    process.kill()


def _get(connection: http.client.HTTPConnection, path: str) -> bytes:
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise Failure(f"{path}: no reply: {e!r}") from e
    if response.status != 200:
        raise Failure(f"{path}: reply with status {response.status}: {body[:200].decode('utf-8', 'replace')}")
    return body
