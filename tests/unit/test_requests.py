"""What the requests layer does with requests and outcomes.  The engine, the helper and the channel are recorders."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from shared.channel.messages import (
    Cancel,
    Complete,
    Delta,
    Deltas,
    Detokenize,
    Ended,
    Failed,
    FromRunner,
    Generate,
    Queued,
    Refused,
    Render,
    Sampling,
    Started,
    Text,
    TokenDetail,
    Tokenize,
    Tokens,
    ToRunner,
)
from tests.support.waiting import until
from worker.chat.code import ChatError, Message, ParserSource
from worker.chat.handle import HelperDied
from worker.chat.protocol import Prompt
from worker.engine.gate import Gate
from worker.engine.job import Begun, Broken, Done, Job, Piece, Rejected, Waiting
from worker.engine.lookups import MOST_TOKENS
from worker.engine.requests import CLOSING, Ends, Requests

BOS = 1
SOURCE = ParserSource("format", "parser", "prompt")


class Channel:
    """A channel to which the test sends, and whose messages it reads."""

    def __init__(self) -> None:
        self.inbox: asyncio.Queue[ToRunner | None] = asyncio.Queue()
        self.sent: list[FromRunner] = []

    def send(self, message: FromRunner) -> None:
        self.sent.append(message)

    async def __aiter__(self) -> AsyncIterator[ToRunner]:
        while (message := await self.inbox.get()) is not None:
            yield message


class Engine:
    """An engine whose tokens are characters, after BOS."""

    def __init__(self) -> None:
        self.submitted: list[Job] = []
        self.cancelled: list[Job] = []

    @property
    def vocabulary(self) -> Vocabulary:
        return Vocabulary()

    def tokenize(self, text: str, special: bool) -> list[int]:
        return [BOS] * special + [ord(letter) for letter in text]

    def infill(self, before: list[int], after: list[int]) -> list[int] | None:
        return [BOS, 2, *before, 3, *after, 4] if ord("?") not in after else None

    def submit(self, job: Job) -> None:
        self.submitted.append(job)

    def cancel(self, job: Job) -> None:
        self.cancelled.append(job)


class Vocabulary:
    """A vocabulary whose tokens are characters, after BOS."""

    n_tokens = 128

    def encode(self, text: str, *, add_special: bool, parse_special: bool) -> bytes:
        return encoded([BOS] * add_special + [ord(letter) for letter in text])

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))

    def description(self) -> tuple[str | None, str | None, str | None]:
        return "<s>", None, None

    def pieces(self, tokens: list[int]) -> list[bytes]:
        return [b"<s>" if token == BOS else bytes([token]) for token in tokens]


def encoded(tokens: list[int]) -> bytes:
    return struct.pack(f"<{len(tokens)}i", *tokens)


class Chat:
    """Renders a conversation as its own text, once it may."""

    def __init__(self) -> None:
        self.may_render = asyncio.Event()
        self.may_render.set()
        self.prompt = Prompt(text="", stops=[], shown=[], source=None)
        self.error: Exception | None = None

    async def render(self, conversation: bytes) -> Prompt:
        await self.may_render.wait()
        if self.error is not None:
            raise self.error
        prompt = self.prompt
        return Prompt(
            text=conversation.decode(), stops=prompt.stops, shown=prompt.shown, source=prompt.source, is_open=True
        )

    async def parse(self, source: ParserSource, answer: str, *, partial: bool) -> Message:
        await asyncio.sleep(0)
        reasoning, _, content = answer.partition("|")
        return Message(reasoning_content=reasoning, content=content)


class World:
    """A requests layer between its recorders."""

    def __init__(self) -> None:
        self.engine, self.chat, self.gate = Engine(), Chat(), Gate()
        self.requests = self.made(self.chat)
        self.loops: list[tuple[Channel, asyncio.Task[None]]] = []

    def made(self, chat: Chat | str, request_s: float = 100.0) -> Requests:
        return Requests(
            self.engine,
            chat,
            asyncio.get_running_loop(),
            self.gate,
            ends=Ends("<s>", None),
            context_length=20,
            parallel=2,
            request_s=request_s,
            max_output_tokens=12,
            most_waiting=6,
        )

    @asynccontextmanager
    async def channel(self, *messages: ToRunner) -> AsyncIterator[Channel]:
        """Serve a channel with these messages."""
        channel = Channel()
        task = asyncio.create_task(self.requests.serve(channel))
        try:
            await self.send(channel, *messages)
            yield channel
        finally:
            channel.inbox.put_nowait(None)
            await task

    async def send(self, channel: Channel, *messages: ToRunner) -> None:
        for message in messages:
            channel.inbox.put_nowait(message)
        await settle()

    async def hand_out(self, *outcomes: Waiting | Begun | Piece | Done | Rejected | Broken) -> None:
        self.requests.hand_out([*outcomes])
        await settle()


async def settle() -> None:
    """Let every task do what it can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def world() -> World:
    return World()


