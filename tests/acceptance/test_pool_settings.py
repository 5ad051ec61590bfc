"""What an operator sets of a pool of GPUs, and what drivers do."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic.models import tiny_llama
from tests.support.fakehosts import FakeHost
from tests.support.service import RedisServer, Running, error, until, up

MIB = 1 << 20
MODEL = "p/m"
ASKED = {"context_length": 512}  # takes some 2.5 MiB
FIRST, SECOND = "GPU-fake-0", "GPU-fake-1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("m")
    tiny_llama(root / MODEL / "m.gguf")
    return root


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    made = FakeHost.made(tmp_path / "host", 8 * MIB, 4 * MIB)
    yield made
    made.release(FIRST)
    made.release(SECOND)
    assert (made.used_bytes(FIRST), made.used_bytes(SECOND)) == (0, 0), "nothing outlives its service"


def devices(service: Any) -> dict[str, Any]:
    workers = service.send("GET", "/api/v1/workers").json()["workers"]
    return {device["id"]: device for worker in workers for device in worker["devices"]}


def test_where_anything_may_leave_what_was_not_used_for_the_longest_time_does(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    variables = {"LOADSTONE_DEVICES": "1", "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_EVICT": "any"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        assert [*devices(service)] == [SECOND], "the device of that index, and no other"
        service.loaded(MODEL, **ASKED)
        reply = service.load(MODEL, **ASKED)
        assert reply.headers["loadstone-evicted"] == MODEL
        assert service.instances().keys() == {reply.json()["instance_id"]}
        assert MODEL not in service.wanted(), "what was evicted does not come back by itself"


def test_where_nothing_may_leave_nothing_does(tmp_path: Path, models: Path, host: FakeHost) -> None:
    variables = {"LOADSTONE_DEVICES": SECOND, "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_EVICT": "off"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        service.loaded(MODEL, ttl_seconds=1000, **ASKED)
        error(service.load(MODEL, **ASKED), 500, "model_load_failed", "insufficient_memory")
        assert service.instances().keys() == {MODEL}


def test_an_operator_may_have_layers_on_the_cpu_where_gpus_are_too_small(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    variables = {"LOADSTONE_DEVICES": "1,cpu", "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_GPU_OFFLOAD": "auto"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        host.take(SECOND, 7 * MIB // 4)  # less than the whole model is left
        service.loaded(MODEL, **ASKED)
        taken = host.used_bytes(SECOND) - 7 * MIB // 4
        assert taken > 0
        until(
            lambda: devices(service)[SECOND]["reserved_bytes"] == taken, "what is shown is what it takes, to the byte"
        )
        asked = {**ASKED, "gpu": {"offload": "max"}}
        error(service.load(MODEL, **asked), 500, "model_load_failed", "insufficient_memory")


def test_an_unload_is_answered_when_the_driver_has_the_memory_back(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    host.driver(lag_s=0.5)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        for _ in range(2):
            service.loaded(MODEL, gpu={"devices": [SECOND]}, **ASKED)
            began = time.monotonic()
            assert service.unload(MODEL).status == 200
            assert host.used_bytes(SECOND) == 0
            assert time.monotonic() - began >= 0.5
        assert devices(service)[SECOND]["leaked_bytes"] == 0


def test_memory_that_does_not_come_back_is_shown_as_leaked_and_not_given_away(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    host.driver(lag_s=30)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        service.loaded(MODEL, gpu={"devices": [SECOND]}, **ASKED)
        held = host.used_bytes(SECOND)
        assert service.unload(MODEL).status == 200
        found = until(lambda: (d := devices(service)[SECOND])["leaked_bytes"] and d, "a beat")
        assert found["leaked_bytes"] == held
        assert found["available_bytes"] <= 4 * MIB - held
        error(service.load(MODEL, gpu={"devices": [SECOND]}, **ASKED), 500, "model_load_failed", "insufficient_memory")
        assert service.metric("device_leaked_bytes", device=SECOND, kind="gpu") == held
        host.driver(lag_s=0)


def test_what_a_driver_takes_for_each_process_counts_as_its_models(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    host.driver(context_bytes=MIB)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        service.loaded(MODEL, gpu={"devices": [FIRST]}, **ASKED)
        used = host.used_bytes(FIRST)
        found = until(lambda: (d := devices(service)[FIRST])["reserved_bytes"] == used and d, "a beat")
        assert found["leaked_bytes"] == 0
        assert found["available_bytes"] == 8 * MIB - used
        assert service.unload(MODEL).status == 200
        assert host.used_bytes(FIRST) == 0


def test_a_gpu_has_one_owner_and_a_worker_that_names_none_of_this_host_does_not_start(
    tmp_path: Path, models: Path, host: FakeHost
) -> None:
    redis = RedisServer(tmp_path / "redis")
    flags = ("worker", "--models-dir", str(models), "--redis-url", redis.url, "--data-dir", str(tmp_path / "data"))

    def start(name: str, devices: str) -> Running:
        words = (*flags, "--worker-name", name, "--devices", devices)
        return Running(tmp_path / name, *words, environ=host.environ())

    first = start("first", "0")
    try:
        until(lambda: "action=ready" in first.stderr, "ready")
        for name, wanted, words in (
            ("second", "0,1", f"another worker uses the GPU {FIRST}"),
            ("third", "2", f"there is no device '2'; available: cpu, 0 ({FIRST}), 1 ({SECOND})."),
        ):
            refused = start(name, wanted)
            assert refused.popen.wait(20) == 2, refused.stderr
            assert words in refused.stderr
            assert "Traceback" not in refused.stderr
        other = start("fourth", "1")
        until(lambda: "action=ready" in other.stderr, "ready")
        other.stop()
        first.stop()
        again = start("fifth", "0,1")
        until(lambda: "action=ready" in again.stderr, "ready")
        again.stop()
    finally:
        first.kill()
        redis.kill()
