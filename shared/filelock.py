"""Exclusive locks between processes, each on a file: flock(2)."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

POLL_S = 0.02  # between two tries of a lock that is waited for


class Held(Exception):
    """Another process holds the lock."""


@contextmanager
def lock(path: Path, wait_s: float = 0.0) -> Iterator[TextIO]:
    """Hold the exclusive lock on a file, which is created if it is missing; yields the file, open for reading and
    appending.

    Tries for `wait_s` seconds, and at least once.  Raises Held, and OSError when the file cannot be opened.

    The lock belongs to the open file.  The kernel releases it once every process that has the file open has closed it
    or has died.  A child process has it open only if it was given the descriptor; such a child keeps the lock after
    the `with` has ended, which is why there is no LOCK_UN here.
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
