"""`python -m bench`: measure everything once, print the report, keep every single figure in bench/out/bench.json."""

from __future__ import annotations

import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import msgspec

from bench import pagecache, report
from bench.report import Cache, Measured, Run, Who
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, Failure, Load, Service, bare, service
from shared import devredis, synthetic

OUT = Path(__file__).parent / "out"
TINY, BIG = "loadstone/bench-tiny", "loadstone/bench-big"
BIG_GB = 2
N_TINY, N_BIG = 50, 9  # the first token after a cold load takes 0.2 to 2 s on a virtual machine: 3 runs decide nothing
PAUSE_S = 0.15


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: what runs is then stopped
    try:
        measured = measure()
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    kept = msgspec.to_builtins(measured) | {"goals": msgspec.to_builtins(report.goals(measured))}
    (OUT / "bench.json").write_bytes(msgspec.json.format(msgspec.json.encode(kept)))
    print(report.markdown(measured))
    return 0


def measure() -> Measured:
    models_dir = OUT / "models"
    tiny, big = (models_dir / key / f"{key.rpartition('/')[2]}.gguf" for key in (TINY, BIG))
    load_average = os.getloadavg()[0]
    (OUT / "bare.log").unlink(missing_ok=True)
    say("models")
    synthetic.tiny_llama(tiny)
    if not is_complete(big):
        synthetic.big(big, BIG_GB)
    with service(models_dir, OUT) as running:
        found: dict[str, list[Load]] = {}
        say("tiny model, service")
        found["service"] = series(lambda: running.load(TINY), PAUSE_S)
        found["service, back to back"] = series(lambda: running.load(TINY), 0)
        say("tiny model, bare")
        with bare("warm", tiny, OUT) as alone:
            use_extra_bufts = alone.use_extra_bufts
            found["bare, warm process"] = series(alone.load, PAUSE_S)
            found["bare, warm process, back to back"] = series(alone.load, 0)
        with bare("fork", tiny, OUT) as alone:
            found["bare, fresh fork"] = series(alone.load, PAUSE_S)
        runs = big_runs(running, big)
    return Measured(machine=machine(load_average, use_extra_bufts), big_bytes=big.stat().st_size, tiny=found, big=runs)


def series(load: Callable[[], Load], pause_s: float) -> list[Load]:
    load()  # the first one finds cold what the others find warm
    loads = []
    for _ in range(N_TINY):
        time.sleep(pause_s)
        loads.append(load())
    return loads


def big_runs(running: Service, model: Path) -> list[Run]:
    """Each subject in turn, the other one first in every other round, warm and cold."""
    by_service(running, model, pagecache.residency)  # reads the file, and starts both sides with one load behind them
    runs = []
    caches: tuple[Cache, ...] = ("warm", "cold")
    for cache in caches:
        for n in range(N_BIG):
            order: tuple[Who, ...] = ("service", "bare") if n % 2 == 0 else ("bare", "service")
            for who in order:
                say(f"big model, {cache}, {who}")
                prepare = made_cold if cache == "cold" else pagecache.residency
                load_by = by_service if who == "service" else by_bare
                residency, load = load_by(running, model, prepare)
                runs.append(Run(cache=cache, who=who, residency=residency, load=load))
    return runs


def by_service(running: Service, model: Path, prepare: Callable[[Path], float]) -> tuple[float, Load]:
    time.sleep(PAUSE_S)
    running.reconnect()
    return prepare(model), running.load(BIG)


def by_bare(_: Service, model: Path, prepare: Callable[[Path], float]) -> tuple[float, Load]:
    with bare("warm", model, OUT) as alone:
        return prepare(model), alone.load()


def made_cold(model: Path) -> float:
    pagecache.drop(model)
    return pagecache.residency(model)


def is_complete(model: Path) -> bool:
    """Whether an earlier run left it: a model is written beside its place and renamed, so the size tells."""
    return model.is_file() and abs(model.stat().st_size / (BIG_GB * 1e9) - 1) < 0.1


def machine(load_average: float, use_extra_bufts: bool) -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    redis = devredis.binary()
    version = subprocess.run([str(redis), "--version"], capture_output=True, text=True, check=True).stdout.split(
        " sha"
    )[0]
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model[1] if model else platform.machine()}, "
        f"{memory:.0f} GiB of memory, load average {load_average:.2f} at the start",
        "software": f"Linux {platform.release()}, Python {platform.python_version()}, "
        f"llama-cpp-python {metadata.version('llama-cpp-python')}, {version.strip()} (embedded)",
        "both sides": f"n_ctx {CONTEXT_LENGTH}, n_batch {EVAL_BATCH_SIZE}, one token decoded by one thread, "
        f"use_extra_bufts {use_extra_bufts} (as Loadstone sets it; llama.cpp's default is True)",
    }


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
