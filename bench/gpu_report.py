"""The measurements of `bench.gpu`, what follows from them, and their report as Markdown."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Sequence
from typing import Literal, get_args

from msgspec import Struct, field

from bench.report import PHASES, table
from bench.subjects import CONTEXT_LENGTH

Mode = Literal["none", "mmap", "direct", "locked"]
By = Literal[Mode, "the service"]
Cache = Literal["cold", "warm"]
PLAIN: tuple[Mode, ...] = ("none", "mmap", "direct")  # llama.cpp alone, in each of its modes to read a file
MODES: tuple[Mode, ...] = (*PLAIN, "locked")
LOCKING: tuple[By, ...] = ("locked", "the service")
CACHES: tuple[Cache, ...] = ("cold", "warm")

LOCKED_RATIO, SERVICE_MS, DISK_SHARE, DIRTY_SHARE = 0.5, 60.0, 0.92, 0.1  # the goals
NOT_MEASURED = "not measured"


class Lock(Struct, frozen=True, kw_only=True):
    """What the engine's log says about page-locked memory in one load; `faults` are the lines about what went wrong."""

    n_bytes: int = 0
    lock_s: float = 0.0
    unlock_s: float = 0.0
    faults: list[str] = []


def lock_of(log: str) -> Lock:
    """Return what the lines of `worker.engine.pagelock` say."""
    n_bytes, lock_s, unlock_s = 0, 0.0, 0.0
    faults = []
    for line in re.findall(r"^page_lock: (.*)$", log, re.MULTILINE):
        if locked := re.fullmatch(r"(\d+) bytes locked in ([\d.]+) s", line):
            n_bytes, lock_s = n_bytes + int(locked[1]), lock_s + float(locked[2])
        elif unlocked := re.fullmatch(r"unlocked in ([\d.]+) s", line):
            unlock_s += float(unlocked[1])
        else:
            faults.append(line)
    return Lock(n_bytes=n_bytes, lock_s=lock_s, unlock_s=unlock_s, faults=faults)


class Bandwidth(Struct, frozen=True, kw_only=True):
    """Bytes per second, medians.  `disk_direct` is None on a file system without O_DIRECT, `pageable` and `pinned`
    without NVIDIA's driver."""

    disk: float
    disk_direct: float | None
    memory: float
    pageable: float | None
    pinned: float | None

    def possible(self, by: By, cache: Cache) -> float | None:
        """Return the highest possible rate of a load: that of the slowest part of the bytes' path, or None."""
        parts = [self.pinned] if self.pinned else []
        if cache == "cold" or by == "direct":
            parts.append(max(self.disk, self.disk_direct or 0))
        elif by not in LOCKING:
            parts.append(self.memory)
        return min(parts, default=None)


class Start(Struct, frozen=True, kw_only=True):
    """Seconds: to start the backends, and for the model of a tiny file in the first and the second load of a process.

    The first of them creates the CUDA context.
    """

    backends_s: float
    first_s: float
    second_s: float


class Run(Struct, frozen=True, kw_only=True):
    """One load of the large model onto one GPU."""

    by: By
    cache: Cache
    residency: float  # the share of the file that was in the page cache just before
    total_s: float  # of the load; for the service from the request to the reply
    phases_s: dict[str, float]
    lock: Lock
    dirty_bytes: int  # by how much the memory that has yet to be written to disks grew meanwhile

    @property
    def model_s(self) -> float:
        """Return metadata and weights together, since `mmap` reads the file before the first tensor is reported."""
        return self.phases_s["metadata"] + self.phases_s["weights"]

    @property
    def copy_s(self) -> float:
        """Return the part of the weights that is neither locking nor unlocking."""
        return self.phases_s["weights"] - self.lock.lock_s - self.lock.unlock_s


class Several(Struct, frozen=True, kw_only=True):
    """Warm locked loads with several GPUs, in seconds: one model split over all of them, and one model onto each at
    once, of which the slowest counts."""

    split_s: list[float] = []
    at_once_s: list[float] = []


class Measured(Struct, kw_only=True):
    """All measurements so far; what could not be measured is in `failed`, with the reason."""

    about: dict[str, str]
    model_bytes: int
    n_gpus: int
    bandwidth: Bandwidth | None = None
    start: Start | None = None
    runs: list[Run] = []
    several: Several = field(default_factory=Several)
    failed: dict[str, str] = {}

    def of(self, by: By, cache: Cache) -> list[Run]:
        return [run for run in self.runs if (run.by, run.cache) == (by, cache)]

    def median(self, by: By, cache: Cache, value: Callable[[Run], float]) -> float | None:
        """Return the median over the loads, or None if there is none."""
        return _median([value(run) for run in self.of(by, cache)])

    def total_s(self, by: By, cache: Cache) -> float | None:
        return self.median(by, cache, lambda run: run.total_s)


class Goal(Struct, frozen=True, kw_only=True):
    """`is_met` is None if the goal was not measured."""

    what: str
    limit: str
    measured: str = NOT_MEASURED
    is_met: bool | None = None


