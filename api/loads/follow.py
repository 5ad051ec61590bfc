"""Following the log of an instance: what a waiting reply, a poll and a stream all are."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from shared.errors import QueueUnavailable
from shared.instance import Instance
from shared.lifecycle import TERMINAL
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import HISTORY_N
from shared.store.keys import NEWS
from shared.store.store import Store
from shared.telemetry import log

RECHECK_S = 1.0
RECORD_LOST = "Redis lost the record of this load. Ask for the model list, then try again."
AWAY = -1  # no record has this revision


class Follower:
    """All followers of one API process: one subscription wakes them, one look a second finds what it missed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._bells: defaultdict[str, set[asyncio.Event]] = defaultdict(set)
        self._readings: dict[tuple[str, str], asyncio.Future[list[tuple[str, Instance]]]] = {}

    async def run(self) -> None:
        """Keep the subscription and the recheck going; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._recheck())

    async def follow(self, instance: Instance, after: str = "0") -> AsyncGenerator[tuple[str, Instance], None]:
        """Every revision of a record since entry `after` of its log, each with its entry, up to the terminal one.

        To be used within `aclosing`.  Raises QueueUnavailable if the record is gone from Redis, and what UNAVAILABLE
        lists if Redis is.
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
                    record = await self.store.instances.get(instance.id)
                    if record is None:
                        raise QueueUnavailable(RECORD_LOST)
                    if record.state in TERMINAL and not await self._read(instance, last):
                        return  # whoever comes back after the last entry has seen everything
                if len(history) < HISTORY_N:
                    await bell.wait()

    async def _read(self, instance: Instance, after: str) -> list[tuple[str, Instance]]:
        """The revisions since `after`, read once for all who ask for the same before the reading begins: hundreds
        of followers are woken together, and each reply of Redis would have to be decoded for each."""
        key = (instance.id, after)
        if (reading := self._readings.get(key)) is None:

            async def read() -> list[tuple[str, Instance]]:
                del self._readings[key]  # whoever asks from now on may have been woken by something newer
                return await self.store.instances.history(instance, after)

            reading = self._readings[key] = asyncio.ensure_future(read())
            reading.add_done_callback(lambda done: done.cancelled() or done.exception())  # seen, if all have gone
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

    async def _listen(self) -> None:
        while True:
            try:
                await self.store.listen(NEWS, lambda data: self._ring(data.decode()))
            except UNAVAILABLE as e:
                log.get("api").warning("subscription lost", action="redis_unavailable", error=str(e))
            await asyncio.sleep(0.2)

    async def _recheck(self) -> None:
        """Ring for records that changed without our hearing of it; while Redis is away, ring for all: their next
        read fails, and tells their clients."""
        seen: dict[str, int | None] = {}
        while True:
            check_cancelled()
            await asyncio.sleep(RECHECK_S)
            ids = list(self._bells)
            try:
                now = dict(zip(ids, await self.store.instances.revisions(ids), strict=True)) if ids else {}
            except UNAVAILABLE:
                now = dict.fromkeys(ids, AWAY)
            for id_, rev in now.items():
                if rev in (None, AWAY) or seen.get(id_) != rev:  # new here: it may have changed unheard
                    self._ring(id_)
            seen = now
