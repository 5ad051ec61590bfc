"""Errors and their statuses: one table with a row for each error and no unused row."""

from __future__ import annotations

from collections.abc import Iterator
from typing import get_args

import msgspec
import pytest
from msgspec import UNSET

from api.errors import STATUS, reply, status_of
from shared import errors
from shared.errors import ErrorBody, LoadFailed, LoadFailure, ServiceError

CONTRACT = {
    ("invalid_request", None): 400,
    ("invalid_request", "invalid_json"): 400,
    ("invalid_request", "unrecognized_keys"): 400,
    ("invalid_request", "missing_required_parameter"): 400,
    ("invalid_request", "invalid_type"): 400,
    ("invalid_request", "invalid_value"): 400,
    ("invalid_request", "invalid_api_key"): 401,
    ("invalid_request", "forbidden_host"): 403,
    ("invalid_request", "body_too_large"): 413,
    ("invalid_request", "unsupported_media_type"): 415,
    ("invalid_request", "job_already_finished"): 409,
    ("invalid_request", "idempotency_key_reused"): 422,
    ("model_not_found", None): 404,
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
    ("service_unavailable", None): 503,
    ("service_unavailable", "no_worker"): 503,
    ("service_unavailable", "queue_unavailable"): 503,
    ("internal_error", None): 500,
}


def kinds(of: type[ServiceError] = ServiceError) -> Iterator[type[ServiceError]]:
    """Yield every class of `shared.errors`; `api.loads.follow.ReportedFailure` only carries the body of another."""
    yield of
    for kind in of.__subclasses__():
        if kind.__module__ == errors.__name__:
            yield from kinds(kind)


def instances() -> list[ServiceError]:
    """Return one error of each class and code."""
    errors_without_code: list[ServiceError] = [kind("a sentence") for kind in kinds() if kind is not LoadFailed]
    return errors_without_code + [LoadFailed(code, "llm", "p/m", "why") for code in get_args(LoadFailure)]


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
    codes += get_args(LoadFailure)
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
    response = reply(error)
    document = msgspec.json.decode(response.body)
    assert set(document) == {"error"}
    assert set(document["error"]) <= {"type", "message", "code", "param", "detail"}
    assert {"type", "message"} <= set(document["error"])
    assert response.status_code == status_of(error.body())
    assert ("www-authenticate" in response.headers) == (response.status_code == 401)
    assert ("retry-after" in response.headers) == (response.status_code in (429, 503))
