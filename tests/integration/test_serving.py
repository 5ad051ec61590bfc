"""Requests over a channel to a real runner with a tiny random model: the whole way but the HTTP edge."""

from __future__ import annotations

import asyncio
import json
import math
import os
import signal
from array import array
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from shared.channel.messages import (
    Deltas,
    Detokenize,
    Embed,
    Ended,
    FromRunner,
    Generate,
    Queued,
    Refused,
    Render,
    Started,
    Text,
    Tokenize,
    Tokens,
    Vectors,
    listed,
)
from shared.errors import RunnerLost
from shared.synthetic.models import tiny_embedding, tiny_llama, tiny_reranker
from tests.support.agents import Begin
from tests.support.loaded import CONVERSATION, Loaded
from tests.support.waiting import until
from worker.runner.protocol import Pong

TEMPLATE = "query {query} document {document}"

pytestmark = pytest.mark.usefixtures("forkserver")


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "p/llama/llama-f16.gguf", tokenizer="bpe")
    tiny_embedding(root / "p/embedding/embedding-f16.gguf")
    tiny_reranker(root / "p/reranker/reranker-f32.gguf")
    tiny_reranker(root / "p/template/template-f32.gguf", metadata={"tokenizer.chat_template.rerank": TEMPLATE})
    return root


def rows(messages: list[FromRunner]) -> list[list[float]]:
    """Return all vectors."""
    vectors: list[list[float]] = []
    for message in messages:
        assert isinstance(message, Vectors)
        numbers = array("f", message.data).tolist()
        size = len(numbers) // message.n
        vectors += [numbers[at : at + size] for at in range(0, len(numbers), size)]
    return vectors


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
    (refused,) = await loaded.ask(instance)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.param) == ("wrong_type", "model")


async def test_an_embedding_model_computes_vectors(loaded: Loaded) -> None:
    instance = await loaded.load(key="p/embedding")
    queued, *vectors, ended = await loaded.embed(instance, texts=["Hello", "World and more", "Hello"])
    assert isinstance(queued, Queued)
    assert isinstance(ended, Ended)
    assert ended.usage.prompt_tokens == queued.prompt_tokens > 3
    first, second, third = rows(vectors)
    assert first == pytest.approx(third, abs=1e-3)
    assert first != pytest.approx(second, abs=1e-3)
    assert math.hypot(*first) == pytest.approx(1, abs=1e-3)


@pytest.mark.parametrize(
    ("asked", "code"),
    [
        ({"texts": ["Hello", "word " * 3000]}, "context_length_exceeded"),
        ({"tokens": [[5], []]}, "invalid_request"),
        ({"tokens": [[5], [10**6]]}, "invalid_request"),
        ({"tokens": [[-1]]}, "invalid_request"),
    ],
    ids=["long", "empty", "unknown token", "negative token"],
)
async def test_texts_that_a_model_cannot_embed_are_refused(loaded: Loaded, asked: dict[str, Any], code: str) -> None:
    instance = await loaded.load(key="p/embedding")
    (refused,) = await loaded.embed(instance, **asked)
    assert isinstance(refused, Refused)
    assert (refused.code, refused.param) == (code, "input")
    assert isinstance((await loaded.embed(instance, tokens=[[5, 6]]))[-1], Ended), "it goes on"


async def test_an_embedding_model_tokenizes_texts_alone(loaded: Loaded) -> None:
    instance = await loaded.load(key="p/embedding")
    queued, tokens = await loaded.answered(instance, Tokenize(id=0, client="c", text="Hello", detail="pieces"))
    assert isinstance(queued, Queued)
    assert isinstance(tokens, Tokens)
    embedded = (await loaded.embed(instance, texts=["Hello"]))[0]
    assert isinstance(embedded, Queued)
    assert tokens.n == len(tokens.pieces) == embedded.prompt_tokens
    _, text = await loaded.answered(instance, Detokenize(id=0, client="c", tokens=listed(tokens.tokens)))
    assert isinstance(text, Text)
    assert "Hello" in text.text
    (refused,) = await loaded.answered(instance, Render(id=0, client="c", conversation=CONVERSATION))
    assert isinstance(refused, Refused)
    assert refused.code == "chat_unavailable"
    assert await loaded.running(instance) == 0


async def test_a_chat_model_embeds_nothing(loaded: Loaded) -> None:
    (refused,) = await loaded.embed(await loaded.load(), texts=["Hello"])
    assert isinstance(refused, Refused)
    assert refused.code == "wrong_type"


@pytest.mark.parametrize("key", ["p/reranker", "p/template"])
async def test_a_model_ranks_documents(loaded: Loaded, key: str) -> None:
    instance = await loaded.load(key=key)
    documents = ["Hello", "World and more", "Hello"]
    queued, *vectors, ended = await loaded.rank(instance, "hello", documents)
    assert isinstance(queued, Queued)
    assert isinstance(ended, Ended)
    first, second, third = rows(vectors)
    assert len(first) == 1
    assert first == pytest.approx(third, abs=1e-3)
    assert first != pytest.approx(second, abs=1e-5)
    _, *alone, _ = await loaded.rank(instance, "hello", documents[1:2])
    assert rows(alone)[0] == pytest.approx(second, abs=1e-3)
    _, *other, _ = await loaded.rank(instance, "and more", documents[:1])
    assert rows(other)[0] != pytest.approx(first, abs=1e-5), "the query counts"
    (refused,) = await loaded.embed(instance, texts=["Hello"])
    assert isinstance(refused, Refused)
    assert refused.code == "wrong_type"


async def test_a_model_without_a_head_ranks_nothing(loaded: Loaded) -> None:
    (refused,) = await loaded.rank(await loaded.load(key="p/embedding"), "hello", ["World"])
    assert isinstance(refused, Refused)
    assert refused.code == "wrong_type"


async def test_a_client_that_leaves_ends_its_texts(loaded: Loaded) -> None:
    instance = await loaded.load(key="p/embedding")
    many = Embed(id=0, client="c", tokens=[[5] * 200] * 2000)
    async with loaded.channels.answering(instance, many, "/test") as answer:
        await anext(answer)
    await until(lambda: loaded.runners[instance.id].load.running == 0, "the numbers of the runner")
    (queued, *_) = await loaded.embed(instance, texts=["Hello"])
    assert isinstance(queued, Queued)
    assert queued.ahead == 0
