"""`POST /api/v1/models/estimate` and `loadstone load --estimate-only`: the memory of a load, without loading."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from shared.synthetic.tokenizers import Value
from tests.support.service import Reply, Running, Service, error, until, up

PATH = "/api/v1/models/estimate"
TINY, LONG, BERT, BROKEN, OTHER = "acme/tiny", "acme/long", "acme/bert", "acme/broken", "acme/other"
LONGEST = 2**31 - 1  # tokens: about 4 TiB
TOKEN_BYTES = 4 * 2 * 2 * 32 * 2  # KV cache of the tiny model: layers, K and V, heads, elements, bytes of each
LOGITS_BYTES = 32 * 512 * 4  # of the tiny model: outputs, tokens of its vocabulary, bytes of each


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("estimate")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    synthetic.tiny_llama(home / f"models/{LONG}/long-f16.gguf", metadata={"llama.context_length": LONGEST})
    synthetic.tiny_bert(home / f"models/{BERT}/bert-f32.gguf")
    # An architecture for which the estimate is a guess; the engine never reads the file.
    other: dict[str, Value] = {"general.architecture": "cohere2", "cohere2.context_length": 4096}
    synthetic.tiny_llama(home / f"models/{OTHER}/other-f16.gguf", metadata=other)
    (home / f"models/{BROKEN}").mkdir()
    (home / f"models/{BROKEN}/broken.gguf").write_bytes(b"")
    with up(home) as service:
        until(lambda: all(m["params_string"] for m in service.models().values()), "every header has been read")
        until(
            lambda: all(estimate(service, model)["exact"] for model in (TINY, LONG)), "to the end, by this API process"
        )
        yield service
        assert service.instances() == {}
        assert service.send("GET", "/api/v1/models/load/status").json() == {"jobs": []}, "nothing was loaded"


def ask(service: Service, model: str, **fields: object) -> Reply:
    return service.post(PATH, {"model": model, **fields})


def estimate(service: Service, model: str, **fields: object) -> Any:
    reply = ask(service, model, **fields)
    assert reply.status == 200, reply.text
    return reply.json()


def test_an_estimate_reports_bytes_per_device_and_that_it_fits(service: Service) -> None:
    estimated = estimate(service, TINY)
    (worker,) = service.send("GET", "/api/v1/workers").json()["workers"]
    (device,) = estimated.pop("devices")
    total = device["weights_bytes"] + device["context_bytes"] + device["compute_bytes"]
    assert estimated == {
        "model": TINY,
        "fits": True,
        "total_bytes": total,
        "evicts": [],
        "max_context_length_that_fits": 4096,
        "exact": True,
    }
    assert (device["id"], device["worker"], device["total_bytes"]) == ("CPU", worker["name"], total)
    assert device["context_bytes"] == 4096 * TOKEN_BYTES
    assert 0.9 < device["weights_bytes"] / service.models()[TINY]["size_bytes"] <= 1
    assert 0 < device["free_bytes"] <= worker["devices"][0]["total_bytes"]


def test_every_field_has_the_same_effect_as_in_a_load(service: Service) -> None:
    def device(**fields: object) -> Any:
        return estimate(service, LONG, **fields)["devices"][0]

    default = device()
    assert device(context_length=1000)["context_bytes"] == 1024 * TOKEN_BYTES
    of_the_batch = default["compute_bytes"] - LOGITS_BYTES
    assert device(eval_batch_size=64)["compute_bytes"] == of_the_batch / 8 + LOGITS_BYTES
    assert device(physical_batch_size=64)["compute_bytes"] == of_the_batch / 8 + LOGITS_BYTES
    assert device(kv_cache_type="q8_0")["context_bytes"] == default["context_bytes"] * 34 / 64
    assert device(flash_attention=False)["compute_bytes"] > 2 * default["compute_bytes"]
    assert device(parallel=64, echo_load_config=True, force=True)["context_bytes"] == default["context_bytes"]
    assert estimate(service, BERT)["devices"][0]["context_bytes"] == 0


def test_an_estimate_that_does_not_fit_has_the_largest_context(service: Service) -> None:
    estimated = estimate(service, LONG, context_length=LONGEST)
    largest = estimated["max_context_length_that_fits"]
    assert not estimated["fits"]
    assert estimated["exact"]
    assert estimated["total_bytes"] > 4 << 40
    assert largest % 256 == 0
    free_bytes = estimated["devices"][0]["free_bytes"]
    # 10 % tolerance: the free memory changes meanwhile.
    assert estimate(service, LONG, context_length=largest)["total_bytes"] <= free_bytes * 1.1
    assert estimate(service, LONG, context_length=largest * 5 // 4)["total_bytes"] > free_bytes * 0.9


def test_an_unverified_architecture_makes_the_estimate_a_guess(service: Service) -> None:
    estimated = estimate(service, OTHER)
    assert not estimated["exact"]
    assert estimated["total_bytes"] > 0


@pytest.mark.parametrize(
    ("fields", "status", "kind", "code", "param"),
    [
        ({"model": "none"}, 404, "model_not_found", None, "model"),
        ({"model": BROKEN}, 500, "model_load_failed", "invalid_model_file", None),
        ({"model": TINY, "ttl": 5}, 400, "invalid_request", "unrecognized_keys", None),
        ({"context_length": 5}, 400, "invalid_request", "missing_required_parameter", "model"),
        ({"model": TINY, "context_length": "5"}, 400, "invalid_request", "invalid_type", "context_length"),
        ({"model": TINY, "context_length": 4097}, 400, "invalid_request", "invalid_value", "context_length"),
    ],
)
def test_an_estimate_and_a_load_refuse_in_the_same_words(
    service: Service, fields: dict[str, object], status: int, kind: str, code: str | None, param: str | None
) -> None:
    refused = service.post(PATH, fields)
    error(refused, status, kind, code, param)
    assert refused.text == service.post("/api/v1/models/load", fields).text


# ---- the command


def run(service: Service, *words: str) -> tuple[int, str, str]:
    command = Running(
        service.directory / "command", "load", "--estimate-only", *words, environ={"LOADSTONE_URL": service.url}
    )
    try:
        return command.popen.wait(60), command.stdout, command.stderr
    finally:
        command.kill()


def test_the_commands_exit_status_says_whether_the_load_fits(service: Service) -> None:
    status, out, err = run(service, TINY, "--context-length", "2048")
    assert (status, err) == (0, "")
    headings, row = out.splitlines()
    assert headings.split()[:3] == ["DEVICE", "WORKER", "WEIGHTS"]
    assert row.split()[0] == "CPU"
    assert row.split()[-2:] == ["yes", "4096"]
    status, out, err = run(service, LONG, "--context-length", str(LONGEST))
    assert status == 1
    assert out.splitlines()[1].split()[-2] == "no"
    assert err == ""


def test_the_command_prints_json_and_marks_a_guess(service: Service) -> None:
    status, out, _ = run(service, TINY, "--json")
    assert status == 0
    assert json.loads(out).keys() == estimate(service, TINY).keys()
    status, out, _ = run(service, LONG, "--json", "--context-length", str(LONGEST))
    assert (status, json.loads(out)["fits"]) == (1, False)
    status, _, err = run(service, OTHER)
    assert status == 0
    assert "approximate" in err


@pytest.mark.parametrize("option", [["--detach"], ["--idempotency-key", "k"]])
def test_the_command_refuses_options_of_a_real_load(service: Service, option: list[str]) -> None:
    status, out, err = run(service, TINY, *option)
    assert (status, out) == (2, "")
    assert "--estimate-only cannot be combined" in err
