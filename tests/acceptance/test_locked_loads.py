"""Loads of a service onto fake GPUs, which copy from page-locked memory."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from shared.synthetic.models import tiny_llama
from tests.support.chat import answered
from tests.support.fakehosts import FakeHost
from tests.support.service import Service, until, up

GIB = 1 << 30
MODEL = "p/m"
FIRST, SECOND = "GPU-fake-0", "GPU-fake-1"
WAIT_S = 60


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> FakeHost:
    host = FakeHost.made(tmp_path_factory.mktemp("host") / "h", GIB, GIB)
    host.driver(locked_from=0)
    return host


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, machine: FakeHost) -> Iterator[Service]:
    models = tmp_path_factory.mktemp("m")
    tiny_llama(models / MODEL / "m.gguf")
    with up(tmp_path_factory.mktemp("s"), models=models, **machine.environ()) as service:
        yield service


@pytest.fixture
def service(running: Service, machine: FakeHost) -> Iterator[Service]:
    machine.forget_locking()
    yield running
    for instance in running.instances():
        assert running.unload(instance).status == 200


def registering(host: FakeHost) -> int:
    """Return how many loads have begun to lock their files."""
    return sum(event["event"] == "registers" for event in host.locking())


def test_an_instance_that_was_copied_from_locked_memory_answers(service: Service, machine: FakeHost) -> None:
    instance = service.loaded(MODEL)["instance_id"]
    names = [event["event"] for event in machine.locking()]
    assert (names[1], names[-1]) == ("registered", "unregistered")
    assert answered(service, model=instance, max_tokens=3)["usage"]["completion_tokens"] == 3


def test_loads_onto_different_gpus_lock_at_the_same_time(service: Service, machine: FakeHost) -> None:
    with machine.holding_locks():
        jobs = [service.accepted(MODEL, gpu={"devices": [gpu]})["job_id"] for gpu in (FIRST, SECOND)]
        until(lambda: registering(machine) == 2, "both loads lock their files", WAIT_S)
    for job in jobs:
        assert service.job(job, WAIT_S)["status"] == "loaded"


def test_a_load_can_be_cancelled_while_it_locks(service: Service, machine: FakeHost) -> None:
    with machine.holding_locks():
        job = service.accepted(MODEL, gpu={"devices": [FIRST]})["job_id"]
        until(lambda: registering(machine) == 1, "the load locks its file", WAIT_S)
        assert service.cancel(job).status == 200
        assert service.job(job, WAIT_S)["status"] == "cancelled"
        until(lambda: machine.used_bytes(FIRST) == 0, "its memory is free", WAIT_S)
    assert service.instances() == {}
