"""A worker with a loaded instance whose runner echoes, an API process's end of its channels, and strangers."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pytest
import uvloop
from msgspec import msgpack

from api.channel.channels import Channels
from shared import framing
from shared.channel import tls
from shared.channel.address import Address
from shared.channel.messages import Deltas, FromRunner, Generate
from shared.channel.trust import Challenge, Rejected, Welcome
from shared.instance import Instance
from shared.lifecycle import State
from shared.telemetry.tally import Tally
from tests.support import echo
from tests.support.agents import delivered, reached, warm
from tests.support.service import below
from tests.support.waiting import until
from worker.agent import Agent
from worker.listener.port import Port
from worker.runner.process import Runner

DEADLINE_S = 60.0
# For a module that overrides `event_loop_policy` by `uvloop_policy`: the hook that replaces the fixture would change
# the loop, and the name, of every test of the directory.
MAY_CHOOSE_LOOP = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture")
GREETING: msgpack.Decoder[Challenge | Welcome | Rejected] = msgpack.Decoder(Challenge | Welcome | Rejected)


@pytest.fixture(scope="module")
def uvloop_policy() -> asyncio.AbstractEventLoopPolicy:
    """The loop of API processes and workers: its transports and sockets are not those of asyncio."""
    uvloop.run(asyncio.sleep(0))  # its lasting state exists before the first test
    policy: asyncio.AbstractEventLoopPolicy = uvloop.EventLoopPolicy()
    return policy


@dataclass
class Served:
    """A worker with one loaded instance, and an API process's end of its channels."""

    agent: Agent
    runner: Runner
    instance: Instance
    channels: Channels
    tally: Tally

    @property
    def address(self) -> Address:
        assert self.agent.listener.address is not None
        return self.agent.listener.address

    def listener_pid(self) -> int:
        (pid,) = [one.pid for one in below(os.getpid()) if "worker.listener.server" in one.words]
        return pid

    async def said(self, line: str, times: int = 1) -> None:
        await until(lambda: [*self.runner.output].count(line) >= times, f"the runner says '{line}'")

    async def answer(self, conversation: bytes = echo.ECHO, n: int = 3) -> list[FromRunner]:
        request = Generate(id=0, client="c", conversation=conversation, max_tokens=n)
        async with asyncio.timeout(DEADLINE_S), self.channels.answering(self.instance, request, "/test") as answer:
            return [message async for message in answer]


@asynccontextmanager
async def serving(agent: Agent, path: Path, port: Port | None = None) -> AsyncIterator[Served]:
    """Load an instance at a worker that listens."""
    with agent.listener.bound([path], port):
        listening = asyncio.create_task(agent.listener.run())
        runner = await warm(agent)
        instance = await reached(agent, await delivered(agent), State.LOADED)
        tally = Tally()
        one = Served(agent, runner, instance, Channels(lambda _: agent.snapshot(), tally), tally)
        yield one
        await one.channels.close()
        listening.cancel()
        await asyncio.wait([listening])


def text(messages: list[FromRunner]) -> str:
    return "".join(delta.text for message in messages if isinstance(message, Deltas) for delta in message.deltas)


class Stranger:
    """A client of the listener that speaks for itself, over its Unix socket."""

    def __init__(self, address: Address) -> None:
        self.socket = self.connect(address)
        self.stream = self.socket.makefile("rb")

    def connect(self, address: Address) -> socket.socket:
        connection = socket.socket(socket.AF_UNIX)
        connection.settimeout(DEADLINE_S)
        connection.connect(address.path)
        return connection

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stream.close()
        self.socket.close()

    def read(self) -> Challenge | Welcome | Rejected | None:
        data = framing.read_blocking(self.stream)
        return None if data is None else GREETING.decode(data)

    def send(self, data: bytes) -> None:
        with suppress(BrokenPipeError):
            self.socket.sendall(data)


class PlainStranger(Stranger):
    """A stranger on the port that does not speak TLS."""

    def connect(self, address: Address) -> socket.socket:
        assert address.tcp is not None
        return socket.create_connection((address.tcp.host, address.tcp.port), DEADLINE_S)


class TlsStranger(PlainStranger):
    """A stranger on the port, in TLS."""

    def connect(self, address: Address) -> socket.socket:
        return tls.context(ssl.PROTOCOL_TLS_CLIENT).wrap_socket(super().connect(address))


def descriptors(pid: int) -> int:
    return len([*Path(f"/proc/{pid}/fd").iterdir()])
