"""The agent: owner of a worker's runners, and the only one who moves the instances that it claimed."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable
from contextlib import suppress

import shared
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.memory import Device
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.connection import UNAVAILABLE, check_cancelled
from shared.store.instances import Fenced, NameTaken, NoLease, NotDesired
from shared.store.keys import CRASH_MEMORY_S
from shared.store.store import Store
from shared.telemetry import log
from shared.telemetry.tally import Tally, died
from worker.instance import Resident, has_changed
from worker.memory.devices import Devices
from worker.memory.dry_run import Sizer
from worker.memory.nvml import Driver
from worker.memory.placer import Placer
from worker.restore import Wanted, decide, restoration
from worker.runner.warm import Runners

BEAT_S = 1.0
DRAIN_S = 4.0
TAKEN_N = 16  # more than an API usually gives a worker between two looks

_log = log.get("worker")


class LeaseLost(Exception):
    """Another process works under this worker's name."""


class Agent:
    """`heartbeat` tells the supervisor that the beat goes on.  Raises SettingsError for devices that are not there."""

    def __init__(
        self, settings: Settings, store: Store, epoch: str, heartbeat: Callable[[], None] = lambda: None
    ) -> None:
        self.settings = settings
        self.store = store
        self.name = settings.name
        self.epoch = epoch
        self.heartbeat = heartbeat
        self.tally = Tally()
        self.devices = Devices(settings, Driver())
        self.placer = Placer(self)
        self.runners = Runners(
            settings.lease_s / 2, lambda: self.tally.add(died("warm")), visible=self.devices.visible()
        )
        self.sizer = Sizer(self)
        self.wanted = Wanted(settings.data_dir / f"wanted-{self.name}.json", is_on=settings.restore == "on")
        self.held: dict[str, Resident] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.draining = False
        self.taken: deque[str] = deque(maxlen=TAKEN_N)  # loads that were placed or refused
        self.changed = asyncio.Event()  # what our snapshot says of the devices and what they hold
        self.models: dict[str, Model] = {}
        self._digest = ""
        self._crashes: dict[str, tuple[float, str]] = {}  # by fingerprint: until when, and why

    # ---- what the worker's main gives it

    async def publish(self, models: list[Model], dead_epoch: str = "") -> bool:
        """Take a new catalog, and publish it; not where another process holds our lease."""
        self.models = {model.key: model for model in models}
        digest = await self.store.workers.publish_catalog(self.name, models, self.epoch, dead_epoch)
        self._digest = digest or self._digest
        return digest is not None

    async def warm(self) -> None:
        """Wait until a runner is warm, which tells what the engine can use.  Raises RunnerDied, TimeoutError, and
        SettingsError where that is none of our devices."""
        await self.runners.warmed()
        if self.devices.gpus and not self.runners.has_cuda:
            _log.warning("llama.cpp was built without CUDA", action="gpus_left_out", gpus=self.devices.gpus)
            self.devices.without_gpus()
            await self.placer.look()

    def deliver(self, id_: str, not_before: float = 0.0) -> None:
        """Take an instance from the queue; a second delivery of the same one is ignored."""
        if id_ not in self.held and not self.draining:
            self.held[id_] = Resident(self, id_, not_before)
            self.tasks[id_] = asyncio.create_task(self._live(self.held[id_]))

    def stop(self, id_: str) -> None:
        """Somebody wishes an instance stopped."""
        if id_ in self.held:
            self.held[id_].stop.set()

    # ---- the beat

    def memory(self) -> tuple[list[Device], dict[str, list[str]]]:
        """The devices, as they were when they were looked at last, and the instances that hold memory of each, as
        clients name them."""
        holders: defaultdict[str, list[str]] = defaultdict(list)
        for held in self.placer.held():
            for device in held.devices:
                holders[device].append(held.instance_id)
        return self.placer.devices(), holders

    def snapshot(self) -> WorkerSnapshot:
        return WorkerSnapshot(
            name=self.name,
            epoch=self.epoch,
            version=shared.__version__,
            catalog=self._digest,
            residents=sum(held.claimed or not held.stop.is_set() for held in self.held.values()),
            state="draining" if self.draining else "ready",
            devices=self.placer.devices(),
            held=self.placer.held(),
            taken=[*self.taken],
            partly_on_cpu=self.settings.gpu_offload == "auto",
            lease_s=self.store.workers.lease_s,
        )

    async def tell(self) -> None:
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
        """Renew the lease, make what runs match what the records say; repeat.  Raises LeaseLost.

        The lease depends on runners: while none answers and none can be started, it is left to run out.
        """
        while True:
            self.heartbeat()
            await self.runners.watch(BEAT_S)
            try:
                if self.runners.silent_s < self.store.workers.lease_s:
                    await self._beat()
                else:
                    _log.error("no runner answers", action="runners_silent", silent_s=round(self.runners.silent_s))
            except UNAVAILABLE as e:  # the runners stay: nobody else can have been given their work
                _log.warning("beat missed", action="redis_unavailable", error=str(e))
            check_cancelled()
            await asyncio.sleep(BEAT_S)

    async def _beat(self) -> None:
        await self.placer.look()
        lease = await self.store.workers.renew(self.snapshot())
        if lease == "refused":
            raise LeaseLost(f"the lease of worker '{self.name}' is held by another process")
        await self._reconcile()
        if lease == "no catalog":  # Redis was emptied: nothing is placed here before what we hold has its names again
            await self.publish(list(self.models.values()))
        await self._restore()
        await self.tally.hand_over(self.store.counters.add)

    async def _reconcile(self) -> None:
        claimed = [held for held in self.held.values() if held.claimed]
        mine = {one.id: one for one in await self.store.instances.live_at(self.name, [held.id for held in claimed])}
        for held in claimed:
            record = mine.get(held.id)
            if record is None or record.epoch != self.epoch:
                if not await self._kept(held):
                    held.stop.set()
            elif record.stop_requested:
                held.stop.set()
            elif held.instance is not None and record.rev < held.instance.rev:
                await self._kept(held)
        for instance in mine.values():
            if instance.id in self.held:
                continue
            if instance.state is State.QUEUED:  # its delivery was lost, or it is to be begun later, or is refused here
                if self.name in instance.refused:
                    continue
                self.deliver(instance.id, instance.not_before)
            elif instance.epoch == self.epoch:  # claimed, but the reply to the claim was lost
                await self.give_up(instance)

    async def _kept(self, held: Resident) -> bool:
        """Whether a loaded instance whose record is not as we left it stays: Redis was emptied, or lost what it was
        told last, and is told again.  Where somebody else moved it on, or its id was given away, it is not ours."""
        loaded = held.instance
        if not self.wanted.is_on or loaded is None or loaded.state is not State.LOADED:
            return False
        found = await self.store.instances.rewrite(loaded)
        if found == "written":
            with log.about(loaded):
                _log.warning("record written again", action="record_rewritten")
        return found in ("written", "there")

    async def give_up(self, instance: Instance) -> None:
        """Give up a claimed instance that nobody holds any more: one that was never loaded is begun anew."""
        if instance.state is State.LOADED and not instance.stop_requested:
            self.wanted.add(instance)
        with suppress(Fenced), log.about(instance):
            instance, _ = await self.commit(instance, instance.abandoned(self.settings.load_attempts))
            if instance.state is State.QUEUED and instance.stop_requested:
                await self.commit(instance, instance.after(Event.STOP))

    async def recall(self) -> None:
        """Learn from Redis what this worker is to hold and its file does not know of.  Without restoring, forget it."""
        if not self.wanted.is_on:
            return await self.store.instances.clear_desired(self.name)
        known = {wanted.id for wanted in self.wanted.instances.values()}
        for record in await self.store.instances.many(
            [*set((await self.store.instances.desired(self.name)).values()) - known]
        ):
            self.wanted.add(record)
        return None

    async def _restore(self) -> None:
        """Begin to load again what is wanted and not held, what was used last first."""
        missing = [wanted for wanted in self.wanted.instances.values() if wanted.id not in self.held]
        if not missing or self.draining:
            return
        records = {record.id: record for record in await self.store.instances.many([wanted.id for wanted in missing])}
        known = await self.store.instances.desired(self.name)
        for wanted in sorted(missing, key=lambda w: w.used_at or 0.0, reverse=True):
            record = records.get(wanted.id)
            todo = decide(wanted, record, known.get(wanted.instance_id))
            if todo == "wait":
                continue
            if todo == "drop":
                await self._forget(wanted, record)
                continue
            begun = restoration(wanted, f"load_{uuid.uuid4().hex}", todo)
            try:
                begun = await self.store.instances.create(begun, restores=wanted.id if record else "")
            except (NameTaken, NotDesired):  # it was loaded anew, or unloaded, while we were away
                await self._forget(wanted, None)
            except NoLease:
                return
            else:
                with log.about(begun):
                    _log.info("restoring", action="restoring", number=todo)
                self.wanted.add(begun)
                self.deliver(begun.id, begun.not_before)

    async def _forget(self, wanted: Instance, record: Instance | None) -> None:
        await self.store.instances.forget_desired(wanted)
        self.wanted.discard(wanted)
        if record is not None and record.state is State.FAILED:
            reason = record.error.message if record.error else ""
            with log.about(wanted):
                _log.error("not restored", action="restore_given_up", reason=reason)

    # ---- models that crashed the engine

    async def crashed(self, model: Model, reason: str) -> None:
        """Remember for a while that a model crashed the engine."""
        self._crashes[model.fingerprint] = (time.monotonic() + CRASH_MEMORY_S, reason)
        with suppress(*UNAVAILABLE):
            await self.store.instances.remember_crash(model.fingerprint, reason)

    async def survived(self, instance: Instance, model: Model) -> None:
        """Forget it, since the model was loaded all the same."""
        if self._crashes.pop(model.fingerprint, None) is not None or instance.request.force:
            with suppress(*UNAVAILABLE):
                await self.store.instances.forget_crash(model.fingerprint)

    def crash(self, model: Model) -> tuple[str, int] | None:
        """Why a model crashed the engine lately, and for how many seconds that is remembered."""
        until, reason = self._crashes.get(model.fingerprint, (0.0, ""))
        left_s = math.ceil(until - time.monotonic())
        return (reason, left_s) if left_s > 0 else None

    # ---- files that change

    async def watch_files(self) -> None:
        """Look at the files of what is loaded, and tell whose have changed; repeat.

        A change in place is under the mapping that the weights are; a file that was replaced is not what its key
        names any more.  One that is gone harms nobody.  In a thread, for a network file system may hang.
        """
        while True:
            await asyncio.sleep(BEAT_S)
            for resident in [held for held in self.held.values() if held.files]:
                if await asyncio.to_thread(has_changed, resident.files):
                    resident.changed.set()

    # ---- the end

    async def drain(self) -> None:
        """Take nothing more, hand back what is loading, and stop all runners in parallel; what is queued stays
        queued, for another worker or for our successor."""
        self.draining = True
        for held in self.held.values():
            held.stop.set()
        ending = asyncio.create_task(self._drained())
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(DRAIN_S / 2):
                await self.store.workers.renew(self.snapshot())  # nothing more is placed here
        await ending
        self.wanted.flush()
        with suppress(*UNAVAILABLE, TimeoutError):
            async with asyncio.timeout(DRAIN_S / 4):
                await self.tally.hand_over(self.store.counters.add)

    async def _drained(self) -> None:
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
        """One commit, and one log line for a transition, with the ids that its caller bound.  Returns Redis' time in
        seconds too.

        Raises Fenced, StopRequested and what UNAVAILABLE lists.
        """
        committed, now = await self.store.instances.commit(old, new)
        if old.state is not committed.state:
            facts = {"code": committed.error.code, "reason": committed.error.message} if committed.error else {}
            _log.info(
                f"{old.state} -> {committed.state}",
                action="transition",
                old=old.state.value,
                new=committed.state.value,
                **facts,
            )
        return committed, now
