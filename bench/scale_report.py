"""Render the measurements of `bench.scale` as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter
from msgspec import Struct

from bench.report import Goal, goal, percentile, table
from bench.scale import (
    BEAT,
    FIRST_ROUTE,
    FOLLOW,
    GPUS,
    INSTANCES,
    N_BEATS,
    N_PLACED,
    N_READ,
    N_ROUTED,
    PATHS,
    REFRESH,
    ROUTE,
    SITUATIONS,
    SWEEP,
    Size,
)

LIMIT_MS, ROUTING_LIMIT_MS = 5.0, 1.0


class Line(Struct, frozen=True, kw_only=True):
    """The cost of one operation at each size in ms: the median and the 99th percentile."""

    what: str
    group: str
    p50_ms: list[float]
    p99_ms: list[float]

    @property
    def growth(self) -> float:
        """Return the factor from the smallest to the largest pool."""
        return self.p50_ms[-1] / self.p50_ms[0]


def lines(sizes: list[Size]) -> list[Line]:
    groups = {
        "placing": ([*SITUATIONS], [size.placing_s for size in sizes]),
        "each second": ([BEAT, REFRESH, SWEEP, FOLLOW], [size.beating_s for size in sizes]),
        "routing": ([ROUTE, FIRST_ROUTE], [size.routing_s for size in sizes]),
        "GET": ([*PATHS], [size.reading_s for size in sizes]),
    }
    return [
        Line(
            what=what,
            group=group,
            p50_ms=[percentile(seconds[what], 0.5) * 1000 for seconds in by_size],
            p99_ms=[percentile(seconds[what], 0.99) * 1000 for seconds in by_size],
        )
        for group, (names, by_size) in groups.items()
        for what in names
    ]


def goals(sizes: list[Size]) -> list[Goal]:
    largest = max((line for line in lines(sizes) if line.group == "placing"), key=lambda line: line.p50_ms[-1])
    what = f"placing one load among {sizes[-1].workers:,} workers, p50 of the slowest situation: {largest.what}"
    routing = next(line for line in lines(sizes) if line.what == ROUTE)
    routed = f"routing one request among {sizes[-1].workers * INSTANCES:,} instances, p50"
    return [
        goal(what, largest.p50_ms[-1], LIMIT_MS, "ms"),
        goal(routed, routing.p50_ms[-1], ROUTING_LIMIT_MS, "ms"),
    ]


def markdown(sizes: list[Size]) -> str:
    costs, last = lines(sizes), sizes[-1]
    n, factor = last.workers, last.workers / sizes[0].workers
    text = [
        f"## A pool of {n:,} workers, {n * GPUS:,} GPUs and {n * INSTANCES:,} instances, simulated",
        "",
    ]
    for one in goals(sizes):
        verdict = "met" if one.met else "**missed**"
        text.append(f"- {one.what}: {one.measured:.2f} ms, limit {one.limit:.0f} ms, {verdict}")
    cpu = {what: percentile(seconds, 0.5) * 1000 for what, seconds in last.placing_cpu_s.items()}
    text.append(f"- CPU time of placing, p50: {', '.join(f'{what} {ms:.2f} ms' for what, ms in cpu.items())}")
    worst = max(costs, key=lambda line: line.growth)
    text.append(f"- with {factor:.0f} times the workers the time grows at most {worst.growth:.0f} times ({worst.what})")
    beat = next(line for line in costs if line.what == BEAT)
    text.append(f"- {BEAT}: it grows {beat.growth:.2f} times")
    heads = ["p50, ms, by workers", *(f"{size.workers:,}" for size in sizes), f"p99 at {n:,}", "growth"]
    rows = [
        [
            f"{line.group}: {line.what}",
            *(f"{ms:.2f}" for ms in line.p50_ms),
            f"{line.p99_ms[-1]:.2f}",
            f"{line.growth:.1f} x",
        ]
        for line in costs
    ]
    text += ["", *table(heads, rows)]
    redis = ", ".join(f"{what} {last.redis_s[what] * 1000:.2f} ms" for what in (BEAT, REFRESH, SWEEP, FOLLOW))
    every = last.redis_s[BEAT] * n + last.redis_s[SWEEP]
    replies = ", ".join(f"{path} {last.reply_bytes[path] / 1e6:.1f} MB" for path in PATHS)
    text += [
        "",
        f"Redis' CPU at {n:,} workers: {redis}; all beats and one API's sweep of a second {every:.2f} s. "
        f"Replies: {replies}.",
        "",
        f"A real Redis with what {n:,} workers would write, without workers; the store created the records as for "
        f"loads. Placing: `Roster.candidates` and `Roster.choose` on a roster that was just read, {N_PLACED} times "
        f"each in turn. A beat renews the lease with a snapshot and reads the records of a worker ({N_BEATS} times); "
        f"the sweep includes reading all workers and the view ({N_READ} times each). Routing: `Loaded.llm` for two "
        f"models that have all instances ({N_ROUTED} times). The GETs come from one client, to an API "
        f"process that also refreshes and sweeps once a second ({N_READ} times each; their p99 is the slowest).",
    ]
    return "\n".join(text)


def plot(sizes: list[Size], path: Path) -> None:
    """Plot cost by number of workers, both logarithmic: a line at 45 degrees is linear growth."""
    groups = {"placing": "Placing one load", "each second": "Once a second", "GET": "Reading the whole pool over HTTP"}
    workers = [size.workers for size in sizes]
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
        for axes, (group, title) in zip(figure.subplots(1, len(groups), sharey=True), groups.items(), strict=True):
            for line in lines(sizes):
                if line.group == group:
                    axes.plot(workers, line.p50_ms, marker="o", markersize=4, linewidth=1.5, label=line.what)
            start = min(line.p50_ms[0] for line in lines(sizes) if line.group == group)
            linear = [start * n / workers[0] for n in workers]
            axes.plot(workers, linear, color="0.6", linestyle=":", label="linear, for comparison")
            if group == "placing":
                axes.axhline(LIMIT_MS, color="0.3", linestyle="--", linewidth=1)
                axes.annotate(f"limit: {LIMIT_MS:.0f} ms", (workers[0], LIMIT_MS), (0, 3), textcoords="offset points")
            axes.set(
                xscale="log", yscale="log", title=title, xlabel=f"workers (each {GPUS} GPUs, {INSTANCES} instances)"
            )
            axes.set_xticks(workers, [f"{n:,}" for n in workers])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.grid(axis="y", color="0.9")
            axes.legend(frameon=False, fontsize=8)
            if group == "placing":
                axes.set_ylabel("median, ms")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
