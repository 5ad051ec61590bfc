"""The only writer of an instance's record while its worker holds it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from shared.instance import Instance
from shared.lifecycle import Event
from shared.store.connection import UNAVAILABLE
from shared.store.instances import Instances
from shared.telemetry import log

_log = log.get("worker")


async def commit(instances: Instances, old: Instance, new: Instance) -> tuple[Instance, float]:
    """Write a revision and, if the state changes, log the transition with the ids that the caller bound.

    Returns the record as written, and the time of Redis in seconds since the epoch.  Raises Fenced, StopRequested and
    what UNAVAILABLE lists.
    """
    committed, now_s = await instances.commit(old, new)
    if old.state is not committed.state:
        facts = {"code": committed.error.code, "reason": committed.error.message} if committed.error else {}
        _log.info(
            f"{old.state} -> {committed.state}",
            action="transition",
            old=old.state.value,
            new=committed.state.value,
            **facts,
        )
    return committed, now_s


class Record:
    """Writes the revisions of one instance.

    If Redis does not answer, the write may or may not have happened.  The same revision is therefore sent again before
    any other: the script answers a repeat as it did the first time, and would reject a different revision as if another
    writer had changed the record.
    """

    def __init__(self, instances: Instances, ending: asyncio.Event) -> None:
        """`ending` is set while the worker drains; writes are then not retried."""
        self.redis_time_s = 0.0  # of the last write
        self.written: Instance | None = None  # the last revision
        self._instances = instances
        self._ending = ending
        self._unanswered: Instance | None = None  # sent, but not known to be written

    async def progress(self, old: Instance, new: Instance) -> Instance:
        """Write `new`, or first an unanswered revision instead.

        Returns the record as written, or `old` if Redis is unavailable: progress is not retried.  Raises Fenced.
        """
        try:
            return await self._send(old, self._unanswered or new)
        except UNAVAILABLE:
            return old

    async def write(self, instance: Instance, event: Event, **changes: Any) -> Instance:
        """Write the state after `event`.  Retries until Redis is available; while the worker drains, tries once.

        Raises Fenced, StopRequested and, while the worker drains, what UNAVAILABLE lists.
        """
        return await self._write(instance, lambda last: last.after(event, **changes))

    async def abandon(self, instance: Instance, attempts: int) -> Instance:
        """Write the state of an instance whose worker ends, like `write`."""
        return await self._write(instance, lambda last: last.abandoned(attempts))

    async def _write(self, instance: Instance, follow: Callable[[Instance], Instance]) -> Instance:
        pause_s, new = 0.05, None
        while True:
            try:
                if (unanswered := self._unanswered) is not None:
                    instance = await self._send(instance, unanswered)
                    if unanswered is new:
                        return instance
                new = follow(instance)
                return await self._send(instance, new)
            except UNAVAILABLE as e:
                if self._ending.is_set():  # the sweep, or the worker's successor, will write the outcome
                    raise
                _log.warning("commit deferred", action="redis_unavailable", error=str(e))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def _send(self, old: Instance, new: Instance) -> Instance:
        self._unanswered = None
        try:
            committed, self.redis_time_s = await commit(self._instances, old, new)
        except UNAVAILABLE:
            self._unanswered = new
            raise
        self.written = committed
        return committed
