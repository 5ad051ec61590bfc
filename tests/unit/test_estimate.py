"""Properties of a memory estimate for any header; tests/integration compares estimates with the engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shared.memory.estimate import CELLS, MOST_BYTES, Requirements, requirements_of
from shared.memory.figures import Figures
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.memory import Usage
from shared.schema.model import Dimensions, Model, Weights
from shared.schema.snapshot import Sizing
from shared.settings import Settings

MAXIMUM = 131_072
SETTINGS = Settings()
Kind = Literal["gpu", "cpu"]
LLAMA = Dimensions(
    block_count=32,
    embedding_length=4096,
    head_count=32,
    head_count_kv=8,
    key_length=128,
    value_length=128,
    feed_forward_length=14_336,
    vocabulary=128_256,
)


def model(**fields: Any) -> Model:
    """Return Llama 3 8B with these fields changed."""
    made: dict[str, Any] = {
        "key": "p/m",
        "base": "p/m",
        "variant": "",
        "shards": [],
        "size_bytes": 4_700_000_000,
        "architecture": "llama",
        "max_context_length": MAXIMUM,
        "dimensions": LLAMA,
        "weights": Weights(
            input_bytes=300_000_000, repeating_bytes=3_900_000_000, output_bytes=430_000_000, has_output=True
        ),
    }
    return Model(**{**made, **fields})


def requirements(of_model: Model, **fields: Any) -> Requirements:
    return requirements_of(of_model, plan(LoadRequest(model="p/m", **fields), of_model, SETTINGS))


def largest_context_length(of_model: Model, has_room: Callable[[Requirements], bool], **fields: Any) -> int | None:
    async def ask(_: Sizing) -> None:
        """Be an engine that does not answer."""

    figures = Figures(LoadRequest(model="p/m", **fields), of_model, SETTINGS, [], ask)
    return asyncio.run(figures.largest_context_length(has_room, fits=has_room(figures.formula)))


def on_one(required: Requirements, kind: Kind) -> Usage:
    """Return the memory that one device needs to hold the whole model."""
    return required.on_cpu() if kind == "cpu" else required.on_gpu("D", 0, required.n_layers)


def of(of_model: Model, kind: Kind = "gpu", **fields: Any) -> Usage:
    return on_one(requirements(of_model, **fields), kind)


# ---- any header

lengths = st.integers(0, 2**20)
per_block = lengths | st.lists(lengths, min_size=3, max_size=3)
dimensions = st.builds(
    Dimensions,
    block_count=st.just(3),
    embedding_length=lengths,
    head_count=per_block,
    head_count_kv=per_block,
    key_length=lengths,
    value_length=lengths,
    feed_forward_length=per_block,
    expert_used_count=lengths,
    expert_feed_forward_length=lengths,
    sliding_window=lengths,
    vocabulary=st.none() | st.integers(0, 2**40),
)
sizes = st.integers(0, 2**62)
weights = st.builds(Weights, input_bytes=sizes, repeating_bytes=sizes, output_bytes=sizes, has_output=st.booleans())
models = st.builds(
    model,
    type=st.sampled_from(["llm", "embedding"]),
    architecture=st.sampled_from(["llama", "gemma3", "qwen3moe", "bert", "deepseek2", "mamba"]),
    max_context_length=st.integers(64, 2**31 - 1),
    expert_count=st.sampled_from([0, 8]),
    causal=st.booleans(),
    pooling=st.integers(-1, 4),
    size_bytes=sizes,
    dimensions=st.none() | dimensions,
    weights=st.none() | weights,
)
kinds = st.sampled_from(["gpu", "cpu"])
options = st.fixed_dictionaries(
    {},
    optional={
        "eval_batch_size": st.integers(64, 4096),
        "flash_attention": st.booleans(),
        "offload_kv_cache_to_gpu": st.booleans(),
        "physical_batch_size": st.integers(64, 4096),
        "parallel": st.integers(1, 64),
        "kv_cache_type": st.sampled_from(["f16", "q8_0", "q4_0"]),
    },
)


@given(models, kinds, options, st.data())
def test_a_longer_context_never_needs_less(
    any_model: Model, kind: Kind, fields: dict[str, Any], data: st.DataObject
) -> None:
    lengths = st.integers(1, any_model.max_context_length)
    less, more = sorted([data.draw(lengths), data.draw(lengths)])
    before, after = (of(any_model, kind, context_length=length, **fields) for length in (less, more))
    assert before.weights_bytes == after.weights_bytes
    assert before.context_bytes <= after.context_bytes
    assert before.compute_bytes <= after.compute_bytes
    assert 0 <= after.total_bytes < 2**63, "JSON carries it as an integer of 64 bits"


@given(models, kinds, st.integers(64, 4096), st.integers(64, 4096))
def test_dearer_options_never_need_less(any_model: Model, kind: Kind, one: int, other: int) -> None:
    less, more = sorted([one, other])
    usual: dict[str, Any] = {"eval_batch_size": less, "flash_attention": True, "num_experts": 1}
    small = of(any_model, kind, **usual)
    dearer: list[dict[str, Any]] = [{"eval_batch_size": more}, {"flash_attention": False}, {"num_experts": 8}]
    for fields in dearer:
        assert of(any_model, kind, **usual | fields).total_bytes >= small.total_bytes, fields


@given(models, options)
def test_a_gpu_never_needs_more_than_the_host(any_model: Model, fields: dict[str, Any]) -> None:
    fields = fields | {"offload_kv_cache_to_gpu": True}
    assert of(any_model, "gpu", **fields).total_bytes <= of(any_model, "cpu", **fields).total_bytes


@given(models, options, st.data())
def test_the_parts_of_several_devices_make_up_the_whole(
    any_model: Model, fields: dict[str, Any], data: st.DataObject
) -> None:
    required = requirements(any_model, **fields)
    cut = data.draw(st.integers(0, required.n_layers - 1))
    first, last = required.on_gpu("D", 0, cut), required.on_gpu("E", cut, required.n_layers)
    whole = on_one(required, "gpu")
    assert first.weights_bytes + last.weights_bytes >= whole.weights_bytes, "each sum is capped at the largest number"
    assert first.context_bytes + last.context_bytes >= whole.context_bytes
    assert first.compute_bytes <= last.compute_bytes == whole.compute_bytes
    with_cpu = required.beside_gpus(cut)
    assert with_cpu.weights_bytes <= on_one(required, "cpu").weights_bytes
    if cut == 0:
        assert with_cpu.compute_bytes == min(required.host_compute_bytes, MOST_BYTES)


@given(models, kinds, options, st.integers(0, 2**40))
def test_the_largest_context_is_the_largest_that_fits(
    any_model: Model, kind: Kind, fields: dict[str, Any], free_bytes: int
) -> None:
    def fits(required: Requirements) -> bool:
        return on_one(required, kind).total_bytes <= free_bytes

    largest = largest_context_length(any_model, fits, **fields)
    if largest is not None:
        assert largest == any_model.max_context_length or largest % CELLS == 0
        assert fits(requirements(any_model, context_length=largest, **fields))
    if largest != any_model.max_context_length:
        more = min((largest or 0) + CELLS, any_model.max_context_length)
        assert not fits(requirements(any_model, context_length=more, **fields))


# ---- the parts of an estimate


def test_each_field_of_a_request_counts() -> None:
    """Compares with sums done by hand: 32 blocks, 8 heads, keys and values of 128 elements, as F16."""
    default = of(model())
    assert default.context_bytes == 32 * 8 * 2 * 128 * 2 * 4096
    assert default.weights_bytes == 4_330_000_000, "the embeddings stay in the host's memory"
    assert of(model(), "cpu").weights_bytes == 4_630_000_000
    assert of(model(), context_length=4097).context_bytes == default.context_bytes // 16 * 17
    assert of(model(), parallel=8).context_bytes == default.context_bytes
    assert of(model(), kv_cache_type="q8_0").context_bytes == default.context_bytes * 34 // 64
    assert of(model(), kv_cache_type="q4_0").context_bytes == default.context_bytes * 18 // 64
    beside = of(model(), offload_kv_cache_to_gpu=False)
    assert beside.context_bytes == 0
    assert beside.compute_bytes == default.compute_bytes + default.context_bytes // 32, (
        "the GPU needs a buffer for one block's cache"
    )
    assert of(model(), "cpu", offload_kv_cache_to_gpu=False) == of(model(), "cpu")


def test_tied_embeddings_are_on_the_gpu_too() -> None:
    tied = Weights(input_bytes=300, repeating_bytes=4000, output_bytes=1, has_output=False)
    assert of(model(weights=tied)).weights_bytes == 4301
    assert of(model(weights=tied), "cpu").weights_bytes == 4301


def test_an_encoder_has_no_cache() -> None:
    encoder = model(type="embedding", architecture="bert", causal=False, max_context_length=512)
    assert of(encoder).context_bytes == 0
    assert requirements(encoder).exact


def test_different_blocks_count_by_their_own_sizes() -> None:
    uneven = structs.replace(LLAMA, block_count=3, head_count_kv=[8, 0, 4])
    assert of(model(dimensions=uneven)).context_bytes == 12 * 2 * 128 * 2 * 4096


UNSURE: dict[str, tuple[Model, dict[str, Any]]] = {
    "an architecture that was not compared": (model(architecture="deepseek2"), {}),
    "an architecture without a KV cache of this kind": (model(architecture="mamba"), {}),
    "an encoder that was not compared": (model(architecture="nomic-bert", causal=False, type="embedding"), {}),
    "a decoder that attends to its whole input": (model(causal=False, type="embedding"), {}),
    "a reranker": (model(type="embedding", pooling=4), {}),
    "a sliding window that llama.cpp may ignore": (model(dimensions=structs.replace(LLAMA, sliding_window=4096)), {}),
    "a header that was not read to the end": (model(weights=None), {}),
    "a header without dimensions": (model(dimensions=None), {}),
    "a large physical batch": (model(), {"eval_batch_size": 513, "physical_batch_size": 513}),
    "a KV cache beside the GPU": (model(), {"offload_kv_cache_to_gpu": False}),
}


@pytest.mark.parametrize("case", UNSURE)
def test_an_estimate_not_compared_with_the_engine_is_not_exact(case: str) -> None:
    uncompared, fields = UNSURE[case]
    guess = requirements(uncompared, **fields)
    assert not guess.is_exact(n_gpus=1, on_cpu=0)
    assert on_one(guess, "gpu").weights_bytes > 4_000_000_000, "the estimate is still close"
    assert requirements(model()).is_exact(n_gpus=1, on_cpu=0)


def test_an_estimate_is_exact_on_one_device_only() -> None:
    required = requirements(model())
    assert required.is_exact(n_gpus=0, on_cpu=33)
    assert not required.is_exact(n_gpus=2, on_cpu=0)
    assert required.is_exact(n_gpus=1, on_cpu=1)


def test_an_unknown_vocabulary_counts_as_a_large_vocabulary() -> None:
    guess = requirements(model(dimensions=structs.replace(LLAMA, vocabulary=None)), eval_batch_size=32)
    assert not guess.exact
    assert guess.compute_bytes > requirements(model(), eval_batch_size=32).compute_bytes


def test_gpus_hold_the_last_layers_and_the_cpu_the_first() -> None:
    """32 blocks and the output are 33 layers; each block has 3.9 GB / 32."""
    required = requirements(model())
    assert required.n_layers == 33
    assert required.on_gpu("D", 17, 33).weights_bytes == 15 * 3_900_000_000 // 32 + 430_000_000
    assert required.on_gpu("D", 1, 17).weights_bytes == 16 * 3_900_000_000 // 32, "only the last GPU has the output"
    assert required.on_gpu("D", 1, 17).context_bytes == 16 * 8 * 2 * 128 * 2 * 4096
    beside = required.beside_gpus(17)
    assert beside.weights_bytes == 300_000_000 + 17 * 3_900_000_000 // 32
    assert beside.context_bytes == 17 * 8 * 2 * 128 * 2 * 4096


def test_the_largest_context_respects_the_other_fields() -> None:
    with_flash, without = (
        largest_context_length(
            model(), lambda required: required.single(0) <= 8 << 30, flash_attention=flash, context_length=512
        )
        for flash in (True, False)
    )
    assert with_flash is not None
    assert without is not None
    assert 0 < without < with_flash < MAXIMUM
