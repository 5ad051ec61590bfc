"""The HTTP client of the command line.  Follows a load across broken connections and server restarts."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from types import TracebackType
from typing import Any, Literal, Self, TypeVar, assert_never
from urllib.parse import quote, urlencode, urlsplit

import httpcore
import msgspec

from cli import address
from cli.failure import Failure, Unreachable, error
from cli.openai import DONE, Chunk, Embedding, Embeddings
from shared import __version__, paths
from shared.errors import ErrorBody
from shared.lifecycle import TERMINAL
from shared.schema.http import (
    DownloadEvent,
    DownloadJob,
    DownloadReply,
    DownloadRequest,
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
    RemovedModel,
    UnloadRequest,
    WorkerList,
)
from shared.settings import is_loopback

PATIENCE_S = 30.0  # limit of retries without a response, while a load is submitted or followed
SILENCE_S = 20.0  # an event stream sends something at least every 15 s
CONNECT_S = 5.0
ANSWER_S = 30.0
STOP_ANSWER_S = 90.0  # unload and cancel reply once the memory is free; the server waits up to 60 s
MODEL_ANSWER_S = 1800.0  # of a model, which may have to be loaded first
DOWNLOAD_ANSWER_S = 90.0  # the reply comes once the hub has listed the files
ESTIMATE_ANSWER_S = 120.0  # the hub is asked for up to 60 s, and then an engine
LOG_PAUSE_S = 1.0
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0
PASSING = {429, 502, 503, 504}  # statuses of requests that may succeed later
JSON = {"Content-Type": "application/json"}
ANONYMOUS = "The server needs a token: set LOADSTONE_TOKEN, or give --token."
NOT_ACCEPTED = "The server does not accept the token of LOADSTONE_TOKEN or --token."
NO_HEADERS: Mapping[str, str] = {}

T = TypeVar("T")


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

    def __init__(
        self,
        url: str,
        token: str = "",
        note: Callable[[str], None] = lambda sentence: None,
        answer_s: float = ANSWER_S,
    ) -> None:
        self.url = url
        self.note = note
        self._answer_s = answer_s
        parts = urlsplit(url)
        assert parts.hostname is not None
        self._path = parts.path
        self._url = partial(httpcore.URL, scheme=parts.scheme, host=parts.hostname, port=parts.port)
        self._headers = {"Host": parts.netloc, "User-Agent": f"loadstone/{__version__}"}
        self._has_token = bool(token)
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        proxy, self._proxies, tls = None, "", None
        if parts.scheme == "https" or not is_loopback(parts.hostname):
            from cli import environment

            if not is_loopback(parts.hostname) and (proxy := environment.proxy_for(parts.scheme, parts.netloc)):
                self._proxies = f" or to its proxy ({environment.proxies_named()})"
            tls = environment.tls_context() if parts.scheme == "https" else None
        self._hint = ""
        if not parts.port:
            self._hint = f" The URL names no port; that of a Loadstone server is {address.PORT} by default."
        elif is_loopback(parts.hostname):
            self._hint = " Start a server with `loadstone up`, or name another with --url."
        self._http = httpcore.ConnectionPool(tls, proxy)

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
        query = urlencode({name: value for name, value in filters.items() if value is not None})
        return self._ask(JobList, "GET", f"{paths.JOBS}?{query}" if query else paths.JOBS)

    def job(self, job_id: str) -> Job:
        return self._ask(Job, "GET", _path(paths.JOB, job_id=job_id))

    def cancel(self, job_id: str) -> Job:
        """Cancel a load; return its job once it has ended and its memory is free."""
        return self._ask(Job, "DELETE", _path(paths.JOB, job_id=job_id), timeout=STOP_ANSWER_S)

    def logs(self, job_id: str) -> list[str]:
        """Return the lines of the log of a load."""
        with self._answer("GET", _path(paths.JOB_LOGS, job_id=job_id)) as answer:
            lines = answer.read().decode(errors="replace").split("\n")
            return lines if lines[-1] else lines[:-1]

    def follow_log(self, job_id: str, tail: int | None) -> Iterator[str]:
        """Yield the last `tail` lines of a log, or all, and then its new lines until the instance ends."""
        patience, seen = Patience(self.note), list[str]()
        while True:
            try:
                is_over = self.job(job_id).instance_state in TERMINAL  # first: the log is complete then
                lines = self.logs(job_id)
            except Failure as failure:
                patience.wait(failure)
                continue
            patience.reset()
            yield from new_lines(seen, lines) if tail is None else lines[max(0, len(lines) - tail) :]
            if is_over:
                return
            seen, tail = lines, None
            time.sleep(LOG_PAUSE_S)

    def estimate(self, request: LoadRequest) -> EstimateResult:
        body = msgspec.json.encode(request)
        return self._ask(EstimateResult, "POST", paths.ESTIMATE, content=body, headers=JSON, timeout=ESTIMATE_ANSWER_S)

    def download(self, request: DownloadRequest, idempotency_key: str) -> DownloadReply:
        """Start a download; return what there is of it.  Retries as `submit` does."""
        headers = {**JSON, "Idempotency-Key": idempotency_key}
        return self._submitted(
            DownloadReply, paths.DOWNLOAD, msgspec.json.encode(request), headers, timeout=DOWNLOAD_ANSWER_S
        )

    def follow_download(self, job_id: str) -> Generator[DownloadJob, None, None]:
        """Yield the job of a download at each change, and reconnect if necessary.  Close the generator after use."""
        patience, last_id = Patience(self.note), ""
        while True:
            try:
                with self._event_stream(_path(paths.DOWNLOAD_EVENTS, job_id=job_id), last_id) as answer:
                    for id_, data in events(_lines(answer, patience.reset)):
                        last_id = id_
                        yield self._decode(data, DownloadEvent).job
                raise self._broken()
            except Failure as failure:
                if failure.error.code == "too_many_waiting":  # a poll without a wait is not limited
                    yield self._ask(DownloadJob, "GET", _path(paths.ONE_DOWNLOAD, job_id=job_id))
                    patience.reset()
                patience.wait(failure)

    def change_download(self, job_id: str, change: Literal["pause", "resume"]) -> DownloadJob:
        template = paths.PAUSE_DOWNLOAD if change == "pause" else paths.RESUME_DOWNLOAD
        return self._ask(DownloadJob, "POST", _path(template, job_id=job_id), timeout=STOP_ANSWER_S)

    def remove(self, key: str, worker: str | None) -> RemovedModel:
        """Remove the files of a model."""
        query = f"?{urlencode({'worker': worker})}" if worker else ""
        return self._ask(RemovedModel, "DELETE", paths.MODEL.format(model_id=quote(key)) + query, timeout=STOP_ANSWER_S)

    def submit(self, request: LoadRequest, idempotency_key: str) -> Job:
        """Submit a load; return its job.

        Retries after failures, because requests with the same key create only one load.  The first attempt is not
        retried if the server cannot be reached.
        """
        headers = {**JSON, "Prefer": "respond-async", "Idempotency-Key": idempotency_key}
        return self._submitted(Job, paths.LOAD, msgspec.json.encode(request), headers)

    def _submitted(
        self, kind: type[T], path: str, content: bytes, headers: Mapping[str, str], timeout: float = ANSWER_S
    ) -> T:
        patience = Patience(self.note)
        is_first = True
        while True:
            try:
                return self._ask(kind, "POST", path, content=content, headers=headers, timeout=timeout)
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

    def has_model(self, name: str) -> None:
        """Raise Failure if a name is that of no model and of no instance."""
        self._ask(object, "GET", _path(paths.V1_MODEL, model_id=name))

    def chat(self, request: Mapping[str, Any]) -> Generator[Chunk, None, None]:
        """Yield the chunks of an answer to a conversation.  Closing the generator early cancels the request."""
        body = msgspec.json.encode({**request, "stream": True, "stream_options": {"include_usage": True}})
        route, wait_s = paths.CHAT_COMPLETIONS, MODEL_ANSWER_S
        with self._answer("POST", route, content=body, headers=JSON, timeout=wait_s) as answer:
            for _, data in events(_lines(answer)):
                if data == DONE:
                    return
                chunk = self._decode(data, Chunk)
                if chunk.error is not None:
                    raise Failure(_error_of(chunk.error))
                yield chunk
        raise self._broken()

    def chat_reply(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """Return the whole reply to a conversation, as the server sends it."""
        return self._ask_model(dict[str, Any], paths.CHAT_COMPLETIONS, request)

    def embed(self, model: str, texts: Sequence[str]) -> list[Embedding]:
        """Return the embeddings of texts, in their order."""
        request = {"model": model, "input": texts, "encoding_format": "float"}
        return self._ask_model(Embeddings, paths.EMBEDDINGS, request).data

    def _ask_model(self, kind: type[T], path: str, request: Mapping[str, Any]) -> T:
        body = msgspec.json.encode(request)
        return self._ask(kind, "POST", path, content=body, headers=JSON, timeout=MODEL_ANSWER_S)

    def _events(self, job_id: str, after: str, patience: Patience) -> Iterator[tuple[str, LoadEvent]]:
        """Yield the events of one connection, with their ids."""
        with self._event_stream(_path(paths.JOB_EVENTS, job_id=job_id), after) as answer:
            if answer.status != 204:
                for id_, data in events(_lines(answer, patience.reset)):
                    yield id_, self._decode(data, LoadEvent)
                return
        yield after, self.job(job_id).event()  # there are no events after that id

    def _event_stream(self, path: str, after: str) -> AbstractContextManager[httpcore.Response]:
        headers = {"Accept": "text/event-stream"} | ({"Last-Event-ID": after} if after else {})
        return self._answer("GET", path, headers=headers, timeout=SILENCE_S)

    def _ask(self, kind: type[T], method: str, path: str, **options: Any) -> T:
        with self._answer(method, path, **options) as answer:
            value: T = self._decode(answer.read(), kind)
            return value

    @contextmanager
    def _answer(
        self,
        method: str,
        path: str,
        *,
        headers: Mapping[str, str] = NO_HEADERS,
        content: bytes | None = None,
        timeout: float | None = None,
    ) -> Iterator[httpcore.Response]:
        """Yield the response to one request; read its body within the block.  Raises Failure for error statuses."""
        url = self._url(target=self._path + path)
        fields = [*self._headers.items(), *headers.items()]
        within_s = timeout or self._answer_s
        limits = {"connect": min(CONNECT_S, within_s), "read": within_s, "write": within_s, "pool": within_s}
        try:
            with self._http.stream(
                method, url, headers=fields, content=content, extensions={"timeout": limits}
            ) as answer:
                if not 200 <= answer.status < 300:
                    answer.read()
                    raise self._refusal(answer)
                yield answer
        except httpcore.ProxyError as e:
            raise Failure(error("unreachable", f"The proxy cannot connect to {self.url} ({e})."), 0.0) from None
        except (httpcore.ConnectError, httpcore.ConnectTimeout) as e:
            sentence = f"Cannot connect to {self.url}{self._proxies} ({e}).{self._hint}"
            raise Unreachable(error("unreachable", sentence), 0.0) from None
        except httpcore.TimeoutException:
            raise Failure(error("no_answer", f"The server at {self.url} does not respond."), 0.0) from None
        except (httpcore.NetworkError, httpcore.ProtocolError):  # their text may contain a header
            raise self._broken() from None

    def _refusal(self, answer: httpcore.Response) -> Failure:
        after = next((value for name, value in answer.headers if name.lower() == b"retry-after"), b"")
        wait = (float(after) if after.isdigit() else 0.0) if answer.status in PASSING else None
        try:
            reason = _error_of(msgspec.json.decode(answer.content, type=dict[str, Any])["error"])
            if answer.status == 401:  # the sentence of the server is for programs, which write headers
                reason = msgspec.structs.replace(reason, message=NOT_ACCEPTED if self._has_token else ANONYMOUS)
            return Failure(reason, wait)
        except (msgspec.DecodeError, msgspec.ValidationError, KeyError, AttributeError):
            return Failure(error("unexpected_reply", f"{self.url} returned HTTP status {answer.status}."), wait)

    def _broken(self) -> Failure:
        return Failure(error("connection_lost", f"The connection to {self.url} was lost."), 0.0)

    def _decode(self, data: bytes, kind: Any) -> Any:
        try:
            return msgspec.json.decode(data, type=kind)
        except (msgspec.DecodeError, UnicodeDecodeError):
            raise Failure(
                error("unexpected_reply", f"{self.url} returned an unexpected response. Is it a Loadstone server?")
            ) from None


def _error_of(body: dict[str, Any]) -> ErrorBody:
    """Return an error that has the form of any API.  That of OpenAI's has null for what does not apply.

    Raises ValidationError and AttributeError.
    """
    return msgspec.convert({name: value for name, value in body.items() if value is not None}, ErrorBody)


def _ended(reason: ErrorBody) -> Failure:
    """Return the failure for the last event of a stream.  It can be retried if only the stream failed, not the load."""
    return Failure(reason, 1.0 if reason.code == "queue_unavailable" else None)


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


def new_lines(seen: list[str], lines: list[str]) -> list[str]:
    """Return the lines of a log that come after those seen.  Its oldest lines, after the first, may be gone."""
    overlap = next((n for n in range(len(seen), 0, -1) if lines[1 : n + 1] == seen[len(seen) - n :]), 0)
    return lines[len(seen) :] if lines[: len(seen)] == seen else lines[1 + overlap :] if overlap else lines


def _lines(answer: httpcore.Response, received: Callable[[], None] = lambda: None) -> Iterator[bytes]:
    """Split a body into lines.  Calls `received` for each part that arrives."""
    rest = b""
    for chunk in answer.iter_stream():
        received()
        *lines, rest = (rest + chunk).split(b"\n")
        yield from (line.removesuffix(b"\r") for line in lines)


def _path(template: str, **ids: str) -> str:
    """Insert ids into a path, each as a single segment; dots are encoded, because dot segments name other paths."""
    return template.format(**{name: quote(id_, safe="").replace(".", "%2E") for name, id_ in ids.items()})
