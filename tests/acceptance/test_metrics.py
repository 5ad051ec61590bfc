"""`GET /metrics` of a pool: every API returns the same counts, and they survive restarts."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from shared import __version__
from shared.synthetic import models as synthetic
from tests.support.service import (
    STATUS,
    TINY,
    Client,
    RedisServer,
    Reply,
    Running,
    error,
    is_alive,
    meanwhile,
    state,
    until,
)

TOKEN = "a-token-of-the-tests"
UNBOUNDED = re.compile(r"acme|tiny|[0-9a-f]{32}")  # the model's key, and ids of loads, processes and epochs
OF_LOADED = (
    "loadstone_kv_cells_used{",
    "loadstone_requests_running{",
    "loadstone_requests_waiting{",
)  # gauges of the instances that are loaded now
VARYING = (  # these differ at each scrape
    "loadstone_worker_lease_age_seconds",
    "loadstone_device_free_bytes",
    "loadstone_device_available_bytes",
)
PAGE = "/openapi.json"  # requested only by these tests
PHASES = ("queue", "spawn", "metadata", "weights", "context", "warmup")

Labels = frozenset[tuple[str, str]]


class Scrape:
    """The samples of one reply; checks that Prometheus can use them."""

    def __init__(self, reply: Reply) -> None:
        assert reply.status == 200, reply.text
        assert reply.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
        kept = "".join(line for line in reply.text.splitlines(keepends=True) if not line.startswith(OF_LOADED))
        assert not UNBOUNDED.search(kept), "a label with unbounded values"
        self.samples: dict[tuple[str, Labels], float] = {}
        self.kinds: dict[str, str] = {}
        for family in text_string_to_metric_families(reply.text):
            assert family.name.startswith("loadstone_")
            assert family.documentation
            self.kinds[family.name] = family.type
            for sample in family.samples:
                key = (sample.name, frozenset(sample.labels.items()))
                assert key not in self.samples, f"{key} occurs twice"
                self.samples[key] = sample.value
            if family.type == "histogram":
                self._check_histogram(family.name)

    def _check_histogram(self, name: str) -> None:
        series: dict[Labels, dict[float, float]] = {}
        for (sample, labels), value in self.samples.items():
            if sample == f"{name}_bucket":
                (bound,) = (float(text) for label, text in labels if label == "le")
                its = frozenset(pair for pair in labels if pair[0] != "le")
                series.setdefault(its, {})[bound] = value
        for its, buckets in series.items():
            assert list(buckets.values()) == sorted(buckets.values())
            assert buckets[float("inf")] == self.samples[f"{name}_count", its]

    def __call__(self, name: str, **labels: str) -> float:
        return self.samples[f"loadstone_{name}", frozenset(labels.items())]

    def get(self, name: str, **labels: str) -> float:
        return self.samples.get((f"loadstone_{name}", frozenset(labels.items())), 0.0)

    def counters(self) -> dict[tuple[str, Labels], float]:
        """Return the samples that never decrease."""
        ends = ("_total", "_bucket", "_count", "_sum")
        return {key: value for key, value in self.samples.items() if key[0].endswith(ends)}

    def of_loads(self) -> dict[tuple[str, Labels], float]:
        """Return the samples that are equal in two scrapes while no load changes state."""
        return {key: n for key, n in self.samples.items() if not key[0].startswith(("loadstone_http", *VARYING))}

    def since(self, before: Scrape, name: str, **labels: str) -> float:
        return self(name, **labels) - before.get(name, **labels)


class Api(Running, Client):
    def __init__(self, home: Path, redis: RedisServer, token: str = "") -> None:
        variables = {"LOADSTONE_API_TOKENS": token} if token else {}
        words = ("api", "--port", "0", "--redis-url", redis.url, "--drain-s", "0")
        Running.__init__(self, home, *words, environ=variables)
        try:
            Client.__init__(self, self.first_line().removeprefix("listening: "), token)
            until(lambda: self.send("GET", "/readyz").status == 200 and TINY in self.models(), "the API is ready")
        except BaseException:
            self.kill()
            raise

    def scrape(self) -> Scrape:
        return Scrape(self.send("GET", "/metrics"))


class Pool:
    """A Redis, a worker, and two APIs, one of which requires a token."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.file = synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
        self.redis = RedisServer(home / "redis")
        flags = ("--models-dir", str(home / "models"), "--data-dir", str(home / "data"), "--redis-url", self.redis.url)
        variables = {"LOADSTONE_LEASE_S": "3", "LOADSTONE_WORKER_NAME": "w"}
        self.worker = Running(home / "worker", "worker", *flags, environ=variables)
        self.one = Api(home / "one", self.redis)
        self.other = Api(home / "other", self.redis, TOKEN)

    def is_loading(self, instance_id: str = TINY) -> bool:
        with self.redis.client() as redis:
            return state(redis, instance_id) == "loading"

    def stop(self) -> None:
        for part in (self.other, self.one, self.worker):
            part.stop()

    def kill(self) -> None:
        for api in (self.one, self.other):
            api.close()
            api.kill()
        self.worker.kill()
        self.redis.kill()


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("metrics"))
    try:
        yield pool
        pool.stop()
    finally:
        pool.kill()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """Return the pool; unload everything after the test."""
    yield the_pool
    the_pool.one.unload_all()


