"""Files that are valid but unusual: they load, or are refused for what they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support import damaged
from tests.support.service import Service, error, until, up

FILES: dict[str, Callable[[Path], object]] = {
    "align-8": lambda path: damaged.misaligned(path, 8),
    "align-16": lambda path: damaged.misaligned(path, 16),
    "no-file-type": lambda path: synthetic.tiny_llama(path, drop=["general.file_type"]),
    "ünïcode": synthetic.tiny_llama,
}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Start a service in a locale that has only ASCII, without Python's own remedy for that."""
    models = tmp_path_factory.mktemp("unusual") / "models"
    for name, make in FILES.items():
        make(models / f"acme/{name}/m.gguf")
    for shard in synthetic.sharded(models / "acme/upper-case/m.gguf", 3):
        shard.rename(shard.with_suffix(".GGUF"))
    synthetic.tiny_llama(models / "acme/flux/m.gguf", metadata={"general.architecture": "flux"})
    with up(models.parent, LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0") as service:
        yield service


@pytest.mark.parametrize("name", [*FILES, "upper-case"])
def test_a_valid_file_is_listed_and_loads(service: Service, name: str) -> None:
    whole = {"name": "F16", "bits_per_weight": 16}
    until(lambda: service.models()[f"acme/{name}"]["quantization"] == whole, "the header has been read to its end")
    assert service.loaded(f"acme/{name}")["status"] == "loaded"


def test_a_model_of_another_kind_is_unsupported(service: Service) -> None:
    assert "acme/flux" not in service.models()
    failed = error(service.load("acme/flux"), 500, "model_load_failed", "unsupported_model")
    assert failed["message"].endswith("m.gguf is a model of the architecture 'flux', which llama.cpp does not support")


def test_a_file_without_a_mapping_reports_its_progress(service: Service) -> None:
    job = service.job(service.accepted("acme/align-8")["job_id"], wait_s=10)
    assert (job["status"], job["loaded_bytes"]) == ("loaded", job["total_size_bytes"])
