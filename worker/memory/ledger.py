"""The ledger of a worker's devices, in bytes: reserved, used by others, leaked, available.

A reservation is made before a load begins, and released once its runner is reaped and the driver reports the memory as
free.  The readings of the devices take precedence over the ledger: used memory that no reservation explains is never
available.  It has three parts: the usage of other processes that the driver lists, the overhead that was there when the
worker started (the driver's own), and the rest, which counts as leaked.  The host's memory has no leaks: its usage
changes all the time.

During a load, the driver reports how much of the reservation is in use already, if it lists our processes by the pids
that we know.  If it does not (in a container), and for the host's memory, the leak is assumed unchanged, or larger if
even all reservations together do not explain the usage.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from msgspec import Struct

from shared.schema.memory import CPU, Device, Usage
from worker.memory.nvml import Reading

TOLERANCE_BYTES = 64 << 20  # a driver rounds, and frees the memory of a process in steps


class Reservation(Struct, kw_only=True):
    """The reservation of one instance, in bytes by device."""

    bytes: dict[str, int]
    shown: dict[str, int]  # the part that a reading counts as used: on the CPU without the weights (page cache)
    pid: int | None = None  # of its runner
    is_settled: bool = False  # the model is loaded: all of it is in use
    is_leaving: bool = False  # the runner is reaped: the driver may still report a part as used


class Ledger:
    """Not thread-safe.  No method blocks or awaits."""

    def __init__(self, kept_free: Callable[[int], int]) -> None:
        """`kept_free` returns, for a device's total, the bytes that are never reserved."""
        self.reservations: dict[str, Reservation] = {}  # by instance
        self.readings: list[Reading] = []
        self._kept_free = kept_free
        self._at_start: dict[str, int] = {}  # the driver's overhead
        self._leaked: dict[str, int] = {}
        self._reaped: set[int] = set()  # pids of reaped runners that the driver still lists
        self._others_before: dict[str, int] = {}  # `_others_bytes` before the current loads
        self._knows_pids: bool | None = None  # the driver lists our processes by the pids that we know; None: not known

    # ---- readings

    def update(self, readings: Sequence[Reading]) -> None:
        """Take new readings of all devices, and recompute overhead and leaks."""
        self.readings = [*readings]
        self._reaped &= {pid for reading in readings for pid in reading.users}
        self._detect_pids()
        for reading in readings:
            used = reading.total_bytes - reading.free_bytes
            ours = [held for held in self.reservations.values() if reading.id in held.bytes]
            for held in ours:
                if held.pid is not None:  # a process may use more than its model
                    actual = reading.users.get(held.pid, 0)
                    held.bytes[reading.id] = max(held.bytes[reading.id], actual)
                    held.shown[reading.id] = max(held.shown[reading.id], actual)
            shown = sum(self._used(held, reading) for held in ours)
            unexplained = max(0, used - shown - self._others_bytes(reading))
            at_start = self._at_start.setdefault(reading.id, unexplained if reading.is_gpu else 0)
            leaked = max(0, unexplained - at_start)
            if all(held.is_settled for held in ours):
                self._others_before[reading.id] = self._others_bytes(reading)
                self._at_start[reading.id], self._leaked[reading.id] = min(at_start, unexplained), leaked
            elif self._knows_pids and reading.is_gpu and not any(held.is_leaving for held in ours):
                self._leaked[reading.id] = leaked
            else:
                self._leaked[reading.id] = max(self._leaked.get(reading.id, 0), leaked)

    def _detect_pids(self) -> None:
        for reading in self.readings:
            ours = [held for held in self.reservations.values() if reading.is_gpu and held.bytes.get(reading.id)]
            if any(reading.users.get(held.pid or 0) for held in ours):
                self._knows_pids = True
            elif self._knows_pids is None and any(held.is_settled for held in ours):
                self._knows_pids = False

    def devices(self) -> list[Device]:
        """Return the devices as of the last `update`."""
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
        """Return the bytes of other processes by pid, as far as the driver lists them."""
        return next((self._others(reading) for reading in self.readings if reading.id == device), {})

    # ---- reservations

    def reserve(self, instance: str, usage: Iterable[Usage]) -> None:
        """Reserve memory for an instance, without a check.

        The caller has placed it by `devices()` with `shared.memory.placement`, and has not awaited since.
        """
        usage = [*usage]
        self.reservations[instance] = Reservation(
            bytes={device.id: device.total_bytes for device in usage}, shown=_shown(usage)
        )

    def change(self, instance: str, usage: Iterable[Usage]) -> dict[str, int]:
        """Replace a reservation.  Returns the missing bytes by device; if there are any, changes nothing."""
        before, usage = self.reservations[instance], [*usage]
        room = {reading.id: self._available(reading) + before.bytes.get(reading.id, 0) for reading in self.readings}
        missing = {device.id: device.total_bytes - room[device.id] for device in usage if device.id in room}
        missing = {id_: n_bytes for id_, n_bytes in missing.items() if n_bytes > 0}
        if not missing:
            self.reserve(instance, [device for device in usage if device.id in room])
            self.reservations[instance].pid = before.pid
        return missing

    def started(self, instance: str, pid: int) -> None:
        """Attribute the usage of a runner to a reservation."""
        self.reservations[instance].pid = pid

    def settle(self, instance: str, usage: Sequence[Usage]) -> None:
        """Mark an instance as loaded, with the usage that the engine reports; an empty one keeps the estimate."""
        held = self.reservations[instance]
        owned = [device for device in usage if any(device.id == reading.id for reading in self.readings)]
        held.bytes |= {device.id: device.total_bytes for device in owned}
        held.shown |= _shown(owned)
        held.is_settled = True

    def leaving(self, instance: str) -> None:
        """Mark a reservation as being released: its runner is reaped, but the driver may still report its memory."""
        self.reservations[instance].is_settled = False
        self.reservations[instance].is_leaving = True

    def is_back(self, instance: str) -> bool:
        """Return whether all GPUs report the memory of a reaped runner as free.

        The driver must not list its process, and everything else must explain the usage, within TOLERANCE_BYTES.
        """
        reaped = self.reservations[instance]
        for reading in self.readings:
            if not reading.is_gpu or reading.id not in reaped.bytes:
                continue
            if reaped.pid in reading.users:
                return False
            others = sum(self._used(held, reading) for id_, held in self.reservations.items() if id_ != instance)
            explained = others + self._others_bytes(reading) + self._at_start[reading.id] + self._leaked[reading.id]
            if reading.total_bytes - reading.free_bytes > explained + TOLERANCE_BYTES:
                return False
        return True

    def release(self, instance: str) -> None:
        """Drop a reservation, if there is one."""
        released = self.reservations.pop(instance, None)
        if released is not None and released.pid is not None:
            self._reaped.add(released.pid)

    # ---- sums

    def _reserved(self, device: str) -> int:
        return sum(held.bytes.get(device, 0) for held in self.reservations.values())

    def _used(self, held: Reservation, reading: Reading) -> int:
        """Return the bytes of a device's usage that a reservation explains."""
        is_loading = not held.is_settled and not held.is_leaving
        if self._knows_pids is True and reading.is_gpu and is_loading:
            return reading.users.get(held.pid or 0, 0)
        return held.shown.get(reading.id, 0)

    def _others(self, reading: Reading) -> dict[int, int]:
        ours = {held.pid for held in self.reservations.values()} | self._reaped
        return {pid: n_bytes for pid, n_bytes in reading.users.items() if pid not in ours}

    def _others_bytes(self, reading: Reading) -> int:
        """Return the bytes that the driver attributes to other processes.

        In a container the driver may list our processes by pids that we do not know.  The result is therefore at most
        the usage that our loaded models leave.  During a load it is the value from before, or more if even all
        reservations together do not explain it.
        """
        others = sum(self._others(reading).values())
        here = [held for held in self.reservations.values() if reading.id in held.bytes]
        settled = sum(held.shown[reading.id] for held in here if held.is_settled)
        unsettled = sum(held.shown[reading.id] for held in here if not held.is_settled)
        others = max(0, min(others, reading.total_bytes - reading.free_bytes - settled))
        if self._knows_pids is not False or not unsettled:
            return others
        return min(others, max(self._others_before.get(reading.id, 0), others - unsettled))

    def _available(self, reading: Reading) -> int:
        other_usage = self._others_bytes(reading) + self._at_start[reading.id] + self._leaked[reading.id]
        return reading.total_bytes - self._reserved(reading.id) - other_usage - self._kept_free(reading.total_bytes)


def _shown(usage: Sequence[Usage]) -> dict[str, int]:
    """Return the bytes by device that a reading counts as used.

    If the CPU has the whole model, its weights are a mapping of the file in the page cache, which counts as free.
    """
    is_mapped = all(device.id == CPU for device in usage)
    return {device.id: device.context_bytes if is_mapped else device.total_bytes for device in usage}
