"""Each field of a load request reaches llama.cpp: the tests compare values read back from the engine."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.lookup import by_name
from shared.schema.http import LoadRequest
from shared.settings import Settings
from shared.synthetic import models as synthetic
from tests.support.service import Service, up
from worker.catalog.catalog import Catalog

LLM, MOE = "acme/llm", "acme/moe"  # the latter uses two of eight experts by default


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("fields")
    synthetic.tiny_llama(home / f"models/{LLM}/llm-f16.gguf", metadata={"llama.context_length": 16_384})
    synthetic.tiny_moe(home / f"models/{MOE}/moe-f16.gguf")
    with up(home) as running:
        yield running


@pytest.fixture(scope="module")
def contrary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Run a service with unusual defaults, so that a requested value differs from an omitted one."""
    home = tmp_path_factory.mktemp("contrary")
    synthetic.tiny_llama(home / f"models/{LLM}/llm-f16.gguf")
    with up(home, LOADSTONE_FLASH_ATTENTION="off", LOADSTONE_OFFLOAD_KV_CACHE_TO_GPU="false") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays_loaded(request: pytest.FixtureRequest) -> Iterator[None]:
    yield
    for name in {"service", "contrary"} & set(request.fixturenames):
        request.getfixturevalue(name).unload_all()


def config(service: Service, model: str, **fields: object) -> Any:
    return service.loaded(model, **fields, echo_load_config=True)["load_config"]


@pytest.mark.parametrize("requested", [300, 1000, 10_000])
def test_context_length_applies(service: Service, requested: int) -> None:
    assert config(service, LLM, context_length=requested)["context_length"] == requested


@pytest.mark.parametrize("requested", [64, 2000])
def test_eval_batch_size_applies(service: Service, requested: int) -> None:
    assert config(service, LLM, eval_batch_size=requested)["eval_batch_size"] == requested


@pytest.mark.parametrize(("requested", "applied"), [(1, 1), (32, 32), (600, 512)])
def test_physical_batch_size_is_at_most_the_eval_batch_size(service: Service, requested: int, applied: int) -> None:
    assert config(service, LLM, physical_batch_size=requested)["physical_batch_size"] == applied


def test_eval_batch_size_is_at_most_the_context_length(service: Service) -> None:
    assert config(service, LLM, context_length=700, eval_batch_size=2000)["eval_batch_size"] == 700


@pytest.mark.parametrize("requested", [True, False])
def test_flash_attention_applies(service: Service, requested: bool) -> None:
    assert config(service, LLM, flash_attention=requested)["flash_attention"] is requested


def test_flash_attention_overrides_the_operators_default(contrary: Service) -> None:
    assert config(contrary, LLM, flash_attention=True)["flash_attention"] is True
    assert config(contrary, LLM)["flash_attention"] is False


@pytest.mark.parametrize("requested", [True, False])
def test_offload_kv_cache_to_gpu_is_echoed_without_a_gpu(service: Service, contrary: Service, requested: bool) -> None:
    for one in (service, contrary):
        assert config(one, LLM, offload_kv_cache_to_gpu=requested)["offload_kv_cache_to_gpu"] is requested


@pytest.mark.parametrize("requested", [1, 3, 8])
def test_num_experts_applies(service: Service, requested: int) -> None:
    assert config(service, MOE, num_experts=requested)["num_experts"] == requested


def test_num_experts_defaults_to_the_files_value(service: Service) -> None:
    assert config(service, MOE)["num_experts"] == 2


@pytest.mark.parametrize("requested", [1, 4, 64])
def test_parallel_applies_without_changing_the_context(service: Service, requested: int) -> None:
    applied = config(service, LLM, parallel=requested, context_length=512)
    assert (applied["parallel"], applied["context_length"]) == (requested, 512)


def test_parallel_is_echoed_and_listed_for_every_llm(service: Service) -> None:
    assert config(service, LLM)["parallel"] == 4
    assert config(service, MOE)["parallel"] == 4
    assert [one["config"]["parallel"] for one in service.instances().values()] == [4, 4]


def test_parallel_defaults_to_4_at_most_the_context_length(service: Service) -> None:
    assert config(service, LLM)["parallel"] == 4
    assert config(service, LLM, context_length=3)["parallel"] == 3


