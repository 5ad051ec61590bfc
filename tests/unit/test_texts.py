"""What a runner does with requests for vectors and scores.  The engine and the channel are recorders."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from shared.channel.messages import Cancel, Embed, Ended, Failed, Queued, Rank, Refused, ToRunner, Vectors
from tests.unit.test_requests import Channel, settle
from worker.engine.embedding import Computed, Texts, Unfinished, Waits
from worker.engine.gate import Gate
from worker.engine.texts import Pairs, TextRequests

FIRST, LAST = 1, 2
TEMPLATE = Pairs(template="{query}:{document}")
TOKENS = Pairs(begin=[FIRST], between=[LAST, LAST], end=[LAST])


class Vocabulary:
    """The tokens are characters, between the first and the last one."""

    n_tokens = 128

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> bytes:
        return np.array([FIRST] * add_special + [*map(ord, text)] + [LAST] * add_special, np.int32).tobytes()


class Engine:
    """Records the jobs."""

    vocabulary = Vocabulary()
    longest = 40

    def __init__(self) -> None:
        self.submitted: list[Texts] = []
        self.cancelled: list[Texts] = []

    def submit(self, job: Texts) -> None:
        self.submitted.append(job)

    def cancel(self, job: Texts) -> None:
        self.cancelled.append(job)


class World:
    """A requests layer between its recorders."""

    def __init__(self, pairs: Pairs | None = None) -> None:
        self.engine, self.gate = Engine(), Gate()
        part: Any = self.engine
        loop = asyncio.get_running_loop()
        self.requests = TextRequests(
            part, loop, self.gate, pairs=pairs, context_length=20, request_s=100.0, most_waiting=4
        )

    @asynccontextmanager
    async def channel(self, *messages: ToRunner) -> AsyncIterator[Channel]:
        """Serve a channel with these messages."""
        channel = Channel()
        task = asyncio.create_task(self.requests.serve(channel))
        try:
            for message in messages:
                channel.inbox.put_nowait(message)
            await settle()
            yield channel
        finally:
            channel.inbox.put_nowait(None)
            await task

    async def refused(self, message: ToRunner) -> Refused:
        async with self.channel(message) as channel:
            (refused,) = channel.sent
        assert isinstance(refused, Refused)
        assert self.engine.submitted == []
        assert self.gate.n_requests == 0
        return refused

    def tokens(self) -> list[list[int]]:
        """Return the tokens of the only job."""
        (job,) = self.engine.submitted
        return [[*map(int, text)] for text in job.tokens]


def embed(*texts: str, id_: int = 7, **fields: Any) -> Embed:
    return Embed(id=id_, client="c", texts=[*texts], **fields)


def rank(query: str, *documents: str) -> Rank:
    return Rank(id=7, client="c", query=query, documents=[*documents])


async def test_texts_are_whole_prompts_and_tokens_are_as_given() -> None:
    world = World()
    async with world.channel(embed("a", "bc")):
        assert world.tokens() == [[FIRST, ord("a"), LAST], [FIRST, ord("b"), ord("c"), LAST]]
    world = World()
    async with world.channel(embed(tokens=[[5, 6], [7]])):
        assert world.tokens() == [[5, 6], [7]]


async def test_a_query_and_a_document_are_joined_by_tokens() -> None:
    world = World(TOKENS)
    async with world.channel(rank("q", "d", "e")):
        assert world.tokens() == [[FIRST, ord("q"), LAST, LAST, ord(document), LAST] for document in "de"]


async def test_a_template_joins_what_clients_sent_and_nothing_else() -> None:
    """A query that spells a placeholder stays as it is."""
    world = World(TEMPLATE)
    async with world.channel(rank("{document}", "d")):
        assert ["".join(map(chr, text)) for text in world.tokens()] == ["{document}:d"]


@pytest.mark.parametrize(
    ("pairs", "message", "code", "param"),
    [
        (None, embed("a", "b" * 19), "context_length_exceeded", "input"),
        (None, embed(tokens=[[5], [128]]), "invalid_request", "input"),
        (None, embed(tokens=[[-1]]), "invalid_request", "input"),
        (None, embed(tokens=[[2**40]]), "invalid_request", "input"),
        (None, embed(tokens=[[5], []]), "invalid_request", "input"),
        (TOKENS, rank("q", "d", "d" * 16), "context_length_exceeded", "documents"),
        (TOKENS, embed("a"), "wrong_type", "model"),
        (None, rank("q", "d"), "wrong_type", "model"),
    ],
)
async def test_what_cannot_be_computed_is_refused(
    pairs: Pairs | None, message: ToRunner, code: str, param: str
) -> None:
    refused = await World(pairs).refused(message)
    assert (refused.id, refused.code, refused.param) == (7, code, param)
    if code == "context_length_exceeded":
        assert (refused.prompt_tokens, refused.context_length) == (21, 20)


async def test_a_closing_runner_begins_nothing() -> None:
    world = World()
    world.gate.close(lambda: None)
    assert (await world.refused(embed("a"))).code == "closing"


async def test_a_request_gets_its_vectors_and_its_tokens() -> None:
    world = World()
    async with world.channel(embed("a", "bc")) as channel:
        (job,) = world.engine.submitted
        rows = np.array([[1, 2], [3, 4]], np.float32)
        results = [Computed(job, rows[:1], False), Computed(job, rows[1:], True)]
        world.requests.hand_out([Waits(job, 3), *results])
        await settle()
        assert world.gate.n_requests == 0
    queued, first, second, ended = channel.sent
    assert queued == Queued(id=7, prompt_tokens=7, ahead=3)
    assert [first, second] == [Vectors(id=7, n=1, data=row.tobytes()) for row in rows]
    assert isinstance(ended, Ended)
    assert (ended.usage.prompt_tokens, ended.usage.generated_tokens) == (7, 0)


@pytest.mark.parametrize(
    ("code", "kind"),
    [("queue_full", Refused), ("queue_timeout", Refused), ("deadline", Failed), ("engine_failed", Failed)],
)
async def test_a_job_that_ends_early_ends_its_request(code: Any, kind: type[Refused | Failed]) -> None:
    world = World()
    async with world.channel(embed("a")) as channel:
        world.requests.hand_out([Unfinished(world.engine.submitted[0], code, "because", 3)])
        await settle()
        (last,) = channel.sent
    assert isinstance(last, kind)
    assert (last.code, last.message) == (code, "because")
    assert world.gate.n_requests == 0


async def test_a_cancelled_request_and_a_closed_channel_end_their_jobs() -> None:
    world = World()
    async with world.channel(embed("a"), embed("b", id_=8)) as channel:
        channel.inbox.put_nowait(Cancel(7))
        await settle()
        first, second = world.engine.submitted
        assert world.engine.cancelled == [first]
        world.requests.hand_out([Computed(first, np.zeros((1, 2), np.float32), True)])
        await settle()
        assert channel.sent == []
    assert world.engine.cancelled == [first, second]
    assert world.gate.n_requests == 0


async def test_a_client_leaves_places_to_others() -> None:
    """Long texts are tokenized in a thread, which the test holds up."""
    world = World()
    may_encode = asyncio.Event()

    async def tokens(asked: Embed | Rank) -> list[NDArray[np.int32]]:
        await may_encode.wait()
        return [np.array([5], np.int32)]

    world.requests._tokens = tokens  # type: ignore[method-assign]
    async with world.channel(*(embed("a", id_=i) for i in range(3)), Embed(id=9, client="d", texts=["a"])) as channel:
        assert [(message.id, message.code) for message in channel.sent if isinstance(message, Refused)] == [
            (2, "queue_full")
        ]
        may_encode.set()
        await settle()
        assert len(world.engine.submitted) == 3
