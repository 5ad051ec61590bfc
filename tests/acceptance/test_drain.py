"""Told to stop, an API first says so and lets its clients finish; what is told twice ends at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from api.__main__ import GRACE_S
from cli.up import API_GRACE_S, REDIS_GRACE_S, UP_DRAIN_S, WORKER_GRACE_S
from shared.synthetic import models as synthetic
from tests.support.service import (
    JSON,
    LOAD,
    STATUS,
    TINY,
    Client,
    Process,
    RedisServer,
    Running,
    Service,
    below,
    error,
    is_alive,
    meanwhile,
    state,
    until,
    up,
    wait_gone,
)

DRAIN_S = 2.5
AT_ONCE_S = 1.5  # for a process that has nothing to wait for
UNDER_WAY = ("queued", "loading")


class Api(Running, Client):
    """`loadstone api` on a Redis of the operator's."""

    def __init__(self, directory: Path, redis: RedisServer, drain_s: float) -> None:
        Running.__init__(self, directory, "api", "--port", "0", "--redis-url", redis.url, "--drain-s", str(drain_s))
        try:
            Client.__init__(self, self.first_line().removeprefix("listening: "))
            until(lambda: self.send("GET", "/readyz").status == 200 and TINY in self.models(), "ready")
        except BaseException:
            self.kill()
            raise

    def told_to_stop(self) -> float:
        """When it was; it drains by now."""
        told = time.monotonic()
        self.popen.send_signal(signal.SIGTERM)
        until(lambda: self.send("GET", "/readyz").status == 503, "it is not ready any more", 1)
        return told

    def check_ended(self, told: float, after_s: float) -> None:
        """It ends as it should, and soon after that time."""
        assert self.popen.wait(after_s + API_GRACE_S) == 0
        assert after_s <= time.monotonic() - told < after_s + AT_ONCE_S
        assert "Traceback" not in self.stderr
        assert "[error" not in self.stderr


class Pool:
    """A Redis, a worker, and an API that stays."""

    def __init__(self, home: Path) -> None:
        self.redis = RedisServer(home / "redis")
        synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
        flags = ("--models-dir", str(home / "models"), "--data-dir", str(home / "data"), "--redis-url", self.redis.url)
        self.worker = Running(home / "worker", "worker", *flags, environ={"LOADSTONE_LEASE_S": "3"})
        self.other = Api(home / "other", self.redis, drain_s=0)

    def is_loading(self) -> bool:
        with self.redis.client() as redis:
            return state(redis, TINY) == "loading"


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    try:
        yield pool
        pool.worker.stop()
        pool.other.stop()
    finally:
        pool.other.close()
        pool.other.kill()
        pool.worker.kill()
        pool.redis.kill()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """With nothing loaded before and after."""
    yield the_pool
    other = the_pool.other
    until(lambda: not any(job["status"] in UNDER_WAY for job in other.send("GET", STATUS).json()["jobs"]), "quiet", 20)
    other.unload_all()


Start = Callable[..., Api]


@pytest.fixture
def start(tmp_path: Path, pool: Pool) -> Iterator[Start]:
    """Starts the API that the test stops."""
    started: list[Api] = []

    def begin(drain_s: float = DRAIN_S) -> Api:
        started.append(Api(tmp_path, pool.redis, drain_s))
        return started[-1]

    yield begin
    for service in started:
        service.close()
        service.kill()


def api_process(running: Running) -> Process:
    return until(lambda: next((p for p in running.tree() if p.words[2:4] == ("-m", "api")), None), "an API process")


# ---- an API of a pool


def test_it_is_not_ready_from_the_signal_on_and_answers_all_but_loads(start: Start) -> None:
    service = start()
    instance_id = service.loaded(TINY)["instance_id"]
    job_id = service.send("GET", STATUS).json()["jobs"][0]["job_id"]
    told = service.told_to_stop()
    ready = service.send("GET", "/readyz")
    assert (ready.status, ready.text) == (503, "shutting down\n")
    assert int(ready.headers["retry-after"]) > 0
    assert service.send("GET", "/healthz").status == 200
    assert service.job(job_id)["status"] == "loaded"
    assert service.job(job_id, wait_s=5)["status"] == "loaded"
    assert [event.name for event in service.events(job_id)][-1] == "model_load.end"
    assert TINY in service.models()
    refused = service.load(TINY)
    found = error(refused, 503, "service_unavailable", "queue_unavailable")
    assert found["message"].startswith("The server is shutting down")
    assert int(refused.headers["retry-after"]) > 0
    error(
        service.send("POST", LOAD, content=b"{}", headers=JSON),
        400,
        "invalid_request",
        "missing_required_parameter",
        "model",
    )
    assert service.unload(instance_id).status == 200
    assert time.monotonic() - told < DRAIN_S, "this machine is too slow for this test"
    service.check_ended(told, DRAIN_S)