def generate(id_: int = 7, text: str = "Hello", choices: int = 1, max_tokens: int | None = 5) -> Generate:
    return Generate(id=id_, client="c", conversation=text.encode(), choices=choices, max_tokens=max_tokens, stop=["\n"])


def piece(job: Job, text: str, choice: int = 0, **more: object) -> Piece:
    return Piece(job=job, choice=choice, text=text, n_tokens=1, **more)  # type: ignore[arg-type]


def done(job: Job) -> Done:
    return Done(job=job, cached_tokens=2, generated_tokens=3, wait_s=0.1, prompt_s=0.2, generation_s=0.3)


async def test_a_request_is_rendered_tokenized_and_submitted(world: World) -> None:
    world.chat.prompt = Prompt(text="", stops=["<end>"], shown=["x", "xy"], source=None)
    async with world.channel(generate()):
        (job,) = world.engine.submitted
        assert job.tokens == [BOS, *map(ord, "Hello")]
        assert (job.client, job.max_tokens, job.stop, job.ends) == ("c", 5, ["\n"], ["<end>"])
        assert job.sampling == Sampling()
        assert job.shown == {ord("x")}, "'xy' is two tokens"
        assert job.deadline == job.arrived_at + 100.0


async def test_a_first_token_that_the_template_writes_is_not_doubled(world: World) -> None:
    async with world.channel(generate(text="<s>Hello")):
        assert world.engine.submitted[0].tokens == [BOS, *map(ord, "Hello")]


async def test_a_request_gets_its_messages_in_order(world: World) -> None:
    async with world.channel(generate()) as channel:
        (job,) = world.engine.submitted
        await world.hand_out(Waiting(job=job, ahead=3))
        await world.hand_out(Begun(job=job, cached_tokens=2), piece(job, "He"))
        await world.hand_out(piece(job, "llo"), piece(job, "", finish="stop"), done(job))
        queued, started, first, last, ended = channel.sent
        assert queued == Queued(id=7, prompt_tokens=6, ahead=3)
        assert started == Started(id=7, cached_tokens=2)
        assert first == Deltas([Delta(id=7, text="He")])
        assert last == Deltas([Delta(id=7, text="llo"), Delta(id=7, finish="stop")])
        assert isinstance(ended, Ended)
        assert (ended.usage.prompt_tokens, ended.usage.generated_tokens, ended.usage.reasoning_tokens) == (6, 3, 0)
    assert world.engine.cancelled == []


async def test_a_request_that_starts_at_once_was_queued(world: World) -> None:
    async with world.channel(generate()) as channel:
        (job,) = world.engine.submitted
        await world.hand_out(Begun(job=job, cached_tokens=0))
        assert channel.sent == [Queued(id=7, prompt_tokens=6, ahead=0), Started(id=7, cached_tokens=0)]


async def test_requests_wait_for_their_rendering_within_bounds(world: World) -> None:
    """One is rendered at a time, so they wait; and one client leaves places to others."""
    world.chat.may_render.clear()
    async with world.channel(*(generate(i) for i in range(5))) as one:
        full = "The queue is full: 6 requests may wait, and a client may not have more of them than places are free."
        refused = [Refused(id=id_, code="queue_full", message=full, retry_after_s=1) for id_ in (3, 4)]
        assert one.sent == refused
        async with world.channel(msgspec.structs.replace(generate(), client="another")) as other:
            await world.send(one, Cancel(0))
            await world.send(one, generate(5))
            assert (one.sent, other.sent) == (refused, [])
            world.chat.may_render.set()
            await settle()
            assert len(world.engine.submitted) == 4
            await world.send(one, *(generate(i) for i in range(6, 9)))
            assert len(world.engine.submitted) == 7


