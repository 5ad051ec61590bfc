"""The rules about metadata that aborts the engine: it does abort, and no valid model of any architecture breaks one."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.support import architectures
from tests.support.child import in_child
from worker.catalog import gguf
from worker.catalog.modelfile import describe

STUCK_S = 60
CRASHES = {signal.SIGABRT, signal.SIGFPE, signal.SIGSEGV}
ABORTING: list[tuple[str, dict[str, Any]]] = [
    ("llama", {"block_count": 0}),
    ("llama", {"nextn_predict_layers": 5}),
    ("llama", {"expert_used_count": 2}),
    ("llama", {"rope.scaling.type": "spiral"}),
    ("llama", {"attention.head_count_kv": [2, 0, 2, 2]}),
    ("llama", {"attention.layer_norm_rms_epsilon": -1.0}),
    ("qwen2", {"rope.dimension_count": 32}),
    ("qwen2", {"attention.key_length": 32}),
    ("qwen", {"attention.value_length": 0}),
    ("phi3", {"rope.dimension_count": 33}),
    ("phi3", {"rope.dimension_count": 66}),
    ("bert", {"pooling_type": 7}),
    ("gemma2", {"attention.sliding_window_pattern": 1}),
    ("gemma2", {"rope.dimension_count_swa": 96}),
    ("qwen3moe", {"expert_used_count": [2, 0, 2, 2]}),
    ("minimax-m2", {"expert_gating_func": 0}),
    ("deepseek2", {"rope.dimension_count": 64}),
    ("deepseek2", {"attention.head_count_kv": 2}),
    ("deepseek2", {"attention.key_length": 192}),
    ("deepseek2", {"attention.temperature_scale": 0.5}),
    ("ernie4_5-moe", {"interleave_moe_layer_step": 0}),
    ("jamba", {"ssm.inner_size": 256}),
    ("rwkv6", {"token_shift_count": 1}),
    ("rwkv7", {"wkv.head_size": 63}),
    ("qwen35", {"full_attention_interval": 0}),
    ("qwen35", {"rope.dimension_sections": [0, 0, 0, 0]}),
    ("dbrx", {"expert_used_count": [2, 2, 2, 3]}),
    ("qwen35", {"block_count": 3}),
    ("qwen35", {"block_count": 1, "attention.recurrent_layers": [True]}),
    ("qwen3next", {"block_count": 3}),
    ("jamba", {"block_count": 1, "attention.head_count_kv": [0]}),
    ("granitehybrid", {"block_count": 1, "attention.head_count_kv": 0}),
    ("lfm2", {"block_count": 1, "attention.head_count_kv": 0}),
    ("nemotron_h", {"block_count": 1, "attention.head_count_kv": 0, "feed_forward_length": 0}),
    ("gemma4", {"attention.shared_kv_layers": 3}),
    ("paddleocr", {"rope.dimension_sections": None}),
    ("deepseek2", {"attention.head_count_kv": [1, 0, 1, 0]}),
    ("rwkv6", {"attention.head_count": 3}),
    ("wavtokenizer-dec", {"convnext.embedding_length": 64}),
]
UNUSUAL: list[tuple[str, dict[str, Any]]] = [
    ("starcoder", {"rope.dimension_count": 3}),  # which does not rotate
    ("ernie4_5-moe", {"interleave_moe_layer_step": 1024}),
    ("dbrx", {"expert_used_count": [3, 2, 2, 2]}),
    ("qwen35", {"attention.recurrent_layers": [True, True, True, False], "full_attention_interval": 1}),
]


def write(path: Path, architecture: str, metadata: dict[str, Any]) -> Path:
    return architectures.write(path, architecture, **{name.replace(".", "__"): v for name, v in metadata.items()})


def problem(path: Path) -> str:
    found = describe(gguf.read(path, whole=True)).problem
    return "" if found is None else found.message


def ends(paths: list[Path]) -> list[int]:
    """Load each model in a process of its own and decode a token; return the signals that ended these, 0 for none."""
    return [_end(path) for path in paths]


def _end(path: Path) -> int:
    pid = os.fork()
    if not pid:
        signal.alarm(STUCK_S)
        os.environ["GGML_NO_BACKTRACE"] = "1"
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        _load(path)
        os._exit(0)
    _, status = os.waitpid(pid, 0)
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def _load(path: Path) -> None:
    from llama_cpp import llama_cpp as lib

    model_params, params = lib.llama_model_default_params(), lib.llama_context_default_params()
    model_params.use_extra_bufts = False
    model = lib.llama_model_load_from_file(str(path).encode(), model_params)
    if not model:
        return
    params.n_ctx = params.n_batch = params.n_ubatch = 256
    params.n_threads = params.n_threads_batch = 1
    params.embeddings = True
    context = lib.llama_init_from_model(model, params)
    if context:
        lib.llama_decode(context, lib.llama_batch_get_one((lib.llama_token * 1)(1), 1))


def test_a_model_of_any_architecture_is_accepted(tmp_path: Path) -> None:
    for architecture in architectures.DESCRIBED:
        assert problem(write(tmp_path / "m.gguf", architecture, {})) == "", architecture


@pytest.mark.timeout(240)
def test_what_is_refused_would_abort_the_engine(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.gguf", *case) for n, case in enumerate(ABORTING)]
    assert [case for case, path in zip(ABORTING, paths, strict=True) if not problem(path)] == []
    assert [case for case, end in zip(ABORTING, in_child(ends, paths), strict=True) if end not in CRASHES] == []


def test_what_is_unusual_but_works_is_accepted(tmp_path: Path) -> None:
    paths = [write(tmp_path / f"{n}.gguf", *case) for n, case in enumerate(UNUSUAL)]
    assert [problem(path) for path in paths] == [""] * len(UNUSUAL)
    assert in_child(ends, paths) == [0] * len(UNUSUAL)
