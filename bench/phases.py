"""What is left of a load when its file is in the page cache, phase by phase, and what repacking costs: measured with
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

N = 5  # loads of each, after one that is not counted
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
    """Models by key."""
    found = []
    for repack in REPACK:
        with service(models_dir, out, LOADSTONE_REPACK=repack) as up:
            for key, path in models.items():
                say(f"warm, {key}, repacking {repack}")
                loads: list[Load] = []
                for _ in range(N + 1):
                    time.sleep(PAUSE_S)
                    if loads and pagecache.residency(path) < 0.98:
                        raise Failure(f"{path.name} is not in the page cache any more")
                    up.reconnect()
                    loads.append(up.load(key))
                found.append(Warm(model=key, repack=repack, loads=loads[1:]))
    return found


def markdown(found: list[Warm]) -> str:
    shown = [phase for phase in PHASES if phase != "model"]
    rows = [
        [
            one.model.rpartition("/")[2],
            one.repack,
            *(f"{one.phase_s(phase) * 1000:.1f}" for phase in shown),
            f"{statistics.median(load.total_s for load in one.loads) * 1000:.1f}",
        ]
        for one in found
    ]
    return "\n".join(
        [
            "## Warm loads, phase by phase",
            "",
            *table(["p50, ms", "repacking", *shown, "in all"], rows),
            "",
            f"Medians of {N} loads after one that is not counted. Metadata is the vocabulary, in all but name; weights "
            "are mapped, or copied where they are repacked; the context is the KV cache that is cleared; the warm-up "
            "is a token decoded, by one thread in the tiny model and by all cores in the others.",
        ]
    )
