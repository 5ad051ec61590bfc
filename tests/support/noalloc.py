"""The memory of a load as llama.cpp computes it in a dry run without allocations: `worker.engine.llama.DryRuns`.

`python -m tests.support.noalloc` is a separate process, since the process of the tests must not import the engine.  It
reads a JSON list of `Load` from stdin and writes a list of `Usage` for each of them to stdout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from shared.memory.plan import Plan
from shared.schema.memory import Usage
from worker.runner.protocol import Load

GPUS = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")  # with room for every load: a dry run allocates nothing


def load(shards: list[Path], plan: Plan, layers: list[int]) -> Load:
    """Return the load of a model onto the first of `GPUS`, one for each number of layers; the last layers go there."""
    return Load(
        **msgspec.structs.asdict(plan),
        shards=[str(shard) for shard in shards],
        total_bytes=0,
        check_tensors=False,
        devices=list(GPUS[: len(layers)]),
        layers=layers,
    )


def measured(loads: list[Load]) -> list[list[Usage]]:
    """Return the engine's figures of each load."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.noalloc"],
        input=msgspec.json.encode(loads),
        cwd=Path(__file__).parents[2],
        capture_output=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    return msgspec.json.decode(done.stdout, type=list[list[Usage]])


def main() -> None:
    """Measure the loads, in the separate process."""
    from tests.support import fakegpu
    from worker.engine import llama

    log = llama.initialise(",".join(GPUS))
    for i in range(len(GPUS)):
        fakegpu.add(f"CUDA{i}", 1 << 50)
    loads = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Load])
    dry_runs = llama.DryRuns(log)
    sys.stdout.buffer.write(msgspec.json.encode([dry_runs.measure(load) for load in loads]))


if __name__ == "__main__":
    main()
