"""Carries out `shared.memory.placement` on this worker: reserves memory, evicts instances, releases memory."""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import NamedTuple, Protocol, assert_never

from msgspec import UNSET, structs

from shared.errors import ErrorBody, LoadFailed
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.estimate import Requirements
from shared.memory.figures import Ask, Figures
from shared.memory.placement import Constraints, Demand, Placement, available, has_gpu, place
from shared.race import first, racing
from shared.schema.http import LoadRequest
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
STAY_S = 30.0  # an instance that was loaded on demand is not evicted sooner: its client has not used it yet
AMPLE = 2  # with room for this many times the estimate of an architecture in NEAR, no dry run is needed

_log = log.get("worker")


class Requests(NamedTuple):
    """How many requests an instance has, how many cells of its KV cache are in use, and what it did last."""

    running: int = 0
    waiting: int = 0
    cells: int = 0
    used_at: float = 0.0  # seconds since the epoch
    tokens_per_second: float = 0.0  # generated in the last seconds


class Holder(Protocol):
    """An instance that holds memory of this worker, or waits for it."""

    stop: asyncio.Event
    freed: asyncio.Event

    @property
    def id(self) -> str: ...
    @property
    def key(self) -> str: ...
    @property
    def instance(self) -> Instance | None: ...
    @property
    def requests(self) -> Requests: ...
    @property
    def is_pinned(self) -> bool: ...

    async def close_if_unused(self, since: float) -> bool:
        """Have its runner refuse requests from now on, if it had none since a time.  Returns whether it does."""

    def open(self) -> None:
        """Have its runner take requests again."""


