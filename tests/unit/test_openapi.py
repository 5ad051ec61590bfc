"""The OpenAPI document: valid, complete, and derived from the types and the status table of the service."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema_rs
import pytest
from schemathesis.specs.openapi.definitions import OPENAPI_31_VALIDATOR

from api.access import ACCESS, OPEN_PATHS
from api.errors import STATUS, family_of
from api.openapi import page
from api.openapi.document import bodies, document
from api.openapi.operations import EXAMPLES, OPEN, OPERATIONS, PARAMETERS
from api.routes import ROUTES
from shared.errors import ClientTooSlow, ServiceError
from shared.schema.http import GPURequest, LoadRequest, UnloadRequest
from tests.unit.test_errors import kinds

DOCUMENT = document()
ROUTED = {
    (method, route.path)
    for route in ROUTES
    if route.include_in_schema
    for method in route.methods or ()
    if method != "HEAD"
}
OPERATION_IDS = [operation["operationId"] for item in DOCUMENT["paths"].values() for operation in item.values()]


def within(node: Any) -> Iterator[dict[str, Any]]:
    """Yield every object of the document."""
    if isinstance(node, dict):
        yield node
    for value in node.values() if isinstance(node, dict) else node if isinstance(node, list) else ():
        yield from within(value)


def errors(node: Any) -> set[tuple[str, str | None]]:
    """Return the types and codes of the errors of a reply or of the whole document."""
    shapes = [shape for reply in within(node) for part in reply.get("allOf", []) for shape in within(part)]
    named = [shape["properties"] for shape in shapes if "type" in shape.get("properties", {})]
    return {(each["type"]["const"], each.get("code", {}).get("const")) for each in named}


def test_the_document_is_valid_openapi_31() -> None:
    OPENAPI_31_VALIDATOR.validate(json.loads(json.dumps(DOCUMENT)))
    for schema in DOCUMENT["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


def test_the_document_has_exactly_the_routes() -> None:
    assert set(OPERATIONS) == ROUTED
    described = {(method.upper(), path) for path, item in DOCUMENT["paths"].items() for method in item}
    assert described == ROUTED
    assert len(OPERATION_IDS) == len(set(OPERATION_IDS))


IN_STREAMS = {ClientTooSlow}  # never the error of a reply


def test_the_document_has_every_error_with_its_status() -> None:
    listed = {path: {*operation.errors} for (_, path), operation in OPERATIONS.items()}
    compatible = set().union(*(listed[path] for path in listed if family_of(path) != "native"))
    ours = set().union(*(listed[path] for path in listed if family_of(path) == "native"))
    # A base class of errors is never a reply itself.
    bases = {kind for kind in kinds() if kind.__subclasses__() and kind not in {ServiceError, *ours, *compatible}}
    assert IN_STREAMS.isdisjoint(ours | compatible)
    expected = {*kinds()} - bases - IN_STREAMS - (compatible - ours)
    native = {path: item for path, item in DOCUMENT["paths"].items() if family_of(path) == "native"}
    described = errors([native, DOCUMENT["components"]])
    assert described == {(body.type, body.code or None) for kind in expected for body in bodies(kind)}
    assert {kind for kind, _ in described} == {row.partition("/")[0] for row in STATUS}
    for item in native.values():
        for operation in item.values():
            for status, reply in operation["responses"].items():
                for kind, code in errors(reply):
                    assert STATUS.get(f"{kind}/{code}", STATUS[kind]) == int(status)
                    assert f"`{code or kind}`" in reply["description"]


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{model_id}", "/api/v0/models", "/api/v0/models/{model_id}"])
def test_the_document_has_openai_errors_where_they_are_sent(path: str) -> None:
    replies = DOCUMENT["paths"][path]["get"]["responses"]
    found = {(status, kind, code) for status, reply in replies.items() for kind, code in errors(reply)}
    assert {("401", "invalid_request_error", "invalid_api_key"), ("500", "server_error", None)} <= found
    assert ("503", "unavailable_error", "queue_unavailable") in found
    assert (("404", "invalid_request_error", None) in found) == path.endswith("}")
    for status, reply in replies.items():
        if int(status) >= 400:
            kind = reply["content"]["application/json"]["schema"]["allOf"][0]
            assert kind == {"$ref": "#/components/schemas/OpenAIErrorReply"}


@pytest.mark.parametrize(("method", "path"), sorted(ROUTED))
def test_an_operation_has_security_parameters_and_body(method: str, path: str) -> None:
    operation = DOCUMENT["paths"][path][method.lower()]
    assert (operation["security"] == []) == (path in OPEN_PATHS)
    assert ("401" in operation["responses"]) == (path not in OPEN_PATHS)
    scopes = [scope for one in operation["security"] for scope in one["bearer"]]
    assert scopes == {"open": [], "infer": ["infer", "manage"], "manage": ["manage"]}[ACCESS[method, path]]
    described = "insufficient_scope" in json.dumps(operation["responses"].get("403", {}))
    assert described == (ACCESS[method, path] == "manage")
    in_path = {one["name"] for one in operation.get("parameters", []) if one["in"] == "path"}
    assert in_path == set(re.findall(r"{(\w+)}", path))
    assert ("requestBody" in operation) == (method == "POST" and not path.endswith(("/pause", "/resume")))


def test_references_resolve_and_every_type_is_used() -> None:
    used = {node["$ref"].rpartition("/")[2] for node in within(DOCUMENT) if isinstance(node.get("$ref"), str)}
    assert used == set(DOCUMENT["components"]["schemas"])
    linked = {link["operationId"] for node in within(DOCUMENT) for link in (node.get("links") or {}).values()}
    assert linked <= set(OPERATION_IDS)
    assert {name for operation in OPERATIONS.values() for name in operation.parameters} == set(PARAMETERS)


def alone(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a schema together with the components that it refers to."""
    return {**schema, "components": DOCUMENT["components"]}