def goals(measured: Measured) -> list[Goal]:
    return [
        _quicker_than_plain(measured),
        _service_adds(measured),
        _as_fast_as_the_disk(measured),
        _whole_file_locked(measured),
        _leaves_pages_clean(measured),
    ]


def _quicker_than_plain(measured: Measured) -> Goal:
    what, limit = "warm: locked / quickest of llama.cpp's own modes", f"<= {LOCKED_RATIO}"
    locked_s = measured.total_s("locked", "warm")
    plain = {mode: seconds for mode in PLAIN if (seconds := measured.total_s(mode, "warm")) is not None}
    if locked_s is None or not plain:
        return Goal(what=what, limit=limit)
    quickest = min(plain, key=lambda mode: plain[mode])
    ratio = locked_s / plain[quickest]
    text = f"{ratio:.2f} ({locked_s:.3f} s / {plain[quickest]:.3f} s, {quickest})"
    return Goal(what=what, limit=limit, measured=text, is_met=ratio <= LOCKED_RATIO)


def _service_adds(measured: Measured) -> Goal:
    what, limit = "warm: the service's total minus that of the locked load alone", f"<= {SERVICE_MS:.0f} ms"
    service_s, locked_s = measured.total_s("the service", "warm"), measured.total_s("locked", "warm")
    if service_s is None or locked_s is None:
        return Goal(what=what, limit=limit)
    ms = (service_s - locked_s) * 1000
    return Goal(what=what, limit=limit, measured=f"{ms:.0f} ms", is_met=ms <= SERVICE_MS)


def _as_fast_as_the_disk(measured: Measured) -> Goal:
    what, limit = "cold: the file's bytes over the whole request / the disk's rate", f">= {DISK_SHARE}"
    service_s = measured.total_s("the service", "cold")
    if service_s is None or measured.bandwidth is None:
        return Goal(what=what, limit=limit)
    rate, disk = measured.model_bytes / service_s, max(measured.bandwidth.disk, measured.bandwidth.disk_direct or 0)
    text = f"{rate / disk:.2f} ({rate / 1e9:.2f} / {disk / 1e9:.2f} GB/s)"
    return Goal(what=what, limit=limit, measured=text, is_met=rate / disk >= DISK_SHARE)


def _whole_file_locked(measured: Measured) -> Goal:
    what, limit = "the smallest share of the file that a load locked", ">= 1"
    shares = [run.lock.n_bytes / measured.model_bytes for run in measured.runs if run.by in LOCKING]
    if not shares:
        return Goal(what=what, limit=limit)
    return Goal(what=what, limit=limit, measured=f"{min(shares):.2f}", is_met=min(shares) >= 1)


def _leaves_pages_clean(measured: Measured) -> Goal:
    what = "warm, locked: the largest growth of Dirty in /proc/meminfo / the file's bytes"
    limit = f"<= {DIRTY_SHARE}"
    grown = [run.dirty_bytes for by in LOCKING for run in measured.of(by, "warm")]
    if not grown:
        return Goal(what=what, limit=limit)
    share = max(grown) / measured.model_bytes
    return Goal(what=what, limit=limit, measured=f"{share:.2f}", is_met=share <= DIRTY_SHARE)


def markdown(measured: Measured) -> str:
    verdicts = goals(measured)
    lines = [
        "# Loading onto a GPU",
        "",
        "Written by `python -m bench.gpu`, whose docstring explains how to read it.",
        "",
        *(f"- {name}: {value}" for name, value in measured.about.items()),
        "",
        f"## Goals: {sum(goal.is_met is True for goal in verdicts)} of {len(verdicts)} met",
        "",
        *table(
            ["goal", "measured", "limit", "met"],
            [[one.what, one.measured, one.limit, _VERDICTS[one.is_met]] for one in verdicts],
        ),
        "",
        *_speeds(measured.bandwidth),
        "",
        *_start(measured.start),
        "",
        *_loads(measured),
        "",
        *_several(measured),
    ]
    if faults := sorted({fault for run in measured.runs if run.by in LOCKING for fault in run.lock.faults}):
        lines += ["", "## What the engine said about memory that was not locked", "", *(f"- {one}" for one in faults)]
    if measured.failed:
        failed = [f"- {what}: {' '.join(why.split())}" for what, why in measured.failed.items()]
        lines += ["", "## What failed", "", *failed]
    lines += ["", "## All loads, in the order of the runs", ""]
    heads = ["s", "by", "in cache before", "total", *PHASES, "lock", "unlock", "locked, GB", "Dirty, GB"]
    lines += table(heads, [_each(run) for run in measured.runs])
    return "\n".join(lines) + "\n"


_VERDICTS = {True: "yes", False: "**no**", None: ""}


