"""Reads a model's files into the page cache, with progress, before llama.cpp maps them.

llama.cpp maps a file with MAP_POPULATE: one system call that reads the whole file without progress.  Populating a
separate mapping in steps (MADV_POPULATE_READ, Linux 5.14) reads at the same speed and reports progress; llama.cpp's
mapping then finds the pages in the cache.
"""

from __future__ import annotations

import _thread
import errno
import mmap
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager

from shared import libc

THREAD_BYTES = 16 << 20  # more than a thread takes to start: a stack of 8 MiB, and arenas for its objects
START_S = 10.0  # of a thread, which takes a millisecond
STEP_BYTES = 32 << 20
SAMPLE_BYTES = 1 << 20


class Unreadable(Exception):
    """The file cannot be opened, is not a regular file, or cannot be read to its end."""


def open_model(path: str) -> int:
    """Open a regular file for reading and return the descriptor.  Never blocks, not even on a FIFO.

    Raises Unreadable with a reason that contains no path.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as e:
        raise Unreadable(f"the file cannot be opened: {e.strerror}") from None
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise Unreadable("it is not a regular file")
    return fd


def prefetch(fd: int, advanced: Callable[[int], None], *, counts_cached: bool = True) -> None:
    """Read a file into the page cache.  Calls `advanced` with the bytes of each step.  Cached steps take microseconds,
    and are not reported unless `counts_cached`.

    Raises Unreadable, also if the storage fails or the file is truncated meanwhile.
    """
    size = os.fstat(fd).st_size
    if size == 0:
        return
    try:
        os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_SEQUENTIAL)
        with _mapped(fd, size) as address:
            for at in range(0, size, STEP_BYTES):
                length = min(STEP_BYTES, size - at)
                was_cached = _cached(fd, at, length)
                if not was_cached:
                    _populate(address, fd, at, length)
                if counts_cached or not was_cached:
                    advanced(length)
    except OSError as e:
        is_short = e.errno == errno.EFAULT  # madvise(2): accessing the page would raise SIGBUS
        why = "it was truncated, or its storage failed" if is_short else e.strerror
        raise Unreadable(f"the file cannot be read: {why}") from None


class Ahead:
    """Reads files into the page cache in a separate thread, while the engine parses the metadata.

    A large vocabulary takes the engine as long as a disk takes for a gigabyte.
    """

    def __init__(self, fds: Sequence[int], advanced: Callable[[int], None], *, counts_cached: bool = True) -> None:
        """`advanced` is called in that thread, which also closes the descriptors: a load may fail before they are read.

        Raises OSError (ENOMEM) instead of waiting for ever: a thread that runs out of memory before it runs its target
        tells nobody, and `Thread.start` would wait for it (CPython 3.11).
        """
        mmap.mmap(-1, THREAD_BYTES).close()
        self._error: Unreadable | None = None
        self._has_begun, self._has_ended, self._is_late = threading.Event(), threading.Event(), False
        _thread.start_new_thread(self._run, (fds, advanced, counts_cached))
        if not self._has_begun.wait(START_S):
            self._is_late = True
            raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    def wait(self) -> None:
        """Wait until all files are read.  Raises Unreadable."""
        self._has_ended.wait()
        if self._error is not None:
            raise self._error

    def _run(self, fds: Sequence[int], advanced: Callable[[int], None], counts_cached: bool) -> None:
        self._has_begun.set()
        try:
            if not self._is_late:  # else the descriptors are closed
                self._read(fds, advanced, counts_cached)
        finally:
            self._has_ended.set()

    def _read(self, fds: Sequence[int], advanced: Callable[[int], None], counts_cached: bool) -> None:
        with ExitStack() as files:
            for fd in fds:
                files.callback(os.close, fd)
            try:
                for fd in fds:
                    prefetch(fd, advanced, counts_cached=counts_cached)
            except Unreadable as e:
                self._error = e


def _cached(fd: int, at: int, length: int) -> bool:
    """Return whether one byte of every megabyte is in the page cache.  RWF_NOWAIT: fails instead of blocking."""
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

    Does not use Python's mmap, which holds the GIL during madvise (Modules/mmapmodule.c of 3.11): a runner must answer
    pings, and be able to exit, while a disk is slow.
    """
    address = libc.map_file(fd, size)
    try:
        yield address
    finally:
        libc.unmap(address, size)


def _populate(address: int, fd: int, at: int, length: int) -> None:
    """Read a step of a file into the page cache.  Raises OSError."""
    try:
        libc.populate(address + at, length)
    except OSError as e:
        if e.errno != errno.EINVAL:
            raise
        buffer = bytearray(1 << 20)  # a kernel before 5.14: read it instead
        for position in range(at, at + length, len(buffer)):
            os.preadv(fd, [buffer], position)
