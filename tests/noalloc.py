"""What llama.cpp itself says a load would take: a dry run that allocates and reads nothing.

With `no_alloc` the engine builds the model and the context, and sums up what it would have allocated; its function
`llama_get_memory_breakdown` tells, which llama.cpp 0c1e57098 has no C interface for.  It returns a std::map by value,
whose nodes are laid out here as libstdc++ has them on x86-64.  For tests only.

`python -m tests.noalloc [GPU]` is a process of its own, since the engine may not be in that of the tests: it reads a
JSON list of `Case` from stdin and writes, for each, a list of `Figures` to stdout.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shared.plan import Plan

GPU = "FAKE0"


class Case(Struct, frozen=True, kw_only=True):
    path: str  # of the first shard
    plans: list[Plan]  # of one number of experts


class Figures(Struct, frozen=True, kw_only=True):
    """Bytes on the device that a model is loaded onto."""

    weights_bytes: int
    context_bytes: int
    compute_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.compute_bytes


def measured(cases: list[Case], *, on_gpu: bool) -> list[list[Figures]]:
    """The engine's figures of each case and plan: on the CPU, or on one large GPU that is none."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.noalloc", *([GPU] if on_gpu else [])],
        input=msgspec.json.encode(cases),
        cwd=Path(__file__).parents[1],
        capture_output=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return msgspec.json.decode(done.stdout, type=list[list[Figures]])


# ---- in the process of its own


class _Node(ctypes.Structure):  # std::_Rb_tree_node of a buffer type and its bytes
    pass


_Node._fields_ = [
    ("color", ctypes.c_int),
    ("parent", ctypes.POINTER(_Node)),
    ("left", ctypes.POINTER(_Node)),
    ("right", ctypes.POINTER(_Node)),
    ("buffer_type", ctypes.c_void_p),
    ("model", ctypes.c_size_t),
    ("context", ctypes.c_size_t),
    ("compute", ctypes.c_size_t),
]


class _Map(ctypes.Structure):  # std::map: its comparison, the header of its tree, its size
    _fields_ = [
        ("compare", ctypes.c_size_t),
        ("color", ctypes.c_int),
        ("root", ctypes.POINTER(_Node)),
        ("first", ctypes.c_void_p),
        ("last", ctypes.c_void_p),
        ("count", ctypes.c_size_t),
    ]


def main() -> None:
    from worker import llama

    llama.initialise()
    cases = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Case])
    for name in sys.argv[1:]:
        from tests import fakegpu

        fakegpu.add(name, 1 << 50)
    sys.stdout.buffer.write(msgspec.json.encode([_measure(llama.lib, case) for case in cases]))


def _measure(lib: Any, case: Case) -> list[Figures]:
    """As worker.llama loads it, but for `no_alloc`."""
    params = lib.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = lib.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = -1
    params.use_extra_bufts = False
    overrides = (lib.llama_model_kv_override * 2)()
    if (override := case.plans[0].expert_override) is not None:
        overrides[0].tag = lib.LLAMA_KV_OVERRIDE_TYPE_INT
        overrides[0].key = override[0].encode()
        overrides[0].value.val_i64 = override[1]
        params.kv_overrides = overrides
    model = lib.llama_model_load_from_file(case.path.encode(), params)
    assert model, case.path
    found = []
    for plan in case.plans:
        context_params = lib.llama_context_default_params()
        for name in ("n_ctx", "n_batch", "n_ubatch", "n_seq_max", "offload_kqv"):
            setattr(context_params, name, getattr(plan, name))
        context_params.kv_unified = True
        context_params.flash_attn_type = -1 if plan.flash_attn is None else int(plan.flash_attn)
        context_params.embeddings = plan.embedding
        context = lib.llama_init_from_model(model, context_params)
        assert context, plan
        found.append(_breakdown(lib._lib, context))
        lib.llama_free(context)
    lib.llama_model_free(model)
    return found


def _breakdown(engine: Any, context: Any) -> Figures:
    ask = engine._Z26llama_get_memory_breakdownPK13llama_context
    ask.argtypes, ask.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_void_p
    name = engine.ggml_backend_buft_name
    name.argtypes, name.restype = [ctypes.c_void_p], ctypes.c_char_p
    result = _Map()
    ask(ctypes.addressof(result), context)
    found: dict[str, tuple[int, int, int]] = {}

    def walk(node: Any) -> None:
        if node:
            it = node.contents
            found[name(it.buffer_type).decode()] = (it.model, it.context, it.compute)
            walk(it.left)
            walk(it.right)

    walk(result.root)
    model, cache, compute = found.get(GPU) or found["CPU"]
    return Figures(weights_bytes=model, context_bytes=cache, compute_bytes=compute)


if __name__ == "__main__":
    main()
