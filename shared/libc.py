"""Functions of the C library that Python does not offer in the required form.

Each docstring names the man page, which gives the types.  glibc has all of them; musl lacks mallopt and malloc_trim.
ctypes releases the interpreter's lock during a call.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import c_int, c_int64, c_long, c_size_t, c_uint, c_ulong, c_void_p
from typing import Any

PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS = 1, 38  # linux/prctl.h
SYSCALL_ARGUMENTS = 6
SYNC_FILE_RANGE_WRITE = 2  # linux/fs.h
MADV_POPULATE_READ = 22  # asm-generic/mman-common.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
MAP_FAILED = c_void_p(-1).value

_library = ctypes.CDLL(None, use_errno=True)


def _declared(name: str, result: Any, *arguments: Any) -> Any:
    """Return a typed function of the library, or a function that fails with ENOSYS if the library lacks it."""
    function = getattr(_library, name, None)
    if function is None:
        return _missing
    function.restype, function.argtypes = result, arguments
    return function


def _missing(*_: object) -> int:
    ctypes.set_errno(errno.ENOSYS)
    return -1


_prctl = _declared("prctl", c_int, c_int, c_ulong, c_ulong, c_ulong, c_ulong)
_syscall = _declared("syscall", c_long, c_long, *[c_long] * SYSCALL_ARGUMENTS)
_mmap = _declared("mmap", c_void_p, c_void_p, c_size_t, c_int, c_int, c_int, c_long)
_munmap = _declared("munmap", c_int, c_void_p, c_size_t)
_madvise = _declared("madvise", c_int, c_void_p, c_size_t, c_int)
_sync_file_range = _declared("sync_file_range", c_int, c_int, c_int64, c_int64, c_uint)
_malloc = _declared("malloc", c_void_p, c_size_t)
_free = _declared("free", None, c_void_p)
_mallopt = _declared("mallopt", c_int, c_int, c_int)
_malloc_trim = _declared("malloc_trim", c_int, c_size_t)


def prctl(option: int, value: int) -> None:
    """Set an attribute of this process or thread, see prctl(2).  Raises OSError."""
    _check(_prctl(option, value, 0, 0, 0))


def syscall(number: int, *arguments: int) -> int:
    """Make a system call, see syscall(2); an argument is a number or an address.  Raises OSError."""
    result = _syscall(number, *arguments, *[0] * (SYSCALL_ARGUMENTS - len(arguments)))
    if result == -1:
        raise _error()
    return int(result)


@contextmanager
def in_memory(data: bytes) -> Iterator[tuple[int, int]]:
    """Keep a copy of `data` in memory during the block; yields its address and size."""
    buffer = ctypes.create_string_buffer(data, len(data))
    yield ctypes.addressof(buffer), len(data)


def map_file(fd: int, size: int) -> int:
    """Map the first `size` bytes of a file, read-only and shared; return the address, see mmap(2).  Raises OSError."""
    address = _mmap(None, size, mmap.PROT_READ, mmap.MAP_SHARED, fd, 0)
    if address == MAP_FAILED:
        raise _error()
    return int(address)


def unmap(address: int, size: int) -> None:
    """Remove a mapping, see munmap(2).  Raises OSError."""
    _check(_munmap(address, size))


def populate(address: int, size: int) -> None:
    """Read a part of a mapping into memory; return once it is there.  See madvise(2), MADV_POPULATE_READ.

    `address` is the start of a page.  Raises OSError: EINVAL on kernels before 5.14, EFAULT if a read would cause
    SIGBUS.
    """
    _check(_madvise(address, size, MADV_POPULATE_READ))


def start_writing(fd: int, offset: int, size: int) -> None:
    """Begin to write a part of a file to the disk, without waiting; see sync_file_range(2).  Raises OSError."""
    _check(_sync_file_range(fd, offset, size, SYNC_FILE_RANGE_WRITE))


def keep_heap(most_bytes: int) -> bool:
    """Allocate blocks below `most_bytes` from the heap, and keep up to `most_bytes` of it when freed; see mallopt(3).

    By default, malloc maps each block of 128 KiB or more separately, with new pages each time.  Returns False if the C
    library is not glibc.
    """
    return all(_mallopt(option, most_bytes) == 1 for option in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD))


def touch_heap(n_bytes: int) -> None:
    """Make the kernel provide `n_bytes` of heap pages now: allocate a block, write to it, and free it."""
    if block := _malloc(n_bytes):
        ctypes.memset(block, 0, n_bytes)
        _free(block)


def trim_heap() -> None:
    """Return free heap memory to the kernel, see malloc_trim(3).  Does nothing if the C library is not glibc."""
    _malloc_trim(0)


def _check(status: int) -> None:
    if status != 0:
        raise _error()


def _error() -> OSError:
    number = ctypes.get_errno()
    return OSError(number, os.strerror(number))