def newest(api: Client) -> Any:
    return api.send("GET", STATUS, params={"limit": 1}).json()["jobs"][0]


def ended(now: Scrape, before: Scrape) -> dict[tuple[str, str], float]:
    """Return the number of loads that ended between two scrapes, by outcome and reason."""
    counts = {}
    for (name, labels), value in now.samples.items():
        more = value - before.samples.get((name, labels), 0.0)
        if name == "loadstone_loads_total" and more:
            its = dict(labels)
            counts[its["outcome"], its["reason"]] = more
    return counts


def test_all_series_exist_before_the_first_load(pool: Pool) -> None:
    scrape = pool.one.scrape()
    assert scrape("build_info", version=__version__) == 1
    assert scrape("redis_up") == 1
    assert scrape("worker_up", worker="w") == 1
    assert 0 <= scrape("worker_lease_age_seconds", worker="w") < 3
    assert [scrape("worker_state", worker="w", state=state) for state in ("ready", "draining")] == [1, 0]
    device = {"worker": "w", "device": "CPU", "kind": "cpu"}
    assert 0 < scrape("device_free_bytes", **device) < scrape("device_total_bytes", **device)
    assert scrape("device_reserved_bytes", **device) == 0
    assert (scrape("queue_depth"), scrape("worker_queue_depth", worker="w")) == (0, 0)
    assert [scrape("instances", worker="w", state=s) for s in ("queued", "loading", "loaded", "unloading")] == [0] * 4
    assert scrape("loads_total", outcome="failed", reason="engine_crashed") == 0
    assert [scrape("runner_deaths_total", state=s) for s in ("warm", "loading", "loaded")] == [0, 0, 0]
    assert (scrape("requeues_total"), scrape("restorations_total")) == (0, 0)


def test_a_load_is_counted_with_the_bytes_and_times_of_its_job(pool: Pool) -> None:
    before = pool.one.scrape()
    pool.one.loaded(TINY)
    now, job = pool.one.scrape(), newest(pool.one)
    assert ended(now, before) == {("loaded", ""): 1}
    size_bytes = pool.file.stat().st_size
    assert now.since(before, "loaded_bytes_total") == size_bytes == job["total_size_bytes"]
    assert set(job["timing"]) == {*PHASES, "total"}
    for phase in PHASES:
        labels = {"phase": phase, "size": "under_1GiB"}
        assert now.since(before, "load_phase_seconds_count", **labels) == 1
        seconds = now.since(before, "load_phase_seconds_sum", **labels)
        assert seconds == pytest.approx(job["timing"][phase], abs=2e-6)
    assert now.since(before, "load_seconds_count", size="under_1GiB") == 1
    seconds = now.since(before, "load_seconds_sum", size="under_1GiB")
    assert seconds == pytest.approx(job["timing"]["total"], abs=2e-6 * len(PHASES))
    for reached in ("queued", "loading", "loaded"):
        assert now.since(before, "instance_transitions_total", state=reached) == 1
    assert now("instances", worker="w", state="loaded") == 1
    device = {"worker": "w", "device": "CPU", "kind": "cpu"}
    until(
        lambda: pool.one.scrape()("device_reserved_bytes", **device) > size_bytes,
        "the memory of the instance is reserved",
    )