@pytest.mark.parametrize(("asked", "most"), [(None, 12), (1, 1), (11, 11), (12, 12), (13, 12), (10**9, 12)])
async def test_an_answer_has_at_most_the_configured_tokens(world: World, asked: int | None, most: int) -> None:
    async with world.channel(generate(max_tokens=asked)):
        assert world.engine.submitted[0].max_tokens == most


async def test_a_step_is_one_message_for_each_channel(world: World) -> None:
    async with world.channel(generate(1), generate(2)) as one, world.channel(generate(1)) as other:
        jobs = world.engine.submitted
        await world.hand_out(*(piece(job, "x") for job in jobs))
        assert one.sent == [Deltas([Delta(id=1, text="x"), Delta(id=2, text="x")])]
        assert other.sent == [Deltas([Delta(id=1, text="x")])]


async def test_a_token_without_text_is_no_delta(world: World) -> None:
    async with world.channel(generate()) as channel:
        await world.hand_out(piece(world.engine.submitted[0], ""))
        assert channel.sent == []


async def test_reasoning_comes_before_the_end(world: World) -> None:
    world.chat.prompt = Prompt(text="", stops=[], shown=[], source=SOURCE)
    async with world.channel(generate(choices=2)) as channel:
        (job,) = world.engine.submitted
        pieces = [piece(job, "Hm", 0), piece(job, "|He", 0, finish="stop"), piece(job, "|x", 1, finish="length")]
        await world.hand_out(*pieces, done(job))
        *all_deltas, ended = channel.sent
        deltas = [delta for message in all_deltas if isinstance(message, Deltas) for delta in message.deltas]
        assert deltas == [
            Delta(id=7, text="He", reasoning="Hm", finish="stop"),
            Delta(id=7, choice=1, text="x", finish="length"),
        ]
        assert isinstance(ended, Ended)
        assert ended.usage.reasoning_tokens == 1


@pytest.mark.parametrize(
    ("error", "code"), [(ChatError("no such role"), "invalid_request"), (HelperDied("SIGSEGV"), "helper_crashed")]
)
async def test_a_conversation_that_is_not_rendered_is_refused(world: World, error: Exception, code: str) -> None:
    world.chat.error = error
    async with world.channel(generate()) as channel:
        (refused,) = channel.sent
        assert isinstance(refused, Refused)
        assert (refused.id, refused.code, refused.param) == (7, code, "messages")
        assert str(error) in refused.message
    assert world.engine.submitted == []


@pytest.mark.parametrize(("letters", "fits"), [(18, True), (19, False)])
async def test_a_prompt_must_leave_room_for_a_token(world: World, letters: int, fits: bool) -> None:
    async with world.channel(generate(text="x" * letters)) as channel:
        assert len(world.engine.submitted) == fits
        if not fits:
            (refused,) = channel.sent
            assert isinstance(refused, Refused)
            assert refused.code == "context_length_exceeded"
            assert (refused.prompt_tokens, refused.context_length) == (20, 20)


async def test_without_chat_a_request_is_refused(world: World) -> None:
    world.requests = world.made("The model has no chat template.")
    async with world.channel(generate()) as channel:
        assert channel.sent == [Refused(id=7, code="chat_unavailable", message="The model has no chat template.")]


async def test_what_the_engine_refuses_or_breaks_ends_the_request(world: World) -> None:
    async with world.channel(generate(1), generate(2)) as channel:
        first, second = world.engine.submitted
        await world.hand_out(
            Rejected(job=first, code="queue_full", message="full", retry_after_s=3),
            Broken(job=second, code="engine_failed", message="broken"),
        )
        assert channel.sent == [
            Refused(id=1, code="queue_full", message="full", retry_after_s=3),
            Failed(id=2, code="engine_failed", message="broken"),
        ]
    assert world.engine.cancelled == []


async def test_a_cancelled_request_says_nothing_more(world: World) -> None:
    async with world.channel(generate()) as channel:
        (job,) = world.engine.submitted
        await world.hand_out(Begun(job=job, cached_tokens=0))
        before = [*channel.sent]
        await world.send(channel, Cancel(7), Cancel(7), Cancel(8))
        await world.hand_out(piece(job, "late", finish="stop"), done(job))
        assert channel.sent == before
    assert world.engine.cancelled == [job]


async def test_a_request_is_cancelled_while_it_is_rendered(world: World) -> None:
    world.chat.may_render.clear()
    async with world.channel(generate(), Cancel(7)) as channel:
        world.chat.may_render.set()
        await settle()
        assert channel.sent == []
    assert world.engine.submitted == []


