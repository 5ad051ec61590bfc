"""`native/build.py` as a program: what it prints, keeps and refuses.  `make setup` does the real build."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BUILD = Path(__file__).parents[2] / "native/build.py"


def run(cache: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the program without an index, so that a build fails at its first step."""
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), "PIP_NO_INDEX": "1", "CMAKE_ARGS": "", **environment}
    return subprocess.run([sys.executable, BUILD], env=variables, capture_output=True, text=True, check=False)


@pytest.fixture
def kept(tmp_path: Path) -> Path:
    """A wheel in the place where a build without CMAKE_ARGS would keep it."""
    code = f"import sys; sys.path.insert(0, {str(BUILD.parent)!r}); import build; print(build.digest())"
    environment = {**os.environ, "CMAKE_ARGS": ""}
    name = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    wheel = tmp_path / "loadstone/engine" / name.stdout.strip() / "llama_cpp_python-0-py3-none-any.whl"
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    return wheel


def test_a_kept_wheel_is_returned(tmp_path: Path, kept: Path) -> None:
    assert run(tmp_path).stdout == f"{kept}\n"


@pytest.mark.parametrize("variable", ["CMAKE_ARGS", "CC", "CXXFLAGS"])
def test_a_wheel_of_other_options_is_not_returned(tmp_path: Path, kept: Path, variable: str) -> None:
    done = run(tmp_path, **{variable: "-DGGML_CUDA=on"})
    assert done.returncode == 1
    assert str(kept) not in done.stdout


def test_a_failed_build_says_why_and_keeps_nothing(tmp_path: Path) -> None:
    done = run(tmp_path)
    assert done.returncode == 1
    assert done.stdout == ""
    assert "No matching distribution found" in done.stderr
    assert "The build of llama-cpp-python failed.  The whole log: " in done.stderr
    assert list((tmp_path / "loadstone/engine").iterdir()) == []


def test_the_duration_is_announced(tmp_path: Path) -> None:
    first, second = run(tmp_path).stderr.splitlines()[:2]
    assert first.startswith("Building llama.cpp: about ")
    assert second.startswith("llama.cpp: downloading the source")


def test_a_missing_compiler_is_named(tmp_path: Path) -> None:
    done = run(tmp_path, PATH=str(tmp_path))
    assert done.returncode == 1
    assert done.stderr == "llama.cpp needs a C++ compiler: install g++ or clang++\n"
