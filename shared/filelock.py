"""Exclusive locks between processes, based on flock(2)."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

POLL_S = 0.02  # between two attempts to take a lock


class Held(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, wait_s: float = 0.0) -> Iterator[TextIO]:
    """Hold an exclusive lock on a file, and create the file if necessary.  Yields the file, open to read and append.

    Tries for `wait_s` seconds, and at least once.  Raises Held, or OSError if the file cannot be opened.

    The lock belongs to the open file description: the kernel releases it once every process that has the file open has
    closed it or exited.  A child process that inherits the descriptor therefore keeps the lock after the `with` block,
    which is why the lock is not released with LOCK_UN.
    """
    deadline = time.monotonic() + wait_s
    with path.open("a+") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Held(str(path)) from None
            time.sleep(POLL_S)
        yield file
