"""Errors in the form of Anthropic's API."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.errors import ErrorBody

OVERLOADED = 529
# By status.  Other errors of the request are `invalid_request_error`, other errors of the server `api_error`.
TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    413: "request_too_large",
    429: "rate_limit_error",
    OVERLOADED: "overloaded_error",
}


class AnthropicError(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error in the form of Anthropic's API.  `code`, which Anthropic's errors lack, is that of our other errors."""

    type: Annotated[str, Meta(description="Kind of the error, for programs.")]
    message: Annotated[str, Meta(description="What was wrong and what would be right, for people.")]
    code: Annotated[str | UnsetType, Meta(description="The error more precisely, for programs.")] = UNSET


class AnthropicErrorReply(Struct, frozen=True, kw_only=True):
    """The reply to a request that failed."""

    type: Annotated[Literal["error"], Meta(description="Always `error`.")] = "error"
    error: Annotated[AnthropicError, Meta(description="The error.")]


def translated(body: ErrorBody, status: int) -> tuple[int, AnthropicErrorReply]:
    """Return an error in this form and its status, which is `status` elsewhere."""
    status = OVERLOADED if status == 503 else status
    kind = TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")
    code = "not_implemented" if body.type == "not_implemented" and body.code is UNSET else body.code
    return status, AnthropicErrorReply(error=AnthropicError(type=kind, message=_message(body), code=code))


def _message(body: ErrorBody) -> str:
    """Return the message of an error.  Clients know by Anthropic's words that a prompt does not fit."""
    match body:
        case ErrorBody(code="context_length_exceeded", detail={"n_prompt_tokens": tokens, "n_ctx": n_ctx}):
            return f"prompt is too long: {tokens} tokens > {n_ctx} maximum"
        case _:
            return body.message
