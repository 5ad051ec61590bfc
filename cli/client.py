"""The HTTP client of the command line.  Follows a load across broken connections and server restarts."""

from __future__ import annotations

import os
import re
import ssl
import time
from collections.abc import Callable, Collection, Generator, Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, Self, TypeVar, assert_never
from urllib.parse import quote

import httpx
import msgspec

from shared import paths
from shared.errors import ErrorBody
from shared.schema.http import (
    EstimateResult,
    Job,
    JobList,
    LoadEnd,
    LoadError,
    LoadEvent,
    LoadProgress,
    LoadRequest,
    LoadStart,
    ModelList,
    UnloadRequest,
    WorkerList,
)
from shared.settings import is_loopback

PATIENCE_S = 30.0  # limit of retries without a response, while a load is submitted or followed
SILENCE_S = 20.0  # an event stream sends something at least every 15 s
ANSWER_S = 30.0
STOP_ANSWER_S = 90.0  # unload and cancel reply once the memory is free; the server waits up to 60 s
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
PASSING = {429, 502, 503, 504}  # statuses of requests that may succeed later
PROXY_VARIABLES = frozenset({"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY"})  # in any case of letters
TLS_VARIABLES = frozenset({"SSL_CERT_FILE", "SSL_CERT_DIR", "SSLKEYLOGFILE"})
JSON = {"Content-Type": "application/json"}

T = TypeVar("T")


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


