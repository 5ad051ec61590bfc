"""Memory estimates compared with the figures of the engine, for files with the shapes of real models."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest

from shared.memory.estimate import Requirements, requirements_of
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.memory import Usage
from shared.schema.model import Model
from shared.settings import Settings
from shared.synthetic.architectures import SHAPES
from shared.synthetic.models import sparse_shape
from tests.integration.conftest import catalog
from tests.support.noalloc import load, measured
from worker.runner.protocol import Load

BOUND = 0.03  # relative to the total, in both directions
COMPUTE_BOUND = 0.2  # relative to the compute buffer, which is small beside the weights
VOCABULARY = 2048  # tokens; the engine reads a real vocabulary in half a second, and it only affects the output
VOCABULARIES = {
    "llama3-8b": 128_256,
    "gemma3-1b": 262_144,
    "qwen3-0.6b": 32_000,
    "bert-large": 30_522,
    "qwen3-embedding-0.6b": 32_000,
}
Kind = Literal["gpu", "cpu"]
# The fake GPU is slow, since the engine calls it for every step of a graph: use few models and configurations.
ON_GPU = ("qwen3-0.6b", "qwen3-embedding-0.6b", "bert-large", "gemma3-1b", "llama3-8b", "qwen3-30b-a3b")
DEVICES: list[tuple[str, Kind]] = [*((preset, "cpu") for preset in SHAPES), *((preset, "gpu") for preset in ON_GPU)]

DECODER: dict[str, dict[str, Any]] = {
    "default": {},
    "short": {"context_length": 1000, "eval_batch_size": 64},
    "batch": {"eval_batch_size": 2048},
    "physical batch": {"eval_batch_size": 2048, "physical_batch_size": 128},
    "no flash attention": {"flash_attention": False},
    "parallel": {"parallel": 64, "context_length": 4096},
    "one token": {"eval_batch_size": 1},
    "quantized cache": {"kv_cache_type": "q8_0", "parallel": 1},
}
LONG: dict[str, dict[str, Any]] = {
    "long": {"context_length": 32_768},
    "long, quantized cache": {"context_length": 32_768, "kv_cache_type": "q4_0"},
    "long, no flash attention": {"context_length": 16_384, "flash_attention": False},
}
EMBEDDING: dict[str, dict[str, Any]] = {"default": {}, "short": {"context_length": 100}}
EXPERTS = {"experts": {"num_experts": 1}}


def configurations(preset: str, kind: Kind) -> dict[str, dict[str, Any]]:
    shape, _ = SHAPES[preset]
    if shape.architecture == "bert":
        return EMBEDDING
    if shape.pooling_type:
        return EMBEDDING | {"long": LONG["long"]}
    if kind == "gpu":
        return {words: (DECODER | LONG)[words] for words in ("default", "long, quantized cache", "no flash attention")}
    return DECODER | (LONG if shape.context_length >= 32_768 else {}) | (EXPERTS if shape.expert_count else {})


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for preset in SHAPES:
        shards = 3 if preset == "llama3-70b" else 0
        vocabulary = VOCABULARIES.get(preset, VOCABULARY)
        sparse_shape(root / f"p/{preset}/m.gguf", preset, shards=shards, vocabulary=vocabulary)
    return root


@pytest.fixture(scope="module")
def models(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    by_key = catalog(root, tmp_path_factory.mktemp("catalog"))
    return {preset: by_key[f"p/{preset}"] for preset in SHAPES}


def estimated(model: Model, **fields: Any) -> Requirements:
    return requirements_of(model, plan(LoadRequest(model=model.key, **fields), model, Settings()))


@pytest.fixture(scope="module")
def figures(root: Path, models: dict[str, Model]) -> dict[tuple[str, Kind], dict[str, Usage]]:
    """The memory of each configuration by the engine, by model and kind of device."""
    cases: list[tuple[str, Kind, str]] = []
    loads: list[Load] = []
    for preset, kind in DEVICES:
        model = models[preset]
        layers = [SHAPES[preset][0].block_count + 1] if kind == "gpu" else []
        for words, fields in configurations(preset, kind).items():
            cases.append((preset, kind, words))
            planned = plan(LoadRequest(model=model.key, **fields), model, Settings())
            loads.append(load([root / shard for shard in model.shards], planned, layers))
    usages: dict[tuple[str, Kind], dict[str, Usage]] = defaultdict(dict)
    for (preset, kind, words), (taken, *_) in zip(cases, measured(loads), strict=True):
        usages[preset, kind][words] = taken
    return usages


@pytest.mark.parametrize(("preset", "kind"), DEVICES)
def test_the_estimate_matches_the_engine(
    preset: str, kind: Kind, models: dict[str, Model], figures: dict[tuple[str, Kind], dict[str, Usage]]
) -> None:
    fields = configurations(preset, kind)
    assert figures[preset, kind].keys() == fields.keys()
    for words, engine in figures[preset, kind].items():
        requirements = estimated(models[preset], **fields[words])
        estimate = requirements.on_gpu("", 0, requirements.n_layers) if kind == "gpu" else requirements.on_cpu()
        assert requirements.is_exact(1 if kind == "gpu" else 0, 0)
        assert estimate.total_bytes == pytest.approx(engine.total_bytes, rel=BOUND), words
        assert estimate.compute_bytes == pytest.approx(engine.compute_bytes, rel=COMPUTE_BOUND), words
        assert estimate.context_bytes == engine.context_bytes, words
        assert estimate.weights_bytes == pytest.approx(engine.weights_bytes, rel=1e-4), words


# ---- over several devices

SPLITS: list[tuple[str, str, list[float]]] = [  # the share of the layers of each GPU; the CPU has the others
    (preset, words, parts)
    for preset in ("qwen3-0.6b", "gemma3-1b", "llama3-8b", "qwen3-30b-a3b")
    for words in ("default", "no flash attention")
    for parts in ([0.5, 0.5], [0.3, 0.3, 0.4], [0.5])
] + [("bert-large", "default", [0.5, 0.5])]


def test_the_estimate_of_each_device_matches_the_engine(root: Path, models: dict[str, Model]) -> None:
    """The small compute buffer of the host is estimated as an upper bound."""
    loads: list[Load] = []
    cases: list[tuple[str, str, Requirements, list[int]]] = []
    for preset, words, parts in SPLITS:
        model, fields = models[preset], (EMBEDDING if preset == "bert-large" else DECODER)[words]
        requirements = estimated(model, **fields)
        layers = [int(part * requirements.n_layers) for part in parts]
        if sum(parts) == 1:
            layers[-1] += requirements.n_layers - sum(layers)
        planned = plan(LoadRequest(model=model.key, **fields), model, Settings())
        loads.append(load([root / shard for shard in model.shards], planned, layers))
        cases.append((preset, words, requirements, layers))
    for (preset, words, requirements, layers), taken in zip(cases, measured(loads), strict=True):
        start = first = requirements.n_layers - sum(layers)
        for n, engine in zip(layers, taken, strict=False):
            estimate = requirements.on_gpu(engine.id, start, start + n)
            start += n
            assert estimate.total_bytes == pytest.approx(engine.total_bytes, rel=BOUND), (preset, words, layers)
            assert estimate.context_bytes == engine.context_bytes
        host, engine = requirements.beside_gpus(first), taken[-1]
        assert host.context_bytes == engine.context_bytes
        assert host.weights_bytes == pytest.approx(engine.weights_bytes, rel=1e-3, abs=1 << 16)
        assert 0.9 <= host.compute_bytes / engine.compute_bytes <= 1.4, (preset, words, layers)
