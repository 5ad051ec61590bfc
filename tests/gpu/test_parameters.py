"""Where a model and its KV cache go, and how attention is computed: what was asked applies, and the reply is true."""

from __future__ import annotations

from typing import Any

import pytest

from shared.schema.model import Model
from tests.gpu.conftest import BIG, LONG, LONG_TOKENS
from tests.gpu.gpus import MIB
from tests.gpu.watched import BOUND, Watched, check_use

SLACK_BYTES = 64 * MIB  # another kernel, or another workspace
CPU = "CPU"


# ---- the KV cache


def test_a_kv_cache_beside_the_gpu_is_so_much_less_on_it(watched: Watched, gpu: str, models: dict[str, Model]) -> None:
    dimensions = models[LONG].dimensions
    assert dimensions
    kv_bytes = dimensions.block_count * LONG_TOKENS * 32 * (128 + 128) * 2  # heads, their keys and values, F16
    told: dict[bool, dict[str, Any]] = {}
    used: dict[bool, int] = {}
    for on_gpu in (True, False):
        fields = {"context_length": LONG_TOKENS, "offload_kv_cache_to_gpu": on_gpu}
        told[on_gpu] = watched.estimated(LONG, **fields)
        with watched.loaded(LONG, **fields) as loaded:
            used[on_gpu] = loaded.used_bytes[gpu]
            assert loaded.config["offload_kv_cache_to_gpu"] is on_gpu
    assert (told[True][gpu]["context_bytes"], told[True][CPU]["context_bytes"]) == (kv_bytes, 0)
    assert (told[False][gpu]["context_bytes"], told[False][CPU]["context_bytes"]) == (0, kv_bytes)
    compute = told[True][gpu]["compute_bytes"] - told[False][gpu]["compute_bytes"]
    assert used[True] - used[False] == pytest.approx(kv_bytes + compute, abs=BOUND * kv_bytes + SLACK_BYTES)


# ---- flash attention


def test_flash_attention_is_as_asked_for_and_without_it_more_is_computed_at_once(watched: Watched, gpu: str) -> None:
    told: dict[bool | None, int] = {}
    used: dict[bool | None, int] = {}
    applied: dict[bool | None, bool] = {}
    for asked in (True, False, None):
        fields = {"context_length": LONG_TOKENS} | ({} if asked is None else {"flash_attention": asked})
        told[asked] = watched.estimated(LONG, **fields)[gpu]["compute_bytes"]
        with watched.loaded(LONG, **fields) as loaded:
            used[asked], applied[asked] = loaded.used_bytes[gpu], loaded.config["flash_attention"]
    assert (applied[True], applied[False]) == (True, False)
    assert told[False] > 2 * told[True]
    assert used[False] - used[True] == pytest.approx(told[False] - told[True], abs=BOUND * told[False] + SLACK_BYTES)
    assert used[None] == pytest.approx(used[applied[None]], abs=SLACK_BYTES)


# ---- how many layers


def layers_of(engine_log: str) -> list[str]:
    """Where the engine says that it put each layer; the last is the output."""
    lines = [line for line in engine_log.splitlines() if line.startswith("load_tensors: layer")]
    return [line.partition("assigned to device ")[2].partition(",")[0] for line in lines]


def test_half_of_the_layers_go_to_the_gpu_and_the_first_ones_stay_with_the_cpu(
    watched: Watched, gpu: str, context_bytes: int, models: dict[str, Model]
) -> None:
    dimensions = models[BIG].dimensions
    assert dimensions
    n = dimensions.block_count + 1
    fields = {"gpu": {"offload": 0.5}}
    told = watched.estimated(BIG, **fields)
    with watched.loaded(BIG, **fields) as loaded:
        assert loaded.job["devices"] == [gpu]
        assert layers_of(watched.engine_log(loaded.job)) == ["CPU"] * (n - n // 2) + ["CUDA0"] * (n // 2)
        check_use(loaded.used_bytes[gpu], told[gpu]["total_bytes"], context_bytes)
    assert told[CPU]["weights_bytes"] > 0.3 * models[BIG].size_bytes


@pytest.mark.parametrize("where", [{"offload": "off"}, {"devices": [CPU]}])
def test_a_load_that_is_for_the_cpu_takes_nothing_of_the_gpu(watched: Watched, gpu: str, where: dict[str, Any]) -> None:
    assert watched.estimated(BIG, gpu=where).keys() == {CPU}
    with watched.loaded(BIG, gpu=where) as loaded:
        assert loaded.job["devices"] == [CPU]
        assert loaded.used_bytes[gpu] <= SLACK_BYTES


def test_a_gpu_is_named_by_its_uuid(watched: Watched, gpu: str) -> None:
    with watched.loaded(BIG, gpu={"devices": [gpu]}) as loaded:
        assert loaded.job["devices"] == [gpu]
        assert set(layers_of(watched.engine_log(loaded.job))) == {"CUDA0"}
        assert loaded.used_bytes[gpu] > watched.estimated(BIG, gpu={"devices": [gpu]})[gpu]["weights_bytes"]
