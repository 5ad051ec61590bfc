"""What the workers publish, as this API process last read it, and the sweep of those that died."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress

import msgspec

from api.models import check
from shared import log
from shared.catalog import resolve
from shared.errors import InvalidValue, NoWorker
from shared.lifecycle import Event, State
from shared.schema import Instance, Model, WorkerSnapshot
from shared.store import UNAVAILABLE, Fenced, Store, check_cancelled

BEAT_S = 1.0


class Roster:
    """Workers and catalogs, at most a beat old.  `refresh` reads them now."""

    def __init__(self, store: Store, load_attempts: int) -> None:
        self.store = store
        self.load_attempts = load_attempts
        self.alive: dict[str, WorkerSnapshot] = {}
        self.catalogs: dict[str, list[Model]] = {}  # of every worker of the last day, alive or not
        self._digests: dict[str, str] = {}
        self._absent_since: dict[str, float] = {}  # worker -> when its lease was first seen gone
        self._sweep_from: float | None = None  # a lease after Redis' first answer: until then leases may have run out

    async def run(self) -> None:
        """Refresh and sweep every beat; ends only by cancellation."""
        while True:
            started = time.monotonic()
            try:
                epochs = await self.refresh()
                if self._sweep_from is None or time.monotonic() - started > 1.0:  # a paused Redis breaks no connection
                    self._sweep_from = time.monotonic() + self.store.lease_s
                if time.monotonic() >= self._sweep_from:
                    await self._sweep(epochs)
            except UNAVAILABLE as e:
                self._sweep_from = None
                log.get("api").warning("roster not refreshed", action="redis_unavailable", error=str(e))
            check_cancelled()
            await asyncio.sleep(BEAT_S)

    async def refresh(self) -> dict[str, str | None]:
        """Read what the workers publish; returns the epoch that holds each one's lease."""
        workers = await self.store.workers()
        now = time.monotonic()
        for worker in workers:
            digest = worker.snapshot.catalog if worker.snapshot else self._digests.get(worker.name, "")
            if worker.name not in self.catalogs or digest != self._digests.get(worker.name):
                catalog = await self.store.catalog(worker.name)
                if catalog is not None:  # else it is about to be published, or Redis was emptied
                    self.catalogs[worker.name] = catalog
                    self._digests[worker.name] = digest
            if worker.epoch is None:
                self._absent_since.setdefault(worker.name, now)
            else:
                self._absent_since.pop(worker.name, None)
        self.alive = {worker.name: worker.snapshot for worker in workers if worker.snapshot}
        known = {worker.name for worker in workers}
        for name in self.catalogs.keys() - known:  # of long ago, or Redis was emptied: then it is back in a beat
            if now - self._absent_since.setdefault(name, now) > self.store.lease_s:
                del self.catalogs[name], self._digests[name], self._absent_since[name]
        return {worker.name: worker.epoch for worker in workers}

    def with_model(self, wanted: str) -> tuple[list[tuple[str, Model]], Model | None]:
        """Workers that have a model and take loads, best first, and the model as any worker knows it.

        One that can read the file is better than one that cannot, then one that holds less.
        """
        found = {name: model for name, models in self.catalogs.items() if (model := resolve(models, wanted))}
        live = [name for name in found if name in self.alive and self.alive[name].state == "ready"]
        live.sort(key=lambda name: (found[name].problem is not None, self.alive[name].residents, name))
        return [(name, found[name]) for name in live], next(iter(found.values()), None)

    def placed(self, worker: str) -> None:
        """Count an instance that was just given to a worker, until its next snapshot does."""
        if (snapshot := self.alive.get(worker)) is not None:
            self.alive[worker] = msgspec.structs.replace(snapshot, residents=snapshot.residents + 1)

    def listed(self) -> list[Model]:
        """Every model of the live workers that can be loaded, once, by key."""
        by_key: dict[str, Model] = {}
        for name in sorted(self.alive):
            for model in self.catalogs.get(name, ()):
                if model.problem is None:
                    by_key.setdefault(model.key, model)
        return [by_key[key] for key in sorted(by_key)]

    async def _sweep(self, epochs: dict[str, str | None]) -> None:
        """Move on what no worker that takes loads has: a claimed instance whose worker's lease is gone or of another
        epoch, and a queued one whose worker's is gone, or which is draining."""
        for instance in await self.store.live():
            epoch = epochs.get(instance.worker)
            if instance.state is State.QUEUED:
                snapshot = self.alive.get(instance.worker)
                is_held = snapshot is not None and snapshot.state == "ready"
            else:
                is_held = epoch == instance.epoch
            if not is_held:
                with suppress(Fenced):  # its worker, or another API process, moved it on
                    await self._move(instance)

    async def _move(self, instance: Instance) -> None:
        """What was never loaded goes to another worker, or waits for its own to come back, a whole lease long; what
        was is lost.  A restoration stays with its worker.  Raises Fenced."""
        if instance.state not in (State.QUEUED, State.LOADING):
            return await self._commit(instance, instance.after(Event.EXPIRE))
        if instance.stop_requested:
            if instance.state is State.LOADING:
                instance, _ = await self.store.commit(instance, instance.after(Event.REQUEUE))
            return await self._commit(instance, instance.after(Event.STOP))
        place = None if instance.restoring else self._place(instance)
        if place is not None:
            worker, model = place
            changes = {"worker": worker, "key": model.key, "total_size_bytes": model.size_bytes}
            return await self._commit(instance, instance.abandoned(self.load_attempts, **changes))
        if instance.state is State.LOADING:
            return await self._commit(instance, instance.abandoned(self.load_attempts))
        absent_s = time.monotonic() - self._absent_since.setdefault(instance.worker, time.monotonic())
        if absent_s <= self.store.lease_s or instance.worker in self.alive:
            return None
        if instance.restoring:
            return await self._commit(instance, instance.after(Event.EXPIRE))
        nowhere = NoWorker(f"Its worker '{instance.worker}' is gone, and no other that has {instance.model} is alive.")
        return await self._commit(instance, instance.after(Event.FAIL, error=nowhere.body()))

    def _place(self, instance: Instance) -> tuple[str, Model] | None:
        """The best worker for a load that lost its own, with the model as it is there."""
        for worker, model in self.with_model(instance.model)[0]:
            with suppress(InvalidValue):
                check(instance.request, model)
                if model.problem is None and model.type == instance.type:
                    return worker, model
        return None

    async def _commit(self, old: Instance, new: Instance) -> None:
        committed, _ = await self.store.commit(old, new)
        log.get("api").warning(
            f"{old.state} -> {new.state}: its worker is gone",
            action="transition",
            instance=old.id,
            old=old.state,
            new=new.state,
            worker=old.worker,
            to=new.worker,
        )
        if committed.state is State.QUEUED:
            self.placed(committed.worker)
            await self.store.deliver(committed)
