"""The memory estimate against the engine's own figures, on files with the shapes of real models."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any, Literal

import pytest

from shared.architectures import SHAPES
from shared.estimate import Estimate, estimate
from shared.plan import plan
from shared.schema import LoadRequest, Model
from shared.settings import Settings
from shared.synthetic import sparse_shape
from tests.integration.conftest import catalog
from tests.noalloc import Case, Figures, measured

BOUND = 0.03  # of the total, either way
COMPUTE_BOUND = 0.2  # of the compute buffer alone, so that no term of it can get lost beside the weights
VOCABULARY = 2048  # tokens; a real one takes the engine half a second to read, and matters to the output alone
VOCABULARIES = {"llama3-8b": 128_256, "qwen3-0.6b": 32_000, "bert-large": 30_522, "qwen3-embedding-0.6b": 32_000}
Kind = Literal["gpu", "cpu"]
KINDS: tuple[Kind, ...] = ("gpu", "cpu")
# The fake GPU is slow, since it is asked for every step of a graph: a few models and configurations must do.
ON_GPU = ("qwen3-0.6b", "qwen3-embedding-0.6b", "bert-large", "gemma3-1b", "llama3-8b", "qwen3-30b-a3b")
DEVICES: list[tuple[str, Kind]] = [*((preset, "cpu") for preset in SHAPES), *((preset, "gpu") for preset in ON_GPU)]

DECODER: dict[str, dict[str, Any]] = {
    "default": {},
    "short": {"context_length": 1000, "eval_batch_size": 64},
    "batch": {"eval_batch_size": 2048},
    "no flash attention": {"flash_attention": False},
    "parallel": {"parallel": 8, "context_length": 4096},
}
LONG: dict[str, dict[str, Any]] = {
    "long": {"context_length": 32_768},
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
        return {words: (DECODER | LONG)[words] for words in ("default", "long", "no flash attention")}
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
    found = catalog(root, tmp_path_factory.mktemp("catalog"))
    return {preset: found[f"p/{preset}"] for preset in SHAPES}


def estimated(model: Model, kind: Kind, **fields: Any) -> Estimate:
    return estimate(model, plan(LoadRequest(model=model.key, **fields), model, Settings()), kind)


@pytest.fixture(scope="module")
def figures(root: Path, models: dict[str, Model]) -> dict[tuple[str, Kind], dict[str, Figures]]:
    """The engine's, by model and kind of device, of each configuration."""
    found: dict[tuple[str, Kind], dict[str, Figures]] = defaultdict(dict)
    for kind in KINDS:
        loads: list[tuple[str, list[str]]] = []
        cases: list[Case] = []
        for preset in (preset for preset, on in DEVICES if on == kind):
            model = models[preset]
            for experts in (False, True):
                asked = {w: f for w, f in configurations(preset, kind).items() if ("num_experts" in f) == experts}
                plans = [plan(LoadRequest(model=model.key, **fields), model, Settings()) for fields in asked.values()]
                if plans:
                    loads.append((preset, [*asked]))
                    cases.append(Case(path=str(root / model.shards[0]), plans=plans))
        for (preset, names), its_figures in zip(loads, measured(cases, on_gpu=kind == "gpu"), strict=True):
            found[preset, kind] |= zip(names, its_figures, strict=True)
    return found


@pytest.mark.parametrize(("preset", "kind"), DEVICES)
def test_the_estimate_is_what_the_engine_would_take(
    preset: str, kind: Kind, models: dict[str, Model], figures: dict[tuple[str, Kind], dict[str, Figures]]
) -> None:
    asked = configurations(preset, kind)
    assert figures[preset, kind].keys() == asked.keys()
    for words, engine in figures[preset, kind].items():
        found = estimated(models[preset], kind, **asked[words])
        assert found.exact
        assert found.total_bytes == pytest.approx(engine.total_bytes, rel=BOUND), words
        assert found.compute_bytes == pytest.approx(engine.compute_bytes, rel=COMPUTE_BOUND), words
        assert found.context_bytes == engine.context_bytes, words
        assert found.weights_bytes == pytest.approx(engine.weights_bytes, rel=1e-4), words
