"""Stopping: an API process drains, a worker hands its loads back; a second signal ends either at once."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from api.__main__ import GRACE_S
from cli.up import API_GRACE_S, REDIS_GRACE_S, UP_DRAIN_S, WORKER_GRACE_S
from shared.synthetic import models as synthetic
from tests.support import service as support
from tests.support.chat import DONE, ENDLESS, answered, ask, begun, rest, streaming
from tests.support.service import (
    JSON,
    LOAD,
    PATIENCE_S,
    STATUS,
    TINY,
    Client,
    Process,
    RedisServer,
    Reply,
    Running,
    Service,
    below,
    error,
    meanwhile,
    openai_error,
    state,
    until,
    up,
    wait_gone,
)

DRAIN_S = 2.5  # of a drain that is waited for
LONG_CONTEXT = 32_768  # for an answer that lasts as long as a test needs it
LONG_S = 600.0  # of a drain that must not be waited for: no test lasts as long
UNDER_WAY = ("queued", "loading")


class Api(Running, Client):
    """`loadstone api` on an external Redis."""

    def __init__(self, directory: Path, redis: RedisServer, drain_s: float) -> None:
        Running.__init__(self, directory, "api", "--port", "0", "--redis-url", redis.url, "--drain-s", str(drain_s))
        try:
            Client.__init__(self, self.first_line().removeprefix("listening: "))
            until(lambda: self.send("GET", "/readyz").status == 200 and TINY in self.models(), "ready")
        except BaseException:
            self.kill()
            raise

    def start_drain(self) -> float:
        """Send SIGTERM and wait until the API drains.  Returns the time just before the signal."""
        signalled_at = time.monotonic()
        self.popen.send_signal(signal.SIGTERM)
        until(lambda: self.send("GET", "/readyz").status == 503, "not ready any more")
        return signalled_at

    def check_ended(self) -> None:
        """Check that it ends by itself, and without an error."""
        assert self.popen.wait(PATIENCE_S) == 0
        assert "Traceback" not in self.stderr
        assert "[error" not in self.stderr

    def check_still_drains(self) -> None:
        """Check that it has not ended yet; then end it with a second signal."""
        assert self.popen.poll() is None
        assert self.send("GET", "/readyz").status == 503
        self.popen.send_signal(signal.SIGTERM)
        self.check_ended()


class Pool:
    """A Redis, a worker, and a second API that no test stops."""

    def __init__(self, home: Path) -> None:
        self.redis = RedisServer(home / "redis")
        synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata={"llama.context_length": LONG_CONTEXT})
        flags = ("--models-dir", str(home / "models"), "--data-dir", str(home / "data"), "--redis-url", self.redis.url)
        self.worker = Running(
            home / "worker", "worker", *flags, "--drain-s", str(LONG_S), environ={"LOADSTONE_LEASE_S": "3"}
        )
        self.other = Api(home / "other", self.redis, drain_s=0)

    def is_loading(self) -> bool:
        with self.redis.client() as redis:
            return state(redis, TINY) == "loading"

    @contextmanager
    def held(self, service: Api, loaded: int = 0) -> Iterator[Future[Reply]]:
        """Keep a request of an API in progress: a load that goes on after the block.  `loaded`: other instances."""
        with self.worker.frozen(loaded), meanwhile(service.load, TINY) as reply:
            loading = {"status": "loading"}
            until(lambda: len(self.other.send("GET", STATUS, params=loading).json()["jobs"]) == 1, "loading")
            yield reply


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
    """The module's pool, with nothing loaded before and after."""
    yield the_pool
    other = the_pool.other
    until(lambda: not any(job["status"] in UNDER_WAY for job in other.send("GET", STATUS).json()["jobs"]), "no load")
    other.unload_all()


Start = Callable[..., Api]


@pytest.fixture
def start(tmp_path: Path, pool: Pool) -> Iterator[Start]:
    """Starts the API that the test stops."""
    started: list[Api] = []

    def begin(drain_s: float) -> Api:
        started.append(Api(tmp_path, pool.redis, drain_s))
        return started[-1]

    yield begin
    for service in started:
        service.close()
        service.kill()


