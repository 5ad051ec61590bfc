"""The bare handler: what Starlette, uvicorn and redis-py cost without Loadstone.

`python -m bench.handler REDIS_URL` prints the port it listens on.  Each request's small JSON body is decoded, and one
command is sent to Redis.  uvicorn has the API's options; there is no middleware.
"""

from __future__ import annotations

import socket
import sys

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


class Wanted(Struct, frozen=True):
    model: str


def create_app(redis_url: str) -> Starlette:
    redis = Redis.from_url(redis_url)

    async def count(request: Request) -> Response:
        wanted = msgspec.json.decode(await request.body(), type=Wanted)
        n = await redis.incr(KEY)
        return Response(msgspec.json.encode({"model": wanted.model, "n": n}), media_type="application/json")

    return Starlette(routes=[Route("/", count, methods=["POST"])])


def main(redis_url: str) -> None:
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    print(listening.getsockname()[1], flush=True)
    uvicorn.Server(server_config(create_app(redis_url))).run(sockets=[listening])


if __name__ == "__main__":
    main(sys.argv[1])
