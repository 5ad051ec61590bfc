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

below, channel, between, second, above = (os.open(os.devnull, os.O_RDONLY) for _ in range(5))
assert below < channel < between < second < above
confine(second, channel)
kept = set()
for fd in range(above + 1):
    try:
        os.fstat(fd)
    except OSError:
        continue
    kept.add(fd)
assert kept == {0, 1, 2, channel, second}, kept
"""


def test_confined_process_keeps_only_its_channels_and_output() -> None:
    """A runner of today has none above its channels, which a change of the order of its descriptors would break."""
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
