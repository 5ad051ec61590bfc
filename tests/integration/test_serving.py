"""Requests over a channel to a real runner with a tiny random model: the whole way but the HTTP edge."""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from shared.channel.messages import Deltas, Ended, Generate, Queued, Refused, Started
from shared.errors import InvalidRequest, RunnerLost
from shared.synthetic.models import tiny_embedding, tiny_llama
from tests.support.agents import Begin
from tests.support.loaded import CONVERSATION, Loaded
from tests.support.waiting import until
from worker.runner.protocol import Pong

pytestmark = pytest.mark.usefixtures("forkserver")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "p/llama/llama-f16.gguf", tokenizer="bpe")
    tiny_embedding(root / "p/embedding/embedding-f16.gguf")
    return root


@pytest.fixture
async def loaded(begin: Begin, tmp_path: Path) -> AsyncIterator[Loaded]:
    agent = await begin()
    with agent.listener.bound([tmp_path / "worker.sock"]):
        listening = asyncio.create_task(agent.listener.run())
        one = Loaded(agent)
        yield one
        await one.channels.close()
        listening.cancel()
        await asyncio.wait([listening])


async def test_a_conversation_is_answered(loaded: Loaded) -> None:
    instance = await loaded.load()
    messages = await loaded.ask(instance)
    assert [type(message) for message in messages if not isinstance(message, Deltas)] == [Queued, Started, Ended]
    last = messages[-1]
    assert isinstance(last, Ended)
    assert 1 <= last.usage.generated_tokens <= 5
    again = (await loaded.ask(instance))[-1]
    assert isinstance(again, Ended)
    assert again.usage.cached_tokens == again.usage.prompt_tokens - 1
    others = (await loaded.ask(instance, client="d"))[-1]
    assert isinstance(others, Ended)
    assert others.usage.cached_tokens == 0, "another client would learn from the time what this one sent"


async def test_a_long_prompt_is_refused_with_numbers(loaded: Loaded) -> None:
    instance = await loaded.load()
    long = json.dumps({"messages": [{"role": "user", "content": "hello " * 1000}]}).encode()
    (refused,) = await loaded.ask(instance, conversation=long)
    assert isinstance(refused, Refused)
    assert refused.code == "context_length_exceeded"
    assert refused.prompt_tokens > refused.context_length == 256


async def test_a_client_that_leaves_ends_its_request(loaded: Loaded) -> None:
    instance = await loaded.load()
    request = Generate(id=0, client="c", conversation=CONVERSATION)
    async with loaded.channels.answering(instance, request, "/test") as answer:
        assert isinstance(await anext(answer), Queued)
        assert isinstance(await anext(answer), Started)

    async def is_idle() -> bool:
        return await loaded.running(instance) == 0

    await until(is_idle, "no request runs")


async def test_a_runner_killed_in_the_middle_of_ten_answers(loaded: Loaded) -> None:
    """The answers of another instance are not affected."""
    one, other = await loaded.load(1), await loaded.load(2)
    asked = [asyncio.create_task(loaded.ask(one, n=None)) for _ in range(10)]
    await until(lambda: loaded.channels.busy(one) == 10, "ten requests")
    os.kill(loaded.runners[one.id].pid, signal.SIGKILL)
    ends = await asyncio.gather(*asked, return_exceptions=True)
    assert RunnerLost in {type(end) for end in ends}
    assert {type(end) for end in ends} <= {RunnerLost, list}  # a random model may have ended an answer before
    assert isinstance((await loaded.ask(other))[-1], Ended)


async def test_preemptions_are_counted_once(loaded: Loaded) -> None:
    instance = await loaded.load()
    store = loaded.agent.store
    for total in (3, 3, 5):
        loaded.runners[instance.id].load = Pong(preemptions=total)
        await loaded.agent.beat_once()
        assert (await store.counters.read()).tallies["preemptions"] == total


async def test_an_embedding_model_generates_no_text(loaded: Loaded) -> None:
    instance = await loaded.load(key="p/embedding")
    with pytest.raises(InvalidRequest):
        await loaded.ask(instance)
