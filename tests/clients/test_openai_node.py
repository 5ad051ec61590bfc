"""OpenAI's own library for Node, against the whole service.  npm installs it once, into the cache directory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import TINY, Service, up

LIBRARY = "openai@6.49.0"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache", "loadstone/clients", LIBRARY)
DRIVER = Path(__file__).with_name("openai.mjs")
INSTALL_S, RUN_S = 300, 120


@pytest.fixture(scope="module")
def library() -> Path:
    """Return the file of the library that Node imports."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("Node is not installed")
    index = CACHE / "node_modules/openai/index.mjs"
    if not index.exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        command = ["npm", "install", "--prefix", str(CACHE), "--no-audit", "--no-fund", LIBRARY]
        subprocess.run(command, check=True, timeout=INSTALL_S)
    return index


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("clients")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home) as service:
        yield service


def test_every_way_to_read_an_answer_reads_the_same(library: Path, service: Service) -> None:
    service.loaded(TINY)
    command = ["node", str(DRIVER), str(library), f"{service.url}/v1", TINY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=RUN_S)
    assert done.returncode == 0, done.stderr
    read = json.loads(done.stdout)
    assert read["whole"]
    assert {read["raw"], read["heard"], read["final"]} == {read["whole"]}
    assert read["finishes"] in (["length"], ["stop"])
    assert 1 <= read["usage"] <= 8
    assert read["refused"] == {"name": "NotFoundError", "status": 404, "code": "model_not_found"}
