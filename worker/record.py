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
    """Write one revision, and one log line if it is a transition, with the ids that the caller bound.

    Returns it as written, and Redis' time in seconds.  Raises Fenced, StopRequested and what UNAVAILABLE lists.
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
    """Writes revision after revision.

    If Redis does not answer, it may have carried out the write or not.  Therefore that revision is sent again before
    any other: the script answers a repeat as it did the first time, and would refuse another revision in its place, as
    if another writer had moved the record on.
    """

    def __init__(self, instances: Instances, ending: asyncio.Event) -> None:
        """`ending` is set while the worker drains: then nothing is tried again."""
        self.redis_time_s = 0.0  # of the last write
        self.written: Instance | None = None  # the last revision
        self._instances = instances
        self._ending = ending
        self._unanswered: Instance | None = None

    async def progress(self, old: Instance, new: Instance) -> Instance:
        """Write `new`, or what was not answered before it.  Returns `old` if Redis is away: the next one will do.

        Raises Fenced.
        """
        try:
            return await self._write(old, self._unanswered or new)
        except UNAVAILABLE:
            return old

    async def surely(self, instance: Instance, event: Event, **changes: Any) -> Instance:
        """Write what comes of `event`, however long Redis is away; while the worker drains only once.

        Raises Fenced, StopRequested and what UNAVAILABLE lists.
        """
        return await self._surely(instance, lambda last: last.after(event, **changes))

    async def abandon(self, instance: Instance, attempts: int) -> Instance:
        """Write what becomes of the instance when its worker ends, like `surely`."""
        return await self._surely(instance, lambda last: last.abandoned(attempts))

    async def _surely(self, instance: Instance, follow: Callable[[Instance], Instance]) -> Instance:
        pause_s, new = 0.05, None
        while True:
            try:
                if (unanswered := self._unanswered) is not None:
                    instance = await self._write(instance, unanswered)
                    if unanswered is new:
                        return instance
                new = follow(instance)
                return await self._write(instance, new)
            except UNAVAILABLE as e:
                if self._ending.is_set():  # the sweep, or our successor, will say what became of it
                    raise
                _log.warning("commit put off", action="redis_unavailable", error=str(e))
            await asyncio.sleep(pause_s)
            pause_s = min(2 * pause_s, 1.0)

    async def _write(self, old: Instance, new: Instance) -> Instance:
        self._unanswered = None
        try:
            committed, self.redis_time_s = await commit(self._instances, old, new)
        except UNAVAILABLE:
            self._unanswered = new
            raise
        self.written = committed
        return committed
