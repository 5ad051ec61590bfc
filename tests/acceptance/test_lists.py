"""The lists of models of other APIs: `/v1/models` and `/api/v0/models`."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from msgspec import Struct

from shared.synthetic import models as synthetic
from tests.support.service import Client, Service, openai_error, until, up

LLM, MOE, EMBEDDING = "acme/llm", "acme/moe", "acme/embedding"
VARIANTS = ["acme/two", "acme/two@q4_k_m", "acme/two@q8_0"]
V1, V0 = "/v1/models", "/api/v0/models"
IDS = [EMBEDDING, LLM, MOE, *VARIANTS]
CHANGED = 1_700_000_000  # the modification time of a model's file


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("lists")
    path = home / f"models/{LLM}/llm-f16.gguf"
    synthetic.tiny_llama(path)
    os.utime(path, (CHANGED, CHANGED))
    synthetic.tiny_moe(home / f"models/{MOE}/moe-f16.gguf")
    synthetic.tiny_embedding(home / f"models/{EMBEDDING}/embedding-f16.gguf")
    for quantization in ("Q4_K_M", "Q8_0"):
        synthetic.tiny_llama(home / f"models/acme/two-GGUF/two-{quantization}.gguf")
    with up(home) as service:
        until(lambda: ids(service) == IDS, "all models are listed")
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


def got(client: Client, path: str, **options: Any) -> Any:
    reply = client.send("GET", path, **options)
    assert reply.status == 200, reply.text
    return reply.json()


def ids(client: Client, path: str = V1) -> list[str]:
    body = got(client, path)
    assert body["object"] == "list"
    return [entry["id"] for entry in body["data"]]


def entries(client: Client, path: str) -> dict[str, Any]:
    return {entry["id"]: entry for entry in got(client, path)["data"]}


# ---- which ids


@pytest.mark.parametrize("path", [V1, V0])
def test_each_key_that_loads_is_listed_the_plain_one_first(service: Service, path: str) -> None:
    assert ids(service, path) == IDS
    for key in IDS:
        assert got(service, f"{path}/{key}") == entries(service, path)[key]


@pytest.mark.parametrize("path", [V1, V0])
def test_an_instance_with_another_id_is_listed_until_its_unload(service: Service, path: str) -> None:
    service.loaded(LLM, context_length=512)
    service.loaded(LLM, context_length=1024)
    listed = entries(service, path)
    assert [*listed] == sorted([*IDS, f"{LLM}:2"])
    assert {id_: (entry["state"], entry.get("loaded_context_length")) for id_, entry in listed.items()} == {
        **dict.fromkeys(IDS, ("not-loaded", None)),
        LLM: ("loaded", 512),
        f"{LLM}:2": ("loaded", 1024),
    }
    assert {name: listed[f"{LLM}:2"][name] for name in ("type", "max_context_length")} == {
        name: listed[LLM][name] for name in ("type", "max_context_length")
    }
    assert got(service, f"{path}/{LLM}:2") == listed[f"{LLM}:2"]
    service.unload(LLM)
    assert entries(service, path)[LLM]["state"] == "not-loaded", "each id has the state of the instance with this id"
    service.unload(f"{LLM}:2")
    assert ids(service, path) == IDS


@pytest.mark.parametrize("path", [V1, V0])
def test_a_variant_is_loaded_under_the_id_by_which_it_was_asked(service: Service, path: str) -> None:
    plain, _, other = VARIANTS
    service.loaded(plain)
    service.loaded(other)
    states = {id_: entry["state"] for id_, entry in entries(service, path).items() if id_ in VARIANTS}
    assert states == {plain: "loaded", VARIANTS[1]: "not-loaded", other: "loaded"}


def test_a_load_under_way_is_listed_as_loading(service: Service) -> None:
    with service.frozen():
        job = service.accepted(LLM)
        until(lambda: entries(service, V0)[LLM]["state"] == "loading", "the model is loading")
        assert "loaded_context_length" not in entries(service, V0)[LLM]
    assert service.send("GET", f"/api/v1/models/load/status/{job['job_id']}?wait=60").json()["status"] == "loaded"
    assert entries(service, V0)[LLM]["state"] == "loaded"


def test_an_instance_is_listed_after_its_file_was_deleted(tmp_path: Path) -> None:
    path = synthetic.tiny_llama(tmp_path / f"models/{LLM}/llm-f16.gguf")
    with up(tmp_path) as service:
        service.loaded(LLM, context_length=512)
        path.unlink()
        synthetic.tiny_moe(tmp_path / f"models/{MOE}/moe-f16.gguf")
        until(lambda: MOE in ids(service), "the directory was read again")
        (entry,) = [entry for entry in got(service, V0)["data"] if entry["id"] == LLM]
        assert (entry["state"], entry["loaded_context_length"], entry["arch"]) == ("loaded", 512, "llama")
        service.unload_all()
        assert ids(service) == [MOE]


# ---- one id


@pytest.mark.parametrize("path", [V1, V0])
@pytest.mark.parametrize("key", [LLM, LLM.replace("/", "%2F"), VARIANTS[1], VARIANTS[1].replace("@", "%40")])
def test_an_id_is_found_with_its_slash_encoded_or_not(service: Service, path: str, key: str) -> None:
    assert got(service, f"{path}/{key}")["id"] == key.replace("%2F", "/").replace("%40", "@")


@pytest.mark.parametrize("name", [f"{LLM}@f16", f"{LLM}@F16", LLM.upper(), f"{LLM}-GGUF"])
def test_a_name_that_loads_is_found_although_it_is_not_listed(service: Service, name: str) -> None:
    assert got(service, f"{V1}/{name}")["id"] == LLM


@pytest.mark.parametrize("path", [V1, V0])
@pytest.mark.parametrize("model", ["nobody/has-it", f"{LLM}:2", "x", f"{LLM}/load"])
def test_an_unknown_id_is_not_found(service: Service, path: str, model: str) -> None:
    message = openai_error(
        service.send("GET", f"{path}/{model}"), 404, "invalid_request_error", "model_not_found", "model"
    )
    assert message.startswith(f"Model {model} not found in downloaded models")


# ---- the forms


def test_the_list_has_openais_form(service: Service) -> None:
    assert entries(service, V1)[LLM] == {
        "id": LLM,
        "object": "model",
        "created": CHANGED,
        "owned_by": "organization_owner",
        "state": "not-loaded",
        "max_context_length": 4096,
        "type": "llm",
    }
    assert entries(service, V1)[EMBEDDING]["type"] == "embeddings"
    assert all(type(entry["created"]) is int for entry in entries(service, V1).values())


class ZedModel(Struct, forbid_unknown_fields=True):
    """An entry as Zed reads it: closed enums, and one entry that does not fit fails the list."""

    id: str
    object: Literal["model"]
    type: Literal["llm", "vlm", "embeddings"]
    publisher: str
    arch: str
    compatibility_type: Literal["gguf", "mlx"]
    quantization: str
    state: Literal["loaded", "loading", "not-loaded"]
    max_context_length: int
    loaded_context_length: int | None = None
    capabilities: list[Literal["tool_use", "vision"]] = []


class ZedList(Struct, forbid_unknown_fields=True):
    object: Literal["list"]
    data: list[ZedModel]


def test_zed_can_read_the_older_list(service: Service) -> None:
    service.loaded(EMBEDDING)
    models = {each.id: each for each in msgspec.json.decode(service.send("GET", V0).text, type=ZedList).data}
    assert [*models] == IDS
    assert (models[LLM].type, models[LLM].publisher, models[LLM].arch) == ("llm", "acme", "llama")
    assert (models[EMBEDDING].type, models[EMBEDDING].state) == ("embeddings", "loaded")
    assert (models[VARIANTS[1]].quantization, models[VARIANTS[2]].quantization) == ("Q4_K_M", "Q8_0")


def test_anythingllm_learns_the_context_of_a_model(service: Service) -> None:
    """It assumes 16,384 tokens if this list fails."""
    service.loaded(LLM, context_length=1024)
    models = [(e["id"], e.get("loaded_context_length") or e["max_context_length"]) for e in got(service, V0)["data"]]
    assert dict(models)[LLM] == 1024
    assert dict(models)[MOE] == 4096


# ---- Anthropic's form


@pytest.mark.parametrize(
    "options", [{"headers": {"anthropic-version": "2023-06-01"}}, {"params": {"limit": 1000}}], ids=["header", "limit"]
)
def test_claude_code_gets_anthropics_form(service: Service, options: dict[str, Any]) -> None:
    body = got(service, V1, **options)
    assert [entry["id"] for entry in body["data"]] == IDS
    assert (body["has_more"], body["first_id"], body["last_id"]) == (False, IDS[0], IDS[-1])
    (entry,) = [entry for entry in body["data"] if entry["id"] == LLM]
    assert (entry["type"], entry["display_name"]) == ("model", "Tiny Llama")
    assert datetime.fromisoformat(entry["created_at"]).timestamp() == CHANGED
    assert (body["object"], entry["object"], entry["created"]) == ("list", "model", CHANGED)
    assert got(service, f"{V1}/{LLM}", **options) == entry


def test_a_client_can_page_through_the_ids(service: Service) -> None:
    forward: list[str] = []
    page: Any = {"has_more": True}
    while page["has_more"]:
        page = got(service, V1, params={"limit": 4} | ({"after_id": forward[-1]} if forward else {}))
        assert (page["first_id"], page["last_id"]) == (page["data"][0]["id"], page["data"][-1]["id"])
        forward += [entry["id"] for entry in page["data"]]
    assert forward == IDS
    before = got(service, V1, params={"limit": 2, "before_id": IDS[3]})
    assert ([entry["id"] for entry in before["data"]], before["has_more"]) == (IDS[1:3], True)
    nothing = got(service, V1, params={"limit": 2, "before_id": IDS[0]})
    assert nothing == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        ({"limit": "x"}, "invalid_type", "limit"),
        ({"limit": 0}, "invalid_value", "limit"),
        ({"limit": 1, "after_id": "nobody/has-it"}, "model_not_found", "after_id"),
        ({"limit": 1, "before_id": ""}, "model_not_found", "before_id"),
    ],
)
def test_a_wrong_page_is_refused(service: Service, params: dict[str, Any], code: str, param: str) -> None:
    status = 404 if code == "model_not_found" else 400
    openai_error(service.send("GET", V1, params=params), status, "invalid_request_error", code, param)


def test_a_wrong_method_on_an_id_is_refused(service: Service) -> None:
    reply = service.send("DELETE", f"{V1}/{LLM}")
    openai_error(reply, 405, "invalid_request_error", "method_not_supported")
    assert reply.headers["allow"] == "GET, HEAD"
