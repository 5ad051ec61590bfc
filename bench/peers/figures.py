"""The measurements of the comparison, and the goals computed from them."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Literal

from msgspec import Struct

from bench.peers.memory import Peak
from bench.peers.subjects import DIRECT, FRESH, READ, ROUTER, ROUTER_DEFAULTS, WARM, Loadstone, Times

Cache = Literal["warm", "cold"]
CACHES: tuple[Cache, ...] = ("warm", "cold")
Figure = Callable[[Times], float]
BARE = (FRESH, WARM, READ, DIRECT)  # the bare subjects that do the same work


class Run(Struct, frozen=True, kw_only=True):
    """One load; `residency` is the share of the model's files in the page cache just before."""

    model: str
    cache: Cache
    subject: str
    residency: float
    times: Times


class Memory(Struct, frozen=True, kw_only=True):
    model: str
    subject: str
    peak: Peak


class Failed(Struct, frozen=True, kw_only=True):
    """A peer that could not load a model; it was not tried again."""

    model: str
    subject: str
    why: str


class Measured(Struct, frozen=True, kw_only=True):
    """All measurements, load by load, in the order of the runs; `models` has the bytes by title."""

    about: dict[str, str]
    models: dict[str, int]
    subjects: list[str]
    runs: list[Run]
    memory: list[Memory]
    failed: list[Failed]

    def median(self, model: str, cache: Cache, subject: str, figure: Figure) -> float | None:
        """Return the median of a figure, or None if it was not measured."""
        values = [
            figure(run.times) for run in self.runs if (run.model, run.cache, run.subject) == (model, cache, subject)
        ]
        return statistics.median(values) if values else None

    def peak(self, model: str, subject: str) -> Peak | None:
        return next((m.peak for m in self.memory if (m.model, m.subject) == (model, subject)), None)


def ready(times: Times) -> float:
    return times.ready_s


def token(times: Times) -> float:
    return times.token_s


def without_warmup(times: Times) -> float:
    return times.ready_s - (times.warmup_s or 0)


class Goal(Struct, frozen=True):
    what: str
    measured_s: float
    limit_s: float

    @property
    def is_met(self) -> bool:
        return self.measured_s <= self.limit_s


def goals(measured: Measured) -> list[Goal]:
    return [
        *_against_router(measured, ROUTER),
        *_against_router(measured, ROUTER_DEFAULTS),
        *_against_bare(measured, "with a token decoded", ready, token),
        *_against_bare(measured, "without it", without_warmup, ready),
    ]


def _against_router(measured: Measured, router: str) -> list[Goal]:
    verdicts = []
    for cache in CACHES:
        for number, model in enumerate(measured.models):
            share = 0.35 if number == 0 else 0.9  # the first model is the tiny one
            own = measured.median(model, cache, Loadstone.name, ready)
            peer = measured.median(model, cache, router, ready)
            if own is not None and peer is not None:
                verdicts.append(Goal(f"{model}, {cache}: {share} of {router}", own, share * peer))
    return verdicts


def _against_bare(measured: Measured, what: str, own_of: Figure, bare_of: Figure) -> list[Goal]:
    verdicts = []
    for cache in CACHES:
        for model in measured.models:
            own = measured.median(model, cache, Loadstone.name, own_of)
            ways = [measured.median(model, cache, way, bare_of) for way in BARE]
            fastest = min((way for way in ways if way is not None), default=None)
            if own is not None and fastest is not None:
                limit_s = 1.05 * fastest + 0.015
                verdicts.append(Goal(f"{model}, {cache}, {what}: the fastest bare mode + 5 % + 15 ms", own, limit_s))
    return verdicts
