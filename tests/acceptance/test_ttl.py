"""Idle TTL: an instance is unloaded once nothing has used it for as long as its client asked."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from datetime import timedelta
from typing import Any

import pytest

from tests.support.chat import answered
from tests.support.service import LOADSTONE, PATIENCE_S, STATUS, TINY, Process, Service, error, until

TTL_S = 1.5
ROUNDED_S = 0.001  # of a remaining time
LONG_S = 3600.0  # a TTL that no test waits for
SLACK_S = 600.0  # more than any test takes
SECOND, THIRD = f"{TINY}:2", f"{TINY}:3"


def cli(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(LOADSTONE), *words, "--url", service.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE_S, check=False)


def remaining_s(service: Service, instance_id: str) -> float | None:
    remaining: float | None = service.instances()[instance_id].get("remaining_ttl_seconds")
    return remaining


def held(service: Service) -> set[str]:
    """Return the ids of all instances whose record has not ended, also while their memory is being freed."""
    workers = service.send("GET", "/api/v1/workers").json()["workers"]
    return {instance["id"] for worker in workers for instance in worker["instances"]}


def test_only_an_expired_instance_is_unloaded(service: Service) -> None:
    service.loaded(TINY)
    service.loaded(TINY, ttl_seconds=LONG_S)
    with service.frozen(2) as holder:
        began = time.monotonic()
        job_id = service.accepted(TINY, ttl_seconds=TTL_S)["job_id"]
    assert service.job(job_id, wait_s=20)["instance_id"] == THIRD
    until(lambda: THIRD not in held(service), "unloaded")
    assert time.monotonic() - began >= TTL_S
    assert holder not in service.runners()
    assert service.job(job_id)["status"] == "loaded", "the load did not fail"
    error(service.unload(THIRD), 404, "model_not_found", param="instance_id")
    assert set(service.instances()) == {TINY, SECOND}
    assert service.instances()[TINY]["devices"] == ["CPU"]
    assert remaining_s(service, TINY) is None
    assert service.loaded(TINY)["instance_id"] == THIRD, "its name is free again"


def test_instance_can_be_unloaded_before_it_expires(service: Service) -> None:
    service.loaded(TINY, ttl_seconds=LONG_S)
    remaining = remaining_s(service, TINY)
    assert remaining is not None
    assert LONG_S - SLACK_S < remaining <= LONG_S
    assert service.unload(TINY).status == 200


def last_use(service: Service) -> tuple[float, float]:
    """Return the bounds of the time from which the TTL counts."""
    asked_at = time.time()
    remaining = remaining_s(service, TINY)
    assert remaining is not None
    return asked_at + remaining - LONG_S - ROUNDED_S, time.time() + remaining - LONG_S + ROUNDED_S


def test_a_request_defers_the_expiry(service: Service) -> None:
    service.loaded(TINY, ttl_seconds=LONG_S)
    _, loaded_at = last_use(service)
    until(lambda: time.time() > loaded_at, "some time later")
    assert answered(service, model=TINY, max_tokens=1)["choices"]
    until(lambda: last_use(service)[0] > loaded_at, "it counts from the request")
    with service.redis() as redis:
        (key,) = redis.scan_iter("used:*")
        noted: Any = redis.hvals
        until(lambda: max(map(float, noted(key))) > loaded_at, "the next process of the worker will know it")
    worker, killed_at = service.worker(), time.time()
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: service.worker().pid != worker.pid, "another worker process")
    until(lambda: TINY in service.instances(), "it is restored")
    until(lambda: last_use(service)[0] > loaded_at, "it counts from the request, not from the load")
    until(lambda: last_use(service)[1] < killed_at, "nor from the restoration")
    assert service.unload(TINY).status == 200


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0, "invalid_value"),
        (-1, "invalid_value"),
        (0.0, "invalid_value"),
        (1e300, "invalid_value"),
        ("60", "invalid_type"),
        (True, "invalid_type"),
        (None, "invalid_type"),
    ],
)
def test_ttl_must_be_a_positive_number(service: Service, value: object, code: str) -> None:
    error(service.load(TINY, ttl_seconds=value), 400, "invalid_request", code, "ttl_seconds")


def test_command_line_sets_and_shows_a_ttl(service: Service) -> None:
    assert cli(service, "load", TINY, "--ttl", str(int(LONG_S))).stdout == f"{TINY}\n"
    shown = cli(service, "ps").stdout.splitlines()[1].split()[-2]
    hours, minutes, seconds = map(int, shown.split(":"))
    remaining = timedelta(hours=hours, minutes=minutes, seconds=seconds).total_seconds()
    assert LONG_S - SLACK_S < remaining <= LONG_S
    assert service.unload(TINY).status == 200
    refused = cli(service, "load", TINY, "--ttl", "0")
    assert refused.returncode == 2
    assert "--ttl" in refused.stderr


def test_instance_that_expires_without_a_worker_is_not_restored(service: Service) -> None:
    service.loaded(TINY, ttl_seconds=LONG_S)
    worker = until(lambda: paused_with_an_expiring_instance(service), "the worker is paused in time")
    before = loads_of(service, SECOND)
    time.sleep(TTL_S)
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: service.worker().pid != worker.pid, "another worker process")
    until(lambda: set(service.instances()) == {TINY}, "what has not expired is restored")
    remaining = remaining_s(service, TINY)
    assert remaining is not None
    assert LONG_S - SLACK_S < remaining <= LONG_S - TTL_S, "counted from the last use, not from the restoration"
    assert loads_of(service, SECOND) == before, "it would have been loaded first, as the one that was used last"
    assert service.unload(TINY).status == 200


def loads_of(service: Service, instance_id: str) -> int:
    return [job["instance_id"] for job in service.send("GET", STATUS).json()["jobs"]].count(instance_id)


def paused_with_an_expiring_instance(service: Service) -> Process | None:
    """Load an instance that expires soon, and stop the worker before it does.  None if it was too late."""
    service.loaded(TINY, ttl_seconds=TTL_S)
    worker = service.worker()
    os.kill(worker.pid, signal.SIGSTOP)
    if service.state(SECOND) == "loaded":
        return worker
    os.kill(worker.pid, signal.SIGCONT)
    until(lambda: SECOND not in service.instances(), "it has expired")
    return None
