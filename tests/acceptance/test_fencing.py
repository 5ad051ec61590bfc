"""Workers that die or pause during a load: it moves to another worker under the same ids and never runs twice."""

from __future__ import annotations

import asyncio
import os
import signal
import time
import uuid
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.instance import Instance
from shared.lifecycle import State
from shared.schema.snapshot import WorkerSnapshot
from shared.store import keys
from shared.store.connection import connected
from shared.store.queue import as_arq
from shared.synthetic import models as synthetic
from tests.support.service import (
    STATUS,
    TINY,
    Client,
    Process,
    RedisServer,
    Running,
    all_stopped,
    check_keys,
    is_alive,
    meanwhile,
    state,
    until,
    wait_gone,
)

LEASE_S = 3
GONE_S = 60.0  # ends a hang, as START_S does
START_S = 60.0
ALONE, OTHER = "acme/alone", "acme/other"  # only worker "a" has the first one, only "b" the second
MODELS = {"a": (TINY, ALONE), "b": (TINY, OTHER)}


class Pool(Client):
    """A Redis, an API, and the workers "a" and "b", each with its own data directory."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.redis = RedisServer(home / "redis")
        self.environ = {"LOADSTONE_REDIS_URL": self.redis.url, "LOADSTONE_LEASE_S": str(LEASE_S)}
        self.workers: dict[str, Running] = {}
        for name, models in MODELS.items():
            for model in models:
                synthetic.tiny_llama(self.file(name, model))
        for name in MODELS:
            self.workers[name] = self.launch(name, name, name)
        self.start_api()
        for name in MODELS:
            self.wait_ready(name)

    def file(self, worker: str, model: str) -> Path:
        return self.home / f"models-{worker}/{model}/model-f16.gguf"

    def start_api(self, **variables: str) -> None:
        environ = {**self.environ, "LOADSTONE_DRAIN_S": "0", **variables}
        self.api = Running(self.home / "api", "api", "--port", "0", environ=environ)
        Client.__init__(self, self.api.first_line().removeprefix("listening: "))

    def restart_api(self, **variables: str) -> None:
        self.close()
        self.api.stop()
        self.start_api(**variables)

    def launch(self, name: str, home: str, models: str, **variables: str) -> Running:
        """Start a worker without waiting; `home` names its directory, `models` the worker whose models it gets."""
        directories = ("--models-dir", str(self.home / f"models-{models}"), "--data-dir", str(self.data(home)))
        words = ("worker", "--worker-name", name, *directories)
        return Running(self.home / home, *words, environ={**self.environ, **variables})

    def start(self, name: str, **variables: str) -> None:
        """Start a worker, and wait until it is ready."""
        self.workers[name] = self.launch(name, name, name, **variables)
        self.wait_ready(name)

    def wait_ready(self, name: str) -> None:
        worker = self.workers[name]
        until(
            lambda: "action=ready" in worker.stderr or worker.popen.poll() is not None, "the worker is ready", START_S
        )
        assert worker.popen.poll() is None, worker.stderr
        until(lambda: name in self.held(), "the API lists the worker")

    def data(self, home: str) -> Path:
        return self.home / f"data-{home}"

    def state(self, instance_id: str) -> str | None:
        with self.redis.client() as redis:
            return state(redis, instance_id)

    def held(self) -> dict[str, dict[str, Any]]:
        """Return the instances of each live worker by id, including those still loading."""
        reply = self.send("GET", "/api/v1/workers")
        assert reply.status == 200, reply.text
        return {w["name"]: {i["id"]: i for i in w["instances"]} for w in reply.json()["workers"]}

    def counts_match(self) -> bool:
        """Return whether the published instance counts of the workers match the API's list."""
        with self.redis.client() as redis:
            snapshots: list[Any] = [redis.get(f"worker:{name}") for name in self.workers]
        residents = [msgspec.msgpack.decode(one, type=WorkerSnapshot).residents for one in snapshots if one]
        return residents == [len(instances) for _, instances in sorted(self.held().items())]

    def settle(self) -> None:
        """Wait until the API knows what each worker holds: a load goes to the least loaded worker, "a" on a tie."""
        until(self.counts_match, "the published counts match the instances")
        self.models()  # makes the API read the snapshots of the workers

    def loading(self, model: str, on: str = "a") -> Any:
        """Start a load on a worker whose next runner is frozen; return its job."""
        self.settle()
        job = self.accepted(model)
        until(lambda: self.job(job["job_id"])["status"] == "loading", "the job is loading")
        assert (job["worker"], job["attempt"]) == (on, 1)
        return job

    def ended(self, job_id: str, within_s: float) -> Any:
        """Wait for the end of a load by polling; return its job."""

        def is_over() -> Any:
            job = self.job(job_id)
            return job if job["status"] not in ("queued", "loading") else None

        return until(is_over, "the load is over", within_s)

    def clear(self) -> None:
        """Restart the processes that a test ended, and unload everything."""
        if self.api.popen.poll() is not None:
            self.close()
            self.start_api()
        for name in MODELS:
            if self.workers[name].popen.poll() is not None:
                with self.redis.client() as redis:
                    redis.delete(f"wanted:{name}")
                (self.data(name) / f"wanted-{name}.json").unlink(missing_ok=True)
                self.start(name)
            self.wait_ready(name)
        for instances in self.held().values():
            for instance_id in instances:
                self.unload(instance_id)
        until(lambda: not any(self.held().values()), "no worker holds an instance")

    def end(self) -> None:
        for worker in self.workers.values():
            worker.stop()
            assert worker.stdout == ""
        self.api.stop()

    def kill(self) -> None:
        self.close()
        for running in (self.api, *self.workers.values()):
            running.kill()
        self.redis.kill()


