"""What `GET /metrics` adds up: whole numbers in one hash of Redis, by family and labels.

A field is "family|label|...".  A histogram has one for each bucket that holds something, which counts what is in it and
in no smaller one, and one named "sum", in microseconds: sums of whole numbers are exact, in whatever order they come.
No label names a worker: the hash is kept for ever, and in some pools each worker that starts has a new name.
"""

from __future__ import annotations

import asyncio
import bisect
import math
import uuid
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping
from typing import Literal, get_args

from msgspec import UNSET, Struct

from shared.errors import LoadFailure, NoWorker
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.http import Phase

GIB = 2**30
SIZES = {
    "under_1GiB": 1 * GIB,
    "1_8GiB": 8 * GIB,
    "8_32GiB": 32 * GIB,
    "over_32GiB": math.inf,
}  # by what they end before
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
PHASES = ("queue", "spawn", *get_args(Phase))
FAILURES = ({*get_args(LoadFailure)} - {"load_cancelled"}) | {str(NoWorker.code)}  # what a load can fail with
OUTCOMES = [("loaded", ""), ("cancelled", ""), ("lost", ""), *(("failed", code) for code in sorted(FAILURES))]
Add = Callable[[str, int, Mapping[str, int]], Awaitable[None]]  # `store.counters.Counters.add`
RunnerState = Literal["warm", "loading", "loaded"]  # warm: it has no load yet

GONE = "499"  # the status of a request whose client went away before the reply, as nginx logs it


class Family(Struct, frozen=True, kw_only=True):
    """A family of metrics that processes count and Redis adds up.

    `known` are the values of `labels` that a counter shows from 0 on: a series that begins with 1 hides its first
    increase from Prometheus.
    """

    name: str
    kind: Literal["counter", "histogram"]
    help: str
    labels: tuple[str, ...] = ()
    known: tuple[tuple[str, ...], ...] = ()


FAMILIES = (
    Family(
        name="loads",
        kind="counter",
        help="Loads that ended, by outcome (loaded, failed, cancelled, lost) and, for failed loads, error code.",
        labels=("outcome", "reason"),
        known=(*OUTCOMES,),
    ),
    Family(
        name="loaded_bytes",
        kind="counter",
        help="Total size of the models that were loaded, in bytes.",
        known=((),),
    ),
    Family(
        name="restorations",
        kind="counter",
        help="Attempts to reload an instance after its worker stopped or crashed.",
        known=((),),
    ),
    Family(
        name="evictions",
        kind="counter",
        help="Instances that were unloaded to make room for a load.",
        known=((),),
    ),
    Family(
        name="runner_deaths",
        kind="counter",
        help="Runners that exited unexpectedly, by state: warm (no load yet), loading, loaded.",
        labels=("state",),
        known=tuple((state,) for state in get_args(RunnerState)),
    ),
    Family(
        name="http_requests",
        kind="counter",
        help=f"HTTP requests by route and status; {GONE}: the client disconnected before the response.",
        labels=("method", "route", "status"),
    ),
    Family(
        name="load_phase_seconds",
        kind="histogram",
        help="Duration of each phase of successful loads, by size class of the model.",
        labels=("phase", "size"),
    ),
    Family(
        name="load_seconds",
        kind="histogram",
        help="Duration of successful loads, from acceptance to loaded, by size class of the model.",
        labels=("size",),
    ),
    Family(
        name="http_request_seconds",
        kind="histogram",
        help="Time to the start of the response; includes the load if the request waits for it.",
        labels=("method", "route"),
    ),
)


def size_class(size_bytes: int) -> str:
    return next(name for name, end in SIZES.items() if size_bytes < end)


def bucket(seconds: float) -> str:
    """The bound of the smallest bucket that holds this, as Prometheus writes it."""
    at = bisect.bisect_left(BOUNDS_S, seconds)
    return repr(BOUNDS_S[at]) if at < len(BOUNDS_S) else "+Inf"


def field(family: str, *labels: str) -> str:
    return "|".join((family, *labels))


def observed(family: str, seconds: float, *labels: str) -> dict[str, int]:
    """What one observation adds to a histogram."""
    return {field(family, *labels, bucket(seconds)): 1, field(family, *labels, "sum"): round(seconds * 1e6)}


def accepted(instance: Instance) -> dict[str, int]:
    """What a new record adds."""
    return {field("restorations"): 1} if instance.restoring else {}


def moved(old: Instance, new: Instance) -> dict[str, int]:
    """What it adds that a record is changed: something where its load ends, which happens once.

    Only loads that came to `loaded` have all of their phases, so only these are in the histograms.
    """
    if old.loaded_at is not None or old.state in TERMINAL:
        return {}
    if new.loaded_at is not None:
        size = size_class(new.total_size_bytes)
        counts = {field("loads", "loaded", ""): 1, field("loaded_bytes"): new.total_size_bytes}
        phases = {name: new.timing[name] for name in PHASES if name in new.timing}
        for name, seconds in phases.items():
            counts |= observed("load_phase_seconds", seconds, name, size)
        return counts | observed("load_seconds", sum(phases.values()), size)
    if new.state not in TERMINAL:
        return {}
    reason = ""
    if new.state is State.FAILED and new.error is not None:
        reason = new.error.type if new.error.code is UNSET else new.error.code
    return {field("loads", new.state.value, reason): 1}


def died(state: RunnerState) -> dict[str, int]:
    """What the death of a runner adds that nobody had told to end."""
    return {field("runner_deaths", state): 1}


class Tally:
    """What one process has counted and Redis does not have yet.

    It is handed over in numbered batches.  One that was not answered may have been added or not, so it is sent again
    as it was before any other, and Redis adds each number of a process once.  What was not handed over when the process
    is killed is lost: what happened within a beat.
    """

    def __init__(self) -> None:
        self.process = uuid.uuid4().hex
        self._counts: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()
        self._number = 0
        self._handing_over = asyncio.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        for name, n in counts.items():  # Counter.update takes twice as long, and every request comes here
            self._counts[name] += n

    async def hand_over(self, add: Add) -> None:
        """Send what was counted.  Raises what `add` raises; then nothing is lost, and the next call goes on."""
        async with self._handing_over:
            await self._send(add)
            self._batch, self._counts, self._number = self._counts, Counter(), self._number + 1
            await self._send(add)

    async def _send(self, add: Add) -> None:
        if self._batch:
            await add(self.process, self._number, self._batch)
            self._batch = Counter()