class Placer:
    """Reserves memory for loads, one load at a time, and releases it."""

    def __init__(
        self,
        settings: Settings,
        devices: Devices,
        holders: Mapping[str, Holder],
        ask: Ask,
        announce: Callable[[], Awaitable[None]],
        tally: Tally,
        timing: Timing,
    ) -> None:
        """`holders`: all instances of this worker, by id of the load.  `ask` asks the engine; `announce` publishes the
        worker's snapshot."""
        self.ledger = Ledger(settings.kept_free)
        self.ledger.update(devices.read())
        self.placing = asyncio.Lock()  # held while a load is placed
        self.hanging: asyncio.Future[list[Reading]] | None = None  # a reading for which the driver has not returned
        self._settings = settings
        self._devices = devices
        self._holders = holders
        self._ask = ask
        self._announce = announce
        self._tally = tally
        self._timing = timing
        self._turns: dict[str, asyncio.Lock] = {}
        self._demands: dict[str, Demand] = {}  # of the instances that were placed or refused, by id of the load
        self._more: dict[str, dict[str, int]] = {}  # what a dry run reported beyond these demands, by device
        at_once = settings.loads_at_once
        self._at_once = asyncio.Semaphore(at_once) if at_once else None

    async def look(self) -> None:
        """Read the devices.  While the driver hangs, GPUs count as having no free memory."""
        if not self._devices.gpus:  # the kernel does not block
            self.ledger.update(self._devices.read())
            return
        readings = [structs.replace(last, free_bytes=0) if last.is_gpu else last for last in self.ledger.readings]
        if self.hanging is None or self.hanging.done():
            self.hanging, reading = None, asyncio.ensure_future(asyncio.to_thread(self._devices.read))
            try:
                async with asyncio.timeout(self._timing.hang_s):
                    readings = await asyncio.shield(reading)
            except TimeoutError:
                self.hanging = reading  # until it returns, no further thread is started
                _log.error("driver hangs", action="driver_hangs", since_s=self._timing.hang_s)
        self.ledger.update(readings)

    @asynccontextmanager
    async def turn(self, devices: Sequence[str], stop: asyncio.Event) -> AsyncIterator[bool]:
        """Wait for a load's turn.  Yields True on its turn, False if `stop` is set first.

        Each device runs one load at a time, since concurrent loads slow each other down; if `loads_at_once` is set, it
        limits the loads of the worker instead.
        """
        locks: list[asyncio.Lock | asyncio.Semaphore] = (
            # Sorted, so that loads acquire locks in the same order and cannot deadlock.
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
        """Reserve memory for a load.  Returns None if it does not fit.  The caller holds `placing`.

        Where the formula was not checked, the engine is asked first, unless there is ample room.  Victims are closed
        next, and stopped once none of them is busy.  Once their memory is free, the load is placed again, once.  A
        restoration evicts nothing.
        """
        await self.look()
        figures = self._figures(instance.request, model)
        demand = self._demand(instance, figures.formula)
        placed = place(demand, self._snapshot_for(instance))
        if placed is not None and self._is_ample(demand, placed):
            placed = structs.replace(placed, exact=True)
        elif not figures.is_checked:
            readings = self.ledger.readings
            demand = self._demand(instance, await figures.requirements())
            if self._devices.gpus:  # a dry run took memory of the driver, which a later reading may still show
                self.ledger.update(readings)
            else:
                await self.look()
            placed = place(demand, self._snapshot_for(instance))
        self._demands[instance.id] = demand
        placed = await self._without_busy(placed, demand, instance)
        if placed is not None and placed.evicts:
            await self._evict(placed.evicts, instance)
            await self.look()
            evicted = placed.evicts
            placed = place(demand, structs.replace(self._snapshot(), held=[]))
            placed = None if placed is None else structs.replace(placed, evicts=evicted)
        if placed is not None:
            self.ledger.reserve(instance.id, placed.usage)
        return placed

    def _figures(self, request: LoadRequest, model: Model) -> Figures:
        constraints = Constraints.of(request.gpu)
        is_partly = constraints.is_partly and self._settings.gpu_offload == "auto"
        gpus = constraints.gpus(self.devices())
        return Figures(request, model, self._settings, gpus, self._ask, with_cpu=is_partly)

    def _demand(self, instance: Instance, requirements: Requirements) -> Demand:
        return Demand(requirements, Constraints.of(instance.request.gpu), instance.key)

    def _snapshot_for(self, instance: Instance) -> WorkerSnapshot:
        """Return the snapshot in which a load is placed: a restoration evicts nothing."""
        snapshot = self._snapshot()
        return structs.replace(snapshot, held=[]) if instance.restoring else snapshot

    def _is_ample(self, demand: Demand, placed: Placement) -> bool:
        """Return whether a load has room even if the formula is off, so that it needs no dry run."""
        on_cpu = demand.requirements.n_layers - sum(placed.layers)
        if placed.evicts or not demand.requirements.is_near(len(placed.gpus), on_cpu):
            return False
        free = available(self.devices())
        return all(AMPLE * n_bytes <= free[id_] for id_, n_bytes in placed.bytes.items() if id_ in free)

    def fits(self, instance: Instance) -> bool:
        """Return whether a load that did not fit would fit now, after evictions."""
        return place(self._demands[instance.id], self._snapshot_for(instance)) is not None

    def may_fit(self, instance: Instance) -> bool:
        """Return whether a load that did not fit would fit if no instance were busy."""
        snapshot = self._snapshot_for(instance)
        idle = [structs.replace(held, is_busy=False) for held in snapshot.held]
        return place(self._demands[instance.id], structs.replace(snapshot, held=idle)) is not None

    async def _without_busy(self, placed: Placement | None, demand: Demand, instance: Instance) -> Placement | None:
        """Return a placement whose victims refuse requests from now on; None if there is none.

        The snapshot says which instances were idle at the last beat; their runners decide.
        """
        busy: set[str] = set()
        while placed is not None and placed.evicts:
            victims, since = self._named(placed.evicts), time.time()
            closed = await asyncio.gather(*(holder.close_if_unused(since) for holder in victims))
            if all(closed):
                break
            for holder, is_closed in zip(victims, closed, strict=True):
                if is_closed:
                    holder.open()
                else:
                    busy.add(self._id_of(holder))
                    self._tally.add({field("evictions_refused"): 1})
            snapshot = self._snapshot_for(instance)
            held = [structs.replace(one, is_busy=one.is_busy or one.instance_id in busy) for one in snapshot.held]
            placed = place(demand, structs.replace(snapshot, held=held))
        return placed

    def _named(self, held: Sequence[Holding]) -> list[Holder]:
        names = {one.instance_id for one in held}
        return [holder for holder in self._holders.values() if self._id_of(holder) in names]

    async def _evict(self, victims: Sequence[Holding], instance: Instance) -> None:
        evicted = self._named(victims)
        for holder in evicted:
            assert holder.instance is not None
            with log.about(holder.instance):
                _log.info("evicted", action="evicted", to_make_room_for=instance.id)
            holder.stop.set()
        self._tally.add({field("evictions"): len(evicted)})
        with suppress(TimeoutError):
            async with asyncio.timeout(self._timing.leave_s):
                for holder in evicted:
                    await holder.freed.wait()

    def corrected(self, instance: Instance, placed: Placement, usage: Sequence[Usage]) -> Placement | None:
        """Replace a load's reservation by the usage that a dry run reported.

        Returns the placement; another one if the load no longer fits there; None if it fits nowhere.
        """
        if not self.ledger.change(instance.id, usage):
            return structs.replace(placed, usage=[*usage], exact=True)
        more = {device.id: max(0, device.total_bytes - placed.bytes.get(device.id, 0)) for device in usage}
        self._more[instance.id] = more
        pid = self.ledger.reservations[instance.id].pid
        self.ledger.release(instance.id)
        snapshot = structs.replace(self._snapshot_beside(more), held=[])
        other = place(self._demands[instance.id], snapshot)
        if other is not None:
            other = structs.replace(other, evicts=placed.evicts)
            self.ledger.reserve(instance.id, other.usage)
            if pid is not None:
                self.ledger.started(instance.id, pid)
        return other

    async def settle(self, id_: str, usage: Sequence[Usage]) -> None:
        """Mark a load as done, with the usage that the engine reports.

        Announces a reservation that changed before returning, so that a client that reads "loaded" finds it.
        """
        before = {**self.ledger.reservations[id_].bytes}
        self.ledger.settle(id_, usage)
        if self.ledger.reservations[id_].bytes != before:
            await self._announce()

    # ---- releasing

    async def give_back(self, holder: Holder) -> None:
        """Release the memory of a reaped runner, once the GPUs report it as free or after `Timing.agree_s`.

        Memory that is still in use then counts as leaked.  Announces the change before returning, so that a client that
        reads the instance's end finds its memory available.
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
                _log.error("GPU memory was not freed", action="memory_not_back", within_s=self._timing.agree_s)
            self.ledger.release(id_)
            self.ledger.update(self.ledger.readings)
        holder.freed.set()
        await self._announce()

    # ---- reporting

    def held(self) -> list[Holding]:
        """Return the memory that each instance here has reserved."""
        return [
            Holding(
                instance_id=self._id_of(holder),
                key=holder.key,
                devices=reservation.bytes,
                used_at=self._used_at(holder),
                is_evictable=self._is_evictable(holder),
                is_busy=self._is_busy(holder),
                running=holder.requests.running,
                waiting=holder.requests.waiting,
                cells=holder.requests.cells,
                tokens_per_second=holder.requests.tokens_per_second,
            )
            for id_, reservation in self.ledger.reservations.items()
            if (holder := self._holders.get(id_)) is not None
        ]

    def _id_of(self, holder: Holder) -> str:
        return "" if holder.instance is None else holder.instance.instance_id

    def _used_at(self, holder: Holder) -> float:
        instance = holder.instance
        return 0.0 if instance is None or instance.state is not State.LOADED else holder.requests.used_at

    def _is_busy(self, holder: Holder) -> bool:
        """Return whether an instance must not be evicted now."""
        instance, requests = holder.instance, holder.requests
        is_new = instance is not None and instance.on_demand and time.time() < (instance.loaded_at or 0.0) + STAY_S
        return is_new or holder.stop.is_set() or requests.running + requests.waiting > 0

    def _is_evictable(self, holder: Holder) -> bool:
        """Return whether an instance may be evicted, by the setting `evict`, or is being stopped."""
        instance, policy = holder.instance, self._settings.evict
        if holder.stop.is_set():
            return True
        if instance is None or instance.state is not State.LOADED or holder.is_pinned:
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
        """Return the devices as of the last `look`."""
        return self.ledger.devices()

    def _holders_by_device(self) -> dict[str, list[str]]:
        """Return the `instance_id` of each instance that holds memory, by device."""
        holders: defaultdict[str, list[str]] = defaultdict(list)
        for held in self.held():
            for device in held.devices:
                holders[device].append(held.instance_id)
        return holders

    def _snapshot(self) -> WorkerSnapshot:
        """Return the part of a worker's snapshot that placement reads."""
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

    def _snapshot_beside(self, more: Mapping[str, int]) -> WorkerSnapshot:
        """Return the snapshot with so much less memory on its devices."""
        snapshot = self._snapshot()
        devices = [
            structs.replace(device, available_bytes=device.available_bytes - more.get(device.id, 0))
            for device in snapshot.devices
        ]
        return structs.replace(snapshot, devices=devices)

    async def refusal(
        self, instance: Instance, model: Model | None, reason: str = "", needed: int | None = None
    ) -> ErrorBody:
        """Return the error of a load that does not fit, with the devices that its request allows.

        `reason` and `needed` (bytes) are from the engine; without them, those of the estimate are used.  The detail has
        the largest context length that would fit, unless that is not known or not below the requested one.
        """
        devices, holders = self.devices(), self._holders_by_device()
        constraints = Constraints.of(instance.request.gpu)
        if constraints.offload and constraints.devices != [CPU] and has_gpu(devices):
            devices = [device for device in devices if device.kind == "gpu"]
        if constraints.devices:
            devices = [device for device in devices if device.id in constraints.devices] or devices
        would_fit: dict[str, object] = {}
        if model is not None:
            figures = self._figures(instance.request, model)
            requirements = await figures.requirements()
            demand = self._demand(instance, requirements)
            is_on_gpus = demand.n_on_gpus > 0 and has_gpu(devices)
            if needed is None:
                needed = demand.single_bytes if is_on_gpus else demand.cpu_bytes
            if requirements.is_exact(int(is_on_gpus), demand.first):
                snapshot = self._snapshot_beside(self._more.get(instance.id, {}))
                largest = await figures.largest_context_length(
                    lambda requirements: place(self._demand(instance, requirements), snapshot) is not None,
                    fits=place(demand, snapshot) is not None,
                )
                if largest is None or largest < figures.context_length:
                    would_fit = {"largest_context_length": largest}
        others = {id_: [name for name in names if name != instance.instance_id] for id_, names in holders.items()}
        by_others = {device.id: sum(self.ledger.others(device.id).values()) for device in devices}
        sentence, detail = shortage(
            reason or TOO_LITTLE, needed or instance.total_size_bytes, devices, others, by_others
        )
        return LoadFailed("insufficient_memory", instance.type, instance.model, sentence, **detail | would_fit).body()

    async def withdraw(self, holder: Holder) -> None:
        """Release the reservation of an instance that no runner uses, if there is one.

        Announces the change before returning, as `give_back` does.
        """
        if holder.id in self.ledger.reservations:
            self.forget(holder)
            await self._announce()

    def forget(self, holder: Holder) -> None:
        """Release the reservation of an instance that ended before a runner used it."""
        self._demands.pop(holder.id, None)
        self._more.pop(holder.id, None)
        self.ledger.release(holder.id)
        holder.freed.set()


async def _acquired(lock: asyncio.Lock | asyncio.Semaphore, stop: asyncio.Event) -> bool:
    """Acquire a lock.  Returns False, without it, if `stop` is set first."""
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
