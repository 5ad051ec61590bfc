"""What Ctrl-C does.  A command that has nothing to undo exits at once, wherever it is: the kernel closes its files.

Imports next to nothing, since Python prints a traceback for a Ctrl-C that comes before `leave_at_once`.
"""

from __future__ import annotations

import os
import signal

STATUS = 130  # as a shell reports a program that SIGINT ended


def leave_at_once() -> None:
    """Exit with STATUS at Ctrl-C, unless the process was started with SIGINT ignored, as in the background of a script.

    The handler raises nothing: a KeyboardInterrupt prints a traceback during an import and when the interpreter ends.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


class Raising:
    """Raises KeyboardInterrupt at Ctrl-C during the `with` block, for a command that has something to undo."""

    def __enter__(self) -> None:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is _leave:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._before)


def _leave(*_: object) -> None:
    os._exit(STATUS)
