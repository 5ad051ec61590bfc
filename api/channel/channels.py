"""The channels of this API process, opened on demand: one for each runner that it sends requests to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from functools import partial

from api.channel.answer import Answer
from api.channel.connection import Connection, connect
from api.outcome import current
from shared.channel.messages import Complete, Order, ToModel
from shared.errors import NoRoute, QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.schema.snapshot import WorkerSnapshot
from shared.telemetry.tally import Tally, answered

Key = tuple[str, str]  # epoch of the worker, id of the load

CLOSED = "The server is shutting down."
NO_NAMES: Mapping[str, str] = {}


class Channels:
    """Sends requests to the runners of loaded instances."""

    def __init__(
        self, worker: Callable[[str], WorkerSnapshot | None], tally: Tally, names: Mapping[str, str] = NO_NAMES
    ) -> None:
        """`worker` returns the last snapshot of a worker, None if it is not alive; `names` has those of clients, for
        the metrics."""
        self._worker = worker
        self._tally = tally
        self._names = names
        self._connections: dict[Key, asyncio.Task[Connection]] = {}
        # A snapshot, and the number of requests when it was first looked at.
        self._then: dict[Key, tuple[WorkerSnapshot | None, int]] = {}

    @asynccontextmanager
    async def answering(self, instance: Instance, request: ToModel, route: str) -> AsyncIterator[Answer]:
        """Send a request to a loaded instance, and yield its answer.  Leaving the block early cancels the request.

        The id of the request is chosen here; `route` is that of the client's request, for the metrics.  Raises NoRoute,
        ModelUnloaded and RunnerLost, also in the iteration.
        """
        began = time.monotonic()
        answer = Answer()
        try:
            connection = await self._connection(instance)
            id_ = connection.ask(request, answer)
            try:
                yield answer
            finally:
                connection.drop(id_)
        except ServiceError as e:
            answer.fail(e)
            raise
        finally:
            current().answered(instance, answer)
            self._tally.add(
                answered(
                    route,
                    answer.outcome,
                    time.monotonic() - began,
                    token=self._names.get(request.client, ""),
                    first_token_s=None if answer.first_at is None else answer.first_at - began,
                    usage=answer.usage,
                    choices=_side_by_side(request),
                )
            )

    def busy(self, instance: Instance) -> int:
        """Return how many requests an instance has: as its worker published, and those that this process sent since."""
        opening = self._connections.get(_key(instance))
        ours = 0 if opening is None or _has_ended(opening) or not opening.done() else opening.result().n_requests
        snapshot = self._worker(instance.worker)
        held = [] if snapshot is None else snapshot.held
        published = sum(one.running + one.waiting for one in held if one.instance_id == instance.instance_id)
        if not ours:
            return published
        known = self._then.get(_key(instance))
        if known is None or known[0] is not snapshot:
            known = self._then[_key(instance)] = snapshot, ours
        return max(ours, published + ours - known[1])

    async def reaches(self, instance: Instance) -> bool:
        """Return whether the runner of an instance answers on a channel; opens one if there is none."""
        try:
            await self._connection(instance)
        except ServiceError:
            return False
        return True

    async def close(self) -> None:
        """Close all channels, which cancels their requests."""
        for opening in [*self._connections.values()]:
            opening.cancel()
            await asyncio.wait([opening])
            if not opening.cancelled() and opening.exception() is None:
                opening.result().end(QueueUnavailable(CLOSED))

    async def _connection(self, instance: Instance) -> Connection:
        key = _key(instance)
        opening = self._connections.get(key)
        if opening is None or _has_ended(opening):
            opening = self._connections[key] = asyncio.create_task(self._open(key, instance))
            opening.add_done_callback(partial(self._opened, key))
        await asyncio.wait([opening])  # a cancelled caller must not cancel it for the others
        if opening.cancelled():
            raise QueueUnavailable(CLOSED)
        return opening.result()

    async def _open(self, key: Key, instance: Instance) -> Connection:
        snapshot = self._worker(instance.worker)
        if snapshot is None or snapshot.epoch != instance.epoch:
            raise NoRoute(f"Worker '{instance.worker}' is not available. Try again shortly.")
        if snapshot.channels is None:
            raise NoRoute(f"Worker '{instance.worker}' accepts no requests from API processes.")
        return await connect(snapshot.channels, instance.id, instance.worker)

    def _opened(self, key: Key, opening: asyncio.Task[Connection]) -> None:
        if opening.cancelled() or opening.exception() is not None:
            self._forget(key, opening)
        else:
            opening.result().ended.add_done_callback(lambda _: self._forget(key, opening))

    def _forget(self, key: Key, opening: asyncio.Task[Connection]) -> None:
        if self._connections.get(key) is opening:
            del self._connections[key]
            self._then.pop(key, None)


def _side_by_side(request: ToModel) -> int | None:
    """Return the number of answers, None if they are not all generated at the same time."""
    is_one_prompt = not isinstance(request, Complete) or len(request.prompts) == 1
    return request.choices if isinstance(request, Order) and is_one_prompt else None


def _key(instance: Instance) -> Key:
    return instance.epoch or "", instance.id


def _has_ended(opening: asyncio.Task[Connection]) -> bool:
    return opening.done() and (opening.cancelled() or opening.exception() is not None or opening.result().ended.done())