def jobs(client: Client) -> dict[str, Any]:
    """Return all jobs by id, oldest first."""
    reply = client.send("GET", STATUS, params={"limit": 1000})
    assert reply.status == 200, reply.text
    return {job["job_id"]: job for job in reversed(reply.json()["jobs"])}


def kill(running: Running) -> list[Process]:
    """Kill a worker and its supervisor, as a host failure does; return the processes that were below them."""
    left = running.tree()
    os.kill(running.worker().pid, signal.SIGKILL)
    running.popen.kill()
    running.popen.wait()
    return left


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    try:
        yield pool
        with pool.redis.client() as redis:
            check_keys(redis)
        pool.end()
    finally:
        pool.kill()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """Return the pool with every process running; restart and unload everything after the test."""
    the_pool.settle()
    yield the_pool
    the_pool.clear()


# ---- a worker that dies during a load


def test_a_load_of_a_killed_worker_moves_as_the_same_job(pool: Pool) -> None:
    a, b = pool.workers["a"], pool.workers["b"]
    before = set(jobs(pool))
    with a.frozen():
        job_id = pool.loading(TINY)["job_id"]
        with meanwhile(lambda: [*pool.events(job_id)]) as seen:
            left = kill(a)
            events = seen.result(LEASE_S + GONE_S)
    assert (events[-1].name, events[-1].data["job_id"], events[-1].data["model_instance_id"]) == (
        "model_load.end",
        job_id,
        TINY,
    )
    done = pool.job(job_id)
    assert (done["status"], done["worker"], done["attempt"], done["instance_id"]) == ("loaded", "b", 2, TINY)
    assert pool.instances()[TINY]["worker"] == "b"
    b.warm_runner(1)  # one runner holds the model, and one waits
    wait_gone(left)
    assert set(jobs(pool)) - before == {job_id}


