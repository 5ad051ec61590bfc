"""What an estimate promises whatever the header says; tests/integration compares it with the engine."""

from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from shared.memory.estimate import CELLS, MOST_BYTES, Requirements, requirements_of
from shared.memory.placement import largest_context_length
from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.schema.memory import Usage
from shared.schema.model import Dimensions, Model, Weights
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
    """Llama 3 8B, but for these fields."""
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


def requirements(found: Model, **fields: Any) -> Requirements:
    return requirements_of(found, plan(LoadRequest(model="p/m", **fields), found, SETTINGS))


def on_one(needed: Requirements, kind: Kind) -> Usage:
    """What one device takes that has all of it."""
    return needed.on_cpu() if kind == "cpu" else needed.on_gpu("D", 0, needed.n_layers)


def of(found: Model, kind: Kind = "gpu", **fields: Any) -> Usage:
    return on_one(requirements(found, **fields), kind)


# ---- whatever the header says

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
        "parallel": st.integers(1, 64),
    },
)


@given(models, kinds, options, st.data())
def test_more_context_never_takes_less(found: Model, kind: Kind, asked: dict[str, Any], data: st.DataObject) -> None:
    lengths = st.integers(1, found.max_context_length)
    less, more = sorted([data.draw(lengths), data.draw(lengths)])
    before, after = (of(found, kind, context_length=length, **asked) for length in (less, more))
    assert before.weights_bytes == after.weights_bytes
    assert before.context_bytes <= after.context_bytes
    assert before.compute_bytes <= after.compute_bytes
    assert 0 <= after.total_bytes < 2**63, "what JSON can hold here"


@given(models, kinds, st.integers(64, 4096), st.integers(64, 4096))
def test_a_larger_batch_more_experts_and_no_flash_attention_never_take_less(
    found: Model, kind: Kind, one: int, other: int
) -> None:
    less, more = sorted([one, other])
    usual: dict[str, Any] = {"eval_batch_size": less, "flash_attention": True, "num_experts": 1}
    small = of(found, kind, **usual)
    dearer: list[dict[str, Any]] = [{"eval_batch_size": more}, {"flash_attention": False}, {"num_experts": 8}]
    for asked in dearer:
        assert of(found, kind, **usual | asked).total_bytes >= small.total_bytes, asked


@given(models, options)
def test_a_gpu_never_takes_more_than_the_host_would(found: Model, asked: dict[str, Any]) -> None:
    asked = asked | {"offload_kv_cache_to_gpu": True}
    assert of(found, "gpu", **asked).total_bytes <= of(found, "cpu", **asked).total_bytes


@given(models, options, st.data())
def test_the_parts_of_several_devices_are_the_whole_with_a_compute_buffer_for_each(
    found: Model, asked: dict[str, Any], data: st.DataObject
) -> None:
    needed = requirements(found, **asked)
    cut = data.draw(st.integers(0, needed.n_layers - 1))
    first, last = needed.on_gpu("D", 0, cut), needed.on_gpu("E", cut, needed.n_layers)
    whole = on_one(needed, "gpu")
    assert first.weights_bytes + last.weights_bytes >= whole.weights_bytes, "but for what is over the largest number"
    assert first.context_bytes + last.context_bytes >= whole.context_bytes
    assert first.compute_bytes <= last.compute_bytes == whole.compute_bytes
    with_cpu = needed.beside_gpus(cut)
    assert with_cpu.weights_bytes <= on_one(needed, "cpu").weights_bytes
    if cut == 0:
        assert with_cpu.compute_bytes == min(needed.host_compute_bytes, MOST_BYTES)


@given(models, kinds, options, st.integers(0, 2**40))
def test_the_largest_context_is_the_largest_that_fits(
    found: Model, kind: Kind, asked: dict[str, Any], free_bytes: int
) -> None:
    def fits(needed: Requirements) -> bool:
        return on_one(needed, kind).total_bytes <= free_bytes

    largest = largest_context_length(LoadRequest(model="p/m", **asked), found, SETTINGS, fits)
    if largest is not None:
        assert largest == found.max_context_length or largest % CELLS == 0
        assert fits(requirements(found, context_length=largest, **asked))
    if largest != found.max_context_length:
        more = min((largest or 0) + CELLS, found.max_context_length)
        assert not fits(requirements(found, context_length=more, **asked))


# ---- what counts


