"""The routes: each decodes, calls one use case, and encodes."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from api.decode import decode, read_body
from api.errors import RETRY_AFTER_S
from api.loads import Loads
from shared.errors import QueueUnavailable
from shared.schema import Instance, LoadRequest, ModelList, UnloadRequest, UnloadResult
from shared.store import UNAVAILABLE

T = TypeVar("T")


async def load(request: Request) -> Response:
    wanted = decode(await read_body(request), LoadRequest, '"{}" is required')
    loads: Loads = request.state.loads
    instance = await waited_for(request, loads.loaded(await loads.submit(wanted)))
    return _json(instance.result(), {"Server-Timing": server_timing(instance)})


async def unload(request: Request) -> Response:
    wanted = decode(await read_body(request), UnloadRequest, "Missing required field '{}'")
    loads: Loads = request.state.loads
    await waited_for(request, loads.unload(wanted.instance_id))
    return _json(UnloadResult(instance_id=wanted.instance_id))


async def models(request: Request) -> Response:
    loads: Loads = request.state.loads
    return _json(ModelList(models=await loads.models()))


async def healthz(request: Request) -> Response:
    return PlainTextResponse("ok\n")


async def readyz(request: Request) -> Response:
    """200 if Redis answers and a worker holds a lease: then a load can be accepted and carried out."""
    loads: Loads = request.state.loads
    try:
        missing = "" if any(w.epoch for w in await loads.store.workers()) else "no worker holds a lease\n"
    except UNAVAILABLE:
        missing = "Redis does not answer\n"
    if missing:
        return PlainTextResponse(missing, 503, {"Retry-After": str(RETRY_AFTER_S)})
    return PlainTextResponse("ready\n")


ROUTES = [
    Route("/api/v1/models/load", load, methods=["POST"]),
    Route("/api/v1/models/unload", unload, methods=["POST"]),
    Route("/api/v1/models", models, methods=["GET"]),
    Route("/healthz", healthz, methods=["GET"]),
    Route("/readyz", readyz, methods=["GET"]),
]


async def waited_for(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """The result of `work`, unless the client goes away or this process is told to stop: then waiting ends, and
    nothing else does, since a load belongs to its worker."""
    closing: asyncio.Event = request.state.closing
    job = asyncio.ensure_future(work)
    others = [asyncio.ensure_future(closing.wait()), asyncio.ensure_future(_gone(request))]
    try:
        await asyncio.wait([job, *others], return_when=asyncio.FIRST_COMPLETED)
        if job.done():
            return job.result()
        raise QueueUnavailable("This server is shutting down; what was accepted goes on without it.")
    finally:
        for task in (job, *others):
            task.cancel()
        await asyncio.gather(job, *others, return_exceptions=True)


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def server_timing(instance: Instance) -> str:
    """W3C Server-Timing: phases in milliseconds, and their sum."""
    phases = {**instance.timing, "total": sum(instance.timing.values())}
    return ", ".join(f"{name};dur={seconds * 1000:.3f}" for name, seconds in phases.items())


def _json(value: object, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")