def test_a_load_without_attempts_left_is_worker_lost(pool: Pool) -> None:
    pool.restart_api(LOADSTONE_LOAD_ATTEMPTS="1")
    a = pool.workers["a"]
    with a.frozen():
        job_id = pool.loading(TINY)["job_id"]
        left = kill(a)
        done = pool.ended(job_id, 2 * LEASE_S + GONE_S)  # a new API trusts each lease for a while
    assert (done["status"], done["worker"], done["attempt"]) == ("failed", "a", 1)
    assert (done["error"]["type"], done["error"]["code"]) == ("model_load_failed", "worker_lost")
    assert done["error"]["message"].startswith(f"Failed to load LLM '{TINY}': Error: worker '")
    assert pool.instances() == {}
    wait_gone(left)
    pool.restart_api()


def test_a_load_whose_engine_dies_is_not_requeued(pool: Pool) -> None:
    """It would most likely die again."""
    before = set(jobs(pool))
    with pool.workers["a"].frozen() as runner:
        job_id = pool.loading(TINY)["job_id"]
        os.kill(runner.pid, signal.SIGKILL)
        done = pool.ended(job_id, 60)
    assert (done["status"], done["worker"], done["attempt"]) == ("failed", "a", 1)
    assert done["error"]["code"] == "engine_crashed"
    assert pool.loaded(TINY)["instance_id"] == TINY
    assert pool.job(job_id) == done
    assert len(set(jobs(pool)) - before) == 2


# ---- a worker that is paused


def test_a_worker_paused_past_its_lease_restores_only_its_own(pool: Pool) -> None:
    a, b = pool.workers["a"], pool.workers["b"]
    pool.loaded(OTHER)
    pool.loaded(ALONE)
    with a.frozen(loaded=1) as frozen:
        job_id = pool.loading(TINY)["job_id"]
        (held,) = (runner for runner in a.runners() if runner.pid != frozen.pid)
        worker = a.worker()
        paused = (a.popen.pid, worker.pid)  # the supervisor too, which would replace a worker that does not beat
        for pid in paused:
            os.kill(pid, signal.SIGSTOP)
        try:
            until(lambda: all(map(all_stopped, paused)), "every thread of both stopped")
            done = pool.ended(job_id, LEASE_S + GONE_S)
            assert (done["status"], done["worker"], done["attempt"]) == ("loaded", "b", 2)
            until(
                lambda: set(pool.instances()) == {OTHER, TINY},
                "the instance of the paused worker counts as lost",
            )
            log = until(lambda: engine_log(pool, job_id), "the engine's log is there")
            old = set(jobs(pool))
        finally:
            for pid in reversed(paused):
                os.kill(pid, signal.SIGCONT)
        wait_gone([frozen, held])
    until(lambda: set(pool.instances()) == {OTHER, ALONE, TINY}, "the worker has restored its instance", GONE_S)
    assert a.worker() == worker, "the worker is the same process"
    (restored,) = (job for id_, job in jobs(pool).items() if id_ not in old)
    assert (restored["instance_id"], restored["worker"], restored["status"]) == (ALONE, "a", "loaded")
    assert {id_: one["worker"] for id_, one in pool.instances().items()} == {OTHER: "b", ALONE: "a", TINY: "b"}
    a.warm_runner(1)
    b.warm_runner(2)
    assert pool.job(job_id) == done
    assert engine_log(pool, job_id) == log, "the log is not that of the first attempt"


def engine_log(pool: Pool, job_id: str) -> str:
    """Return the engine log of a load if it is complete, else an empty string."""
    text = pool.send("GET", f"{STATUS}/{job_id}/logs").text
    return text if "n_ctx" in text else ""


# ---- entries of a queue


def deliver(pool: Pool, worker: str, *ids: str) -> None:
    """Put entries into a worker's queue; return once the worker has taken them."""

    async def put() -> None:
        async with connected(pool.redis.url) as redis:
            for id_ in ids:
                made = await as_arq(redis).enqueue_job(
                    "load", id_, _job_id=uuid.uuid4().hex, _queue_name=keys.queue(worker)
                )
                assert made is not None

    asyncio.run(put())
    with pool.redis.client() as redis:
        until(lambda: redis.zcard(keys.queue(worker)) == 0, "the entries are taken")


