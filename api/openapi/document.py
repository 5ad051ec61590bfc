"""Generates the OpenAPI 3.1 document from the types of requests and replies, and from the table of errors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, assert_never, get_args

import msgspec
from msgspec import UNSET
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from api.access import ACCESS, Access
from api.anthropic import answer as messages
from api.anthropic.errors import OVERLOADED, AnthropicErrorReply
from api.anthropic.models import AnthropicModel, AnthropicModelList
from api.errors import ErrorReply, shaped, status_of
from api.lmstudio.answers import LegacyChunk, LegacyTextChunk
from api.lmstudio.chat import events as chat
from api.openai.answer import Chunk
from api.openai.errors import OpenAIErrorReply
from api.openai.models import OpenAIModel, OpenAIModelList
from api.openai.text import TextChunk
from api.openapi import page
from api.openapi.operations import (
    EXAMPLES,
    HEADERS,
    JSON,
    OPEN,
    OPERATIONS,
    PARAMETERS,
    REF,
    Operation,
    Reply,
    anything,
    schema_of,
)
from api.rerank.forms import RankedText, Ranking
from api.responses.events import Event
from api.responses.response import Item, Part
from shared import __version__, errors
from shared.errors import DownloadFailure, ErrorBody, LoadFailure, ServiceError
from shared.schema.http import DownloadEvent, LoadEvent

INTRO = """\
Loads GGUF models into memory on request. All errors below `/api/v1` have the same form: an object `error` with `type`,
`message` and, if applicable, `code`, `param` and `detail`. Below `/v1` and `/api/v0` they have the form of OpenAI's \
API, and below `/v1/messages` that of Anthropic's. Programs should use `type` and `code`, which never change."""

WITH_RETRY_AFTER = {
    OVERLOADED,
    *(status_of(ErrorBody(type=kind.type, message="")) for kind in (errors.TooManyRequests, errors.ServiceUnavailable)),
}
TAGGED = {  # unions by the meaning of their tags: msgspec adds these fields without a description
    LoadEvent: "Name of the event.",
    messages.Event: "Name of the event.",
    chat.Event: "Name of the event.",
    chat.Output: "Kind of the item.",
    messages.Block: "Kind of the block.",
    messages.BlockDelta: "Kind of the addition.",
    Event: "Name of the event.",
    Item: "Kind of the item.",
    Part: "Kind of the part.",
}
EVERY_PATH = "/api/v1"  # as an example of all
EVERYWHERE = (errors.InvalidValue, errors.ForbiddenHost, ServiceError)


def document() -> dict[str, Any]:
    """Return the OpenAPI document."""
    paths: dict[str, dict[str, Any]] = {}
    for (method, path), operation in OPERATIONS.items():
        paths.setdefault(path, {})[method.lower()] = _operation(method, path, operation)
    schemas = msgspec.json.schema_components(_types(), schema_hook=anything, ref_template=REF)[1]
    for union, meaning in TAGGED.items():
        for kind in get_args(union):
            schemas[kind.__name__]["properties"]["type"]["description"] = meaning
    for kind, example in EXAMPLES.items():
        schemas[kind.__name__] |= {"additionalProperties": kind in OPEN, "examples": [example]}
    return {
        "openapi": "3.1.0",
        "info": {"title": "Loadstone", "version": __version__, "description": INTRO},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {
            "schemas": schemas,
            "responses": {
                "NotFound": _errors([errors.NotFound], 404, EVERY_PATH),
                "MethodNotAllowed": _errors([errors.MethodNotAllowed], 405, EVERY_PATH),
                "NotImplemented": _errors([errors.NotImplementedYet], 501, EVERY_PATH),
            },
            "securitySchemes": {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "An API token. Required if the operator has configured tokens. One of the scopes "
                    "that an operation lists suffices; `manage` gives access to everything.",
                }
            },
        },
    }


def _operation(method: str, path: str, operation: Operation) -> dict[str, Any]:
    described: dict[str, Any] = {"operationId": operation.name, "summary": operation.summary}
    if operation.description:
        described["description"] = operation.description
    access = ACCESS[method, path]
    described["security"] = _security(access)
    if operation.parameters:
        described["parameters"] = [{"name": name, **PARAMETERS[name]} for name in operation.parameters]
    if operation.body is not None:
        described["requestBody"] = {"required": True, "content": {JSON: {"schema": schema_of(operation.body)}}}
    replies = {status: _reply(reply) for status, reply in operation.replies.items()}
    by_status: dict[int, list[type[ServiceError]]] = {}
    for kind in (*operation.errors, *EVERYWHERE, *_refusals(access)):
        for body in bodies(kind):
            listed = by_status.setdefault(shaped(body, path)[0], [])
            if kind not in listed:
                listed.append(kind)
    replies |= {status: _errors(kinds, status, path) for status, kinds in by_status.items()}
    described["responses"] = {str(status): reply for status, reply in sorted(replies.items())}
    return described


def _security(access: Access) -> list[dict[str, list[str]]]:
    """Describe the tokens of which one is required: an http scheme may list roles since OpenAPI 3.1."""
    match access:
        case "open":
            return []
        case "infer":
            return [{"bearer": ["infer"]}, {"bearer": ["manage"]}]
        case "manage":
            return [{"bearer": ["manage"]}]
        case _:
            assert_never(access)


def _refusals(access: Access) -> tuple[type[ServiceError], ...]:
    """Return the errors of a request without the right token."""
    match access:
        case "open":
            return ()
        case "infer":
            return (errors.InvalidAPIKey,)
        case "manage":
            return (errors.InvalidAPIKey, errors.InsufficientScope)
        case _:
            assert_never(access)


def _reply(reply: Reply) -> dict[str, Any]:
    described: dict[str, Any] = {"description": reply.description}
    if reply.headers or reply.more_headers:
        described["headers"] = {name: {**HEADERS[name], "required": True} for name in reply.headers}
        described["headers"] |= {name: HEADERS[name] for name in reply.more_headers}
    if reply.content:
        described["content"] = {media: {"schema": schema_of(kind)} for media, kind in reply.content.items()}
    if reply.links:
        described["links"] = reply.links
    return described


def bodies(kind: type[ServiceError]) -> list[ErrorBody]:
    """Return the error bodies of a class, one per code, without messages."""
    several = {errors.LoadFailed: LoadFailure, errors.DownloadFailed: DownloadFailure}
    codes = get_args(several[kind]) if kind in several else [kind.code]
    return [ErrorBody(type=kind.type, message="", code=code) for code in codes]


def _errors(kinds: Sequence[type[ServiceError]], status: int, path: str) -> dict[str, Any]:
    """Describe the reply with a status at a path, which has one of these errors."""
    lines, shapes, headers = [], [], ["WWW-Authenticate"] if status == 401 else []
    more_headers = ["Accept-Encoding"] if errors.UnsupportedEncoding in kinds else []
    for kind in kinds:
        replies = [reply for here, reply in (shaped(body, path) for body in bodies(kind)) if here == status]
        codes = ", ".join(f"`{reply.error.code}`" for reply in replies if reply.error.code)
        meaning = "An internal error. See the server log for details." if kind is ServiceError else kind.__doc__
        lines.append(f"`{replies[0].error.type}`" + (f" / {codes}" if codes else "") + f": {meaning}")
        for reply in replies:
            named: dict[str, Any] = {"type": {"const": reply.error.type}}
            named |= {} if reply.error.code is UNSET else {"code": {"const": reply.error.code}}
            shapes.append({"properties": named, "required": list(named)})
    if status in WITH_RETRY_AFTER:
        headers.append("Retry-After")
    narrowed = {"properties": {"error": {"anyOf": shapes}}}
    described = _reply(Reply(description="\n".join(lines), headers=tuple(headers), more_headers=tuple(more_headers)))
    return described | {"content": {JSON: {"schema": {"allOf": [schema_of(type(replies[0])), narrowed]}}}}


def _types() -> list[Any]:
    replies = [reply for operation in OPERATIONS.values() for reply in operation.replies.values()]
    sent = [kind for reply in replies for kind in reply.content.values() if not isinstance(kind, dict)]
    named = (
        OpenAIModel,
        OpenAIModelList,
        AnthropicModel,
        AnthropicModelList,
        Chunk,
        TextChunk,
        Ranking,
        RankedText,
        LegacyChunk,
        LegacyTextChunk,
    )  # in schemas of several types
    return [
        *EXAMPLES,
        *sent,
        *named,
        LoadEvent,
        DownloadEvent,
        messages.Event,
        Event,
        chat.Event,
        ErrorReply,
        OpenAIErrorReply,
        AnthropicErrorReply,
    ]


@cache
def _encoded() -> bytes:
    return msgspec.json.encode(document())


@cache
def _page() -> str:
    return page.page(document())


async def openapi_json(request: Request) -> Response:
    return Response(_encoded(), media_type=JSON)


async def docs_page(request: Request) -> Response:
    return HTMLResponse(_page(), headers={"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"})
