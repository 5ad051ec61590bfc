"""The routes.  Each one decodes the request, calls one use case, and encodes the reply."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, AsyncExitStack
from functools import partial
from typing import NamedTuple, TypeVar, get_args

import msgspec
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.requests import Request
from starlette.responses import PlainTextResponse, RedirectResponse, Response
from starlette.routing import Route

from api import unserved
from api.access import guarded
from api.anthropic import models as anthropic
from api.anthropic.messages import count_tokens, messages
from api.decode import decode, read_body
from api.downloads import routes as downloads
from api.headers import (
    FIRST,
    LONGEST_WAIT_S,
    MOST_JOBS,
    USUAL_JOBS,
    accepts_events,
    idempotency_key,
    instance_ids,
    last_event_id,
    one_of,
    preference,
    whole_number,
)
from api.lmstudio import answers as legacy
from api.lmstudio import models as lmstudio
from api.lmstudio.chat.routes import chat_with
from api.loads.follow import settled
from api.loads.jobs import is_over, job
from api.loads.stream import events
from api.openai import models as openai
from api.openai.chat import chat_completions
from api.openai.completions import completions
from api.openai.embeddings import embeddings
from api.openapi.document import docs_page, openapi_json
from api.pool.estimate import asked_of_hub, estimated, estimated_by_hub
from api.pool.metrics import CONTENT_TYPE, scraped
from api.rerank.routes import rerank
from api.responses import routes as responses
from api.state import State
from api.tokens.routes import apply_template, detokenize, input_tokens, tokenize, tokenizer_info
from api.waiting import EventStream, waited_for
from shared import paths
from shared.errors import JobNotFound, ModelNotFound, QueueUnavailable
from shared.instance import Instance
from shared.schema.http import JobList, JobStatus, LoadRequest, UnloadRequest, UnloadResult, WorkerList
from shared.store.connection import UNAVAILABLE

T = TypeVar("T")


class _Key(PathConvertor):
    """The key of a model in a path: the rest of it, unless that is another route's."""

    regex = r"(?!(?:load|unload|estimate|download)$|(?:load|download)/status(?:/|$)).+"


class _ResponseId(PathConvertor):
    """The id of a response: a part of the path, unless that is another route's."""

    regex = r"(?!input_tokens$)[^/]+"


register_url_convertor("key", _Key())
register_url_convertor("response", _ResponseId())
KINDS = {paths.MODEL: "key", paths.RESPONSE: "response"}  # of placeholders, which otherwise take the rest of the path


class Requested(NamedTuple):
    """A load for a client, with the headers of the reply, and what to call if the client leaves before the outcome."""

    instance: Instance
    joined: dict[str, str]
    left: Callable[[], None]


async def load(request: Request[State]) -> Response:
    """Load a model.

    Replies with an event stream, with a job to poll, or with the result once the load has ended.  If the client limits
    the wait for the result, it gets the job at that time.
    """
    body = decode(await read_body(request), LoadRequest, '"{}" is required')
    key = idempotency_key(request.headers.getlist("idempotency-key"))
    if request.state["draining"].is_set():
        raise QueueUnavailable("The server is shutting down and accepts no new loads. Try again shortly.")
    submit = partial(_submitted, request, body, key)
    if accepts_events(request.headers.getlist("accept")):
        return await _stream(request, submit, FIRST)
    prefer = preference(request.headers.getlist("prefer"))
    applied = {"Preference-Applied": prefer.applied} if prefer.applied else {}
    if prefer.wait_s == 0:
        instance, joined, _ = await submit()
        return _accepted(instance, joined | applied)
    with _place(request):
        instance, joined, left = await submit()
        applied |= joined
        try:
            async with asyncio.timeout(prefer.wait_s) as patience:
                instance = await waited_for(request, request.state["follower"].loaded(instance), left)
        except (TimeoutError, *UNAVAILABLE):
            if patience.expired():
                return _accepted(await request.state["records"].get(instance.id), applied)
            left()
            raise
    evicted = {"Loadstone-Evicted": instance_ids(instance.evicted)} if instance.evicted else {}
    return _json(instance.result(), headers={"Server-Timing": server_timing(instance), **evicted, **applied})


