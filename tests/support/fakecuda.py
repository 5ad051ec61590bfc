"""The part of CUDA's runtime with which a program page-locks memory, for the fake GPUs of this process.

A GPU copies from locked memory, from ordinary memory, and never from both at once: llama.cpp aborts if CUDA refuses a
copy, and so does `FakeCuda`.  What happens is written to `FakeHost.locking`, for tests that look from outside.
"""

from __future__ import annotations

import fcntl
import json
import os
from pathlib import Path
from typing import Any

from tests.support.fakehosts import FakeHost

SUCCESS, INVALID_VALUE, OUT_OF_MEMORY, ALREADY_REGISTERED, NOT_REGISTERED = 0, 1, 2, 712, 713
PORTABLE, READ_ONLY = 1, 8
READ_ONLY_SUPPORTED = 114


class FakeCuda:
    """CUDA's runtime as functions of ctypes would be, with the limits and faults of a host's driver."""

    def __init__(self, host: FakeHost) -> None:
        self._host = host
        self._locked: dict[int, int] = {}  # address -> size
        self._last_error = SUCCESS
        self._device = 0
        self._events = os.open(host.locking_path, os.O_WRONLY | os.O_APPEND)  # now: a sealed process opens nothing

    def install(self, library: Any) -> None:
        """Let the library of the engine have these functions, as if it was linked with CUDA's runtime."""
        names = "cudaSetDevice cudaDeviceGetAttribute cudaGetLastError cudaHostRegister cudaHostUnregister"
        for name in names.split():
            setattr(library, name, _Function(getattr(self, name)))

    def cudaSetDevice(self, ordinal: int) -> int:
        self._device = ordinal
        return SUCCESS

    def cudaDeviceGetAttribute(self, value: Any, attribute: int, _ordinal: int) -> int:
        value._obj.value = attribute == READ_ONLY_SUPPORTED and bool(self._host.of_driver("read_only"))
        return SUCCESS

    def cudaGetLastError(self) -> int:
        error, self._last_error = self._last_error, SUCCESS
        return error

    def cudaHostRegister(self, address: int, size: int, flags: int) -> int:
        self._wrote("registers", size)
        with self._host.holding_path.open() as held:
            fcntl.flock(held, fcntl.LOCK_SH)  # waits for a test that holds it
        limit = int(self._host.of_driver("lockable_bytes"))
        if any(start < address + size and address < start + n for start, n in self._locked.items()):
            return self._failed(ALREADY_REGISTERED)
        if flags != PORTABLE | READ_ONLY or not _is_mapped(address, size):
            return self._failed(INVALID_VALUE)
        if sum(self._locked.values()) + size > limit:
            return self._failed(OUT_OF_MEMORY)
        self._locked[address] = size
        self._wrote("registered", size, device=self._device)
        return SUCCESS

    def cudaHostUnregister(self, address: int) -> int:
        if address not in self._locked:
            return self._failed(NOT_REGISTERED)
        self._wrote("unregistered", self._locked.pop(address))
        return SUCCESS

    def copies(self, address: int, size: int) -> None:
        """Take note of a copy to a GPU; ends the process if CUDA refused it.  Called before the copy."""
        if self._last_error != SUCCESS:
            os.write(2, b"CUDA error: of an earlier call\n")
            os.abort()
        if not self._locked:
            return
        overlaps = [start for start, n in self._locked.items() if start < address + size and address < start + n]
        wholly = [start for start in overlaps if start <= address and address + size <= start + self._locked[start]]
        if overlaps and not wholly:
            os.write(2, b"CUDA error: invalid argument\n")
            os.abort()
        self._wrote("copied", size, is_locked=bool(wholly))

    def _failed(self, status: int) -> int:
        self._last_error = status
        return status

    def _wrote(self, event: str, n_bytes: int, **more: Any) -> None:
        os.write(self._events, json.dumps({"event": event, "n_bytes": n_bytes, **more}).encode() + b"\n")


class _Function:
    """A function whose types may be declared, which ctypes wants."""

    def __init__(self, call: Any) -> None:
        self._call = call

    def __call__(self, *arguments: Any) -> int:
        result: int = self._call(*arguments)
        return result


def _is_mapped(address: int, size: int) -> bool:
    """Return whether a range consists of pages of one mapping."""
    page = os.sysconf("SC_PAGE_SIZE")
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= address and address + size <= end:
            return address % page == size % page == 0
    return False
