"""Every error of the documented table, produced by the real service."""

from __future__ import annotations

import gzip
import json
import os
import re
import resource
import signal
import socket
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import (
    JSON,
    Client,
    RedisServer,
    Reply,
    Running,
    Service,
    check_keys,
    error,
    go_on,
    is_alive,
    meanwhile,
    state,
    until,
    up,
)

LOAD, UNLOAD, LIST = "/api/v1/models/load", "/api/v1/models/unload", "/api/v1/models"
TINY, MOE, LONG = "acme/tiny", "acme/moe", "acme/long"
TOKENS = ("user:pa:ss", "s3cr3t-token")
MIB = 1 << 20
Defect = Callable[[Path], object]

# Defects that llama.cpp finds in a file with a valid header: the error's code, and a pattern for its message.
DEFECTS: dict[str, tuple[Defect, str, str]] = {
    "unknown-architecture": (
        lambda path: synthetic.tiny_llama(
            path, metadata={"general.architecture": "llamx", "llamx.context_length": 4096, "llamx.block_count": 4}
        ),
        "unsupported_model",
        r"unknown model architecture: 'llamx'",
    ),
    "missing-tensor": (
        lambda path: synthetic.tiny_llama(path, drop=["blk.1.ffn_up.weight"]),
        "invalid_model_file",
        r"blk\.1\.ffn_up\.weight",
    ),
    "missing-hyperparameter": (
        lambda path: synthetic.tiny_llama(path, drop=["llama.attention.layer_norm_rms_epsilon"]),
        "invalid_model_file",
        r"llama\.attention\.layer_norm_rms_epsilon",
    ),
    "unknown-tokenizer": (
        lambda path: synthetic.tiny_llama(path, metadata={"tokenizer.ggml.model": "runes"}),
        "unsupported_model",
        r"unknown tokenizer: 'runes'",
    ),
    "truncated-data": (
        lambda path: os.truncate(synthetic.tiny_llama(path), 400_000),
        "invalid_model_file",
        r"not within the file bounds|truncated|ends|incomplete",
    ),
    "too-many-experts-used": (  # unless detected before, an assertion of llama.cpp aborts the process
        lambda path: synthetic.tiny_moe(path, metadata={"qwen3moe.expert_used_count": 9}),
        "invalid_model_file|engine_crashed",
        r"expert",
    ),
    "aborts-the-engine": (
        lambda path: synthetic.tiny_llama(path, metadata={"llama.attention.head_count": 0x7FFFFFFF}),
        "invalid_model_file|engine_crashed",
        r".",
    ),
}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("errors")
    models = home / "models"
    synthetic.tiny_llama(models / f"{TINY}/tiny-f16.gguf")
    synthetic.tiny_moe(models / f"{MOE}/moe-f16.gguf")
    synthetic.tiny_llama(models / f"{LONG}/long-f16.gguf", metadata={"llama.context_length": 4 * MIB})
    synthetic.tiny_bert(models / "acme/bert/bert-f32.gguf")
    synthetic.tiny_bert(models / "acme/bad-bert/bert-f32.gguf", drop=["blk.0.attn_output.weight"])
    synthetic.lora(models / "acme/lora/lora.gguf")
    for name, (make, _, _) in DEFECTS.items():
        make(models / f"defects/{name}/{name}.gguf")
    (models / "acme/garbage").mkdir()
    (models / "acme/garbage/garbage.gguf").write_bytes(b"not a model")
    with up(home, LOADSTONE_STALL_LIMIT_S="2") as running:
        yield running
        assert str(home) not in running.stderr


@pytest.fixture
def unloaded(service: Service) -> Iterator[Service]:
    """Return the module's service with nothing loaded and a warm runner; unload everything after the test."""
    service.loaded(TINY)
    service.unload_all()
    yield service
    service.unload_all()


def refusal(reply: Reply, code: str | None, param: str | None = None, status: int = 400) -> str:
    return str(error(reply, status, "invalid_request", code, param)["message"])


# ---- the body


