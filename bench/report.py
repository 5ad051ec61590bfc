"""Compute figures from the measurements, and render them as Markdown."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from bench.subjects import Load

Cache = Literal["warm", "cold"]
Who = Literal["service", "bare"]

PHASES = ("queue", "spawn", "metadata", "weights", "model", "context", "warmup")


class Run(Struct, frozen=True, kw_only=True):
    """One load of the big model; `residency` is the share of its file in the page cache just before."""

    cache: Cache
    who: Who
    residency: float
    load: Load


class Measured(Struct, frozen=True, kw_only=True):
    """All measurements, run by run; `tiny` by row of the report."""

    machine: dict[str, str]
    big_bytes: int
    tiny: dict[str, list[Load]]
    big: list[Run]

    def big_s(self, cache: Cache, who: Who, *, token: bool = True) -> float:
        """Return the median of the totals, with or without the time of the decoded token."""
        runs = [run.load for run in self.big if (run.cache, run.who) == (cache, who)]
        return statistics.median(load.total_s - (0 if token else load.phases_s["warmup"]) for load in runs)


class Goal(Struct, frozen=True, kw_only=True):
    what: str
    measured: float
    limit: float
    unit: Literal["ms", "x"]
    met: bool


def percentile(values: Iterable[float], share: float) -> float:
    """Return a percentile by nearest rank, so a measured value: the 99th of 50 values is the largest."""
    ordered = sorted(values)
    return ordered[math.ceil(share * len(ordered)) - 1]


def goal(what: str, value: float, limit: float, unit: Literal["ms", "x"]) -> Goal:
    return Goal(what=what, measured=value, limit=limit, unit=unit, met=value <= limit)


def goals(measured: Measured) -> list[Goal]:
    spaced = measured.tiny["service"]
    overhead = [load.overhead_s * 1000 for load in spaced]
    total = [load.total_s * 1000 for load in spaced]
    return [
        goal("overhead of the service, p50", percentile(overhead, 0.5), 10, "ms"),
        goal("overhead of the service, p99", percentile(overhead, 0.99), 40, "ms"),
        goal("tiny model through HTTP in all, p50", percentile(total, 0.5), 25, "ms"),
        goal(
            "big model, cold: service / bare mmap",
            measured.big_s("cold", "service") / measured.big_s("cold", "bare"),
            1.25,
            "x",
        ),
    ]


def head(machine: dict[str, str]) -> str:
    return "\n".join(["# Loadstone's benchmark", "", *(f"- {name}: {value}" for name, value in machine.items())])


def markdown(measured: Measured) -> str:
    verdicts = goals(measured)
    lines = [f"## Goals: {sum(goal.met for goal in verdicts)} of {len(verdicts)} met", ""]
    lines += table(
        ["goal", "measured", "limit", "met"],
        [[g.what, _in_unit(g.measured, g), _in_unit(g.limit, g), "yes" if g.met else "**no**"] for g in verdicts],
    )
    lines += ["", *_tiny(measured), "", *_big(measured)]
    return "\n".join(lines)


def _tiny(measured: Measured) -> list[str]:
    service = measured.tiny["service"]
    n, whole = len(service), _p50(load.total_s for load in service)
    lines = [f"## Tiny model, {n} loads per row after one uncounted load", ""]
    for row in ("bare, warm process", "bare, fresh fork"):
        bare = _p50(load.load_s for load in measured.tiny[row])
        lines.append(f"- service / {row} = {whole / bare:.2f} ({whole * 1000:.2f} ms / {bare * 1000:.2f} ms)")
    rows = []
    for row, loads in measured.tiny.items():
        columns = [
            [load.total_s for load in loads],
            [load.load_s for load in loads],
            [load.overhead_s for load in loads],
        ]
        rows.append([row, *(f"{percentile(column, q) * 1000:.2f}" for column in columns for q in (0.5, 0.99))])
    heads = [f"{what} {q}" for what in ("total", "load", "overhead") for q in ("p50", "p99")]
    lines += ["", *table(["ms", *heads], rows)]
    lines += [
        "",
        "Each load was followed by an unload and, except in the rows 'back to back', by a pause of 150 ms. Total is "
        "the duration of the HTTP request for the client, load is the reply's `load_time_seconds`, overhead is their "
        "difference. A bare load is timed inside its process: model, context, one token; the total of a fresh fork "
        f"includes the fork, the start of the backends and the freeing. The p99 of {n} is the slowest load.",
        "",
    ]
    phases = [[row, *_phases(loads, 1000, "{:.2f}")] for row, loads in measured.tiny.items()]
    lines += table(["p50, ms", *PHASES], phases)
    lines += ["", "Model is the sum of metadata and weights; model, context and warmup add up to the load."]
    return lines


def _big(measured: Measured) -> list[str]:
    caches: tuple[Cache, ...] = ("cold", "warm")
    name = f"{measured.big_bytes / 1e9:.1f} GB"
    lines = [f"## {name} model, Q8_0, medians of {len(measured.big) // 4} interleaved runs", ""]
    rows = []
    for cache in caches:
        for token, what in ((True, ""), (False, ", without the decoded token")):
            service, bare = (measured.big_s(cache, who, token=token) for who in ("service", "bare"))
            ratio = f"{service / bare:.2f} ({service:.2f} s / {bare:.2f} s)"
            lines.append(f"- {cache} {name}{what}: service / bare mmap = {ratio}")
        for run in (run for run in measured.big if run.cache == cache):
            figures = _phases([run.load], 1, "{:.3f}")
            rows.append([cache, run.who, f"{run.residency:.1%}", f"{run.load.total_s:.3f}", *figures])
    lines += ["", *table(["s", "who", "in cache before", "total", *PHASES], rows)]
    lines += [
        "",
        "In the order of the runs, by state of the cache. The service's total is the HTTP request; bare is a fresh "
        "process with the library imported and initialised that maps the file. Cold refers to the page cache of this "
        "machine only: a disk or a hypervisor may have a cache below it.",
    ]
    return lines


def _phases(loads: list[Load], scale: float, form: str) -> list[str]:
    """Return the median of each phase, or an empty string if such a load has no such phase."""
    known = loads[0].phases_s
    return [form.format(_p50(load.phases_s[p] for load in loads) * scale) if p in known else "" for p in PHASES]


def _p50(values: Iterable[float]) -> float:
    return percentile(values, 0.5)


def _in_unit(value: float, goal: Goal) -> str:
    return f"{value:.2f} x" if goal.unit == "x" else f"{value:.1f} ms"


def table(heads: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows)]
