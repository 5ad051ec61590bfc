"""Reads NVIDIA GPUs through NVML, which creates no CUDA context and uses no GPU memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pynvml
from msgspec import Struct
from pynvml import NVMLError, NVMLError_NotSupported

from shared.telemetry import log

_log = log.get("worker")


class Reading(Struct, frozen=True, kw_only=True):
    """The state of a device at one moment."""

    id: str  # the UUID of a GPU
    is_gpu: bool = True
    name: str
    total_bytes: int
    free_bytes: int  # 0 while the driver reports an error
    users: dict[int, int] = {}  # bytes by pid, of the processes that the driver lists; in a container perhaps none


class Driver:
    """The GPUs of this host in NVML's order, without those in MIG mode."""

    def __init__(self) -> None:
        """List the GPUs; none if there is no driver."""
        self.by_index: list[str] = []  # UUIDs; "" for a GPU that cannot be used
        self._handles: dict[str, Any] = {}
        self._last: dict[str, Reading] = {}
        try:
            pynvml.nvmlInit()
        except NVMLError as e:
            _log.info("no NVIDIA driver", action="no_nvml", error=str(e))
            return
        for i in range(pynvml.nvmlDeviceGetCount()):
            self.by_index.append(self._open(i))

    def _open(self, index: int) -> str:
        """Open a GPU.  Returns its UUID, or "" if it cannot be used."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            id_, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            is_divided = _is_divided(handle)
        except NVMLError as e:  # it has fallen off the bus, or is not powered
            _log.error("GPU ignored: it does not respond", action="gpu_left_out", index=index, error=str(e))
            return ""
        if is_divided:
            _log.warning("GPU ignored: it is in MIG mode", action="gpu_left_out", device=id_)
            return ""
        self._handles[id_] = handle
        self._last[id_] = Reading(id=id_, name=name, total_bytes=0, free_bytes=0)
        return str(id_)

    def read(self, ids: Sequence[str]) -> list[Reading]:
        """Read the current state of these GPUs.  A GPU that the driver has lost has no free memory."""
        return [self._read(id_) for id_ in ids]

    def _read(self, id_: str) -> Reading:
        last, handle = self._last[id_], self._handles[id_]
        users: Counter[int] = Counter()
        try:
            memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
            for process in pynvml.nvmlDeviceGetComputeRunningProcesses(handle):
                users[process.pid] += process.usedGpuMemory or 0
        except NVMLError as e:
            if last.free_bytes or not last.total_bytes:
                _log.error("GPU does not respond", action="gpu_lost", device=id_, error=str(e))
            reading = Reading(id=id_, name=last.name, total_bytes=last.total_bytes, free_bytes=0)
        else:
            reading = Reading(
                id=id_, name=last.name, total_bytes=int(memory.total), free_bytes=int(memory.free), users=dict(users)
            )
        self._last[id_] = reading
        return reading


def _is_divided(handle: Any) -> bool:
    """Return whether a GPU is in MIG mode, in which CUDA sees its instances instead of the GPU."""
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except NVMLError_NotSupported:
        return False
