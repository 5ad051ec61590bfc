"""Load, unload and list as LM Studio's documentation shows them, verbatim and field by field."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import Reply, Service, error, tiny_quantized, until, up

LOAD = """\
curl http://localhost:1234/api/v1/models/load \\
  -H "Authorization: Bearer $LM_API_TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{
    "model": "openai/gpt-oss-20b",
    "context_length": 16384,
    "flash_attention": true,
    "echo_load_config": true
  }'
"""
UNLOAD = """\
curl http://localhost:1234/api/v1/models/unload \\
  -H "Authorization: Bearer $LM_API_TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{
    "instance_id": "openai/gpt-oss-20b"
  }'
"""
LIST = """\
curl http://localhost:1234/api/v1/models \\
  -H "Authorization: Bearer $LM_API_TOKEN"
"""
DOCUMENTED, TINY, BERT, CAUSAL = "openai/gpt-oss-20b", "acme/tiny", "nomic/bert", "qwen/embedding"
ENGINE_PHASES = ["metadata", "weights", "context", "warmup"]
PHASES = ["queue", "spawn", *ENGINE_PHASES]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("load")
    models = home / "models"
    large = {"qwen3moe.context_length": 32_768, "qwen3moe.expert_used_count": 4}
    synthetic.tiny_moe(models / f"{DOCUMENTED}/gpt-oss-20b-F16.gguf", metadata=large)
    described = {"general.description": "Says nothing that makes sense."}
    synthetic.tiny_llama(models / "Acme/Tiny-GGUF/tiny-f16.gguf", tokenizer="bpe", metadata=described)
    synthetic.tiny_llama(models / "bare.gguf", metadata={"llama.context_length": 8192})
    synthetic.sharded(models / "acme/sharded/sharded-f16.gguf", 3)
    tiny_quantized(models / "acme/pair/pair-Q4_0.gguf", "Q4_0", 2048)
    tiny_quantized(models / "acme/pair/pair-Q8_0.gguf", "Q8_0", 1024)
    synthetic.tiny_bert(models / f"{BERT}/bert-f32.gguf")
    long = {"qwen3.context_length": 8192}
    synthetic.tiny_embedding(models / f"{CAUSAL}/embedding-f16.gguf", metadata=long)
    (models / "acme/broken").mkdir()
    (models / "acme/broken/broken.gguf").write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    with up(home) as service:
        until(lambda: all(m["params_string"] for m in service.models().values()), "every header has been read")
        yield service
        assert str(home) not in service.stderr


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


def timing(reply: Reply) -> dict[str, float]:
    """Parse Server-Timing: milliseconds by phase, in order."""
    entries = [entry.split(";dur=") for entry in reply.headers["server-timing"].split(", ")]
    return {name: float(duration) for name, duration in entries}


# ---- the documented examples


def test_documented_load_unload_and_list_work_verbatim(service: Service) -> None:
    loaded = service.shell(LOAD)
    assert (loaded.status, loaded.headers["content-type"]) == (200, "application/json")
    reply = loaded.json()
    assert 0 < reply.pop("load_time_seconds") < 60
    assert reply == {
        "type": "llm",
        "model_instance_id": DOCUMENTED,
        "instance_id": DOCUMENTED,
        "status": "loaded",
        "load_config": {
            "context_length": 16384,
            "eval_batch_size": 512,
            "physical_batch_size": 512,
            "parallel": 4,
            "flash_attention": True,
            "offload_kv_cache_to_gpu": True,
            "num_experts": 4,
        },
    }
    listed = service.shell(LIST)
    assert (listed.status, listed.headers["content-type"]) == (200, "application/json")
    (model,) = (model for model in listed.json()["models"] if model["key"] == DOCUMENTED)
    (instance,) = model["loaded_instances"]
    assert (instance["id"], instance["config"]) == (DOCUMENTED, reply["load_config"])
    unloaded = service.shell(UNLOAD)
    assert (unloaded.status, unloaded.json()) == (200, {"instance_id": DOCUMENTED})
    assert unloaded.headers["content-type"] == "application/json"
    assert service.models()[DOCUMENTED]["loaded_instances"] == []


def test_the_phases_of_a_load_are_disjoint_and_add_up(service: Service) -> None:
    began = time.monotonic()
    reply = service.load(TINY)
    wall_ms = (time.monotonic() - began) * 1000
    phases = timing(reply)
    assert list(phases) == [*PHASES, "total"]
    assert all(duration >= 0 for duration in phases.values())
    assert phases["total"] == pytest.approx(sum(phases[name] for name in PHASES), abs=1.0)
    assert phases["total"] < wall_ms
    engine_ms = sum(phases[name] for name in ENGINE_PHASES)
    assert reply.json()["load_time_seconds"] * 1000 == pytest.approx(engine_ms, abs=1.0)


# ---- names


def test_further_instances_take_the_lowest_free_number(service: Service) -> None:
    assert [service.loaded(TINY)["instance_id"] for _ in range(3)] == [TINY, f"{TINY}:2", f"{TINY}:3"]
    assert service.unload(f"{TINY}:2").status == 200
    assert service.loaded(TINY)["instance_id"] == f"{TINY}:2"
    assert service.unload(TINY).status == 200
    assert service.loaded(TINY)["model_instance_id"] == TINY
    assert set(service.instances()) == {TINY, f"{TINY}:2", f"{TINY}:3"}


@pytest.mark.parametrize("requested", [TINY, f"{TINY}@f16", "acme/pair", "acme/pair@q4_0", "acme/pair@q8_0", "bare"])
def test_a_model_loads_by_key_or_variant_and_keeps_that_as_id(service: Service, requested: str) -> None:
    maximum = {TINY: 4096, "bare": 8192, "acme/pair@q8_0": 1024}.get(requested.removesuffix("@f16"), 2048)
    reply = service.loaded(requested, context_length=maximum, echo_load_config=True)
    assert (reply["instance_id"], reply["load_config"]["context_length"]) == (requested, maximum)
    assert list(service.instances()) == [requested]
    assert service.unload(requested).status == 200
    assert service.instances() == {}


def test_the_quantizations_of_a_folder_are_one_entry(service: Service) -> None:
    """The plain key means the one closest to 4.5 bits per weight, and the entry describes that one."""
    service.loaded("acme/pair@q8_0")
    service.loaded("acme/pair", ttl_seconds=600)
    entry = service.models()["acme/pair"]
    assert (entry["variants"], entry["selected_variant"]) == (["acme/pair@q4_0", "acme/pair@q8_0"], "acme/pair@q4_0")
    assert (entry["quantization"]["name"], entry["max_context_length"]) == ("Q4_0", 2048)
    assert entry["size_bytes"] == (service.models_dir / "acme/pair/pair-Q4_0.gguf").stat().st_size
    shown = {one["id"]: (one["variant"], one["config"]["context_length"]) for one in entry["loaded_instances"]}
    assert shown == {"acme/pair@q8_0": ("acme/pair@q8_0", 1024), "acme/pair": ("acme/pair@q4_0", 2048)}
    assert ["remaining_ttl_seconds" in one for one in entry["loaded_instances"]] == [False, True]


def test_every_listed_name_loads_and_is_the_id(service: Service) -> None:
    names = [name for entry in service.models().values() for name in {entry["key"], *entry.get("variants", [])}]
    assert {TINY, f"{TINY}@f16", "bare", "acme/pair", "acme/pair@q4_0", "acme/pair@q8_0", BERT} < set(names)
    assert [service.loaded(name)["instance_id"] for name in names] == names


@pytest.mark.parametrize(
    ("spelled", "name"),
    [
        ("Acme/Tiny", TINY),
        ("Acme/Tiny-GGUF", TINY),
        ("ACME/TINY-gguf@F16", f"{TINY}@f16"),
        ("acme/pair@Q8_0", "acme/pair@q8_0"),
        ("Acme/Pair-GGUF@Q8_0", "acme/pair@q8_0"),
        ("BARE", "bare"),
    ],
)
def test_case_and_gguf_do_not_matter_in_names(service: Service, spelled: str, name: str) -> None:
    """The reply and the list have the key as it is listed, so that clients which compare find the instance."""
    assert service.send("POST", "/api/v1/models/estimate", json={"model": spelled}).json()["model"] == name
    assert [service.loaded(spelled)["instance_id"] for _ in range(2)] == [name, f"{name}:2"]
    assert set(service.instances()) == {name, f"{name}:2"}
    assert service.unload(f"{spelled}:2").json() == {"instance_id": f"{name}:2"}
    assert service.unload(spelled).json() == {"instance_id": name}
    assert service.instances() == {}


@pytest.mark.parametrize(
    ("other", "near"),
    [
        ("acme/tiny@f32", f"'{TINY}@f16'"),
        ("tiny", f"'{TINY}'"),
        ("other/tinny", f"'{TINY}'"),
        ("PAIR", "'acme/pair'"),
        ("pair@q5_0", "'acme/pair@q8_0' or 'acme/pair@q4_0'"),
        ("openai/gpt-oss-120b", f"'{DOCUMENTED}'"),
    ],
)
def test_the_error_for_an_unknown_model_names_near_keys(service: Service, other: str, near: str) -> None:
    failure = error(service.load(other), 404, "model_not_found", param="model")
    assert failure["message"] == f"Model {other} not found in downloaded models. Did you mean {near}?"


# ---- the applied config


@pytest.mark.parametrize(
    ("model", "applied"),
    [
        (TINY, {"context_length": 4096, "eval_batch_size": 512}),
        ("bare", {"context_length": 4096, "eval_batch_size": 512}),
        ("acme/pair", {"context_length": 2048, "eval_batch_size": 512}),
        ("acme/sharded", {"context_length": 4096, "eval_batch_size": 512}),
        (DOCUMENTED, {"context_length": 4096, "eval_batch_size": 512, "num_experts": 4}),
    ],
)
def test_omitted_fields_have_the_documented_defaults(service: Service, model: str, applied: dict[str, Any]) -> None:
    config = service.loaded(model, echo_load_config=True)["load_config"]
    assert isinstance(config.pop("flash_attention"), bool)  # as the engine decided
    assert config == {**applied, "physical_batch_size": 512, "parallel": 4, "offload_kv_cache_to_gpu": True}


@pytest.mark.parametrize("requested", [1, 100, 257, 1000, 4095, 4096])
def test_the_echoed_context_length_is_the_requested_one(service: Service, requested: int) -> None:
    config = service.loaded(TINY, context_length=requested, echo_load_config=True)["load_config"]
    assert config["context_length"] == requested
    assert config["eval_batch_size"] == min(512, requested)


@pytest.mark.parametrize("requested", [1, 7, 509])
def test_any_context_length_of_an_embedding_model_loads(service: Service, requested: int) -> None:
    for model in (BERT, CAUSAL):
        reply = service.loaded(model, context_length=requested, echo_load_config=True)
        assert reply["load_config"] == {"context_length": requested}


@pytest.mark.parametrize(("model", "default"), [(BERT, None), (CAUSAL, 4096)])
def test_an_embedding_model_echoes_only_its_context_length(service: Service, model: str, default: int | None) -> None:
    maximum = service.models()[model]["max_context_length"]
    reply = service.loaded(model, echo_load_config=True)
    assert reply["type"] == "embedding"
    assert reply["load_config"] == {"context_length": default or maximum}
    llm_fields = {
        "eval_batch_size": 3,
        "physical_batch_size": 2,
        "flash_attention": True,
        "num_experts": 1000,
        "offload_kv_cache_to_gpu": False,
        "parallel": 4,
        "kv_cache_type": "q8_0",
    }
    reply = service.loaded(model, context_length=300, echo_load_config=True, **llm_fields)
    assert reply["load_config"] == {"context_length": 300}
    assert [i["config"]["context_length"] for i in service.instances().values()] == [default or maximum, 300]


def test_num_experts_is_echoed_for_mixture_models_only(service: Service) -> None:
    assert service.loaded(DOCUMENTED, num_experts=8, echo_load_config=True)["load_config"]["num_experts"] == 8
    assert "num_experts" not in service.loaded(TINY, num_experts=1000, echo_load_config=True)["load_config"]


# ---- the list


def test_the_listed_fields_of_a_language_model(service: Service) -> None:
    reply = service.loaded(TINY, parallel=2, context_length=300, echo_load_config=True)
    entry = service.models()[TINY]
    (instance,) = entry.pop("loaded_instances")
    assert instance.pop("worker")
    assert instance.pop("devices") == ["CPU"]
    assert instance == {"id": TINY, "config": reply["load_config"], "variant": f"{TINY}@f16"}
    file = service.models_dir / "Acme/Tiny-GGUF/tiny-f16.gguf"
    assert entry["quantization"].pop("bits_per_weight") == 16
    assert entry == {
        "type": "llm",
        "publisher": "Acme",
        "key": TINY,
        "display_name": "Tiny Llama",
        "architecture": "llama",
        "quantization": {"name": "F16"},
        "size_bytes": file.stat().st_size,
        "params_string": "250K",
        "max_context_length": 4096,
        "format": "gguf",
        "capabilities": {"vision": False, "trained_for_tool_use": True},
        "description": "Says nothing that makes sense.",
        "variants": [f"{TINY}@f16"],
        "selected_variant": f"{TINY}@f16",
    }


def test_the_listed_fields_of_an_embedding_model(service: Service) -> None:
    entry = service.models()[BERT]
    assert entry["quantization"].pop("bits_per_weight") == 32
    assert entry.pop("params_string").endswith(("K", "M"))
    assert entry.pop("max_context_length") > 0
    assert entry == {
        "type": "embedding",
        "publisher": "nomic",
        "key": BERT,
        "display_name": "Tiny BERT",
        "quantization": {"name": "F32"},
        "size_bytes": (service.models_dir / f"{BERT}/bert-f32.gguf").stat().st_size,
        "loaded_instances": [],
        "format": "gguf",
        "variants": [f"{BERT}@f32"],
        "selected_variant": f"{BERT}@f32",
    }


def test_a_sharded_model_is_one_entry_with_its_total_size(service: Service) -> None:
    listed = service.models()
    shards = list((service.models_dir / "acme/sharded").glob("*-of-00003.gguf"))
    assert len(shards) == 3
    assert listed["acme/sharded"]["size_bytes"] == sum(shard.stat().st_size for shard in shards)
    assert [key for key in listed if "sharded" in key] == ["acme/sharded"]


def test_each_loadable_model_is_listed_once_and_nothing_else(service: Service) -> None:
    keys = [model["key"] for model in service.send("GET", "/api/v1/models").json()["models"]]
    assert sorted(keys) == sorted([DOCUMENTED, TINY, "bare", "acme/sharded", "acme/pair", BERT, CAUSAL])


# ---- files that are added, changed or removed


def wait_listed(service: Service, key: str, maximum: int | None) -> None:
    """Wait until the list shows this maximum for a key; None waits until the key is not listed."""
    expected = None if maximum is None else {"max_context_length": maximum}

    def shown() -> bool:
        model = service.models().get(key)
        return (None if model is None else {"max_context_length": model["max_context_length"]}) == expected

    until(shown, f"{key} is listed with {maximum}")


def test_added_replaced_and_removed_files_are_noticed(service: Service) -> None:
    error(service.load("new/model"), 404, "model_not_found", param="model")
    path = service.models_dir / "new/model/model-f16.gguf"
    synthetic.tiny_llama(path, metadata={"llama.context_length": 1024})
    wait_listed(service, "new/model", 1024)
    assert service.loaded("new/model", echo_load_config=True)["load_config"]["context_length"] == 1024
    synthetic.tiny_llama(path, metadata={"llama.context_length": 2048})
    wait_listed(service, "new/model", 2048)
    until(lambda: not service.instances(), "the instance of the old file is gone")
    assert service.loaded("new/model", echo_load_config=True)["load_config"]["context_length"] == 2048
    assert set(service.instances()) == {"new/model"}
    service.unload_all()
    path.unlink()
    wait_listed(service, "new/model", None)
    error(service.load("new/model"), 404, "model_not_found", param="model")


def test_a_broken_file_is_unlisted_and_its_load_names_the_file(service: Service) -> None:
    failure = error(service.load("acme/broken"), 500, "model_load_failed", "invalid_model_file")
    assert failure["message"].startswith("Failed to load LLM 'acme/broken': Error: broken.gguf ")
    path = service.models_dir / "acme/broken2/broken2.gguf"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(b"GGUF\x03\0\0\0")
    until(lambda: service.load("acme/broken2").status == 500, "the catalog has the new broken file")
    failure = error(service.load("acme/broken2"), 500, "model_load_failed", "invalid_model_file")
    assert failure["message"].startswith("Failed to load LLM 'acme/broken2': Error: broken2.gguf ")
    assert not {"acme/broken", "acme/broken2"} & service.models().keys()
    synthetic.tiny_llama(path)
    wait_listed(service, "acme/broken2", 4096)
    assert service.loaded("acme/broken2")["status"] == "loaded"
    service.unload_all()
    remove(path)


def remove(path: Path) -> None:
    path.unlink()
    path.parent.rmdir()


# ---- concurrent loads


def test_twenty_loads_at_once_are_twenty_instances(service: Service) -> None:
    with ThreadPoolExecutor(20) as pool:
        replies = list(pool.map(lambda _: service.load(TINY), range(20)))
    assert [reply.status for reply in replies] == [200] * 20
    ids = {TINY, *(f"{TINY}:{n}" for n in range(2, 21))}
    assert {reply.json()["instance_id"] for reply in replies} == ids
    assert set(service.instances()) == ids
    with ThreadPoolExecutor(20) as pool:
        gone = list(pool.map(service.unload, sorted(ids)))
    assert [reply.status for reply in gone] == [200] * 20
    assert service.instances() == {}
    until(lambda: len(service.runners()) <= 1, "only the warm runner is left")