async def estimate(request: Request[State]) -> Response:
    body = decode(await read_body(request), LoadRequest, '"{}" is required')
    roster, queue = request.state["roster"], request.state["queue"]
    try:
        return _json(await estimated(body, roster, queue))
    except ModelNotFound as absent:
        if (question := asked_of_hub(body, roster)) is None:
            raise
        with _place(request):
            return _json(await waited_for(request, estimated_by_hub(body, question, absent, roster, queue)))


async def jobs(request: Request[State]) -> Response:
    status = one_of(request.query_params, "status", get_args(JobStatus))
    limit = whole_number(request.query_params, "limit", default=USUAL_JOBS, lowest=1, highest=MOST_JOBS)
    records = await request.state["records"].newest(status, limit)
    return _json(JobList(jobs=[job(instance) for instance in records]))


async def one_job(request: Request[State]) -> Response:
    """Return the job; with `wait`, once the load has ended or after that many seconds."""
    wait_s = whole_number(request.query_params, "wait", default=0, lowest=0, highest=LONGEST_WAIT_S)
    records = request.state["records"]
    instance = await records.get(_job_id(request))
    if wait_s and not is_over(instance):
        with _place(request):
            instance = await waited_for(request, settled(request.state["follower"], records, instance, wait_s))
    return _json(job(instance))


async def cancel(request: Request[State]) -> Response:
    stopper = request.state["stopper"]
    cancelled = await stopper.cancel(_job_id(request))
    return _json(job(await waited_for(request, stopper.cancelled(cancelled))))


async def job_events(request: Request[State]) -> Response:
    if request.method == "HEAD":
        await request.state["records"].get(_job_id(request))
        return Response(media_type=EventStream.media_type)
    after = last_event_id(request.headers.get("last-event-id"))

    async def find() -> Requested:
        return Requested(await request.state["records"].get(_job_id(request)), {}, lambda: None)

    return await _stream(request, find, after)


async def job_logs(request: Request[State]) -> Response:
    return PlainTextResponse(await request.state["records"].log(_job_id(request)))


async def unload(request: Request[State]) -> Response:
    body = decode(await read_body(request), UnloadRequest, "Missing required field '{}'")
    stopper = request.state["stopper"]
    unloading = await stopper.unload(body.instance_id)
    await waited_for(request, stopper.unloaded(unloading))
    return _json(UnloadResult(instance_id=unloading.instance_id))


async def models(request: Request[State]) -> Response:
    return Response(await request.state["listing"].models(), media_type="application/json")


async def v1_models(request: Request[State]) -> Response:
    """Return the ids in OpenAI's form, or in Anthropic's to a client that sends what only Anthropic's API has."""
    entries = await request.state["ids"].all()
    if not _is_anthropic(request):
        return _json(openai.OpenAIModelList(data=[openai.listed(entry) for entry in entries]))
    query = request.query_params
    limit = whole_number(query, "limit", anthropic.MOST_MODELS, lowest=1, highest=anthropic.MOST_MODELS)
    return _json(anthropic.page(entries, limit, query.get("after_id"), query.get("before_id")))


async def v1_model(request: Request[State]) -> Response:
    entry = await request.state["ids"].one(request.path_params["model_id"])
    return _json(anthropic.listed(entry) if _is_anthropic(request) else openai.listed(entry))


def _is_anthropic(request: Request[State]) -> bool:
    return "anthropic-version" in request.headers or "limit" in request.query_params


async def v0_models(request: Request[State]) -> Response:
    entries = await request.state["ids"].all()
    return _json(lmstudio.LegacyModelList(data=[lmstudio.listed(entry) for entry in entries]))


