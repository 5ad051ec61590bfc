"""Reading a model's files into the page cache, with progress, before llama.cpp maps them.

llama.cpp maps a file with MAP_POPULATE: one system call that reads all of it and reports nothing.  Populating a
mapping of our own in steps (MADV_POPULATE_READ, Linux 5.14) reads at the same speed, tells how far it came, and
leaves llama.cpp's own mapping nothing to wait for.
"""

from __future__ import annotations

import errno
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from shared import libc

STEP_BYTES = 32 << 20
SAMPLE_BYTES = 1 << 20


class Unreadable(Exception):
    """What cannot be mapped (a FIFO, a device, a directory, nothing at all), or not be read to its end."""


def open_model(path: str) -> int:
    """A descriptor of a regular file.  A FIFO would block an ordinary open for ever; this one never blocks.

    Raises Unreadable with a reason that names no path.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise Unreadable(f"the file cannot be opened: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Unreadable("it is not a regular file")
    return fd


def prefetch(fd: int, advanced: Callable[[int], None]) -> None:
    """Bring a file into the page cache; `advanced` gets the bytes of each step.  Cached steps cost microseconds.

    Raises Unreadable, also where the device fails or the file ends early.
    """
    size = os.fstat(fd).st_size
    if size == 0:
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with _mapped(fd, size) as address:
            for at in range(0, size, STEP_BYTES):
                length = min(STEP_BYTES, size - at)
                if not _cached(fd, at, length):
                    _populate(address, fd, at, length)
                advanced(length)
    except OSError as e:
        is_short = e.errno == errno.EFAULT  # madvise(2): where a read would be a SIGBUS
        why = "it was cut short, or its device fails" if is_short else e.strerror
        raise Unreadable(f"the file cannot be read: {why}") from None


class Ahead:
    """Brings files into the page cache in a thread of its own, while the engine is busy with what comes before the
    weights: a large vocabulary takes it as long as a disk takes for a gigabyte."""

    def __init__(self, fds: Sequence[int], advanced: Callable[[int], None]) -> None:
        """`advanced` is called in that thread.  The descriptors are to stay open until `wait` has returned."""
        self._error: Unreadable | None = None
        self._thread = threading.Thread(target=self._read, args=(fds, advanced), daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Return once all is read.  Raises Unreadable."""
        self._thread.join()
        if self._error is not None:
            raise self._error

    def _read(self, fds: Sequence[int], advanced: Callable[[int], None]) -> None:
        try:
            for fd in fds:
                prefetch(fd, advanced)
        except Unreadable as e:
            self._error = e


def _cached(fd: int, at: int, length: int) -> bool:
    """Whether a byte of every megabyte is in the page cache: a read that would have to wait fails instead."""
    byte = bytearray(1)
    for position in range(at, at + length, SAMPLE_BYTES):
        try:
            if os.preadv(fd, [byte], position, os.RWF_NOWAIT) == 0:
                return False
        except OSError:  # EAGAIN, or a file system without RWF_NOWAIT
            return False
    return True


@contextmanager
def _mapped(fd: int, size: int) -> Iterator[int]:
    """Map a file for reading; yields the address.

    Not with Python's mmap, which holds the interpreter's lock while madvise reads (Modules/mmapmodule.c of 3.11): a
    runner must answer, and be able to leave, while a disk is slow.
    """
    address = libc.map_file(fd, size)
    try:
        yield address
    finally:
        libc.unmap(address, size)


def _populate(address: int, fd: int, at: int, length: int) -> None:
    """Bring a step of a file into the page cache.  Raises OSError."""
    try:
        libc.populate(address + at, length)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        buffer = bytearray(1 << 20)  # a kernel before 5.14: read it the plain way
        for position in range(at, at + length, len(buffer)):
            os.preadv(fd, [buffer], position)
