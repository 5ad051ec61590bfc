"""Ways to read a cold file, compared with `dd`: measured with `python -m bench reads`.

Every way reads the same large model in its own process after its pages were dropped, in rounds with a random order.  So
does every load: by llama.cpp alone in each of its modes, and by Loadstone.  `python -m bench.reads WAY FILE` reads once
and prints the seconds.
"""

from __future__ import annotations

import mmap
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from msgspec import Struct

from bench import pagecache
from bench.report import Goal, goal, table
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, Failure, Service, service
from worker.engine.prefetch import STEP_BYTES, prefetch

BLOCK = 4 << 20  # of a read into private memory
ROUNDS = 3
AHEAD = 4 * STEP_BYTES
PAUSE_S = 0.5
LEAST = 0.9  # smallest share of the best sequential rate
SERVICE, SERVICE_WEIGHTS = "Loadstone: request to reply", "Loadstone: its weights in memory"
LLAMA = {f"llama.cpp, {mode}": mode for mode in ("MMAP", "NONE", "DIRECT_IO")}
DD = {"dd bs=8M": ("bs=8M",), "dd bs=8M iflag=direct": ("bs=8M", "iflag=direct")}


# ---- the ways


def faults(fd: int, size: int) -> None:
    """Read a byte of each page in order, as an engine does that maps a file without populating it."""
    with mmap.mmap(fd, size, access=mmap.ACCESS_READ) as mapping, memoryview(mapping) as pages:
        sum(pages[:: mmap.PAGESIZE])


def map_populate(fd: int, size: int) -> None:
    """Read everything in one system call, as llama.cpp maps a file."""
    mmap.mmap(fd, size, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ).close()


def in_steps(fd: int, size: int) -> None:
    """Read as Loadstone does."""
    prefetch(fd, lambda n: None)


def advised(fd: int, size: int) -> None:
    """Read as Loadstone does, and request the next pages with posix_fadvise."""
    os.posix_fadvise(fd, 0, AHEAD, os.POSIX_FADV_WILLNEED)
    done = 0

    def advanced(n: int) -> None:
        nonlocal done
        done += n
        os.posix_fadvise(fd, done + AHEAD - STEP_BYTES, STEP_BYTES, os.POSIX_FADV_WILLNEED)

    prefetch(fd, advanced)


def preadv(threads: int, fd: int, size: int) -> None:
    """Read into private memory: past the page cache with O_DIRECT, else through it."""

    def work(first: int) -> None:
        with mmap.mmap(-1, BLOCK) as buffer:  # aligned, as O_DIRECT requires
            for at in range(first * BLOCK, size, threads * BLOCK):
                os.preadv(fd, [buffer], at)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(work, range(threads)))


WAYS: dict[str, tuple[int, Callable[[int, int], None]]] = {
    "page faults of a mapping": (0, faults),
    "MAP_POPULATE": (0, map_populate),
    "MADV_POPULATE_READ in steps of 32 MiB": (0, in_steps),
    "the same, posix_fadvise ahead": (0, advised),
    "preadv, 1 thread": (0, partial(preadv, 1)),
    "preadv, 4 threads": (0, partial(preadv, 4)),
    "preadv, O_DIRECT, 1 thread": (os.O_DIRECT, partial(preadv, 1)),
    "preadv, O_DIRECT, 4 threads": (os.O_DIRECT, partial(preadv, 4)),
}


def read(way: str, path: Path) -> float:
    flags, function = WAYS[way]
    fd = os.open(path, os.O_RDONLY | flags)
    started = time.perf_counter()
    function(fd, os.fstat(fd).st_size)
    seconds = time.perf_counter() - started
    os.close(fd)
    return seconds


# ---- measuring


class Read(Struct, frozen=True, kw_only=True):
    way: str
    residency: float  # of the file, just before the read
    seconds: float


class Reads(Struct, frozen=True, kw_only=True):
    n_bytes: int
    cold: list[Read]
    warm: list[Read]

    def seconds(self, way: str, *, cold: bool = True) -> float:
        return statistics.median(one.seconds for one in (self.cold if cold else self.warm) if one.way == way)

    @property
    def best_s(self) -> float:
        return min(self.seconds(way) for way in DD)


