"""Bare routes: the cost of Starlette and uvicorn without Loadstone.

`python -m bench.handler FD REDIS_URL` serves on an inherited listening socket, with the API's uvicorn options and no
middleware.  `GET /N` answers with N constant bytes; `POST /` decodes a small JSON body and sends one command to Redis.
"""

from __future__ import annotations

import socket
import sys
from functools import cache

import msgspec
import uvicorn
from msgspec import Struct
from redis.asyncio import Redis
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from api.__main__ import server_config

KEY = "bench"


class Body(Struct, frozen=True):
    model: str


def create_app(redis_url: str) -> Starlette:
    redis = Redis.from_url(redis_url)
    content = cache(lambda n: b"x" * n)

    async def constant(request: Request) -> Response:
        return Response(content(int(request.path_params["n"])), media_type="application/json")

    async def count(request: Request) -> Response:
        body = msgspec.json.decode(await request.body(), type=Body)
        n = await redis.incr(KEY)
        return Response(msgspec.json.encode({"model": body.model, "n": n}), media_type="application/json")

    return Starlette(routes=[Route("/{n}", constant, methods=["GET"]), Route("/", count, methods=["POST"])])


def main(fd: int, redis_url: str) -> None:
    uvicorn.Server(server_config(create_app(redis_url))).run(sockets=[socket.socket(fileno=fd)])


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
