"""Errors and their statuses: one table with a row for each error and no unused row."""

from __future__ import annotations

import ast
import asyncio
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import httpx
import msgspec
import pytest
from msgspec import UNSET

from api.app import create_app
from api.errors import STATUS, family_of, reply, status_of
from api.unserved import UNSERVED
from shared import errors, paths
from shared.errors import DownloadFailed, DownloadFailure, ErrorBody, LoadFailed, LoadFailure, ServiceError
from shared.settings import Settings

CONTRACT = {
    ("invalid_request", None): 400,
    ("invalid_request", "invalid_json"): 400,
    ("invalid_request", "unrecognized_keys"): 400,
    ("invalid_request", "invalid_union"): 400,
    ("invalid_request", "missing_required_parameter"): 400,
    ("invalid_request", "invalid_type"): 400,
    ("invalid_request", "invalid_value"): 400,
    ("invalid_request", "previous_response_not_found"): 400,
    ("invalid_request", "invalid_api_key"): 401,
    ("invalid_request", "forbidden_host"): 403,
    ("invalid_request", "insufficient_scope"): 403,
    ("invalid_request", "body_too_slow"): 408,
    ("invalid_request", "body_too_large"): 413,
    ("invalid_request", "unsupported_media_type"): 415,
    ("invalid_request", "job_already_finished"): 409,
    ("invalid_request", "model_in_use"): 409,
    ("invalid_request", "idempotency_key_reused"): 422,
    ("invalid_request", "client_too_slow"): 400,
    ("invalid_request", "not_supported"): 400,
    ("invalid_request", "context_length_exceeded"): 400,
    ("model_not_found", None): 404,
    ("model_not_found", "model_not_loaded"): 404,
    ("job_not_found", None): 404,
    ("too_many_requests", None): 429,
    ("too_many_requests", "queue_full"): 429,
    ("too_many_requests", "too_many_waiting"): 429,
    ("not_found", None): 404,
    ("method_not_allowed", None): 405,
    ("model_load_failed", "invalid_model_file"): 500,
    ("model_load_failed", "insufficient_memory"): 500,
    ("model_load_failed", "unsupported_model"): 500,
    ("model_load_failed", "engine_crashed"): 500,
    ("model_load_failed", "load_stalled"): 500,
    ("model_load_failed", "worker_lost"): 500,
    ("model_load_failed", "load_cancelled"): 409,
    ("download_failed", "gated_repository"): 403,
    ("download_failed", "hub_unavailable"): 502,
    ("download_failed", "invalid_hub_reply"): 502,
    ("download_failed", "checksum_mismatch"): 502,
    ("download_failed", "insufficient_disk"): 507,
    ("download_failed", "read_only_store"): 409,
    ("download_failed", "store_error"): 500,
    ("download_failed", "download_crashed"): 500,
    ("download_failed", "downloads_off"): 501,
    ("service_unavailable", None): 503,
    ("service_unavailable", "no_worker"): 503,
    ("service_unavailable", "queue_unavailable"): 503,
    ("service_unavailable", "queue_timeout"): 503,
    ("service_unavailable", "load_interrupted"): 503,
    ("service_unavailable", "no_route"): 503,
    ("service_unavailable", "model_unloaded"): 503,
    ("service_unavailable", "runner_lost"): 503,
    ("internal_error", None): 500,
    ("internal_error", "helper_crashed"): 500,
    ("not_implemented", None): 501,
    ("not_implemented", "chat_unavailable"): 501,
    ("not_implemented", "unsupported_operation"): 501,
    ("not_implemented", "integrations_not_supported"): 403,
}