def n_starts(pool: Pool, job_id: str) -> int:
    """Return how often a load was started."""
    with pool.redis.client() as redis:
        entries: Any = redis.xrange(f"inst:{job_id}:log")
    states = [msgspec.msgpack.decode(fields[b"doc"], type=Instance).state for _, fields in entries]
    return sum(now is State.LOADING and before is not now for before, now in pairwise(states))


def test_a_load_delivered_twice_is_loaded_once(pool: Pool) -> None:
    a = pool.workers["a"]
    pool.loaded(ALONE)  # a running runner: without one a worker gives up its lease
    with a.frozen(loaded=1):
        ids = [pool.loading(ALONE)["job_id"], pool.accepted(ALONE)["job_id"]]
        deliver(pool, "a", *ids)
    done = [pool.ended(id_, 60) for id_ in ids]
    assert [(job["status"], job["attempt"]) for job in done] == [("loaded", 1)] * 2
    deliver(pool, "a", *ids)
    pool.loaded(ALONE)  # loads run one after the other: the entries have been processed by now
    a.warm_runner(4)
    assert set(pool.instances()) == {ALONE, *(f"{ALONE}:{n}" for n in (2, 3, 4))}
    assert [pool.job(id_) for id_ in ids] == done
    assert [n_starts(pool, id_) for id_ in ids] == [1, 1]


def test_entries_of_finished_or_foreign_loads_are_ignored(pool: Pool) -> None:
    a, b = pool.workers["a"], pool.workers["b"]
    over = pool.accepted(ALONE)["job_id"]
    ended = pool.ended(over, 60)
    assert pool.unload(ALONE).status == 200
    pool.loaded(OTHER)
    with b.frozen(loaded=1):
        ids = [pool.loading(OTHER, on="b")["job_id"], pool.accepted(OTHER)["job_id"]]
        before = pool.job(ids[1])
        assert before["status"] == "queued"
        deliver(pool, "a", "load_unknown", over, *ids)
        pool.loaded(ALONE)  # loads run one after the other: the entries have been processed by now
        assert pool.job(ids[1]) == before
        assert pool.job(over) == {**ended, "instance_state": "unloaded"}
    done = [pool.ended(id_, 60) for id_ in ids]
    assert [(job["status"], job["worker"], job["attempt"]) for job in done] == [("loaded", "b", 1)] * 2
    assert [n_starts(pool, id_) for id_ in (over, *ids)] == [1, 1, 1]
    a.warm_runner(1)
    b.warm_runner(3)


# ---- two workers with one name


def refused(second: Running) -> str:
    """Return the stderr of a worker that must exit with status 2."""
    try:
        assert second.popen.wait(START_S) == 2
    finally:
        second.kill()
    assert second.stdout == ""
    assert "Traceback" not in second.stderr
    return second.stderr


def test_a_second_worker_on_a_data_directory_exits_at_once(pool: Pool) -> None:
    first = pool.workers["a"].worker()
    (pool.home / "beside").mkdir()
    pool.data("beside").symlink_to(pool.data("a"))
    said = refused(pool.launch("a", "beside", models="b"))
    assert "loadstone: a worker named 'a' already runs on the data directory" in said
    assert is_alive(first)
    assert pool.loaded(ALONE)["instance_id"] == ALONE


def test_a_second_worker_of_a_name_exits_after_one_lease(pool: Pool) -> None:
    first = pool.workers["a"].worker()
    pool.loaded(ALONE)
    began = time.monotonic()
    said = refused(pool.launch("a", "second", models="b"))
    assert time.monotonic() - began >= LEASE_S, "the first worker might have been dead"
    assert "loadstone: another live worker is named 'a'; give this worker a different name.\n" in said
    assert is_alive(first)
    assert set(pool.instances()) == {ALONE}
    assert pool.loaded(ALONE)["instance_id"] == f"{ALONE}:2"
    pool.restart_api()  # without the memory of the old one
    assert set(pool.models()) == {TINY, ALONE, OTHER}
    assert pool.loaded(ALONE)["instance_id"] == f"{ALONE}:3"
