"""Real models through the service: what it lists, echoes, estimates and takes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from cli.demo import REAL as SMOLLM2
from tests.support.service import Process, Service, until

MINILM = "sentence-transformers/all-minilm-l6-v2"
LLM_DEFAULTS = {
    "eval_batch_size": 512,
    "physical_batch_size": 512,
    "parallel": 4,
    "flash_attention": True,
    "offload_kv_cache_to_gpu": True,
}
LISTED = {
    SMOLLM2: {
        "type": "llm",
        "publisher": "HuggingFaceTB",
        "architecture": "llama",
        "quantization": {"name": "Q4_1", "bits_per_weight": 5},
        "size_bytes": 98_362_432,
        "params_string": "135M",
        "max_context_length": 8192,
        "capabilities": {"vision": False, "trained_for_tool_use": False},
    },
    MINILM: {
        "type": "embedding",
        "publisher": "sentence-transformers",
        "display_name": "all-MiniLM-L6-v2",
        "quantization": {"name": "F16", "bits_per_weight": 16},
        "size_bytes": 46_223_264,
        "params_string": "23M",
        "max_context_length": 512,
    },
}
ECHOES = [
    (SMOLLM2, {}, {"context_length": 4096, **LLM_DEFAULTS}),
    (SMOLLM2, {"context_length": 1024}, {"context_length": 1024, **LLM_DEFAULTS}),
    (SMOLLM2, {"eval_batch_size": 64, "physical_batch_size": 32, "flash_attention": False}, None),
    (MINILM, {}, {"context_length": 512}),
    (MINILM, {"context_length": 128}, {"context_length": 128}),
]


@pytest.mark.parametrize("key", LISTED)
def test_the_list_describes_a_real_model(service: Service, key: str) -> None:
    # The vocabulary, and what follows it in the file, is read after the start.
    until(lambda: service.models()[key]["quantization"]["bits_per_weight"], "the whole header is read")
    listed = service.models()[key]
    assert {name: listed[name] for name in LISTED[key]} == LISTED[key]


@pytest.mark.parametrize(("key", "fields", "config"), ECHOES)
def test_a_real_model_loads_with_the_echo_of_its_parameters(
    service: Service, key: str, fields: Mapping[str, Any], config: Mapping[str, Any] | None
) -> None:
    loaded = service.loaded(key, echo_load_config=True, **fields)
    assert loaded["type"] == LISTED[key]["type"]
    assert loaded["load_config"] == (config or {"context_length": 4096, **LLM_DEFAULTS, **fields})


@pytest.mark.parametrize(("key", "fields"), [(key, fields) for key, fields, _ in ECHOES])
def test_a_load_takes_what_was_estimated(service: Service, key: str, fields: Mapping[str, Any]) -> None:
    """The engine allocates the estimate to 1 %.

    Of that, the runner's process has weights and context in memory, and of the compute buffers what the first token
    needed: between 90 % of the weights and the context, and 110 % of all.
    """
    estimate = service.post("/api/v1/models/estimate", {"model": key, **fields}).json()
    (device,) = estimate["devices"]
    runner = service.warm_runner(0)
    before_bytes = resident_bytes(runner)
    service.loaded(key, **fields)
    (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
    reserved_bytes = sum(device["reserved_bytes"] for device in worker["devices"])
    assert reserved_bytes == pytest.approx(estimate["total_bytes"], rel=0.01)
    taken_bytes = resident_bytes(runner) - before_bytes
    assert taken_bytes > 0.9 * (device["weights_bytes"] + device["context_bytes"])
    assert taken_bytes < 1.1 * reserved_bytes


def resident_bytes(process: Process) -> int:
    status = Path(f"/proc/{process.pid}/status").read_text()
    (kib,) = (line.split()[1] for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(kib) << 10