class Patience:
    """A retry policy with exponential backoff, which ends after PATIENCE_S seconds without a response."""

    def __init__(
        self,
        note: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._note, self._now, self._sleep = note, now, sleep
        self._noted = ""
        self.reset()

    def reset(self) -> None:
        """Start over, after a response."""
        self._until = self._now() + PATIENCE_S
        self._pause = FIRST_PAUSE_S

    def wait(self, failure: Failure) -> None:
        """Wait before the next attempt: at least as long as the server requests, and longer each time.

        Raises `failure` if a retry cannot succeed, or if no time is left.
        """
        pause = max(self._pause, failure.retry_after_s or 0.0)
        if failure.retry_after_s is None or self._now() + pause > self._until:
            raise failure
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        if (sentence := f"{failure} Retrying.") != self._noted:
            self._note(sentence)
            self._noted = sentence
        self._sleep(pause)


class Client:
    """A client of one server.  Every method raises Failure.  `note` is called with the reason of each delay."""

    def __init__(self, url: str, token: str = "", note: Callable[[str], None] = lambda sentence: None) -> None:
        self.url = url
        self.note = note
        trust_env = not is_loopback(httpx.URL(url).host)  # a proxy cannot reach the loopback of this machine
        tls = _tls_context(trust_env)
        proxies = _names(PROXY_VARIABLES - {"NO_PROXY"}) if trust_env else ""
        self._proxies = f" or to its proxy ({proxies})" if proxies else ""
        try:
            self._http = httpx.Client(
                base_url=url,
                headers={"Authorization": f"Bearer {token}"} if token else {},
                timeout=httpx.Timeout(ANSWER_S, connect=5.0),
                trust_env=trust_env,
                verify=tls,
            )
        except ImportError:  # it needs another package
            raise _unusable("proxies", PROXY_VARIABLES, "SOCKS is not supported") from None
        except (httpx.InvalidURL, ValueError) as e:
            raise _unusable("proxies", PROXY_VARIABLES, _without_values(str(e))) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, where: TracebackType | None) -> None:
        self._http.close()

    def models(self) -> ModelList:
        return self._ask(ModelList, "GET", paths.MODELS)

    def workers(self) -> WorkerList:
        return self._ask(WorkerList, "GET", paths.WORKERS)

    def unload(self, instance_id: str) -> None:
        body = msgspec.json.encode(UnloadRequest(instance_id=instance_id))
        self._ask(object, "POST", paths.UNLOAD, content=body, headers=JSON, timeout=STOP_ANSWER_S)

    def jobs(self, **filters: str | int | None) -> JobList:
        return self._ask(JobList, "GET", paths.JOBS, params={k: v for k, v in filters.items() if v is not None})

    def job(self, job_id: str) -> Job:
        return self._ask(Job, "GET", _path(paths.JOB, job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel a load; return its job once it has ended and its memory is free."""
        return self._ask(Job, "DELETE", _path(paths.JOB, job_id), timeout=STOP_ANSWER_S)

    def logs(self, job_id: str) -> str:
        with self._answer("GET", _path(paths.JOB_LOGS, job_id)) as answer:
            return answer.read().decode(errors="replace")

    def estimate(self, request: LoadRequest) -> EstimateResult:
        return self._ask(EstimateResult, "POST", paths.ESTIMATE, content=msgspec.json.encode(request), headers=JSON)

    def submit(self, request: LoadRequest, idempotency_key: str) -> Job:
        """Submit a load; return its job.

        Retries after failures, because requests with the same key create only one load.  The first attempt is not
        retried if the server cannot be reached.
        """
        headers = {**JSON, "Prefer": "respond-async", "Idempotency-Key": idempotency_key}
        patience = Patience(self.note)
        is_first = True
        while True:
            try:
                return self._ask(Job, "POST", paths.LOAD, content=msgspec.json.encode(request), headers=headers)
            except Failure as failure:
                if is_first and isinstance(failure, Unreachable):
                    raise
                is_first = False
                patience.wait(failure)

    def follow(self, job_id: str) -> Generator[LoadEvent, None, None]:
        """Yield the events of a load up to its LoadEnd, and reconnect if necessary.  Close the generator after use.

        Raises Failure with the error of the load if it fails or is cancelled.
        """
        patience, last_id = Patience(self.note), ""
        while True:
            try:
                for id_, event in self._events(job_id, last_id, patience):
                    match event:
                        case LoadStart() | LoadProgress():
                            last_id = id_
                            yield event
                        case LoadEnd():
                            yield event
                            return
                        case LoadError():
                            raise _ended(event.error)
                        case _:
                            assert_never(event)
                raise self._broken()
            except Failure as failure:
                if failure.error.code == "too_many_waiting":  # a poll without a wait is not limited
                    event = self.job(job_id).event()
                    match event:
                        case LoadStart() | LoadProgress():
                            yield event
                            patience.reset()
                        case LoadEnd():
                            yield event
                            return
                        case LoadError():
                            raise _ended(event.error) from None
                        case _:
                            assert_never(event)
                patience.wait(failure)

    def _events(self, job_id: str, after: str, patience: Patience) -> Iterator[tuple[str, LoadEvent]]:
        """Yield the events of one connection, with their ids."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._answer("GET", _path(paths.JOB_EVENTS, job_id), headers=headers, timeout=SILENCE_S) as answer:
            if answer.status_code != 204:
                for id_, data in events(_lines(answer, patience)):
                    yield id_, self._decode(data, LoadEvent)
                return
        yield after, self.job(job_id).event()  # there are no events after that id

    def _ask(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        with self._answer(method, path, **options) as answer:
            value: T = self._decode(answer.read(), kind)
            return value

    @contextmanager
    def _answer(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """Yield the response to one request; read its body within the block.  Raises Failure for error statuses."""
        try:
            with self._http.stream(method, path, **options) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._refusal(answer)
                yield answer
        except httpx.ProxyError as e:
            raise Failure(_error("unreachable", f"The proxy cannot connect to {self.url} ({e})."), 0.0) from None
        except UnicodeError:  # that of the server was checked
            raise _unusable("proxies", PROXY_VARIABLES, "invalid host name") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise Unreachable(
                _error("unreachable", f"Cannot connect to {self.url}{self._proxies} ({e})."), 0.0
            ) from None
        except httpx.TimeoutException:
            raise Failure(_error("no_answer", f"The server at {self.url} does not respond."), 0.0) from None
        except httpx.RequestError:  # its text may contain a header
            raise self._broken() from None

    def _refusal(self, answer: httpx.Response) -> Failure:
        after = answer.headers.get("Retry-After", "")
        wait = (float(after) if after.isascii() and after.isdigit() else 0.0) if answer.status_code in PASSING else None
        try:
            return Failure(msgspec.json.decode(answer.content, type=dict[str, ErrorBody])["error"], wait)
        except (msgspec.DecodeError, KeyError):
            return Failure(_error("unexpected_reply", f"{self.url} returned HTTP status {answer.status_code}."), wait)

    def _broken(self) -> Failure:
        return Failure(_error("connection_lost", f"The connection to {self.url} was lost."), 0.0)

    def _decode(self, data: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Failure(
                _error("unexpected_reply", f"{self.url} returned an unexpected response. Is it a Loadstone server?")
            ) from None


def checked_url(text: str) -> str | None:
    """Return a normalized server URL, or None if it is invalid.  Passwords are refused: messages show the URL."""
    try:
        url = httpx.URL(text)
        url.host.encode("idna")  # as the socket will
    except (httpx.InvalidURL, UnicodeError):
        return None
    is_usable = url.scheme in ("http", "https") and url.host and not (url.userinfo or url.query or url.fragment)
    return str(url).rstrip("/") if is_usable and 0 <= (url.port or 0) < 1 << 16 else None


def _tls_context(trust_env: bool) -> ssl.SSLContext:
    """Return the context for TLS, with the certificates that the environment names.  Raises Failure."""
    try:
        return httpx.create_ssl_context(trust_env=trust_env)
    except ssl.SSLError as e:
        raise _unusable("TLS", TLS_VARIABLES, e.reason.replace("_", " ").lower()) from None
    except OSError as e:
        raise _unusable("TLS", TLS_VARIABLES, str(e.strerror)) from None


def _unusable(what: str, variables: Collection[str], why: str) -> Failure:
    """Return the failure of a part of the environment.  The sentence has no values, which may be secret."""
    sentence = f"The environment's settings for {what} ({_names(variables)}) are unusable: {why}."
    return Failure(_error("invalid_environment", sentence))


def _without_values(text: str) -> str:
    """Return the start of an error message of httpx, up to a value: a password with a slash is taken for a port."""
    return re.split(r"[:,]| URL\(", text)[0]


def _names(variables: Collection[str]) -> str:
    """Return the names of the variables that are set, as they are written."""
    return ", ".join(sorted(name for name, value in os.environ.items() if value and name.upper() in variables))


def cancelled(model: str) -> ErrorBody:
    return _error("model_load_failed", f"The load of {model} was cancelled.", code="load_cancelled")


def _ended(error: ErrorBody) -> Failure:
    """Return the failure for the last event of a stream.  It can be retried if only the stream failed, not the load."""
    return Failure(error, 1.0 if error.code == "queue_unavailable" else None)


def events(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Parse an event stream (WHATWG: server-sent events) into ids and data.  Comments and other fields are ignored."""
    id_, data = "", list[bytes]()
    for line in lines:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"id":
            id_ = value.decode("ascii", "ignore")  # of a Loadstone server it is ASCII
        elif name == b"data":
            data.append(value)
        elif not line and data:
            yield id_, b"\n".join(data)
            data = []


def _lines(answer: httpx.Response, patience: Patience) -> Iterator[bytes]:
    """Split a body into lines.  httpx also splits at U+2028, which JSON may contain."""
    rest = b""
    for chunk in answer.iter_bytes():
        patience.reset()
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)


def _path(template: str, job_id: str) -> str:
    """Insert a job id into a path as a single segment; dots are encoded, because dot segments name other paths."""
    return template.format(job_id=quote(job_id, safe="").replace(".", "%2E"))


def _error(kind: str, message: str, code: str | msgspec.UnsetType = msgspec.UNSET) -> ErrorBody:
    return ErrorBody(type=kind, message=message, code=code)