def _speeds(speeds: Bandwidth | None) -> list[str]:
    heading = ["## Speed of the machine", ""]
    if speeds is None:
        return [*heading, f"{NOT_MEASURED.capitalize()}."]
    rows = {
        "disk, the file read in blocks of 8 MiB, cold": speeds.disk,
        "the same past the page cache (O_DIRECT)": speeds.disk_direct,
        "the same from the page cache": speeds.memory,
        "host to device, ordinary memory": speeds.pageable,
        "host to device, locked memory": speeds.pinned,
    }
    return [*heading, *table(["GB/s, medians", ""], [[what, _gb(rate) or NOT_MEASURED] for what, rate in rows.items()])]


def _start(start: Start | None) -> list[str]:
    heading = ["## The start of CUDA", ""]
    if start is None:
        return [*heading, f"{NOT_MEASURED.capitalize()}."]
    rows = {
        "the backends, which a worker with one GPU starts ahead of the load": start.backends_s,
        "model of a tiny file, the first load of a process": start.first_s,
        "the same, the second load of the process, which has the CUDA context": start.second_s,
        "so the CUDA context, which no runner creates ahead of the load": start.first_s - start.second_s,
    }
    return [*heading, *table(["s, medians", ""], [[what, f"{seconds:.3f}"] for what, seconds in rows.items()])]


def _loads(measured: Measured) -> list[str]:
    n = max((len(measured.of(by, cache)) for by in get_args(By) for cache in CACHES), default=0)
    lines = [
        f"## A model of {measured.model_bytes / 1e9:.2f} GB, Q8_0, all layers on one GPU",
        "",
        f"Medians of {n}; a context of {CONTEXT_LENGTH:,} tokens. Model is metadata and weights; the speed is the "
        "file's bytes divided by what the model takes beyond a tiny one's first load. Copy is what the weights take "
        "beyond locking and unlocking; in a cold load it contains the wait for the disk. The service's total is the "
        "HTTP request; the others are separate processes, timed once the engine has started.",
        "",
    ]
    heads = ["cache", "by", "total, s", "model, s", "lock, s", "copy, s", "unlock, s", "GB/s", "possible, GB/s"]
    rows = [_row(measured, cache, by) for cache in CACHES for by in get_args(By)]
    return lines + table([*heads, "share of the possible"], rows)


def _row(measured: Measured, cache: Cache, by: By) -> list[str]:
    model_s = measured.median(by, cache, lambda run: run.model_s)
    if model_s is None:
        return [cache, by, NOT_MEASURED, *[""] * 7]
    columns: list[Callable[[Run], float]] = [lambda run: run.total_s, lambda run: run.model_s]
    if is_locked := any(run.lock.n_bytes for run in measured.of(by, cache)):
        columns += [lambda run: run.lock.lock_s, lambda run: run.copy_s, lambda run: run.lock.unlock_s]
    cells = [f"{measured.median(by, cache, column):.3f}" for column in columns] + [""] * (0 if is_locked else 3)
    start_s = None if measured.start is None else measured.start.first_s
    speed = None if start_s is None or model_s <= start_s else measured.model_bytes / (model_s - start_s)
    possible = None if measured.bandwidth is None else measured.bandwidth.possible(by, cache)
    share = "" if speed is None or possible is None else f"{speed / possible:.2f}"
    return [cache, by, *cells, _gb(speed), _gb(possible), share]


def _several(measured: Measured) -> list[str]:
    heading = ["## Several GPUs", ""]
    if measured.n_gpus == 1:
        return [*heading, f"{NOT_MEASURED.capitalize()}: one GPU."]
    alone_s = measured.total_s("locked", "warm")
    n = measured.n_gpus
    rows = [["onto one GPU, alone", NOT_MEASURED if alone_s is None else f"{alone_s:.3f}", ""]]
    for what, values in (
        (f"split over {n} GPUs", measured.several.split_s),
        (f"the same file onto each of {n} GPUs at once, the slowest load", measured.several.at_once_s),
    ):
        seconds = _median(values)
        ratio = "" if seconds is None or alone_s is None else f"{seconds / alone_s:.2f}"
        rows.append([what, NOT_MEASURED if seconds is None else f"{seconds:.3f}", ratio])
    return [*heading, "Warm, locked, each load in a process of its own.", "", *table(["", "total, s", "/ alone"], rows)]


def _each(run: Run) -> list[str]:
    known = run.phases_s | {"model": run.model_s}
    phases = [f"{known[phase]:.3f}" if phase in known else "" for phase in PHASES]
    lock = [f"{run.lock.lock_s:.3f}", f"{run.lock.unlock_s:.3f}", f"{run.lock.n_bytes / 1e9:.2f}"]
    cells = [run.cache, run.by, f"{run.residency:.1%}", f"{run.total_s:.3f}", *phases]
    return [*cells, *(lock if run.by in LOCKING else [""] * 3), f"{run.dirty_bytes / 1e9:.2f}"]


def _median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None


def _gb(rate: float | None) -> str:
    return "" if rate is None else f"{rate / 1e9:.2f}"
