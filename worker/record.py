"""The only writer of an instance's record while its worker holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from shared.instance import Instance
from shared.lifecycle import Event
from shared.store.connection import UNAVAILABLE
from shared.telemetry import log

if TYPE_CHECKING:
    from worker.agent import Agent

_log = log.get("worker")


class Writer:
    """Writes revision after revision.

    Where Redis does not answer, it may have carried out the write or not.  So that very revision is sent again
    before any other: the script answers a repeat as it did the first time, and would refuse another revision in its
    place, as if somebody else had moved the record on.
    """

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.redis_time = 0.0  # of the last write, in seconds
        self.written: Instance | None = None  # what the record was made last
        self._unanswered: Instance | None = None

    async def progress(self, old: Instance, new: Instance) -> Instance:
        """Write `new`, or what was not answered before it; `old` where Redis is away, since the next one will do."""
        try:
            return await self._write(old, self._unanswered or new)
        except UNAVAILABLE:
            return old

    async def surely(self, instance: Instance, event: Event, **changes: Any) -> Instance:
        """Write what comes of `event`, however long Redis is away; at our own end only once.

        Raises Fenced, StopRequested and what UNAVAILABLE lists.
        """
        return await self._surely(instance, lambda last: last.after(event, **changes))

    async def abandon(self, instance: Instance, attempts: int) -> Instance:
        """The same for what becomes of it where its worker ends."""
        return await self._surely(instance, lambda last: last.abandoned(attempts))

    async def _surely(self, instance: Instance, follow: Callable[[Instance], Instance]) -> Instance:
        pause, new = 0.05, None
        while True:
            try:
                if (unanswered := self._unanswered) is not None:
                    instance = await self._write(instance, unanswered)
                    if unanswered is new:
                        return instance
                new = follow(instance)
                return await self._write(instance, new)
            except UNAVAILABLE as e:
                if self.agent.draining:  # the sweep, or our successor, will say what became of it
                    raise
                _log.warning("commit put off", action="redis_unavailable", error=str(e))
            await asyncio.sleep(pause)
            pause = min(2 * pause, 1.0)

    async def _write(self, old: Instance, new: Instance) -> Instance:
        self._unanswered = None
        try:
            committed, self.redis_time = await self.agent.commit(old, new)
        except UNAVAILABLE:
            self._unanswered = new
            raise
        self.written = committed
        return committed