def api_process(running: Running) -> Process:
    return until(lambda: next((p for p in running.tree() if p.words[2:4] == ("-m", "api")), None), "an API process")


# ---- an API of a pool


def test_draining_api_answers_everything_but_loads(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    instance_id = service.loaded(TINY)["instance_id"]
    job_id = service.send("GET", STATUS).json()["jobs"][0]["job_id"]
    with pool.held(service, loaded=1):
        service.start_drain()
        check_answers(service, job_id)
        assert service.unload(instance_id).status == 200
        service.check_still_drains()


def check_answers(service: Api, job_id: str) -> None:
    """Check what a draining API answers; the job is that of a loaded instance."""
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


def test_draining_api_closes_kept_connections(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    with (
        pool.held(service),
        httpx.Client(base_url=service.url, trust_env=False, timeout=PATIENCE_S) as kept,
    ):
        assert "connection" not in kept.get("/healthz").headers
        service.start_drain()
        for path in ("/healthz", "/readyz", STATUS, "/nowhere"):
            assert kept.get(path).headers["connection"] == "close"
        service.check_still_drains()


def test_idle_api_ends_at_once(start: Start) -> None:
    service = start(LONG_S)
    service.popen.send_signal(signal.SIGTERM)
    service.check_ended()


def test_answer_that_ends_within_the_drain_is_whole(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    pool.other.loaded(TINY, context_length=LONG_CONTEXT)
    with streaming(service, model=TINY, max_tokens=3000, **ENDLESS) as received:
        begun(received)
        service.start_drain()
        openai_error(ask(service, model=TINY), 503, "unavailable_error", "queue_unavailable")
        assert [*received][-1] == DONE
    service.check_ended()


def test_answer_that_outlasts_the_drain_ends_with_an_error(start: Start, pool: Pool) -> None:
    service = start(0.0)
    pool.other.loaded(TINY, context_length=LONG_CONTEXT)
    with streaming(service, model=TINY, **ENDLESS) as received:
        begun(received)
        service.popen.send_signal(signal.SIGTERM)
        found = rest(received)
    assert (found["type"], found["message"]) == ("unavailable_error", "The server is shutting down.")
    service.check_ended()


def test_load_that_ends_within_the_drain_gets_its_reply(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    with pool.worker.frozen() as runner, meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "loading")
        service.start_drain()
        assert not reply.done()
        os.kill(runner.pid, signal.SIGCONT)
        answer = reply.result(PATIENCE_S)
    assert (answer.status, answer.json()["instance_id"]) == (200, TINY)
    assert answer.headers["connection"] == "close"
    service.check_ended()


def test_load_that_outlasts_the_drain_goes_on_without_it(start: Start, pool: Pool) -> None:
    """The runner is frozen up to the end of the API, so that the drain is all that can end the reply."""
    service = start(DRAIN_S)
    with pool.worker.frozen(), meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "loading")
        signalled_at = service.start_drain()
        found = error(reply.result(PATIENCE_S), 503, "service_unavailable", "queue_unavailable")
        assert time.monotonic() - signalled_at >= DRAIN_S
        assert found["message"] == "The server is shutting down. Loads that it has accepted continue."
        service.check_ended()
        assert pool.is_loading()
    until(lambda: TINY in pool.other.instances(), "loaded all the same")


def test_event_stream_ends_with_the_drain_and_resumes_elsewhere(start: Start, pool: Pool) -> None:
    service = start(DRAIN_S)
    with pool.worker.frozen():
        job_id = service.accepted(TINY)["job_id"]
        with meanwhile(lambda: list(service.events(job_id))) as seen:
            until(pool.is_loading, "loading")
            signalled_at = service.start_drain()
            events = seen.result(PATIENCE_S)
            assert time.monotonic() - signalled_at >= DRAIN_S
        assert {event.name for event in events} <= {"model_load.start", "model_load.progress"}
        service.check_ended()
        assert pool.is_loading()
    assert [event.name for event in pool.other.events(job_id, events[-1].id)][-1] == "model_load.end"


def test_second_signal_ends_an_api_process_at_once(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    process = api_process(service)
    with pool.worker.frozen(), meanwhile(service.load, TINY) as reply:
        until(pool.is_loading, "loading")
        os.kill(process.pid, signal.SIGTERM)
        until(lambda: service.send("GET", "/readyz").status == 503, "draining")
        os.kill(process.pid, signal.SIGTERM)
        wait_gone([process])
        error(reply.result(PATIENCE_S), 503, "service_unavailable", "queue_unavailable")
        assert pool.is_loading()
    until(lambda: service.send("GET", "/readyz").status == 200, "its successor is ready")
    assert "Traceback" not in service.stderr


def test_second_signal_ends_loadstone_api_at_once(start: Start, pool: Pool) -> None:
    service = start(LONG_S)
    tree = service.tree()
    with pool.held(service):
        service.start_drain()
        service.popen.send_signal(signal.SIGTERM)
        assert service.popen.wait(PATIENCE_S) == 0
        wait_gone(tree)


# ---- `loadstone up`


@pytest.fixture
def service(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Service]:
    """`loadstone up`, whose APIs may drain for a long time, so that a test cannot be too slow for it."""
    program = tmp_path / "loadstone"
    patched = f"import cli.up\ncli.up.UP_DRAIN_S = {LONG_S}\nfrom cli.main import main\nmain()\n"
    program.write_text(f"#!{support.LOADSTONE.with_name('python')}\n{patched}")
    program.chmod(0o755)
    monkeypatch.setattr(support, "LOADSTONE", program)
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path) as running:
        yield running


def test_up_does_not_drain_without_requests(service: Service) -> None:
    process = api_process(service)
    with httpx.Client(base_url=service.url, trust_env=False, timeout=PATIENCE_S) as idle:
        assert idle.get("/healthz").status_code == 200
        service.popen.send_signal(signal.SIGTERM)
        wait_gone([process])


def test_up_drains_while_a_load_is_under_way(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as reply:
        until(lambda: service.state(TINY) == "loading", "loading")
        service.popen.send_signal(signal.SIGTERM)
        until(lambda: service.send("GET", "/readyz").status == 503, "draining")
        assert not reply.done()
        os.kill(runner.pid, signal.SIGCONT)
        assert reply.result(PATIENCE_S).status == 200
    assert service.popen.wait(PATIENCE_S) == 0


def test_stop_of_up_takes_at_most_ten_seconds() -> None:
    """Its graces add up to what container runtimes wait before they kill."""
    assert GRACE_S < API_GRACE_S
    assert UP_DRAIN_S + API_GRACE_S + WORKER_GRACE_S + REDIS_GRACE_S <= 10


# ---- a worker


def test_answer_of_a_worker_that_stops_is_whole(pool: Pool) -> None:
    """The worker begins no other answer meanwhile, and its successor restores the instance."""
    other = pool.other
    other.loaded(TINY)
    worker = pool.worker.worker()
    with streaming(other, model=TINY, max_tokens=1000, **ENDLESS) as received:
        begun(received)
        os.kill(worker.pid, signal.SIGTERM)
        until(lambda: TINY not in other.instances(), "the worker drains")
        assert [*received][-1] == DONE
    wait_gone([worker])
    until(lambda: TINY in other.instances(), "its successor has restored it")
    assert answered(other, model=TINY, max_tokens=1)["choices"]


def test_second_signal_ends_a_worker_process_at_once(pool: Pool) -> None:
    """Exit status 1 is that of the second signal: a worker that has drained exits with 0."""
    pool.other.loaded(TINY)
    worker = pool.worker.worker()
    logged = len(pool.worker.stderr)
    with pool.worker.frozen(loaded=1), meanwhile(pool.other.load, TINY) as reply:
        held = below(worker.pid)
        until(lambda: len(pool.other.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]) == 1, "loading")
        os.kill(worker.pid, signal.SIGTERM)
        os.kill(worker.pid, signal.SIGINT)  # another number: two signals of one number can be delivered as one
        wait_gone([worker])
        reply.cancel()
    wait_gone(held)
    until(lambda: "child_exited" in pool.worker.stderr[logged:], "the supervisor logs the exit")
    assert "exited with status 1" in pool.worker.stderr[logged:]
    until(lambda: pool.other.send("GET", "/readyz").status == 200, "another worker is ready")
