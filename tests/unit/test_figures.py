"""Requirements by the engine's figures, and the search for the largest context, with an engine that is a function."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET, structs

from shared.memory.estimate import CELLS, Requirements
from shared.memory.figures import AT_ONCE, MOST_TOKENS, Figures
from shared.schema.http import LoadRequest
from shared.schema.memory import CPU, Usage
from shared.schema.model import Dimensions, Model, Weights
from shared.schema.snapshot import Sizing
from shared.settings import Settings

BLOCKS = [10_000, 20_000, 30_000, 40_000]


def model(max_context_length: int = 400_000, **fields: Any) -> Model:
    """Return a model of an architecture whose formula was not checked."""
    made: dict[str, Any] = {
        "key": "p/m",
        "base": "p/m",
        "variant": "",
        "shards": [],
        "architecture": "qwen35",
        "max_context_length": max_context_length,
        "dimensions": Dimensions(
            block_count=4,
            embedding_length=64,
            head_count=4,
            head_count_kv=2,
            key_length=16,
            value_length=16,
            vocabulary=90_000,
        ),
        "weights": Weights(
            input_bytes=500, repeating_bytes=sum(BLOCKS), output_bytes=700, has_output=True, block_bytes=BLOCKS
        ),
    }
    return Model(**{**made, **fields})


class Engine:
    """Takes so many bytes of a device for each token, and so many in any case."""

    def __init__(self, of_a_token: int, compute_bytes: int, *, answers: bool = True) -> None:
        self.of_a_token = of_a_token
        self.compute_bytes = compute_bytes
        self.answers = answers
        self.asked: list[Sizing] = []

    def usage(self, id_: str, n: int) -> Usage:
        return Usage(id=id_, weights_bytes=100_700, context_bytes=n * self.of_a_token, compute_bytes=self.compute_bytes)

    async def ask(self, sizing: Sizing) -> list[list[Usage]] | None:
        self.asked.append(sizing)
        host = Usage(id=CPU, weights_bytes=500, compute_bytes=1000)
        of = {n: [*(self.usage(gpu, n) for gpu in sizing.gpus)] for n in sizing.context_lengths}
        answer = [[*of[n], host] if sizing.gpus else [self.usage(CPU, n)] for n in sizing.context_lengths]
        return answer if self.answers else None


def figures(engine: Engine, *gpus: str, of: Model | None = None, **fields: Any) -> Figures:
    return Figures(LoadRequest(model="p/m", **fields), of or model(), Settings(), gpus, engine.ask)


def test_the_engines_figures_replace_those_of_the_formula() -> None:
    engine = Engine(7, 5000)
    known = figures(engine, "GPU-a", "GPU-b", context_length=1000)
    assert not known.is_checked
    required = asyncio.run(known.requirements())
    assert required.on_cpu() == structs.replace(engine.usage(CPU, 1000), weights_bytes=101_200)
    assert required.on_gpu("GPU-b", 0, 5) == engine.usage("GPU-b", 1000)
    assert required.beside_gpus(0) == Usage(id=CPU, weights_bytes=500, compute_bytes=1000)
    assert [required.is_exact(n_gpus, 0) for n_gpus in (0, 1, 2)] == [True, True, False]
    parts = [required.on_gpu("", 0, 2), required.on_gpu("", 2, 5)]
    assert sum(one.weights_bytes for one in parts) == 100_700
    assert sum(one.context_bytes for one in parts) == 7000
    assert parts[0].weights_bytes == pytest.approx(30_000, abs=2), "in the proportion of the blocks"
    assert parts[0].compute_bytes < parts[1].compute_bytes == 5000, "only the second has the output"


@pytest.mark.parametrize(("repack", "weights_bytes"), [("off", 101_200), ("on", 201_900)])
def test_weights_on_the_cpu_are_those_of_the_file(repack: Any, weights_bytes: int) -> None:
    """The CPU maps the file.  A dry run does not: it counts tied embeddings twice, and repacked weights once."""
    known = Figures(LoadRequest(model="p/m"), model(), Settings(repack=repack), [], Engine(7, 5000).ask)
    required = asyncio.run(known.requirements())
    assert required.on_cpu().weights_bytes == known.formula.on_cpu().weights_bytes == weights_bytes


def test_without_an_answer_the_formula_counts() -> None:
    engine = Engine(1, 1, answers=False)
    known = figures(engine, context_length=1000)
    assert asyncio.run(known.requirements()) == known.formula
    assert not known.formula.exact
    most = known.formula.on_cpu().total_bytes
    assert asyncio.run(known.largest_context_length(lambda one: one.on_cpu().total_bytes <= most, fits=True)) == 1024
    assert len(engine.asked) == 1, "not for each step of the search"


def test_a_dry_run_for_the_cpu_is_left_out_where_gpus_take_all() -> None:
    engine = Engine(1, 1)
    known = Figures(LoadRequest(model="p/m"), model(), Settings(), ["GPU-a"], engine.ask, with_cpu=False)
    assert asyncio.run(known.requirements()).is_exact(n_gpus=1, on_cpu=0)
    assert [one.gpus for one in engine.asked] == [["GPU-a"]]


def test_a_checked_formula_asks_no_engine() -> None:
    engine = Engine(1, 1)
    dimensions = model().dimensions
    assert dimensions is not None
    checked = Dimensions(
        **{field: getattr(dimensions, field) for field in dimensions.__struct_fields__} | {"vocabulary": 1000}
    )
    known = figures(engine, "GPU-a", of=model(architecture="llama", dimensions=checked))
    assert known.is_checked
    assert asyncio.run(known.largest_context_length(lambda _: True, fits=True)) == 400_000
    assert not engine.asked


@given(
    st.integers(0, 100),
    st.integers(0, 10**6),
    st.integers(0, 10**8),
    st.sampled_from([100, 256, 4096, 400_000]),
    st.just(UNSET) | st.integers(1, 400_000),
    st.booleans(),
)
def test_the_largest_context_by_the_engine_is_exact(
    of_a_token: int, compute_bytes: int, free_bytes: int, most: int, asked: Any, on_gpu: bool
) -> None:
    engine, of = Engine(of_a_token, compute_bytes), model(most)
    if asked is not UNSET:
        asked = min(asked, most)
    known = figures(engine, *(["GPU-a"] if on_gpu else []), of=of, context_length=asked)

    def takes(n: int) -> int:
        usage = engine.usage(CPU, n)
        return usage.total_bytes if on_gpu else usage.total_bytes - usage.weights_bytes + 101_200

    def has_room(required: Requirements) -> bool:
        return (required.single(0) if on_gpu else required.on_cpu().total_bytes) <= free_bytes

    fits = takes(known.context_length) <= free_bytes
    largest = asyncio.run(known.largest_context_length(has_room, fits=fits))
    assert ((largest or 0) >= known.context_length) == fits
    if largest is not None:
        assert largest in (most, known.context_length) or largest % CELLS == 0
        assert takes(largest) <= free_bytes
    if largest != most:
        longer = ((largest or 0) // CELLS + 1) * CELLS
        assert longer > most or takes(longer) > free_bytes
    assert all(len(one.context_lengths) <= AT_ONCE for one in engine.asked)
    assert len(engine.asked) <= 5 * (1 + on_gpu), "a few questions"


def test_an_enormous_context_is_left_to_the_formula() -> None:
    engine = Engine(1, 1)
    known = figures(engine, of=model(2 * MOST_TOKENS))
    requirements = asyncio.run(known.of([MOST_TOKENS, MOST_TOKENS + 1]))
    assert [bool(one.figures) for one in requirements] == [True, False]
    assert [one.context_lengths for one in engine.asked] == [[MOST_TOKENS]]
