"""A model that nothing has used for as long as its client said is unloaded by itself."""

from __future__ import annotations

import os
import signal
import subprocess
import time

import pytest

from tests.support.service import LOADSTONE, TINY, Service, error, until

TTL_S = 1.5
SOON_S = 3.0  # after the time: a look, and the stop ladder


def cli(service: Service, *words: str) -> subprocess.CompletedProcess[str]:
    command = [str(LOADSTONE), *words, "--url", service.url]
    return subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)


def test_it_is_unloaded_when_its_time_is_over_and_what_has_none_stays(service: Service) -> None:
    service.warm_runner(0)
    began = time.monotonic()
    assert service.loaded(TINY, ttl_seconds=TTL_S)["instance_id"] == TINY
    assert service.loaded(TINY)["instance_id"] == f"{TINY}:2"
    listed = service.instances()
    assert 0 < listed[TINY]["remaining_ttl_seconds"] <= TTL_S
    assert listed[f"{TINY}:2"]["remaining_ttl_seconds"] is None
    assert listed[TINY]["devices"] == ["CPU"]
    holder = service.runners()[0]
    until(lambda: TINY not in service.instances(), "it is unloaded", TTL_S + SOON_S)
    assert time.monotonic() - began >= TTL_S
    assert holder not in service.runners()
    (job,) = (
        job
        for job in service.send("GET", "/api/v1/models/load/status").json()["jobs"][:2]
        if job["instance_id"] == TINY
    )
    assert job["status"] == "loaded"
    error(service.unload(TINY), 404, "model_not_found", param="instance_id")
    assert f"{TINY}:2" in service.instances()
    assert service.loaded(TINY)["instance_id"] == TINY, "its name is free again"


def test_it_can_be_unloaded_before(service: Service) -> None:
    service.loaded(TINY, ttl_seconds=3600)
    assert 3590 < service.instances()[TINY]["remaining_ttl_seconds"] <= 3600
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
def test_it_must_be_a_number_over_nought(service: Service, value: object, code: str) -> None:
    error(service.load(TINY, ttl_seconds=value), 400, "invalid_request", code, "ttl_seconds")


def test_the_command_line_gives_it_and_shows_what_is_left(service: Service) -> None:
    assert cli(service, "load", TINY, "--ttl", "90").stdout == f"{TINY}\n"
    assert cli(service, "ps").stdout.splitlines()[1].split()[-1] in ("0:01:30", "0:01:29", "0:01:28")
    assert service.unload(TINY).status == 200
    refused = cli(service, "load", TINY, "--ttl", "0")
    assert refused.returncode == 2
    assert "--ttl" in refused.stderr


def test_one_whose_time_is_over_while_its_worker_is_away_is_not_loaded_again(service: Service) -> None:

    service.loaded(TINY, ttl_seconds=2.0)
    service.loaded(TINY, ttl_seconds=3600)
    worker = service.worker()
    os.kill(worker.pid, signal.SIGSTOP)
    began = time.monotonic()
    until(lambda: time.monotonic() - began > 2.0, "its time is over", 3)
    os.kill(worker.pid, signal.SIGKILL)
    until(
        lambda: set(service.instances()) == {f"{TINY}:2"} and service.worker().pid != worker.pid,
        "the other one is back",
        20,
    )
    assert 3500 < service.instances()[f"{TINY}:2"]["remaining_ttl_seconds"] < 3600, (
        "counted from its use, not from its return"
    )
    assert service.unload(f"{TINY}:2").status == 200
