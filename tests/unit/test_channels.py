"""Both ends of a channel without a socket: joining deltas, bounds, and the order of messages."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs

from api.channel import answer as answers
from api.channel.answer import Answer
from shared.channel.address import Address
from shared.channel.messages import (
    Delta,
    Deltas,
    Ended,
    Failed,
    FromRunner,
    Queued,
    Refused,
    Started,
    Stop,
    TokenLogprobs,
    Usage,
    size_of,
)
from shared.channel.trust import Hello, is_proven, proof
from shared.errors import ClientTooSlow, ModelUnloaded, RunnerLost
from worker.engine.channels import Backlog

USAGE = Usage(
    prompt_tokens=7, cached_tokens=5, generated_tokens=3, reasoning_tokens=0, wait_s=0.5, prompt_s=0.25, generation_s=1
)


# ---- the runner's end


def deltas(id_: int) -> st.SearchStrategy[Delta]:
    logprob = st.builds(TokenLogprobs, st.binary(max_size=2), st.just(-1.0), st.just([]))
    return st.builds(
        Delta,
        id=st.just(id_),
        choice=st.integers(0, 1),
        text=st.text("ab", max_size=2),
        reasoning=st.text("xy", max_size=2),
        logprobs=st.lists(logprob, max_size=2),
        finish=st.just(None),
    )


@st.composite
def sent(draw: st.DrawFn) -> list[FromRunner]:
    """Draw what a runner sends: the messages of several requests, each in order, interleaved."""
    left: list[list[FromRunner]] = []
    for id_ in range(draw(st.integers(1, 4))):
        pieces = draw(st.lists(st.lists(deltas(id_), min_size=1, max_size=3), max_size=5))
        end = draw(st.sampled_from([Ended(id=id_, usage=USAGE), Failed(id=id_, code="deadline", message="late"), None]))
        left.append(
            [
                Queued(id=id_, prompt_tokens=7, ahead=0),
                Started(id=id_, cached_tokens=5),
                *map(Deltas, pieces),
                *([end] if end is not None else []),
            ]
        )
    messages = []
    while left := [one for one in left if one]:
        messages.append(draw(st.sampled_from(left)).pop(0))
    return messages


def seen(messages: list[FromRunner]) -> dict[object, list[object]]:
    """Return what a client sees of each request, and of each of its answers letter by letter."""
    each: dict[object, list[object]] = defaultdict(list)
    for message in messages:
        if not isinstance(message, Deltas):
            each[message.id].append(message)
            continue
        for delta in message.deltas:
            if each[delta.id][-1:] != ["deltas"]:
                each[delta.id].append("deltas")
            answer = each[delta.id, delta.choice]
            answer += [("echo", delta.echo, delta.skipped)] if delta.echo else []
            answer += [("reasoning", letter) for letter in delta.reasoning]
            answer += [("text", letter) for letter in delta.text]
            each[delta.id, delta.choice, "logprobs"] += delta.logprobs
    return each


@given(sent(), st.integers(1, 5))
def test_a_backlog_changes_nothing_that_a_client_sees(messages: list[FromRunner], taken_every: int) -> None:
    backlog = Backlog()
    received: list[FromRunner] = []
    for i, message in enumerate(messages):
        backlog.add(message)
        if i % taken_every == 0:
            received += backlog.taken()
    received += backlog.taken()
    assert seen(received) == seen(messages)
    assert (backlog.n_bytes, backlog.taken()) == (0, [])


def test_a_backlog_joins_the_deltas_of_an_answer() -> None:
    backlog = Backlog()
    for letter in "abc":
        backlog.add(Deltas([Delta(id=1, text=letter), Delta(id=2, reasoning=letter)]))
    last = Delta(id=1, finish="length", stop=Stop("context"))
    backlog.add(Deltas([last]))
    assert backlog.n_bytes == sum(size_of(Delta(id=1, text=text)) for text in ("a", "b", "c", "a", "b", "c", ""))
    assert backlog.taken() == [Deltas([structs.replace(last, text="abc"), Delta(id=2, reasoning="abc")])]


# ---- the API's end


async def rest(answer: Answer) -> list[FromRunner]:
    return [message async for message in answer]


async def test_an_answer_ends_with_its_last_message() -> None:
    for last in (
        Ended(id=1, usage=USAGE),
        Failed(id=1, code="deadline", message="late"),
        Refused(id=1, code="queue_full", message="full"),
    ):
        answer = Answer()
        reading = asyncio.create_task(rest(answer))
        await asyncio.sleep(0)
        answer.put(last)
        assert await reading == [last]
        answer.fail(RunnerLost("later"))
        assert await rest(answer) == []
        assert answer.outcome == ("completed" if isinstance(last, Ended) else last.code)


async def test_an_answer_joins_what_the_client_did_not_read() -> None:
    answer = Answer()
    queued = Queued(id=1, prompt_tokens=7, ahead=0)
    answer.put(queued)
    one, two = Delta(id=1, text="a"), Delta(id=1, text="b")
    assert answer.extend([one])
    assert answer.extend([two])
    assert [await anext(answer), await anext(answer)] == [queued, Deltas([one, two])]
    assert answer.extend([one])
    answer.put(Ended(id=1, usage=USAGE))
    assert await rest(answer) == [Deltas([one]), Ended(id=1, usage=USAGE)]


async def test_an_error_comes_after_what_arrived_before_it() -> None:
    answer = Answer()
    answer.extend([Delta(id=1, text="a")])
    answer.fail(ModelUnloaded("unloaded"))
    assert await anext(answer) == Deltas([Delta(id=1, text="a")])
    with pytest.raises(ModelUnloaded):
        await anext(answer)
    assert answer.outcome == "model_unloaded"


async def test_an_unread_answer_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    piece = [Delta(id=1, text="x" * 1000)]
    monkeypatch.setattr(answers, "MOST_BYTES", 3500)
    answer = Answer()
    for _ in range(5):  # what is read does not count
        assert answer.extend([*piece])
        assert answer.extend([*piece])
        await anext(answer)
    assert [answer.extend([*piece]) for _ in range(4)] == [True, True, True, False]
    with pytest.raises(ClientTooSlow):
        await anext(answer)
    assert answer.outcome == "client_too_slow"


# ---- trust


def test_a_proof_is_for_one_secret_nonce_and_load() -> None:
    hello = Hello("load_1", proof(b"secret", b"nonce", "load_1"))
    assert is_proven(hello, b"secret", b"nonce")
    assert not is_proven(hello, b"other", b"nonce")
    assert not is_proven(hello, b"secret", b"other")
    assert not is_proven(Hello("load_2", hello.proof), b"secret", b"nonce")
    assert not is_proven(Hello("load_1", b""), b"secret", b"nonce")


def test_an_address_does_not_show_its_secret() -> None:
    assert "hush" not in repr(Address(path="/p", boot_id="b", secret=b"hush"))
