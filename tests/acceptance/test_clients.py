"""Requests that published clients of LM Studio's REST API send, and what they check in the replies, by project.

Each assertion stands for something that such a client would notice.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec
import pytest
from msgspec import Struct

from shared.synthetic import models as synthetic
from tests.support.service import Client, Reply, Service, tiny_quantized, up

LOAD, LIST = "/api/v1/models/load", "/api/v1/models"
LLM, MOE, EMBEDDING, PAIR = "acme/llm", "acme/moe", "acme/embedding", "acme/pair"
TTL_IS_UNKNOWN = "Unrecognized key(s) in object: 'ttl'"
CONFIG = json.loads("""{"context_length": 1000, "eval_batch_size": 64, "physical_batch_size": 32,
    "flash_attention": false, "num_experts": 3, "offload_kv_cache_to_gpu": false, "parallel": 2}""")
EXTENDED = json.loads("""{"context_checkpoints": 32, "reasoning_budget_message": "",
    "speculative_draft_mtp": false, "speculative_draft_simple": false, "speculative_draft_model": "",
    "speculative_draft_max_tokens": 3, "speculative_draft_min_tokens": 0,
    "speculative_draft_min_continue_probability": 0.75, "prompt_template": {"type": "jinja", "template": "{{ x }}"}}""")


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("clients")
    long = {"llama.context_length": 16_384}
    synthetic.tiny_llama(home / f"models/{LLM}/llm-f16.gguf", tokenizer="bpe", metadata=long)
    synthetic.tiny_moe(home / f"models/{MOE}/moe-f16.gguf")
    synthetic.tiny_embedding(home / f"models/{EMBEDDING}/embedding-f16.gguf")
    for quantization in ("Q4_0", "Q8_0"):
        tiny_quantized(home / f"models/{PAIR}/pair-{quantization}.gguf", quantization)
    with up(home) as service:
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


class Failed(Exception):
    """An error that a client shows to its user."""


def succeeded(reply: Reply) -> Any:
    """Return the body of a success; else raise Failed with `error.message`, `error` or the text, as the clients do."""
    if 200 <= reply.status < 300:
        return reply.json()
    error = reply.json().get("error")
    kind, message = (error["type"], error["message"]) if isinstance(error, dict) else ("", error or reply.text)
    raise Failed(f"{reply.status} {kind}: {message}")


def entry(client: Client, model: str) -> Any:
    """Return the list entry with this key, else the entry that lists it as a variant."""
    models = succeeded(client.send("GET", LIST))["models"]
    variant = [e for e in models if model in (e.get("selected_variant"), *(e.get("variants") or []))]
    return ([e for e in models if e["key"].strip() == model] + variant)[0]


def contexts(client: Client, model: str) -> dict[str, int]:
    """Return the context length of each loaded instance by id."""
    return {one["id"]: one["config"]["context_length"] for one in entry(client, model)["loaded_instances"]}


# ---- openclaw/openclaw and NousResearch/hermes-agent: clamp to the listed maximum, load unless an instance suffices


def openclaw(client: Client, model: str, requested: int | None = None) -> str:
    maximum = entry(client, model)["max_context_length"]
    target = min(requested or maximum, maximum)
    for instance_id, context in contexts(client, model).items():
        if context >= target:
            return instance_id
    reply = succeeded(client.load(entry(client, model)["key"], context_length=target))
    if str(reply.get("status", "loaded")).lower() != "loaded":
        raise Failed(f"unexpected status: {reply['status']}")
    return str(reply.get("instance_id"))


@pytest.mark.parametrize("model", [LLM, MOE, EMBEDDING])
@pytest.mark.parametrize("requested", [None, 1_000_000])
def test_openclaw_loads_with_the_listed_maximum_and_reuses_it(
    service: Service, model: str, requested: int | None
) -> None:
    assert [openclaw(service, model, requested), openclaw(service, model, 512)] == [model, model]
    assert contexts(service, model) == {model: entry(service, model)["max_context_length"]}


# ---- sequences of clients that list, load unless the key has an instance, and list again


def rlmstudio(client: Client, model: str) -> str:
    """Load a model unless the entry with exactly this key has an instance, as `lms_load` does; return the model."""
    loaded = [e["key"] for e in succeeded(client.send("GET", LIST))["models"] if e["loaded_instances"]]
    if model not in loaded:
        reply = client.load(model)
        assert (reply.status, reply.json()["status"]) == (200, "loaded")
    return model


@pytest.mark.parametrize("client", [openclaw, rlmstudio])
@pytest.mark.parametrize("model", [LLM, PAIR, EMBEDDING])
def test_a_sequence_that_is_repeated_leaves_one_instance(
    service: Service, client: Callable[[Client, str], str], model: str
) -> None:
    for _ in range(3):
        assert client(service, model) == model
    assert list(contexts(service, model)) == list(service.instances()) == [model]


@pytest.mark.parametrize("variant", [f"{PAIR}@q8_0", f"{PAIR}@q4_0", f"{LLM}@f16"])
def test_openclaw_finds_the_entry_of_a_variant(service: Service, variant: str) -> None:
    """It loads the key of the entry, and takes any of its instances."""
    model = variant.partition("@")[0]
    assert [openclaw(service, variant) for _ in range(3)] == [model] * 3
    assert list(service.instances()) == [model]
    service.unload_all()
    service.loaded(variant, context_length=entry(service, model)["max_context_length"])
    assert [openclaw(service, name) for name in (model, variant)] == [variant] * 2
    assert list(service.instances()) == [variant]


def test_an_unneeded_token_is_ignored(service: Service) -> None:
    client = Client(service.url, "lm-studio")
    assert openclaw(client, LLM, 512) == LLM
    client.close()


def test_clients_with_a_token_succeed_and_others_get_401(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{LLM}/llm-f16.gguf")
    with up(tmp_path, token="sk-lm-one", LOADSTONE_API_TOKENS="sk-lm-one") as guarded:
        assert openclaw(guarded, LLM, 512) == LLM
        assert n8n(guarded, LLM, ttl=900)["status"] == "loaded"
        for token in ("", "sk-lm-other"):
            stranger = Client(guarded.url, token)
            for client in (openclaw, model_manager, n8n):
                with pytest.raises(Failed, match=r"^401 .*: .+"):
                    client(stranger, LLM)
            stranger.close()


# ---- NousResearch/hermes-agent, uwuclxdy/ollama-lmstudio-proxy and others: unload the other instances, then load


def test_hermes_unloads_rivals_by_listed_id_and_then_loads(service: Service) -> None:
    for model in (MOE, LLM, LLM):
        service.loaded(model, context_length=512)
    ids = [one["id"] for e in succeeded(service.send("GET", LIST))["models"] for one in e["loaded_instances"]]
    assert [succeeded(service.unload(rival)) for rival in ids] == [{"instance_id": rival} for rival in ids]
    (again,) = {re.sub(r":\d+$", "", rival) for rival in ids} - {MOE}
    flags = {"flash_attention": True, "offload_kv_cache_to_gpu": True, "eval_batch_size": 256}
    succeeded(service.load(again, context_length=8192, **flags))
    assert {**contexts(service, MOE), **contexts(service, LLM)} == {LLM: 8192}


# ---- clients that verify the reply: exactly "loaded", an instance id, a time, and every value as it was sent

ECHO = {"echo_load_config": True}
NEWER = {"parallel", "physical_batch_size"}  # than LM Studio's documentation
VERIFIED = {
    "jmgirard/rlmstudio": (MOE, {name: value for name, value in CONFIG.items() if name not in NEWER} | ECHO),
    "VladimirMonin/lmstudio-labkit": (LLM, {"context_length": 4096, "parallel": 4} | ECHO),
    "CodexModelManager": (MOE, CONFIG | ECHO),
    "AgreementAtlas": (EMBEDDING, ECHO),
    "LoadLLMUseCase": (LLM, {"context_length": 2048, "flash_attention": True} | ECHO),
    "lms_load.py": (LLM, {"context_length": 4096, "flash_attention": True, "parallel": 2} | ECHO),
    "farm-guardian": (LLM, {"context_length": 8192, "flash_attention": True, "parallel": 1}),
    "LoadReceipt": (LLM, {}),
}


@pytest.mark.parametrize(("model", "body"), VERIFIED.values(), ids=list(VERIFIED))
def test_a_load_matches_what_verifying_clients_check(service: Service, model: str, body: Any) -> None:
    reply = service.load(model, **body)
    loaded = reply.json()
    assert (reply.status, loaded["status"], loaded["instance_id"].strip()) == (200, "loaded", model)
    assert loaded["load_time_seconds"] > 0
    sent = {name: value for name, value in body.items() if name not in ECHO}
    config = loaded["load_config"] if "echo_load_config" in body else sent
    assert {name: config.get(name) for name in sent} == sent
    assert list(contexts(service, model)) == [loaded["instance_id"]]


# ---- giantswarm/model-manager (Go), and others in Rust and C#: typed; an instance id proves success


class Config(Struct):
    context_length: int
    eval_batch_size: int | None = None
    parallel: int | None = None
    flash_attention: bool | None = None


class Loaded(Struct):
    id: str
    config: Config


class Entry(Struct):
    type: Literal["llm", "embedding"]
    publisher: str
    key: str
    display_name: str
    params_string: str | None
    size_bytes: int
    max_context_length: int
    loaded_instances: list[Loaded]
    format: Literal["gguf", "mlx"]
    architecture: str | None = None
    capabilities: dict[str, bool] | None = None


class Quantization(Struct):
    name: str
    bits_per_weight: int | None


class Quantized(Struct):
    quantization: Quantization | None


def test_a_typed_client_can_read_the_list(service: Service) -> None:
    service.loaded(MOE, parallel=2)
    service.loaded(EMBEDDING)
    models = msgspec.json.decode(service.send("GET", LIST).text, type=dict[str, list[Entry]])["models"]
    entries = {(e.key, e.type, e.display_name, bool(e.capabilities), len(e.loaded_instances)) for e in models}
    llms = {(key, "llm", "Tiny Llama", True, 0) for key in (LLM, PAIR)} | {(MOE, "llm", "Tiny MoE", True, 1)}
    assert entries == {*llms, (EMBEDDING, "embedding", "Tiny Embedding", False, 1)}


def test_a_typed_client_can_read_bits_per_weight_as_an_integer(service: Service) -> None:
    msgspec.json.decode(service.send("GET", LIST).text, type=dict[str, list[Quantized]])


def model_manager(client: Client, model: str) -> str:
    instance_id = succeeded(client.load(model))["instance_id"]
    assert instance_id
    return str(instance_id)


def test_model_manager_gets_instance_ids_from_load_and_unload(service: Service) -> None:
    instance_id = model_manager(service, LLM)
    assert succeeded(service.unload(instance_id))["instance_id"] == instance_id
    with pytest.raises(Failed, match=r"^404 model_not_found: .*not loaded"):  # which the client treats as success
        succeeded(service.unload(instance_id))
    with pytest.raises(Failed, match=r"^404 model_not_found: "):
        model_manager(service, "acme/other")


# ---- Myco: reads both lists; keeps one instance that is large enough; a missing instance counts as unloaded


def myco(client: Client, model: str, target: int) -> str:
    old = client.send("GET", "/api/v0/models")
    loaded = [e for e in old.json()["data"] if e["state"] == "loaded"] if old.status == 200 else []
    known = {e["id"]: e["loaded_context_length"] for e in loaded if re.sub(r":\d+$", "", e["id"]) == model}
    known = known or contexts(client, model)
    chosen = max((one for one in known if known[one] >= target), key=known.__getitem__, default=None)
    if chosen is None:
        chosen = succeeded(client.load(model, context_length=target, flash_attention=True))["instance_id"]
    for surplus in known.keys() - {chosen}:
        assert [client.unload(surplus).status for _ in range(2)] == [200, 404]
    return str(chosen)


def test_myco_converges_on_one_large_enough_instance(service: Service) -> None:
    assert [myco(service, LLM, target) for target in (1000, 500, 2000)] == [LLM, LLM, f"{LLM}:2"]
    assert contexts(service, LLM) == {f"{LLM}:2": 2000}


# ---- the LM Studio node of n8n: retries without `ttl` if the reply says that the key is not recognized


def n8n(client: Client, model: str, **options: object) -> Any:
    reply = client.load(model, echo_load_config=True, **options)
    if reply.status >= 300 and TTL_IS_UNKNOWN in reply.text:
        del options["ttl"]
        reply = client.load(model, echo_load_config=True, **options)
    return succeeded(reply)


def test_n8n_retries_without_ttl_when_it_is_not_recognized(service: Service) -> None:
    with pytest.raises(Failed, match=rf"^400 invalid_request: {re.escape(TTL_IS_UNKNOWN)}$"):
        succeeded(service.load(MOE, echo_load_config=True, ttl=900))
    assert contexts(service, MOE) == {}
    assert n8n(service, MOE, **CONFIG, ttl=900)["load_config"] == CONFIG


# ---- CodexModelManager: every value must come back as it was sent; it probes the API first


def codex(client: Client, model: str, config: dict[str, Any]) -> Any:
    """Return the echoed config of a load sent as .NET sends it: in chunks, and with a character set."""
    body = json.dumps({"model": model, "echo_load_config": True, **config}).encode()
    headers = {"Content-Type": "application/json; charset=utf-8"}
    reply = succeeded(client.send("POST", LOAD, content=iter([body]), headers=headers))
    assert reply["instance_id"].strip()
    assert reply["status"].lower() == "loaded"
    return reply["load_config"]


@pytest.mark.parametrize("model", [LLM, MOE, EMBEDDING])
def test_codexmodelmanager_reloads_with_the_listed_config(service: Service, model: str) -> None:
    service.loaded(model, context_length=700)
    (instance,) = entry(service, model)["loaded_instances"]
    succeeded(service.unload(instance["id"]))
    assert codex(service, model, instance["config"]) == instance["config"]


def test_codexmodelmanager_can_probe_with_an_unknown_model(service: Service) -> None:
    with pytest.raises(Failed, match=r"^404 model_not_found: "):
        codex(service, f"__cmm_schema_probe_{uuid.uuid4().hex}", {})


def test_codexmodelmanager_gets_all_unrecognized_keys_at_once(service: Service) -> None:
    message = "Unrecognized key(s) in object: " + ", ".join(f"'{name}'" for name in EXTENDED)
    with pytest.raises(Failed, match=rf"^400 invalid_request: {re.escape(message)}$"):
        codex(service, MOE, CONFIG | EXTENDED)
    assert contexts(service, MOE) == {}
