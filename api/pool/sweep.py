"""The sweep: moves on what no live worker has, or what its worker has no room for."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from typing import Any

from api.pool.roster import Candidate, Roster
from shared.beat import BEAT_S
from shared.errors import InvalidValue, NoWorker
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.memory.placement import Placement
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Fenced
from shared.store.keys import REQUEUED
from shared.telemetry import log


class Sweep:
    """Done by every API process; where two do the same, Redis lets one."""

    def __init__(self, roster: Roster) -> None:
        self.roster = roster
        self.store = roster.store
        self.load_attempts = roster.settings.load_attempts
        self._from: float | None = None  # a lease after Redis' first answer: until then leases may have run out
        self._rung = asyncio.Event()

    async def run(self) -> None:
        """Refresh and sweep every beat, and where a load was handed back; ends only by cancellation."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._listen())
            while True:
                self._rung.clear()
                await self._beat()
                check_cancelled()
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await self._rung.wait()

    async def _listen(self) -> None:
        while True:
            try:
                await self.store.listen(REQUEUED, lambda _: self._rung.set())
            except UNAVAILABLE as e:
                log.get("api").warning("subscription lost", action="redis_unavailable", error=str(e))
            await asyncio.sleep(0.2)

    async def _beat(self) -> None:
        started = time.monotonic()
        try:
            epochs = await self.roster.refresh()
            if self._from is None or time.monotonic() - started > 1.0:  # a paused Redis breaks no connection
                self._from = time.monotonic() + self.store.workers.lease_s
            is_time = time.monotonic() >= self._from
            for instance in await self.store.instances.live(await self._doubtful(epochs)):
                if is_time or _is_refused(instance):
                    with suppress(Fenced), log.about(instance):  # its worker, or another API process, moved it on
                        await self._look(instance, epochs)
        except UNAVAILABLE as e:
            self._from = None
            log.get("api").warning("roster not refreshed", action="redis_unavailable", error=str(e))

    async def _doubtful(self, epochs: dict[str, str | None]) -> list[str]:
        """The instances whose documents have to be read: of most of a large pool, the few fields beside it tell that
        their worker has them.  What is queued has no epoch."""
        return [head.id for head in await self.store.instances.heads() if epochs.get(head.worker) != head.epoch]

    async def _look(self, instance: Instance, epochs: dict[str, str | None]) -> None:
        """A claimed instance is held by a worker with a lease of its epoch; a queued one by a worker that takes loads.

        Raises Fenced.
        """
        if instance.state is not State.QUEUED:
            is_held = epochs.get(instance.worker) == instance.epoch
        elif _is_refused(instance):
            return await self._move_refused(instance)
        else:
            snapshot = self.roster.alive.get(instance.worker)
            is_held = snapshot is not None and snapshot.state == "ready"
        return None if is_held else await self._move(instance)

    async def _move_refused(self, instance: Instance) -> None:
        """To another worker that has room by what it published last; none is asked twice, so this ends.  Raises
        Fenced."""
        if instance.stop_requested:
            return await self._commit(instance, instance.after(Event.STOP))
        found = self._place(instance)
        if found is not None and found[1] is not None:
            return await self._give(instance, *found)
        return await self._commit(instance, instance.after(Event.FAIL, error=instance.refusal))

    async def _move(self, instance: Instance) -> None:
        """What was never loaded goes to another worker, or waits for its own to come back, a whole lease long; what
        was is lost.  A restoration stays with its worker.  Raises Fenced."""
        if instance.state not in (State.QUEUED, State.LOADING):
            return await self._commit(instance, instance.after(Event.EXPIRE))
        if instance.stop_requested:
            if instance.state is State.LOADING:
                instance, _ = await self.store.instances.commit(instance, instance.after(Event.REQUEUE))
            return await self._commit(instance, instance.after(Event.STOP))
        found = None if instance.restoring else self._place(instance)
        if found is not None:
            return await self._give(instance, *found)
        if instance.state is State.LOADING:
            return await self._commit(instance, instance.abandoned(self.load_attempts))
        since = self.roster.absent_since.setdefault(instance.worker, time.monotonic())
        if time.monotonic() - since <= self.store.workers.lease_s or instance.worker in self.roster.alive:
            return None
        if instance.restoring:
            return await self._commit(instance, instance.after(Event.EXPIRE))
        nowhere = NoWorker(f"Its worker '{instance.worker}' is gone, and no other that has {instance.model} is alive.")
        return await self._commit(instance, instance.after(Event.FAIL, error=nowhere.body()))

    def _place(self, instance: Instance) -> tuple[Candidate, Placement | None] | None:
        """The best worker for a load that its own does not take, of those that did not refuse it."""
        with suppress(InvalidValue):
            candidates, _ = self.roster.candidates(instance.request, without=instance.refused)
            same = [one for one in candidates if one.model.problem is None and one.model.type == instance.type]
            if same:
                return self.roster.choose(same, instance.request)
        return None

    async def _give(self, instance: Instance, candidate: Candidate, placement: Placement | None) -> None:
        model = candidate.model
        changes: dict[str, Any] = {"worker": candidate.worker, "key": model.key, "total_size_bytes": model.size_bytes}
        if _is_refused(instance):
            new = instance.after(Event.REQUEUE, **changes)
        else:
            new = instance.abandoned(self.load_attempts, **changes)
        await self._commit(instance, new)
        self.roster.placed(new, placement)

    async def _commit(self, old: Instance, new: Instance) -> None:
        committed, _ = await self.store.instances.commit(old, new)
        why = "its worker had no room" if _is_refused(old) else "its worker is gone"
        log.get("api").warning(
            f"{old.state} -> {new.state}: {why}",
            action="transition",
            old=old.state,
            new=new.state,
            to=new.worker,
        )
        if committed.state is State.QUEUED:
            await self.store.queue.deliver(committed)


def _is_refused(instance: Instance) -> bool:
    """Whether its worker has handed it back."""
    return instance.state is State.QUEUED and instance.worker in instance.refused