async def v0_model(request: Request[State]) -> Response:
    return _json(lmstudio.listed(await request.state["ids"].one(request.path_params["model_id"])))


async def workers(request: Request[State]) -> Response:
    return _json(WorkerList(workers=await request.state["listing"].workers()))


async def healthz(request: Request[State]) -> Response:
    return PlainTextResponse("ok\n")


async def readyz(request: Request[State]) -> Response:
    """Reply with 200 if Redis answers and a worker holds a lease, so that loads can be accepted and carried out.

    Replies with 503 otherwise, and from the stop signal on.
    """
    try:
        missing = "" if any(w.epoch for w in await request.state["workers"].all()) else "no worker holds a lease\n"
    except UNAVAILABLE:
        missing = "Redis does not answer\n"
    if request.state["draining"].is_set():
        missing = "shutting down\n"
    if missing:
        return PlainTextResponse(missing, 503, {"Retry-After": str(QueueUnavailable.retry_after_s)})
    return PlainTextResponse("ready\n")


async def metrics(request: Request[State]) -> Response:
    """Reply with the metrics, with status 200 also without Redis."""
    return Response(await scraped(request.state["counters"], request.state["tally"]), media_type=CONTENT_TYPE)


async def root(request: Request[State]) -> Response:
    return RedirectResponse(paths.DOCS)


def _rest(path: str, endpoint: Callable[[Request[State]], Awaitable[Response]], method: str = "GET") -> Route:
    """Return a route whose placeholder is of its kind in KINDS, with the path as the document has it."""
    route = Route(path.replace("}", f":{KINDS.get(path, 'path')}}}"), endpoint, methods=[method])
    route.path = path
    return route


_ROUTES = [  # in order of matching: the most frequent come first
    Route(paths.JOB, one_job, methods=["GET"]),
    Route(paths.MODELS, models, methods=["GET"]),
    Route(paths.LOAD, load, methods=["POST"]),
    Route(paths.ESTIMATE, estimate, methods=["POST"]),
    Route(paths.JOBS, jobs, methods=["GET"]),
    Route(paths.JOB, cancel, methods=["DELETE"]),
    Route(paths.JOB_EVENTS, job_events, methods=["GET"]),
    Route(paths.JOB_LOGS, job_logs, methods=["GET"]),
    Route(paths.UNLOAD, unload, methods=["POST"]),
    Route(paths.DOWNLOAD, downloads.download, methods=["POST"]),
    Route(paths.DOWNLOADS, downloads.downloads, methods=["GET"]),
    Route(paths.ONE_DOWNLOAD, downloads.one_download, methods=["GET"]),
    Route(paths.ONE_DOWNLOAD, downloads.cancel, methods=["DELETE"]),
    Route(paths.DOWNLOAD_EVENTS, downloads.download_events, methods=["GET"]),
    Route(paths.PAUSE_DOWNLOAD, downloads.pause, methods=["POST"]),
    Route(paths.RESUME_DOWNLOAD, downloads.resume, methods=["POST"]),
    _rest(paths.MODEL, downloads.remove_model, "DELETE"),
    Route(paths.CHAT_COMPLETIONS, chat_completions, methods=["POST"]),
    Route(paths.RESPONSES, responses.create, methods=["POST"]),
    Route(paths.RESPONSES_INPUT_TOKENS, responses.input_tokens, methods=["POST"]),
    _rest(paths.RESPONSE, responses.stored),
    _rest(paths.RESPONSE, responses.delete, "DELETE"),
    Route(paths.RESPONSES, responses.delete_all, methods=["DELETE"]),
    Route(paths.MESSAGES, messages, methods=["POST"]),
    Route(paths.COUNT_TOKENS, count_tokens, methods=["POST"]),
    Route(paths.COMPLETIONS, completions, methods=["POST"]),
    Route(paths.EMBEDDINGS, embeddings, methods=["POST"]),
    *(Route(path, rerank, methods=["POST"]) for path in paths.RERANKS),
    Route(paths.NATIVE_CHAT, chat_with, methods=["POST"]),
    Route(paths.V0_CHAT_COMPLETIONS, legacy.chat_completions, methods=["POST"]),
    Route(paths.V0_EMBEDDINGS, embeddings, methods=["POST"]),
    Route(paths.V0_COMPLETIONS, legacy.completions, methods=["POST"]),
    Route(paths.CHAT_INPUT_TOKENS, input_tokens, methods=["POST"]),
    Route(paths.TOKENIZE, tokenize, methods=["POST"]),
    Route(paths.DETOKENIZE, detokenize, methods=["POST"]),
    Route(paths.TOKENIZER_INFO, tokenizer_info, methods=["GET"]),
    Route(paths.APPLY_TEMPLATE, apply_template, methods=["POST"]),
    Route(paths.V1_MODELS, v1_models, methods=["GET"]),
    _rest(paths.V1_MODEL, v1_model),
    Route(paths.V0_MODELS, v0_models, methods=["GET"]),
    _rest(paths.V0_MODEL, v0_model),
    Route(paths.WORKERS, workers, methods=["GET"]),
    Route(paths.HEALTHZ, healthz, methods=["GET"]),
    Route(paths.READYZ, readyz, methods=["GET"]),
    Route(paths.METRICS, metrics, methods=["GET"]),
    Route(paths.OPENAPI, openapi_json, methods=["GET"]),
    Route(paths.DOCS, docs_page, methods=["GET"]),
    Route(paths.ROOT, root, methods=["GET"], include_in_schema=False),
    *unserved.ROUTES,
]
ROUTES = [*map(guarded, _ROUTES)]


