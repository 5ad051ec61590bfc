"""CUDA without an engine: a process's context on one GPU, memory there, and how fast bytes get to it.

By the driver's interface, libcuda.so.1, and not by the runtime's: it is there wherever there is a driver, and has one
name whatever toolkit is installed.  A context of it is the one that the runtime would make (cuDevicePrimaryCtxRetain).
`cuMemAlloc` and others end in _v2, as cuda.h has them.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class CUDAError(Exception):
    """The driver refused; the text says what, and its own name for why."""


class GPU:
    """This process's context on a GPU; there until the process ends."""

    def __init__(self, id_: str) -> None:
        """`id_` is its UUID, as NVML has it.  Raises CUDAError.  Once per process, before any other use of CUDA."""
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
        """The address of so much memory of the GPU."""
        address = ctypes.c_uint64()  # CUdeviceptr
        self._do("cuMemAlloc_v2", ctypes.byref(address), ctypes.c_size_t(n_bytes))
        try:
            yield address.value
        finally:
            self._do("cuMemFree_v2", address)

    def hold(self, n_bytes: int) -> None:
        """Take so much of the GPU until the process ends."""
        self._do("cuMemAlloc_v2", ctypes.byref(ctypes.c_uint64()), ctypes.c_size_t(n_bytes))

    @contextmanager
    def pinned(self, n_bytes: int) -> Iterator[int]:
        """The address of so much memory of the host that is locked for the GPU, and written once."""
        address = ctypes.c_void_p()
        self._do("cuMemHostAlloc", ctypes.byref(address), ctypes.c_size_t(n_bytes), ctypes.c_uint(0))
        try:
            assert address.value
            ctypes.memset(address.value, 1, n_bytes)
            yield address.value
        finally:
            self._do("cuMemFreeHost", address)

    def copy_s(self, device: int, host: int, n_bytes: int) -> float:
        """The seconds that so many bytes take from the host to the GPU."""
        started = time.perf_counter()
        self._do("cuMemcpyHtoD_v2", ctypes.c_uint64(device), ctypes.c_void_p(host), ctypes.c_size_t(n_bytes))
        self._do("cuCtxSynchronize")  # from memory that is not pinned it may return before the end
        return time.perf_counter() - started

    def _do(self, name: str, *arguments: Any) -> None:
        status = getattr(self._lib, name)(*arguments)
        if status != 0:
            why = ctypes.c_char_p()
            self._lib.cuGetErrorName(ctypes.c_int(status), ctypes.byref(why))
            raise CUDAError(f"{name} failed: {why.value.decode() if why.value else status}")


@contextmanager
def pageable(n_bytes: int) -> Iterator[int]:
    """The address of so much ordinary memory, written once: before that, all pages are the same one of zeros."""
    with mmap.mmap(-1, n_bytes) as memory:
        first = ctypes.c_char.from_buffer(memory)
        ctypes.memset(ctypes.addressof(first), 1, n_bytes)
        try:
            yield ctypes.addressof(first)
        finally:
            del first  # the mapping cannot be closed while something points into it
