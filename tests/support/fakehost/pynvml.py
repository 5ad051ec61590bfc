"""The functions of nvidia-ml-py that the worker uses, for a host of tests.support.fakehosts.

Names, results and errors are those of nvidia-ml-py: strings for UUIDs and names, bytes for memory.
"""

from __future__ import annotations

from types import SimpleNamespace

from tests.support.fakehosts import Device, FakeHost


class NVMLError(Exception):
    pass


class NVMLError_LibraryNotFound(NVMLError):
    pass


class NVMLError_DriverNotLoaded(NVMLError):
    pass


class NVMLError_NotSupported(NVMLError):
    pass


class NVMLError_GpuIsLost(NVMLError):
    pass


class NVMLError_Uninitialized(NVMLError):
    pass


class NVMLError_InvalidArgument(NVMLError):
    pass


class NVMLError_NotFound(NVMLError):
    pass


_inits = 0  # NVML counts them


def _host() -> FakeHost:
    host = FakeHost.here()
    if host is None:
        raise NVMLError_LibraryNotFound
    if not _inits:
        raise NVMLError_Uninitialized
    return host


def _raise_fault(host: FakeHost, of: str) -> None:
    if (fault := host.fault(of)) is not None:
        raise globals()[f"NVMLError_{fault}"]


def nvmlInit() -> None:
    global _inits
    host = FakeHost.here()
    if host is None:
        raise NVMLError_LibraryNotFound
    _raise_fault(host, "host")
    _inits += 1


def nvmlShutdown() -> None:
    global _inits
    _host()
    _inits -= 1


def nvmlDeviceGetCount() -> int:
    return len(_host().devices())


def nvmlDeviceGetHandleByIndex(index: int) -> Device:
    devices = _host().devices()
    if not 0 <= index < len(devices):
        raise NVMLError_InvalidArgument
    _raise_fault(_host(), devices[index].uuid)
    return devices[index]


def nvmlDeviceGetHandleByUUID(uuid: str) -> Device:
    for index, device in enumerate(_host().devices()):
        if device.uuid == uuid:
            return nvmlDeviceGetHandleByIndex(index)
    raise NVMLError_NotFound


def nvmlDeviceGetUUID(handle: Device) -> str:
    _raise_fault(_host(), handle.uuid)
    return handle.uuid


def nvmlDeviceGetName(handle: Device) -> str:
    _raise_fault(_host(), handle.uuid)
    return handle.name


def nvmlDeviceGetMemoryInfo(handle: Device) -> SimpleNamespace:
    host = _host()
    _raise_fault(host, handle.uuid)
    used_bytes = host.used_bytes(handle.uuid)
    return SimpleNamespace(total=handle.total_bytes, free=max(0, handle.total_bytes - used_bytes), used=used_bytes)


def nvmlDeviceGetComputeRunningProcesses(handle: Device) -> list[SimpleNamespace]:
    host = _host()
    _raise_fault(host, handle.uuid)
    return [SimpleNamespace(pid=holder.pid, usedGpuMemory=holder.n_bytes) for holder in host.holders(handle.uuid)]


def nvmlDeviceGetMigMode(handle: Device) -> list[int]:
    _raise_fault(_host(), handle.uuid)
    raise NVMLError_NotSupported


def nvmlDeviceGetMaxPcieLinkGeneration(handle: Device) -> int:
    raise NVMLError_NotSupported


def nvmlSystemGetCudaDriverVersion() -> int:
    return 13000


def nvmlSystemGetDriverVersion() -> str:
    return _host().version_path.read_text().split()[-2]
