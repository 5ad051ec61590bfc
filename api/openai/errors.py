"""Errors in the form of OpenAI's API."""

from __future__ import annotations

from typing import Annotated

from msgspec import UNSET, Meta, Struct, UnsetType

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
TYPES_OF_CODES = {
    "context_length_exceeded": "exceed_context_size_error",  # llama.cpp's, by which clients know it
    "integrations_not_supported": "invalid_request_error",  # LM Studio's
}
CODES = {
    "body_too_large": "request_too_large",
    "engine_crashed": "model_load_failed",
    "invalid_model_file": "model_load_failed",
    "load_stalled": "model_load_failed",
    "method_not_allowed": "method_not_supported",
    "model_not_found": "model_not_found",
    "not_implemented": "not_implemented",
    "unsupported_model": "model_load_failed",
}


class OpenAIError(Struct, frozen=True, kw_only=True):
    """An error in the form of OpenAI's API.

    It has all of OpenAI's fields, since clients read them without a check; the last two are llama.cpp's.
    """

    message: Annotated[str, Meta(description="What was wrong and what would be right, for people.")]
    type: Annotated[str, Meta(description="Kind of the error, for programs.")]
    param: Annotated[
        str | None, Meta(description="The field, parameter or header that is wrong; null if there is none.")
    ]
    code: Annotated[
        str | None, Meta(description="The error more precisely, for programs; null if `type` and the status tell all.")
    ]
    n_prompt_tokens: Annotated[
        int | UnsetType, Meta(description="Tokens of the prompt, if it does not fit into the context.")
    ] = UNSET
    n_ctx: Annotated[
        int | UnsetType, Meta(description="Tokens of the context, if the prompt does not fit into it.")
    ] = UNSET


class OpenAIErrorReply(Struct, frozen=True):
    """The reply to a request that failed."""

    error: Annotated[OpenAIError, Meta(description="The error.")]


def translated(body: ErrorBody, status: int) -> OpenAIErrorReply:
    """Return an error in this form, for a reply with `status`."""
    code = CODES.get(body.type) if body.code is UNSET else CODES.get(body.code, body.code)
    detail = {} if body.detail is UNSET else body.detail
    tokens, n_ctx = detail.get("n_prompt_tokens"), detail.get("n_ctx")
    return OpenAIErrorReply(
        OpenAIError(
            message=body.message,
            type=TYPES_OF_CODES.get(code or "", TYPES.get(status, "invalid_request_error")),
            param=None if body.param is UNSET else body.param,
            code=code,
            n_prompt_tokens=tokens if isinstance(tokens, int) else UNSET,
            n_ctx=n_ctx if isinstance(n_ctx, int) else UNSET,
        )
    )
