"""Offload, KV cache and flash attention on a real GPU: the request applies, and the echoed config is true."""

from __future__ import annotations

from typing import Any

import pytest

from shared.schema.model import Model
from tests.gpu.conftest import BIG, LONG, LONG_TOKENS
from tests.gpu.gpus import MIB
from tests.gpu.watched import BOUND, Watched, check_use

SLACK_BYTES = 64 * MIB  # another kernel or workspace
CPU = "CPU"


# ---- the KV cache


def test_a_kv_cache_in_host_memory_uses_no_gpu_memory(watched: Watched, gpu: str, models: dict[str, Model]) -> None:
    dimensions = models[LONG].dimensions
    assert dimensions
    kv_bytes = dimensions.block_count * LONG_TOKENS * 32 * (128 + 128) * 2  # heads, their keys and values, F16
    estimates: dict[bool, dict[str, Any]] = {}
    used: dict[bool, int] = {}
    for on_gpu in (True, False):
        fields = {"context_length": LONG_TOKENS, "offload_kv_cache_to_gpu": on_gpu}
        estimates[on_gpu] = watched.estimated(LONG, **fields)
        with watched.loaded(LONG, **fields) as loaded:
            used[on_gpu] = loaded.used_bytes[gpu]
            assert loaded.config["offload_kv_cache_to_gpu"] is on_gpu
    assert (estimates[True][gpu]["context_bytes"], estimates[True][CPU]["context_bytes"]) == (kv_bytes, 0)
    assert (estimates[False][gpu]["context_bytes"], estimates[False][CPU]["context_bytes"]) == (0, kv_bytes)
    compute = estimates[True][gpu]["compute_bytes"] - estimates[False][gpu]["compute_bytes"]
    assert used[True] - used[False] == pytest.approx(kv_bytes + compute, abs=BOUND * kv_bytes + SLACK_BYTES)


# ---- flash attention


def test_flash_attention_applies_and_shrinks_compute_buffers(watched: Watched, gpu: str) -> None:
    estimates: dict[bool | None, int] = {}
    used: dict[bool | None, int] = {}
    applied: dict[bool | None, bool] = {}
    for asked in (True, False, None):
        fields = {"context_length": LONG_TOKENS} | ({} if asked is None else {"flash_attention": asked})
        estimates[asked] = watched.estimated(LONG, **fields)[gpu]["compute_bytes"]
        with watched.loaded(LONG, **fields) as loaded:
            used[asked], applied[asked] = loaded.used_bytes[gpu], loaded.config["flash_attention"]
    assert (applied[True], applied[False]) == (True, False)
    assert estimates[False] > 2 * estimates[True]
    assert used[False] - used[True] == pytest.approx(
        estimates[False] - estimates[True], abs=BOUND * estimates[False] + SLACK_BYTES
    )
    assert used[None] == pytest.approx(used[applied[None]], abs=SLACK_BYTES)


# ---- number of layers


def layers_of(engine_log: str) -> list[str]:
    """Return the device of each layer from the engine log; the last entry is the output."""
    lines = [line for line in engine_log.splitlines() if line.startswith("load_tensors: layer")]
    return [line.partition("assigned to device ")[2].partition(",")[0] for line in lines]


def test_an_offload_of_half_puts_the_last_layers_on_the_gpu(
    watched: Watched, gpu: str, context_bytes: int, models: dict[str, Model]
) -> None:
    dimensions = models[BIG].dimensions
    assert dimensions
    n = dimensions.block_count + 1
    fields = {"gpu": {"offload": 0.5}}
    estimates = watched.estimated(BIG, **fields)
    with watched.loaded(BIG, **fields) as loaded:
        assert loaded.job["devices"] == [gpu]
        assert layers_of(watched.engine_log(loaded.job)) == ["CPU"] * (n - n // 2) + ["CUDA0"] * (n // 2)
        check_use(loaded.used_bytes[gpu], estimates[gpu]["total_bytes"], context_bytes)
    assert estimates[CPU]["weights_bytes"] > 0.3 * models[BIG].size_bytes


@pytest.mark.parametrize("where", [{"offload": "off"}, {"devices": [CPU]}])
def test_a_load_on_the_cpu_uses_no_gpu_memory(watched: Watched, gpu: str, where: dict[str, Any]) -> None:
    assert watched.estimated(BIG, gpu=where).keys() == {CPU}
    with watched.loaded(BIG, gpu=where) as loaded:
        assert loaded.job["devices"] == [CPU]
        assert loaded.used_bytes[gpu] <= SLACK_BYTES


def test_a_gpu_can_be_chosen_by_its_uuid(watched: Watched, gpu: str) -> None:
    with watched.loaded(BIG, gpu={"devices": [gpu]}) as loaded:
        assert loaded.job["devices"] == [gpu]
        assert set(layers_of(watched.engine_log(loaded.job))) == {"CUDA0"}
        assert loaded.used_bytes[gpu] > watched.estimated(BIG, gpu={"devices": [gpu]})[gpu]["weights_bytes"]
