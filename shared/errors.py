"""The errors that clients receive: a stable code for programs and a message for people.

HTTP status codes are defined in `api.errors` only.  The docstrings of the error classes are shown in /docs.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

LoadFailure = Literal[
    "invalid_model_file",
    "insufficient_memory",
    "unsupported_model",
    "engine_crashed",
    "load_stalled",
    "worker_lost",
    "load_cancelled",
]

DownloadFailure = Literal[
    "gated_repository",
    "hub_unavailable",
    "invalid_hub_reply",
    "checksum_mismatch",
    "insufficient_disk",
    "read_only_store",
    "store_error",
    "download_crashed",
    "downloads_off",
]

MEMORY_RETRY_S = 30  # other models may be unused then


class ErrorBody(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An error, as it is sent to clients and stored in the record of an instance."""

    type: Annotated[str, Meta(description="Kind of the error, for programs.")]
    message: Annotated[str, Meta(description="What was wrong and what would be right, for people.")]
    code: Annotated[str | UnsetType, Meta(description="The error more precisely, for programs.")] = UNSET
    param: Annotated[str | UnsetType, Meta(description="The field, parameter or header that is wrong.")] = UNSET
    detail: Annotated[dict[str, object] | UnsetType, Meta(description="Numbers for programs.")] = UNSET


class ServiceError(Exception):
    """An error that is reported to the client."""

    type: ClassVar[str] = "internal_error"
    code: str | UnsetType = UNSET
    retry_after_s: int | None = None  # when to repeat the request, if it may succeed later

    def __init__(self, message: str, *, param: str | UnsetType = UNSET, **detail: object) -> None:
        super().__init__(message)
        self.param = param
        self.detail = detail

    def body(self) -> ErrorBody:
        return ErrorBody(
            type=self.type, message=str(self), code=self.code, param=self.param, detail=self.detail or UNSET
        )


class InvalidRequest(ServiceError):
    """The request is invalid.  Repeating it does not help."""

    type = "invalid_request"


class InvalidJSON(InvalidRequest):
    """The request body is not valid JSON."""

    code = "invalid_json"


class UnrecognizedKeys(InvalidRequest):
    """The request body contains unknown keys."""

    code = "unrecognized_keys"


class InvalidUnion(InvalidRequest):
    """An item of the input of LM Studio's chat is of none of the forms that items have."""

    code = "invalid_union"


class MissingParameter(InvalidRequest):
    """A required field is missing."""

    code = "missing_required_parameter"


class InvalidType(InvalidRequest):
    """A field or parameter has a value of the wrong type."""

    code = "invalid_type"


class InvalidValue(InvalidRequest):
    """A field, parameter or header has an invalid value."""

    code = "invalid_value"


class NotSupported(InvalidRequest):
    """A field asks for something that this server does not do, and would change the answer if it were ignored."""

    code = "not_supported"


class WrongModelType(InvalidValue):
    """The model is of another type than the request needs."""


class ContextLengthExceeded(InvalidRequest):
    """The prompt is longer than the context of the instance."""

    code = "context_length_exceeded"


class PreviousResponseNotFound(InvalidRequest):
    """There is no stored response with the id of `previous_response_id`."""

    code = "previous_response_not_found"


class InvalidAPIKey(InvalidRequest):
    """The bearer token is missing or invalid."""

    code = "invalid_api_key"


class InsufficientScope(InvalidRequest):
    """The scope of the token does not allow the request."""

    code = "insufficient_scope"


class ForbiddenHost(InvalidRequest):
    """No tokens are configured, and the `Host` header is not a loopback name (protection against DNS rebinding)."""

    code = "forbidden_host"


class JobAlreadyFinished(InvalidRequest):
    """The load has already ended and cannot be cancelled."""

    code = "job_already_finished"


class ModelInUse(InvalidRequest):
    """The model is loaded, being loaded or being downloaded."""

    code = "model_in_use"


class IdempotencyKeyReused(InvalidRequest):
    """The idempotency key was already used for a different request."""

    code = "idempotency_key_reused"


class UnsupportedMediaType(InvalidRequest):
    """The `Content-Type` is not `application/json`."""

    code = "unsupported_media_type"


class UnsupportedEncoding(UnsupportedMediaType):
    """The body is compressed (`Content-Encoding`)."""


class BodyTooLarge(InvalidRequest):
    """The request body exceeds the size limit."""

    code = "body_too_large"


class BodyTooSlow(InvalidRequest):
    """The request body did not arrive in time."""

    code = "body_too_slow"


class ClientTooSlow(InvalidRequest):
    """The client read the answer too slowly."""

    code = "client_too_slow"


class NotFound(ServiceError):
    """The path does not exist."""

    type = "not_found"


class ResponseNotFound(NotFound):
    """There is no stored response with this id."""


class MethodNotAllowed(ServiceError):
    """The path does not support this method."""

    type = "method_not_allowed"


class NotImplementedYet(ServiceError):
    """The path belongs to a supported API, but this version does not serve it yet."""

    type = "not_implemented"


