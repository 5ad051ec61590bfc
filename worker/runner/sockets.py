"""The directory of the sockets through which the server that forks runners is reached."""

from __future__ import annotations

import multiprocessing


def place_sockets(directory: str) -> None:
    """Have multiprocessing make its sockets in `directory`, which the caller removes, instead of one of its own, which
    would stay after a SIGKILL.  Call it before the first process is started.

    multiprocessing has no such setting.  `multiprocessing.util.get_temp_dir` keeps its directory in this entry and
    takes what it finds there: checked with Python 3.11; tests/unit/test_sockets.py notices another behaviour.
    """
    multiprocessing.current_process()._config["tempdir"] = directory  # type: ignore[attr-defined]
