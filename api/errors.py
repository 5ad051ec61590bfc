"""Translates errors into HTTP replies.  No other module does this."""

from __future__ import annotations

from typing import Annotated, Any, Literal, assert_never

import msgspec
from msgspec import UNSET, Meta, Struct
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Match

from api.anthropic import errors as anthropic
from api.openai import errors as openai
from api.outcome import current
from shared import paths
from shared.errors import (
    ErrorBody,
    LoadFailed,
    MethodNotAllowed,
    NotFound,
    QueueUnavailable,
    RequestFailed,
    ServiceError,
    UnsupportedEncoding,
)
from shared.store.connection import UNAVAILABLE
from shared.telemetry import log

# One entry per `type`, and one for each `type/code` with a different status.
STATUS: dict[str, int] = {
    "invalid_request": 400,
    "invalid_request/invalid_api_key": 401,
    "invalid_request/forbidden_host": 403,
    "invalid_request/insufficient_scope": 403,
    "invalid_request/body_too_slow": 408,
    "invalid_request/body_too_large": 413,
    "invalid_request/unsupported_media_type": 415,
    "invalid_request/job_already_finished": 409,
    "invalid_request/model_in_use": 409,
    "invalid_request/idempotency_key_reused": 422,
    "not_found": 404,
    "method_not_allowed": 405,
    "model_not_found": 404,
    "job_not_found": 404,
    "too_many_requests": 429,
    "model_load_failed": 500,
    "model_load_failed/load_cancelled": 409,
    "download_failed": 502,
    "download_failed/gated_repository": 403,
    "download_failed/insufficient_disk": 507,
    "download_failed/read_only_store": 409,
    "download_failed/store_error": 500,
    "download_failed/download_crashed": 500,
    "download_failed/downloads_off": 501,
    "service_unavailable": 503,
    "internal_error": 500,
    "not_implemented": 501,
    "not_implemented/integrations_not_supported": 403,
}
Family = Literal["native", "openai", "anthropic"]
OPENAI = ("/v1", "/api/v0", "/rerank", "/reranking", "/tokenize", "/tokenizer_info", "/detokenize", "/apply-template")


class ErrorReply(Struct, frozen=True):
    """The reply to a request that failed."""

    error: Annotated[ErrorBody, Meta(description="The error.")]


def family_of(path: str) -> Family:
    """Return the form that errors have at a path.  Clients parse them there, so an unknown path has a form as well."""
    if is_below(path, (paths.MESSAGES,)):
        return "anthropic"
    return "openai" if is_below(path, OPENAI) else "native"


def is_below(path: str, roots: tuple[str, ...]) -> bool:
    """Return whether a path is one of `roots` or below one."""
    return any(path == root or path.startswith(f"{root}/") for root in roots)


def status_of(body: ErrorBody) -> int:
    """Return the status of an error.  The forms of other APIs have another one for some."""
    specific = "" if body.code is UNSET else f"{body.type}/{body.code}"
    return STATUS.get(specific, STATUS[body.type])


def shaped(
    body: ErrorBody, path: str
) -> tuple[int, ErrorReply | openai.OpenAIErrorReply | anthropic.AnthropicErrorReply]:
    """Return the status and the body of the reply with an error at a path."""
    status, family = status_of(body), family_of(path)
    if family != "native" and body.code == "insufficient_memory":
        status = 503  # clients repeat such requests later; LM Studio's API has 500 for all failed loads
    match family:
        case "native":
            return status, ErrorReply(body)
        case "openai":
            return status, openai.translated(body, status)
        case "anthropic":
            return anthropic.translated(body, status)
        case _:
            assert_never(family)


def reply(error: ServiceError, path: str, headers: dict[str, str] | None = None) -> Response:
    """Return the reply with an error at a path."""
    ours = error.body()
    current().refused(ours)
    status, body = shaped(ours, path)
    extra = dict(headers or {})
    if status == 401:
        extra["WWW-Authenticate"] = "Bearer"
    # The client libraries of OpenAI and Anthropic repeat other requests with a status from 500 on.
    failed_to_load = ours.type == LoadFailed.type and family_of(path) != "native"
    if status == 501 or isinstance(error, RequestFailed) or (failed_to_load and status == 500):
        extra["X-Should-Retry"] = "false"
    if isinstance(error, UnsupportedEncoding):
        extra["Accept-Encoding"] = "identity"
    if error.retry_after_s is not None and status != 500:
        extra["Retry-After"] = str(error.retry_after_s)
    return Response(msgspec.json.encode(body), status, extra, media_type="application/json")


async def on_service_error(request: Request, exc: Exception) -> Response:
    """Reply with the error.  The refusal of a load is also logged, in one line."""
    assert isinstance(exc, ServiceError)
    if request.method == "POST" and request.url.path == paths.LOAD:
        body = exc.body()
        code = {} if body.code is UNSET else {"code": body.code}
        log.get("api").info("load request failed", action="load_failed", status=status_of(body), type=body.type, **code)
    return reply(exc, request.scope["path"])


async def on_http_exception(request: Request, exc: Exception) -> Response:
    """Reply to Starlette's 404 and 405 in the common form.  A 405 names the methods of all routes with this path."""
    assert isinstance(exc, HTTPException)
    path = request.scope["path"]
    message = f"Unexpected endpoint or method. ({request.method} {path})"
    if exc.status_code != 405:
        return reply(NotFound(message), path)
    routes = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    allowed = sorted({method for route in routes for method in route.methods})
    return reply(MethodNotAllowed(message), path, {"Allow": ", ".join(allowed)})


async def on_disconnect(request: Request, exc: Exception) -> Response:
    """End the request of a client that left before the end of its body.  Nobody reads this reply."""
    current().name = "cancelled"
    return Response(status_code=400)


async def on_unavailable(request: Request, exc: Exception) -> Response:
    """Reply that Redis did not answer.

    The request may have taken effect nevertheless; idempotency keys make it safe to send a load again.
    """
    return reply(unavailable(exc, request.url.path), request.scope["path"])


def unavailable(exc: Exception, path: str) -> QueueUnavailable:
    """Return the error of a request to which Redis did not answer, and log it."""
    log.get("api").warning("redis unavailable", action="redis_unavailable", error=str(exc), path=path)
    return QueueUnavailable("The queue (Redis) is unavailable. Try again shortly.")


async def on_unexpected(request: Request, exc: Exception) -> Response:
    """Reply to an unexpected exception without its details; Starlette raises it again, so that it is logged."""
    return reply(ServiceError("Internal error. See the server log for details."), request.scope["path"])


HANDLERS: dict[Any, Any] = {
    ServiceError: on_service_error,
    HTTPException: on_http_exception,
    ClientDisconnect: on_disconnect,
    Exception: on_unexpected,
    **dict.fromkeys(UNAVAILABLE, on_unavailable),
}
