"""The heartbeat that a child process sends to its supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress


def heartbeat(fd: int | None) -> Callable[[], None]:
    """Return the function that a child process calls at each beat.

    `fd` is the value of `--beat-fd`; if it is None, the function does nothing.  The descriptor is made non-inheritable,
    since a process that has it could beat in place of the child.
    """
    if fd is None:
        return lambda: None
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)

    def beat() -> None:
        with suppress(OSError):  # the pipe is full or its reading end is closed
            os.write(fd, b".")

    return beat
