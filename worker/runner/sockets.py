"""The directory of the sockets of multiprocessing's fork server, which starts the runners."""

from __future__ import annotations

import multiprocessing


def place_sockets(directory: str) -> None:
    """Make multiprocessing create its sockets in `directory`, which the caller removes.  Its own temporary directory
    would remain after a SIGKILL.  Call this before the first process is started.

    multiprocessing has no such setting.  `multiprocessing.util.get_temp_dir` stores its directory in this entry and
    uses an existing value: checked with Python 3.11.  tests/unit/test_sockets.py fails if that changes.
    """
    multiprocessing.current_process()._config["tempdir"] = directory  # type: ignore[attr-defined]
