"""Any message of a runner in any phase leaves no runner without an owner and no reserved memory."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Literal, get_args

import msgspec
import pytest
from msgspec import msgpack

import worker.runner.warm
from shared.framing import LENGTH, frame
from shared.instance import Instance
from shared.lifecycle import State
from shared.memory.placement import Placement
from shared.schema.http import EngineBuild, LoadRequest
from shared.schema.memory import CPU, Usage
from shared.schema.model import Model
from shared.schema.snapshot import Sizing
from tests.support.agents import (
    DEADLINE_S,
    Engine,
    delivered,
    reached,
    ready,
    record,
    released,
    warm,
)
from tests.support.runners import is_gone
from tests.support.waiting import until
from worker.agent import Agent
from worker.runner.process import Received, Runner, Unreadable
from worker.runner.protocol import Busy, Closed, Failed, FromRunner, Measured, Pong, Progress, Ready, Warm

pytestmark = pytest.mark.usefixtures("forkserver")


Phase = Literal["warm", "measuring", "loading", "loaded"]
WARM = Warm(EngineBuild(llama_cpp_python="0", llama_cpp_commit="0", backends=["CPU"], chat_unavailable=None))
MESSAGES: list[Received] = [
    WARM,
    Pong(),
    Closed(1),
    Busy(1),
    Progress("weights", 1),
    msgspec.convert({"config": {"context_length": 256}, "timing": {"weights": 0.5}, "files": [], "usage": []}, Ready),
    Measured([Usage(id=CPU, weights_bytes=1)]),
    Failed("it will not"),
    Unreadable(),
    None,
]
IN_TURN: dict[Phase, set[type]] = {
    "warm": {Progress, Ready, Failed},  # read as the first answer to the load that takes the runner
    "measuring": {Measured, Failed},
    "loading": {Progress, Ready, Failed},
    "loaded": set(),
}


def name(value: object) -> str:
    return value if isinstance(value, str) else type(value).__name__


def measure_first(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the runner of a load do a dry run first, as for several GPUs."""
    place = agent.placer.place

    async def placed_unsurely(instance: Instance, model: Model) -> Placement | None:
        placed = await place(instance, model)
        return None if placed is None else msgspec.structs.replace(placed, exact=False)

    monkeypatch.setattr(agent.placer, "place", placed_unsurely)


def test_the_table_covers_every_message_of_the_protocol() -> None:
    assert {*get_args(FromRunner)} <= {type(message) for message in MESSAGES}


@pytest.mark.parametrize("message", MESSAGES, ids=name)
@pytest.mark.parametrize("phase", get_args(Phase))
async def test_any_message_in_any_phase_leaves_nothing_behind(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, phase: Phase, message: Received
) -> None:
    runner = await warm(agent)
    engine = Engine(runner, monkeypatch)
    sent = ready(agent) if isinstance(message, Ready) else message
    if phase == "measuring":
        measure_first(agent, monkeypatch)
    if phase == "warm":
        engine.says(sent)
    id_ = await delivered(agent)
    if phase == "loaded":
        engine.says(ready(agent))
        await reached(agent, id_, State.LOADED)
    elif phase != "warm":
        await wait_for_runner(agent, id_)
    if phase != "warm":
        engine.says(sent)
    engine.says(None)  # after an expected answer the instance lives until its runner dies
    await released(agent, id_)

    ended = await record(agent, id_)
    assert ended.state is State.FAILED
    assert ended.error is not None
    assert is_gone(runner.pid)
    assert not agent.placer.ledger.reservations
    assert agent.residents == {}
    if message is not None and type(message) not in IN_TURN[phase]:
        assert ended.error.code == "engine_crashed"
        assert "an unexpected message" in ended.error.message


async def wait_for_runner(agent: Agent, id_: str) -> None:
    """Wait until a load has its runner."""
    reservations = agent.placer.ledger.reservations
    await until(lambda: id_ in reservations and reservations[id_].pid is not None, "the load has its runner")


@pytest.mark.parametrize("message", MESSAGES, ids=name)
async def test_any_message_in_a_dry_run_leaves_nothing_behind(
    agent: Agent, monkeypatch: pytest.MonkeyPatch, message: Received
) -> None:
    runner = await warm(agent)
    Engine(runner, monkeypatch).says(message)
    question = Sizing(request=LoadRequest(model="p/llama"), key="p/llama", gpus=[], layers=[])
    async with asyncio.timeout(DEADLINE_S):
        answer = msgpack.decode(await agent.dry_run.answer(msgpack.encode(question)), type=list[list[Usage]] | None)
    assert answer == ([message.usage] if isinstance(message, Measured) else None)
    assert is_gone(runner.pid), "it has parsed a stranger's file"
    assert agent.runners.next_runner is not None


async def test_a_dry_run_without_room_refuses_with_what_would_fit(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The formula knows less than the engine, so it must not name a context that the engine refused."""
    runner = await warm(agent)
    measure_first(agent, monkeypatch)
    Engine(runner, monkeypatch).says(Measured([Usage(id=CPU, weights_bytes=1 << 60)]))
    id_ = await delivered(agent)
    await released(agent, id_)
    refused = await record(agent, id_)
    assert refused.refused == ["w"]
    assert refused.refusal is not None
    assert isinstance(refused.refusal.detail, dict)
    assert refused.refusal.detail["largest_context_length"] is None


# ---- frames that are not messages


def garbled(control: socket.socket, hand_over: socket.socket, output: socket.socket, visible: str | None) -> None:
    """Run as a runner with corrupted memory: after Warm it sends a frame that is not a message."""
    control.sendall(frame(WARM))
    control.recv(LENGTH.size)  # a load
    control.sendall(LENGTH.pack(3) + b"\xc1\xc1\xc1")
    threading.Event().wait()


async def test_an_unreadable_frame_ends_the_runner_and_its_load(agent: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.runner.warm, "run_child", garbled)
    runner: Runner = await warm(agent)
    id_ = await delivered(agent)
    ended = await reached(agent, id_, State.FAILED)
    assert ended.error is not None
    assert (ended.error.code, "an unexpected message: 'unreadable'" in ended.error.message) == ("engine_crashed", True)
    await released(agent, id_)
    assert is_gone(runner.pid)
    assert not agent.placer.ledger.reservations
    monkeypatch.undo()
    await agent.runners.close()
