"""The sweep: handles instances without a live worker, and loads that their workers refused."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any, assert_never

from api.pool.roster import Candidate, Roster
from api.pool.view import View
from api.subscription import subscribed
from shared.beat import BEAT_S
from shared.errors import InvalidValue, NoWorker
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.memory.placement import Placement
from shared.store.connection import UNAVAILABLE, Listen, check_cancelled
from shared.store.instances import Fenced, Head, Instances
from shared.store.keys import REQUEUED
from shared.store.queue import Queue
from shared.telemetry import log


class Sweep:
    """Sweeps the instances.  Every API process does this; of conflicting changes, Redis accepts only one.

    `lease_s` is the duration of a lease, `load_attempts` the maximum number of attempts at a load.
    """

    def __init__(
        self,
        roster: Roster,
        view: View,
        instances: Instances,
        queue: Queue,
        listen: Listen,
        *,
        lease_s: float,
        load_attempts: int,
    ) -> None:
        self._roster = roster
        self._view = view
        self._instances = instances
        self._queue = queue
        self._listen = listen
        self._lease_s = lease_s
        self._load_attempts = load_attempts
        self._from: float | None = None  # when to start: a lease after Redis first answered, so that workers can renew
        self._requeued = asyncio.Event()

    async def run(self) -> None:
        """Refresh roster and view, and sweep, at every beat, and when a load is requeued.  Runs until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(subscribed(self._listen, REQUEUED, lambda _: self._requeued.set()))
            while True:
                self._requeued.clear()
                await self.beat()
                check_cancelled()
                with suppress(TimeoutError):
                    async with asyncio.timeout(BEAT_S):
                        await self._requeued.wait()

    async def beat(self) -> None:
        """Refresh roster and view, and sweep once.  Logs a warning if Redis does not answer."""
        started = time.monotonic()
        try:
            epochs = await self._roster.refresh()
            if self._from is None or time.monotonic() - started > 1.0:  # a pause of Redis does not break connections
                self._from = time.monotonic() + self._lease_s
            is_time = time.monotonic() >= self._from
            heads = await self._instances.heads()
            await self._view.follow(heads)
            for instance in await self._instances.live(doubtful(heads, epochs)):
                if is_time or _is_refused(instance):
                    with suppress(Fenced), log.about(instance):  # its worker or another API process was faster
                        await self._handle(instance, epochs)
        except UNAVAILABLE as e:
            self._from = None
            log.get("api").warning("roster not refreshed", action="redis_unavailable", error=str(e))

    async def _handle(self, instance: Instance, epochs: Mapping[str, str | None]) -> None:
        """Handle an instance that was refused or is not held.  Raises Fenced.

        A claimed instance is held by a worker whose lease has the same epoch; a queued one by a worker that accepts
        loads.
        """
        match instance.state:
            case State.QUEUED if _is_refused(instance):
                await self._move_refused(instance)
                return
            case State.QUEUED:
                snapshot = self._roster.alive.get(instance.worker)
                is_held = snapshot is not None and snapshot.state == "ready"
            case State.LOADING | State.LOADED | State.UNLOADING:
                is_held = epochs.get(instance.worker) == instance.epoch
            case State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                return  # ended: no worker holds it
            case _:
                assert_never(instance.state)
        if not is_held:
            await self._move(instance)

    async def _move_refused(self, instance: Instance) -> None:
        """Requeue a refused load at another worker whose last snapshot has room, or fail it.

        No worker gets the load twice, so this terminates.  Raises Fenced.
        """
        if instance.stop_requested:
            await self._commit(instance, instance.after(Event.STOP))
            return
        choice = await self._place(instance)
        if choice is not None and choice[1] is not None:
            await self._assign(instance, *choice)
            return
        await self._commit(instance, instance.after(Event.FAIL, error=instance.refusal))

    async def _move(self, instance: Instance) -> None:
        """Requeue or stop a load that is not held; an instance that was loaded is lost.  Raises Fenced."""
        match instance.state:
            case State.QUEUED | State.LOADING if instance.stop_requested:
                await self._stop(instance)
            case State.QUEUED | State.LOADING:
                await self._move_load(instance)
            case State.LOADED | State.UNLOADING | State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                await self._commit(instance, instance.after(Event.EXPIRE))  # raises for a terminal state
            case _:
                assert_never(instance.state)

    async def _stop(self, instance: Instance) -> None:
        """Cancel a load whose worker is unavailable.  Raises Fenced."""
        if instance.state is State.LOADING:
            instance, _ = await self._instances.commit(instance, instance.after(Event.REQUEUE))
        await self._commit(instance, instance.after(Event.STOP))

    async def _move_load(self, instance: Instance) -> None:
        """Requeue a load at another worker, or wait up to a lease for its own worker to return.

        A restoration stays with its worker.  Raises Fenced.
        """
        choice = None if instance.restoring else await self._place(instance)
        if choice is not None:
            await self._assign(instance, *choice)
        elif instance.state is State.LOADING:
            await self._commit(instance, instance.abandoned(self._load_attempts))
        elif self._roster.absent_s(instance.worker) <= self._lease_s or instance.worker in self._roster.alive:
            pass  # the worker may return
        elif instance.restoring:
            await self._commit(instance, instance.after(Event.EXPIRE))
        else:
            reason = f"Worker '{instance.worker}' is unavailable, and no other available worker has {instance.model}."
            await self._commit(instance, instance.after(Event.FAIL, error=NoWorker(reason).body()))

    async def _place(self, instance: Instance) -> tuple[Candidate, Placement | None] | None:
        """Choose a worker for a load, except those that refused it; None if there is none."""
        with suppress(InvalidValue):
            candidates, _ = self._roster.candidates(instance.request, without=instance.refused)
            same = [one for one in candidates if one.model.problem is None and one.model.type == instance.type]
            if same:
                return await self._roster.choose_measured(same, instance.request, self._queue)
        return None

    async def _assign(self, instance: Instance, candidate: Candidate, placement: Placement | None) -> None:
        model = candidate.model
        changes: dict[str, Any] = {
            "worker": candidate.worker,
            "key": model.key,
            "source": model.source,
            "total_size_bytes": model.size_bytes,
        }
        if _is_refused(instance):
            new = instance.after(Event.REQUEUE, **changes)
        else:
            new = instance.abandoned(self._load_attempts, **changes)
        await self._commit(instance, new)
        self._roster.placed(new, placement)

    async def _commit(self, old: Instance, new: Instance) -> None:
        committed, _ = await self._instances.commit(old, new)
        why = "its worker had no room" if _is_refused(old) else "its worker is unavailable"
        log.get("api").warning(
            f"{old.state} -> {new.state}: {why}",
            action="transition",
            old=old.state,
            new=new.state,
            to=new.worker,
        )
        if committed.state is State.QUEUED:
            await self._queue.deliver(committed)


def doubtful(heads: Iterable[Head], epochs: Mapping[str, str | None]) -> list[str]:
    """Return the ids of the instances whose documents must be read.

    For most instances of a large pool, the fields outside the document show that their worker holds them.  A queued
    instance has no epoch, so its document is read.
    """
    return [head.id for head in heads if epochs.get(head.worker) != head.epoch]


def _is_refused(instance: Instance) -> bool:
    """Return whether a queued load was refused by its current worker."""
    return instance.state is State.QUEUED and instance.worker in instance.refused
