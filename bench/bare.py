"""llama-cpp-python alone: a process that loads a model on request and reports the time.

`python -m bench.bare warm|fork MODEL N_CTX N_BATCH` answers each line on stdin with a line of JSON; it writes a first
line once it has imported the engine.  It uses the low-level API with llama.cpp's defaults, except for the settings
below, and llama-cpp-python's own log callback.  A load has the same steps as in a runner of Loadstone: the model by
mmap, the context, and one decoded token, with the same number of threads.

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

USE_EXTRA_BUFTS = False  # as in worker/engine/llama.py: repacking weights would be additional work

lib: Any = llama_cpp  # ctypes functions have no types


def main(how: str, path: str, n_ctx: int, n_batch: int) -> None:
    measure = {"warm": phases, "fork": phases_in_fork}[how]
    if how == "warm":
        lib.llama_backend_init()
    _answer({"use_extra_bufts": USE_EXTRA_BUFTS})
    for _ in sys.stdin:
        _answer(measure(path, n_ctx, n_batch))


class Moments(NamedTuple):
    """The moments of a load, by the monotonic clock."""

    started: float
    has_model: float
    has_context: float
    has_token: float

    @property
    def phases(self) -> dict[str, float]:
        """Return the seconds of each phase."""
        return {
            "model": self.has_model - self.started,
            "context": self.has_context - self.has_model,
            "warmup": self.has_token - self.has_context,
        }


def load(path: str, n_ctx: int, n_batch: int, mode: str = "MMAP", *, repack: bool = USE_EXTRA_BUFTS) -> Moments:
    """Load and free a model; the time to free it is not included."""
    started = time.monotonic()
    params = lib.llama_model_default_params()
    params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{mode}")
    params.use_extra_bufts = repack
    model = _checked(lib.llama_model_load_from_file(path.encode(), params), "model")
    has_model = time.monotonic()
    context_params = _context_params(n_ctx, n_batch, lib.llama_model_size(model))
    context = _checked(lib.llama_init_from_model(model, context_params), "context")
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
    """Load a model; return the seconds of each phase."""
    return load(path, n_ctx, n_batch).phases


def phases_in_fork(path: str, n_ctx: int, n_batch: int) -> dict[str, float]:
    """Load a model in a fork; `total` includes the fork, the start of the backends, the freeing and the pipe."""

    def work() -> dict[str, float]:
        lib.llama_backend_init()
        return phases(path, n_ctx, n_batch)

    started = time.monotonic()
    answer = _in_child(work)
    if not answer:
        raise SystemExit("a forked load failed")
    return {"total": time.monotonic() - started, **json.loads(answer)}


def _in_child(work: Callable[[], dict[str, float]]) -> bytes:
    """Run `work` in a fork; return its line of output, or nothing.  The fork is reaped after the line is read."""
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


def _checked(handle: Any, what: str) -> Any:
    if not handle:
        raise SystemExit(f"llama.cpp returned no {what}")
    return handle


def _answer(value: dict[str, float] | dict[str, bool]) -> None:
    print(json.dumps(value), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
