"""The state of the engine's context after the warm-up of a load.

`python -m tests.support.warmup` is a separate process, since the process of the tests must not import the engine.  It
reads a JSON list of `Load` from stdin, loads one after the other, and writes a list of `WarmedUp` to stdout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
from msgspec import Struct

from worker.runner.protocol import NO_GPU, Load


class WarmedUp(Struct, frozen=True):
    """A context after its warm-up."""

    has_output: bool  # logits of a token, or an embedding: absent before the first evaluation
    n_cached: int  # tokens in the KV cache


def warmed_up(loads: list[Load]) -> list[WarmedUp]:
    """Load models in a separate process, and report their contexts."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.warmup"],
        input=msgspec.json.encode(loads),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return msgspec.json.decode(done.stdout, type=list[WarmedUp])


def main() -> None:
    """Load models and report their contexts, in the separate process."""
    from worker.engine import llama

    log = llama.initialise(NO_GPU)
    reports = []
    for load in msgspec.json.decode(sys.stdin.buffer.read(), type=list[Load]):
        loaded = llama.Loaded(load, log, lambda phase, n_bytes: None)
        if load.embedding:
            output = llama.lib.llama_get_embeddings_seq(loaded.context, 0)
        else:
            output = llama.lib.llama_get_logits_ith(loaded.context, -1)
        memory = llama.lib.llama_get_memory(loaded.context)
        n_cached = llama.lib.llama_memory_seq_pos_max(memory, 0) + 1 if memory else 0
        reports.append(WarmedUp(bool(output), n_cached))
        loaded.close()
    sys.stdout.buffer.write(msgspec.json.encode(reports))


if __name__ == "__main__":
    main()
