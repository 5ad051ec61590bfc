"""Requests from an API process to an answer and back, with a real listener, runner, helper and engine."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from api.channel.channels import Channels
from shared.channel.messages import Deltas, Ended, Failed, FromRunner, Generate, Queued, Refused, Sampling, Started
from shared.instance import Instance
from shared.lifecycle import State
from shared.telemetry.tally import Tally
from tests.support.agents import Begin, delivered, reached, warm
from tests.support.service import Process, below, wait_gone
from worker.runner.process import Runner

pytestmark = pytest.mark.usefixtures("forkserver")

DEADLINE_S = 60.0
GREEDY = Sampling(temperature=0)


@dataclass
class Served:
    """A worker with one loaded instance, and an API process's end of its channels."""

    runner: Runner
    instance: Instance
    channels: Channels

    async def answer(self, *texts: str, **options: Any) -> list[FromRunner]:
        roles = ("user", "assistant")
        messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]
        request = Generate(
            id=0,
            client="c",
            conversation=json.dumps({"messages": messages}).encode(),
            sampling=GREEDY,
            **{"max_tokens": 8, **options},
        )
        async with asyncio.timeout(DEADLINE_S), self.channels.answering(self.instance, request, "/test") as answer:
            return [message async for message in answer]


@pytest.fixture
async def served(request: pytest.FixtureRequest, begin: Begin, tmp_path: Path) -> AsyncIterator[Served]:
    agent = await begin(**getattr(request, "param", {}))
    with agent.listener.bound([tmp_path / "worker.sock"]):
        listening = asyncio.create_task(agent.listener.run())
        runner = await warm(agent)
        id_ = await delivered(agent)
        instance = await reached(agent, id_, State.LOADED)
        channels = Channels(lambda _: agent.snapshot(), Tally())
        yield Served(runner, instance, channels)
        await channels.close()
        listening.cancel()
        await asyncio.wait([listening])


def text(messages: list[FromRunner]) -> str:
    return "".join(delta.text for message in messages if isinstance(message, Deltas) for delta in message.deltas)


async def test_a_conversation_is_answered(served: Served) -> None:
    queued, started, *deltas, ended = await served.answer("Hello World")
    assert isinstance(queued, Queued)
    assert isinstance(started, Started)
    assert isinstance(ended, Ended)
    assert ended.usage.prompt_tokens == queued.prompt_tokens > 2
    assert ended.usage.generated_tokens <= 8
    assert text(deltas)
    again = await served.answer("Hello World")
    assert text(again) == text(deltas)
    assert isinstance(again[-1], Ended)
    assert again[-1].usage.cached_tokens == queued.prompt_tokens - 1


@pytest.mark.parametrize("served", [{"request_wait_s": 1e-9}], indirect=True)
async def test_a_request_waits_only_for_the_configured_time(served: Served) -> None:
    (refused,) = await served.answer("Hello World")
    assert isinstance(refused, Refused)
    assert refused.code == "queue_timeout"
    assert refused.retry_after_s >= 1


@pytest.mark.parametrize("served", [{"request_s": 1e-9}], indirect=True)
async def test_a_request_takes_only_the_configured_time(served: Served) -> None:
    last = (await served.answer("Hello World", max_tokens=None))[-1]
    assert isinstance(last, (Refused, Failed))
    assert last.code == ("queue_timeout" if isinstance(last, Refused) else "deadline"), "it may still wait then"


@pytest.mark.parametrize("served", [{"max_output_tokens": 3}], indirect=True)
async def test_an_answer_has_only_the_configured_tokens(served: Served) -> None:
    ended = (await served.answer("Hello World", max_tokens=None))[-1]
    assert isinstance(ended, Ended)
    assert ended.usage.generated_tokens <= 3


async def test_a_conversation_that_is_too_long_is_refused(served: Served) -> None:
    (refused,) = await served.answer("Hello " * 2000)
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"
    assert refused.prompt_tokens >= refused.context_length > 0


async def test_an_answer_continues_the_last_message(served: Served) -> None:
    queued, *_ = await served.answer("Hello World", "the of and")
    (shorter, *_) = await served.answer("Hello World")
    assert isinstance(queued, Queued)
    assert isinstance(shorter, Queued)
    assert queued.prompt_tokens > shorter.prompt_tokens


async def test_a_killed_helper_costs_nothing(served: Served) -> None:
    await served.answer("Hello")
    (helper,) = [process for process in below(served.runner.pid) if "helper" in named(process)]
    os.kill(helper.pid, signal.SIGKILL)
    wait_gone([helper])
    assert text(await served.answer("Two"))


async def test_a_cancelled_request_ends_in_the_runner(served: Served) -> None:
    request = Generate(
        id=0, client="c", conversation=b'{"messages": [{"role": "user", "content": "Hello"}]}', sampling=GREEDY
    )
    async with asyncio.timeout(DEADLINE_S), served.channels.answering(served.instance, request, "/test") as answer:
        async for message in answer:
            if isinstance(message, Deltas):
                break
    assert text(await served.answer("Two"))


def named(process: Process) -> str:
    return Path(f"/proc/{process.pid}/comm").read_text()
