"""Random loads, unloads and fills on a pool of real processes, compared after each step with the state of its host.

Two workers with four GPUs each, two APIs, Redis and the engine are real.  The GPUs are those of
`tests.support.fakehosts`, where every process can see which process holds how much.  The oracle of
tests/unit/test_placement.py tries every placement in that state, and so predicts the outcome of a load.

A single load goes to a worker with room, onto the fewest GPUs that have it, evicts as few and as long unused instances
as possible, and is refused only if no eviction would help; an estimate made before it agrees.  Of concurrent loads it
is asserted that none gets memory that does not exist, evicts an instance without a TTL, or is refused although there is
room.  In every case the workers publish exactly the state of the host.

One seed determines all random choices, but not the duration of the steps.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from msgspec import UNSET, convert, msgpack
from redis import Redis

from shared.instance import Instance
from shared.memory.estimate import Requirements, requirements_of
from shared.memory.placement import Constraints, available
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.memory import Device, Holding
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.synthetic.models import tiny_llama
from tests.support.fakehosts import FOREIGN_PID, FakeHost
from tests.support.service import Client, RedisServer, Reply, Running, error, until
from tests.unit.test_placement import fewest, has_room, victims_of, without

MIB = 1 << 20
MODEL = "p/m"
SIZES_MIB = {"w0": (5, 8, 12, 20), "w1": (6, 7, 10, 16)}
RESERVE = MIB // 2
CONTEXTS = (512, 1024, 2048, 3000, 4500, 6000, 9000, 13_000, 16_000, 19_000, 24_000, 60_000)  # 1 KiB a token
TTL_S = 100_000.0  # never expires during a run
LAGS_S = (0.0, 0.0, 0.3)  # of a driver, after the end of a process
ESTIMATE_ERROR = 0.03  # relative error that an estimate may have
DRY_RUN_ERROR_BYTES = 2 * 32 * 64 * 4  # error of a dry run on several GPUs: see `worker.engine.llama.DryRuns`
ANYWHERE = Constraints()


class Asked(NamedTuple):
    """A load request to one of the APIs."""

    api: int
    context_length: int
    ttl: bool

    @property
    def fields(self) -> dict[str, Any]:
        fields: dict[str, Any] = {"context_length": self.context_length, "eval_batch_size": 32}
        return fields | ({"ttl_seconds": TTL_S} if self.ttl else {})


class Truth(NamedTuple):
    """The state of the pool at rest: memory as the host has it, and instances as their records have them."""

    workers: dict[str, WorkerSnapshot]
    loaded: dict[str, Instance]

    def held(self) -> set[str]:
        return {*self.loaded}

    def to_stay(self) -> set[str]:
        return {name for name, record in self.loaded.items() if record.request.ttl_seconds is UNSET}


class Pool:
    def __init__(self, home: Path) -> None:
        tiny_llama(home / "models" / MODEL / "m.gguf", metadata={"llama.context_length": 1 << 17})
        sizes = [mib * MIB for of_worker in SIZES_MIB.values() for mib in of_worker]
        self.host = FakeHost.made(home / "host", *sizes)
        self.gpus = [device.uuid for device in self.host.devices()]
        self.total = {device.uuid: device.total_bytes for device in self.host.devices()}
        self.owned = {name: self.gpus[4 * i : 4 * i + 4] for i, name in enumerate(SIZES_MIB)}
        self.home = home
        self.running: list[Running] = []
        self.redis_server = RedisServer(home / "redis")
        self.redis = Redis(unix_socket_path=str(self.redis_server.socket))
        self.apis: list[Client] = []
        self.requirements: dict[int, Requirements] = {}

    def start(self) -> None:
        redis = ("--redis-url", self.redis_server.url)
        for name, gpus in self.owned.items():
            place = self.home / name
            flags = ("--models-dir", str(self.home / "models"), "--data-dir", str(place / "data"))
            variables = {
                "LOADSTONE_DEVICES": ",".join(gpus),
                "LOADSTONE_DEVICE_RESERVE": str(RESERVE),
                "LOADSTONE_LOCK_DIR": str(self.home / "locks"),
            }
            words = ("worker", *flags, *redis, "--worker-name", name)
            self.running.append(Running(place, *words, environ=self.host.environ() | variables))
        for n in range(2):
            self.running.append(Running(self.home / f"api{n}", "api", "--port", "0", *redis, "--drain-s", "0"))
        for api in self.running[-2:]:
            client = Client(api.first_line().removeprefix("listening: "))
            self.apis.append(client)
            until(lambda client=client: len(self._workers(client)) == 2, "two workers", 60.0)  # type: ignore[misc]

    @staticmethod
    def _workers(client: Client) -> list[Any]:
        reply = client.send("GET", "/api/v1/workers")
        workers: list[Any] = reply.json()["workers"] if reply.status == 200 else []
        return workers

    def stop(self) -> None:
        """Stop the APIs, then the workers; each must exit with status 0."""
        for one in self.running[::-1]:
            one.stop()

    def kill(self) -> None:
        for client in self.apis:
            client.close()
        for one in self.running:
            one.kill()
        self.redis.close()
        self.redis_server.kill()

    def requirements_of(self, asked: Asked) -> Requirements:
        """Return the memory of a load by the formula."""
        if asked.context_length not in self.requirements:
            catalog: Any = self.redis.get(f"catalog:{next(iter(self.owned))}")
            (model,) = msgpack.decode(catalog, type=list[Model])
            request = convert({"model": MODEL, **asked.fields}, LoadRequest)
            self.requirements[asked.context_length] = requirements_of(model, plan(request, model, Settings()))
        return self.requirements[asked.context_length]

    # ---- the true state

    def used(self) -> dict[str, int]:
        return {uuid: self.host.used_bytes(uuid) for uuid in self.gpus}

    def free(self, uuid: str) -> int:
        """Return the bytes of a GPU that loads may get; negative if the reserve is used."""
        return self.total[uuid] - RESERVE - self.host.used_bytes(uuid)

    def ours(self, gpus: Collection[str]) -> list[dict[str, int]]:
        """Return the bytes that each runner holds of these GPUs."""
        by_process: dict[int, dict[str, int]] = {}
        for uuid in gpus:
            for holder in self.host.holders(uuid):
                if holder.pid != FOREIGN_PID:
                    by_process.setdefault(holder.pid, {})[uuid] = holder.n_bytes
        return [*by_process.values()]

    def published(self, worker: str) -> WorkerSnapshot:
        snapshot: Any = self.redis.get(f"worker:{worker}")
        assert snapshot, f"{worker} has published nothing"
        return msgpack.decode(snapshot, type=WorkerSnapshot)

    def records(self) -> dict[str, Instance]:
        names: Any = self.redis.hgetall("names")
        docs: Any = {name.decode(): self.redis.hget(f"inst:{id_.decode()}", "doc") for name, id_ in names.items()}
        return {name: msgpack.decode(doc, type=Instance) for name, doc in docs.items()}

    def truth(self) -> Truth:
        """Wait until the workers publish exactly the state of the host, which they read at each beat; return it."""
        seen: dict[str, Any] = {}

        def agree() -> Truth | None:
            loaded, workers = self.records(), {}
            listed: set[str] = set()
            for name, gpus in self.owned.items():
                snapshot = self.published(name)
                free, ours = {uuid: self.free(uuid) for uuid in gpus}, _sorted(self.ours(gpus))
                published_free, held = available(snapshot.devices), _sorted([one.devices for one in snapshot.held])
                seen[name] = {"truth": (free, ours), "published": (published_free, held), "records": sorted(loaded)}
                if (published_free, held) != (free, ours):
                    return None
                assert all(one.leaked_bytes == 0 for one in snapshot.devices), snapshot.devices
                listed |= {one.instance_id for one in snapshot.held}
                devices = [
                    Device(
                        id=uuid, kind="gpu", name="", total_bytes=self.total[uuid], free_bytes=0, available_bytes=room
                    )
                    for uuid, room in free.items()
                ]
                workers[name] = WorkerSnapshot(
                    name=name,
                    epoch="",
                    version="",
                    catalog="",
                    residents=0,
                    devices=devices,
                    held=[self._holding(one, loaded) for one in snapshot.held if one.instance_id in loaded],
                )
            return Truth(workers, loaded) if listed == {*loaded} else None

        try:
            return until(agree, "the workers publish the state of the host")
        except AssertionError as e:
            raise AssertionError(f"{e}: {seen}") from e

    @staticmethod
    def _holding(holding: Holding, loaded: dict[str, Instance]) -> Holding:
        """Return a published holding, completed from the record of its instance."""
        record = loaded[holding.instance_id]
        return Holding(
            instance_id=holding.instance_id,
            key=MODEL,
            devices=holding.devices,
            used_at=record.used_at or 0.0,
            is_evictable=record.request.ttl_seconds is not UNSET,
        )


def _sorted(held: list[dict[str, int]]) -> list[list[tuple[str, int]]]:
    return sorted(sorted(one.items()) for one in held)


# ---- sequences


class Sequence:
    """One sequence: its steps, and the checks after each of them."""

    def __init__(self, pool: Pool, seed: int, seen: Counter[str]) -> None:
        self.pool = pool
        self.random = random.Random(seed)
        self.seen = seen
        self.steps: list[str] = []

    def play(self) -> None:
        lag_s = self.random.choice(LAGS_S)
        self.pool.host.driver(lag_s=lag_s)
        self.steps.append(f"the driver's lag is {lag_s:g} s")
        for _ in range(self.random.randint(4, 8)):
            what = self.random.choices(
                [self._load, self._at_once, self._unload, self._fill, self._others], [9, 3, 2, 2, 2]
            )[0]
            what()
            used = self.pool.used()
            assert all(used[uuid] <= self.pool.total[uuid] for uuid in used), used
        self._end()

    def _ask(self, contexts: tuple[int, ...] = CONTEXTS) -> Asked:
        return Asked(self.random.randrange(2), self.random.choice(contexts), self.random.random() < 0.7)

    # ---- steps

    def _load(self) -> None:
        self._one(self._ask())

    def _fill(self) -> None:
        """Repeat a load until it is refused or evicts an instance."""
        asked = self._ask(CONTEXTS[3:])
        while (record := self._one(asked)) is not None and not record.evicted:
            pass
        self.seen["filled"] += 1

    def _others(self) -> None:
        """Let other programs take a part of some GPUs, or free it."""
        for uuid in self.random.sample(self.pool.gpus, self.random.randint(1, 4)):
            self.pool.host.release(uuid)
            n_bytes = int(self.pool.host.free_bytes(uuid) * self.random.choice((0, 0.3, 0.6, 0.95, 1)))
            self.pool.host.take(uuid, n_bytes)
            self.steps.append(f"others have {n_bytes:,} bytes of {uuid}")
        self.seen["taken by others"] += 1

    def _unload(self) -> None:
        before = self.pool.truth()
        if not before.loaded:
            return
        name = self.random.choice(sorted(before.loaded))
        self.steps.append(f"unload {name}")
        (held,) = (one for worker in before.workers.values() for one in worker.held if one.instance_id == name)
        used = self.pool.used()
        reply = self.random.choice(self.pool.apis).unload(name)
        assert reply.status == 200, reply.text
        back = {uuid: n - self.pool.host.used_bytes(uuid) for uuid, n in used.items()}
        assert {uuid: n for uuid, n in back.items() if n} == held.devices, (
            "every byte is free when an unload is answered"
        )
        assert self.pool.truth().held() == before.held() - {name}
        self.seen["unloaded"] += 1

    def _end(self) -> None:
        """Unload everything, and check that no memory is held."""
        self.steps.append("unload everything")
        for uuid in self.pool.gpus:
            self.pool.host.release(uuid)
        with ThreadPoolExecutor(4) as threads:
            asked = [threads.submit(self.pool.apis[0].unload, name) for name in self.pool.records()]
            replies = [one.result() for one in asked]
        assert all(reply.status == 200 for reply in replies), replies
        assert not any(self.pool.used().values()), self.pool.used()
        assert self.pool.records() == {}

    # ---- one load and its expected outcome

    def _one(self, asked: Asked) -> Instance | None:
        """Load a model and check the outcome; return the record if it was loaded.

        Without an estimate first, the API knows the workers only as of its last beat: then the load may go to a worker
        that is not the best one, and moves to another if that has no room.
        """
        before = self.pool.truth()
        client, requirements = self.pool.apis[asked.api], self.pool.requirements_of(asked)
        victims_by_worker = {
            name: victims_of(requirements, ANYWHERE, worker) for name, worker in before.workers.items()
        }
        self.steps.append(f"{asked}, victims by the oracle: {_names(victims_by_worker)}")
        estimate = self._estimate(client, asked) if self.random.random() < 0.5 else None
        reply = client.load(MODEL, **asked.fields)
        after = self.pool.truth()
        if reply.status != 200:
            _check_refused(reply)
            assert after.held() == before.held(), "a refused load evicts no instance"
            assert all(victims is None for victims in victims_by_worker.values()), "there was room"
            assert estimate is None or not estimate["fits"], estimate
            self.seen["refused"] += 1
            self.steps.append("  refused")
            return None
        name = reply.json()["instance_id"]
        record = after.loaded[name]
        self.steps.append(f"  {name} on {record.devices} of {record.worker}, evicted for it: {record.evicted}")
        there, victims = before.workers[record.worker], victims_by_worker[record.worker]
        assert victims is not None, "there was no room"
        assert sorted(record.evicted) == sorted(one.instance_id for one in victims), (
            "the victims of the oracle, and no others"
        )
        assert after.held() == (before.held() - {*record.evicted}) | {name}
        self._check_room(record.devices)
        least = fewest(requirements, ANYWHERE, 0, there, without(there, victims))
        assert len(record.devices) == least, "the fewest GPUs"
        if estimate is not None:
            assert len(victims) == min(len(one) for one in victims_by_worker.values() if one is not None)
            free = [fewest(requirements, ANYWHERE, 0, one, without(one, [])) for one in before.workers.values()]
            assert victims or least == min(n for n in free if n is not None), "another worker had room on fewer GPUs"
            (held,) = (one for one in after.workers[record.worker].held if one.instance_id == name)
            self._check_estimate(estimate, record, held)
        self.seen["loaded"] += 1
        self.seen["evictions"] += len(victims)
        self.seen["several GPUs"] += len(record.devices) > 1
        self.seen["evictions for several GPUs"] += len(record.devices) > 1 and len(victims)
        self.seen["moved to another worker"] += len(record.refused)
        return record

    @staticmethod
    def _estimate(client: Client, asked: Asked) -> Any:
        """Request an estimate, which makes the API read the published state of the workers."""
        reply = client.post("/api/v1/models/estimate", {"model": MODEL, **asked.fields})
        assert reply.status == 200, reply.text
        assert reply.json()["exact"], "the formula is exact, or the engine did a dry run"
        return reply.json()

    @staticmethod
    def _check_estimate(estimate: Any, record: Instance, held: Holding) -> None:
        assert (estimate["fits"], sorted(estimate["evicts"])) == (True, sorted(record.evicted)), estimate
        assert [device["id"] for device in estimate["devices"]] == record.devices, estimate
        for device in estimate["devices"]:
            assert held.devices[device["id"]] == pytest.approx(
                device["total_bytes"], ESTIMATE_ERROR, DRY_RUN_ERROR_BYTES
            ), (estimate, held)

    def _at_once(self) -> None:
        """Send some loads to both APIs at once, perhaps together with an unload."""
        before = self.pool.truth()
        asked = [self._ask(CONTEXTS[:8]) for _ in range(self.random.randint(2, 4))]
        going = [self.random.choice(sorted(before.loaded))] if before.loaded and self.random.random() < 0.3 else []
        self.steps.append(f"at once: {asked}, and an unload of {going}")
        with ThreadPoolExecutor(8) as threads:
            loads = [threads.submit(self.pool.apis[one.api].load, MODEL, **one.fields) for one in asked]
            unloads = [threads.submit(self.pool.apis[0].unload, name) for name in going]
            replies = [one.result() for one in loads]
            unloaded = [one.result() for one in unloads]
        assert all(reply.status in (200, 404) for reply in unloaded), unloaded  # 404: it was evicted
        after = self.pool.truth()
        loaded = {reply.json()["instance_id"] for reply in replies if reply.status == 200}
        evicted = [name for reply in replies for name in reply.headers.get("loadstone-evicted", "").split(", ") if name]
        self.steps.append(f"  loaded {loaded}, evicted for them: {evicted}")
        may_leave = before.held() - before.to_stay() | {*going} | loaded
        assert {*evicted} <= may_leave, "an instance without a TTL is not evicted"
        assert before.held() - {*evicted, *going} <= after.held() <= before.held() | loaded
        for name in loaded & after.held():
            self._check_room(after.loaded[name].devices, len(asked))
        for one, reply in zip(asked, replies, strict=True):
            if reply.status == 200:
                continue
            _check_refused(reply)
            self.seen["refused at once"] += 1
            if not evicted and not going:  # otherwise there may be more room now than before
                for worker in after.workers.values():
                    now = has_room(self.pool.requirements_of(one), ANYWHERE, worker, without(worker, []))
                    assert not now, f"{worker.name} has room for {one}"
        self.seen["loaded at once"] += len(loaded)
        self.seen["evictions at once"] += len(evicted)

    def _check_room(self, devices: Collection[str], n_loads: int = 1) -> None:
        """Check that the reserve was not given to loads, except for the error of their dry runs."""
        free = {uuid: self.pool.free(uuid) for uuid in devices}
        assert min(free.values()) >= -DRY_RUN_ERROR_BYTES * n_loads, f"more memory was given than there is: {free}"


def _check_refused(reply: Reply) -> None:
    """Check that the worker refused the load, before the engine could run out of memory."""
    failure = error(reply, 500, "model_load_failed", "insufficient_memory")
    assert "there is not enough memory" in failure["message"], failure


def _names(victims_by_worker: dict[str, list[Holding] | None]) -> dict[str, list[str] | None]:
    return {
        worker: None if victims is None else [one.instance_id for one in victims]
        for worker, victims in victims_by_worker.items()
    }


@contextmanager
def started(home: Path) -> Iterator[Pool]:
    pool = Pool(home)
    try:
        pool.start()
        yield pool
    finally:
        pool.kill()


def run(home: Path, n: int, seed: int) -> Counter[str]:
    """Play `n` sequences on one pool; return how often each outcome occurred.  Sequence i has the seed `seed + i`."""
    seen: Counter[str] = Counter()
    with started(home) as pool:
        for i in range(n):
            sequence = Sequence(pool, seed + i, seen)
            try:
                sequence.play()
            except BaseException:
                print(f"POOL_SEED={seed + i} POOL_SEQUENCES=1", *sequence.steps, sep="\n")
                raise
        pool.stop()
    stderr = "".join(one.stderr for one in pool.running)
    assert "Traceback" not in stderr
    print(f"{n} sequences from POOL_SEED={seed}: {dict(seen)}")
    return seen
