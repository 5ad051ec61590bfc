"""NVIDIA's GPUs as their driver knows them, through NVML: it makes no CUDA context and takes no memory of a GPU."""

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
    """A device at one moment, whoever uses it."""

    id: str  # of a GPU its UUID
    is_gpu: bool = True
    name: str
    total_bytes: int
    free_bytes: int  # 0 while the driver does not tell
    users: dict[int, int] = {}  # bytes by process, of those that the driver names; in a container it may name none


class Driver:
    """The GPUs of this host that CUDA can use as a whole, in NVML's order."""

    def __init__(self) -> None:
        """Without a driver there are none."""
        self.by_index: list[str] = []  # their UUIDs, "" for one that is left out
        self._handles: dict[str, Any] = {}
        self._last: dict[str, Reading] = {}
        try:
            pynvml.nvmlInit()
        except NVMLError as e:
            _log.info("no NVIDIA driver", action="no_nvml", error=str(e))
            return
        for i in range(pynvml.nvmlDeviceGetCount()):
            self.by_index.append(self._found(i))

    def _found(self, index: int) -> str:
        """The UUID of a GPU that can be used, else ""."""
        try:
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            id_, name = pynvml.nvmlDeviceGetUUID(handle), pynvml.nvmlDeviceGetName(handle)
            is_divided = _is_divided(handle)
        except NVMLError as e:  # it has fallen off the bus, or is not powered
            _log.error("a GPU that does not answer is left out", action="gpu_left_out", index=index, error=str(e))
            return ""
        if is_divided:
            _log.warning("a GPU in MIG mode is left out", action="gpu_left_out", device=id_)
            return ""
        self._handles[id_] = handle
        self._last[id_] = Reading(id=id_, name=name, total_bytes=0, free_bytes=0)
        return str(id_)

    def read(self, ids: Sequence[str]) -> list[Reading]:
        """These GPUs as they are now.  Of one that the driver has lost, nothing is free."""
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
                _log.error("a GPU does not answer", action="gpu_lost", device=id_, error=str(e))
            found = Reading(id=id_, name=last.name, total_bytes=last.total_bytes, free_bytes=0)
        else:
            found = Reading(
                id=id_, name=last.name, total_bytes=int(memory.total), free_bytes=int(memory.free), users=dict(users)
            )
        self._last[id_] = found
        return found


def _is_divided(handle: Any) -> bool:
    """Whether a GPU is in MIG mode, where CUDA sees its instances and not itself."""
    try:
        return bool(pynvml.nvmlDeviceGetMigMode(handle)[0])
    except NVMLError_NotSupported:
        return False
