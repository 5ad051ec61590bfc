"""`python -m bench.peers [ROUNDS]`: Loadstone side by side with its peers, on this machine, in one run.

`make bench-peers` makes what it needs first: llama-server, and an environment with llama_cpp.server.  It writes a
directory of docs/benchmarks, with a table and plots, and every single figure as JSON to bench/out.
"""

from __future__ import annotations

import datetime
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec

from bench import pagecache
from bench.__main__ import MODELS, OUT, keep, machine, say
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
TINY_TIMES = 3  # as many loads of the tiny model, which take next to nothing
PAUSE_S = 0.5  # between loads: whoever prepares for the next one has done so


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: what runs is then stopped
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
    about = machine() | {"versions": versions()}  # before anything is started: it has the load average
    say("models")
    made = models()
    about["measured"] = f"{datetime.datetime.now(datetime.UTC):%Y-%m-%d %H:%M} UTC, commit {commit()}"
    about["all"] = (
        f"n_ctx {CONTEXT_LENGTH}, n_batch {EVAL_BATCH_SIZE}, medians of {rounds} loads ({rounds * TINY_TIMES} of the "
        "tiny model), all subjects in each round, in another order; cold is this machine's page cache only, read and "
        "dropped before each load: a disk or a hypervisor may have a cache below it"
    )
    with subjects(made, MODELS, PEERS, LLAMA_SERVER, PYTHON) as compared:
        runs, memory, failed = [], [], []
        order = random.Random(1)  # so that what one subject leaves behind is not always found by the same other one
        for model in made:
            those = [subject for subject in compared if model.is_repackable or subject.name != REPACKED]
            for subject in those:
                say(f"{model.title}: memory of {subject.name}")  # and the one load that each has behind it
                time.sleep(PAUSE_S)
                pagecache_warmed(model)
                try:
                    with watched(subject.roots, model.shards) as peak:
                        subject.load(model)
                except Failure as e:
                    if subject.name == Loadstone.name:
                        raise
                    failed.append(Failed(model=model.title, subject=subject.name, why=str(e)))
                else:
                    memory.append(Memory(model=model.title, subject=subject.name, peak=peak))
            those = [one for one in those if (model.title, one.name) not in {(f.model, f.subject) for f in failed}]
            for cache in CACHES:
                for n in range(rounds * (TINY_TIMES if model.is_tiny else 1)):
                    say(f"{model.title}, {cache}, round {n + 1}")
                    order.shuffle(those)
                    runs += [run_of(subject, model, cache) for subject in those]
        sizes = {model.title: model.n_bytes for model in made}
        return Measured(
            about=about, models=sizes, subjects=[s.name for s in compared], runs=runs, memory=memory, failed=failed
        )


def run_of(subject: Subject, model: Model, cache: Cache) -> Run:
    time.sleep(PAUSE_S)
    residency = made_cold(model) if cache == "cold" else pagecache_warmed(model)
    if residency > 0.01 if cache == "cold" else residency < 0.98:
        raise Failure(f"{residency:.1%} of {model.title} is in the page cache, which is not {cache}")
    times = subject.load(model)
    return Run(model=model.title, cache=cache, subject=subject.name, residency=residency, times=times)


def made_cold(model: Model) -> float:
    """Read and dropped: on a virtual machine the memory that the load is about to take may have been given back to the
    host by the one that freed it, and costs several seconds then.  So each load finds what the reading has just left.
    """
    pagecache_warmed(model)
    for shard in model.shards:
        pagecache.drop(shard)
    return in_cache(model)


def pagecache_warmed(model: Model) -> float:
    """Read what is not there, which after direct I/O may be all."""
    if in_cache(model) < 1:
        for shard in model.shards:
            with shard.open("rb") as file:
                while file.read(8 << 20):
                    pass
    return in_cache(model)


def in_cache(model: Model) -> float:
    return sum(pagecache.residency(shard) * shard.stat().st_size for shard in model.shards) / model.n_bytes


def versions() -> str:
    said = subprocess.run([str(LLAMA_SERVER), "--version"], capture_output=True, text=True, check=True)
    server = next(line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version"))
    asked = "import sys, fastapi, uvicorn; print(f'fastapi {fastapi.__version__}, uvicorn {uvicorn.__version__}')"
    python = subprocess.run([str(PYTHON), "-c", asked], capture_output=True, text=True, check=True).stdout.strip()
    return f"Loadstone {__version__}; llama-server {server.removeprefix('version: ')}; llama_cpp.server with {python}"


def commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=ROOT).stdout.strip()

    return git("rev-parse", "--short=10", "HEAD") + (", changed" if git("status", "--porcelain", "-uno") else "")


def write(measured: Measured, directory: Path) -> None:
    names: dict[Cache, str] = {cache: f"{cache}.png" for cache in CACHES}
    for cache, name in names.items():
        plots.times(measured, cache, directory / name)
    plots.memory(measured, directory / "memory.png")
    (directory / "table.md").write_text(markdown(measured, names, "memory.png"))
    keep(directory.name, msgspec.to_builtins(measured) | {"goals": msgspec.to_builtins(goals(measured))})


if __name__ == "__main__":
    sys.exit(main())
