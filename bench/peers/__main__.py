"""`python -m bench.peers [ROUNDS]`: a comparison of Loadstone with its peers, on this machine, in one run.

`make bench-peers` first builds llama-server and an environment with llama_cpp.server.  It writes a directory of
docs/benchmarks, with a table and plots, and every single figure as JSON to bench/out.
"""

from __future__ import annotations

import datetime
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import llama_cpp  # noqa: F401  # before numpy: see bench/__init__.py
import msgspec

from bench import pagecache
from bench.__main__ import MODELS, OUT, commit, keep, machine, say
from bench.peers import plots
from bench.peers.figures import CACHES, Cache, Failed, Measured, Memory, Run, goals
from bench.peers.memory import watched
from bench.peers.models import Model, models
from bench.peers.report import markdown
from bench.peers.subjects import REPACKED, Loadstone, Subject, subjects
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, Failure
from cli import devredis
from shared import __version__

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs/benchmarks"
PEERS = OUT / "peers"
LLAMA_SERVER = PEERS / "build/bin/llama-server"
PYTHON = PEERS / "venv/bin/python"
ROUNDS = 5
TINY_TIMES = 3  # times as many loads of the tiny model, which are short
PAUSE_S = 0.5  # between loads, for subjects that prepare for the next load


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    rounds = int(sys.argv[1]) if sys.argv[1:] else ROUNDS
    try:
        measured = measure(rounds)
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    directory = DOCS / f"peers-{datetime.datetime.now(datetime.UTC):%Y-%m-%d-%H%M}"
    directory.mkdir(parents=True)
    write(measured, directory)
    print((directory / "table.md").read_text())
    return 0


def measure(rounds: int) -> Measured:
    about = machine() | {"versions": versions()}  # first, since it records the load average
    say("models")
    to_load = models()
    about["measured"] = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {commit()}"
    about["all"] = (
        f"n_ctx {CONTEXT_LENGTH}, n_batch {EVAL_BATCH_SIZE}, medians of {rounds} loads ({rounds * TINY_TIMES} of the "
        "tiny model), all subjects in each round, in random order; cold refers to the page cache of this machine only, "
        "read and dropped before each load: a disk or a hypervisor may have a cache below it"
    )
    with subjects(to_load, MODELS, PEERS, LLAMA_SERVER, PYTHON) as compared:
        runs, memory, failed = [], [], []
        order = random.Random(1)  # random order, so that no subject always follows the same other one
        for model in to_load:
            compatible = [subject for subject in compared if model.is_repackable or subject.name != REPACKED]
            for subject in compatible:
                say(f"{model.title}: memory of {subject.name}")  # also the first load of each subject
                time.sleep(PAUSE_S)
                warm_cache(model)
                try:
                    with watched(subject.roots, model.shards) as peak:
                        subject.load(model)
                except Failure as e:
                    if subject.name == Loadstone.name:
                        raise
                    failed.append(Failed(model=model.title, subject=subject.name, why=str(e)))
                else:
                    memory.append(Memory(model=model.title, subject=subject.name, peak=peak))
            compatible = [
                one for one in compatible if (model.title, one.name) not in {(f.model, f.subject) for f in failed}
            ]
            for cache in CACHES:
                for n in range(rounds * (TINY_TIMES if model.is_tiny else 1)):
                    say(f"{model.title}, {cache}, round {n + 1}")
                    order.shuffle(compatible)
                    runs += [run_of(subject, model, cache) for subject in compatible]
        sizes = {model.title: model.n_bytes for model in to_load}
        return Measured(
            about=about, models=sizes, subjects=[s.name for s in compared], runs=runs, memory=memory, failed=failed
        )


def run_of(subject: Subject, model: Model, cache: Cache) -> Run:
    time.sleep(PAUSE_S)
    residency = drop_from_cache(model) if cache == "cold" else warm_cache(model)
    if residency > 0.01 if cache == "cold" else residency < 0.98:
        raise Failure(f"{residency:.1%} of {model.title} is in the page cache; it should be {cache}")
    times = subject.load(model)
    return Run(model=model.title, cache=cache, subject=subject.name, residency=residency, times=times)


def drop_from_cache(model: Model) -> float:
    """Read and drop the files; return the share that is still cached.

    On a virtual machine free memory may have been returned to the host, and getting it back can take seconds.  Reading
    first gives each load the same state.
    """
    warm_cache(model)
    for shard in model.shards:
        pagecache.drop(shard)
    return in_cache(model)


def warm_cache(model: Model) -> float:
    """Read the files unless they are cached, which they may not be after direct I/O; return the cached share."""
    if in_cache(model) < 1:
        for shard in model.shards:
            with shard.open("rb") as file:
                while file.read(8 << 20):
                    pass
    return in_cache(model)


def in_cache(model: Model) -> float:
    return sum(pagecache.residency(shard) * shard.stat().st_size for shard in model.shards) / model.n_bytes


def versions() -> str:
    done = subprocess.run([str(LLAMA_SERVER), "--version"], capture_output=True, text=True, check=True)
    server = next(line for line in (done.stdout + done.stderr).splitlines() if line.startswith("version"))
    script = "import sys, fastapi, uvicorn; print(f'fastapi {fastapi.__version__}, uvicorn {uvicorn.__version__}')"
    python = subprocess.run([str(PYTHON), "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    return f"Loadstone {__version__}; llama-server {server.removeprefix('version: ')}; llama_cpp.server with {python}"


def write(measured: Measured, directory: Path) -> None:
    names: dict[Cache, str] = {cache: f"{cache}.png" for cache in CACHES}
    for cache, name in names.items():
        plots.times(measured, cache, directory / name)
    plots.memory(measured, directory / "memory.png")
    (directory / "table.md").write_text(markdown(measured, names, "memory.png"))
    keep(directory.name, msgspec.to_builtins(measured) | {"goals": msgspec.to_builtins(goals(measured))})


if __name__ == "__main__":
    sys.exit(main())