async def test_a_cancelled_answer_is_not_parsed_any_more(world: World) -> None:
    world.chat.prompt = Prompt(text="", stops=[], shown=[], source=SOURCE)
    async with world.channel(generate()) as channel:
        (job,) = world.engine.submitted
        world.requests.hand_out([piece(job, "Hm")])
        await asyncio.sleep(0)
        await world.send(channel, Cancel(7))
        assert channel.sent == []


async def test_the_end_of_a_channel_cancels_its_requests(world: World) -> None:
    async with world.channel(generate(1)) as other:
        async with world.channel(generate(1), generate(2)):
            world.chat.may_render.clear()
        mine, *theirs = world.engine.submitted
        assert world.engine.cancelled == theirs
        await world.hand_out(piece(mine, "x"))
        assert other.sent == [Deltas([Delta(id=1, text="x")])]


async def test_a_fault_of_a_request_ends_its_channel(world: World) -> None:
    """A request must not wait for ever for an answer that a fault of ours prevents."""
    world.chat.error = ZeroDivisionError()
    with pytest.raises(ExceptionGroup):
        async with world.channel(generate()):
            pass


# ---- lookups


async def looked_up(channel: Channel) -> list[FromRunner]:
    """Return what was sent, once there is a reply or a refusal."""
    last = Text | Tokens | Refused | Failed
    await until(lambda: any(isinstance(message, last) for message in channel.sent), "a reply")
    return channel.sent


LONG = 40 * "long text "  # longer than the context


@pytest.mark.parametrize("text", [LONG, 10 * LONG, ""])
async def test_a_text_is_tokenized_whatever_its_length(world: World, text: str) -> None:
    lookup = Tokenize(id=7, client="c", text=text, add_special=False, detail="pieces")
    async with world.channel(lookup) as channel:
        tokens = encoded([*map(ord, text)])
        found = Tokens(id=7, n=len(text), tokens=tokens, pieces=[letter.encode() for letter in text])
        assert await looked_up(channel) == [Queued(id=7, prompt_tokens=0, ahead=0), found]
    assert world.engine.submitted == []


async def test_a_conversation_is_counted_as_it_would_be_answered(world: World) -> None:
    async with world.channel(
        Tokenize(id=1, client="c", conversation=b"<s>Hello", detail="count"),
        Render(id=2, client="c", conversation=b"<s>Hello"),
        generate(3, text="<s>Hello"),
    ) as channel:
        await settle()
        (job,) = world.engine.submitted
        assert Tokens(id=1, n=len(job.tokens)) in channel.sent
        assert Text(id=2, text="<s>Hello") in channel.sent


@pytest.mark.parametrize("tokens", [[0, 128], [-1]])
async def test_a_token_of_no_vocabulary_is_refused(world: World, tokens: list[int]) -> None:
    async with world.channel(Detokenize(id=7, client="c", tokens=tokens)) as channel:
        (refused,) = await looked_up(channel)
        assert isinstance(refused, Refused)
        assert (refused.code, refused.param) == ("invalid_request", "tokens")


@pytest.mark.parametrize("detail", ["tokens", "pieces"])
async def test_too_many_tokens_are_counted_but_not_listed(world: World, detail: TokenDetail) -> None:
    most = MOST_TOKENS[detail]
    lookup = Tokenize(id=7, client="c", text=most * "x", add_special=False, detail=detail)
    async with world.channel(lookup) as channel:
        assert isinstance((await looked_up(channel))[-1], Tokens)
    async with world.channel(msgspec.structs.replace(lookup, add_special=True)) as channel:
        (refused,) = await looked_up(channel)
        assert isinstance(refused, Refused)
        assert refused.code == "invalid_request"
    async with world.channel(msgspec.structs.replace(lookup, add_special=True, detail="count")) as channel:
        assert (await looked_up(channel))[-1] == Tokens(id=7, n=1 + most)