def kinds(of: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """Yield every class of `shared.errors`; `api.loads.follow.ReportedFailure` only carries the body of another."""
    yield of
    for kind in of.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def instances() -> list[ServiceError]:
    """Return one error of each class and code."""
    coded = (LoadFailed, DownloadFailed)
    made: list[ServiceError] = [kind("a sentence") for kind in kinds() if kind not in coded]
    made += [DownloadFailed(code, "a sentence") for code in get_args(DownloadFailure)]
    return made + [LoadFailed(code, "llm", "p/m", "why") for code in get_args(LoadFailure)]


def bodies() -> dict[tuple[str, str | None], ErrorBody]:
    """Return the bodies of all errors by type and code."""
    every = [error.body() for error in instances()]
    return {(body.type, None if body.code is UNSET else body.code): body for body in every}


def test_every_error_has_the_status_of_the_contract() -> None:
    assert {key: status_of(body) for key, body in bodies().items()} == CONTRACT


def test_every_row_of_the_table_is_used() -> None:
    reached = set()
    for body in bodies().values():
        specific = f"{body.type}/{body.code}"
        reached.add(specific if specific in STATUS else body.type)
    assert set(STATUS) - reached == set()


def test_a_row_of_a_code_differs_from_the_row_of_its_type() -> None:
    for key, status in STATUS.items():
        kind, _, code = key.partition("/")
        assert not code or STATUS[kind] != status, key


def test_codes_are_unique_lower_case_names() -> None:
    codes = [kind.code for kind in kinds() if kind.code is not UNSET and "code" in vars(kind)]
    codes += get_args(LoadFailure) + get_args(DownloadFailure)
    assert len(codes) == len(set(codes))
    assert all(isinstance(code, str) and code.replace("_", "").isalpha() and code.islower() for code in codes)


def test_every_class_has_a_docstring() -> None:
    assert [kind for kind in kinds() if not kind.__doc__] == []


@pytest.mark.parametrize(("type_", "noun"), [("llm", "LLM"), ("embedding", "embedding model")])
def test_a_failed_load_names_its_model_and_the_reason(type_: str, noun: str) -> None:
    error = LoadFailed("engine_crashed", type_, "p/m", "it burst", needed=3)
    assert str(error) == f"Failed to load {noun} 'p/m': Error: it burst"
    assert error.body().detail == {"needed": 3}


@pytest.mark.parametrize("error", instances(), ids=lambda error: type(error).__name__)
def test_every_error_has_the_same_shape_on_the_wire(error: ServiceError) -> None:
    response = reply(error, paths.LOAD)
    document = msgspec.json.decode(response.body)
    assert set(document) == {"error"}
    assert set(document["error"]) <= {"type", "message", "code", "param", "detail"}
    assert {"type", "message"} <= set(document["error"])
    assert response.status_code == status_of(error.body())
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))


# ---- the forms of other APIs

OPENAI = {  # (status, type, code) of our errors; the first ones are those of the documented table
    ("invalid_request", "invalid_value"): (400, "invalid_request_error", "invalid_value"),
    ("invalid_request", "invalid_api_key"): (401, "invalid_request_error", "invalid_api_key"),
    ("invalid_request", "forbidden_host"): (403, "permission_error", "forbidden_host"),
    ("invalid_request", "insufficient_scope"): (403, "permission_error", "insufficient_scope"),
    ("invalid_request", "context_length_exceeded"): (400, "exceed_context_size_error", "context_length_exceeded"),
    ("model_not_found", None): (404, "invalid_request_error", "model_not_found"),
    ("model_not_found", "model_not_loaded"): (404, "invalid_request_error", "model_not_loaded"),
    ("not_found", None): (404, "invalid_request_error", None),
    ("method_not_allowed", None): (405, "invalid_request_error", "method_not_supported"),
    ("invalid_request", "body_too_large"): (413, "invalid_request_error", "request_too_large"),
    ("too_many_requests", "queue_full"): (429, "rate_limit_error", "queue_full"),
    ("internal_error", None): (500, "server_error", None),
    ("model_load_failed", "invalid_model_file"): (500, "server_error", "model_load_failed"),
    ("model_load_failed", "unsupported_model"): (500, "server_error", "model_load_failed"),
    ("model_load_failed", "engine_crashed"): (500, "server_error", "model_load_failed"),
    ("model_load_failed", "load_stalled"): (500, "server_error", "model_load_failed"),
    ("model_load_failed", "insufficient_memory"): (503, "unavailable_error", "insufficient_memory"),
    ("service_unavailable", "load_interrupted"): (503, "unavailable_error", "load_interrupted"),
    ("not_implemented", None): (501, "not_supported_error", "not_implemented"),
    ("not_implemented", "integrations_not_supported"): (403, "invalid_request_error", "integrations_not_supported"),
    ("service_unavailable", "queue_unavailable"): (503, "unavailable_error", "queue_unavailable"),
}
ANTHROPIC = {
    ("invalid_request", "invalid_value"): (400, "invalid_request_error", "invalid_value"),
    ("invalid_request", "invalid_api_key"): (401, "authentication_error", "invalid_api_key"),
    ("invalid_request", "forbidden_host"): (403, "permission_error", "forbidden_host"),
    ("invalid_request", "insufficient_scope"): (403, "permission_error", "insufficient_scope"),
    ("model_not_found", None): (404, "not_found_error", None),
    ("not_found", None): (404, "not_found_error", None),
    ("method_not_allowed", None): (405, "invalid_request_error", None),
    ("invalid_request", "body_too_large"): (413, "request_too_large", "body_too_large"),
    ("too_many_requests", "queue_full"): (429, "rate_limit_error", "queue_full"),
    ("internal_error", None): (500, "api_error", None),
    ("model_load_failed", "engine_crashed"): (500, "api_error", "engine_crashed"),
    ("model_load_failed", "insufficient_memory"): (529, "overloaded_error", "insufficient_memory"),
    ("service_unavailable", "load_interrupted"): (529, "overloaded_error", "load_interrupted"),
    ("not_implemented", None): (501, "api_error", "not_implemented"),
    ("service_unavailable", "queue_unavailable"): (529, "overloaded_error", "queue_unavailable"),
}


