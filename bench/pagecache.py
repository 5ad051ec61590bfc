"""Taking a file out of the page cache, and seeing whether it left."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def drop(path: Path) -> None:
    """Ask the kernel to forget a file's pages.  It keeps those that are dirty, hence the fsync, or mapped somewhere."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def residency(path: Path) -> float:
    """The share of a file's pages that are in the page cache, 0..1.

    By mincore(2), which only looks: a read with RWF_NOWAIT that fails has its page fetched all the same (seen with
    Linux 6.18), and would warm a little of what it was to find cold.
    """
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        first = ctypes.c_char.from_buffer(mapping)  # private and writable, else it has no address for us
        status = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first  # the mapping cannot be closed while something points into it
        if status != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in bytes(pages)) / len(pages)
