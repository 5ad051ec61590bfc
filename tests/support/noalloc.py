"""What llama.cpp itself says a load would take: a dry run that allocates nothing, `worker.engine.llama.measure`.

`python -m tests.support.noalloc GPUS` is a process of its own, since the engine may not be in that of the tests: it
reads a JSON list of `Load` from stdin and writes, for each, a list of `Usage` to stdout.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec

from shared.memory.plan import Plan
from shared.schema.memory import Usage
from worker.runner.protocol import Load

GPUS = ("GPU-0", "GPU-1", "GPU-2", "GPU-3")  # with room for everything, as they take nothing


def load(path: Path, plan: Plan, layers: list[int]) -> Load:
    """The load of a model onto as many of `GPUS` as `layers` has numbers; each takes so many of the last layers."""
    return Load(
        **msgspec.structs.asdict(plan),
        shards=[str(path)],
        total_bytes=0,
        check_tensors=False,
        devices=list(GPUS[: len(layers)]),
        layers=layers,
    )


def measured(loads: list[Load]) -> list[list[Usage]]:
    """The engine's figures of each load."""
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
    """In the process of its own."""
    from tests.support import fakegpu
    from worker.engine import llama

    log = llama.initialise(",".join(GPUS))
    for i in range(len(GPUS)):
        fakegpu.add(f"CUDA{i}", 1 << 50)
    loads = msgspec.json.decode(sys.stdin.buffer.read(), type=list[Load])
    sys.stdout.buffer.write(msgspec.json.encode([llama.measure(load, log) for load in loads]))


if __name__ == "__main__":
    main()
