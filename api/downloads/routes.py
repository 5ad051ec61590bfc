"""The routes of downloads."""

from __future__ import annotations

import re
from contextlib import AsyncExitStack

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.decode import decode, read_body
from api.downloads.jobs import events, is_over, job, reply
from api.headers import MOST_JOBS, USUAL_JOBS, idempotency_key, whole_number
from api.state import State
from api.waiting import EventStream, waited_for
from shared.download import Wanted
from shared.errors import JobNotFound, QueueUnavailable
from shared.schema.http import DownloadJobList, DownloadReply, DownloadRequest, RemovedModel

ID = re.compile(r"job_[0-9a-f]{10}")


async def download(request: Request[State]) -> Response:
    """Start a download."""
    body = decode(await read_body(request), DownloadRequest, "Missing required field '{}'")
    key = idempotency_key(request.headers.getlist("idempotency-key"))
    if request.state["draining"].is_set():
        raise QueueUnavailable("The server is shutting down and accepts no new downloads. Try again shortly.")
    with request.state["replies"].place(request.state["caller"]):
        started = await waited_for(request, request.state["downloads"].start(body, key))
    return _json(DownloadReply(status="already_downloaded") if started is None else reply(started))


async def downloads(request: Request[State]) -> Response:
    limit = whole_number(request.query_params, "limit", default=USUAL_JOBS, lowest=1, highest=MOST_JOBS)
    newest = await request.state["downloads"].newest(limit)
    return _json(DownloadJobList(jobs=[job(one) for one in newest]))


async def one_download(request: Request[State]) -> Response:
    return _json(job(await request.state["downloads"].get(_id(request))))


async def cancel(request: Request[State]) -> Response:
    return await _asked(request, "cancel")


async def pause(request: Request[State]) -> Response:
    return await _asked(request, "pause")


async def resume(request: Request[State]) -> Response:
    return await _asked(request, "run")


async def download_events(request: Request[State]) -> Response:
    found = await request.state["downloads"].get(_id(request))
    if request.method == "HEAD":
        return Response(media_type=EventStream.media_type)
    last = request.headers.get("last-event-id", "")
    after = int(last) if re.fullmatch(r"[0-9]{1,15}", last) else 0
    if is_over(found) and found.rev <= after:
        return Response(status_code=204)
    place = AsyncExitStack()
    place.enter_context(request.state["replies"].place(request.state["caller"]))
    closing = request.state["closing"]
    return EventStream(events(request.state["downloads"], found.id, after, closing), place, closing)


async def remove_model(request: Request[State]) -> Response:
    """Remove the files of a model."""
    key = request.path_params["model_id"]
    worker = request.query_params.get("worker") or None
    workers = await waited_for(request, request.state["downloads"].remove(key, worker))
    return _json(RemovedModel(model=key, workers=workers))


async def _asked(request: Request[State], wanted: Wanted) -> Response:
    id_, state = _id(request), request.state["downloads"]
    await state.ask(id_, wanted)
    return _json(job(await waited_for(request, state.done(id_, wanted))))


def _id(request: Request[State]) -> str:
    """Return the id in the path.  Raises JobNotFound if it is malformed: it could name another key in Redis."""
    id_: str = request.path_params["job_id"]
    if not ID.fullmatch(id_):
        raise JobNotFound(f"Job '{id_}' not found.", param="job_id")
    return id_


def _json(value: object) -> Response:
    return Response(msgspec.json.encode(value), media_type="application/json")
