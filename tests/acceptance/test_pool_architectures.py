"""Models whose memory only the engine knows, in a pool of GPUs: estimates, loads and evictions agree."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support import architectures
from tests.support.fakehosts import FakeHost
from tests.support.service import Service, error, until, up

MIB = 1 << 20
GPU, RESERVE = "GPU-fake-0", MIB
ONE_GPU: dict[str, Any] = {"devices": [GPU]}
CHECKED = "p/qwen3"
HYBRID, MLA, RECURRENT, ENCODER = "p/qwen35", "p/deepseek2", "p/mamba2", "p/t5encoder"
LENGTHS = {HYBRID: 16_384, MLA: 16_384, RECURRENT: 4096, ENCODER: 1024}


@pytest.fixture(scope="module")
def pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, FakeHost]]:
    directory: Path = tmp_path_factory.mktemp("p")
    for key in [*LENGTHS, CHECKED]:
        name = key.removeprefix("p/")
        architectures.write(directory / f"m/{key}/m.gguf", name, context_length=65_536)
    host = FakeHost.made(directory / "host", 256 * MIB)
    with up(
        directory / "s", models=directory / "m", LOADSTONE_DEVICE_RESERVE=str(RESERVE), **host.environ()
    ) as service:
        until(lambda: all(m["params_string"] for m in service.models().values()), "every header has been read")
        yield service, host


def estimate(service: Service, key: str, **fields: Any) -> Any:
    reply = service.post("/api/v1/models/estimate", {"model": key, "gpu": ONE_GPU, **fields})
    assert reply.status == 200, reply.text
    return reply.json()


def needed_by(service: Service, key: str, **fields: Any) -> int:
    """Return what a load takes of the GPU by its estimate."""
    reply = estimate(service, key, **fields)
    assert reply["exact"]
    return sum(int(device["total_bytes"]) for device in reply["devices"] if device["id"] == GPU)


def leave(service: Service, host: FakeHost, n_bytes: int) -> None:
    """Let another program leave so much for loads."""
    host.release(GPU)
    host.take(GPU, 256 * MIB - RESERVE - n_bytes)

    def is_seen() -> bool:
        (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
        return any(device["free_bytes"] == n_bytes + RESERVE for device in worker["devices"])

    until(is_seen, "the worker has seen it")


BESIDE = {"offload_kv_cache_to_gpu": False}  # not compared with the engine for any architecture


@pytest.mark.parametrize(("key", "more"), [*((key, {}) for key in LENGTHS), (HYBRID, BESIDE), (CHECKED, BESIDE)])
def test_estimate_and_load_agree_with_the_engine(
    key: str, more: dict[str, Any], pool: tuple[Service, FakeHost]
) -> None:
    service, host = pool
    fields = {"context_length": LENGTHS.get(key, 4096), **more}
    needed = needed_by(service, key, **fields)
    leave(service, host, needed)
    now = estimate(service, key, **fields)
    assert now["fits"]
    assert now["max_context_length_that_fits"] >= fields["context_length"]
    before = host.used_bytes(GPU)
    service.loaded(key, gpu=ONE_GPU, **fields)
    assert host.used_bytes(GPU) - before == needed
    service.unload_all()

    leave(service, host, needed - 1)
    now = estimate(service, key, **fields)
    assert (now["fits"], now["exact"]) == (False, True)
    failure = error(service.load(key, gpu=ONE_GPU, **fields), 500, "model_load_failed", "insufficient_memory")
    assert failure["detail"]["needed_bytes"] == needed
    assert failure["detail"]["largest_context_length"] == now["max_context_length_that_fits"]
    assert (now["max_context_length_that_fits"] or 0) < fields["context_length"]


def test_nothing_is_evicted_for_a_load_that_fits(pool: tuple[Service, FakeHost]) -> None:
    """By the formula, the second instance of a hybrid model has no room beside the first."""
    service, host = pool
    fields = {"context_length": LENGTHS[HYBRID], "gpu": ONE_GPU, "ttl_seconds": 1000}
    leave(service, host, 2 * needed_by(service, HYBRID, **fields))
    service.loaded(HYBRID, **fields)
    assert estimate(service, HYBRID, **fields)["evicts"] == []
    assert "loadstone-evicted" not in service.load(HYBRID, **fields).headers
    assert len(service.instances()) == 2
    until(lambda: len(estimate(service, HYBRID, **fields)["evicts"]) == 1, "a third one has no room")
    service.unload_all()
