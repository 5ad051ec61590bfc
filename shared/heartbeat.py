"""The sign of life that a child process gives its supervisor."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress


def heartbeat(fd: int | None) -> Callable[[], None]:
    """In a child: what to call at each beat.  `fd` is the number of `--beat-fd`, None for one that nobody watches.

    The descriptor goes no further: who holds it could beat in the child's place.
    """
    if fd is None:
        return lambda: None
    os.set_inheritable(fd, False)
    os.set_blocking(fd, False)

    def beat() -> None:
        with suppress(OSError):  # the pipe is full, or nobody reads it
            os.write(fd, b".")

    return beat
