"""`loadstone up` as a whole: its start, its end, and that it leaves no process behind."""

from __future__ import annotations

import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import STATUS, Running, Service, below, check_keys, is_alive, meanwhile, until, up, wait_gone

TINY, OTHER = "acme/tiny", "acme/other"
LEASE_S = 300  # a worker that is started again on a busy machine must not come too late
Start = Callable[..., Service]


def started(home: Path) -> AbstractContextManager[Service]:
    """Run `loadstone up` with two models in a directory."""
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_llama(home / f"models/{OTHER}/other-f16.gguf")
    return up(home, LOADSTONE_LEASE_S=str(LEASE_S))


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that starts `loadstone up` in the test's directory; stop it after the test if it still runs."""
    with ExitStack() as undo:
        yield lambda: undo.enter_context(started(tmp_path))


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with started(tmp_path_factory.mktemp("up")) as service:
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return a service that outlives the test; unload everything after it."""
    yield running
    running.unload_all()


def test_models_are_listed_as_soon_as_the_service_is_ready(start: Start) -> None:
    """A client may list the models right after the `ready` line; they must not appear a beat later."""
    assert set(start().models()) == {TINY, OTHER}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_stops_a_busy_service_in_time(start: Start, signum: signal.Signals) -> None:
    service = start()
    service.loaded(TINY)
    with service.frozen(1), meanwhile(service.load, OTHER) as reply:
        until(lambda: service.state(OTHER) == "loading", "the other model is loading")
        service.stop(signum)  # its graces add up to what a container runtime waits: tests/acceptance/test_drain.py
        assert reply.result(60).status >= 500
    assert re.fullmatch(r"ready: http://127\.0\.0\.1:[1-9]\d*\n", service.stdout)
    assert "Traceback" not in service.stderr


def test_a_requested_stop_is_not_reported_as_a_crash(start: Start) -> None:
    service = start()
    service.loaded(TINY)
    service.warm_runner(1)
    service.stop()
    assert "engine_crashed" not in service.stderr
    assert "[error" not in service.stderr


def test_killing_the_supervisor_ends_all_of_its_processes(start: Start) -> None:
    service = start()
    service.loaded(TINY)
    service.warm_runner(1)
    tree = service.tree()
    assert len(tree) >= 7  # Redis, API, worker, scanner, runners and their forkserver
    service.popen.kill()
    service.popen.wait()
    wait_gone(tree)
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", service.port)) != 0


@pytest.mark.parametrize("how", ["stopped", "killed"])
def test_a_restart_restores_loaded_instances(start: Start, how: str) -> None:
    before = start()
    before.loaded(TINY)
    before.loaded(TINY)
    until(lambda: len(before.wanted()) == 2, "the worker's file has both instances")
    tree = before.tree()
    if how == "killed":
        before.popen.kill()
        before.popen.wait()
        wait_gone(tree)
    else:
        before.stop()
    service = start()
    until(lambda: set(service.instances()) == {TINY, f"{TINY}:2"}, "both instances are loaded again")
    assert service.loaded(TINY)["instance_id"] == f"{TINY}:3"
    with service.redis() as redis:
        counters = {name.decode(): int(n) for name, n in redis.hgetall("counters").items()}  # type: ignore[union-attr]
        check_keys(redis)
    assert counters["loaded"] == 5
    assert counters["lost"] == 2


def test_loads_interrupted_by_a_stop_get_a_server_error(start: Start) -> None:
    service = start()
    with service.frozen(), meanwhile(service.load, TINY) as first:
        until(lambda: service.state(TINY) == "loading", "the first load is loading")
        with meanwhile(service.load, OTHER) as second:
            until(lambda: service.state(OTHER) == "queued", "the second load is queued")
            service.stop()
            assert first.result(60).status >= 500
            assert second.result(60).status >= 500


def test_a_second_up_on_a_data_directory_is_refused(service: Service, tmp_path: Path) -> None:
    second = Running(tmp_path / "second", "up", "--port", "0", "--data-dir", str(service.data_dir))
    assert second.popen.wait(60) == 2
    assert second.stdout == ""
    assert re.fullmatch(r"loadstone: .*another `loadstone up` is using: each needs its own\.\n", second.stderr)
    assert service.loaded(TINY)["status"] == "loaded"


def test_listening_for_others_without_a_token_is_refused(tmp_path: Path) -> None:
    refused = Running(tmp_path, "up", "--port", "0", "--host", "0.0.0.0", "--data-dir", str(tmp_path / "data"))
    assert refused.popen.wait(60) == 2
    assert refused.stdout == ""
    assert refused.stderr.startswith(
        "loadstone: LOADSTONE_HOST is '0.0.0.0', which other machines can reach, but no token"
    )
    assert len(refused.stderr.splitlines()) == 1


def test_a_killed_worker_restores_instances_and_resumes_its_load(service: Service) -> None:
    before = {job["job_id"] for job in jobs(service)}
    service.loaded(TINY)
    with service.frozen(1), meanwhile(service.load, OTHER) as reply:
        until(lambda: service.state(OTHER) == "loading", "the other model is loading")
        worker = service.worker()
        held = below(worker.pid)
        os.kill(worker.pid, signal.SIGKILL)
        assert reply.result(60).json()["instance_id"] == OTHER
    until(lambda: set(service.instances()) == {TINY, OTHER}, "both instances are loaded again")
    wait_gone(held)
    assert not is_alive(worker)
    assert service.worker().pid != worker.pid
    new = [job for job in jobs(service) if job["job_id"] not in before]
    assert sorted((job["instance_id"], job["attempt"], job["status"]) for job in new) == [
        (OTHER, 2, "loaded"),
        (TINY, 1, "loaded"),
        (TINY, 1, "loaded"),
    ]


def jobs(service: Service) -> list[dict[str, Any]]:
    listed: list[dict[str, Any]] = service.send("GET", STATUS).json()["jobs"]
    return listed


def test_a_killed_api_restarts_and_loaded_instances_stay(service: Service) -> None:
    service.loaded(TINY)
    (api,) = (process for process in service.tree() if process.words[2:4] == ("-m", "api"))
    os.kill(api.pid, signal.SIGKILL)
    until(lambda: not is_alive(api), "the API is gone")
    assert set(service.instances()) == {TINY}  # the connection waits for the next API process
    assert service.unload(TINY).status == 200


def test_a_killed_redis_restarts_with_its_data(service: Service) -> None:
    service.loaded(TINY)
    (redis,) = (process for process in service.tree() if "valkey" in process.words[0] or "redis" in process.words[0])
    time_of_the_next_write_to_disk = time.monotonic() + 1.5  # the embedded Redis syncs its file once a second
    until(lambda: time.monotonic() > time_of_the_next_write_to_disk, "the changes are on disk")
    os.kill(redis.pid, signal.SIGKILL)
    until(lambda: not is_alive(redis), "Redis is gone")
    until(lambda: service.send("GET", "/readyz").status == 200, "Redis is back")
    until(lambda: set(service.instances()) == {TINY}, "the loaded instance is known")
    assert service.loaded(TINY)["instance_id"] == f"{TINY}:2"
