"""The functions of the C library that Python does not offer, or not as they are needed here.

Each function names its man page, which gives the types.  glibc has all of them; musl lacks mallopt and malloc_trim.
ctypes releases the interpreter's lock during a call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from ctypes import c_int, c_long, c_size_t, c_ulong, c_void_p
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
MADV_POPULATE_READ = 22  # asm-generic/mman-common.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MAP_FAILED = c_void_p(-1).value

_library = ctypes.CDLL(None, use_errno=True)


def _declared(name: str, result: Any, *arguments: Any) -> Any:
    """A function of the library with its types; one that fails with ENOSYS when the library lacks it."""
    function = getattr(_library, name, None)
    if function is None:
        return _missing
    function.restype, function.argtypes = result, arguments
    return function


def _missing(*_: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


_prctl = _declared("prctl", c_int, c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_mmap = _declared("mmap", c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_long)
_munmap = _declared("munmap", c_int, c_void_p, c_size_t)
_madvise = _declared("madvise", c_int, c_void_p, c_size_t, c_int)
_malloc = _declared("malloc", c_void_p, c_size_t)
_free = _declared("free", None, c_void_p)
_mallopt = _declared("mallopt", c_int, c_int, c_int)
_malloc_trim = _declared("malloc_trim", c_int, c_size_t)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process or thread: prctl(2).  Raises OSError."""
    _check(_prctl(option, value, 0, 0, 0))


def map_file(fd: int, size: int) -> int:
    """Map the first `size` bytes of a file, to be read and shared; returns the address.  mmap(2).  Raises OSError."""
    address = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == MAP_FAILED:
        raise _error()
    return int(address)


def unmap(address: int, size: int) -> None:
    """Remove a mapping: munmap(2).  Raises OSError."""
    _check(_munmap(address, size))


def populate(address: int, size: int) -> None:
    """Read a part of a mapping into memory and return when it is there: madvise(2), MADV_POPULATE_READ.

    `address` is that of a page.  Raises OSError: EINVAL on a kernel before 5.14, EFAULT where a read would be a SIGBUS.
    """
    _check(_madvise(address, size, MADV_POPULATE_READ))


def keep_heap(most_bytes: int) -> bool:
    """Serve blocks of less than `most_bytes` from the heap, and keep as much of it when it is freed: mallopt(3).

    By default a block of 128 KiB and more is a mapping of its own, with new pages each time.  False without glibc.
    """
    return all(_mallopt(option, most_bytes) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def touch_heap(n_bytes: int) -> None:
    """Have the kernel give the heap `n_bytes` of pages now: malloc(3), written to and freed."""
    if block := _malloc(n_bytes):
        ctypes.memset(block, 0, n_bytes)
        _free(block)


def trim_heap() -> None:
    """Return what malloc holds free to the kernel: malloc_trim(3).  Nothing happens without glibc."""
    _malloc_trim(0)


def _check(status: int) -> None:
    if status != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
