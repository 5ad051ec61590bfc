"""`GET /metrics`: the state and the counters of the pool, in the text format of Prometheus.

Each scrape reads from Redis, so any API process can serve the metrics of the whole pool, and counters survive restarts.
API processes count their own requests.  Several of them may share one port, so that a scrape reaches any of them;
therefore each adds its counts to those in Redis once per beat.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from typing import TypeVar, assert_never, get_args

from prometheus_client import CONTENT_TYPE_PLAIN_0_0_4, CollectorRegistry, generate_latest
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from shared import __version__
from shared.beat import BEAT_S
from shared.lifecycle import TERMINAL, State
from shared.schema.http import WorkerState
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.counters import Counters, Readings
from shared.telemetry import log
from shared.telemetry.tally import BOUNDS_S, FAMILIES, GONE, Family, Tally, field, observed

Row = TypeVar("Row", bound=tuple[str, ...])  # the labels of a sample

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
DEADLINE_S = 4.0  # for the reads of a scrape; Prometheus waits for 10 s
METHODS = frozenset({"GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS"})


class Requests:
    """Middleware: counts all requests, including refused ones."""

    def __init__(self, app: ASGIApp, tally: Tally) -> None:
        self.app = app
        self.tally = tally

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        began = time.monotonic()
        is_gone = is_counted = False

        async def watched_receive() -> Message:
            nonlocal is_gone
            message = await receive()
            is_gone = is_gone or message["type"] == "http.disconnect"
            return message

        async def counted_send(message: Message) -> None:
            nonlocal is_counted
            if message["type"] == "http.response.start":
                is_counted = True
                self._count(scope, GONE if is_gone else str(message["status"]), time.monotonic() - began)
            await send(message)

        try:
            await self.app(scope, watched_receive, counted_send)
        finally:
            if not is_counted:  # an exception, which becomes a 500 further out, or a disconnected client
                self._count(scope, GONE if is_gone else "500", time.monotonic() - began)

    def _count(self, scope: Scope, status: str, seconds: float) -> None:
        """Count a request.  Clients choose paths and methods freely, so labels are restricted to known ones."""
        method = scope["method"] if scope["method"] in METHODS else "other"
        route = scope.get("route")  # absent if the request did not reach the router, for example without a token
        path = "other" if route is None else route.path
        counted = {field("http_requests", method, path, status): 1}
        self.tally.add(counted | observed("http_request_seconds", seconds, method, path))


async def hand_over(tally: Tally, counters: Counters) -> None:
    """Send the counts to Redis once per beat, and on exit.  Runs until cancelled."""
    try:
        while True:
            check_cancelled()
            await asyncio.sleep(BEAT_S)
            with suppress(*UNAVAILABLE):
                await tally.hand_over(counters.add)
    finally:
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(BEAT_S):
                await tally.hand_over(counters.add)


async def scraped(counters: Counters, tally: Tally) -> bytes:
    """Return the reply to a scrape.  If Redis does not answer, it contains little more than `loadstone_redis_up 0`."""
    readings: Readings | None = None
    try:
        async with asyncio.timeout(DEADLINE_S):
            with suppress(*UNAVAILABLE):  # a Redis with a full disk can still be read
                # Include the latest counts of this process; those of others may be a beat old.
                await tally.hand_over(counters.add)
            readings = await counters.read()
    except (*UNAVAILABLE, TimeoutError) as e:
        log.get("api").warning("metrics without Redis", action="redis_unavailable", error=str(e))
    return rendered(readings)


def rendered(readings: Readings | None) -> bytes:
    """Render the metrics; None: Redis does not answer."""
    registry = CollectorRegistry()
    registry.register(Pool(readings))
    return generate_latest(registry)


class Pool(Collector):
    """The families of one scrape."""

    def __init__(self, readings: Readings | None) -> None:
        self.readings = readings

    def collect(self) -> Iterator[Metric]:
        yield InfoMetricFamily(
            "loadstone_build", "Version of the API process that serves the scrape.", {"version": __version__}
        )
        yield GaugeMetricFamily(
            "loadstone_redis_up", "Whether Redis responds (1) or not (0).", self.readings is not None
        )
        if self.readings is not None:
            yield from _workers(self.readings)
            yield from _devices(self.readings)
            yield from _instances(self.readings)
            yield from _requests(self.readings)
            yield from _transitions(self.readings.counters)
            yield from _tallies(self.readings.tallies)


def _gauge(name: str, documentation: str, labels: tuple[str, ...], rows: Mapping[Row, float]) -> Metric:
    family = GaugeMetricFamily(f"loadstone_{name}", documentation, labels=labels)
    for row, value in rows.items():
        family.add_metric(row, value)
    return family


def _workers(readings: Readings) -> Iterator[Metric]:
    """Yield the metrics of the workers.  A worker that died within the last day is down and has no state."""
    alive = [(worker, worker.snapshot) for worker in readings.workers if worker.snapshot is not None]
    up = {(worker.name,): float(worker.epoch is not None) for worker in readings.workers}
    ages = {(worker.name,): max(0.0, round(snapshot.lease_s - worker.lease_left_s, 3)) for worker, snapshot in alive}
    states = {
        (worker.name, state): float(snapshot.state == state)
        for worker, snapshot in alive
        for state in get_args(WorkerState)
    }
    yield _gauge(
        "worker_up", "Whether a worker that was seen in the last day holds its lease (1) or not (0).", ("worker",), up
    )
    yield _gauge("worker_lease_age_seconds", "Time since the last heartbeat of a live worker.", ("worker",), ages)
    yield _gauge(
        "worker_state", "1 for the current state of a live worker, 0 for the others.", ("worker", "state"), states
    )


def _devices(readings: Readings) -> Iterator[Metric]:
    labels = ("worker", "device", "kind")
    devices = {
        (worker.name, device.id, device.kind): device
        for worker in readings.workers
        if worker.snapshot is not None
        for device in worker.snapshot.devices
    }
    total = {row: float(device.total_bytes) for row, device in devices.items()}
    free = {row: float(device.free_bytes) for row, device in devices.items()}
    reserved = {row: float(device.reserved_bytes) for row, device in devices.items()}
    leaked = {row: float(device.leaked_bytes) for row, device in devices.items()}
    available = {row: float(max(0, device.available_bytes)) for row, device in devices.items()}
    yield _gauge("device_total_bytes", "Total memory of a device.", labels, total)
    yield _gauge("device_free_bytes", "Free memory of a device, as its worker last reported it.", labels, free)
    yield _gauge("device_reserved_bytes", "Memory of a device that is reserved for instances.", labels, reserved)
    yield _gauge("device_leaked_bytes", "Used memory of a GPU that belongs to no known process.", labels, leaked)
    yield _gauge("device_available_bytes", "Memory of a device that is available for loads.", labels, available)


def _instances(readings: Readings) -> Iterator[Metric]:
    states = [state.value for state in State if state not in TERMINAL]
    names = [worker.name for worker in readings.workers if worker.epoch is not None]
    rows = {(name, state): 0.0 for name in names for state in states}
    rows |= {row: float(n) for row, n in readings.live.items() if row[1] in states}
    yield _gauge("instances", "Instances by worker and state.", ("worker", "state"), rows)
    queued = {(name,): float(n) for name, n in readings.queued_at.items() if n or name in names}
    yield _gauge("worker_queue_depth", "Loads that wait for a worker to start them.", ("worker",), queued)
    yield _gauge("queue_depth", "Loads that wait in the whole pool.", (), {(): float(readings.queued)})


def _requests(readings: Readings) -> Iterator[Metric]:
    """Yield the requests of loaded instances, as their workers last reported them."""
    snapshots = [worker.snapshot for worker in readings.workers if worker.snapshot is not None]
    loaded = [held for snapshot in snapshots for held in snapshot.held if held.used_at]
    running = {(held.instance_id,): float(held.running) for held in loaded}
    waiting = {(held.instance_id,): float(held.waiting) for held in loaded}
    yield _gauge("requests_running", "Requests that a loaded instance processes.", ("instance",), running)
    cells = {(held.instance_id,): float(held.cells) for held in loaded}
    yield _gauge("kv_cells_used", "Tokens in the KV cache of a loaded instance.", ("instance",), cells)
    yield _gauge("requests_waiting", "Requests that wait for a loaded instance.", ("instance",), waiting)


def _transitions(counters: Mapping[str, int]) -> Iterator[Metric]:
    family = CounterMetricFamily(
        "loadstone_instance_transitions", "Instances that entered each state.", labels=["state"]
    )
    for state in State:
        family.add_metric([state.value], counters.get(state.value, 0))
    yield family
    requeued = "Loads that were requeued because their worker became unavailable or had no room."
    yield CounterMetricFamily("loadstone_requeues", requeued, counters.get("requeued", 0))


def _tallies(tallies: Mapping[str, int]) -> Iterator[Metric]:
    """Render FAMILIES.  Ignores fields of other versions, with other names or labels."""
    rows: dict[tuple[str, int], dict[tuple[str, ...], int]] = {}  # by family and number of labels
    for key, value in sorted(tallies.items()):
        name, *labels = key.split("|")
        rows.setdefault((name, len(labels)), {})[tuple(labels)] = value
    for family in FAMILIES:
        match family.kind:
            case "counter":
                yield _counter(family, rows.get((family.name, len(family.labels)), {}))
            case "histogram":
                yield _histogram(family, rows.get((family.name, len(family.labels) + 1), {}))
            case _:
                assert_never(family.kind)


def _counter(family: Family, rows: Mapping[tuple[str, ...], int]) -> Metric:
    """Render a counter from its values by labels."""
    metric = CounterMetricFamily(f"loadstone_{family.name}", family.help, labels=family.labels)
    for labels, value in {**dict.fromkeys(family.known, 0), **rows}.items():
        metric.add_metric(labels, value)
    return metric


def _histogram(family: Family, rows: Mapping[tuple[str, ...], int]) -> Metric:
    """Render a histogram from its values by labels and part: a bucket's bound, or "sum" in microseconds."""
    metric = HistogramMetricFamily(f"loadstone_{family.name}", family.help, labels=family.labels)
    series: dict[tuple[str, ...], dict[str, int]] = {}
    for (*labels, part), value in rows.items():
        series.setdefault(tuple(labels), {})[part] = value
    for its, parts in series.items():
        total_us = parts.pop("sum", 0)
        metric.add_metric(its, cumulative(parts), total_us / 1e6)
    return metric


def cumulative(counts: Mapping[str, int]) -> list[tuple[str, float]]:
    """Return cumulative buckets, as Prometheus requires, from the counts of separate buckets.

    Includes the bounds that other versions used.
    """
    bounds = sorted({*BOUNDS_S, math.inf, *map(float, counts)})
    names = ["+Inf" if bound == math.inf else repr(bound) for bound in bounds]
    return [*zip(names, map(float, accumulate(counts.get(name, 0) for name in names)), strict=True)]