def _job_id(request: Request[State]) -> str:
    """Return the id in the path.  Raises JobNotFound if it is malformed: it could name another key in Redis."""
    job_id: str = request.path_params["job_id"]
    if not re.fullmatch(r"load_[0-9a-f]{32}", job_id):
        raise JobNotFound(f"Job '{job_id}' not found.", param="job_id")
    return job_id


def _place(request: Request[State]) -> AbstractContextManager[None]:
    return request.state["replies"].place(request.state["caller"])


async def _submitted(request: Request[State], body: LoadRequest, key: str) -> Requested:
    state = request.state
    instance = await state["intake"].submit(body, key, state["traceparent"], state["caller"])
    is_new = instance.traceparent == state["traceparent"]  # a load has the span of the request that made it
    return Requested(
        instance,
        {} if is_new else {"Loadstone-Joined": instance.id},
        (lambda: None) if key else partial(state["departures"].add, instance, state["caller"]),
    )


async def _stream(request: Request[State], find: Callable[[], Awaitable[Requested]], after: str) -> Response:
    """Reply with the events of a load after entry `after`.

    If there are no more events, replies with 204, after which browsers do not reconnect.  An error of `find` becomes an
    ordinary error reply.
    """
    follower, closing = request.state["follower"], request.state["closing"]
    async with AsyncExitStack() as undo:
        undo.enter_context(_place(request))
        instance, joined, left = await find()
        start = await follower.resumed(instance, after)
        if start is None:
            return Response(status_code=204)
        place = undo.pop_all()
    return EventStream(events(follower, instance, start, closing, left), place, closing, joined, left)


def _accepted(instance: Instance, applied: dict[str, str]) -> Response:
    headers = {"Location": paths.JOB.format(job_id=instance.id), "Retry-After": "1", **applied}
    return _json(job(instance), 202, headers)


def server_timing(instance: Instance) -> str:
    """Return the value of a Server-Timing header (W3C): the phases of the job in milliseconds, and their sum."""
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in job(instance).timing.items())


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), status, headers, media_type="application/json")