@pytest.mark.parametrize(
    ("body", "where"),
    [
        (b"", ""),
        (b"model", "byte 0"),
        (b'{"model": "x",}', "byte 14"),
        (b'{"model": nan}', "byte 14"),
        (b'{"model": "x"} {}', "byte 16"),
        (b'{"model": "x', "truncated"),
        (b'{"model": "\xff\xfe"}', ""),
        (b'{"model": "\\ud800"}', ""),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"model": ' + b'{"a": ' * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_invalid_json_is_refused_with_its_position(service: Service, path: str, body: bytes, where: str) -> None:
    assert where in refusal(service.post(path, body), "invalid_json")


@pytest.mark.parametrize("body", [b"null", b"[]", b'"acme/tiny"', b"3", b"true", b"1.5"])
@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_a_body_that_is_not_an_object_is_refused(service: Service, path: str, body: bytes) -> None:
    assert "object" in refusal(service.post(path, body), "invalid_type")


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        (["ttl"], "'ttl'"),
        (["identifier"], "'identifier'"),
        (["stream"], "'stream'"),
        (["ttl", "zeal", "identifier", "stream"], "'ttl', 'zeal', 'identifier', 'stream'"),
        (["Context_Length"], "'Context_Length'"),
        ([""], "''"),
    ],
)
def test_all_unrecognized_keys_are_named(service: Service, keys: list[str], named: str) -> None:
    reply = service.load(TINY, **dict.fromkeys(keys, 1))
    assert refusal(reply, "unrecognized_keys") == f"Unrecognized key(s) in object: {named}"


def test_unload_refuses_unrecognized_keys(service: Service) -> None:
    reply = service.post(UNLOAD, {"instance_id": "x", "model": "y"})
    assert refusal(reply, "unrecognized_keys") == "Unrecognized key(s) in object: 'model'"


@pytest.mark.parametrize(
    ("path", "field", "sentence"),
    [
        (LOAD, "model", '"model" is required'),
        (UNLOAD, "instance_id", "Missing required field 'instance_id'"),
    ],
)
def test_a_missing_field_is_named(service: Service, path: str, field: str, sentence: str) -> None:
    for body in ({}, {"ttl": 3}):  # a missing key is reported before an unrecognized one
        assert refusal(service.post(path, body), "missing_required_parameter", field) == sentence


@pytest.mark.parametrize(
    ("field", "value", "expected", "got"),
    [
        ("model", None, "string", "null"),
        ("model", 3, "string", "integer"),
        ("model", ["x"], "string", "array"),
        ("context_length", None, "integer", "null"),
        ("context_length", "8192", "integer", "string"),
        ("context_length", True, "integer", "boolean"),
        ("context_length", 8192.5, "integer", "number"),
        ("context_length", {}, "integer", "object"),
        ("eval_batch_size", "1", "integer", "string"),
        ("physical_batch_size", True, "integer", "boolean"),
        ("flash_attention", 1, "boolean", "integer"),
        ("flash_attention", None, "boolean", "null"),
        ("num_experts", False, "integer", "boolean"),
        ("offload_kv_cache_to_gpu", "true", "boolean", "string"),
        ("parallel", None, "integer", "null"),
        ("echo_load_config", None, "boolean", "null"),
        ("echo_load_config", "yes", "boolean", "string"),
    ],
)
def test_a_wrong_type_is_named_with_the_expected_type(
    service: Service, field: str, value: object, expected: str, got: str
) -> None:
    message = refusal(service.post(LOAD, {"model": MOE, field: value}), "invalid_type", field)
    assert f"'{field}'" in message
    assert re.search(rf"expected {expected}, got {got}\b", message)


@pytest.mark.parametrize("value", [None, 3, ["x"], {}])
def test_an_instance_id_must_be_a_string(service: Service, value: object) -> None:
    assert "expected string" in refusal(service.post(UNLOAD, {"instance_id": value}), "invalid_type", "instance_id")


@pytest.mark.parametrize(
    ("model", "field", "value", "says"),
    [
        (MOE, "context_length", 0, "1"),
        (MOE, "context_length", -4096, "1"),
        (MOE, "context_length", 4097, "4096"),
        (MOE, "context_length", 2**64, "2147483647"),
        (MOE, "context_length", 10**30, "2147483647"),
        (MOE, "context_length", 1e300, "2147483647"),
        ("acme/bert", "context_length", 100_000, "maximum"),
        (MOE, "eval_batch_size", 0, "1"),
        (MOE, "physical_batch_size", 0, "1"),
        (MOE, "num_experts", 0, "1"),
        (MOE, "num_experts", -1, "1"),
        (MOE, "num_experts", 9, "8"),
        (MOE, "num_experts", 2**32 + 3, "2147483647"),
        (MOE, "parallel", 0, "1"),
        (MOE, "parallel", 65, "64"),
        (MOE, "kv_cache_type", "q5_0", "q8_0"),
    ],
)
def test_a_value_out_of_range_is_named_with_its_limit(
    service: Service, model: str, field: str, value: float, says: str
) -> None:
    message = refusal(service.load(model, **{field: value}), "invalid_value", field)
    assert f"'{field}'" in message
    assert says in message


def test_the_maximum_is_also_in_the_error_detail(service: Service) -> None:
    failure = error(service.load(MOE, context_length=5000), 400, "invalid_request", "invalid_value", "context_length")
    assert failure["detail"] == {"maximum": 4096}


def test_an_integral_float_counts_as_an_integer(unloaded: Service) -> None:
    reply = unloaded.post(
        LOAD, b'{"model": "acme/tiny", "context_length": 2048.0, "parallel": 2e0, "echo_load_config": true}'
    )
    assert reply.status == 200, reply.text
    assert (reply.json()["load_config"]["context_length"], reply.json()["load_config"]["parallel"]) == (2048, 2)


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        ({"ttl": 1, "context_length": "x"}, "missing_required_parameter", "model"),
        ({"model": 3, "ttl": 1, "context_length": 0}, "unrecognized_keys", None),
        ({"model": "nobody/has-it", "context_length": 0, "flash_attention": 1}, "invalid_type", "flash_attention"),
        ({"model": "nobody/has-it", "context_length": 0}, "invalid_value", "context_length"),
    ],
)
def test_refusals_come_in_the_documented_order(
    service: Service, body: dict[str, object], code: str, param: str | None
) -> None:
    refusal(service.post(LOAD, body), code, param)


