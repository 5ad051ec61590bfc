"""Synthetic models: their files, and loading them with llama.cpp on the CPU and on a fake GPU."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from shared.synthetic import models as synthetic
from tests.support.child import in_child

GGML_LOG_LEVEL_ERROR = 4
CONTEXT_LENGTH = 1024
KV_BYTES = 1 << 20  # of a tiny llama at that length: 4 layers x 1024 tokens x (K + V) x 2 heads x 32 x 2 bytes


def field(path: Path, key: str) -> Any:
    value = GGUFReader(path).get_field(key)
    return value and value.contents()


# --- files ---


@pytest.mark.parametrize(
    "make",
    [
        synthetic.tiny_llama,
        synthetic.tiny_moe,
        synthetic.tiny_embedding,
        synthetic.tiny_bert,
        synthetic.tiny_gemma3,
        synthetic.mmproj,
        synthetic.lora,
        synthetic.vocab_only,
        lambda path: synthetic.big(path, 0.1, "Q4_0", vocabulary=1024)[0],
        lambda path: synthetic.large_vocabulary(path, tokens=20_000)[0],
    ],
)
def test_the_same_arguments_give_the_same_bytes(make: Callable[[Path], Path], tmp_path: Path) -> None:
    first, second = make(tmp_path / "first" / "model.gguf"), make(tmp_path / "second" / "model.gguf")
    assert first.read_bytes() == second.read_bytes()


def test_metadata_is_replaced_and_dropped_by_name(tmp_path: Path) -> None:
    path = synthetic.tiny_llama(
        tmp_path / "model.gguf",
        metadata={"general.architecture": "llamx", "llama.block_count": 0, "llama.expert_count": -1},
        drop={"general.file_type", "output_norm.weight"},
    )
    assert field(path, "general.architecture") == "llamx"
    assert field(path, "llama.block_count") == 0
    assert field(path, "llama.expert_count") == -1
    assert field(path, "general.file_type") is None
    assert "output_norm.weight" not in {tensor.name for tensor in GGUFReader(path).tensors}


def test_a_failed_write_leaves_only_the_old_file(tmp_path: Path) -> None:
    path = synthetic.tiny_llama(tmp_path / "model.gguf")
    before = path.read_bytes()
    with pytest.raises(IndexError):
        synthetic.tiny_llama(path, metadata={"general.tags": []})  # GGUF has no element type for an empty array
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_only_the_first_shard_has_the_architecture(tmp_path: Path) -> None:
    shards = synthetic.sharded(tmp_path / "model.gguf", 3)
    assert [shard.name for shard in shards] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    assert [field(shard, "split.no") for shard in shards] == [0, 1, 2]
    assert [field(shard, "general.architecture") for shard in shards] == ["llama", None, None]


def test_a_big_file_has_its_size_within_half_a_layer(tmp_path: Path) -> None:
    (path,) = synthetic.big(tmp_path / "model.gguf", 0.5, "Q4_0")
    layer = (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 11008) * 18 / 32  # 18 bytes for 32 weights
    assert abs(path.stat().st_size - 0.5e9) < layer / 2 + 2e6


def test_a_sparse_file_has_the_size_but_uses_no_disk_blocks(tmp_path: Path) -> None:
    (path,) = synthetic.sparse_shape(tmp_path / "model.gguf", "llama2-7b", "Q4_K_M")
    status = path.stat()
    assert status.st_size > 3.7e9
    assert status.st_blocks * 512 < 4e6
    assert field(path, "general.size_label") == "6.7B"


def test_copies_of_a_large_vocabulary_are_separate_files(tmp_path: Path) -> None:
    places = [tmp_path / str(n) / "model.gguf" for n in range(3)]
    assert synthetic.large_vocabulary(*places, tokens=5000) == places
    assert len({place.stat().st_ino for place in places}) == 3
    assert len(field(places[2], "tokenizer.ggml.tokens")) == 5000


def test_the_demo_models_describe_themselves_as_random(tmp_path: Path) -> None:
    keys = synthetic.write_demo(tmp_path)
    assert keys == ["loadstone/demo-llm", "loadstone/demo-moe", "loadstone/demo-embedding"]
    paths = [tmp_path / key / f"{key.split('/')[1]}-f16.gguf" for key in keys]
    assert sorted(path for path in tmp_path.rglob("*") if path.is_file()) == sorted(paths)
    for path in paths:
        assert "random weights" in field(path, "general.name")
        assert "nonsense" in field(path, "general.description")


# --- in llama.cpp ---


@contextmanager
def model_of(path: Path, **overrides: Any) -> Iterator[Any]:
    """Load a model with all layers offloaded; yield None if llama.cpp refuses it."""
    from llama_cpp import llama_cpp as lib

    lib.llama_log_set(_errors_only(), ctypes.c_void_p(0))
    params = lib.llama_model_default_params()
    params.n_gpu_layers = -1
    params.use_extra_bufts = False  # with AMX a quantized matrix may crash: github.com/ggml-org/llama.cpp/issues/20824
    for key, value in overrides.items():
        setattr(params, key, value)
    model = lib.llama_model_load_from_file(str(path).encode(), params)
    try:
        yield model
    finally:
        if model:
            lib.llama_model_free(model)


@cache
def _errors_only() -> Any:
    """Return a log callback, kept alive by the cache, that writes errors only to the output of the test."""
    from llama_cpp import llama_cpp as lib

    def log(level: int, text: bytes, _: Any) -> None:
        if level == GGML_LOG_LEVEL_ERROR:
            sys.stderr.write(text.decode(errors="replace"))

    return lib.llama_log_callback(log)


@contextmanager
def context_of(model: Any, **params: Any) -> Iterator[Any]:
    from llama_cpp import llama_cpp as lib

    defaults = lib.llama_context_default_params()
    for name, value in ({"n_ctx": CONTEXT_LENGTH, "n_threads": 1} | params).items():
        setattr(defaults, name, value)
    context = lib.llama_init_from_model(model, defaults)
    assert context, params
    try:
        yield context
    finally:
        lib.llama_free(context)


def outputs(path: Path, text: bytes, *, is_embedding: bool) -> list[float] | None:
    """Return the embedding of the text, or the logits after it; None if the model does not load."""
    from llama_cpp import llama_cpp as lib

    with model_of(path) as model:
        if not model:
            return None
        vocabulary = lib.llama_model_get_vocab(model)
        tokens = (lib.llama_token * 64)()
        n_tokens = lib.llama_tokenize(vocabulary, text, len(text), tokens, 64, True, True)
        assert 0 < n_tokens <= len(text) + 2
        with context_of(model, embeddings=is_embedding) as context:
            assert lib.llama_decode(context, lib.llama_batch_get_one(tokens, n_tokens)) == 0
            if is_embedding:
                return list(lib.llama_get_embeddings_seq(context, 0)[: lib.llama_model_n_embd(model)])
            return list(lib.llama_get_logits_ith(context, -1)[: lib.llama_vocab_n_tokens(vocabulary)])


def outputs_of_all_models(directory: Path) -> dict[str, list[list[float] | None]]:
    """Return the outputs of each model for two texts."""
    llm, moe, embedding = (next((directory / key).iterdir()) for key in synthetic.write_demo(directory))
    models = {
        "llm": llm,
        "moe": moe,
        "embedding": embedding,
        "spm": synthetic.tiny_llama(directory / "spm.gguf"),
        "bert": synthetic.tiny_bert(directory / "bert.gguf"),
        "gemma3": synthetic.tiny_gemma3(directory / "gemma3.gguf"),
        "sharded": synthetic.sharded(directory / "sharded.gguf")[0],
        "quantized": synthetic.big(directory / "big.gguf", 0.1, "Q4_0", vocabulary=1024)[0],
        "large vocabulary": synthetic.large_vocabulary(directory / "large.gguf", tokens=20_000)[0],
    }
    return {
        name: [outputs(path, text, is_embedding=name in {"embedding", "bert"}) for text in (b"Hello World", b"token")]
        for name, path in models.items()
    }


def test_llama_cpp_loads_and_runs_every_kind_of_model(tmp_path: Path) -> None:
    for name, (one, other) in in_child(outputs_of_all_models, tmp_path).items():
        assert one, name
        assert all(map(math.isfinite, one)), name
        assert one != other, f"{name}: the same output for both texts"


def loadable(*paths: Path) -> list[str]:
    loaded = []
    for path in paths:
        with model_of(path) as model:
            if model:
                loaded.append(path.name)
    return loaded


def test_llama_cpp_refuses_files_with_a_defect(tmp_path: Path) -> None:
    wrong = [
        synthetic.tiny_llama(tmp_path / "no-tensor.gguf", drop={"blk.2.attn_q.weight"}),
        synthetic.tiny_llama(tmp_path / "no-length.gguf", drop={"llama.context_length"}),
        synthetic.tiny_moe(tmp_path / "unknown.gguf", metadata={"general.architecture": "llamx"}),
        synthetic.mmproj(tmp_path / "mmproj.gguf"),
        synthetic.lora(tmp_path / "lora.gguf"),
        synthetic.vocab_only(tmp_path / "vocabulary.gguf"),
        synthetic.sharded(tmp_path / "sharded.gguf")[1],
    ]
    right = synthetic.tiny_llama(tmp_path / "right.gguf", drop={"general.size_label", "tokenizer.chat_template"})
    assert in_child(loadable, *wrong, right) == ["right.gguf"]


def fake_gpu_bytes(path: Path) -> dict[str, int]:
    """Return the bytes in use of a fake GPU of 64 MiB after each step of loading and freeing a model."""
    from llama_cpp import llama_cpp as lib

    from tests.support import fakegpu

    lib.llama_backend_init()
    gpu = fakegpu.add("FAKE0", 64 << 20)
    held = {}
    with model_of(path) as model:
        held["weights"] = gpu.used_bytes
        for offloads_kv in (True, False):
            with context_of(model, offload_kqv=offloads_kv):
                held[f"context, offloads_kv={offloads_kv}"] = gpu.used_bytes
    held["freed"] = gpu.used_bytes
    return held


def test_a_fake_gpu_holds_and_frees_weights_and_kv_cache(tmp_path: Path) -> None:
    path = synthetic.tiny_llama(tmp_path / "model.gguf")
    held = in_child(fake_gpu_bytes, path)
    embeddings = next(tensor.n_bytes for tensor in GGUFReader(path).tensors if tensor.name == "token_embd.weight")
    n_bytes = sum(int(tensor.n_bytes) for tensor in GGUFReader(path).tensors)
    assert held["weights"] == pytest.approx(n_bytes - embeddings, rel=0.05)  # the embedding matrix stays on the CPU
    on_gpu, on_cpu = held["context, offloads_kv=True"], held["context, offloads_kv=False"]
    assert on_gpu - on_cpu == pytest.approx(KV_BYTES, rel=0.5)  # the compute buffers differ too
    assert held["freed"] == 0


def refusals(path: Path) -> tuple[list[str], int]:
    """Load the model on each of two fake GPUs, one without room; return the refusals and the bytes still in use."""
    from llama_cpp import llama_cpp as lib

    from tests.support import fakegpu

    lib.llama_backend_init()
    gpus = [fakegpu.add("FAKE0", 64 << 20), fakegpu.add("FAKE1", 100 << 10)]
    refused = []
    for index, gpu in enumerate(gpus):
        with model_of(path, split_mode=lib.LLAMA_SPLIT_MODE_NONE, main_gpu=index) as model:
            if not model:
                refused.append(gpu.name)
    return refused, sum(gpu.used_bytes for gpu in gpus)


def test_a_fake_gpu_keeps_nothing_of_a_refused_load(tmp_path: Path) -> None:
    assert in_child(refusals, synthetic.tiny_llama(tmp_path / "model.gguf")) == (["FAKE1"], 0)
