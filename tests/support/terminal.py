"""Programs on a terminal, as a person uses them."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import subprocess
import termios
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from tests.support.service import PATIENCE_S, STOP_S, until


class Terminal:
    """A program on a terminal."""

    def __init__(self, command: subprocess.Popen[bytes], master: int) -> None:
        self.command, self._master = command, master
        self.shown = ""  # since the last `send`

    def send(self, text: str) -> None:
        self.shown = ""
        os.write(self._master, text.encode(errors="surrogateescape"))

    def wait(self, text: str, within_s: float = PATIENCE_S) -> str:
        """Wait until the terminal shows a text after what was sent last; return all that it shows then."""

        def has_come() -> bool:
            while select.select([self._master], [], [], 0)[0]:
                self.shown += os.read(self._master, 1 << 16).decode(errors="replace")
            return text in self.shown

        until(has_come, f"the terminal shows {text!r}", within_s)
        return self.shown


@contextmanager
def terminal(*words: str, environ: Mapping[str, str]) -> Iterator[Terminal]:
    """Run a program on a terminal of its own; kill it at the end of the block."""
    master, slave = pty.openpty()
    command = subprocess.Popen(
        words,
        env=environ,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C reaches it
    )
    try:
        yield Terminal(command, master)
    finally:
        command.kill()
        command.wait(STOP_S)
        os.close(slave)
        os.close(master)
