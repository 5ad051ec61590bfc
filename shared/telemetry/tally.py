"""The counters of `GET /metrics`: integers in one Redis hash, by family and labels.

A field is named "family|label|...".  A histogram has one field for each bucket that is not empty, which does not
include the smaller buckets, and a field "sum" in microseconds: sums of integers are exact in any order.  No label names
a worker, because the hash never expires, and in some pools each new worker has a new name.
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

from shared.channel.messages import Usage
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
}  # exclusive upper bounds
BOUNDS_S = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
PHASES = ("queue", "spawn", *get_args(Phase))
FAILURES = ({*get_args(LoadFailure)} - {"load_cancelled"}) | {str(NoWorker.code)}  # error codes of failed loads
OUTCOMES = [("loaded", ""), ("cancelled", ""), ("lost", ""), *(("failed", code) for code in sorted(FAILURES))]
Add = Callable[[str, int, Mapping[str, int]], Awaitable[None]]  # `store.counters.Counters.add`
RunnerState = Literal["warm", "loading", "loaded"]  # warm: no load yet

GONE = "499"  # the status that nginx logs if the client disconnects before the reply


class Family(Struct, frozen=True, kw_only=True):
    """A family of metrics that processes count and Redis accumulates.

    `known` are the values of `labels` for which a counter is exported from 0 on: Prometheus cannot see the first
    increase of a series that starts at 1.  `named` does the same for the names of tokens, which are configured.
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
        name="evictions_refused",
        kind="counter",
        help="Evictions that were given up because the instance was in use.",
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
        name="requests",
        kind="counter",
        help="Requests to loaded models that ended, by route, outcome (completed, cancelled, or an error code) and "
        "name of the token.",
        labels=("route", "outcome", "token"),
    ),
    Family(
        name="prompt_tokens",
        kind="counter",
        help="Tokens of the prompts of completed requests.",
        labels=("token",),
        known=(("",),),
    ),
    Family(
        name="cached_tokens",
        kind="counter",
        help="Tokens of these prompts that were not processed again, because their beginning was.",
        labels=("token",),
        known=(("",),),
    ),
    Family(
        name="generated_tokens",
        kind="counter",
        help="Tokens that completed requests generated.",
        labels=("token",),
        known=(("",),),
    ),
    Family(
        name="preemptions",
        kind="counter",
        help="Requests that were set back, and went on later, because the context of their instance was full.",
        known=((),),
    ),
    Family(
        name="request_seconds",
        kind="histogram",
        help="Duration of completed requests to loaded models, until the last token.",
        labels=("route",),
    ),
    Family(
        name="time_to_first_token_seconds",
        kind="histogram",
        help="Time to the first token of completed requests, with their wait and their prompt.",
        labels=("route",),
    ),
    Family(
        name="time_per_output_token_seconds",
        kind="histogram",
        help="Time for each token after the first of completed requests, on average over an answer.",
        labels=("route",),
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
    """Return the upper bound of the smallest bucket that contains a value, in the notation of Prometheus."""
    at = bisect.bisect_left(BOUNDS_S, seconds)
    return repr(BOUNDS_S[at]) if at < len(BOUNDS_S) else "+Inf"


def field(family: str, *labels: str) -> str:
    return "|".join((family, *labels))


def observed(family: str, seconds: float, *labels: str) -> dict[str, int]:
    """Return the counts that one observation adds to a histogram."""
    return {field(family, *labels, bucket(seconds)): 1, field(family, *labels, "sum"): round(seconds * 1e6)}


def accepted(instance: Instance) -> dict[str, int]:
    """Return the counts that a new record adds."""
    return {field("restorations"): 1} if instance.restoring else {}


def moved(old: Instance, new: Instance) -> dict[str, int]:
    """Return the counts that a change of a record adds.  Only the end of the load, which happens once, is counted.

    The histograms include successful loads only, since only these have all phases.
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
    """Return the counts that an unexpected exit of a runner adds."""
    return {field("runner_deaths", state): 1}


def named(token: str) -> dict[str, int]:
    """Return what exports the counters of a token's name from 0 on."""
    return dict.fromkeys(
        (field("prompt_tokens", token), field("cached_tokens", token), field("generated_tokens", token)), 0
    )


def answered(
    route: str,
    outcome: str,
    seconds: float,
    *,
    token: str,
    first_token_s: float | None,
    usage: Usage | None,
    choices: int | None,
) -> dict[str, int]:
    """Return the counts that a request to a loaded model adds.

    `token`: the name of the client's, "" if it has none; `usage`: of a completed request, which alone counts in the
    histograms; `first_token_s`: None if it has no token; `choices`: the number of its answers, None if they were not
    generated at the same time.
    """
    counts = {field("requests", route, outcome, token): 1}
    if usage is None:
        return counts
    counts |= {
        field("prompt_tokens", token): usage.prompt_tokens,
        field("cached_tokens", token): usage.cached_tokens,
        field("generated_tokens", token): usage.generated_tokens,
    }
    counts |= observed("request_seconds", seconds, route)
    if first_token_s is not None:
        counts |= observed("time_to_first_token_seconds", first_token_s, route)
    if choices is not None and usage.generated_tokens > choices:
        later = usage.generated_tokens / choices - 1  # of each answer, on average
        counts |= observed("time_per_output_token_seconds", usage.generation_s / later, route)
    return counts


class Tally:
    """The counts of one process that are not in Redis yet.

    They are sent in numbered batches.  A batch without a reply may or may not have been added, so it is sent again
    unchanged before the next one, and Redis adds each batch number of a process only once.  If the process is killed,
    the counts since its last beat are lost.
    """

    def __init__(self) -> None:
        self.process = uuid.uuid4().hex
        self._counts: Counter[str] = Counter()
        self._batch: Counter[str] = Counter()
        self._number = 0
        self._handing_over = asyncio.Lock()

    def add(self, counts: Mapping[str, int]) -> None:
        for name, n in counts.items():  # twice as fast as Counter.update, and called for every request
            self._counts[name] += n

    async def hand_over(self, add: Add) -> None:
        """Send the counts to Redis.  Raises what `add` raises; nothing is lost then, and the next call continues."""
        async with self._handing_over:
            await self._send(add)
            self._batch, self._counts, self._number = self._counts, Counter(), self._number + 1
            await self._send(add)

    async def _send(self, add: Add) -> None:
        if self._batch:
            await add(self.process, self._number, self._batch)
            self._batch = Counter()
