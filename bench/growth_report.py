"""Render the measurements of `bench.growth` as Markdown and as a plot."""

from __future__ import annotations

from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter

from bench.growth import N_EVENTS, N_QUICK, PLACE, POLL, Growth, Point
from bench.report import Goal, goal, percentile, table
from bench.scale import N_READ

CONSTANT = 2.0  # largest factor for operations that must not grow
HOT = (PLACE, POLL)


def groups(growth: Growth) -> dict[str, list[Point]]:
    return {"models": growth.models, "instances": growth.instances, "followers": growth.followers}


def p50_ms(points: list[Point], what: str) -> list[float]:
    return [percentile(point.seconds[what], 0.5) * 1000 for point in points]


def goals(growth: Growth) -> list[Goal]:
    """Return the goals: no cost grows faster than its number, and the hot paths do not grow."""
    verdicts = []
    for group, points in groups(growth).items():
        factor = points[-1].n / points[0].n
        for what in points[0].seconds:
            ms = p50_ms(points, what)
            limit = CONSTANT if what in HOT else factor
            verdicts.append(goal(f"{what}: {factor:g} times the {group}", ms[-1] / ms[0], limit, "x"))
    return verdicts


def markdown(growth: Growth) -> str:
    verdicts = goals(growth)
    lines = [f"## Growth: {sum(one.met for one in verdicts)} of {len(verdicts)} goals met", ""]
    rows = [[g.what, f"{g.measured:.2f}", f"{g.limit:g}", "yes" if g.met else "**no**"] for g in verdicts]
    lines += table(["", "factor of the time", "limit", "met"], rows)
    for group, points in groups(growth).items():
        heads = [f"p50, ms, by {group}", *(f"{point.n:,}" for point in points)]
        rows = [[what, *(f"{ms:.2f}" for ms in p50_ms(points, what))] for what in points[0].seconds]
        lines += ["", *table(heads, rows)]
    lines += [
        "",
        f"Redis and the API process are real; a worker and its instances are simulated by their records. By models: "
        f"one model is loaded; by instances: there are 200 models. {N_QUICK} placements and polls each, {8 * N_READ} "
        f"lists, {N_READ} beats, {N_EVENTS} events. Followers are event streams of one load.",
    ]
    return "\n".join(lines)


def plot(growth: Growth, path: Path) -> None:
    """Plot cost by number, both logarithmic: a line at 45 degrees is linear growth."""
    with rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(12, 4.6), dpi=110, layout="constrained")
        for axes, (group, points) in zip(figure.subplots(1, 3, sharey=True), groups(growth).items(), strict=True):
            sizes = [point.n for point in points]
            for what in points[0].seconds:
                axes.plot(sizes, p50_ms(points, what), marker="o", markersize=4, linewidth=1.5, label=what)
            start = min(p50_ms(points, what)[0] for what in points[0].seconds)
            axes.plot(sizes, [start * n / sizes[0] for n in sizes], color="0.6", linestyle=":", label="linear")
            axes.set(xscale="log", yscale="log", xlabel=group, title=f"By number of {group}")
            axes.set_xticks(sizes, [f"{n:,}" for n in sizes])
            axes.xaxis.set_minor_locator(NullLocator())
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
            axes.grid(axis="y", color="0.9")
            axes.legend(frameon=False, fontsize=8)
        figure.axes[0].set_ylabel("median, ms")
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path)
