"""What a client can be told about: a code for machines, a sentence for people.

Nothing here knows an HTTP status; `api.errors` holds the one table that does.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from msgspec import UNSET, Struct, UnsetType

LoadFailure = Literal[
    "invalid_model_file",
    "insufficient_memory",
    "unsupported_model",
    "engine_crashed",
    "load_stalled",
    "worker_lost",
    "load_cancelled",
]


class ErrorBody(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The one shape of an error on the wire and in an instance's record."""

    type: str
    message: str
    code: str | UnsetType = UNSET
    param: str | UnsetType = UNSET
    detail: dict[str, object] | UnsetType = UNSET


class ServiceError(Exception):
    """Something a client can be told about."""

    type: ClassVar[str] = "internal_error"
    code: str | UnsetType = UNSET
    retry_after_s: int | None = None  # when the same request may succeed, where that is known

    def __init__(self, message: str, *, param: str | UnsetType = UNSET, **detail: object) -> None:
        super().__init__(message)
        self.param = param
        self.detail = detail

    def body(self) -> ErrorBody:
        return ErrorBody(
            type=self.type, message=str(self), code=self.code, param=self.param, detail=self.detail or UNSET
        )


class InvalidRequest(ServiceError):
    """The request itself is wrong; sending it again changes nothing."""

    type = "invalid_request"


class InvalidJSON(InvalidRequest):
    """The body is not a JSON document."""

    code = "invalid_json"


class UnrecognizedKeys(InvalidRequest):
    """The body has keys that nobody reads."""

    code = "unrecognized_keys"


class MissingParameter(InvalidRequest):
    """A field without which nothing can be done is not there."""

    code = "missing_required_parameter"


class InvalidType(InvalidRequest):
    """A field holds a value of another type."""

    code = "invalid_type"


class InvalidValue(InvalidRequest):
    """A field holds a value of the right type that cannot be used."""

    code = "invalid_value"


class InvalidAPIKey(InvalidRequest):
    """No token, or one that is not configured."""

    code = "invalid_api_key"


class ForbiddenHost(InvalidRequest):
    """Without tokens, a Host header that is no loopback name: DNS rebinding looks like this."""

    code = "forbidden_host"


class JobAlreadyFinished(InvalidRequest):
    """A load that has ended cannot be cancelled."""

    code = "job_already_finished"


class IdempotencyKeyReused(InvalidRequest):
    """The key was sent before, with another request."""

    code = "idempotency_key_reused"


class UnsupportedMediaType(InvalidRequest):
    """The body is not declared as JSON."""

    code = "unsupported_media_type"


class BodyTooLarge(InvalidRequest):
    """The body is longer than any request can be."""

    code = "body_too_large"


class NotFound(ServiceError):
    """No such path."""

    type = "not_found"


class MethodNotAllowed(ServiceError):
    """The path exists, the method does not."""

    type = "method_not_allowed"


class ModelNotFound(ServiceError):
    """No model with this key, or no instance with this id."""

    type = "model_not_found"


class JobNotFound(ServiceError):
    """No load with this id in the last day."""

    type = "job_not_found"


class TooManyRequests(ServiceError):
    """A limit of the service's is reached; the same request may succeed later."""

    type = "too_many_requests"

    def __init__(self, message: str, retry_after_s: int = 1) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(TooManyRequests):
    """As many loads wait as may."""

    code = "queue_full"


class TooManyWaiting(TooManyRequests):
    """As many replies of this process are held open as may."""

    code = "too_many_waiting"


class LoadFailed(ServiceError):
    """A load ended without a model in memory."""

    type = "model_load_failed"

    def __init__(self, code: LoadFailure, model_type: str, model: str, reason: str, **detail: object) -> None:
        what = "LLM" if model_type == "llm" else "embedding model"
        super().__init__(f"Failed to load {what} '{model}': Error: {reason}")
        self.detail = detail
        self.code: LoadFailure = code


def crashed_lately(model_type: str, model: str, reason: str, left_s: int) -> LoadFailed:
    """A model that crashed the engine, for `reason`, is not tried again for `left_s` seconds more."""
    words = f'it crashed the engine lately: {reason}. It is not tried again for {left_s} s; "force": true tries it now'
    return LoadFailed("engine_crashed", model_type, model, words, retry_after_s=left_s)


class ServiceUnavailable(ServiceError):
    """Something the service needs is away for now; the same request may succeed later."""

    type = "service_unavailable"
    retry_after_s = 2


class NoWorker(ServiceUnavailable):
    """No live worker has the model."""

    code = "no_worker"


class QueueUnavailable(ServiceUnavailable):
    """Redis is away, or was emptied under a waiter."""

    code = "queue_unavailable"
