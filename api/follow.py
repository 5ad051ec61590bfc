"""Following the log of an instance: what a waiting reply, a poll and a stream all are."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager

from shared import log
from shared.errors import QueueUnavailable
from shared.lifecycle import TERMINAL
from shared.schema import Instance
from shared.store import NEWS, UNAVAILABLE, Store

RECHECK_S = 1.0
AWAY = -1  # no record has this revision


class Follower:
    """All followers of one API process: one subscription wakes them, one look a second finds what it missed."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self._bells: defaultdict[str, set[asyncio.Event]] = defaultdict(set)

    async def run(self) -> None:
        """Keep the subscription and the recheck going; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            group.create_task(self._recheck())

    async def follow(self, instance: Instance) -> AsyncGenerator[Instance, None]:
        """Every revision of a record, from the first to the terminal one.

        To be used within `aclosing`.  Raises QueueUnavailable if the record is gone from Redis, and what UNAVAILABLE
        lists if Redis is.
        """
        last = "0"
        with self._bell(instance.id) as bell:
            while True:
                bell.clear()
                history = await self.store.history(instance, last)
                for entry, revision in history:
                    last = entry
                    yield revision
                    if revision.state in TERMINAL:
                        return
                if not history and await self.store.get(instance.id) is None:
                    raise QueueUnavailable(
                        "Redis lost the record of this load. Ask for the model list, then try again."
                    )
                await bell.wait()

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
            await asyncio.sleep(RECHECK_S)
            ids = list(self._bells)
            try:
                now = dict(zip(ids, await self.store.revisions(ids), strict=True)) if ids else {}
            except UNAVAILABLE:
                now = dict.fromkeys(ids, AWAY)
            for id_, rev in now.items():
                if rev in (None, AWAY) or seen.get(id_) != rev:  # new here: it may have changed unheard
                    self._ring(id_)
            seen = now
