"""Devices, and what loads take of them, in bytes."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

CPU = "CPU"  # the id of the host's memory as a device


class Usage(Struct, frozen=True, kw_only=True):
    """Bytes that a load takes of a device."""

    id: str
    weights_bytes: int = 0
    context_bytes: int = 0  # the KV cache
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.compute_bytes


class Device(Struct, frozen=True, kw_only=True, gc=False):
    """What models are loaded onto, as its worker knew it at its last beat."""

    id: str  # of a GPU its UUID, as NVML names it
    kind: Literal["gpu", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int  # nobody uses them
    reserved_bytes: int = 0  # what the instances take that are there, or on their way
    leaked_bytes: int = 0  # used, but neither by these instances nor by anybody whom the driver names
    available_bytes: int = 0  # what loads may be given now


class Holding(Struct, frozen=True, kw_only=True, gc=False):
    """What an instance takes of its worker's devices."""

    id: str = ""  # of its load, where an API keeps in mind what it has just placed
    instance_id: str
    key: str
    devices: dict[str, int]  # bytes by device
    used_at: float  # the last use, in seconds since the epoch; 0.0: it is not loaded yet
    is_evictable: bool  # it may be unloaded to make room