def test_an_unload_keeps_load_counts_and_clears_gauges(pool: Pool) -> None:
    pool.one.loaded(TINY)
    before = pool.one.scrape()
    assert pool.one.unload(TINY).status == 200
    now = pool.one.scrape()
    assert ended(now, before) == {}
    assert now("instances", worker="w", state="loaded") == 0
    assert now.since(before, "instance_transitions_total", state="unloaded") == 1
    assert now.since(before, "instance_transitions_total", state="loaded") == 0
    device = {"worker": "w", "device": "CPU", "kind": "cpu"}
    until(lambda: pool.one.scrape()("device_reserved_bytes", **device) == 0, "no memory is reserved")


def test_a_failed_load_is_counted_by_code_and_so_is_its_runner(pool: Pool) -> None:
    before = pool.one.scrape()
    with pool.worker.frozen() as runner, meanwhile(pool.one.load, TINY) as reply:
        until(pool.is_loading, "the model is loading")
        os.kill(runner.pid, signal.SIGKILL)
        error(reply.result(60), 500, "model_load_failed", "engine_crashed")
    now = pool.one.scrape()
    assert ended(now, before) == {("failed", "engine_crashed"): 1}
    assert now.since(before, "loaded_bytes_total") == 0
    assert now.get("load_seconds_count", size="under_1GiB") == before.get("load_seconds_count", size="under_1GiB")
    until(
        lambda: pool.one.scrape().since(before, "runner_deaths_total", state="loading") == 1,
        "the dead runner is counted",
    )


def test_dead_warm_or_loaded_runners_are_counted_but_no_load(pool: Pool) -> None:
    pool.one.loaded(TINY)
    before = pool.one.scrape()
    warm = pool.worker.warm_runner(loaded=1)
    holder, _ = pool.worker.runners()
    for runner in (holder, warm):
        os.kill(runner.pid, signal.SIGKILL)

    def deaths() -> list[float]:
        now = pool.one.scrape()
        return [now.since(before, "runner_deaths_total", state=s) for s in ("warm", "loading", "loaded")]

    until(lambda: deaths() == [1, 0, 1], "both dead runners are counted")
    now = pool.one.scrape()
    assert ended(now, before) == {}
    assert now.since(before, "instance_transitions_total", state="failed") == 1


def test_queued_and_cancelled_loads_are_counted(pool: Pool) -> None:
    before = pool.one.scrape()
    with pool.worker.frozen():
        jobs = [pool.one.accepted(TINY)["job_id"]]
        until(pool.is_loading, "the model is loading")
        jobs += [pool.one.accepted(TINY)["job_id"] for _ in range(2)]
        now = pool.other.scrape()
        assert (now("queue_depth"), now("worker_queue_depth", worker="w")) == (2, 2)
        assert [now("instances", worker="w", state=s) for s in ("queued", "loading", "loaded")] == [2, 1, 0]
        assert ended(now, before) == {}
        for job_id in reversed(jobs):
            assert pool.one.cancel(job_id).status == 200
    now = pool.one.scrape()
    assert ended(now, before) == {("cancelled", ""): 3}
    assert now("queue_depth") == 0
    assert now.since(before, "runner_deaths_total", state="loading") == 0, "the worker ended the runner itself"


def test_every_api_reports_the_same_pool_metrics(pool: Pool) -> None:
    before = pool.one.scrape()
    pool.other.loaded(TINY)
    now = pool.other.scrape()
    assert ended(now, before) == {("loaded", ""): 1}
    device = {"worker": "w", "device": "CPU", "kind": "cpu"}
    until(lambda: pool.one.scrape()("device_reserved_bytes", **device), "the worker has published its memory")
    assert pool.one.scrape().of_loads() == pool.other.scrape().of_loads()


