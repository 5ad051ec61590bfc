"""Devices and memory usage, in bytes."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

CPU = "CPU"  # the id of the host's memory as a device


class Usage(Struct, frozen=True, kw_only=True):
    """The memory that a load uses on one device."""

    id: str
    weights_bytes: int = 0
    context_bytes: int = 0  # the KV cache
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.compute_bytes


class Device(Struct, frozen=True, kw_only=True, gc=False):
    """A device that models are loaded onto, as its worker reported it at its last beat."""

    id: Annotated[
        str,
        Meta(description="Id of the device: of a GPU its UUID, as reported by NVML; `CPU` for the memory of the host."),
    ]
    kind: Annotated[Literal["gpu", "cpu"], Meta(description="Kind of the device.")]
    name: Annotated[str, Meta(description="Name of the device.")]
    total_bytes: Annotated[int, Meta(description="Memory of the device.")]
    free_bytes: Annotated[int, Meta(description="Memory that no process uses.")]
    reserved_bytes: Annotated[int, Meta(description="Memory of the instances that are loaded or loading.")] = 0
    leaked_bytes: Annotated[
        int,
        Meta(description="Memory that is used, but not by these instances or by any process that the driver lists."),
    ] = 0
    available_bytes: Annotated[int, Meta(description="Memory for loads now; may be negative.")] = 0


class Holding(Struct, frozen=True, kw_only=True, gc=False):
    """The memory that an instance uses on the devices of its worker, and the numbers of its requests."""

    id: str = ""  # of the load; set only for loads that an API process has just placed
    instance_id: str
    key: str
    devices: dict[str, int]  # bytes by device
    used_at: float  # last use, in seconds since the epoch; 0.0: not loaded yet
    is_evictable: bool  # may be unloaded to make room, unless it is busy; or is being unloaded
    is_busy: bool = False  # must not be evicted now: it answers requests, has just been loaded, or is being unloaded
    running: int = 0
    waiting: int = 0
    cells: int = 0  # of the KV cache, in use
    tokens_per_second: float = 0.0  # generated in the last seconds

    @property
    def is_victim(self) -> bool:
        """Whether it may be evicted now."""
        return self.is_evictable and not self.is_busy
