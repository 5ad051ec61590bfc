"""Failures of requests, in the form of the API's errors."""

from __future__ import annotations

import msgspec

from shared.errors import ErrorBody


class Failure(Exception):
    """A request failed: the error of the server or, without a response, an error of the client in the same form.

    `retry_after_s` is None if a retry cannot succeed.
    """

    def __init__(self, error: ErrorBody, retry_after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after_s = retry_after_s


class Unreachable(Failure):
    """The connection could not be established, so nothing was sent."""


class Interrupted(Failure):
    """The command was interrupted with Ctrl-C."""


def error(kind: str, message: str, code: str | msgspec.UnsetType = msgspec.UNSET) -> ErrorBody:
    """Return an error of the client."""
    return ErrorBody(type=kind, message=message, code=code)


def cancelled(model: str) -> ErrorBody:
    """Return the error of a load that was cancelled."""
    return error("model_load_failed", f"The load of {model} was cancelled.", code="load_cancelled")
