"""Following the log of an instance, and waiting for the outcome of a load."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Callable, Collection, Iterator
from contextlib import aclosing, contextmanager, suppress

from api.headers import FIRST, is_after
from api.loads.jobs import event, is_over, outcome
from api.loads.records import Records
from api.subscription import subscribed
from shared.errors import ErrorBody, NoWorker, QueueUnavailable, ServiceError
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.store.connection import UNAVAILABLE, Listen, check_cancelled
from shared.store.instances import HISTORY_N, Instances
from shared.store.keys import NEWS

RECHECK_S = 1.0
RECORD_LOST = "Redis lost the record of this load. Ask for the model list, then try again."
NO_OUTCOME = "The log of this load ended without an outcome."
AWAY = -1  # no record has this revision


class ReportedFailure(ServiceError):
    """A failure that a worker has described: its body is that of the record."""

    def __init__(self, body: ErrorBody) -> None:
        super().__init__(body.message)
        self._body = body
        if body.type == NoWorker.type:
            self.retry_after_s = NoWorker.retry_after_s

    def body(self) -> ErrorBody:
        return self._body


class Follower:
    """Follows records for one API process: one subscription wakes all who wait, one recheck a second finds what it
    missed.

    Every method but `run` raises what UNAVAILABLE lists if Redis does not answer.
    """

    def __init__(self, instances: Instances, listen: Listen) -> None:
        self._instances = instances
        self._listen = listen
        self._bells: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._readings: dict[tuple[str, str], asyncio.Future[list[tuple[str, Instance]]]] = {}

    @property
    def followed(self) -> Collection[str]:
        """The ids of the records that are being followed."""
        return self._bells.keys()

    async def run(self) -> None:
        """Keep the subscription and the recheck going; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(subscribed(self._listen, NEWS, lambda data: self._ring(data.decode())))
            group.create_task(self._recheck())

    async def follow(self, instance: Instance, after: str = "0") -> AsyncGenerator[tuple[str, Instance], None]:
        """Yield every revision of a record since entry `after` of its log, with its entry, up to the terminal one.

        To be used within `aclosing`.  Raises QueueUnavailable if the record is gone from Redis.
        """
        last = after
        with self._bell(instance.id) as bell:
            while True:
                bell.clear()
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
                    await bell.wait()

    async def until(self, id_: str, is_wanted: Callable[[Instance], bool]) -> Instance:
        """Return the first revision of a record, from its present one on, that is as wanted.

        Raises QueueUnavailable if the record is gone from Redis, or ended otherwise.
        """
        last = await self._instances.last_entry(id_)  # before the record: what the log holds up to it is in that
        record = await self._instances.get(id_)
        if record is None:
            raise QueueUnavailable(RECORD_LOST)
        if is_wanted(record):
            return record
        async with aclosing(self.follow(record, last)) as revisions:
            async for _, revision in revisions:
                if is_wanted(revision):
                    return revision
        raise QueueUnavailable(NO_OUTCOME)

    async def loaded(self, instance: Instance) -> Instance:
        """Follow a load to its end; return its record at `loaded`.

        Raises ReportedFailure for any other end, and QueueUnavailable if the record is gone from Redis.
        """
        async with aclosing(self.follow(instance)) as revisions:
            async for _, revision in revisions:
                if revision.state is State.LOADED:
                    return revision
                if (error := outcome(revision)) is not None:
                    raise ReportedFailure(error)
        raise QueueUnavailable(NO_OUTCOME)

    async def resumed(self, instance: Instance, after: str) -> str | None:
        """Return the entry of a load's log after which its events go on for a client that saw `after` last.

        None if the client has seen them all.
        """
        if after == FIRST or is_after(after, await self._instances.last_entry(instance.id)):
            return FIRST  # what the client saw was of another load, or of none
        if is_over(instance):
            left = await self._instances.history(instance, after)
            if all(event(revision) is None for _, revision in left):
                return None
        return after

    async def _read(self, instance: Instance, after: str) -> list[tuple[str, Instance]]:
        """Return the revisions since `after`, read once for all callers that want the same before the read begins.

        Hundreds of followers are woken together, and each would decode the same reply of Redis.
        """
        key = (instance.id, after)
        if (reading := self._readings.get(key)) is None:

            async def read() -> list[tuple[str, Instance]]:
                del self._readings[key]  # a caller from now on may have been woken by something newer
                return await self._instances.history(instance, after)

            reading = self._readings[key] = asyncio.ensure_future(read())
            # Retrieves the exception of a read whose callers have all gone: asyncio would report it otherwise.
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())
        return await asyncio.shield(reading)

    @contextmanager
    def _bell(self, id_: str) -> Iterator[asyncio.Event]:
        bell = asyncio.Event()
        self._bells[id_].add(bell)
        try:
            yield bell
        finally:
            self._bells[id_].discard(bell)
            if not self._bells[id_]:
                del self._bells[id_]

    def _ring(self, id_: str) -> None:
        for bell in self._bells.get(id_, ()):
            bell.set()

    async def _recheck(self) -> None:
        """Ring for the records that changed without a notification.

        While Redis does not answer, ring for all: their next read fails, and their clients learn of it.
        """
        seen: dict[str, int | None] = {}
        while True:
            check_cancelled()
            await asyncio.sleep(RECHECK_S)
            ids = list(self._bells)
            try:
                now = dict(zip(ids, await self._instances.revisions(ids), strict=True)) if ids else {}
            except UNAVAILABLE:
                now = dict.fromkeys(ids, AWAY)
            for id_, rev in now.items():
                if rev in (None, AWAY) or seen.get(id_) != rev:  # the first look: it may have changed before
                    self._ring(id_)
            seen = now


async def settled(follower: Follower, records: Records, instance: Instance, within_s: float) -> Instance:
    """Return the record of a load once it is over, or as it is after `within_s` seconds.

    Raises JobNotFound and QueueUnavailable if the record is gone from Redis, and what UNAVAILABLE lists.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(within_s):
            return await follower.until(instance.id, is_over)
    return await records.get(instance.id)
