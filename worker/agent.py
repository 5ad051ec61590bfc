"""The agent: owns the instances, devices and runners of a worker."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from contextlib import suppress

import shared
from shared.instance import Instance
from shared.lookup import of_instance
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.store import Store
from shared.telemetry import log
from shared.telemetry.tally import Tally, died, field
from worker.crashes import Crashes
from worker.desired import Desired
from worker.downloads import Downloads
from worker.hub.client import Access
from worker.hub.describer import Describer
from worker.instance import Resident, Services, has_changed
from worker.listener.process import Listener
from worker.memory.devices import Devices
from worker.memory.dry_run import DryRun
from worker.memory.nvml import Driver
from worker.memory.placer import Placer
from worker.reconcile import Reconciler
from worker.restore import Restorer
from worker.runner.warm import Runners
from worker.timing import Timing

PLACED_N = 16  # more loads than an API usually sends a worker between two snapshots

_log = log.get("worker")


class LeaseLost(Exception):
    """Another process holds the lease of this worker's name."""


class Agent:
    """Holds the instances of a worker and reconciles them with their records at each beat."""

    def __init__(
        self,
        settings: Settings,
        store: Store,
        epoch: str,
        heartbeat: Callable[[], None] = lambda: None,
        timing: Timing | None = None,
        hub: Access | None = None,
    ) -> None:
        """`heartbeat` is called at each beat and signals liveness to the supervisor.  `hub`: the source of downloads;
        None: there is none.

        Raises SettingsError for unknown devices.
        """
        timing = timing or Timing()
        self.settings = settings
        self.store = store
        self.name = settings.name
        self.epoch = epoch
        self.timing = timing
        self.tally = Tally()
        self.models: dict[str, Model] = {}  # the catalog, by key
        self.problems: list[str] = []  # of the settings of the models
        self.residents: dict[str, Resident] = {}  # by id of the load
        self.tasks: dict[str, asyncio.Task[None]] = {}  # the tasks of `Resident.live`, by id of the load
        self.ending = asyncio.Event()  # set once the worker drains
        self.out_of_time = asyncio.Event()  # set at the end of the drain, when requests must end
        self.changed = asyncio.Event()  # the snapshot's devices or instances changed
        self.placed: deque[str] = deque(maxlen=PLACED_N)  # loads that were placed or refused
        self.devices = Devices(settings, Driver())
        self.runners = Runners(
            settings.lease_s / 2,
            lambda: self.tally.add(died("warm")),
            visible=self.devices.visible(),
            timing=timing,
        )
        self.describer = Describer(hub, settings.data_dir / f"headers-{self.name}")
        self.dry_run = DryRun(settings, self.models, self.describer.of, self.devices, self.runners, timing)
        self.placer = Placer(
            settings, self.devices, self.residents, self.dry_run.measured, self.announce, self.tally, timing
        )
        self.desired = Desired(
            settings.data_dir / f"wanted-{self.name}.json", is_on=settings.restore == "on", timing=timing
        )
        self.crashes = Crashes(store.instances)
        self.restorer = Restorer(
            self.name, store.instances, self.desired, self.deliver, self._has_files, self.models, timing
        )
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
        self.downloads = Downloads(self.name, settings.roots, hub, store.downloads, settings.stall_limit_s)
        self.listener = Listener(log_level=settings.log_level, log_format=settings.log_format)
        self._heartbeat = heartbeat
        self._digest = ""  # of the published catalog
        self._uses: dict[str, float] = {}  # as written last
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
            listener=self.listener,
            crashes=self.crashes,
            templates={},
            desired=self.desired,
            tally=self.tally,
            placed=self.placed,
            changed=self.changed,
            ending=self.ending,
            out_of_time=self.out_of_time,
        )

    # ---- called by the worker's main

    async def publish(self, models: list[Model], dead_epoch: str = "") -> bool:
        """Take a new catalog and publish it.  Returns False if another process holds the lease.

        `dead_epoch` is that of a predecessor whose lease may be taken over.  Raises what UNAVAILABLE lists.
        """
        self.models.clear()
        self.models.update({model.key: model for model in models})
        digest = await self.store.workers.publish_catalog(self.name, models, self.epoch, dead_epoch)
        self._digest = digest or self._digest
        return digest is not None

    async def warm(self) -> None:
        """Wait until a runner is warm.  Drops the GPUs if the engine was built without CUDA.

        Raises RunnerDied, RunnerStuck, and SettingsError if the engine can use none of the worker's devices.
        """
        await self.runners.warmed()
        assert self.runners.engine is not None
        if self.devices.gpus and "CUDA" not in self.runners.engine.backends:
            _log.warning("llama.cpp was built without CUDA", action="gpus_left_out", gpus=self.devices.gpus)
            self.devices.without_gpus()
            await self.placer.look()

    def deliver(self, id_: str, not_before: float = 0.0) -> None:
        """Accept a queued instance, to be loaded from `not_before` on (seconds since the epoch).

        Ignores an instance that is held already, and all deliveries while the worker drains.
        """
        if id_ not in self.residents and not self.ending.is_set():
            self.residents[id_] = Resident(self._services, id_, not_before)
            self.tasks[id_] = asyncio.create_task(self._live(self.residents[id_]))

    def _has_files(self, instance: Instance) -> bool:
        model = of_instance(self.models, instance)
        return model is not None and model.problem is None

    def holds(self, model: Model) -> bool:
        """Return whether an instance of a model is loaded, being loaded or waiting."""
        keys = {resident.instance.full_key for resident in self.residents.values() if resident.instance is not None}
        return model.full_key in keys

    def stop(self, id_: str) -> None:
        """Stop an instance, if this worker holds it."""
        if id_ in self.residents:
            self.residents[id_].stop.set()

    # ---- the beat

    def snapshot(self) -> WorkerSnapshot:
        """Return the snapshot of this worker that is published."""
        return WorkerSnapshot(
            name=self.name,
            epoch=self.epoch,
            version=shared.__version__,
            catalog=self._digest,
            residents=sum(resident.claimed or not resident.stop.is_set() for resident in self.residents.values()),
            state="draining" if self.ending.is_set() else "ready",
            devices=self.placer.devices(),
            held=self.placer.held(),
            taken=[*self.placed],
            partly_on_cpu=self.settings.gpu_offload == "auto",
            lease_s=self.store.workers.lease_s,
            engine=self.runners.engine,
            channels=self.listener.address,
            problems=self.problems,
            has_hub=self.describer.is_on,
        )

    async def announce_changes(self) -> None:
        """Publish the snapshot soon after each change.  Runs until cancelled."""
        while True:
            await self.changed.wait()
            self.changed.clear()
            await self.announce()
            check_cancelled()

    async def announce(self) -> None:
        """Publish the snapshot now.  Errors of Redis are ignored, since the next beat publishes it again."""
        with suppress(*UNAVAILABLE):
            await self.store.workers.announce(self.snapshot())

    async def beat(self) -> None:
        """Beat at each `Timing.beat_s`.  Raises LeaseLost.

        The lease depends on the runners: while none answers and none can be started, it is not renewed and expires.
        """
        while True:
            self._heartbeat()
            await self.runners.watch(self.timing.beat_s)
            self.listener.watch(self.timing.beat_s)
            try:
                if self.runners.silent_s < self.store.workers.lease_s:
                    await self.beat_once()
                else:
                    _log.error("no runner answers", action="runners_silent", silent_s=round(self.runners.silent_s))
            except UNAVAILABLE as e:  # the runners stay: without Redis, their loads cannot go to another worker
                _log.warning("beat missed", action="redis_unavailable", error=str(e))
            check_cancelled()
            await asyncio.sleep(self.timing.beat_s)

    async def beat_once(self) -> None:
        """Renew the lease, reconcile the instances with their records, and restore missing ones.

        Raises LeaseLost and what UNAVAILABLE lists.
        """
        await self.placer.look()
        lease = await self.store.workers.renew(self.snapshot())
        if lease == "refused":
            raise LeaseLost(f"the lease of worker '{self.name}' is held by another process")
        await self.reconciler.reconcile()
        if lease == "no catalog":
            # Redis was emptied.  No load is placed here until the held instances have their names again.
            await self.publish(list(self.models.values()))
        if not self.ending.is_set():
            await self.restorer.restore(self.residents.keys())
            await self.restorer.preload()
        for resident in self.residents.values():
            if n := resident.new_preemptions():
                self.tally.add({field("preemptions"): n})
        await self._write_uses(is_lost=lease == "no catalog")
        await self.tally.hand_over(self.store.counters.add)

    async def _write_uses(self, *, is_lost: bool) -> None:
        """Write the last uses of the desired instances, for the worker's next process, unless Redis has them.

        Raises what UNAVAILABLE lists.
        """
        self.desired.use({id_: resident.requests.used_at for id_, resident in self.residents.items()})
        used = self.desired.uses()
        if used != self._uses or is_lost:
            await self.store.instances.write_uses(self.name, used)
            self._uses = used

    async def watch_files(self) -> None:
        """Set `changed` of each instance whose files changed.  Runs until cancelled.

        A change in place alters the weights of a mapped model; if a file was replaced, the key names a different model.
        Reads the files in a thread, since a network file system may hang.
        """
        while True:
            await asyncio.sleep(self.timing.beat_s)
            for resident in [resident for resident in self.residents.values() if resident.files]:
                if await asyncio.to_thread(has_changed, resident.files):
                    resident.changed.set()

    # ---- the end

    async def finish(self) -> None:
        """Refuse new loads and requests, requeue loads in progress, and stop each runner after its last request, or all
        after `drain_s`.

        The agent beats meanwhile, so that its lease holds and API processes send their requests elsewhere, and the
        listener carries the last answers.
        """
        self._begin_to_end()
        if self.tasks:
            await asyncio.wait(self.tasks.values(), timeout=self.settings.drain_s)
        self.out_of_time.set()
        await self._wait_for_residents()

    def _begin_to_end(self) -> None:
        self.ending.set()
        for resident in self.residents.values():
            resident.stop.set()
        self.changed.set()  # its state is "draining"

    async def drain(self) -> None:
        """Refuse new loads, requeue loads in progress, and stop all runners in parallel, whatever they do.

        Queued loads stay queued, for another worker or for this worker's successor.
        """
        self._begin_to_end()
        self.out_of_time.set()
        draining = asyncio.create_task(self._wait_for_residents())
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(self.timing.drain_s / 2):
                await self.store.workers.renew(self.snapshot())  # the state "draining": no API places a load here
        self.desired.use({id_: resident.requests.used_at for id_, resident in self.residents.items()})
        await draining
        self.desired.flush()
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(self.timing.drain_s / 4):
                await self.tally.hand_over(self.store.counters.add)

    async def _wait_for_residents(self) -> None:
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
