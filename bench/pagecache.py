"""Dropping a file from the page cache, and measuring how much of it is cached."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

_libc = ctypes.CDLL(None, use_errno=True)


def drop(path: Path) -> None:
    """Drop a file's pages.  The kernel keeps pages that are dirty, hence the fsync, or mapped by a process."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(fd)


def residency(path: Path) -> float:
    """Return the share of a file's pages that are in the page cache, 0..1.

    It uses mincore(2), which does not change the cache: a failing read with RWF_NOWAIT still fetches its page (seen
    with Linux 6.18).
    """
    size = path.stat().st_size
    pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
    with path.open("rb") as file, mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) as mapping:
        first = ctypes.c_char.from_buffer(mapping)  # private and writable, which from_buffer requires
        status = _libc.mincore(ctypes.c_void_p(ctypes.addressof(first)), ctypes.c_size_t(size), pages)
        del first  # a mapping with an exported pointer cannot be closed
        if status != 0:
            raise OSError(ctypes.get_errno(), "mincore failed")
    return sum(page & 1 for page in bytes(pages)) / len(pages)
