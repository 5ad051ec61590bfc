"""The agent: owner of a worker's runners, and the only one who moves the instances that it claimed."""

from __future__ import annotations

import asyncio

import shared
from shared import log
from shared.lifecycle import Event, State
from shared.schema import Instance, Model, WorkerSnapshot
from shared.settings import Settings
from shared.store import UNAVAILABLE, Fenced, Store
from worker.resident import Resident
from worker.runner import Runners

BEAT_S = 1.0
DRAIN_S = 4.0

_log = log.get("worker")


class LeaseLost(Exception):
    """Another process works under this worker's name."""


class Agent:
    def __init__(self, settings: Settings, store: Store, epoch: str) -> None:
        self.settings = settings
        self.store = store
        self.name = settings.name
        self.epoch = epoch
        self.runners = Runners()
        self.held: dict[str, Resident] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.draining = False
        self.models: dict[str, Model] = {}
        self._digest = ""
        self.devices: list[str] = []
        self.loading = asyncio.Semaphore(1)

    # ---- what the worker's main gives it

    async def publish(self, models: list[Model]) -> None:
        """Take a new catalog, and publish it."""
        self.models = {model.key: model for model in models}
        self._digest = await self.store.publish_catalog(self.name, models)

    async def warm(self) -> None:
        """Wait until a runner is warm, which tells what devices there are: one load at once on each, since two on
        one would slow each other.  Raises RunnerDied and TimeoutError."""
        self.devices = await self.runners.warmed()
        self.loading = asyncio.Semaphore(self.settings.loads_at_once or len(self.devices))

    def deliver(self, id_: str) -> None:
        """Take an instance from the queue; a second delivery of the same one is ignored."""
        if id_ not in self.held and not self.draining:
            self.held[id_] = Resident(self, id_)
            self.tasks[id_] = asyncio.create_task(self._live(self.held[id_]))

    def stop(self, id_: str) -> None:
        """Somebody wishes an instance stopped."""
        if id_ in self.held:
            self.held[id_].stop.set()

    # ---- the beat

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            name=self.name,
            epoch=self.epoch,
            version=shared.__version__,
            catalog=self._digest,
            residents=sum(held.claimed or not held.stop.is_set() for held in self.held.values()),
        )

    async def beat(self) -> None:
        """Renew the lease, make what runs match what the records say; repeat.  Raises LeaseLost."""
        while True:
            try:
                lease = await self.store.renew(self.snapshot())
                if lease == "refused":
                    raise LeaseLost(f"the lease of worker '{self.name}' is held by another process")
                if lease == "no catalog":
                    await self.publish(list(self.models.values()))
                await self._reconcile()
            except UNAVAILABLE as e:  # the runners stay: nobody else can have been given their work
                _log.warning("beat missed", action="redis_unavailable", error=str(e))
            await asyncio.sleep(BEAT_S)

    async def _reconcile(self) -> None:
        claimed = [held for held in self.held.values() if held.claimed]
        mine = {instance.id: instance for instance in await self.store.live() if instance.worker == self.name}
        for held in claimed:
            record = mine.get(held.id)
            if record is None or record.stop_requested or record.epoch != self.epoch:
                held.stop.set()
        for instance in mine.values():
            if instance.id in self.held:
                continue
            if instance.state is State.QUEUED:  # its delivery was lost
                self.deliver(instance.id)
            elif instance.epoch == self.epoch:  # claimed, but the reply to the claim was lost
                await self.expire(instance)

    async def expire(self, instance: Instance) -> None:
        """Give up an instance that nobody holds any more."""
        try:
            await self.commit(instance, instance.after(Event.EXPIRE))
        except Fenced:
            return

    async def drain(self) -> None:
        """Take nothing more, and stop all runners in parallel; what is queued stays queued."""
        self.draining = True
        for held in self.held.values():
            held.stop.set()
        if self.tasks:
            _, late = await asyncio.wait(self.tasks.values(), timeout=DRAIN_S)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)

    async def _live(self, resident: Resident) -> None:
        try:
            await resident.live()
        finally:
            del self.held[resident.id], self.tasks[resident.id]

    async def commit(self, old: Instance, new: Instance) -> tuple[Instance, float]:
        """One commit, and one log line for a transition.  Returns Redis' time in seconds too.

        Raises Fenced, StopWished and what UNAVAILABLE lists.
        """
        committed, now = await self.store.commit(old, new)
        if old.state is not committed.state:
            facts = {"code": committed.error.code, "reason": committed.error.message} if committed.error else {}
            _log.info(
                f"{old.state} -> {committed.state}",
                action="transition",
                instance=old.id,
                instance_id=old.instance_id,
                old=old.state.value,
                new=committed.state.value,
                **facts,
            )
        return committed, now
