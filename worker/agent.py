"""The agent: owner of all that a worker holds."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import shared
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.store import Store
from shared.telemetry import log
from shared.telemetry.tally import Tally, died
from worker.crashes import Crashes
from worker.desired import Desired
from worker.instance import Resident, Services, has_changed
from worker.memory.devices import Devices
from worker.memory.dry_run import DryRun
from worker.memory.nvml import Driver
from worker.memory.placer import Placer
from worker.reconcile import Reconciler
from worker.restore import Restorer
from worker.runner.warm import Runners
from worker.timing import Timing

PLACED_N = 16  # more than an API usually gives a worker between two looks

_log = log.get("worker")


class LeaseLost(Exception):
    """Another process works under this worker's name."""


class Agent:
    """Holds the instances of a worker, and moves them on at each beat."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        epoch: str,
        heartbeat: Callable[[], None] = lambda: None,
        timing: Timing | None = None,
    ) -> None:
        """`heartbeat` tells the supervisor that the beat goes on.  Raises SettingsError for unknown devices."""
        timing = timing or Timing()
        self.settings = settings
        self.store = store
        self.name = settings.name
        self.epoch = epoch
        self.timing = timing
        self.tally = Tally()
        self.models: dict[str, Model] = {}  # the catalog, by key
        self.residents: dict[str, Resident] = {}  # by id of the load
        self.tasks: dict[str, asyncio.Task[None]] = {}  # their lives
        self.ending = asyncio.Event()  # set once the worker drains
        self.changed = asyncio.Event()  # the snapshot has something new of the devices or of what they hold
        self.placed: deque[str] = deque(maxlen=PLACED_N)  # loads that were placed or refused
        self.devices = Devices(settings, Driver())
        self.placer = Placer(settings, self.devices, self.residents, self.announce, self.tally, timing)
        self.runners = Runners(
            settings.lease_s / 2,
            lambda: self.tally.add(died("warm")),
            visible=self.devices.visible(),
            timing=timing,
        )
        self.dry_run = DryRun(settings, self.models, self.devices, self.runners, timing)
        self.desired = Desired(
            settings.data_dir / f"wanted-{self.name}.json", is_on=settings.restore == "on", timing=timing
        )
        self.crashes = Crashes(store.instances)
        self.restorer = Restorer(self.name, store.instances, self.desired, self.deliver, timing)
        self.reconciler = Reconciler(
            self.name,
            epoch,
            settings.load_attempts,
            store.instances,
            self.desired,
            self.residents,
            self.deliver,
            self.stop,
        )
        self._heartbeat = heartbeat
        self._digest = ""  # of the catalog that was published
        self._services = Services(
            name=self.name,
            epoch=epoch,
            settings=settings,
            timing=timing,
            models=self.models,
            residents=self.residents,
            instances=store.instances,
            placer=self.placer,
            runners=self.runners,
            crashes=self.crashes,
            desired=self.desired,
            tally=self.tally,
            placed=self.placed,
            changed=self.changed,
            ending=self.ending,
        )

    # ---- what the worker's main gives it

    async def publish(self, models: list[Model], dead_epoch: str = "") -> bool:
        """Take a new catalog and publish it; returns whether no other process holds our lease."""
        self.models.clear()
        self.models.update({model.key: model for model in models})
        digest = await self.store.workers.publish_catalog(self.name, models, self.epoch, dead_epoch)
        self._digest = digest or self._digest
        return digest is not None

    async def warm(self) -> None:
        """Wait until a runner is warm, which tells what the engine can use.

        Raises RunnerDied, TimeoutError, and SettingsError if the engine can use none of our devices.
        """
        await self.runners.warmed()
        if self.devices.gpus and not self.runners.has_cuda:
            _log.warning("llama.cpp was built without CUDA", action="gpus_left_out", gpus=self.devices.gpus)
            self.devices.without_gpus()
            await self.placer.look()

    def deliver(self, id_: str, not_before: float = 0.0) -> None:
        """Take an instance from the queue, to begin at `not_before` (seconds since the epoch).  A second delivery of
        the same one is ignored."""
        if id_ not in self.residents and not self.ending.is_set():
            self.residents[id_] = Resident(self._services, id_, not_before)
            self.tasks[id_] = asyncio.create_task(self._live(self.residents[id_]))

    def stop(self, id_: str) -> None:
        """Stop an instance, if it is held here."""
        if id_ in self.residents:
            self.residents[id_].stop.set()

    # ---- the beat

    def snapshot(self) -> WorkerSnapshot:
        """Return what is published of this worker."""
        return WorkerSnapshot(
            name=self.name,
            epoch=self.epoch,
            version=shared.__version__,
            catalog=self._digest,
            residents=sum(one.claimed or not one.stop.is_set() for one in self.residents.values()),
            state="draining" if self.ending.is_set() else "ready",
            devices=self.placer.devices(),
            held=self.placer.held(),
            taken=[*self.placed],
            partly_on_cpu=self.settings.gpu_offload == "auto",
            lease_s=self.store.workers.lease_s,
        )

    async def announce_changes(self) -> None:
        """Announce what changes here, soon after; ends only by cancellation."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            await self.announce()
            check_cancelled()

    async def announce(self) -> None:
        """Let the pool know at once what has changed here; the next beat does in any case."""
        with suppress(*UNAVAILABLE):
            await self.store.workers.announce(self.snapshot())

    async def beat(self) -> None:
        """Beat again and again.  Raises LeaseLost.

        The lease depends on runners: while none answers and none can be started, it is left to run out.
        """
        while True:
            self._heartbeat()
            await self.runners.watch(self.timing.beat_s)
            try:
                if self.runners.silent_s < self.store.workers.lease_s:
                    await self.beat_once()
                else:
                    _log.error("no runner answers", action="runners_silent", silent_s=round(self.runners.silent_s))
            except UNAVAILABLE as e:  # the runners stay: nobody else can have been given their work
                _log.warning("beat missed", action="redis_unavailable", error=str(e))
            check_cancelled()
            await asyncio.sleep(self.timing.beat_s)

    async def beat_once(self) -> None:
        """Renew the lease, make what is held match the records, and restore what is missing.

        Raises LeaseLost and what UNAVAILABLE lists.
        """
        await self.placer.look()
        lease = await self.store.workers.renew(self.snapshot())
        if lease == "refused":
            raise LeaseLost(f"the lease of worker '{self.name}' is held by another process")
        await self.reconciler.reconcile()
        if lease == "no catalog":  # Redis was emptied: nothing is placed here before what we hold has its names again
            await self.publish(list(self.models.values()))
        if not self.ending.is_set():
            await self.restorer.restore(self.residents.keys())
        await self.tally.hand_over(self.store.counters.add)

    async def watch_files(self) -> None:
        """Look at the files of what is loaded, and tell whose have changed; ends only by cancellation.

        A change in place is under the mapping that the weights are; a file that was replaced is not what its key
        names any more.  In a thread, since a network file system may hang.
        """
        while True:
            await asyncio.sleep(self.timing.beat_s)
            for resident in [one for one in self.residents.values() if one.files]:
                if await asyncio.to_thread(has_changed, resident.files):
                    resident.changed.set()

    # ---- the end

    async def drain(self) -> None:
        """Take nothing more, hand back what is loading, and stop all runners in parallel; what is queued stays queued,
        for another worker or for our successor."""
        self.ending.set()
        for resident in self.residents.values():
            resident.stop.set()
        ending = asyncio.create_task(self._drained())
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(self.timing.drain_s / 2):
                await self.store.workers.renew(self.snapshot())  # nothing more is placed here
        await ending
        self.desired.flush()
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(self.timing.drain_s / 4):
                await self.tally.hand_over(self.store.counters.add)

    async def _drained(self) -> None:
        if self.tasks:
            _, late = await asyncio.wait(self.tasks.values(), timeout=self.timing.drain_s)
            for task in late:
                task.cancel()
            if late:
                await asyncio.wait(late, timeout=1)

    async def _live(self, resident: Resident) -> None:
        try:
            await resident.live()
        finally:
            del self.residents[resident.id], self.tasks[resident.id]
