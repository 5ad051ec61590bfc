"""`.ci/gpu`, which runs one stage of what needs a GPU, with a stand-in for Python."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
STAGES = {"tests": "pytest tests/gpu", "cycles": "pytest tests/gpu", "loads": "bench.gpu", "tokens": "bench.tokens"}


@pytest.fixture
def python(tmp_path: Path) -> Path:
    """A program that prints its arguments and fails."""
    path = tmp_path / "python"
    path.write_text('#!/bin/sh\necho "$@"\necho "on stderr" >&2\nexit 3\n')
    path.chmod(0o700)
    return path


def run(stage: str, out: Path, python: Path, *options: str) -> subprocess.CompletedProcess[str]:
    words = [str(ROOT / ".ci/gpu"), stage, str(out), str(python), *options]
    return subprocess.run(words, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_keeps_its_log_and_its_status(stage: str, tmp_path: Path, python: Path) -> None:
    done = run(stage, tmp_path / "a directory", python, "--gb", "4")
    assert done.returncode == 3
    log = (tmp_path / f"a directory/{stage}.log").read_text()
    assert log == done.stdout
    words, error = log.splitlines()
    assert words.startswith(f"-m {STAGES[stage]} ")
    assert words.endswith(" --gb 4")
    assert error == "on stderr"


def test_an_unknown_stage_is_refused(tmp_path: Path, python: Path) -> None:
    done = run("all", tmp_path, python)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", ".ci/gpu: no stage 'all'\n")
