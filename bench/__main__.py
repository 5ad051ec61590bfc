"""`python -m bench [PART]...`: measure all parts, or the given ones, and print the report.

Every single figure is kept in bench/out, one file for each part (bench.json for `load`).  The plots of growth are
docs/growth.png and docs/scale.png.
"""

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

from bench import (
    downloads,
    follow,
    follow_report,
    growth,
    growth_report,
    many,
    pagecache,
    phases,
    reads,
    report,
    scale,
    scale_report,
)
from bench.report import Cache, Measured, Run, Who
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, Failure, Load, Service, bare, service
from cli import devredis
from shared.synthetic import models as synthetic

OUT = Path(__file__).parent / "out"
MODELS = OUT / "models"
DOCS = Path(__file__).parents[1] / "docs"
PLOT, GROWTH_PLOT = DOCS / "scale.png", DOCS / "growth.png"
TINY, BIG, Q4_0 = "loadstone/bench-tiny", "loadstone/bench-big", "loadstone/bench-q4-0"
WIDE, WIDE_TOKENS, WIDE_GB = "loadstone/bench-bpe-150k", 151_936, 4
BIG_GB = 2
N_TINY, N_BIG = 50, 9  # on a virtual machine the first token after a cold load takes 0.2 to 2 s: 3 runs are too few
PAUSE_S = 0.15


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    parts = sys.argv[1:] or list(PARTS)
    if not set(parts) <= PARTS.keys():
        print(f"usage: python -m bench {' '.join(f'[{part}]' for part in PARTS)}", file=sys.stderr)
        return 2
    try:
        about = machine()
        say("models")
        synthetic.tiny_llama(path_of(TINY))
        sections = [PARTS[part](about) for part in PARTS if part in parts]
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print("\n\n".join([report.head(about), *sections]))
    return 0


def loading(about: dict[str, str]) -> str:
    measured = measure(about)
    keep("bench", msgspec.to_builtins(measured) | {"goals": msgspec.to_builtins(report.goals(measured))})
    return report.markdown(measured)


def following(about: dict[str, str]) -> str:
    followed = follow.measure(OUT, say)
    keep("follow", {"machine": about} | msgspec.to_builtins(followed))
    return follow_report.markdown(followed)


def scaling(about: dict[str, str]) -> str:
    sizes = scale.measure(OUT, say)
    keep(
        "scale",
        {
            "machine": about,
            "sizes": msgspec.to_builtins(sizes),
            "goals": msgspec.to_builtins(scale_report.goals(sizes)),
        },
    )
    scale_report.plot(sizes, PLOT)
    return scale_report.markdown(sizes)


def reading(about: dict[str, str]) -> str:
    big = write_big()
    figures = reads.measure(BIG, big, MODELS, OUT, say)
    keep("reads", {"machine": about, "goals": msgspec.to_builtins(reads.goals(figures))} | msgspec.to_builtins(figures))
    return reads.markdown(figures)


def loading_many(about: dict[str, str]) -> str:
    models = {BIG: write_big(), Q4_0: write_q4_0()}
    figures = many.measure(models, TINY, MODELS, OUT, say)
    keep("many", {"machine": about, "goals": msgspec.to_builtins(many.goals(figures))} | msgspec.to_builtins(figures))
    return many.markdown(figures)


def growing(about: dict[str, str]) -> str:
    figures = growth.measure(OUT, say)
    goals = msgspec.to_builtins(growth_report.goals(figures))
    keep("growth", {"machine": about, "goals": goals} | msgspec.to_builtins(figures))
    growth_report.plot(figures, GROWTH_PLOT)
    return growth_report.markdown(figures)


def downloading(about: dict[str, str]) -> str:
    figures = downloads.measure(OUT, say)
    keep("downloads", {"machine": about} | msgspec.to_builtins(figures))
    return downloads.markdown(figures)


def phasing(about: dict[str, str]) -> str:
    models = {TINY: path_of(TINY), BIG: write_big(), Q4_0: write_q4_0(), WIDE: write_wide()}
    figures = phases.measure(models, MODELS, OUT, say)
    keep("phases", {"machine": about, "warm": msgspec.to_builtins(figures)})
    return phases.markdown(figures)


PARTS = {
    "load": loading,
    "phases": phasing,
    "reads": reading,
    "many": loading_many,
    "follow": following,
    "downloads": downloading,
    "growth": growing,
    "scale": scaling,
}


def keep(name: str, figures: dict[str, object]) -> None:
    (OUT / f"{name}.json").write_bytes(msgspec.json.format(msgspec.json.encode(figures)))


def path_of(key: str) -> Path:
    return MODELS / key / f"{key.rpartition('/')[2]}.gguf"