# ---- names


@pytest.mark.parametrize("model", ["nobody/has-it", "", "../../etc/passwd", "x" * 5000, "modèle/é"])
def test_an_unknown_model_is_not_found(service: Service, model: str) -> None:
    reply = service.load(model, context_length=10**9)
    assert reply.status == 404
    body = reply.json()["error"]
    assert (body["type"], body["message"]) == ("model_not_found", f"Model {model} not found in downloaded models")


@pytest.mark.parametrize("instance_id", ["nobody/has-it", TINY, f"{TINY}:2", ""])
def test_an_instance_that_is_not_loaded_cannot_be_unloaded(service: Service, instance_id: str) -> None:
    failure = error(service.unload(instance_id), 404, "model_not_found", param="instance_id")
    assert failure["message"] == f"Model with instance identifier '{instance_id}' is not loaded."


def test_a_second_unload_of_an_instance_is_not_found(unloaded: Service) -> None:
    unloaded.loaded(TINY)
    assert unloaded.unload(TINY).status == 200
    error(unloaded.unload(TINY), 404, "model_not_found", param="instance_id")


@pytest.mark.parametrize(
    ("method", "path"), [("GET", "/docs/"), ("GET", "/x"), ("POST", "/api/v1/loads"), ("GET", "/api/v1/models/")]
)
def test_an_unknown_path_is_named(service: Service, method: str, path: str) -> None:
    failure = error(service.send(method, path), 404, "not_found")
    assert failure["message"] == f"Unexpected endpoint or method. ({method} {path})"


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [("GET", LOAD, "POST"), ("PUT", UNLOAD, "POST"), ("DELETE", LIST, "GET"), ("POST", LIST, "GET")],
)
def test_a_wrong_method_is_answered_with_the_allowed_ones(
    service: Service, method: str, path: str, allowed: str
) -> None:
    reply = service.send(method, path)
    assert error(reply, 405, "method_not_allowed")["message"] == f"Unexpected endpoint or method. ({method} {path})"
    assert allowed in reply.headers["allow"].split(", ")


