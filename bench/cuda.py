"""CUDA without an engine: a process's context on one GPU, memory on it, and the speed of copies to it.

`python -m bench.cuda GPU` measures the speed from each kind of memory, and writes `Rates` as JSON.

It uses the driver API (libcuda.so.1), not the runtime: every driver provides it under this name, independent of an
installed toolkit.  Its context is the one that the runtime would create (cuDevicePrimaryCtxRetain).  Some functions,
such as `cuMemAlloc`, end in _v2, as in cuda.h.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import msgspec
from msgspec import Struct

COPIED_BYTES, COPIES = 1 << 30, 5


class CUDAError(Exception):
    """A call to the driver failed; the message has the function and the driver's name of the error."""


class GPU:
    """This process's context on a GPU; it exists until the process ends."""

    def __init__(self, id_: str) -> None:
        """`id_` is NVML's UUID.  Create it once per process, before any other use of CUDA.  Raises CUDAError."""
        os.environ["CUDA_VISIBLE_DEVICES"] = id_
        try:
            self._lib: Any = ctypes.CDLL("libcuda.so.1")
        except OSError as e:
            raise CUDAError(f"no NVIDIA driver: {e}") from None
        device, context = ctypes.c_int(), ctypes.c_void_p()
        self._do("cuInit", ctypes.c_uint(0))
        self._do("cuDeviceGet", ctypes.byref(device), ctypes.c_int(0))
        self._do("cuDevicePrimaryCtxRetain", ctypes.byref(context), device)
        self._do("cuCtxSetCurrent", context)

    @contextmanager
    def allocated(self, n_bytes: int) -> Iterator[int]:
        """Allocate memory of the GPU; yield its address."""
        address = ctypes.c_uint64()  # CUdeviceptr
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        try:
            yield address.value
        finally:
            self._do("cuMemFree_v2", address)

    def hold(self, n_bytes: int) -> None:
        """Allocate memory of the GPU until the process ends."""
        self._do("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(n_bytes))

    @contextmanager
    def pinned(self, n_bytes: int) -> Iterator[int]:
        """Allocate pinned memory of the host and write it once; yield its address."""
        address = ctypes.c_void_p()
        self._do("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(n_bytes), ctypes.c_uint(0))
        try:
            assert address.value
            ctypes.memset(address.value, 1, n_bytes)
            yield address.value
        finally:
            self._do("cuMemFreeHost", address)

    def copy_s(self, device: int, host: int, n_bytes: int) -> float:
        """Copy bytes from the host to the GPU; return the seconds."""
        started = time.perf_counter()
        self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(device), ctypes.c_void_p(host), ctypes.c_size_t(n_bytes))
        self._do("cuCtxSynchronize")  # a copy from unpinned memory may return before its end
        return time.perf_counter() - started

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            why = ctypes.c_char_p()
            self._lib.cuGetErrorName(ctypes.c_int(status), ctypes.byref(why))
            raise CUDAError(f"{name} failed: {why.value.decode() if why.value else status}")


@contextmanager
def pageable(n_bytes: int) -> Iterator[int]:
    """Allocate ordinary memory and write it once; yield its address.  Unwritten pages would share one page of zeros."""
    with mmap.mmap(-1, n_bytes) as memory:
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, n_bytes)
        try:
            yield ctypes.addressof(first)
        finally:
            del first  # a mapping with an exported pointer cannot be closed


class Rates(Struct, frozen=True, kw_only=True):
    """Bytes per second of single copies to the GPU, from ordinary and from locked memory."""

    pageable: list[float]
    pinned: list[float]


def rates(gpu: GPU) -> Rates:
    """Measure.  Raises CUDAError."""
    with gpu.allocated(COPIED_BYTES) as device:
        measured = []
        for memory in (pageable, gpu.pinned):
            with memory(COPIED_BYTES) as host:
                gpu.copy_s(device, host, COPIED_BYTES)  # the first copy wakes the GPU
                measured.append([COPIED_BYTES / gpu.copy_s(device, host, COPIED_BYTES) for _ in range(COPIES)])
    return Rates(pageable=measured[0], pinned=measured[1])


if __name__ == "__main__":
    try:
        print(msgspec.json.encode(rates(GPU(sys.argv[1]))).decode())
    except CUDAError as e:
        sys.exit(str(e))