class UnsupportedOperation(ServiceError):
    """The model cannot do what the path is for."""

    type = "not_implemented"
    code = "unsupported_operation"


class IntegrationsRefused(ServiceError):
    """The request asks this server to call other servers, which it never does."""

    type = "not_implemented"
    code = "integrations_not_supported"


class ChatUnavailable(ServiceError):
    """Conversations cannot be rendered: the model has no chat template, or the worker's build of the engine no chat
    code."""

    type = "not_implemented"
    code = "chat_unavailable"


class ModelNotFound(ServiceError):
    """There is no model with this key, or no instance with this id."""

    type = "model_not_found"


class ModelNotLoaded(ModelNotFound):
    """The model exists, but no instance of it is loaded, and models are not loaded on demand."""

    code = "model_not_loaded"

    def __init__(self, message: str, key: str = "", *, param: str | UnsetType = UNSET) -> None:
        """`key`: the name of the model as the list has it."""
        super().__init__(message, param=param)
        self.key = key


class JobNotFound(ServiceError):
    """There is no load with this id.  Jobs are kept for a day after the instance has ended."""

    type = "job_not_found"


class TooManyRequests(ServiceError):
    """A limit has been reached.  The same request may succeed later."""

    type = "too_many_requests"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(TooManyRequests):
    """The queue is full: of loads, or of requests that wait for an instance."""

    code = "queue_full"


class TooManyWaiting(TooManyRequests):
    """The API process holds the maximum number of replies open."""

    code = "too_many_waiting"


class LoadFailed(ServiceError):
    """The load failed or was cancelled."""

    type = "model_load_failed"

    def __init__(self, code: LoadFailure, model_type: str, model: str, reason: str, **detail: object) -> None:
        noun = "LLM" if model_type == "llm" else "embedding model"
        super().__init__(f"Failed to load {noun} '{model}': Error: {reason}")
        self.detail = detail
        self.code: LoadFailure = code
        if code == "insufficient_memory":
            self.retry_after_s = MEMORY_RETRY_S


class DownloadFailed(ServiceError):
    """The model cannot be downloaded, or its files cannot be removed."""

    type = "download_failed"

    def __init__(self, code: DownloadFailure, message: str, **detail: object) -> None:
        super().__init__(message)
        self.detail = detail
        self.code: DownloadFailure = code


def crashed_recently(model_type: str, model: str, reason: str, left_s: int) -> LoadFailed:
    """Return the error for a model that crashed the engine and is blocked for another `left_s` seconds."""
    sentence = (
        f"the model crashed the engine recently: {reason}. It is blocked for another {left_s} s; "
        'set "force": true to load it anyway'
    )
    return LoadFailed("engine_crashed", model_type, model, sentence, retry_after_s=left_s)


def context_length_exceeded(
    n_prompt_tokens: int, n_ctx: int, param: str, *, is_text: bool = False
) -> ContextLengthExceeded:
    """Return the error for a prompt that does not fit.  `is_text`: it is one of several texts, of which each must fit.

    Clients recognize it by its words: OpenAI's come first, then those of llama.cpp's server.
    """
    what = "input" if is_text else "messages"
    sentence = (
        f"This model's maximum context length is {n_ctx} tokens. However, your {what} resulted in {n_prompt_tokens} "
        f"tokens. The request ({n_prompt_tokens} tokens) exceeds the available context size ({n_ctx} tokens)."
    )
    if is_text:
        sentence += f" A text ({n_prompt_tokens} tokens) is too large to process."
    return ContextLengthExceeded(sentence, param=param, n_prompt_tokens=n_prompt_tokens, n_ctx=n_ctx)


class ServiceUnavailable(ServiceError):
    """A required component is unavailable.  The same request may succeed later."""

    type = "service_unavailable"
    retry_after_s = 2


class NoWorker(ServiceUnavailable):
    """No available worker has the model."""

    code = "no_worker"


class QueueUnavailable(ServiceUnavailable):
    """Redis is unavailable or lost the record, the server is shutting down, or a stop has not completed in time."""

    code = "queue_unavailable"


class LoadInterrupted(ServiceUnavailable):
    """The load that the request waited for was cancelled, or its worker was lost."""

    code = "load_interrupted"


class QueueTimeout(ServiceUnavailable):
    """The request waited too long for its instance, or for its load."""

    code = "queue_timeout"


class RequestFailed(ServiceError):
    """The engine could not complete the request, or not in the time that it may take.  Do not repeat it."""


class RequestCrashed(RequestFailed):
    """Code that renders prompts crashed on the request, or took too long.  Do not repeat it."""

    code = "helper_crashed"


class NoRoute(ServiceUnavailable):
    """The API process cannot reach the worker of the instance."""

    code = "no_route"


class ModelUnloaded(ServiceUnavailable):
    """The instance was unloaded."""

    code = "model_unloaded"


class RunnerLost(ServiceUnavailable):
    """The engine process of the instance ended, or does not answer."""

    code = "runner_lost"
