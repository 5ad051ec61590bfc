"""The sockets of multiprocessing are created in the given directory only."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

CODE = """
import sys
from multiprocessing import forkserver
from pathlib import Path
from worker.runner.sockets import place_sockets
place_sockets(sys.argv[1])
forkserver.ensure_running()
print(sum(path.is_socket() for path in Path(sys.argv[1]).iterdir()), *Path(sys.argv[2]).iterdir())
"""


@pytest.fixture
def short() -> Iterator[Path]:
    """A directory with a short path: the path of a socket has at most 107 bytes (unix(7))."""
    with tempfile.TemporaryDirectory(prefix="t-") as directory:
        yield Path(directory)


def test_the_socket_of_the_fork_server_is_in_the_directory(short: Path) -> None:
    ours, others = short / "ours", short / "others"
    ours.mkdir()
    others.mkdir()
    command = [sys.executable, "-c", CODE, str(ours), str(others)]
    environ = os.environ | {"TMPDIR": str(others)}
    result = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=30, check=False)
    assert (result.stdout, result.stderr) == ("1\n", "")