# ---- headers and size of a request


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "application/jsonx", None])
@pytest.mark.parametrize("path", [LOAD, UNLOAD])
def test_a_body_not_declared_as_json_is_refused(service: Service, path: str, kind: str | None) -> None:
    headers = {"Content-Type": kind} if kind else {}
    reply = service.send("POST", path, content=b'{"model": "x"}', headers=headers)
    assert "application/json" in refusal(reply, "unsupported_media_type", status=415)


@pytest.mark.parametrize("kind", ["application/json; charset=utf-8", "Application/JSON"])
def test_variants_of_the_json_content_type_are_accepted(service: Service, kind: str) -> None:
    reply = service.send("POST", LOAD, content=b"{}", headers={"Content-Type": kind})
    refusal(reply, "missing_required_parameter", "model")


def test_a_compressed_body_is_refused_with_the_accepted_encoding(service: Service) -> None:
    headers = {**JSON, "Content-Encoding": "gzip"}
    reply = service.send("POST", LOAD, content=gzip.compress(b'{"model": "x"}'), headers=headers)
    assert "gzip" in refusal(reply, "unsupported_media_type", status=415)
    assert reply.headers["accept-encoding"] == "identity"


def test_a_byte_order_mark_before_the_body_is_ignored(service: Service) -> None:
    error(service.post(LOAD, b'\xef\xbb\xbf{"model": "nobody/has-it"}'), 404, "model_not_found", param="model")


def padded(n_bytes: int) -> bytes:
    start, end = b'{"model": "nobody/has-it"', b"}"
    return start + b" " * (n_bytes - len(start) - len(end)) + end


def test_a_body_may_have_one_mebibyte_and_no_more(service: Service) -> None:
    error(service.post(LOAD, padded(MIB)), 404, "model_not_found", param="model")
    assert "1,048,576" in refusal(service.post(LOAD, padded(MIB + 1)), "body_too_large", status=413)


