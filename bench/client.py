"""A lean HTTP/1.1 client in its own process, used for all measurements.

`python -m bench.client` answers each `Task` on stdin with a `Sent`, both as lines of JSON.  Requests are encoded and
connections opened before the first request is sent; connections are kept.  A reply must have a Content-Length.
"""

from __future__ import annotations

import asyncio
import re
import sys
import time
from collections.abc import Iterator
from typing import cast

import msgspec
import uvloop
from msgspec import Struct

LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


class Task(Struct, frozen=True, kw_only=True):
    """Send these requests to a local port, `at_once` at a time; with `bodies` return the bodies of the replies."""

    port: int
    requests: list[str]
    at_once: int
    within_s: float
    bodies: bool


class Answer(Struct, frozen=True):
    """A reply; `seconds` count from writing the request to the last byte of the reply."""

    status: int
    seconds: float
    body: str


class Sent(Struct, frozen=True, kw_only=True):
    """`wall_s` counts from the first request to the last reply; `cpu_s` is the CPU time of this client meanwhile."""

    wall_s: float
    cpu_s: float
    answers: list[Answer]


def request(method: str, path: str, body: str = "", headers: str = "") -> str:
    return (
        f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n{headers}"
        f"Content-Length: {len(body.encode())}\r\n\r\n{body}"
    )


class Connection(asyncio.Protocol):
    """A connection that sends one request after the other."""

    def __init__(self) -> None:
        self._buffer = b""
        self._reply: asyncio.Future[tuple[int, bytes]] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's transports do not inherit from it

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        head, end, body = self._buffer.partition(b"\r\n\r\n")
        if end and len(body) >= (int(match[1]) if (match := LENGTH.search(head)) else 0):
            self._buffer = b""
            self._reply.set_result((int(head[9:12]), body))

    def connection_lost(self, exc: Exception | None) -> None:
        if not self._reply.done():
            self._reply.set_exception(ConnectionError("the server ended the connection"))
            self._reply.exception()  # marks it as retrieved: between two requests no task awaits it

    async def exchange(self, content: bytes) -> tuple[int, float, bytes]:
        if self.transport.is_closing():
            raise ConnectionError("the server ended the connection")
        self._reply = asyncio.get_running_loop().create_future()
        started = time.perf_counter()
        self.transport.write(content)
        status, body = await self._reply
        return status, time.perf_counter() - started, body


async def send(task: Task) -> Sent:
    async with asyncio.timeout(task.within_s):
        loop = asyncio.get_running_loop()
        connections = [await loop.create_connection(Connection, "127.0.0.1", task.port) for _ in range(task.at_once)]
        todo = iter([text.encode() for text in task.requests])
        replies: list[tuple[int, float, bytes]] = []
        cpu, started = time.process_time(), time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _, connection in connections:
                group.create_task(_send_on(connection, todo, replies))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu
        for transport, _ in connections:
            transport.close()
    answers = [Answer(status, seconds, body.decode() if task.bodies else "") for status, seconds, body in replies]
    return Sent(wall_s=wall_s, cpu_s=cpu_s, answers=answers)


async def _send_on(connection: Connection, todo: Iterator[bytes], replies: list[tuple[int, float, bytes]]) -> None:
    for content in todo:
        replies.append(await connection.exchange(content))


def main() -> None:
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        for line in sys.stdin:
            sent = runner.run(send(msgspec.json.decode(line, type=Task)))
            print(msgspec.json.encode(sent).decode(), flush=True)


if __name__ == "__main__":
    main()
