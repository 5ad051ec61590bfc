"""Parameters of llama.cpp for a request: never a combination on which it aborts."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import assume, example, given
from hypothesis import strategies as st
from msgspec import UNSET, structs

from api.pool.limits import check
from shared.errors import InvalidValue
from shared.memory.plan import ENCODED, IDLE, MEAN, MOST_SEQUENCES, OUTPUT_BYTES, UBATCH, with_settings
from shared.schema.http import LoadRequest
from shared.schema.model import RECURRENT, Dimensions, Model, ModelSettings
from shared.settings import Settings
from worker.runner.parameters import plan
from worker.runner.protocol import Load

UINT32 = 2**32 - 1
LAST = 3  # llama.cpp's LLAMA_POOLING_TYPE_LAST


def model(**fields: Any) -> Model:
    made: dict[str, Any] = {
        "key": "p/m",
        "base": "p/m",
        "variant": "",
        "shards": ["p/m/m.gguf"],
        "size_bytes": 1000,
        "architecture": "llama",
        "max_context_length": 8192,
    }
    return Model(**{**made, **fields})


def dimensions(vocabulary: int | None) -> Dimensions:
    return Dimensions(
        block_count=2,
        embedding_length=64,
        head_count=4,
        head_count_kv=2,
        key_length=32,
        value_length=32,
        vocabulary=vocabulary,
    )


def request(**fields: Any) -> LoadRequest:
    return LoadRequest(model="p/m", **fields)


def planned(load_request: LoadRequest, of: Model, **settings: Any) -> Load:
    check(load_request, of)
    return plan(load_request, of, Settings(**settings), [], [])


def optional(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


tokens = st.integers(1, 64) | st.sampled_from([100, 255, 256, 511, 512, 513, 2048, 4096, 32768, 131072, 2**31 - 1])
requests = optional(
    context_length=tokens,
    eval_batch_size=tokens | st.just(2**63 - 1),
    flash_attention=st.booleans(),
    num_experts=st.integers(1, 300) | st.just(2**32 + 3),
    offload_kv_cache_to_gpu=st.booleans(),
    kv_cache_type=st.sampled_from(["f16", "q8_0", "q4_0"]),
    parallel=st.integers(1, 64),
    physical_batch_size=tokens,
).map(lambda fields: request(**fields))
models = st.fixed_dictionaries(
    {
        "type": st.sampled_from(["llm", "embedding"]),
        "max_context_length": tokens,
        "expert_count": st.sampled_from([0, 1, 2, 8, 128]),
        "causal": st.booleans(),
        "pooling": st.integers(-1, 4),
        "architecture": st.sampled_from(["llama", "mamba", "jamba"]),
        "dimensions": st.none() | (st.none() | st.integers(0, 2**31 - 1)).map(dimensions),
    }
).map(lambda fields: model(**fields))
settings = optional(
    context_length=tokens,
    eval_batch_size=tokens | st.just(2**63 - 1),
    flash_attention=st.sampled_from(["auto", "on", "off"]),
    offload_kv_cache_to_gpu=st.booleans(),
).map(lambda fields: Settings(models_dir=Path("/models"), **fields))


@given(requests, models, settings)
@example(request(parallel=64), model(max_context_length=1), Settings())
@example(request(parallel=64), model(max_context_length=64), Settings(context_length=1, eval_batch_size=1))
@example(request(parallel=64, context_length=64), model(), Settings(eval_batch_size=1))
@example(request(eval_batch_size=1), model(max_context_length=1), Settings())
@example(request(eval_batch_size=2**63 - 1), model(), Settings())
@example(request(parallel=8), model(type="embedding", max_context_length=1), Settings())
def test_no_plan_makes_llama_cpp_abort(load_request: LoadRequest, of: Model, defaults: Settings) -> None:
    try:
        check(load_request, of)
    except InvalidValue:
        return
    load = plan(load_request, of, defaults, [], [])
    assert 1 <= load.parallel <= load.n_seq_max <= MOST_SEQUENCES, "more sequences are refused"
    assert load.n_seq_max <= load.n_ubatch <= load.n_batch, "n_batch < n_seq_max aborts in a model with an encoder"
    assert load.n_seq_max <= load.n_outputs_max <= load.n_batch, "n_outputs_max < n_seq_max aborts"
    assert load.n_outputs_max == load.n_batch or not load.embedding, "it outputs every token; more outputs abort"
    assert load.kv_type == "f16" or load.flash_attn, "llama.cpp refuses a quantized cache without flash attention"
    assert 1 <= load.n_ubatch <= load.n_batch, "a physical batch is part of a logical one"
    assert load.n_batch <= load.n_ctx or of.type == "embedding"
    assert load.n_ctx <= of.max_context_length, "an encoder's position past the maximum aborts"
    assert max(load.n_ctx, load.n_batch) <= UINT32, "llama.cpp would truncate the value to 32 bits"
    if of.type == "embedding" and (not of.causal or of.pooling == MEAN):
        assert load.n_ubatch >= load.n_ctx, "an encoder's input longer than n_ubatch aborts"
    assert load.n_ubatch % load.n_seq_max == 0 or not load.embedding, "it aborts with mean pooling"
    if load.expert_override is not None:
        assert of.expert_count > 0
        assert 1 <= load.expert_override[1] <= of.expert_count, "any other number of experts aborts"
        assert load.expert_override[0] == f"{of.architecture}.expert_used_count"


@given(requests, models, settings)
def test_a_plan_has_the_values_of_the_request(load_request: LoadRequest, of: Model, defaults: Settings) -> None:
    try:
        check(load_request, of)
    except InvalidValue:
        assume(False)
    load = plan(load_request, of, defaults, [], [])
    if load_request.context_length is not UNSET:
        assert load.n_ctx == load_request.context_length
    if of.type == "embedding":
        assert (load.kv_type, load.flash_attn, load.expert_override, load.moe) == ("f16", None, None, False)
        return
    assert load.parallel == (min(4, load.n_ubatch) if load_request.parallel is UNSET else load_request.parallel)
    assert load.kv_type == ("f16" if load_request.kv_cache_type is UNSET else load_request.kv_cache_type)
    if load_request.eval_batch_size is not UNSET:
        assert load.n_batch == min(load_request.eval_batch_size, load.n_ctx)
    if load_request.physical_batch_size is not UNSET:
        assert load.n_ubatch == min(load_request.physical_batch_size, load.n_batch)
    if load_request.flash_attention is not UNSET:
        assert load.flash_attn is load_request.flash_attention
    if load_request.offload_kv_cache_to_gpu is not UNSET:
        assert load.offload_kqv is load_request.offload_kv_cache_to_gpu
    given_experts = of.expert_count > 0 and load_request.num_experts is not UNSET
    assert (load.expert_override is not None) == given_experts


# ---- the contract's defaults


@pytest.mark.parametrize(("maximum", "n_ctx", "n_batch"), [(8192, 4096, 512), (4096, 4096, 512), (300, 300, 300)])
def test_the_defaults_of_a_language_model(maximum: int, n_ctx: int, n_batch: int) -> None:
    load = planned(request(), model(max_context_length=maximum))
    assert (load.n_ctx, load.n_batch, load.n_ubatch, load.parallel) == (n_ctx, n_batch, n_batch, 4)
    assert (load.flash_attn, load.offload_kqv, load.expert_override, load.kv_type) == (None, True, None, "f16")
    assert not load.embedding


@pytest.mark.parametrize(
    ("causal", "pooling", "n_ctx", "n_ubatch"),
    [
        (False, MEAN, 8192, 8192),
        (False, 2, 8192, 8192),
        (True, LAST, 4096, UBATCH),
        (True, MEAN, 4096, 4096),
        (True, -1, 4096, UBATCH),
    ],
)
def test_the_defaults_of_an_embedding_model(causal: bool, pooling: int, n_ctx: int, n_ubatch: int) -> None:
    load = planned(request(), model(type="embedding", causal=causal, pooling=pooling))
    assert (load.n_ctx, load.n_batch, load.n_ubatch, load.embedding) == (n_ctx, n_ctx, n_ubatch, True)


def test_the_default_batch_of_an_encoder_is_bounded() -> None:
    encoder = model(type="embedding", causal=False, max_context_length=131_072)
    assert planned(request(), encoder).n_ubatch == ENCODED
    assert planned(request(context_length=16_384), encoder).n_ubatch == 16_384


def test_settings_are_the_defaults_of_a_request() -> None:
    defaults = {
        "context_length": 1000,
        "eval_batch_size": 64,
        "flash_attention": "off",
        "offload_kv_cache_to_gpu": False,
    }
    load = planned(request(), model(), **defaults)
    assert (load.n_ctx, load.n_batch, load.flash_attn, load.offload_kqv) == (1000, 64, False, False)
    load_request = request(
        context_length=2000, eval_batch_size=2000, flash_attention=True, offload_kv_cache_to_gpu=True
    )
    load = planned(load_request, model(), **defaults)
    assert (load.n_ctx, load.n_batch, load.flash_attn, load.offload_kqv) == (2000, 2000, True, True)


# ---- sequences and outputs


@pytest.mark.parametrize(
    ("parallel", "n_vocabulary", "n_seq_max", "n_outputs_max"),
    [
        (1, 49_152, 16, 32),
        (4, 49_152, 16, 32),
        (20, 49_152, 32, 32),
        (64, 49_152, 68, 68),
        (4, 151_936, 16, 32),
        (4, 1 << 20, 8, 8),
        (64, 1 << 20, 68, 68),
        (4, None, 16, 32),
    ],
)
def test_idle_sequences_and_outputs_take_bounded_bytes(
    parallel: int, n_vocabulary: int | None, n_seq_max: int, n_outputs_max: int
) -> None:
    load = planned(request(parallel=parallel), model(dimensions=dimensions(n_vocabulary)))
    assert (load.parallel, load.n_seq_max, load.n_outputs_max) == (parallel, n_seq_max, n_outputs_max)
    least, most = IDLE
    assert least <= load.n_seq_max - parallel <= most
    if n_seq_max > parallel + least:
        assert 4 * n_seq_max * (n_vocabulary or 1) <= OUTPUT_BYTES


@pytest.mark.parametrize("architecture", sorted(RECURRENT))
def test_a_recurrent_model_has_no_idle_sequences(architecture: str) -> None:
    load = planned(request(parallel=3), model(architecture=architecture))
    assert (load.parallel, load.n_seq_max, load.n_outputs_max) == (3, 3, 32)


def test_a_small_batch_limits_the_sequences() -> None:
    load = planned(request(eval_batch_size=2), model())
    assert (load.parallel, load.n_seq_max, load.n_outputs_max, load.n_batch) == (2, 2, 2, 2)
    assert planned(request(context_length=3), model()).parallel == 3
    assert planned(request(), model(), eval_batch_size=1).parallel == 1
    assert planned(request(parallel=6), model(), eval_batch_size=1).n_seq_max == 6


@pytest.mark.parametrize(
    ("n_vocabulary", "maximum", "n_seq_max"),
    [(30_522, 512, 64), (30_522, 8192, 256), (151_936, 8192, 32), (30_522, 100, 8), (30_522, 7, 1)],
)
def test_a_batch_of_an_embedding_model_has_many_sequences(n_vocabulary: int, maximum: int, n_seq_max: int) -> None:
    of = model(type="embedding", causal=False, max_context_length=maximum, dimensions=dimensions(n_vocabulary))
    load = planned(request(), of)
    assert (load.n_ctx, load.n_seq_max) == (maximum, n_seq_max)
    assert maximum <= load.n_batch < maximum + n_seq_max


def test_a_quantized_cache_turns_flash_attention_on() -> None:
    load = planned(request(kv_cache_type="q8_0"), model(), flash_attention="off")
    assert (load.kv_type, load.flash_attn) == ("q8_0", True)
    assert planned(request(kv_cache_type="f16"), model(), flash_attention="off").flash_attn is False


def test_a_plan_has_absolute_files_and_given_devices() -> None:
    settings = Settings(models_dir=Path("/models"))
    load = plan(request(), model(shards=["a/b-1.gguf", "a/b-2.gguf"]), settings, ["GPU-b", "GPU-a"], [3, 1])
    assert load.shards == ["/models/a/b-1.gguf", "/models/a/b-2.gguf"]
    assert (load.devices, load.layers) == (["GPU-b", "GPU-a"], [3, 1])


# ---- refusals by the API


@pytest.mark.parametrize(
    ("fields", "of", "param", "maximum"),
    [
        ({"context_length": 8193}, {}, "context_length", 8192),
        ({"context_length": 513}, {"type": "embedding", "max_context_length": 512}, "context_length", 512),
        ({"num_experts": 9}, {"expert_count": 8}, "num_experts", 8),
        ({"parallel": 64, "context_length": 63}, {}, "parallel", 63),
        ({"parallel": 64, "eval_batch_size": 63}, {}, "parallel", 63),
        ({"parallel": 64, "physical_batch_size": 63}, {}, "parallel", 63),
        ({"parallel": 2}, {"max_context_length": 1}, "parallel", 1),
    ],
)
def test_a_refusal_names_the_value_and_the_maximum(
    fields: dict[str, Any], of: dict[str, Any], param: str, maximum: int
) -> None:
    with pytest.raises(InvalidValue) as caught:
        check(request(**fields), model(**of))
    assert (caught.value.param, caught.value.detail) == (param, {"maximum": maximum})
    assert {str(fields[param]), str(maximum)} <= {*re.findall(r"\d+", str(caught.value))}


@pytest.mark.parametrize(
    ("fields", "of", "words"),
    [
        ({"flash_attention": False}, {}, ["'q8_0'", "'flash_attention'"]),
        ({}, {"key_length": 80}, ["'q8_0'", "80", "32"]),
        ({}, {"value_length": 48}, ["'q8_0'", "48", "32"]),
    ],
)
def test_a_quantized_cache_the_engine_would_refuse_is_refused(
    fields: dict[str, Any], of: dict[str, Any], words: list[str]
) -> None:
    shape = structs.replace(dimensions(1000), **of)
    with pytest.raises(InvalidValue) as caught:
        check(request(kv_cache_type="q8_0", **fields), model(dimensions=shape))
    assert caught.value.param == "kv_cache_type"
    assert all(word in str(caught.value) for word in words)
    check(request(kv_cache_type="f16", **fields), model(dimensions=shape))
    check(request(kv_cache_type="q8_0", **fields), model(type="embedding", dimensions=shape))


@pytest.mark.parametrize(
    ("fields", "of"),
    [
        ({"num_experts": 9}, {}),  # no effect on a dense model
        ({"num_experts": 9, "parallel": 64, "eval_batch_size": 1}, {"type": "embedding"}),
        ({"num_experts": 8}, {"expert_count": 8}),
        ({"context_length": 8192, "parallel": 64, "eval_batch_size": 64}, {}),
    ],
)
def test_a_field_without_effect_is_not_refused(fields: dict[str, Any], of: dict[str, Any]) -> None:
    check(request(**fields), model(**of))


# ---- the settings of the model


OWN = ModelSettings(context_length=2048, parallel=8, kv_cache_type="q8_0", ttl_seconds=60)


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, {"context_length": 2048, "parallel": 8, "kv_cache_type": "q8_0", "ttl_seconds": 60}),
        ({"parallel": 1, "ttl_seconds": 5}, {"parallel": 1, "ttl_seconds": 5}),
        ({"context_length": 4}, {"context_length": 4, "parallel": 4}),
        ({"physical_batch_size": 2}, {"parallel": 2}),
        ({"flash_attention": False}, {"kv_cache_type": UNSET}),
        ({"kv_cache_type": "f16"}, {"kv_cache_type": "f16"}),
    ],
)
def test_a_request_gets_the_settings_that_it_leaves_out(request_: dict[str, Any], expected: dict[str, Any]) -> None:
    settled = with_settings(LoadRequest(model="p/m", **request_), model(settings=OWN))
    assert {name: getattr(settled, name) for name in expected} == expected
    check(settled, model(settings=OWN))


def test_only_what_an_embedding_model_has_is_set() -> None:
    settled = with_settings(LoadRequest(model="p/m"), model(type="embedding", settings=OWN))
    assert settled == LoadRequest(model="p/m", context_length=2048, ttl_seconds=60)


def test_a_pinned_model_has_no_ttl() -> None:
    pinned = structs.replace(OWN, pin=True)
    assert with_settings(LoadRequest(model="p/m"), model(settings=pinned)).ttl_seconds is UNSET
