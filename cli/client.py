"""The HTTP client of the command line: asks one server, and follows a load through whatever its connection meets."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator
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

PATIENCE_S = 30.0  # without any answer, for a load that is under way or to be accepted
SILENCE_S = 20.0  # an event stream says something at least every 15 s
ANSWER_S = 30.0
STOP_ANSWER_S = 90.0  # an unload or a cancel is answered once memory is back: the server waits a minute for that
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
PASSING = {429, 502, 503, 504}  # the same request may succeed later
JSON = {"Content-Type": "application/json"}

T = TypeVar("T")


class Failure(Exception):
    """What was asked for did not happen: the server's error, or ours in the same shape, where there is no answer.

    `retry_after_s` is None where asking again would change nothing.
    """

    def __init__(self, error: ErrorBody, retry_after_s: float | None = None) -> None:
        super().__init__(error.message)
        self.error = error
        self.retry_after_s = retry_after_s


class Unreachable(Failure):
    """There is no connection: nothing was sent."""


class Patience:
    """How long to go on asking: until PATIENCE_S have passed without an answer."""

    def __init__(
        self,
        note: Callable[[str], None],
        now: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._note, self._now, self._sleep = note, now, sleep
        self._noted = ""
        self.heard()

    def heard(self) -> None:
        self._until = self._now() + PATIENCE_S
        self._pause = FIRST_PAUSE_S

    def wait(self, failure: Failure) -> None:
        """Wait until it is time to ask again, as long as the server says, and longer each time.

        Raises `failure` if there is no use in asking again, or no time left for it.
        """
        pause = max(self._pause, failure.retry_after_s or 0.0)
        if failure.retry_after_s is None or self._now() + pause > self._until:
            raise failure
        self._pause = min(2 * self._pause, LONGEST_PAUSE_S)
        if (sentence := f"{failure} Trying again.") != self._noted:
            self._note(sentence)
            self._noted = sentence
        self._sleep(pause)


class Client:
    """Every method raises Failure.  `note` is told why it takes longer."""

    def __init__(self, url: str, token: str = "", note: Callable[[str], None] = lambda sentence: None) -> None:
        self.url = url
        self.note = note
        self._http = httpx.Client(
            base_url=url,
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx.Timeout(ANSWER_S, connect=5.0),
            trust_env=not is_loopback(httpx.URL(url).host),  # a proxy's loopback is not ours
        )

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
        """The job once it has ended and its memory is back."""
        return self._ask(Job, "DELETE", _path(paths.JOB, job_id), timeout=STOP_ANSWER_S)

    def logs(self, job_id: str) -> str:
        with self._answer("GET", _path(paths.JOB_LOGS, job_id)) as answer:
            return answer.read().decode(errors="replace")

    def estimate(self, request: LoadRequest) -> EstimateResult:
        return self._ask(EstimateResult, "POST", paths.ESTIMATE, content=msgspec.json.encode(request), headers=JSON)

    def submit(self, request: LoadRequest, idempotency_key: str) -> Job:
        """Have a load accepted.  What was asked twice under one key is one load, so a broken connection is no end;
        that there is no server at all is one."""
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
        """Yield every event of a load up to its LoadEnd, over as many connections as it takes; to be closed.

        Raises Failure with the error of a load that ends in any other way.
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
                if failure.error.code == "too_many_waiting":  # a poll that waits for nothing needs no place
                    event = self.job(job_id).event()
                    match event:
                        case LoadStart() | LoadProgress():
                            yield event
                            patience.heard()
                        case LoadEnd():
                            yield event
                            return
                        case LoadError():
                            raise _ended(event.error) from None
                        case _:
                            assert_never(event)
                patience.wait(failure)

    def _events(self, job_id: str, after: str, patience: Patience) -> Iterator[tuple[str, LoadEvent]]:
        """The events of one connection, with their ids."""
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        with self._answer("GET", _path(paths.JOB_EVENTS, job_id), headers=headers, timeout=SILENCE_S) as answer:
            if answer.status_code != 204:
                for id_, data in events(_lines(answer, patience)):
                    yield id_, self._decode(data, LoadEvent)
                return
        yield after, self.job(job_id).event()  # no event is left after that id

    def _ask(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        with self._answer(method, path, **options) as answer:
            value: T = self._decode(answer.read(), kind)
            return value

    @contextmanager
    def _answer(self, method: str, path: str, **options: Any) -> Iterator[httpx.Response]:
        """The answer to one request, if it is no error; its body is read within the block."""
        try:
            with self._http.stream(method, path, **options) as answer:
                if not answer.is_success:
                    answer.read()
                    raise self._refusal(answer)
                yield answer
        except (httpx.ConnectError, httpx.ConnectTimeout) as e:
            raise Unreachable(_error("unreachable", f"No server can be reached at {self.url} ({e})."), 0.0) from None
        except httpx.TimeoutException:
            raise Failure(_error("no_answer", f"The server at {self.url} does not answer."), 0.0) from None
        except httpx.RequestError:  # its text may hold a header
            raise self._broken() from None

    def _refusal(self, answer: httpx.Response) -> Failure:
        after = answer.headers.get("Retry-After", "")
        wait = (float(after) if after.isascii() and after.isdigit() else 0.0) if answer.status_code in PASSING else None
        try:
            return Failure(msgspec.json.decode(answer.content, type=dict[str, ErrorBody])["error"], wait)
        except (msgspec.DecodeError, KeyError):
            return Failure(_error("unexpected_reply", f"{self.url} answers with HTTP {answer.status_code}."), wait)

    def _broken(self) -> Failure:
        return Failure(_error("connection_lost", f"The connection to {self.url} broke."), 0.0)

    def _decode(self, data: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Failure(_error("unexpected_reply", f"{self.url} does not answer as Loadstone does.")) from None


def checked_url(text: str) -> str | None:
    """The URL of a server, or None where this is none.  One with a password would end up in sentences."""
    try:
        url = httpx.URL(text)
    except httpx.InvalidURL:
        return None
    is_usable = url.scheme in ("http", "https") and url.host and not (url.userinfo or url.query or url.fragment)
    return str(url).rstrip("/") if is_usable else None


def cancelled(model: str) -> ErrorBody:
    return _error("model_load_failed", f"The load of {model} was cancelled.", code="load_cancelled")


def _ended(error: ErrorBody) -> Failure:
    """The error that a stream ended with: of the load, or only of the stream, where Redis lost the record."""
    return Failure(error, 1.0 if error.code == "queue_unavailable" else None)


def events(lines: Iterable[bytes]) -> Iterator[tuple[str, bytes]]:
    """Id and data of each event of a stream (WHATWG: server-sent events); comments and all else pass by."""
    id_, data = "", list[bytes]()
    for line in lines:
        name, _, value = line.partition(b":")
        value = value.removeprefix(b" ")
        if name == b"id":
            id_ = value.decode()
        elif name == b"data":
            data.append(value)
        elif not line and data:
            yield id_, b"\n".join(data)
            data = []


def _lines(answer: httpx.Response, patience: Patience) -> Iterator[bytes]:
    """Not httpx's lines: those end at U+2028 too, which JSON may hold."""
    rest = b""
    for chunk in answer.iter_bytes():
        patience.heard()
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)


def _path(template: str, job_id: str) -> str:
    """Put the id of a job into a path, as one segment whatever it holds: a dot segment would name another path."""
    return template.format(job_id=quote(job_id, safe="").replace(".", "%2E"))


def _error(kind: str, message: str, code: str | msgspec.UnsetType = msgspec.UNSET) -> ErrorBody:
    return ErrorBody(type=kind, message=message, code=code)