def measure(about: dict[str, str]) -> Measured:
    tiny, big = path_of(TINY), write_big()
    (OUT / "bare.log").unlink(missing_ok=True)
    with service(MODELS, OUT) as running:
        loads: dict[str, list[Load]] = {}
        say("tiny model, service")
        loads["service"] = series(lambda: running.load(TINY), PAUSE_S)
        loads["service, back to back"] = series(lambda: running.load(TINY), 0)
        say("tiny model, bare")
        with bare("warm", tiny, OUT) as bare_process:
            use_extra_bufts = bare_process.use_extra_bufts
            loads["bare, warm process"] = series(bare_process.load, PAUSE_S)
            loads["bare, warm process, back to back"] = series(bare_process.load, 0)
        with bare("fork", tiny, OUT) as bare_process:
            loads["bare, fresh fork"] = series(bare_process.load, PAUSE_S)
        runs = big_runs(running, big)
    about["both sides"] = (
        f"n_ctx {CONTEXT_LENGTH}, n_batch {EVAL_BATCH_SIZE}, one token decoded by as many threads, "
        f"use_extra_bufts {use_extra_bufts} (Loadstone's setting; llama.cpp's default is True)"
    )
    return Measured(machine=about, big_bytes=big.stat().st_size, tiny=loads, big=runs)


def series(load: Callable[[], Load], pause_s: float) -> list[Load]:
    load()  # the first load has cold caches
    loads = []
    for _ in range(N_TINY):
        time.sleep(pause_s)
        loads.append(load())
    return loads


def big_runs(running: Service, model: Path) -> list[Run]:
    """Load by each subject in turn, warm and cold; the order alternates between the rounds."""
    by_service(running, model, pagecache.residency)  # reads the file, and gives both subjects a first load
    runs = []
    caches: tuple[Cache, ...] = ("warm", "cold")
    for cache in caches:
        for n in range(N_BIG):
            order: tuple[Who, ...] = ("service", "bare") if n % 2 == 0 else ("bare", "service")
            for who in order:
                say(f"big model, {cache}, {who}")
                prepare = drop_from_cache if cache == "cold" else pagecache.residency
                load_by = by_service if who == "service" else by_bare
                residency, load = load_by(running, model, prepare)
                runs.append(Run(cache=cache, who=who, residency=residency, load=load))
    return runs


def by_service(running: Service, model: Path, prepare: Callable[[Path], float]) -> tuple[float, Load]:
    time.sleep(PAUSE_S)
    running.reconnect()
    return prepare(model), running.load(BIG)


def by_bare(_: Service, model: Path, prepare: Callable[[Path], float]) -> tuple[float, Load]:
    with bare("warm", model, OUT) as bare_process:
        return prepare(model), bare_process.load()


def drop_from_cache(model: Path) -> float:
    pagecache.drop(model)
    return pagecache.residency(model)


def write_big() -> Path:
    """Write the big model unless an earlier run has: a file of the right size is complete, since writing is atomic."""
    path = path_of(BIG)
    if not path.is_file() or abs(path.stat().st_size / (BIG_GB * 1e9) - 1) > 0.1:
        synthetic.big(path, BIG_GB)
    return path


def write_q4_0() -> Path:
    path = path_of(Q4_0)
    if not path.is_file():
        synthetic.big(path, BIG_GB, "Q4_0")
    return path


def write_wide() -> Path:
    path = path_of(WIDE)
    if not path.is_file():
        synthetic.big(path, WIDE_GB, vocabulary=WIDE_TOKENS, tokenizer="bpe")
    return path


def machine() -> dict[str, str]:
    cpuinfo = Path("/proc/cpuinfo").read_text()
    model = re.search(r"^model name\s*: (.+)$", cpuinfo, re.MULTILINE)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    redis = devredis.binary()
    version = subprocess.run([str(redis), "--version"], capture_output=True, text=True, check=True).stdout.split(
        " sha"
    )[0]
    return {
        "machine": f"{len(os.sched_getaffinity(0))} cores, {model[1] if model else platform.machine()}, "
        f"{memory:.0f} GiB of memory, load average {os.getloadavg()[0]:.2f} at the start",
        "software": f"Linux {platform.release()}, Python {platform.python_version()}, "
        f"llama-cpp-python {metadata.version('llama-cpp-python')}, {version.strip()} (embedded)",
    }


def commit() -> str:
    """Return the commit of the tree, and whether files differ from it; "unknown" without git or a history."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True, cwd=DOCS.parent)
        return done.stdout.strip()

    try:
        return git("rev-parse", "--short=10", "HEAD") + (", changed" if git("status", "--porcelain", "-uno") else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def say(what: str) -> None:
    print(f"... {what}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
