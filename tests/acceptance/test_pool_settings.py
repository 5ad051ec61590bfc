"""Operator settings of a pool of GPUs, and the behaviour of drivers."""

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
FIELDS = {"context_length": 512}  # a load of about 2.5 MiB
FIRST, SECOND = "GPU-fake-0", "GPU-fake-1"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("m")
    tiny_llama(root / MODEL / "m.gguf")
    return root


@pytest.fixture
def host(tmp_path: Path) -> Iterator[FakeHost]:
    fake_host = FakeHost.made(tmp_path / "host", 8 * MIB, 4 * MIB)
    yield fake_host
    fake_host.release(FIRST)
    fake_host.release(SECOND)
    assert (fake_host.used_bytes(FIRST), fake_host.used_bytes(SECOND)) == (0, 0), (
        "all memory is free after the service has ended"
    )


def devices(service: Any) -> dict[str, Any]:
    workers = service.send("GET", "/api/v1/workers").json()["workers"]
    return {device["id"]: device for worker in workers for device in worker["devices"]}


def test_evict_any_evicts_the_least_recently_used_instance(tmp_path: Path, models: Path, host: FakeHost) -> None:
    variables = {"LOADSTONE_DEVICES": "1", "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_EVICT": "any"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        assert [*devices(service)] == [SECOND], "the worker owns only the device with that index"
        service.loaded(MODEL, **FIELDS)
        reply = service.load(MODEL, **FIELDS)
        assert reply.headers["loadstone-evicted"] == MODEL
        assert service.instances().keys() == {reply.json()["instance_id"]}
        assert MODEL not in service.wanted(), "an evicted instance is not to be restored"


def test_evict_off_evicts_nothing(tmp_path: Path, models: Path, host: FakeHost) -> None:
    variables = {"LOADSTONE_DEVICES": SECOND, "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_EVICT": "off"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        service.loaded(MODEL, ttl_seconds=1000, **FIELDS)
        error(service.load(MODEL, **FIELDS), 500, "model_load_failed", "insufficient_memory")
        assert service.instances().keys() == {MODEL}


def test_gpu_offload_auto_puts_layers_on_the_cpu_if_needed(tmp_path: Path, models: Path, host: FakeHost) -> None:
    variables = {"LOADSTONE_DEVICES": "1,cpu", "LOADSTONE_DEVICE_RESERVE": "0", "LOADSTONE_GPU_OFFLOAD": "auto"}
    with up(tmp_path / "s", models=models, **variables, **host.environ()) as service:
        host.take(SECOND, 7 * MIB // 4)  # the free memory is smaller than the model
        service.loaded(MODEL, **FIELDS)
        used = host.used_bytes(SECOND) - 7 * MIB // 4
        assert used > 0
        until(lambda: devices(service)[SECOND]["reserved_bytes"] == used, "the published usage is exact")
        fields = {**FIELDS, "gpu": {"offload": "max"}}
        error(service.load(MODEL, **fields), 500, "model_load_failed", "insufficient_memory")


def test_an_unload_is_answered_once_the_driver_freed_the_memory(tmp_path: Path, models: Path, host: FakeHost) -> None:
    host.driver(lag_s=0.5)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        for _ in range(2):
            service.loaded(MODEL, gpu={"devices": [SECOND]}, **FIELDS)
            began = time.monotonic()
            assert service.unload(MODEL).status == 200
            assert host.used_bytes(SECOND) == 0
            assert time.monotonic() - began >= 0.5
        assert devices(service)[SECOND]["leaked_bytes"] == 0


def test_memory_that_is_not_freed_is_leaked_and_not_given_away(tmp_path: Path, models: Path, host: FakeHost) -> None:
    host.driver(lag_s=30)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        service.loaded(MODEL, gpu={"devices": [SECOND]}, **FIELDS)
        held = host.used_bytes(SECOND)
        assert service.unload(MODEL).status == 200
        device = until(lambda: (d := devices(service)[SECOND])["leaked_bytes"] and d, "the worker publishes the leak")
        assert device["leaked_bytes"] == held
        assert device["available_bytes"] <= 4 * MIB - held
        error(service.load(MODEL, gpu={"devices": [SECOND]}, **FIELDS), 500, "model_load_failed", "insufficient_memory")
        assert service.metric("device_leaked_bytes", device=SECOND, kind="gpu") == held
        host.driver(lag_s=0)


def test_driver_memory_per_process_counts_toward_its_model(tmp_path: Path, models: Path, host: FakeHost) -> None:
    host.driver(context_bytes=MIB)
    with up(tmp_path / "s", models=models, LOADSTONE_DEVICE_RESERVE="0", **host.environ()) as service:
        service.loaded(MODEL, gpu={"devices": [FIRST]}, **FIELDS)
        used = host.used_bytes(FIRST)
        device = until(
            lambda: (d := devices(service)[FIRST])["reserved_bytes"] == used and d, "the worker publishes the usage"
        )
        assert device["leaked_bytes"] == 0
        assert device["available_bytes"] == 8 * MIB - used
        assert service.unload(MODEL).status == 200
        assert host.used_bytes(FIRST) == 0


def test_a_worker_needs_free_and_existing_gpus_to_start(tmp_path: Path, models: Path, host: FakeHost) -> None:
    redis = RedisServer(tmp_path / "redis")
    flags = ("worker", "--models-dir", str(models), "--redis-url", redis.url, "--data-dir", str(tmp_path / "data"))

    def start(name: str, devices: str) -> Running:
        words = (*flags, "--worker-name", name, "--devices", devices)
        return Running(tmp_path / name, *words, environ=host.environ())

    first = start("first", "0")
    try:
        until(lambda: "action=ready" in first.stderr, "the first worker is ready")
        for name, indices, words in (
            ("second", "0,1", f"another worker uses the GPU {FIRST}"),
            ("third", "2", f"there is no device '2'; available: cpu, 0 ({FIRST}), 1 ({SECOND})."),
        ):
            refused = start(name, indices)
            assert refused.popen.wait(60) == 2, refused.stderr
            assert words in refused.stderr
            assert "Traceback" not in refused.stderr
        other = start("fourth", "1")
        until(lambda: "action=ready" in other.stderr, "the other worker is ready")
        other.stop()
        first.stop()
        again = start("fifth", "0,1")
        until(lambda: "action=ready" in again.stderr, "the next worker is ready")
        again.stop()
    finally:
        first.kill()
        redis.kill()