def measure(key: str, path: Path, models_dir: Path, out: Path, say: Callable[[str], None]) -> Reads:
    order = random.Random(1)
    cold: list[Read] = []
    warm: list[Read] = []
    with service(models_dir, out) as running:
        ways: dict[str, Callable[[], dict[str, float]]] = {
            **{way: partial(_dd, way, path) for way in DD},
            **{way: partial(_child, way, path) for way in [*WAYS, *LLAMA]},
            SERVICE: partial(_service, running, key),
        }
        for into, n in ((cold, ROUNDS), (warm, 3)):
            for i in range(n + 1):
                names = [*ways]
                order.shuffle(names)
                for name in names:
                    is_cold = into is cold
                    say(f"reading, {'cold' if is_cold else 'warm'}, round {i}, {name}")
                    residency = _prepare(path, is_cold)
                    seconds = ways[name]()
                    if i > 0:  # the first round has cold caches
                        into += [Read(way=way, residency=residency, seconds=s) for way, s in seconds.items()]
    return Reads(n_bytes=path.stat().st_size, cold=cold, warm=warm)


def _prepare(path: Path, is_cold: bool) -> float:
    """Read the whole file, so that each way finds the same free memory; drop it if cold; return the residency."""
    read("MADV_POPULATE_READ in steps of 32 MiB", path)
    if is_cold:
        pagecache.drop(path)
    time.sleep(PAUSE_S)
    residency = pagecache.residency(path)
    if residency > 0.01 if is_cold else residency < 0.98:
        raise Failure(f"{residency:.1%} of {path.name} is in the page cache")
    return residency


def _dd(way: str, path: Path) -> dict[str, float]:
    started = time.perf_counter()
    subprocess.run(["dd", f"if={path}", "of=/dev/null", *DD[way]], check=True, stderr=subprocess.DEVNULL)
    return {way: time.perf_counter() - started}


def _child(way: str, path: Path) -> dict[str, float]:
    argv = [sys.executable, "-m", "bench.reads", way, str(path)]
    root = Path(__file__).parents[1]
    done = subprocess.run(argv, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=root)
    return {way: float(done.stdout)}


def _service(running: Service, key: str) -> dict[str, float]:
    running.reconnect()
    load = running.load(key)
    return {SERVICE: load.total_s, SERVICE_WEIGHTS: load.phases_s["model"]}


# ---- the report


def goals(reads: Reads) -> list[Goal]:
    limit = 1 / LEAST
    return [
        goal(
            "cold: time until Loadstone's weights are in memory / best dd",
            reads.seconds(SERVICE_WEIGHTS) / reads.best_s,
            limit,
            "x",
        ),
        goal("cold: Loadstone's request to reply / best dd", reads.seconds(SERVICE) / reads.best_s, limit, "x"),
        goal(
            "cold: Loadstone's weights / llama.cpp's quickest mode",
            reads.seconds(SERVICE_WEIGHTS) / min(map(reads.seconds, LLAMA)),
            1.0,
            "x",
        ),
    ]


def markdown(reads: Reads) -> str:
    verdicts = goals(reads)
    lines = [
        f"## Reading {reads.n_bytes / 1e9:.1f} GB: {sum(one.met for one in verdicts)} of {len(verdicts)} goals met",
        "",
    ]
    lines += [
        f"- {one.what} = {one.measured:.2f}, limit {one.limit:.2f}, {'met' if one.met else '**missed**'}"
        for one in verdicts
    ]
    rows = []
    for way in [*DD, *WAYS, *LLAMA, SERVICE_WEIGHTS, SERVICE]:
        single = sorted(one.seconds for one in reads.cold if one.way == way)
        median = reads.seconds(way)
        rows.append(
            [
                way,
                f"{median:.3f}",
                f"{single[0]:.3f} to {single[-1]:.3f}",
                f"{reads.n_bytes / median / 1e9:.2f}",
                f"{reads.best_s / median:.2f}",
                f"{reads.seconds(way, cold=False):.3f}",
            ]
        )
    lines += ["", *table(["", "cold, s", "from, to", "GB/s", "of the best dd's rate", "warm, s"], rows)]
    lines += [
        "",
        f"Medians of {ROUNDS} cold and 3 warm runs, each in a process of its own and in another order in each round, "
        "after one that is not counted. The file is read whole before each, and for a cold one dropped from the page "
        "cache (a disk or a hypervisor may have a cache below). Interpreters and libraries are there when the time "
        "begins, dd's with its process. llama.cpp: model alone, no context, in a fresh process; Loadstone's weights: "
        "its phases metadata and weights; request to reply: with the context and a decoded token.",
    ]
    return "\n".join(lines)


def main(way: str, path: Path) -> None:
    if way in WAYS:
        print(read(way, path))
        return
    from bench.bare import lib, load

    lib.llama_backend_init()
    print(load(str(path), CONTEXT_LENGTH, EVAL_BATCH_SIZE, LLAMA[way]).phases["model"])


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
