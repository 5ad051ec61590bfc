"""Page-locks llama.cpp's mapping of a model while it is copied to GPUs.

A GPU copies ordinary memory through a buffer of its driver, and page-locked memory directly: several times as fast.
llama.cpp copies tensor by tensor from its mapping, which `PageLock` finds in /proc/self/maps and registers with CUDA.

A file is registered as a whole.  CUDA refuses a copy that lies only partly in registered memory, or in two registered
ranges (cuMemcpyHtoD), and llama.cpp then aborts; registered ranges are whole pages, and tensors begin anywhere in one.
"""

from __future__ import annotations

import ctypes
import os
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from worker.memory.host import lockable_bytes
from worker.runner.protocol import Load

LEAST_BYTES = 64 << 20  # of a smaller model, ordinary copies take some 12 ms at most
PORTABLE, READ_ONLY = 1, 8  # cudaHostRegisterPortable: for all GPUs; cudaHostRegisterReadOnly: as the mapping is
READ_ONLY_SUPPORTED = 114  # cudaDevAttrHostRegisterReadOnlySupported
FUNCTIONS = {  # of CUDA's runtime, which returns a status: 0 is success
    "cudaSetDevice": [ctypes.c_int],
    "cudaDeviceGetAttribute": [ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int],
    "cudaHostRegister": [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_uint],
    "cudaHostUnregister": [ctypes.c_void_p],
    "cudaGetLastError": [],
}
MAPS = Path("/proc/self/maps")
DRIVER = Path("/proc/driver/nvidia/version")  # of the kernel module, such as 580.159.04
LEAST_DRIVER = 570  # older ones mark unlocked pages as changed, and the kernel writes the whole file back to its disk


def refusal(library: Any, load: Load, ordinals: Sequence[int]) -> str | None:
    """Return why the weights of a load for GPUs are not copied from page-locked memory; None if they are.

    `library`: the engine's, whose dependencies include CUDA's runtime.  `ordinals`: CUDA's numbers of the GPUs.
    """
    if not load.can_map:
        return "its tensors are not aligned for a mapping"
    if not load.is_whole:
        return "layers stay on the CPU, in page-locked memory of the engine"
    if load.total_bytes < LEAST_BYTES:
        return "the model is small"
    if not all(hasattr(library, name) for name in FUNCTIONS):
        return "the engine has no CUDA runtime"
    if (driver := driver_version()) is None or driver < LEAST_DRIVER:
        return f"the driver is {'unknown' if driver is None else driver}, not {LEAST_DRIVER} or later"
    _declare(library)
    for ordinal in ordinals:
        supported = ctypes.c_int()
        if library.cudaDeviceGetAttribute(ctypes.byref(supported), READ_ONLY_SUPPORTED, ordinal) or not supported.value:
            library.cudaGetLastError()
            return "a GPU does not support it for memory that is read-only"
    if load.total_bytes > (free_bytes := lockable_bytes()):
        return f"the model has {load.total_bytes} bytes, and only {free_bytes} could be locked"
    return None


class PageLock:
    """The page-locked mappings of a load.  Not thread-safe."""

    def __init__(self, library: Any, ordinal: int, shards: Sequence[str], note: Callable[[str], None]) -> None:
        """`ordinal`: CUDA's number of a GPU of the load.  `note` writes a line to the engine's log."""
        self._cuda, self._ordinal, self._shards, self._note = library, ordinal, shards, note
        self._locked: list[int] = []  # addresses

    def lock(self, sizes: Sequence[int]) -> None:
        """Lock the files, of these sizes, that llama.cpp has mapped.

        A file that is not locked is copied all the same, only slower.  A failed call leaves a status that
        llama.cpp would take for one of its own, unless it is read here.
        """
        if sum(sizes) > (free_bytes := lockable_bytes()):  # other loads lock files, too
            self._note(f"page_lock: not locked, and copied more slowly: only {free_bytes} bytes could be locked")
            return
        started, n_bytes = time.monotonic(), 0
        self._cuda.cudaSetDevice(self._ordinal)  # otherwise the call creates a context on the first visible GPU
        for shard, (address, size) in zip(self._shards, mappings(self._shards, sizes), strict=True):
            if not size:
                self._note(f"page_lock: no mapping of {Path(shard).name}")
                continue
            status = self._cuda.cudaHostRegister(address, size, PORTABLE | READ_ONLY)
            if status != 0:
                self._cuda.cudaGetLastError()
                self._note(f"page_lock: not locked, and copied more slowly: cudaHostRegister returned {status}")
                break
            self._locked.append(address)
            n_bytes += size
        self._note(f"page_lock: {n_bytes} bytes locked in {time.monotonic() - started:.3f} s")

    def unlock(self) -> None:
        """Unlock what is locked.  Also right after llama.cpp has unmapped it: the pages are locked, not the mapping."""
        if not self._locked:
            return
        started = time.monotonic()
        while self._locked:
            status = self._cuda.cudaHostUnregister(self._locked.pop())
            if status != 0:
                self._cuda.cudaGetLastError()
                self._note(f"page_lock: cudaHostUnregister returned {status}")
        self._note(f"page_lock: unlocked in {time.monotonic() - started:.3f} s")


def mappings(paths: Sequence[str], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Return address and size, in whole pages, of this process's mapping of each whole file; a size of 0 if there is
    none."""
    found: dict[str, tuple[int, int]] = {}
    with MAPS.open(encoding="utf-8", errors="surrogateescape") as lines:
        for line in lines:
            place, _, offset, _, _, *rest = line.rstrip("\n").split(maxsplit=5)
            if rest and int(offset, 16) == 0:
                start, end = (int(bound, 16) for bound in place.split("-"))
                found[rest[0]] = start, end - start
    result = []
    page = os.sysconf("SC_PAGE_SIZE")
    for path, n_bytes in zip(paths, sizes, strict=True):
        address, size = found.get(os.path.realpath(path).replace("\n", "\\012"), (0, 0))
        result.append((address, size) if size == -(-n_bytes // page) * page else (0, 0))
    return result


def driver_version() -> int | None:
    """Return the branch of NVIDIA's kernel module, such as 580; None if there is none."""
    try:
        match = re.search(r"\s(\d{3,})\.\d+", DRIVER.read_text())
    except OSError:
        return None
    return int(match[1]) if match else None


def _declare(library: Any) -> None:
    for name, arguments in FUNCTIONS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = arguments, ctypes.c_int