async def test_lookups_have_the_places_and_the_gate_of_requests(world: World) -> None:
    """They count as requests that run until their end, of which a cancellation is one."""
    world.chat.may_render.clear()
    lookups = [Render(id=id_, client="c", conversation=b"x") for id_ in range(5)]
    async with world.channel(*lookups) as channel:
        refused = [message for message in channel.sent if isinstance(message, Refused)]
        assert [message.code for message in refused] == ["queue_full"] * 2
        assert world.gate.n_requests == 3
        closed = asyncio.Event()
        world.gate.close(closed.set)
        await world.send(channel, Render(id=9, client="c", conversation=b"x"))
        assert channel.sent[-1] == Refused(id=9, code="closing", message=CLOSING)
        await world.send(channel, *map(Cancel, range(5)))
        assert closed.is_set()
        world.chat.may_render.set()
        await settle()
        assert not [message for message in channel.sent if isinstance(message, Text)]


async def test_a_lookup_ends_with_its_channel(world: World) -> None:
    world.chat.may_render.clear()
    async with world.channel(Render(id=1, client="c", conversation=b"x")):
        assert world.gate.n_requests == 1
    assert world.gate.n_requests == 0


async def test_a_lookup_has_a_deadline(world: World) -> None:
    world.chat.may_render.clear()
    world.requests = world.made(world.chat, request_s=0.001)
    async with world.channel(Render(id=1, client="c", conversation=b"x")) as channel:
        (failed,) = await looked_up(channel)
        assert isinstance(failed, Failed)
        assert failed.code == "deadline"
    assert world.gate.n_requests == 0


async def test_a_model_without_a_template_still_tokenizes(world: World) -> None:
    world.requests = world.made("The model has no chat template.")
    async with world.channel(
        Render(id=1, client="c", conversation=b"x"), Tokenize(id=2, client="c", text="x", detail="count")
    ) as channel:
        assert channel.sent[0] == Refused(id=1, code="chat_unavailable", message="The model has no chat template.")
        assert channel.sent[-1] == Tokens(id=2, n=2)


# ---- prompts without a template


def complete(*prompts: str | list[int], id_: int = 7, **options: Any) -> Complete:
    return Complete(id=id_, client="c", prompts=[*prompts], **options)


def deltas(channel: Channel) -> list[Delta]:
    return [delta for message in channel.sent if isinstance(message, Deltas) for delta in message.deltas]


async def test_a_text_gets_its_first_token_once_and_no_template(world: World) -> None:
    world.requests = world.made("This build has no chat code.")
    async with world.channel(complete("Hi", id_=1), complete("<s>Hi", id_=2), complete([ord("H")], id_=3)):
        assert [job.tokens for job in world.engine.submitted] == [[BOS, *b"Hi"], [BOS, *b"Hi"], [*b"H"]]
        assert all(job.max_tokens == 12 and not job.scores_prompt for job in world.engine.submitted)


async def test_the_answers_to_prompts_are_numbered_one_after_another(world: World) -> None:
    """The engine gets as many at once as may run."""
    async with world.channel(complete("a", "bc", "d", "e")) as channel:
        (first,) = world.engine.submitted
        await world.hand_out(Waiting(job=first, ahead=2))
        assert channel.sent == [Queued(id=7, prompt_tokens=4 + 5, ahead=2)]
        _, second = world.engine.submitted
        assert [first.is_accepted, second.is_accepted] == [False, True]
        await world.hand_out(Begun(job=first, cached_tokens=1), Begun(job=second, cached_tokens=2))
        await world.hand_out(piece(second, "x", finish="stop"), done(second))
        _, _, third = world.engine.submitted
        await world.hand_out(piece(third, "y", finish="length"), done(third))
        fourth = world.engine.submitted[-1]
        await world.hand_out(piece(first, "z", finish="stop"), done(first))
        await world.hand_out(piece(fourth, "", finish="stop"), done(fourth))
        assert [(delta.choice, delta.text) for delta in deltas(channel)] == [(1, "x"), (2, "y"), (0, "z"), (3, "")]
        assert [type(message) for message in channel.sent if not isinstance(message, Deltas)] == [
            Queued,
            Started,
            Ended,
        ]
        ended = channel.sent[-1]
        assert isinstance(ended, Ended)
        usage = ended.usage
        assert (usage.prompt_tokens, usage.cached_tokens, usage.generated_tokens) == (9, 8, 12)
    assert world.engine.cancelled == []


