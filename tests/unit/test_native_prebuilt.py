"""`native/prebuilt.py` as a program, with the engine of this environment as the libraries, and a stand-in for the
compiler: the real one takes a minute."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from worker.chat.code import installed

PREBUILT = Path(__file__).parents[2] / "native/prebuilt.py"
VERSION = metadata.version("llama-cpp-python")
COMPILER = """#!/bin/sh
echo "$@" >> "$0.log"
while [ $# -gt 1 ]; do
    if [ "$1" = -o ]; then echo made > "$2"; fi
    shift
done
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """What the program reads of a source distribution."""
    common = tmp_path / "source/vendor/llama.cpp/common"
    (common / "parsers").mkdir(parents=True)
    (common / "parsers/sources.cmake").write_text("set(S\n    ${CMAKE_CURRENT_LIST_DIR}/gemma4.cpp\n    ${X}/a.h\n)\n")
    (tmp_path / "source/llama_cpp").mkdir()
    (tmp_path / "source/llama_cpp/__init__.py").touch()
    (tmp_path / "source/PKG-INFO").write_text(f"Metadata-Version: 2.2\nName: llama_cpp_python\nVersion: {VERSION}\n\n")
    return tmp_path / "source"


@pytest.fixture
def compiler(tmp_path: Path) -> Path:
    path = tmp_path / "c++"
    path.write_text(COMPILER)
    path.chmod(0o700)
    return path


def run(cache: Path, libraries: Path, source: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "XDG_CACHE_HOME": str(cache), **environment}
    words = [sys.executable, str(PREBUILT), str(libraries), str(source)]
    return subprocess.run(words, env=variables, capture_output=True, text=True, check=False)


def test_the_wheel_has_the_libraries_and_the_chat_code(tmp_path: Path, source: Path, compiler: Path) -> None:
    done = run(tmp_path, installed(), source, CXX=str(compiler))
    assert done.returncode == 0, done.stderr
    wheel = Path(done.stdout.strip())
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert archive.read("llama_cpp/lib/libloadstone_chat.so") == b"made\n"
        assert archive.read("llama_cpp/lib/libllama.so") == (installed() / "libllama.so").read_bytes()
    assert {
        "llama_cpp/__init__.py",
        "llama_cpp/lib/libggml.so",
        f"llama_cpp_python-{VERSION}.dist-info/RECORD",
    } <= names
    *compiled, linked = (tmp_path / "c++.log").read_text().splitlines()
    assert any("native/chat.cpp" in line for line in compiled)
    assert any("common/jinja/parser.cpp" in line for line in compiled)
    assert str(installed() / "libllama.so") in linked

    target = tmp_path / "installed"
    words = ["-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--target", str(target), str(wheel)]
    subprocess.run([sys.executable, *words], check=True, env={**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1"})
    assert [found.version for found in metadata.distributions(path=[str(target)])] == [VERSION]


def test_the_wheel_is_kept(tmp_path: Path, source: Path, compiler: Path) -> None:
    first = run(tmp_path, installed(), source, CXX=str(compiler))
    (tmp_path / "c++.log").unlink()
    assert run(tmp_path, installed(), source, CXX=str(compiler)).stdout == first.stdout
    assert not (tmp_path / "c++.log").exists()


def test_other_libraries_are_refused(tmp_path: Path, source: Path) -> None:
    done = run(tmp_path, source, source)
    assert done.returncode == 1
    assert done.stderr == f"{source} has no libllama.so, or not all of libggml's libraries.\n"


def test_a_source_of_another_version_is_refused(tmp_path: Path, source: Path) -> None:
    information = source / "PKG-INFO"
    information.write_text(information.read_text().replace(VERSION, "0.1"))
    done = run(tmp_path, installed(), source)
    assert done.returncode == 1
    assert done.stderr == f"{source} is not llama-cpp-python {VERSION}\n"


def test_a_directory_that_is_no_source_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, installed(), tmp_path)
    assert done.returncode == 1
    assert done.stderr == f"{tmp_path} is no source distribution of llama-cpp-python: No such file or directory\n"


def test_what_the_compiler_says_is_shown(tmp_path: Path, source: Path) -> None:
    done = run(tmp_path, installed(), source)  # the stand-in for the source has no headers
    assert done.returncode == 1
    assert "error:" in done.stderr
    assert done.stderr.endswith("The build of the chat code failed.\n")
    assert [*(tmp_path / "loadstone/engine").iterdir()] == []


def test_a_missing_compiler_is_named(tmp_path: Path, source: Path) -> None:
    done = run(tmp_path, installed(), source, CXX="missing-c++")
    assert done.returncode == 1
    assert done.stderr == "The chat code needs a C++ compiler: install g++, or name one with CXX (missing-c++).\n"