def test_requests_to_any_api_are_in_the_scrape_of_every_api(pool: Pool) -> None:
    before = pool.other.scrape()
    for _ in range(3):
        pool.one.send("GET", PAGE)
    pool.one.send("GET", f"{STATUS}/load_{'0' * 32}")
    pool.one.send("GET", f"/{TINY}/nowhere")
    pool.one.send("PROPFIND", "/healthz")
    with httpx.Client(base_url=pool.other.url, trust_env=False) as stranger:
        stranger.get("/api/v1/models")
    expected = {
        ("GET", PAGE, "200"): 3,
        ("GET", STATUS + "/{job_id}", "404"): 1,
        ("GET", "other", "404"): 1,
        ("other", "/healthz", "405"): 1,
        ("GET", "other", "401"): 1,
    }

    def seen() -> dict[tuple[str, str, str], float]:
        now = pool.other.scrape()
        return {
            (method, route, status): now.get("http_requests_total", method=method, route=route, status=status)
            - before.get("http_requests_total", method=method, route=route, status=status)
            for method, route, status in expected
        }

    until(lambda: seen() == expected, "all requests are counted")
    for api in (pool.one, pool.other):
        now = api.scrape()
        assert now("http_request_seconds_count", method="GET", route="other") >= 2


def test_a_disconnected_client_counts_as_499_and_not_503(pool: Pool) -> None:
    before = pool.one.scrape()
    its = {"method": "POST", "route": "/api/v1/models/load"}
    with pool.worker.frozen():
        with pytest.raises(httpx.ReadTimeout):
            pool.one.send("POST", its["route"], json={"model": TINY}, timeout=0.3)
        until(lambda: pool.one.scrape().get("http_requests_total", **its, status="499"), "the request is counted")
        now = pool.one.scrape()
    until(lambda: TINY in pool.one.instances(), "the load completed")
    assert now.get("http_requests_total", **its, status="503") == before.get("http_requests_total", **its, status="503")


def test_metrics_require_a_token_if_tokens_are_configured(pool: Pool) -> None:
    with httpx.Client(base_url=pool.other.url, trust_env=False) as stranger:
        answer = stranger.get("/metrics")
    error(Reply(answer.status_code, answer.headers, answer.text), 401, "invalid_request", "invalid_api_key")
    assert pool.other.send("GET", "/metrics").status == 200


def test_no_counter_goes_down_when_processes_restart(pool: Pool) -> None:
    pool.one.loaded(TINY)
    worker = pool.worker.worker()
    before = pool.one.scrape()
    with pool.worker.frozen(loaded=1):
        job_id = pool.one.accepted(TINY)["job_id"]
        until(lambda: pool.is_loading(f"{TINY}:2"), "the second load is loading")
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: not is_alive(worker), "the worker is gone")
    pool.other.stop()
    pool.other.close()
    pool.other = Api(pool.home / "again", pool.redis, TOKEN)
    assert pool.one.job(job_id, wait_s=20)["status"] == "loaded"
    until(lambda: {TINY, f"{TINY}:2"} == set(pool.one.instances()), "both instances are loaded again")
    for api in (pool.one, pool.other):
        now = api.scrape()
        assert [key for key, value in before.counters().items() if now.samples.get(key, -1.0) < value] == []
        assert now.since(before, "requeues_total") == 1
        assert now.since(before, "restorations_total") == 1
        assert ended(now, before) == {("loaded", ""): 2}
        assert now.since(before, "instance_transitions_total", state="lost") == 1
        assert now("instances", worker="w", state="loaded") == 2


def test_a_redis_outage_is_reported_and_loses_no_count(pool: Pool) -> None:
    before = pool.one.scrape()
    pool.redis.kill()
    try:
        for api in (pool.one, pool.other):
            away = api.scrape()
            assert away("redis_up") == 0
            assert away("build_info", version=__version__) == 1
            assert set(away.kinds) == {"loadstone_redis_up", "loadstone_build_info"}, "no other metric"
            for _ in range(2):
                api.send("GET", PAGE)
    finally:
        pool.redis.start()
    until(lambda: pool.one.scrape()("redis_up") == 1, "Redis is back")
    its = {"method": "GET", "route": PAGE, "status": "200"}

    def shown() -> float:
        return pool.one.scrape().since(before, "http_requests_total", **its)

    until(lambda: shown() >= 4, "the counts kept during the outage are stored")
    assert shown() == 4
    now = pool.one.scrape()
    assert [key for key, value in before.counters().items() if now.samples.get(key, -1.0) < value] == []
    until(lambda: pool.one.send("GET", "/readyz").status == 200, "the worker is back")
