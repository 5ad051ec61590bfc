"""Follows the log of an instance, and waits for the outcome of a load."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Collection
from contextlib import aclosing, suppress

from api.headers import FIRST, is_after
from api.loads.jobs import event, is_over, outcome
from api.loads.records import Records
from api.subscription import Waiters, subscribed
from shared.errors import ErrorBody, NoWorker, QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.store.connection import UNAVAILABLE, Listen, check_cancelled
from shared.store.instances import HISTORY_N, Instances
from shared.store.keys import NEWS

RECHECK_S = 1.0
RECORD_LOST = "Redis lost the record of this load. Check the list of models before you try again."
NO_OUTCOME = "The log of this load ended without a result."
AWAY = -1  # not a revision of any record


class ReportedFailure(ServiceError):
    """A failure that a worker reported.  Its body is that of the record."""

    def __init__(self, body: ErrorBody, retry_after_s: int | None = None) -> None:
        super().__init__(body.message)
        self._body = body
        self.retry_after_s = NoWorker.retry_after_s if body.type == NoWorker.type else retry_after_s

    def body(self) -> ErrorBody:
        return self._body


class Follower:
    """Follows records for one API process.

    One subscription wakes all waiting callers; a recheck every second finds changes that the subscription missed.

    Every method but `run` raises what UNAVAILABLE lists if Redis does not answer.
    """

    def __init__(self, instances: Instances, listen: Listen, changed: Callable[[str], None] = lambda _: None) -> None:
        """`changed` is called with the id of each record that changes."""
        self._changed = changed
        self._instances = instances
        self._listen = listen
        self._waiters = Waiters()
        self._readings: dict[tuple[str, str], asyncio.Future[list[tuple[str, Instance]]]] = {}

    @property
    def followed(self) -> Collection[str]:
        """The ids of the records that are being followed."""
        return self._waiters.ids

    async def run(self) -> None:
        """Run the subscription and the recheck until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(subscribed(self._listen, NEWS, lambda data: self._heard(data.decode())))
            group.create_task(self._recheck())

    async def follow(self, instance: Instance, after: str = "0") -> AsyncGenerator[tuple[str, Instance], None]:
        """Yield each revision of a record after entry `after` of its log, with its entry id, up to the terminal one.

        Use within `aclosing`.  Raises QueueUnavailable if Redis has lost the record.
        """
        last = after
        with self._waiters.of(instance.id) as woken:
            while True:
                woken.clear()
                history = await self._read(instance, last)
                for entry, revision in history:
                    last = entry
                    yield entry, revision
                    if revision.state in TERMINAL:
                        return
                if not history:
                    record = await self._instances.get(instance.id)
                    if record is None:
                        raise QueueUnavailable(RECORD_LOST)
                    if record.state in TERMINAL and not await self._read(instance, last):
                        return  # `after` was the last entry: nothing is left to yield
                if len(history) < HISTORY_N:
                    check_cancelled()
                    await woken.wait()

    async def until(self, id_: str, predicate: Callable[[Instance], bool]) -> Instance:
        """Return the first revision that satisfies `predicate`, from the current revision on.

        Raises QueueUnavailable if Redis has lost the record, or if the log ends before.
        """
        # Read before the record, which includes all entries up to this one.
        last = await self._instances.last_entry(id_)
        record = await self._instances.get(id_)
        if record is None:
            raise QueueUnavailable(RECORD_LOST)
        if predicate(record):
            return record
        async with aclosing(self.follow(record, last)) as revisions:
            async for _, revision in revisions:
                if predicate(revision):
                    return revision
        raise QueueUnavailable(NO_OUTCOME)

    async def loaded(self, instance: Instance) -> Instance:
        """Follow a load until it is loaded; return that revision.

        Raises ReportedFailure if the load fails or is cancelled, and QueueUnavailable if Redis has lost the record.
        """
        async with aclosing(self.follow(instance)) as revisions:
            async for _, revision in revisions:
                if revision.state is State.LOADED:
                    return revision
                if (error := outcome(revision)) is not None:
                    raise ReportedFailure(error)
        raise QueueUnavailable(NO_OUTCOME)

    async def resumed(self, instance: Instance, after: str) -> str | None:
        """Return the log entry after which to resume the events for a client that received `after` last.

        None if the client has received all events.
        """
        if after == FIRST or is_after(after, await self._instances.last_entry(instance.id)):
            return FIRST  # `after` is not an entry of this log
        if is_over(instance):
            left = await self._instances.history(instance, after)
            if all(event(revision) is None for _, revision in left):
                return None
        return after

    async def _read(self, instance: Instance, after: str) -> list[tuple[str, Instance]]:
        """Return the revisions after `after`.  Callers that arrive before the read starts share it.

        A change may wake hundreds of followers, each of which would otherwise decode the same reply of Redis.
        """
        key = (instance.id, after)
        if (reading := self._readings.get(key)) is None:

            async def read() -> list[tuple[str, Instance]]:
                del self._readings[key]  # later callers may have been woken by a newer change
                return await self._instances.history(instance, after)

            reading = self._readings[key] = asyncio.ensure_future(read())
            # Retrieves the exception of a read whose callers have all gone: asyncio would report it otherwise.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reading)

    def _heard(self, id_: str) -> None:
        self._changed(id_)
        self._waiters.wake(id_)

    async def _recheck(self) -> None:
        """Wake the followers of records that changed without a notification.

        While Redis does not answer, wake all followers: their next read raises the error, which their clients get.
        """
        seen: dict[str, int | None] = {}
        while True:
            check_cancelled()
            await asyncio.sleep(RECHECK_S)
            ids = list(self._waiters.ids)
            try:
                now = dict(zip(ids, await self._instances.revisions(ids), strict=True)) if ids else {}
            except UNAVAILABLE:
                now = dict.fromkeys(ids, AWAY)
            for id_, rev in now.items():
                if rev in (None, AWAY) or seen.get(id_) != rev:  # also at the first check: it may have changed before
                    self._waiters.wake(id_)
            seen = now


async def settled(follower: Follower, records: Records, instance: Instance, within_s: float) -> Instance:
    """Return the record of a load once the load has ended, or after `within_s` seconds.

    Raises JobNotFound or QueueUnavailable if Redis has lost the record, and what UNAVAILABLE lists.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            return await follower.until(instance.id, is_over)
    return await records.get(instance.id)