@pytest.mark.parametrize(
    ("path", "family"),
    [
        ("/", "native"),
        ("/v1", "openai"),
        ("/v1/", "openai"),
        ("/v1/models/acme/tiny", "openai"),
        ("/v1/nothing", "openai"),
        ("/v10/models", "native"),
        ("/api/v0/models", "openai"),
        ("/api/v0", "openai"),
        ("/api/v1/models", "native"),
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/v1/messages/nothing", "anthropic"),
        ("/v1/messages2", "openai"),
        ("/rerank", "openai"),
        ("/tokenize", "openai"),
    ],
)
def test_a_path_tells_the_form_of_its_errors(path: str, family: str) -> None:
    assert family_of(path) == family


def sent(error: ServiceError, path: str) -> tuple[int, dict[str, Any], Any]:
    """Return the status, the error and the whole body of the reply at a path."""
    response = reply(error, path)
    body = msgspec.json.decode(response.body)
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503, 529))
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    failed_to_load = isinstance(error, LoadFailed) and response.status_code == 500
    is_final = response.status_code == 501 or isinstance(error, errors.RequestFailed) or failed_to_load
    assert response.headers.get("x-should-retry") == ("false" if is_final else None)
    return response.status_code, body["error"], body


@pytest.mark.parametrize("error", instances(), ids=lambda error: type(error).__name__)
def test_every_error_has_openais_form_below_v1(error: ServiceError) -> None:
    status, fields, body = sent(error, "/v1/models")
    assert list(body) == ["error"]
    assert set(fields) == {"message", "type", "param", "code"}, "all of them: clients read them without a check"
    assert fields["message"] == str(error)
    ours = (error.body().type, None if error.code is UNSET else error.code)
    assert (status, fields["type"], fields["code"]) == OPENAI.get(ours, (status, fields["type"], fields["code"]))
    assert status == (503 if error.code == "insufficient_memory" else status_of(error.body()))


@pytest.mark.parametrize("error", instances(), ids=lambda error: type(error).__name__)
def test_every_error_has_anthropics_form_below_messages(error: ServiceError) -> None:
    status, fields, body = sent(error, "/v1/messages")
    assert (set(body), body["type"]) == ({"type", "error"}, "error")
    assert set(fields) - {"code"} == {"type", "message"}
    assert fields["message"] == str(error)
    ours = (error.body().type, None if error.code is UNSET else error.code)
    expected = ANTHROPIC.get(ours, (status, fields["type"], fields.get("code")))
    assert (status, fields["type"], fields.get("code")) == expected


async def test_a_fault_has_the_form_of_its_path() -> None:
    """Without its lifespan, the application lacks what these routes use."""
    app = create_app(Settings(), asyncio.Event())
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    message = "Internal error. See the server log for details."
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost:1234") as http:
        native, openai = await http.get("/api/v1/models"), await http.get("/v1/models")
    assert (native.status_code, native.json()) == (500, {"error": {"type": "internal_error", "message": message}})
    error = {"message": message, "type": "server_error", "param": None, "code": None}
    assert (openai.status_code, openai.json()) == (500, {"error": error})


def test_the_tables_of_other_forms_name_errors_that_exist() -> None:
    assert OPENAI.keys() <= bodies().keys()
    assert ANTHROPIC.keys() <= bodies().keys()


# By these words clients know that a prompt does not fit; they then shorten the conversation, and send it again.
OVERFLOW = re.compile(
    r"context (length|window|limit|size)|maximum context|tokens? exceeds?|too many tokens|(input|prompt) is too long"
)
MEANT = {"shared/errors.py", "api/anthropic/errors.py", "shared/settings.py"}  # the last one is about the server


def sentences() -> Iterator[str]:
    """Yield the texts in the source of what refuses requests, without docstrings."""
    root = Path(errors.__file__).parents[1]
    for path in (path for name in ("api", "shared", "worker") for path in (root / name).rglob("*.py")):
        if str(path.relative_to(root)) not in MEANT:
            nodes = [*ast.walk(ast.parse(path.read_text()))]
            docstrings = {node.value for node in nodes if isinstance(node, ast.Expr)}
            texts = (node for node in nodes if isinstance(node, ast.Constant) and node not in docstrings)
            yield from (text.value for text in texts if isinstance(text.value, str))


def test_no_other_error_has_the_words_of_an_overflow() -> None:
    assert [sentence for sentence in sentences() if OVERFLOW.search(sentence.lower())] == []
    assert OVERFLOW.search(str(errors.context_length_exceeded(2, 1, "messages")))


def test_the_param_of_an_error_is_kept() -> None:
    assert sent(errors.InvalidValue("no", param="limit"), "/v1/models")[1]["param"] == "limit"
    assert sent(errors.InvalidValue("no"), "/v1/models")[1]["param"] is None


def test_no_unserved_route_is_listed_twice() -> None:
    assert len(UNSERVED) == len(set(UNSERVED))
