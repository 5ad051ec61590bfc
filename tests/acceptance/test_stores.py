"""Models in the stores of other programs are listed, loaded and asked where they lie."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import answered
from tests.support.service import Service, until, up
from tests.support.stores import into_hugging_face, into_ollama

OURS, HUB, OLLAMA = "acme/ours", "acme/cached", "llama@1b"


def roots(home: Path) -> list[str]:
    return [str(home / name) for name in ("models", "hub", "ollama")]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    home = tmp_path_factory.mktemp("stores")
    synthetic.tiny_llama(home / f"models/{OURS}/m-Q8_0.gguf", name="ours")
    synthetic.tiny_llama(home / "cached.gguf", name="cached")
    synthetic.tiny_llama(home / "tagged.gguf", name="tagged")
    into_hugging_face(home / "hub", "Acme/Cached-GGUF", "m-F16.gguf", home / "cached.gguf")
    for shard in synthetic.sharded(home / "shards/s.gguf", 3):
        into_hugging_face(home / "hub", "Acme/Sharded-GGUF", f"F16/{shard.name}", shard)
    into_ollama(home / "ollama", "registry.ollama.ai/library/llama/1b", model=home / "tagged.gguf")
    return home


@pytest.fixture(scope="module")
def running(home: Path) -> Iterator[Service]:
    with up(home, "--models-dir", ":".join(roots(home))) as service:
        yield service


def test_models_of_all_stores_are_listed(service: Service) -> None:
    listed = service.models()
    assert sorted(listed) == ["acme/cached", OURS, "acme/sharded", "llama"]
    assert listed["llama"]["variants"] == [OLLAMA]
    assert {key: model["display_name"] for key, model in listed.items() if key != "acme/sharded"} == {
        "acme/cached": "cached",
        OURS: "ours",
        "llama": "tagged",
    }


@pytest.mark.parametrize("model", [OURS, HUB, "acme/sharded", OLLAMA, "llama"])
def test_a_model_of_any_store_is_estimated_loaded_and_asked(service: Service, model: str) -> None:
    estimate = service.post("/api/v1/models/estimate", {"model": model})
    assert (estimate.status, estimate.json()["fits"]) == (200, True)
    assert service.loaded(model)["instance_id"] == model
    assert answered(service, model=model, max_tokens=4)["choices"][0]["message"]["role"] == "assistant"
    assert str(service.models_dir.parent) not in service.send("GET", "/api/v1/models").text


def test_the_engine_log_names_no_directory_of_the_host(service: Service, home: Path) -> None:
    job = service.job(service.accepted(OLLAMA)["job_id"], wait_s=60)
    path = f"/api/v1/models/load/status/{job['job_id']}/logs"
    until(lambda: "blobs/sha256-" in service.send("GET", path).text, "the log is recorded")
    assert str(home) not in service.send("GET", path).text


def test_an_instance_keeps_its_files_when_stores_are_reordered(tmp_path: Path, home: Path) -> None:
    with up(tmp_path, "--models-dir", ":".join(roots(home))) as service:
        service.loaded(OLLAMA)
        service.loaded(HUB)
        until(lambda: len(service.wanted()) == 2, "the worker's file has both")
        service.stop()
    hub, ollama = roots(home)[1:]
    with up(tmp_path, "--models-dir", f"{ollama}:{hub}") as service:
        until(lambda: {*service.instances()} == {OLLAMA, HUB}, "both are restored")
        assert {key for key, model in service.models().items() if model["loaded_instances"]} == {"llama", "acme/cached"}


def test_an_instance_survives_a_copy_in_an_earlier_directory(tmp_path: Path, home: Path) -> None:
    """The copy hides the file that the instance has open; after a restart, the instance has the copy."""
    stores = ":".join([str(tmp_path / "models"), *roots(home)[1:]])
    with up(tmp_path, "--models-dir", stores) as service:
        for model in (HUB, OLLAMA):
            service.loaded(model)
        copy = tmp_path / "models/Acme/Cached-GGUF/m-F16.gguf"
        copy.parent.mkdir(parents=True)
        shutil.copyfile(home / "cached.gguf", copy)
        synthetic.tiny_llama(tmp_path / "models/acme/later/m.gguf")
        until(lambda: "acme/later" in service.models(), "the list has what was written after the copy")
        assert "hidden_model" in service.stderr
        answered(service, model=HUB, max_tokens=4)
        assert {*service.instances()} == {HUB, OLLAMA}, "no second instance was loaded"
        until(lambda: len(service.wanted()) == 2, "the worker's file has both")
        service.stop()
    with up(tmp_path, "--models-dir", stores) as service:
        until(lambda: {*service.instances()} == {HUB, OLLAMA}, "both are restored")
