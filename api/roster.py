"""What the workers publish, as this API process last read it, and the sweep of those that died."""

from __future__ import annotations

import asyncio
import time

import msgspec

from shared import log
from shared.catalog import resolve
from shared.lifecycle import Event, State
from shared.schema import Instance, Model, WorkerSnapshot
from shared.store import UNAVAILABLE, Fenced, Store

BEAT_S = 1.0


class Roster:
    """Workers and catalogs, at most a beat old.  `refresh` reads them now."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.alive: dict[str, WorkerSnapshot] = {}
        self.catalogs: dict[str, list[Model]] = {}  # of every worker of the last day, alive or not
        self._digests: dict[str, str] = {}
        self._absent_since: dict[str, float] = {}  # worker -> when its lease was first seen gone
        self._sweep_from = time.monotonic() + store.lease_s  # a Redis that was away may have dropped live leases

    async def run(self) -> None:
        """Refresh and sweep every beat; ends only by cancellation."""
        while True:
            started = time.monotonic()
            try:
                epochs = await self.refresh()
                if time.monotonic() - started > 1.0:  # a paused Redis breaks no connection
                    self._sweep_from = time.monotonic() + self.store.lease_s
                if time.monotonic() >= self._sweep_from:
                    await self._sweep(epochs)
            except UNAVAILABLE as e:
                self._sweep_from = time.monotonic() + self.store.lease_s
                log.get("api").warning("roster not refreshed", action="redis_unavailable", error=str(e))
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
        for name in self.catalogs.keys() - known:
            del self.catalogs[name], self._digests[name]
            self._absent_since.pop(name, None)
        return {worker.name: worker.epoch for worker in workers}

    def with_model(self, wanted: str) -> tuple[list[tuple[str, Model]], Model | None]:
        """Live workers that have a model, best first, and the model as any worker knows it.

        One that can read the file is better than one that cannot, then one that holds less.
        """
        found = {name: model for name, models in self.catalogs.items() if (model := resolve(models, wanted))}
        live = [name for name in found if name in self.alive]
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
        """Declare lost what no living worker holds: a claimed instance whose worker's lease is gone or of another
        epoch, and a queued one whose worker has been away for a whole lease (a quick restart takes it up again)."""
        for instance in await self.store.live():
            epoch = epochs.get(instance.worker)
            if instance.state is State.QUEUED:
                absent = self._absent_since.get(instance.worker)
                gone = epoch is None and absent is not None and time.monotonic() - absent > self.store.lease_s
            else:
                gone = epoch != instance.epoch
            if gone:
                await self._expire(instance)

    async def _expire(self, instance: Instance) -> None:
        try:
            await self.store.commit(instance, instance.after(Event.EXPIRE))
        except Fenced:
            return  # its worker, or another API process, moved it on: then it is not lost, or is already
        log.get("api").warning(
            "instance lost", action="transition", instance=instance.id, old=instance.state, new=State.LOST
        )
