"""llama-cpp-python alone, in whichever way it is told: a process that answers each `Task` on stdin with a `Done`.

`python -m bench.peers.bare TASK` does the one task that it is given on its command line, for which it begins with
nothing; without one it imports the engine, starts the backends and answers an empty line first.  What it does is what
`bench.bare` does, but with any of llama.cpp's ways of reading a file, and with or without repacking.  The moments are
of CLOCK_MONOTONIC, which all processes share.
"""

from __future__ import annotations

import sys
import time
from typing import Literal

import msgspec
from msgspec import Struct

from bench.bare import context_params, found, lib

Mode = Literal["MMAP", "NONE", "DIRECT_IO"]  # llama.cpp's LLAMA_LOAD_MODE_*


class Task(Struct, frozen=True, kw_only=True):
    path: str
    n_ctx: int
    n_batch: int
    mode: Mode = "MMAP"
    repack: bool = False


class Done(Struct, frozen=True, kw_only=True):
    """When the context was there, and when a token had been decoded."""

    ready_at: float
    token_at: float
    phases_s: dict[str, float]


def load(task: Task) -> Done:
    """Load and free a model; the freeing comes after the last moment."""
    started = time.monotonic()
    params = lib.llama_model_default_params()
    params.load_mode = getattr(lib, f"LLAMA_LOAD_MODE_{task.mode}")
    params.use_extra_bufts = task.repack
    model = found(lib.llama_model_load_from_file(task.path.encode(), params), "model")
    has_model = time.monotonic()
    context = found(lib.llama_init_from_model(model, context_params(task.n_ctx, task.n_batch)), "context")
    ready_at = time.monotonic()
    tokens = (lib.llama_token * 1)(max(lib.llama_vocab_bos(lib.llama_model_get_vocab(model)), 0))
    if lib.llama_decode(context, lib.llama_batch_get_one(tokens, 1)) != 0:
        raise SystemExit("llama_decode failed")
    lib.llama_synchronize(context)
    token_at = time.monotonic()
    lib.llama_free(context)
    lib.llama_model_free(model)
    phases = {"model": has_model - started, "context": ready_at - has_model, "warmup": token_at - ready_at}
    return Done(ready_at=ready_at, token_at=token_at, phases_s=phases)


def main() -> None:
    lib.llama_backend_init()
    match sys.argv[1:]:
        case [task]:
            _answer(load(msgspec.json.decode(task, type=Task)))
        case _:
            print(flush=True)
            for line in sys.stdin:
                _answer(load(msgspec.json.decode(line, type=Task)))


def _answer(done: Done) -> None:
    print(msgspec.json.encode(done).decode(), flush=True)


if __name__ == "__main__":
    main()
