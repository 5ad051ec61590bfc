"""Carrying out `shared.memory.placement` on this worker: reserves memory, evicts instances, gives memory back."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import Protocol, assert_never

from msgspec import UNSET, structs

from shared.errors import ErrorBody, LoadFailed
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.estimate import requirements_of
from shared.memory.placement import Constraints, Demand, Placement, has_gpu, largest_context_length, place
from shared.memory.plan import plan
from shared.race import first, racing
from shared.schema.memory import CPU, Device, Holding, Usage
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.telemetry import log
from shared.telemetry.tally import Tally, field
from worker.memory.devices import Devices
from worker.memory.ledger import Ledger
from worker.memory.nvml import Reading
from worker.runner.failure import shortage
from worker.timing import Timing

TOO_LITTLE = "there is not enough memory"
AMPLE = 2  # where there is room for so many times the estimate, it need not be exact

_log = log.get("worker")


class Holder(Protocol):
    """An instance that holds memory of this worker, or is to."""

    stop: asyncio.Event
    freed: asyncio.Event

    @property
    def id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def instance(self) -> Instance | None: ...


class Placer:
    """Reserves what loads take, one after the other, and gives it back."""

    def __init__(
        self,
        settings: Settings,
        devices: Devices,
        holders: Mapping[str, Holder],
        announce: Callable[[], Awaitable[None]],
        tally: Tally,
        timing: Timing,
    ) -> None:
        """`holders`: all instances of this worker, by id of the load.  `announce` publishes what has changed here."""
        self.ledger = Ledger(settings.kept_free)
        self.ledger.update(devices.read())
        self.placing = asyncio.Lock()  # held while a load is placed
        self.hanging: asyncio.Future[list[Reading]] | None = None  # a reading that the driver does not answer
        self._settings = settings
        self._devices = devices
        self._holders = holders
        self._announce = announce
        self._tally = tally
        self._timing = timing
        self._turns: dict[str, asyncio.Lock] = {}
        at_once = settings.loads_at_once
        self._at_once = asyncio.Semaphore(at_once) if at_once else None

    async def look(self) -> None:
        """Read the devices.  While the driver hangs, nothing of a GPU counts as free."""
        if not self._devices.gpus:  # the kernel answers at once
            self.ledger.update(self._devices.read())
            return
        readings = [structs.replace(one, free_bytes=0) if one.is_gpu else one for one in self.ledger.readings]
        if self.hanging is None or self.hanging.done():
            self.hanging, reading = None, asyncio.ensure_future(asyncio.to_thread(self._devices.read))
            try:
                async with asyncio.timeout(self._timing.hang_s):
                    readings = await asyncio.shield(reading)
            except TimeoutError:
                self.hanging = reading  # until it is back, no thread more
                _log.error("the driver hangs", action="driver_hangs", since_s=self._timing.hang_s)
        self.ledger.update(readings)

    @asynccontextmanager
    async def turn(self, devices: Sequence[str], stop: asyncio.Event) -> AsyncIterator[bool]:
        """Wait for a turn: one load at once on each device, since two would slow each other, or as many in all as the
        setting says.  Yields whether it came before `stop` was set."""
        locks: list[asyncio.Lock | asyncio.Semaphore] = (
            # In one order for all, so that nobody waits in a circle.
            [self._turns.setdefault(device, asyncio.Lock()) for device in sorted(devices)]
            if self._at_once is None
            else [self._at_once]
        )
        with ExitStack() as held:
            for lock in locks:
                if not await _acquired(lock, stop):
                    yield False
                    return
                held.callback(lock.release)
            yield True

    # ---- reserving

    async def place(self, instance: Instance, model: Model) -> Placement | None:
        """Reserve room for a load, one at a time; returns None if there is none.

        Victims are stopped first.  Once their memory is free, the load is placed again, once.  A restoration evicts
        nothing.
        """
        await self.look()
        demand = self._demand(instance, model)
        snapshot = self._snapshot()
        if instance.restoring:
            snapshot = structs.replace(snapshot, held=[])
        placed = place(demand, snapshot)
        if placed is not None and placed.evicts:
            await self._evict(placed.evicts, instance)
            await self.look()
            evicted = placed.evicts
            placed = place(demand, structs.replace(self._snapshot(), held=[]))
            placed = None if placed is None else structs.replace(placed, evicts=evicted)
        if placed is not None:
            self.ledger.reserve(instance.id, placed.usage)
        return placed

    def _demand(self, instance: Instance, model: Model) -> Demand:
        requirements = requirements_of(model, plan(instance.request, model, self._settings))
        return Demand(requirements, Constraints.of(instance.request.gpu), instance.key)

    async def _evict(self, victims: Sequence[Holding], instance: Instance) -> None:
        names = {held.instance_id for held in victims}
        leaving = [one for one in self._holders.values() if one.instance and one.instance.instance_id in names]
        for holder in leaving:
            assert holder.instance is not None
            with log.about(holder.instance):
                _log.info("evicted", action="evicted", to_make_room_for=instance.id)
            holder.stop.set()
        self._tally.add({field("evictions"): len(leaving)})
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.leave_s):
                for holder in leaving:
                    await holder.freed.wait()

    def is_unsure(self, placed: Placement) -> bool:
        """Return whether the engine is to be asked what a placed load would take, before anything is read.

        On the CPU only where it matters: asking costs a large vocabulary's time, and most hosts have room.
        """
        if placed.exact:
            return False
        free = {device.id: device.available_bytes for device in self.ledger.devices()}
        return bool(placed.gpus) or free[CPU] < (AMPLE - 1) * placed.bytes[CPU]

    def corrected(
        self, instance: Instance, model: Model, placed: Placement, taken: Sequence[Usage]
    ) -> Placement | None:
        """Reserve what the engine said that a load takes.

        Returns its placement, another one if there is no room for that here, None if there is none anywhere.
        """
        if not self.ledger.change(instance.id, taken):
            return structs.replace(placed, usage=[*taken], exact=True)
        more = {one.id: one.total_bytes - placed.bytes.get(one.id, 0) for one in taken}
        pid = self.ledger.reservations[instance.id].pid
        self.ledger.release(instance.id)
        snapshot = self._snapshot()
        devices = [
            structs.replace(device, available_bytes=device.available_bytes - max(0, more.get(device.id, 0)))
            for device in snapshot.devices
        ]
        other = place(self._demand(instance, model), structs.replace(snapshot, devices=devices, held=[]))
        if other is not None:
            other = structs.replace(other, evicts=placed.evicts)
            self.ledger.reserve(instance.id, other.usage)
            if pid is not None:
                self.ledger.started(instance.id, pid)
        return other

    # ---- giving back

    async def give_back(self, holder: Holder) -> None:
        """Count the memory of a reaped runner as free, once the GPUs agree or after `Timing.agree_s`.

        What is still used then is seen as leaked.  Then announce it, before anybody reads that the instance is gone.
        """
        id_ = holder.id
        if id_ in self.ledger.reservations:
            self.ledger.leaving(id_)
            clock = asyncio.get_running_loop().time
            deadline = clock() + self._timing.agree_s
            await self.look()
            while not self.ledger.is_back(id_) and clock() < deadline:
                await asyncio.sleep(self._timing.look_s)
                await self.look()
            if not self.ledger.is_back(id_):
                _log.error("memory is not back", action="memory_not_back", within_s=self._timing.agree_s)
            self.ledger.release(id_)
            self.ledger.update(self.ledger.readings)
        holder.freed.set()
        await self._announce()

    # ---- telling

    def held(self) -> list[Holding]:
        """Return what the instances take that are loaded here or are to be."""
        return [
            Holding(
                instance_id="" if holder.instance is None else holder.instance.instance_id,
                key=holder.key,
                devices=reservation.bytes,
                used_at=self._used_at(holder),
                is_evictable=self._is_evictable(holder),
            )
            for id_, reservation in self.ledger.reservations.items()
            if (holder := self._holders.get(id_)) is not None
        ]

    def _used_at(self, holder: Holder) -> float:
        found = holder.instance
        return 0.0 if found is None or found.state is not State.LOADED else found.used_at or 0.0

    def _is_evictable(self, holder: Holder) -> bool:
        """Decide whether an instance may be unloaded to make room, as the setting `evict` says."""
        instance, policy = holder.instance, self._settings.evict
        if instance is None or instance.state is not State.LOADED or holder.stop.is_set():
            return False
        match policy:
            case "idle":
                return instance.request.ttl_seconds is not UNSET
            case "any":
                return True
            case "off":
                return False
            case _:
                assert_never(policy)

    def devices(self) -> list[Device]:
        """Return the devices as they were when they were looked at last."""
        return self.ledger.devices()

    def _holders_by_device(self) -> dict[str, list[str]]:
        """Return the instances that hold memory of each device, by the ids that clients know."""
        found: defaultdict[str, list[str]] = defaultdict(list)
        for held in self.held():
            for device in held.devices:
                found[device].append(held.instance_id)
        return found

    def _snapshot(self) -> WorkerSnapshot:
        """Return what placement looks at of a worker."""
        return WorkerSnapshot(
            name="",
            epoch="",
            version="",
            catalog="",
            residents=len(self._holders),
            devices=self.devices(),
            held=self.held(),
            partly_on_cpu=self._settings.gpu_offload == "auto",
        )

    def refusal(
        self, instance: Instance, model: Model | None, reason: str = "", needed: int | None = None
    ) -> ErrorBody:
        """Return the error of a load that there is no room for, with the devices that it could have gone to.

        `reason` and `needed` (bytes) are the engine's, if it was asked; otherwise the estimate says.  The largest
        context length that would fit is left out if the formula is unsure, and if it would be the length that did not
        fit.
        """
        devices, holders = self.devices(), self._holders_by_device()
        constraints = Constraints.of(instance.request.gpu)
        if constraints.offload and constraints.devices != [CPU] and has_gpu(devices):
            devices = [device for device in devices if device.kind == "gpu"]
        if constraints.devices:
            devices = [device for device in devices if device.id in constraints.devices] or devices
        would_fit: dict[str, object] = {}
        if model is not None:
            asked = plan(instance.request, model, self._settings)
            demand = Demand(requirements_of(model, asked), constraints, instance.key)
            if needed is None:
                needed = demand.single_bytes if demand.n_on_gpus and has_gpu(devices) else demand.cpu_bytes
            if demand.requirements.exact:
                snapshot = self._snapshot()
                largest = largest_context_length(
                    instance.request,
                    model,
                    self._settings,
                    lambda one: place(Demand(one, constraints, instance.key), snapshot) is not None,
                )
                if largest is None or largest < asked.n_ctx:
                    would_fit = {"largest_context_length": largest}
        others = {id_: [name for name in names if name != instance.instance_id] for id_, names in holders.items()}
        by_others = {device.id: sum(self.ledger.others(device.id).values()) for device in devices}
        words, detail = shortage(reason or TOO_LITTLE, needed or instance.total_size_bytes, devices, others, by_others)
        return LoadFailed("insufficient_memory", instance.type, instance.model, words, **detail | would_fit).body()

    def forget(self, holder: Holder) -> None:
        """Free what an instance that has ended had reserved and no runner ever took."""
        self.ledger.release(holder.id)
        holder.freed.set()


async def _acquired(lock: asyncio.Lock | asyncio.Semaphore, stop: asyncio.Event) -> bool:
    """Return whether a lock could be had before `stop` was set."""
    acquiring = asyncio.ensure_future(lock.acquire())
    is_ours = False
    try:
        async with racing(acquiring, stop.wait()) as waits:
            await first(waits)
        is_ours = not acquiring.cancelled() and not stop.is_set()
    finally:
        if not is_ours and acquiring.done() and not acquiring.cancelled():
            lock.release()
    return is_ours