def test_what_is_asked_for_counts() -> None:
    """Against sums that anybody can do: 32 blocks, 8 heads, keys and values of 128 elements, as F16."""
    default = of(model())
    assert default.context_bytes == 32 * 8 * 2 * 128 * 2 * 4096
    assert default.weights_bytes == 4_330_000_000, "the embeddings stay in the host's memory"
    assert of(model(), "cpu").weights_bytes == 4_630_000_000
    assert of(model(), context_length=4097).context_bytes == default.context_bytes // 16 * 17
    assert of(model(), parallel=8).context_bytes == default.context_bytes
    beside = of(model(), offload_kv_cache_to_gpu=False)
    assert beside.context_bytes == 0
    assert beside.compute_bytes == default.compute_bytes + default.context_bytes // 32, "a block's cache comes over"
    assert of(model(), "cpu", offload_kv_cache_to_gpu=False) == of(model(), "cpu")


def test_a_matrix_that_is_both_embedding_and_output_is_on_the_gpu_too() -> None:
    tied = Weights(input_bytes=300, repeating_bytes=4000, output_bytes=1, has_output=False)
    assert of(model(weights=tied)).weights_bytes == 4301
    assert of(model(weights=tied), "cpu").weights_bytes == 4301


def test_an_encoder_has_no_cache() -> None:
    encoder = model(type="embedding", architecture="bert", causal=False, max_context_length=512)
    assert of(encoder).context_bytes == 0
    assert requirements(encoder).exact


def test_blocks_that_differ_each_count_as_they_are() -> None:
    uneven = structs.replace(LLAMA, block_count=3, head_count_kv=[8, 0, 4])
    assert of(model(dimensions=uneven)).context_bytes == 12 * 2 * 128 * 2 * 4096


UNSURE: dict[str, tuple[Model, dict[str, Any]]] = {
    "an architecture that was not compared": (model(architecture="deepseek2"), {}),
    "one that has no KV cache of this kind": (model(architecture="mamba"), {}),
    "an encoder that was not compared": (model(architecture="nomic-bert", causal=False, type="embedding"), {}),
    "a decoder that looks at its whole input": (model(causal=False, type="embedding"), {}),
    "a reranker": (model(type="embedding", pooling=4), {}),
    "a header that was not read to the end": (model(weights=None), {}),
    "a header without dimensions": (model(dimensions=None), {}),
    "a KV cache beside the GPU": (model(), {"offload_kv_cache_to_gpu": False}),
}


@pytest.mark.parametrize("case", UNSURE)
def test_what_was_not_compared_with_the_engine_is_not_called_exact(case: str) -> None:
    found, asked = UNSURE[case]
    guess = requirements(found, **asked)
    assert not guess.is_exact(n_gpus=1, on_cpu=0)
    assert on_one(guess, "gpu").weights_bytes > 4_000_000_000, "it is a guess all the same"
    assert requirements(model()).is_exact(n_gpus=1, on_cpu=0)


def test_only_one_device_that_has_all_of_it_was_compared_with_the_engine() -> None:
    needed = requirements(model())
    assert needed.is_exact(n_gpus=0, on_cpu=33)
    assert not needed.is_exact(n_gpus=2, on_cpu=0)
    assert needed.is_exact(n_gpus=1, on_cpu=1)


def test_an_unknown_vocabulary_is_taken_for_a_large_one() -> None:
    guess = requirements(model(dimensions=structs.replace(LLAMA, vocabulary=None)))
    assert not guess.exact
    assert guess.compute_bytes > requirements(model()).compute_bytes


def test_gpus_take_the_last_layers_and_the_cpu_the_first_and_the_embeddings() -> None:
    """32 blocks and the output are 33 layers; each block has 3.9 GB / 32."""
    needed = requirements(model())
    assert needed.n_layers == 33
    assert needed.on_gpu("D", 17, 33).weights_bytes == 15 * 3_900_000_000 // 32 + 430_000_000
    assert needed.on_gpu("D", 1, 17).weights_bytes == 16 * 3_900_000_000 // 32, "the output is on the last one only"
    assert needed.on_gpu("D", 1, 17).context_bytes == 16 * 8 * 2 * 128 * 2 * 4096
    beside = needed.beside_gpus(17)
    assert beside.weights_bytes == 300_000_000 + 17 * 3_900_000_000 // 32
    assert beside.context_bytes == 17 * 8 * 2 * 128 * 2 * 4096


def test_the_largest_context_is_that_of_the_request_with_all_else_that_it_asks_for() -> None:
    with_flash, without = (
        largest_context_length(
            LoadRequest(model="p/m", flash_attention=flash, context_length=512),
            model(),
            SETTINGS,
            lambda needed: needed.single(0) <= 8 << 30,
        )
        for flash in (True, False)
    )
    assert with_flash is not None
    assert without is not None
    assert 0 < without < with_flash < MAXIMUM
