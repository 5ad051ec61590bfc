"""Confinement of a runner: which descriptors it keeps, whatever their numbers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
CODE = """
import os
from worker.engine.confine import confine

below, channel, above = (os.open(os.devnull, os.O_RDONLY) for _ in range(3))
assert below < channel < above
confine(channel)
kept = set()
for fd in range(above + 1):
    try:
        os.fstat(fd)
    except OSError:
        continue
    kept.add(fd)
assert kept == {0, 1, 2, channel}, kept
"""


def test_confined_process_keeps_only_its_channel_and_output() -> None:
    """A runner of today has none above its channel, which a change of the order of its descriptors would break."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environ = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=environ,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