async def test_several_answers_to_each_of_several_prompts(world: World) -> None:
    async with world.channel(complete("a", "b", choices=2)) as channel:
        (first,) = world.engine.submitted
        await world.hand_out(Waiting(job=first, ahead=0), Begun(job=first, cached_tokens=0))
        assert world.engine.submitted == [first], "two answers are as many as may run"
        await world.hand_out(piece(first, "1", 1, finish="stop"), piece(first, "0", 0, finish="stop"), done(first))
        (_, second) = world.engine.submitted
        await world.hand_out(piece(second, "2", 0, finish="stop"), piece(second, "3", 1, finish="stop"), done(second))
        assert [(delta.choice, delta.text) for delta in deltas(channel)] == [(1, "1"), (0, "0"), (2, "2"), (3, "3")]
        assert isinstance(channel.sent[-1], Ended)


async def test_the_failure_of_a_prompt_ends_the_request(world: World) -> None:
    async with world.channel(complete("a", "b", "c")) as channel:
        (first,) = world.engine.submitted
        await world.hand_out(Begun(job=first, cached_tokens=0))
        second = world.engine.submitted[1]
        await world.hand_out(Broken(job=second, code="engine_failed", message="broken"))
        assert channel.sent[-1] == Failed(id=7, code="engine_failed", message="broken")
        await world.hand_out(piece(first, "late", finish="stop"), done(first))
        assert isinstance(channel.sent[-1], Failed)
        assert world.gate.n_requests == 0
    assert (len(world.engine.submitted), world.engine.cancelled) == (2, [first])


async def test_a_cancelled_request_cancels_all_its_prompts(world: World) -> None:
    async with world.channel(complete("a", "b", "c")) as channel:
        await world.hand_out(Waiting(job=world.engine.submitted[0], ahead=0))
        await world.send(channel, Cancel(7))
        assert {*world.engine.cancelled} == {*world.engine.submitted}
        assert len(world.engine.cancelled) == 2


@pytest.mark.parametrize(
    ("prompt", "echo", "skipped"), [("Hi", "Hi", 3), ("<s>Hi", "<s>Hi", 0), ("", "", 3), ([72, 105], "Hi", 0)]
)
async def test_an_answer_begins_with_its_prompt_on_request(world: World, prompt: Any, echo: str, skipped: int) -> None:
    async with world.channel(complete(prompt, choices=2, echo=True, logprobs=1)) as channel:
        (job,) = world.engine.submitted
        assert job.scores_prompt
        await world.hand_out(Begun(job=job, cached_tokens=0), piece(job, "!", 1))
        assert deltas(channel) == [
            Delta(id=7, choice=0, echo=echo, skipped=skipped),
            Delta(id=7, choice=1, text="!"),
        ]


async def test_a_prompt_is_scored_only_on_request(world: World) -> None:
    async with world.channel(complete("a", echo=True, id_=1), complete("a", logprobs=1, id_=2)):
        assert [job.scores_prompt for job in world.engine.submitted] == [False, False]


async def test_an_answer_may_have_no_tokens(world: World) -> None:
    async with world.channel(complete("a", max_tokens=0)):
        assert world.engine.submitted[0].max_tokens == 0


async def test_a_suffix_makes_a_prompt_between_two_texts(world: World) -> None:
    async with world.channel(complete("a", suffix="b"), complete([99], suffix="b", id_=8)):
        first, second = world.engine.submitted
        assert first.tokens == [BOS, 2, ord("a"), 3, ord("b"), 4]
        assert second.tokens == [BOS, 2, 99, 3, ord("b"), 4]


@pytest.mark.parametrize(
    ("request_", "param"),
    [
        (complete("a", suffix="?"), "suffix"),
        (complete("fine", [5, 128]), "prompt"),
        (complete([-1]), "prompt"),
        (complete([]), "prompt"),
        (complete("fine", "x" * 19), "prompt"),
    ],
)
async def test_a_prompt_that_cannot_be_continued_is_refused(world: World, request_: Complete, param: str) -> None:
    """Before any of them is processed."""
    async with world.channel(request_) as channel:
        (refused,) = channel.sent
        assert isinstance(refused, Refused)
        assert refused.param == param
    assert world.engine.submitted == []


async def test_long_prompts_are_tokenized_elsewhere(world: World) -> None:
    """Requests of others are taken meanwhile."""
    async with world.channel(complete(*["x"] * 1001)) as channel:
        await until(lambda: bool(world.engine.submitted), "the prompts are tokenized")
        await world.hand_out(Waiting(job=world.engine.submitted[0], ahead=0))
        assert channel.sent == [Queued(id=7, prompt_tokens=2002, ahead=0)]