@pytest.mark.parametrize("kind", EXAMPLES)
def test_a_request_says_what_it_accepts(kind: Any) -> None:
    schema = DOCUMENT["components"]["schemas"][kind.__name__]
    assert {name for name, field in schema["properties"].items() if field["description"]} == {*kind.__struct_fields__}
    assert schema["additionalProperties"] is (kind in OPEN), "clients of other APIs send unknown fields"
    jsonschema_rs.validate(alone(schema), schema["examples"][0])


def test_every_field_of_the_document_has_its_meaning() -> None:
    kinds = [*DOCUMENT["components"]["schemas"].items()]
    replies = [node["content"] for node in within(DOCUMENT) if "/" in "".join(node.get("content", ""))]
    kinds += [("", content["schema"]) for reply in replies for content in reply.values()]
    fields = {
        (name, field): schema.get("description", "")
        for name, kind in kinds
        for field, schema in kind.get("properties", {}).items()
    }
    assert {("Job", "evicted"), ("", "data")} <= fields.keys()
    assert [field for field, meaning in fields.items() if not meaning] == []
    assert [field for field, meaning in fields.items() if not meaning.endswith(".")] == []


def test_every_type_of_the_document_has_its_meaning() -> None:
    kinds = DOCUMENT["components"]["schemas"].items()
    assert [name for name, kind in kinds if "properties" in kind and not kind.get("description")] == []


@pytest.mark.parametrize("kind", EXAMPLES)
def test_the_documents_describe_each_field_as_its_type_does(kind: Any) -> None:
    if kind is UnloadRequest:  # the document shows its body instead of a table
        return
    text = (Path(__file__).parents[2] / "docs" / ("gpus.md" if kind is GPURequest else "api.md")).read_text("utf-8")
    for name, field in DOCUMENT["components"]["schemas"][kind.__name__]["properties"].items():
        assert re.search(rf"^\| `{name}` \| [^|]+ \| {re.escape(field['description'])}", text, re.MULTILINE), name


@pytest.mark.parametrize(
    ("body", "accepted"),
    [
        ({"model": "a/b"}, True),
        ({"model": "a/b", "context_length": 8192.0}, True),
        ({"model": "a/b", "context_length": 0}, False),
        ({"model": "a/b", "context_length": None}, False),
        ({"model": "a/b", "parallel": 65}, False),
        ({"model": "a/b", "ttl": 60}, False),
        ({"model": "a/b", "gpu": {"offload": 0.5, "devices": ["GPU-1"], "split": [2, 1]}}, True),
        ({"model": "a/b", "gpu": {"offload": "half"}}, False),
        ({"model": "a/b", "gpu": {"layers": 3}}, False),
        ({"context_length": 8192}, False),
    ],
)
def test_the_schema_of_a_load_accepts_what_the_service_does(body: object, accepted: bool) -> None:
    schema = DOCUMENT["components"]["schemas"][LoadRequest.__name__]
    assert jsonschema_rs.is_valid(alone(schema), body) is accepted


def test_replies_that_ask_for_a_retry_have_retry_after() -> None:
    for item in DOCUMENT["paths"].values():
        for operation in item.values():
            for status in {"202", "429", "503"} & set(operation["responses"]):
                assert operation["responses"][status]["headers"]["Retry-After"]["required"]


def test_the_page_is_packaged_and_escapes_its_text() -> None:
    assert files("api.openapi").joinpath("templates/docs.html").is_file()
    changed = document()
    changed["info"]["title"] = "<script>alert(1)</script>"
    rendered = page.page(changed)
    assert "<script" not in rendered
    assert "&lt;script&gt;" in rendered


def test_a_curl_command_of_the_page_calls_its_operation() -> None:
    load = DOCUMENT["paths"]["/api/v1/models/load"]["post"]
    command = page.curl(DOCUMENT, "/api/v1/models/load", "post", load)
    assert command.startswith("curl http://localhost:1234/api/v1/models/load")
    assert '-H "Authorization: Bearer $TOKEN"' in command
    assert '-d \'{"model":' in command
    health = page.curl(DOCUMENT, "/healthz", "get", DOCUMENT["paths"]["/healthz"]["get"])
    assert health == "curl http://localhost:1234/healthz"