@pytest.mark.parametrize("requested", ["q8_0", "q4_0"])
def test_kv_cache_type_applies_and_turns_flash_attention_on(
    service: Service, contrary: Service, requested: str
) -> None:
    for one in (service, contrary):  # the operator of one of them turned flash attention off
        applied = config(one, LLM, kv_cache_type=requested)
        assert (applied["kv_cache_type"], applied["flash_attention"]) == (requested, True)
    assert "kv_cache_type" not in config(service, LLM, kv_cache_type="f16")


def test_a_quantized_kv_cache_without_flash_attention_is_refused(service: Service) -> None:
    reply = service.load(LLM, kv_cache_type="q8_0", flash_attention=False)
    error = reply.json()["error"]
    assert (reply.status, error["code"], error["param"]) == (400, "invalid_value", "kv_cache_type")
    assert "'flash_attention'" in error["message"]


@pytest.mark.parametrize("fields", [{}, {"echo_load_config": False}])
def test_without_echo_load_config_the_reply_has_no_config(service: Service, fields: dict[str, object]) -> None:
    assert set(service.loaded(LLM, **fields)) == {
        "type",
        "model_instance_id",
        "instance_id",
        "load_time_seconds",
        "status",
    }


def test_all_fields_apply_at_once(service: Service) -> None:
    fields = {
        "context_length": 777,
        "eval_batch_size": 99,
        "physical_batch_size": 33,
        "parallel": 3,
        "flash_attention": False,
        "offload_kv_cache_to_gpu": False,
        "num_experts": 5,
    }
    quantized = {**fields, "flash_attention": True, "kv_cache_type": "q8_0"}
    assert config(service, MOE, **fields) == fields
    assert config(service, MOE, **quantized) == quantized
    assert [instance["config"] for instance in service.instances().values()] == [fields, quantized]


# ---- with a fake GPU, in a process of the test: the service has no GPU here


def load_on_a_fake_gpu(home: str, fields: str) -> None:
    """Load a model with these fields, in a separate process; print the result as JSON."""
    from tests.support import fakegpu
    from worker.engine import llama
    from worker.runner.parameters import plan

    models_dir = Path(home, "models")
    catalog = Catalog([models_dir], Path(home, "catalog"))
    catalog.look()
    model = by_name(catalog.models())[LLM]
    log = llama.initialise("GPU-0")
    gpu = fakegpu.add("CUDA0", 1 << 30)
    request, settings = LoadRequest(model=LLM, **json.loads(fields)), Settings(models_dir=models_dir)
    load = plan(request, model, settings, ["GPU-0"], [5])
    loaded = llama.Loaded(load, log, lambda phase, n_bytes: None)
    used_bytes = gpu.used_bytes
    config = loaded.ready(load).config
    loaded.close()
    echoed = config.offload_kv_cache_to_gpu
    print(json.dumps({"used_bytes": used_bytes, "echoed": echoed, "left_bytes": gpu.used_bytes}))


@pytest.fixture
def on_a_fake_gpu(tmp_path: Path) -> Any:
    synthetic.tiny_llama(tmp_path / f"models/{LLM}/llm-f16.gguf")

    def load(**fields: object) -> dict[str, Any]:
        call = "import sys; from tests.acceptance.test_fields import *; load_on_a_fake_gpu(*sys.argv[1:])"
        done = subprocess.run(
            [sys.executable, "-c", call, str(tmp_path), json.dumps(fields)],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        result: dict[str, Any] = json.loads(done.stdout)
        return result

    return load


def test_offload_kv_cache_to_gpu_moves_the_cache(on_a_fake_gpu: Any) -> None:
    kv_bytes = 4 * 2 * 2 * 32 * 2 * 4096  # layers, K and V, heads, elements, bytes of each, tokens
    on = on_a_fake_gpu(offload_kv_cache_to_gpu=True)
    off = on_a_fake_gpu(offload_kv_cache_to_gpu=False)
    default = on_a_fake_gpu()
    assert [one["echoed"] for one in (on, off, default)] == [True, False, True]
    assert on["used_bytes"] == default["used_bytes"]
    assert on["used_bytes"] - off["used_bytes"] > kv_bytes / 2  # the compute buffers change the other way
    assert off["used_bytes"] > 0  # the weights stay on the GPU
    assert [one["left_bytes"] for one in (on, off, default)] == [0, 0, 0]
