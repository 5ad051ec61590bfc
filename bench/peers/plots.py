"""Plots of the comparison."""

from __future__ import annotations

from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")  # before the import of pyplot: there may be no display
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

from bench.peers.figures import Cache, Measured, ready

COLOURS = mpl.colormaps["tab10"]


def times(measured: Measured, cache: Cache, path: Path) -> None:
    """Plot the times: a panel for each model, since their times differ by a factor of 100, and a dot for each load."""
    figure, panels = plt.subplots(1, len(measured.models), figsize=(3.4 * len(measured.models), 4.2), sharey=True)
    places = range(len(measured.subjects))
    for panel, model in zip(panels, measured.models, strict=True):
        medians = [measured.median(model, cache, subject, ready) for subject in measured.subjects]
        longest = max(median for median in medians if median is not None)
        for place, subject, median in zip(places, measured.subjects, medians, strict=True):
            if median is None:
                continue
            single = [
                run.times.ready_s
                for run in measured.runs
                if (run.model, run.cache, run.subject) == (model, cache, subject)
            ]
            panel.barh(place, median, color=COLOURS(place), height=0.7)
            panel.plot(single, [place] * len(single), ".", color="black", markersize=3, alpha=0.5)
            text = f" {median:.2f} s" if median >= 0.1 else f" {median * 1000:.0f} ms"
            panel.text(max(median, *single), place, text, va="center", fontsize=8)
            longest = max(longest, *single)
        panel.set_xlim(0, longest * 1.3)
        panel.set_title(model, fontsize=10)
        panel.set_xlabel("seconds")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, measured.subjects)
    panels[0].invert_yaxis()
    figure.suptitle(f"Time to ready, {cache} page cache: medians, with a dot for each load")
    _save(figure, path)


def memory(measured: Measured, path: Path) -> None:
    """Plot own memory, and the mapped file beside it."""
    figure, panels = plt.subplots(1, len(measured.models), figsize=(3.4 * len(measured.models), 4.2), sharey=True)
    places = range(len(measured.subjects))
    for panel, model in zip(panels, measured.models, strict=True):
        for place, subject in zip(places, measured.subjects, strict=True):
            peak = measured.peak(model, subject)
            if peak is None:
                continue
            own, mapped = peak.own_bytes / 1e9, peak.mapped_bytes / 1e9
            panel.barh(place, own, color=COLOURS(place), height=0.7)
            panel.barh(place, mapped, left=own, color=COLOURS(place), height=0.7, alpha=0.3)
            panel.text(own + mapped, place, f" {own:.2f}", va="center", fontsize=8)
        panel.set_xlim(0, panel.get_xlim()[1] * 1.2)
        panel.set_title(model, fontsize=10)
        panel.set_xlabel("GB")
        panel.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, measured.subjects)
    panels[0].invert_yaxis()
    figure.suptitle(
        "Peak memory: own memory of the processes (labelled), and in pale the model's file in the page cache"
    )
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)
