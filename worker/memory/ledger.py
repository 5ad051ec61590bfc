"""The ledger of a worker's devices, in bytes: what is reserved, what others use, and what may be given.

A reservation is made before anything is read, and given back when its runner is reaped and the driver agrees.  What
the devices themselves say is believed over it: what is used and is not of a reservation is not given away, whoever has
it.  Some of that is named by the driver (other processes), some was there when the worker started (the driver's own
needs), and the rest is leaked.  What is used of the host's memory changes all the time, and is nobody's leak.

While a load is on its way, the driver tells how much of its reservation is used already, once it was seen that it
names our processes.  Where it does not (in a container, or of the host's memory), what is leaked is taken to be what it
was before, or more where even all reservations do not explain what is used.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from shared.schema.memory import CPU, Device, Usage
from worker.memory.nvml import Reading

TOLERANCE_BYTES = 64 << 20  # a driver's numbers are rounded, and those of a process that ends not all at once


class Reservation(Struct, kw_only=True):
    """What one instance takes, in bytes by device."""

    bytes: dict[str, int]
    shown: dict[str, int]  # the part of it that a reading counts as used: of the CPU not the weights, which are cached
    pid: int | None = None  # of its runner
    is_settled: bool = False  # all of it is in use
    is_leaving: bool = False  # some of it may be in use yet


class Ledger:
    """Not for several threads; no method waits."""

    def __init__(self, kept_free: Callable[[int], int]) -> None:
        """`kept_free` says of a device's total how much of it is never given."""
        self.reservations: dict[str, Reservation] = {}  # by instance
        self.readings: list[Reading] = []
        self._kept_free = kept_free
        self._at_start: dict[str, int] = {}  # used by nobody whom the driver names
        self._leaked: dict[str, int] = {}
        self._dead: set[int] = set()  # processes of ours that a driver still names although they are reaped
        self._named_before: dict[str, int] = {}  # by `_named`, when nothing was on its way
        self._names_ours: bool | None = None  # by the numbers that we know; None: nothing of ours was seen yet

    # ---- what the devices say

    def update(self, readings: Sequence[Reading]) -> None:
        self.readings = [*readings]
        self._dead &= {pid for reading in readings for pid in reading.users}
        self._learn_names()
        for reading in readings:
            used = reading.total_bytes - reading.free_bytes
            ours = [held for held in self.reservations.values() if reading.id in held.bytes]
            for held in ours:
                if held.pid is not None:  # what its process has there may be more than its model
                    actual = reading.users.get(held.pid, 0)
                    held.bytes[reading.id] = max(held.bytes[reading.id], actual)
                    held.shown[reading.id] = max(held.shown[reading.id], actual)
            shown = sum(self._used(held, reading) for held in ours)
            unexplained = max(0, used - shown - self._named(reading))
            at_start = self._at_start.setdefault(reading.id, unexplained if reading.is_gpu else 0)
            leaked = max(0, unexplained - at_start)
            if all(held.is_settled for held in ours):
                self._named_before[reading.id] = self._named(reading)
                self._at_start[reading.id], self._leaked[reading.id] = min(at_start, unexplained), leaked
            elif self._names_ours and reading.is_gpu and not any(held.is_leaving for held in ours):
                self._leaked[reading.id] = leaked
            else:
                self._leaked[reading.id] = max(self._leaked.get(reading.id, 0), leaked)

    def _learn_names(self) -> None:
        for reading in self.readings:
            ours = [held for held in self.reservations.values() if reading.is_gpu and held.bytes.get(reading.id)]
            if any(reading.users.get(held.pid or 0) for held in ours):
                self._names_ours = True
            elif self._names_ours is None and any(held.is_settled for held in ours):
                self._names_ours = False

    def devices(self) -> list[Device]:
        return [
            Device(
                id=reading.id,
                kind="gpu" if reading.is_gpu else "cpu",
                name=reading.name,
                total_bytes=reading.total_bytes,
                free_bytes=reading.free_bytes,
                reserved_bytes=self._reserved(reading.id),
                leaked_bytes=self._leaked[reading.id] if reading.is_gpu else 0,
                available_bytes=self._available(reading),
            )
            for reading in self.readings
        ]

    def others(self, device: str) -> dict[int, int]:
        """The bytes of processes that are not ours, where the driver names them."""
        return next((self._others(reading) for reading in self.readings if reading.id == device), {})

    # ---- what instances take

    def reserve(self, instance: str, taken: Iterable[Usage]) -> None:
        """Reserve what `shared.memory.placement` found room for in `devices()`, with nothing awaited in between."""
        taken = [*taken]
        self.reservations[instance] = Reservation(bytes={one.id: one.total_bytes for one in taken}, shown=_shown(taken))

    def change(self, instance: str, taken: Iterable[Usage]) -> dict[str, int]:
        """Reserve this instead, and return by how many bytes each device lacks room for it; where one does, nothing
        is changed."""
        before, taken = self.reservations[instance], [*taken]
        room = {reading.id: self._available(reading) + before.bytes.get(reading.id, 0) for reading in self.readings}
        lacking = {one.id: one.total_bytes - room[one.id] for one in taken if one.id in room}
        lacking = {id_: n_bytes for id_, n_bytes in lacking.items() if n_bytes > 0}
        if not lacking:
            self.reserve(instance, [one for one in taken if one.id in room])
            self.reservations[instance].pid = before.pid
        return lacking

    def started(self, instance: str, pid: int) -> None:
        self.reservations[instance].pid = pid

    def settle(self, instance: str, taken: Sequence[Usage]) -> None:
        """It is loaded, and the engine says what it took; nothing where it does not say."""
        held = self.reservations[instance]
        owned = [one for one in taken if any(one.id == reading.id for reading in self.readings)]
        held.bytes |= {one.id: one.total_bytes for one in owned}
        held.shown |= _shown(owned)
        held.is_settled = True

    def leaving(self, instance: str) -> None:
        """Its runner is about to give it back."""
        self.reservations[instance].is_settled = False
        self.reservations[instance].is_leaving = True

    def is_back(self, instance: str) -> bool:
        """Whether the GPUs say that what it took is free again: its process is not named any more, and no more is used
        than the others explain."""
        gone = self.reservations[instance]
        for reading in self.readings:
            if not reading.is_gpu or reading.id not in gone.bytes:
                continue
            if gone.pid in reading.users:
                return False
            others = sum(self._used(held, reading) for id_, held in self.reservations.items() if id_ != instance)
            explained = others + self._named(reading) + self._at_start[reading.id] + self._leaked[reading.id]
            if reading.total_bytes - reading.free_bytes > explained + TOLERANCE_BYTES:
                return False
        return True

    def release(self, instance: str) -> None:
        gone = self.reservations.pop(instance, None)
        if gone is not None and gone.pid is not None:
            self._dead.add(gone.pid)

    # ---- sums

    def _reserved(self, device: str) -> int:
        return sum(held.bytes.get(device, 0) for held in self.reservations.values())

    def _used(self, held: Reservation, reading: Reading) -> int:
        """How much of what is used of a device this may explain."""
        is_told = self._names_ours is True and reading.is_gpu and not held.is_settled and not held.is_leaving
        return reading.users.get(held.pid or 0, 0) if is_told else held.shown.get(reading.id, 0)

    def _others(self, reading: Reading) -> dict[int, int]:
        ours = {held.pid for held in self.reservations.values()} | self._dead
        return {pid: n_bytes for pid, n_bytes in reading.users.items() if pid not in ours}

    def _named(self, reading: Reading) -> int:
        """What the driver says that processes have which are not ours.

        In a container it may name ours by numbers that we do not know, so it is never more than what our models leave,
        and while a load is on its way what it was before, or more where all reservations do not explain it.
        """
        named = sum(self._others(reading).values())
        here = [held for held in self.reservations.values() if reading.id in held.bytes]
        settled = sum(held.shown[reading.id] for held in here if held.is_settled)
        moving = sum(held.shown[reading.id] for held in here if not held.is_settled)
        named = max(0, min(named, reading.total_bytes - reading.free_bytes - settled))
        if self._names_ours is not False or not moving:
            return named
        return min(named, max(self._named_before.get(reading.id, 0), named - moving))

    def _available(self, reading: Reading) -> int:
        others = self._named(reading) + self._at_start[reading.id] + self._leaked[reading.id]
        return reading.total_bytes - self._reserved(reading.id) - others - self._kept_free(reading.total_bytes)


def _shown(taken: Sequence[Usage]) -> dict[str, int]:
    """Where the CPU has all of a model, its weights are a mapping of the file, in the page cache, which counts as
    free."""
    is_mapped = all(one.id == CPU for one in taken)
    return {one.id: one.context_bytes if is_mapped else one.total_bytes for one in taken}
