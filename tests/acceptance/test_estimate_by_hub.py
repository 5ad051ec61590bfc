"""Estimates of models that the hub has and no worker: by the headers of their files."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.hub import COMMIT, LocalHub
from tests.support.service import TINY, Running, Service, error, until, up

BIG, MANY = "Acme/Big-GGUF", "Acme/Many-GGUF"
ESTIMATE = "/api/v1/models/estimate"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    folder = tmp_path_factory.mktemp("hub")
    tiny = synthetic.tiny_llama(folder / "tiny.gguf")
    with LocalHub().running() as hub:
        for shard in synthetic.sparse_shape(folder / "big-Q4_0.gguf", "qwen3-0.6b", shards=2):
            hub.add(BIG, f"Q4_0/{shard.name}", shard)
            hub.listed_hashes[f"Q4_0/{shard.name}"] = 64 * "0"  # it need not be computed
        for name in ("many-Q4_0", "many-Q8_0", "many-f16", "mmproj-f16"):
            hub.add(MANY, f"{name}.gguf", tiny)
        hub.listed_sizes |= {"many-Q8_0.gguf": 2 * tiny.stat().st_size, "many-f16.gguf": 1 << 42}
        hub.sent_sizes["many-Q8_0.gguf"] = 2 * tiny.stat().st_size
        for name in ("a-Q4_0", "b-Q4_0"):
            hub.add("acme/two", f"{name}.gguf", tiny)
        hub.add("acme/texts", "README.md", tiny)
        yield hub


@pytest.fixture(scope="module")
def running(hub: LocalHub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("service")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home, HF_ENDPOINT=hub.endpoint, LOADSTONE_HUB_HOSTS=hub.cdn) as service:
        yield service


def estimate(service: Service, model: str, **fields: object) -> Any:
    reply = service.post(ESTIMATE, {"model": model, **fields})
    assert reply.status == 200, reply.text
    return reply.json()


def test_an_estimate_is_the_same_before_and_after_a_download(service: Service, hub: LocalHub) -> None:
    """For the larger batch, an engine does dry runs with the headers."""
    usual: dict[str, object] = {"context_length": 512, "parallel": 1}
    larger = usual | {"context_length": 2048, "eval_batch_size": 1024, "physical_batch_size": 1024}
    before_larger = estimate(service, BIG, **larger)
    before = estimate(service, BIG, **usual)
    files = hub.repositories[BIG]
    size = sum(file.stat().st_size for file in files.values())
    assert before.pop("quantizations") == [{"name": "Q4_0", "size_bytes": size, "fits": True}]
    assert before["model"] == BIG
    assert sum(hub.sent[path] for path in files) < size / 10
    for path, file in files.items():
        (service.models_dir / BIG / path).parent.mkdir(parents=True, exist_ok=True)
        os.link(file, service.models_dir / BIG / path)

    def is_read() -> bool:
        listed = service.models().get("acme/big")
        return listed is not None and listed["quantization"]["bits_per_weight"] is not None

    until(is_read, "its headers have been read to their ends")
    del before_larger["quantizations"]
    for one, fields in ((before, usual), (before_larger, larger)):
        after = estimate(service, "acme/big", **fields)
        for device in (*one["devices"], *after["devices"]):
            assert device.pop("free_bytes") > 0, "it changes from one moment to the next"
        assert {**after, "model": BIG} == one
        assert one["exact"]


@pytest.mark.parametrize(
    "name",
    [MANY, f"{MANY}@q8_0", f"https://huggingface.co/{MANY}", f"https://hf.co/{MANY}/blob/{COMMIT}/many-Q8_0.gguf"],
    ids=["plain", "variant", "page", "file"],
)
def test_quantizations_are_listed_with_what_fits(service: Service, name: str) -> None:
    result = estimate(service, name)
    assert [(one["name"], one["fits"]) for one in result["quantizations"]] == [
        ("Q4_0", True),
        ("Q8_0", True),
        ("F16", False),
    ]
    assert result["fits"]


def test_a_name_that_means_several_models_is_refused(service: Service) -> None:
    for name, names in (("acme/two", ["a-Q4_0", "b-Q4_0"]), (f"{MANY}@q5_0", ["Q4_0", "Q8_0", "F16"])):
        refused = error(service.post(ESTIMATE, {"model": name}), 400, "invalid_request", "invalid_value", "model")
        assert [one["quantization"] for one in refused["detail"]["candidates"]] == names


def test_what_the_hub_does_not_have_is_not_found(service: Service, hub: LocalHub) -> None:
    missing = error(service.post(ESTIMATE, {"model": "acme/missing"}), 404, "model_not_found", param="model")
    assert missing["message"] == "Model acme/missing not found in downloaded models"
    assert "does not exist on the hub" in missing["detail"]["hub"]
    asked = len(hub.requests)
    error(service.post(ESTIMATE, {"model": "missing"}), 404, "model_not_found", param="model")
    assert len(hub.requests) == asked, "it is the name of no repository"
    error(service.post(ESTIMATE, {"model": "acme/texts"}), 400, "invalid_request", "invalid_value", "model")
    asked = len(hub.requests)
    assert estimate(service, TINY)["fits"]
    assert len(hub.requests) == asked, "a worker has it"
    assert service.load(MANY).status == 404, "a load downloads nothing"


def test_without_a_hub_that_answers_the_model_is_not_found(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path, HF_ENDPOINT="http://127.0.0.1:9") as service:
        missing = error(service.post(ESTIMATE, {"model": BIG}), 404, "model_not_found", param="model")
        assert missing["message"] == f"Model {BIG} not found in downloaded models"
        assert "cannot be reached" in missing["detail"]["hub"]
        assert estimate(service, TINY)["fits"]


@pytest.mark.parametrize("word", ["load", "get"])
def test_the_command_line_lists_what_fits(service: Service, word: str, tmp_path: Path) -> None:
    command = Running(tmp_path, word, MANY, "--estimate-only", environ={"LOADSTONE_URL": service.url})
    assert command.popen.wait(60) == 0, command.stderr
    lines = [line.split() for line in command.stdout.splitlines()]
    start = lines.index(["QUANTIZATION", "SIZE", "FITS"])
    assert [(line[0], line[-1]) for line in lines[start + 1 :]] == [("Q4_0", "yes"), ("Q8_0", "yes"), ("F16", "no")]


def test_the_command_line_says_why_the_hub_does_not_help(service: Service, tmp_path: Path) -> None:
    command = Running(tmp_path, "load", "acme/missing", "--estimate-only", environ={"LOADSTONE_URL": service.url})
    assert command.popen.wait(60) == 1
    first, second = command.stderr.splitlines()
    assert first == "loadstone: Model acme/missing not found in downloaded models"
    assert "does not exist on the hub" in second
