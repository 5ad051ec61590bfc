"""Structured output through the whole service, with a tiny model of random weights."""

from __future__ import annotations

import json
from typing import Any

import jsonschema_rs
import pytest

from shared.synthetic import tokenizers
from tests.support.chat import answered, ask, chunks
from tests.support.service import TINY, Service, openai_error

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "born": {"type": "integer", "minimum": 0, "maximum": 9999},
    },
    "required": ["name", "born"],
    "additionalProperties": False,
}
FORMAT = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON}}


@pytest.fixture
def model(service: Service) -> str:
    return str(service.loaded(TINY)["instance_id"])


@pytest.mark.parametrize("fields", [{"response_format": FORMAT}, {"json_schema": PERSON}], ids=["openai", "llama.cpp"])
def test_an_answer_is_json_of_its_schema(service: Service, model: str, fields: dict[str, Any]) -> None:
    reply = answered(service, n=2, logprobs=True, **fields)
    assert {choice["finish_reason"] for choice in reply["choices"]} == {"stop"}
    for choice in reply["choices"]:
        jsonschema_rs.validate(PERSON, json.loads(choice["message"]["content"]))


def test_a_streamed_answer_is_json_of_its_schema(service: Service, model: str) -> None:
    choices = [choice for chunk in chunks(service, response_format=FORMAT) for choice in chunk["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    jsonschema_rs.validate(PERSON, json.loads(text))


OBJECT = {"type": "json_object"}


@pytest.mark.parametrize(
    "response_format", [OBJECT, {**OBJECT, "schema": {"type": "object", "additionalProperties": False}}]
)
def test_an_answer_is_an_object(service: Service, model: str, response_format: dict[str, Any]) -> None:
    """A model that would only write braces, in the wrong order."""
    tokens: Any = tokenizers.spm()["tokenizer.ggml.tokens"]
    fields: dict[str, Any] = {"logit_bias": {tokens.index("}"): 100, tokens.index("{"): 50}, "max_tokens": 5}
    assert answered(service, **fields)["choices"][0]["message"]["content"] == "}}}}}"
    (choice,) = answered(service, response_format=response_format, **fields)["choices"]
    assert (json.loads(choice["message"]["content"]), choice["finish_reason"]) == ({}, "stop")


def test_an_answer_follows_its_grammar(service: Service, model: str) -> None:
    reply = answered(service, grammar='root ::= ("yes" | "no")', n=3, temperature=1)
    assert {choice["message"]["content"] for choice in reply["choices"]} <= {"yes", "no"}
    error = ask(service, grammar="root ::= (")
    message = openai_error(error, 400, "invalid_request_error", "invalid_value", "grammar")
    assert message.startswith("Failed to parse"), "as llama.cpp's server says it"
    assert "')'" in message


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "array", "uniqueItems": True}, "uniqueItems"),
        ({"type": "string", "format": "phone"}, "phone"),
        ({"minimum": 3, "maximum": 1, "type": "integer"}, "Unsatisfiable"),
        ({"allOf": [{"pattern": f"^.*a.{{{i}}}$"} for i in range(40)], "type": "string"}, "longer than"),
    ],
    ids=["keyword", "format", "empty", "hostile"],
)
def test_what_cannot_be_enforced_is_refused_with_the_reason(
    service: Service, model: str, schema: dict[str, Any], reason: str
) -> None:
    reply = ask(service, json_schema=schema)
    assert reason in openai_error(reply, 400, "invalid_request_error", "invalid_value", "response_format")
    answered(service, response_format=FORMAT)
