"""Where a load of this worker goes, and who has to leave for it: what `shared.memory.placement` decides, done."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, asynccontextmanager, suppress
from typing import TYPE_CHECKING

from msgspec import UNSET, structs

from shared.errors import ErrorBody, LoadFailed
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.estimate import needs_of
from shared.memory.placement import Placement, Wish, has_gpu, largest_context_length, place
from shared.memory.plan import plan
from shared.schema.memory import CPU, Device, Holding, Taken
from shared.schema.model import Model
from shared.telemetry import log
from shared.telemetry.tally import field
from worker.memory.ledger import Pool
from worker.memory.nvml import Reading
from worker.runner.failure import shortage

if TYPE_CHECKING:
    from worker.agent import Agent
    from worker.instance import Resident

LEAVE_S = 60.0  # what is evicted is reaped by then, or its room is not counted on
AGREE_S = 5.0  # a driver takes up to 1.5 s after the end of a process (Ollama's server/sched.go)
LOOK_S = 0.05
HANG_S = 3.0  # a driver answers within milliseconds, or not at all
TOO_LITTLE = "there is not enough memory"
AMPLE = 2  # where there is room for so many times the estimate, it need not be exact

_log = log.get("worker")


class Placer:
    """Reserves what loads take, one after the other, and gives it back."""

    def __init__(self, agent: Agent) -> None:
        self.agent = agent
        self.pool = Pool(agent.settings.kept_free)
        self.pool.update(agent.devices.read())
        self._hangs: asyncio.Future[list[Reading]] | None = None  # a question that the driver does not answer
        self.placing = asyncio.Lock()  # held while a load is placed
        self._turns: dict[str, asyncio.Lock] = {}
        at_once = agent.settings.loads_at_once
        self._at_once = asyncio.Semaphore(at_once) if at_once else None

    async def look(self) -> None:
        """Read the devices anew.  While the driver hangs, nothing of a GPU counts as free."""
        if not self.agent.devices.gpus:  # the kernel answers at once
            self.pool.update(self.agent.devices.read())
            return
        readings = [structs.replace(one, free_bytes=0) if one.is_gpu else one for one in self.pool.readings]
        if self._hangs is None or self._hangs.done():
            self._hangs, reading = None, asyncio.ensure_future(asyncio.to_thread(self.agent.devices.read))
            try:
                async with asyncio.timeout(HANG_S):
                    readings = await asyncio.shield(reading)
            except TimeoutError:
                self._hangs = reading  # until it is back, no thread more
                _log.error("the driver hangs", action="driver_hangs", since_s=HANG_S)
        self.pool.update(readings)

    @asynccontextmanager
    async def turn(self, devices: Sequence[str], stop: asyncio.Event) -> AsyncIterator[bool]:
        """Wait for one's turn: one load at once on each device, since two would slow each other, or as many in all as
        the setting says.  Yields whether it came before `stop` was set."""
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
        """Reserve room for a load, one at a time; None where there is none.  What has to be unloaded for it is, and is
        gone then.

        What comes back after a restart takes nobody's place.
        """
        await self.look()
        needed = needs_of(model, plan(instance.request, model, self.agent.settings))
        wish = Wish.of(instance.request.gpu)
        snapshot = self.agent.snapshot()
        if instance.restoring:
            snapshot = structs.replace(snapshot, held=[])
        placed = place(needed, wish, snapshot, instance.key)
        if placed is not None and placed.evicts:
            await self._evict(placed.evicts, instance)
            await self.look()
            evicted = placed.evicts
            placed = place(needed, wish, structs.replace(self.agent.snapshot(), held=[]))
            placed = None if placed is None else structs.replace(placed, evicts=evicted)
        if placed is not None:
            self.pool.reserve(instance.id, placed.taken)
        return placed

    async def _evict(self, victims: Sequence[Holding], instance: Instance) -> None:
        names = {held.instance_id for held in victims}
        leaving = [one for one in self.agent.held.values() if one.instance and one.instance.instance_id in names]
        for resident in leaving:
            assert resident.instance is not None
            with log.about(resident.instance):
                _log.info("evicted", action="evicted", to_make_room_for=instance.id)
            resident.stop.set()
        self.agent.tally.add({field("evictions"): len(leaving)})
        with suppress(TimeoutError):
            async with asyncio.timeout(LEAVE_S):
                for resident in leaving:
                    await resident.freed.wait()

    def is_unsure(self, placed: Placement) -> bool:
        """Whether the engine is to be asked what a placed load would take, before anything is read.

        On the CPU only where it matters: asking costs a large vocabulary's time, and most hosts have room.
        """
        if placed.exact:
            return False
        free = {device.id: device.available_bytes for device in self.pool.devices()}
        return bool(placed.gpus) or free[CPU] < (AMPLE - 1) * placed.bytes[CPU]

    def corrected(
        self, instance: Instance, model: Model, placed: Placement, taken: Sequence[Taken]
    ) -> Placement | None:
        """The placement, with what the engine said that it takes reserved; another one where that has no room there;
        None where there is none."""
        if not self.pool.change(instance.id, taken):
            return structs.replace(placed, taken=[*taken], exact=True)
        needed = needs_of(model, plan(instance.request, model, self.agent.settings))
        more = {one.id: one.total_bytes - placed.bytes.get(one.id, 0) for one in taken}
        pid = self.pool.reservations[instance.id].pid
        self.pool.release(instance.id)
        snapshot = self.agent.snapshot()
        devices = [
            structs.replace(device, available_bytes=device.available_bytes - max(0, more.get(device.id, 0)))
            for device in snapshot.devices
        ]
        other = place(needed, Wish.of(instance.request.gpu), structs.replace(snapshot, devices=devices, held=[]))
        if other is not None:
            other = structs.replace(other, evicts=placed.evicts)
            self.pool.reserve(instance.id, other.taken)
            if pid is not None:
                self.pool.started(instance.id, pid)
        return other

    # ---- giving back

    async def give_back(self, resident: Resident) -> None:
        """The runner is reaped: count its memory as free as soon as the GPUs agree, or AGREE_S later; what is still
        used then is seen as leaked.  Then let the pool know, before anybody is told that it is gone."""
        id_ = resident.id
        if id_ in self.pool.reservations:
            self.pool.leaving(id_)
            clock = asyncio.get_running_loop().time
            deadline = clock() + AGREE_S
            await self.look()
            while not self.pool.is_back(id_) and clock() < deadline:
                await asyncio.sleep(LOOK_S)
                await self.look()
            if not self.pool.is_back(id_):
                _log.error("memory is not back", action="memory_not_back", within_s=AGREE_S)
            self.pool.release(id_)
            self.pool.update(self.pool.readings)
        resident.freed.set()
        await self.agent.announce()

    # ---- telling

    def held(self) -> list[Holding]:
        """What the instances take that are here, or on their way."""
        return [
            Holding(
                instance_id="" if resident.instance is None else resident.instance.instance_id,
                key=resident.key,
                devices=reservation.bytes,
                used_at=self._used_at(resident),
                is_evictable=self._is_evictable(resident),
            )
            for id_, reservation in self.pool.reservations.items()
            if (resident := self.agent.held.get(id_)) is not None
        ]

    def _used_at(self, resident: Resident) -> float:
        found = resident.instance
        return 0.0 if found is None or found.state is not State.LOADED else found.used_at or 0.0

    def _is_evictable(self, resident: Resident) -> bool:
        found, may_be = resident.instance, self.agent.settings.evict
        if found is None or found.state is not State.LOADED or resident.stop.is_set() or may_be == "off":
            return False
        return may_be == "any" or found.request.ttl_seconds is not UNSET

    def devices(self) -> list[Device]:
        return self.pool.devices()

    def refusal(
        self, instance: Instance, model: Model | None, reason: str = "", needed: int | None = None
    ) -> ErrorBody:
        """What is said of a load that there is no room for: for `reason`, or by the estimate; of the devices that it
        could have gone to.  `needed` bytes were not to be had.

        The largest context length that would fit is left out where the formula is unsure, and where it would be the
        length that did not fit.
        """
        devices, holders = self.agent.memory()
        wish = Wish.of(instance.request.gpu)
        if wish.offload and wish.devices != [CPU] and has_gpu(devices):
            devices = [device for device in devices if device.kind == "gpu"]
        if wish.devices:
            devices = [device for device in devices if device.id in wish.devices] or devices
        would_fit: dict[str, object] = {}
        if model is not None:
            asked = plan(instance.request, model, self.agent.settings)
            needs = needs_of(model, asked)
            if needed is None:
                n = wish.n_layers(needs) if has_gpu(devices) else 0
                needed = needs.single(needs.n_layers - n) if n else needs.on_cpu().total_bytes
            if needs.exact:
                snapshot = self.agent.snapshot()
                largest = largest_context_length(
                    instance.request, model, self.agent.settings, lambda one: place(one, wish, snapshot) is not None
                )
                if largest is None or largest < asked.n_ctx:
                    would_fit = {"largest_context_length": largest}
        others = {id_: [name for name in names if name != instance.instance_id] for id_, names in holders.items()}
        by_others = {device.id: sum(self.pool.others(device.id).values()) for device in devices}
        words, detail = shortage(reason or TOO_LITTLE, needed or instance.total_size_bytes, devices, others, by_others)
        return LoadFailed("insufficient_memory", instance.type, instance.model, words, **detail | would_fit).body()

    def forget(self, resident: Resident) -> None:
        """It has ended; what it had reserved and no runner ever took is free."""
        self.pool.release(resident.id)
        resident.freed.set()


async def _acquired(lock: asyncio.Lock | asyncio.Semaphore, stop: asyncio.Event) -> bool:
    """Whether a lock could be had before `stop` was set."""
    acquiring, stopping = asyncio.ensure_future(lock.acquire()), asyncio.ensure_future(stop.wait())
    is_ours = False
    try:
        await asyncio.wait({acquiring, stopping}, return_when=asyncio.FIRST_COMPLETED)
        is_ours = acquiring.done() and not stop.is_set()
    finally:
        stopping.cancel()
        if not is_ours:
            acquiring.cancel()
            await asyncio.wait({acquiring})
            if not acquiring.cancelled():
                lock.release()
    return is_ours
