"""llama-cpp-python alone: a process that loads a model whenever it is told to, and says how long it took.

`python -m bench.bare warm|fork MODEL N_CTX N_BATCH` answers each line on stdin with a line of JSON; the first answer
comes unasked, once the process has imported the engine.  It uses the low-level API with llama.cpp's defaults, except
for what is set below, and llama-cpp-python's own log callback.  A load is what a runner of Loadstone counts as one:
the model by mmap, the context, and one token decoded, by as many threads.

- warm: each load in this process, whose backends are initialised.
- fork: each load in a fork of this process, which has never initialised the backends.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import llama_cpp

from worker.engine.llama import n_threads

USE_EXTRA_BUFTS = False  # as worker/engine/llama.py has it: repacked weights would be other work

lib: Any = llama_cpp  # ctypes: nothing of it is typed


def main(how: str, path: str, n_ctx: int, n_batch: int) -> None:
    measure = {"warm": phases, "fork": phases_in_fork}[how]
    if how == "warm":
        lib.llama_backend_init()
    _answer({"use_extra_bufts": USE_EXTRA_BUFTS})
    for _ in sys.stdin:
        _answer(measure(path, n_ctx, n_batch))


class Moments(NamedTuple):
    """When a load came to what, by the monotonic clock."""

    started: float
    has_model: float
    has_context: float
    has_token: float

    @property
    def phases(self) -> dict[str, float]:
        """How long each took, in seconds."""
        return {
            "model": self.has_model - self.started,
            "context": self.has_context - self.has_model,
            "warmup": self.has_token - self.has_context,
        }


def load(path: str, n_ctx: int, n_batch: int, mode: str = "MMAP", *, repack: bool = USE_EXTRA_BUFTS) -> Moments:
    """Load and free a model; the freeing comes after the last moment."""
    started = time.monotonic()
    params = lib.llama_model_default_params()
    params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{mode}")
    params.use_extra_bufts = repack
    model = _found(lib.llama_model_load_from_file(path.encode(), params), "model")
    has_model = time.monotonic()
    context_params = _context_params(n_ctx, n_batch, lib.llama_model_size(model))
    context = _found(lib.llama_init_from_model(model, context_params), "context")
    has_context = time.monotonic()
    tokens = (lib.llama_token * 1)(max(lib.llama_vocab_bos(lib.llama_model_get_vocab(model)), 0))
    if lib.llama_decode(context, lib.llama_batch_get_one(tokens, 1)) != 0:
        raise SystemExit("llama_decode failed")
    lib.llama_synchronize(context)
    has_token = time.monotonic()
    lib.llama_free(context)
    lib.llama_model_free(model)
    return Moments(started, has_model, has_context, has_token)


def phases(path: str, n_ctx: int, n_batch: int) -> dict[str, float]:
    """How long each phase of a load took."""
    return load(path, n_ctx, n_batch).phases


def phases_in_fork(path: str, n_ctx: int, n_batch: int) -> dict[str, float]:
    """As `load`; `total` is with the fork, the start of the backends, the freeing and the way back."""

    def work() -> dict[str, float]:
        lib.llama_backend_init()
        return phases(path, n_ctx, n_batch)

    started = time.monotonic()
    answer = _in_child(work)
    if not answer:
        raise SystemExit("a forked load failed")
    return {"total": time.monotonic() - started, **json.loads(answer)}


def _in_child(work: Callable[[], dict[str, float]]) -> bytes:
    """One line of what a fork found, or nothing.  The fork is reaped after the line, which a load does not wait for."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, json.dumps(work()).encode() + b"\n")
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        line = answer.readline()
    os.waitpid(child, 0)
    return line


def _context_params(n_ctx: int, n_batch: int, n_bytes: int) -> Any:
    params = lib.llama_context_default_params()
    params.n_ctx, params.n_batch = n_ctx, n_batch
    params.n_threads = params.n_threads_batch = n_threads(n_bytes)
    return params


def _found(handle: Any, what: str) -> Any:
    if not handle:
        raise SystemExit(f"llama.cpp gave no {what}")
    return handle


def _answer(value: dict[str, float] | dict[str, bool]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
