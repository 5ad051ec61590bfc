"""A worker process that cannot start: one sentence and an exit status."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LATE_CATALOG = "worker.main.FIRST_CATALOG_S = 0.001"
LATE_RUNNER = """
from worker.runner.process import Runner
async def receive(_):
    raise TimeoutError
Runner.receive = receive
"""


def started(data_dir: Path, faults: str = "") -> tuple[int, str]:
    """Run a worker whose Redis is away until it exits.  Returns its exit status and its standard error."""
    code = f"import sys, worker.main, worker.__main__\n{faults}\nsys.exit(worker.__main__.main())"
    variables = {
        "LOADSTONE_REDIS_URL": f"unix://{data_dir}.sock",
        "LOADSTONE_DATA_DIR": str(data_dir),
        "LOADSTONE_MODELS_DIR": "/models",
        "LOADSTONE_WORKER_NAME": "w",
        "LOADSTONE_LOG_LEVEL": "error",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | variables, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    ("faults", "sentence"),
    [
        (LATE_CATALOG, "LOADSTONE_MODELS_DIR is '/models': it could not be read within 0.001 s."),
        (LATE_RUNNER, "no runner could be started: it was not warm within 60 s"),
    ],
    ids=["catalog", "runner"],
)
def test_a_worker_that_is_not_ready_in_time_exits(tmp_path: Path, faults: str, sentence: str) -> None:
    assert started(tmp_path, faults) == (1, f"loadstone: {sentence}\n")


def test_a_worker_refuses_a_data_directory_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    sentence = f"LOADSTONE_DATA_DIR is '{file}': it must be a writable directory (File exists)."
    assert started(file) == (2, f"loadstone: {sentence}\n")
    sentence = f"LOADSTONE_DATA_DIR is '{file}/data': it must be a writable directory (Not a directory)."
    assert started(file / "data") == (2, f"loadstone: {sentence}\n")


def test_a_worker_refuses_a_lock_that_it_cannot_open(tmp_path: Path) -> None:
    (tmp_path / "worker-w.lock").mkdir()
    sentence = f"LOADSTONE_DATA_DIR is '{tmp_path}': it must be a writable directory (Is a directory)."
    assert started(tmp_path) == (2, f"loadstone: {sentence}\n")
