"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct

from shared.errors import ErrorBody

# By status; all others are errors of the request.
TYPES = {
    403: "permission_error",
    429: "rate_limit_error",
    500: "server_error",
    501: "not_supported_error",
    503: "unavailable_error",
}
# By our code, or by our type if there is no code.  Other codes are used as they are; other types have no code.
CODES = {
    "body_too_large": "request_too_large",
    "method_not_allowed": "method_not_supported",
    "model_not_found": "model_not_found",
    "not_implemented": "not_implemented",
}


class OpenAIError(Struct, frozen=True, kw_only=True):
    """An error in the form of OpenAI's API.  It has all of its fields, since clients read them without a check."""

    message: Annotated[str, Meta(description="What was wrong and what would be right, for people.")]
    type: Annotated[str, Meta(description="Kind of the error, for programs.")]
    param: Annotated[
        str | None, Meta(description="The field, parameter or header that is wrong; null if there is none.")
    ]
    code: Annotated[
        str | None, Meta(description="The error more precisely, for programs; null if `type` and the status tell all.")
    ]


class OpenAIErrorReply(Struct, frozen=True):
    """The reply to a request that failed."""

    error: Annotated[OpenAIError, Meta(description="The error.")]


def translated(body: ErrorBody, status: int) -> OpenAIErrorReply:
    """Return an error in this form, for a reply with `status`."""
    return OpenAIErrorReply(
        OpenAIError(
            message=body.message,
            type=TYPES.get(status, "invalid_request_error"),
            param=None if body.param is UNSET else body.param,
            code=CODES.get(body.type) if body.code is UNSET else CODES.get(body.code, body.code),
        )
    )
