"""Published clients against the whole service: each reads one answer in all its ways, and two refusals.

Their packages are installed once, into the cache directory.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import TINY, Service, up

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loadstone/clients")
HERE = Path(__file__).parent
DRIVERS = HERE / "drivers"
INSTALL_S, RUN_S = 600, 300
CONTEXT = 256
LONG = "word " * CONTEXT
# What a client makes of an unknown model, and of a prompt that is too long: an exception, and OpenAI's code if it
# keeps that.
UNKNOWN, OVERFLOW = "model_not_found", "context_length_exceeded"
NODE = {
    "openai": (("NotFoundError", UNKNOWN), ("BadRequestError", OVERFLOW)),
    "langchain": (("NotFoundError", UNKNOWN), ("ContextOverflowError", None)),
    "ai_sdk": (("AI_APICallError", UNKNOWN), ("AI_APICallError", OVERFLOW)),
}
PYTHON = {
    "langchain": (("NotFoundError", UNKNOWN), ("ContextOverflowError", OVERFLOW)),
    "litellm": (("NotFoundError", None), ("ContextWindowExceededError", None)),
    "llama_index": (("NotFoundError", UNKNOWN), ("BadRequestError", OVERFLOW)),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("clients")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home) as service:
        service.loaded(TINY, context_length=CONTEXT)
        yield service


@pytest.fixture(scope="module")
def node() -> Path:
    """Return a directory with the libraries for Node, and the drivers, which find them there."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node is not installed")
    directory = installed_for(HERE / "package-lock.json")
    if not (directory / "node_modules/.package-lock.json").exists():
        for name in ("package.json", "package-lock.json"):
            shutil.copy(HERE / name, directory)
        run("npm", "ci", "--prefix", str(directory), "--no-audit", "--no-fund", within_s=INSTALL_S)
    for driver in DRIVERS.glob("*.mjs"):
        shutil.copy(driver, directory)
    return directory


@pytest.fixture(scope="module")
def python() -> Path:
    """Return an interpreter that has the libraries for Python."""
    requirements = HERE / "requirements.txt"
    directory = installed_for(requirements)
    done, interpreter = directory / "done", directory / "bin/python"
    if not done.exists():
        run(sys.executable, "-m", "venv", "--clear", str(directory), within_s=INSTALL_S)
        run(str(interpreter), "-m", "pip", "install", "--no-deps", "-r", str(requirements), within_s=INSTALL_S)
        done.touch()
    return interpreter


def installed_for(pins: Path) -> Path:
    """Return the directory for the packages that a file names."""
    directory = CACHE / hashlib.sha256(pins.read_bytes()).hexdigest()[:16]
    directory.mkdir(parents=True, exist_ok=True)
    return directory


def run(*command: str, within_s: float = RUN_S) -> str:
    """Return what a command writes.  Fails with its errors."""
    quiet = os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"}  # else litellm downloads its prices
    done = subprocess.run(command, capture_output=True, text=True, timeout=within_s, env=quiet)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def check(read: Any, refused: tuple[str, str | None], overflow: tuple[str, str | None]) -> None:
    first, *others = read["answers"]
    assert first
    assert others
    assert {*others} == {first}
    assert {*read["tokens"]} <= {*range(1, 9)}
    assert read["finish"] in ("length", "stop")
    assert read["refused"] == {"name": refused[0], "code": refused[1]}
    assert read["overflow"] == {"name": overflow[0], "code": overflow[1]}


@pytest.mark.parametrize("name", NODE)
def test_a_client_for_node_reads_an_answer(node: Path, service: Service, name: str) -> None:
    written = run("node", str(node / f"{name}.mjs"), f"{service.url}/v1", TINY, LONG)
    check(json.loads(written), *NODE[name])


@pytest.mark.parametrize("name", PYTHON)
def test_a_client_for_python_reads_an_answer(python: Path, service: Service, name: str) -> None:
    written = run(str(python), str(DRIVERS / f"{name}_driver.py"), f"{service.url}/v1", TINY, LONG)
    read = json.loads(written.splitlines()[-1])
    check(read, *PYTHON[name])
    if name == "llama_index":  # its class for LM Studio
        assert {*read["native"]} == {read["answers"][0]}