def test_the_size_limit_applies_to_a_chunked_body(service: Service) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(17):
            yield b" " * (MIB // 16)

    refusal(service.send("POST", LOAD, content=chunks(), headers=JSON), "body_too_large", status=413)


def test_a_huge_body_is_refused_without_reading_it(service: Service, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    with huge.open("wb") as file:
        file.truncate(64 * MIB)
    url = "http://localhost:1234" + LOAD
    for how in ("", '-H "Transfer-Encoding: chunked"'):
        reply = service.shell(
            f'curl {url} -H "Content-Type: application/json" -H "Expect:" {how} --data-binary @{huge}'
        )
        refusal(reply, "body_too_large", status=413)


@pytest.mark.parametrize("host", ["evil.example", "evil.example:1234", "127.0.0.1.evil.example", "10.0.0.1", ""])
@pytest.mark.parametrize("path", [LIST, "/healthz"])
def test_without_tokens_the_host_header_must_name_this_machine(service: Service, path: str, host: str) -> None:
    refusal(service.send("GET", path, headers={"Host": host}), "forbidden_host", status=403)


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1234", "127.0.0.1:1", "[::1]:1234", "loadstone.localhost"])
def test_every_name_of_loopback_is_accepted(service: Service, host: str) -> None:
    assert service.send("GET", LIST, headers={"Host": host}).status == 200


def test_two_host_headers_are_refused(service: Service) -> None:
    head = b"GET /api/v1/models HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\nConnection: close\r\n\r\n"
    assert service.raw(head).startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize("path", [b"/healthz", b"/readyz"])
def test_a_probe_of_http_1_0_needs_no_host_header(service: Service, path: bytes) -> None:
    assert service.raw(b"GET " + path + b" HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert service.raw(b"GET /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 403 ")


def test_a_request_that_is_not_http_gets_400_and_does_no_harm(service: Service) -> None:
    assert service.raw(b"\x16\x03\x01 not http\r\n\r\n").startswith(b"HTTP/1.1 400 ")
    assert service.send("GET", LIST).status == 200


def test_a_client_that_leaves_within_its_body_is_no_fault(service: Service) -> None:
    """The end of the service checks that it logged no traceback."""
    with socket.create_connection(("127.0.0.1", service.port)) as connection:
        head = b"POST /api/v1/models/load HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        connection.sendall(head + b"Content-Length: 100\r\n\r\n{")
    until(lambda: 'status="499"' in service.send("GET", "/metrics").text, "the request has ended")


# ---- tokens


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("guarded")
    (home / "tokens").write_text("\n".join(TOKENS) + "\n")
    with up(home, "--demo", token=TOKENS[0], LOADSTONE_API_TOKENS_FILE=str(home / "tokens")) as running:
        yield running
        assert not any(token in running.stderr for token in TOKENS)


def authorized(service: Service, value: bytes | None, path: str = LIST, method: str = "GET") -> Reply:
    client = Client(service.url)  # unlike `service`, it sends no token
    try:
        headers = [(b"Authorization", value)] if value is not None else []
        return client.send(method, path, headers=headers)
    finally:
        client.close()


@pytest.mark.parametrize("value", [None, b"", b"Bearer", b"Basic dXNlcjpwYQ==", b"user:pa:ss"])
def test_a_missing_token_is_refused(guarded: Service, value: bytes | None) -> None:
    reply = authorized(guarded, value)
    assert (
        refusal(reply, "invalid_api_key", status=401)
        == "A bearer token is required: send the header 'Authorization: Bearer TOKEN'."
    )
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    "token", [b"wrong", b"user", b"user:pa", b"user:pa:ss:", b"USER:PA:SS", b"\xc3\xa9", b"s3cr3t-token,"]
)
def test_a_wrong_token_is_refused_and_not_repeated(guarded: Service, token: bytes) -> None:
    reply = authorized(guarded, b"Bearer " + token)
    assert refusal(reply, "invalid_api_key", status=401) == "The bearer token is invalid."
    assert reply.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("token", TOKENS)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER "])
def test_every_configured_token_is_accepted(guarded: Service, scheme: str, token: str) -> None:
    assert authorized(guarded, f"{scheme} {token}".encode()).status == 200


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_health_needs_no_token(guarded: Service, path: str) -> None:
    assert authorized(guarded, None, path).status == 200


@pytest.mark.parametrize(("method", "path"), [("GET", "/x"), ("PUT", LOAD), ("POST", UNLOAD), ("GET", "/healthz/")])
def test_without_a_token_nothing_else_is_revealed(guarded: Service, method: str, path: str) -> None:
    refusal(authorized(guarded, None, path, method), "invalid_api_key", status=401)


def test_with_tokens_any_host_header_is_accepted(guarded: Service) -> None:
    assert guarded.send("GET", LIST, headers={"Host": "models.example"}).status == 200


def test_the_documented_load_works_with_a_token(guarded: Service) -> None:
    command = """\
curl http://localhost:1234/api/v1/models/load \\
  -H "Authorization: Bearer $LM_API_TOKEN" \\
  -H "Content-Type: application/json" \\
  -d '{"model": "loadstone/demo-llm"}'
"""
    assert guarded.shell(command).status == 200
    assert guarded.unload("loadstone/demo-llm").status == 200


def test_the_commands_that_a_demo_prints_work_as_they_are(guarded: Service) -> None:
    until(lambda: "talk to it: " in guarded.stderr, "the commands are printed")
    for begin, field in {"load a demo model: ": "load_config", "talk to it: ": "choices"}.items():
        (command,) = re.findall(rf"^{begin}(curl .*)$", guarded.stderr, re.MULTILINE)
        environ = {**os.environ, "TOKEN": TOKENS[0]}
        done = subprocess.run(["sh", "-c", command], env=environ, capture_output=True, check=True)
        assert json.loads(done.stdout)[field]
    guarded.unload_all()


# ---- loads that fail


@pytest.mark.parametrize("name", DEFECTS)
def test_an_unusable_file_fails_its_load_with_the_engines_reason(service: Service, name: str) -> None:
    _, codes, says = DEFECTS[name]
    reply = service.load(f"defects/{name}")
    code = reply.json()["error"].get("code")
    assert code in codes.split("|"), reply.text
    message = error(reply, 500, "model_load_failed", code)["message"]
    assert message.startswith(f"Failed to load LLM 'defects/{name}': Error: ")
    reason = message.partition("Error: ")[2]
    assert re.search(says, reason), message
    assert "unknown error" not in reason.lower()
    assert service.instances() == {}


def test_a_failed_embedding_model_is_called_an_embedding_model(service: Service) -> None:
    failure = error(service.load("acme/bad-bert"), 500, "model_load_failed", "invalid_model_file")
    assert failure["message"].startswith("Failed to load embedding model 'acme/bad-bert': Error: ")
    assert "blk.0.attn_output.weight" in failure["message"]


def test_a_file_that_is_not_a_model_is_refused(service: Service) -> None:
    reply = service.load("acme/lora")
    assert "LoRA adapter" in error(reply, 500, "model_load_failed", reply.json()["error"]["code"])["message"]
    error(service.load("acme/garbage"), 500, "model_load_failed", "invalid_model_file")


def test_a_failed_load_frees_its_instance_id(unloaded: Service) -> None:
    for _ in range(2):
        error(unloaded.load("defects/missing-tensor"), 500, "model_load_failed", "invalid_model_file")
    with unloaded.redis() as redis:
        assert redis.hlen("names") == 0
        assert redis.scard("insts") == 0
        check_keys(redis)


def test_a_context_too_large_for_memory_is_insufficient_memory(unloaded: Service) -> None:
    runner = unloaded.warm_runner(0)
    limit = int(Path(f"/proc/{runner.pid}/statm").read_text().split()[0]) * resource.getpagesize() + 300 * MIB
    resource.prlimit(runner.pid, resource.RLIMIT_AS, (limit, limit))
    failure = error(unloaded.load(LONG, context_length=MIB), 500, "model_load_failed", "insufficient_memory")
    assert re.search(r"alloc|memory", failure["message"])
    assert not is_alive(runner)
    assert unloaded.loaded(LONG)["instance_id"] == LONG


@contextmanager
def loading(service: Service, model: str) -> Iterator[Any]:
    """Hold a load in the state `loading` by stopping its runner; yield the runner and the future reply."""
    with service.frozen() as runner, meanwhile(service.load, model) as reply:
        until(lambda: service.state(model) == "loading", f"{model} is loading")
        yield runner, reply


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGSEGV, signal.SIGABRT])
def test_a_runner_that_dies_while_loading_is_engine_crashed(unloaded: Service, signum: signal.Signals) -> None:
    with loading(unloaded, TINY) as (runner, reply):
        os.kill(runner.pid, signum)
        go_on(runner)
        failure = error(reply.result(60), 500, "model_load_failed", "engine_crashed")
    assert failure["message"].startswith(f"Failed to load LLM '{TINY}': Error: ")
    assert signum.name in failure["message"]
    assert unloaded.loaded(TINY, force=True)["instance_id"] == TINY


def test_a_file_changed_during_its_load_fails_that_load_only(unloaded: Service) -> None:
    path = unloaded.models_dir / "acme/changing/changing-f16.gguf"
    synthetic.tiny_llama(path)
    until(lambda: "acme/changing" in unloaded.models(), "the new model is listed")
    unloaded.loaded(TINY)
    with unloaded.frozen(1) as runner, meanwhile(unloaded.load, "acme/changing") as reply:
        until(lambda: unloaded.state("acme/changing") == "loading", "the model is loading")
        synthetic.tiny_moe(path, metadata={"qwen3moe.expert_used_count": 9})  # llama.cpp aborts on this file
        os.kill(runner.pid, signal.SIGCONT)
        failure = error(reply.result(60), 500, "model_load_failed", "invalid_model_file")
    assert "changed while it was loaded" in failure["message"], "not the abort of the engine"
    assert set(unloaded.instances()) == {TINY}
    path.unlink()


def test_a_load_without_progress_is_stalled(unloaded: Service) -> None:
    with loading(unloaded, TINY) as (runner, reply):
        failure = error(reply.result(60), 500, "model_load_failed", "load_stalled")
        assert "2 s" in failure["message"]
        assert not is_alive(runner)


def test_unloading_a_loading_or_queued_instance_cancels_it(unloaded: Service) -> None:
    with loading(unloaded, TINY) as (runner, first), meanwhile(unloaded.load, MOE) as second:
        until(lambda: unloaded.state(MOE) == "queued", "the second load is queued")
        assert unloaded.instances() == {}
        assert unloaded.unload(MOE).json() == {"instance_id": MOE}
        failure = error(second.result(60), 409, "model_load_failed", "load_cancelled")
        assert failure["message"] == f"Failed to load LLM '{MOE}': Error: the load was cancelled"
        assert not first.done()
        assert unloaded.unload(TINY).json() == {"instance_id": TINY}
        assert not is_alive(runner)
        error(first.result(60), 409, "model_load_failed", "load_cancelled")
    error(unloaded.unload(TINY), 404, "model_not_found", param="instance_id")


def test_an_instance_whose_runner_dies_leaves_the_list(unloaded: Service) -> None:
    unloaded.loaded(TINY)
    unloaded.warm_runner(1)
    os.kill(unloaded.runners()[0].pid, signal.SIGKILL)
    until(lambda: not unloaded.instances(), "the instance leaves the list")
    error(unloaded.unload(TINY), 404, "model_not_found", param="instance_id")
    assert unloaded.loaded(TINY)["instance_id"] == TINY


# ---- a pool: an API, a worker and an external Redis


class Pool(Client):
    """`loadstone api` and `loadstone worker` on one external Redis."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.redis = RedisServer(home / "redis")
        self.environ = {"LOADSTONE_REDIS_URL": self.redis.url, "LOADSTONE_LEASE_S": "3"}
        synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
        self.worker = self.start_worker()
        self.start_api()

    def start_api(self) -> None:
        self.api = Running(self.home / "api", "api", "--port", "0", environ=self.environ)
        Client.__init__(self, self.api.first_line().removeprefix("listening: "))

    def start_worker(self) -> Running:
        flags = ["--models-dir", str(self.home / "models"), "--data-dir", str(self.home / "data")]
        return Running(self.home / "worker", "worker", *flags, environ=self.environ)

    def wait_ready(self, within_s: float = 10.0) -> None:
        until(self.is_ready, f"the pool is ready and {TINY} is listed", within_s)

    def is_ready(self) -> bool:
        return self.send("GET", "/readyz").status == 200 and TINY in self.models()

    def restore(self) -> None:
        """Restart the parts that are down; end with nothing loaded and a warm runner."""
        if self.redis.popen.poll() is not None:
            self.redis.start()
        if self.worker.popen.poll() is not None:
            self.worker = self.start_worker()
        try:
            self.wait_ready(5)
        except AssertionError:
            self.close()
            self.worker.kill()
            self.api.kill()
            self.worker = self.start_worker()
            until(lambda: "action=ready" in self.worker.stderr, "the worker is ready")
            self.start_api()
            self.wait_ready()
        self.loaded(TINY)  # after a load a warm runner is waiting
        self.unload_all()

    def state(self, instance_id: str) -> str | None:
        with self.redis.client() as redis:
            return state(redis, instance_id)


@pytest.fixture(scope="module")
def the_pool(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    pool = Pool(tmp_path_factory.mktemp("pool"))
    try:
        pool.wait_ready()
        yield pool
        with pool.redis.client() as redis:
            check_keys(redis)
        pool.worker.stop()
        pool.api.stop()
        assert (pool.worker.stdout, len(pool.api.stdout.splitlines())) == ("", 1)
    finally:
        pool.close()
        pool.worker.kill()
        pool.api.kill()
        pool.redis.kill()


@pytest.fixture
def pool(the_pool: Pool) -> Iterator[Pool]:
    """Return the pool with every process running, nothing loaded and a warm runner; restore it after the test."""
    the_pool.restore()
    yield the_pool
    the_pool.restore()


def unavailable(reply: Reply, code: str) -> str:
    failure = error(reply, 503, "service_unavailable", code)
    assert int(reply.headers["retry-after"]) > 0
    return str(failure["message"])


def test_a_known_model_without_a_worker_is_no_worker(pool: Pool) -> None:
    pool.worker.stop()
    until(lambda: pool.models() == {}, "the model list is empty")
    assert TINY in unavailable(pool.load(TINY), "no_worker")
    error(pool.load("nobody/has-it"), 404, "model_not_found", param="model")
    ready = pool.send("GET", "/readyz")
    assert (ready.status, ready.text) == (503, "no worker holds a lease\n")
    assert ready.headers["retry-after"]
    assert pool.send("GET", "/healthz").status == 200
    pool.worker = pool.start_worker()
    pool.wait_ready()
    assert pool.loaded(TINY)["status"] == "loaded"


def check_all_unavailable(pool: Pool) -> None:
    """Check that each request that needs Redis is answered with queue_unavailable."""
    for send in (partial(pool.load, TINY), partial(pool.unload, TINY), partial(pool.send, "GET", LIST)):
        assert "Redis" in unavailable(send(), "queue_unavailable")
    for path in ("/v1/models", f"/v1/models/{TINY}", "/api/v0/models", f"/api/v0/models/{TINY}"):
        reply = pool.send("GET", path)
        failure = reply.json()["error"]
        assert (reply.status, failure["type"], failure["code"]) == (503, "unavailable_error", "queue_unavailable")
        assert int(reply.headers["retry-after"]) > 0
    ready = pool.send("GET", "/readyz")
    assert (ready.status, ready.text) == (503, "Redis does not answer\n")
    assert pool.send("GET", "/healthz").status == 200


def test_a_dead_redis_is_queue_unavailable_until_it_is_back(pool: Pool) -> None:
    pool.loaded(TINY)
    pool.redis.kill()
    check_all_unavailable(pool)
    pool.redis.start()
    pool.wait_ready()  # the API may still count an old lease that is about to expire
    until(lambda: set(pool.instances()) == {TINY}, "the loaded instance is kept")
    assert pool.loaded(TINY)["instance_id"] == f"{TINY}:2"


def test_a_hanging_redis_is_queue_unavailable_within_seconds(pool: Pool) -> None:
    os.kill(pool.redis.popen.pid, signal.SIGSTOP)
    try:
        unavailable(pool.load(TINY), "queue_unavailable")  # while it hangs still: nobody waited for its end
    finally:
        os.kill(pool.redis.popen.pid, signal.SIGCONT)
    pool.wait_ready()
    assert pool.load(TINY).status == 200


def test_a_waiter_gets_503_when_redis_dies_and_the_load_goes_on(pool: Pool) -> None:
    with pool.worker.frozen(), meanwhile(pool.load, TINY) as reply:
        until(lambda: pool.state(TINY) == "loading", "the model is loading")
        pool.redis.kill()
        unavailable(reply.result(60), "queue_unavailable")
    pool.redis.start()
    pool.wait_ready()
    until(lambda: set(pool.instances()) == {TINY}, "the load completed without its waiter")


def test_a_waiter_gets_503_when_redis_is_emptied(pool: Pool) -> None:
    with pool.worker.frozen(), meanwhile(pool.load, TINY) as reply:
        until(lambda: pool.state(TINY) == "loading", "the model is loading")
        with pool.redis.client() as redis:
            redis.flushall()
        unavailable(reply.result(60), "queue_unavailable")


def test_a_pool_recovers_after_its_redis_was_emptied(pool: Pool) -> None:
    with pool.redis.client() as redis:
        redis.flushall()
    until(lambda: pool.models() == {}, "the API lists no models")
    pool.wait_ready()
    assert pool.loaded(TINY)["instance_id"] == TINY
