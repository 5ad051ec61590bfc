"""llama-cpp-python alone, with a choice of modes: a process that answers each `Task` on stdin with a `Done`.

`python -m bench.peers.bare TASK` carries out the task on its command line, in a fresh process.  Without a task it
imports the engine, starts the backends and first writes an empty line.  Loads are those of `bench.bare`, but in any of
llama.cpp's modes to read a file, with or without repacking.  The moments are of CLOCK_MONOTONIC, which is the same in
all processes.
"""

from __future__ import annotations

import sys
from typing import Literal

import msgspec
from msgspec import Struct

from bench.bare import lib, load

Mode = Literal["MMAP", "NONE", "DIRECT_IO"]  # llama.cpp's LLAMA_LOAD_MODE_*


class Task(Struct, frozen=True, kw_only=True):
    path: str
    n_ctx: int
    n_batch: int
    mode: Mode = "MMAP"
    repack: bool = False


class Done(Struct, frozen=True, kw_only=True):
    """The moments when the context was ready and when a token had been decoded."""

    ready_at: float
    token_at: float
    phases_s: dict[str, float]


def done(task: Task) -> Done:
    """Load and free a model."""
    moments = load(task.path, task.n_ctx, task.n_batch, task.mode, repack=task.repack)
    return Done(ready_at=moments.has_context, token_at=moments.has_token, phases_s=moments.phases)


def main() -> None:
    lib.llama_backend_init()
    match sys.argv[1:]:
        case [task]:
            _answer(done(msgspec.json.decode(task, type=Task)))
        case _:
            print(flush=True)
            for line in sys.stdin:
                _answer(done(msgspec.json.decode(line, type=Task)))


def _answer(answer: Done) -> None:
    print(msgspec.json.encode(answer).decode(), flush=True)


if __name__ == "__main__":
    main()
