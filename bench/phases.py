"""The phases of a load whose file is in the page cache, and the cost of repacking: measured with
`python -m bench phases`."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from msgspec import Struct

from bench import pagecache
from bench.report import PHASES, table
from bench.subjects import Failure, Load, service

N = 5  # loads of each model, after one uncounted load
PAUSE_S = 0.5
REPACK = ("off", "on")


class Warm(Struct, frozen=True, kw_only=True):
    """The loads of one model, with or without repacking."""

    model: str
    repack: str
    loads: list[Load]

    def phase_s(self, phase: str) -> float:
        return statistics.median(load.phases_s[phase] for load in self.loads)


def measure(models: Mapping[str, Path], models_dir: Path, out: Path, say: Callable[[str], None]) -> list[Warm]:
    """Load each model N times, with and without repacking; `models` has the files by key."""
    measured = []
    for repack in REPACK:
        with service(models_dir, out, LOADSTONE_REPACK=repack) as up:
            for key, path in models.items():
                say(f"warm, {key}, repacking {repack}")
                loads: list[Load] = []
                for _ in range(N + 1):
                    time.sleep(PAUSE_S)
                    if loads and pagecache.residency(path) < 0.98:
                        raise Failure(f"{path.name} is no longer in the page cache")
                    up.reconnect()
                    loads.append(up.load(key))
                measured.append(Warm(model=key, repack=repack, loads=loads[1:]))
    return measured


def markdown(measured: list[Warm]) -> str:
    shown = [phase for phase in PHASES if phase != "model"]
    rows = [
        [
            one.model.rpartition("/")[2],
            one.repack,
            *(f"{one.phase_s(phase) * 1000:.1f}" for phase in shown),
            f"{statistics.median(load.total_s for load in one.loads) * 1000:.1f}",
        ]
        for one in measured
    ]
    return "\n".join(
        [
            "## Warm loads, phase by phase",
            "",
            *table(["p50, ms", "repacking", *shown, "total"], rows),
            "",
            f"Medians of {N} loads after one uncounted load. Metadata consists mostly of the vocabulary. Weights are "
            "mapped, or copied if they are repacked. The context is the time to clear the KV cache. The warm-up is "
            "one decoded token, by one thread for the tiny model and by all cores for the others.",
        ]
    )