def test_a_connection_that_is_kept_ends_with_its_next_reply(start: Start) -> None:
    service = start()
    with httpx.Client(base_url=service.url, trust_env=False) as kept:
        assert "connection" not in kept.get("/healthz").headers
        told = service.told_to_stop()
        for path in ("/healthz", "/readyz", STATUS, "/nowhere"):
            assert kept.get(path).headers["connection"] == "close"
    service.check_ended(told, DRAIN_S)


def test_a_load_that_ends_within_the_drain_is_replied_to(start: Start, pool: Pool) -> None:
    service = start()
    with pool.worker.frozen() as runner, meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "it is loading")
        told = service.told_to_stop()
        assert not reply.done()
        os.kill(runner.pid, signal.SIGCONT)
        answer = reply.result(DRAIN_S)
    assert (answer.status, answer.json()["instance_id"]) == (200, TINY)
    assert answer.headers["connection"] == "close"
    service.check_ended(told, DRAIN_S)


def test_one_that_does_not_is_unavailable_at_the_end_and_goes_on_without_it(start: Start, pool: Pool) -> None:
    service = start()
    with pool.worker.frozen(), meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "it is loading")
        told = service.told_to_stop()
        found = error(reply.result(DRAIN_S + AT_ONCE_S), 503, "service_unavailable", "queue_unavailable")
        assert time.monotonic() - told >= DRAIN_S
        assert found["message"] == "The server is shutting down. Work that it has accepted continues."
        service.check_ended(told, DRAIN_S)
    until(lambda: TINY in pool.other.instances(), "it is loaded all the same")


def test_a_stream_ends_with_the_drain_and_is_taken_up_elsewhere(start: Start, pool: Pool) -> None:
    service = start()
    with pool.worker.frozen():
        job_id = service.accepted(TINY)["job_id"]
        with meanwhile(lambda: list(service.events(job_id))) as seen:
            until(pool.is_loading, "it is loading")
            told = service.told_to_stop()
            events = seen.result(DRAIN_S + AT_ONCE_S)
            assert time.monotonic() - told >= DRAIN_S
        assert {event.name for event in events} <= {"model_load.start", "model_load.progress"}
        service.check_ended(told, DRAIN_S)
    assert [event.name for event in pool.other.events(job_id, events[-1].id)][-1] == "model_load.end"


def test_a_process_that_is_told_twice_ends_at_once(start: Start, pool: Pool) -> None:
    service = start(drain_s=60)
    process = api_process(service)
    with pool.worker.frozen(), meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "it is loading")
        os.kill(process.pid, signal.SIGTERM)
        until(lambda: service.send("GET", "/readyz").status == 503, "it drains", 1)
        os.kill(process.pid, signal.SIGTERM)
        wait_gone([process], AT_ONCE_S)
        error(reply.result(1), 503, "service_unavailable", "queue_unavailable")
    until(lambda: service.send("GET", "/readyz").status == 200, "another one is ready")
    assert "Traceback" not in service.stderr


def test_a_program_that_is_told_twice_ends_at_once(start: Start) -> None:
    service = start(drain_s=60)
    tree = service.tree()
    told = service.told_to_stop()
    service.popen.send_signal(signal.SIGTERM)
    assert service.popen.wait(AT_ONCE_S) == 0
    assert time.monotonic() - told < 60
    wait_gone(tree, 1.0)


# ---- `loadstone up`


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path) as running:
        yield running


def test_up_does_not_drain_while_nobody_waits(service: Service) -> None:
    process = api_process(service)
    with httpx.Client(base_url=service.url, trust_env=False) as idle:
        assert idle.get("/healthz").status_code == 200
        service.popen.send_signal(signal.SIGTERM)
        wait_gone([process], UP_DRAIN_S)


def test_up_gives_a_load_a_last_moment(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as reply:
        until(lambda: service.state(TINY) == "loading", "it is loading")
        service.popen.send_signal(signal.SIGTERM)
        time.sleep(UP_DRAIN_S / 3)
        assert not reply.done()
        os.kill(runner.pid, signal.SIGCONT)
        assert reply.result(UP_DRAIN_S).status == 200
    assert service.popen.wait(10) == 0


def test_the_times_add_up() -> None:
    assert GRACE_S < API_GRACE_S
    assert UP_DRAIN_S + API_GRACE_S + WORKER_GRACE_S + REDIS_GRACE_S <= 10


# ---- a worker


def test_a_worker_process_that_is_told_twice_ends_at_once(pool: Pool) -> None:
    pool.other.loaded(TINY)
    worker = pool.worker.worker()
    with pool.worker.frozen(loaded=1), meanwhile(pool.other.load, TINY) as reply:
        held = below(worker.pid)
        until(lambda: len(pool.other.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]) == 1, "loading")
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.3)  # two signals at once are one
        assert is_alive(worker)
        os.kill(worker.pid, signal.SIGTERM)
        wait_gone([worker], 0.5)
        reply.cancel()
    wait_gone(held, 3)
    until(lambda: pool.other.send("GET", "/readyz").status == 200, "another worker is ready", 10)
