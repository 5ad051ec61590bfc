"""The form of chat completions, whole and in chunks."""

from __future__ import annotations

import json
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from api.openai.answer import Collected, Heading
from shared.channel.messages import Delta, Logprob, TokenLogprobs, Usage

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    reasoning_tokens=2,
    wait_s=0.0,
    prompt_s=0.0,
    generation_s=0.0,
)


def chunks(data: bytes) -> list[dict[str, Any]]:
    events = data.decode().split("\n\n")
    assert events.pop() == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events)
    return [json.loads(event.removeprefix("data: ")) for event in events]


def choices(data: bytes) -> list[dict[str, Any]]:
    """Return the choices of chunks, of which each has one."""
    found = []
    for chunk in chunks(data):
        assert chunk["object"] == "chat.completion.chunk"
        assert "usage" not in chunk
        (choice,) = chunk["choices"]
        found.append(choice)
    return found


def test_the_first_chunk_of_each_choice_has_the_role_in_order() -> None:
    assert choices(Heading("m", "f").first(2)) == [
        {"index": i, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}
        for i in (0, 1)
    ]


def test_reasoning_text_and_the_end_are_chunks_of_their_own() -> None:
    added = choices(Heading("m", "f").added(Delta(id=1, choice=1, text="a", reasoning="r", finish="length")))
    assert [choice["delta"] for choice in added] == [{"reasoning_content": "r"}, {"content": "a"}, {}]
    assert [choice["finish_reason"] for choice in added] == [None, None, "length"]
    assert {choice["index"] for choice in added} == {1}


def test_log_probabilities_come_once_with_bytes_of_tokens() -> None:
    info = TokenLogprobs("ü".encode()[:1], -0.5, [Logprob(b"x", -1.0)])
    for delta in (Delta(id=1, text="a", logprobs=[info]), Delta(id=1, logprobs=[info])):
        (choice,) = choices(Heading("m", "f").added(delta))
        assert choice["delta"]["content"] == delta.text
        assert choice["logprobs"] == {
            "content": [
                {
                    "token": "\ufffd",
                    "logprob": -0.5,
                    "bytes": [0xC3],
                    "top_logprobs": [{"token": "x", "logprob": -1.0, "bytes": [0x78]}],
                }
            ],
            "refusal": None,
        }


def test_the_usage_is_in_a_chunk_without_choices() -> None:
    (chunk,) = chunks(Heading("m", "f").usage(USAGE))
    assert chunk["choices"] == []
    assert chunk["usage"] == {
        "prompt_tokens": 7,
        "completion_tokens": 5,
        "total_tokens": 12,
        "prompt_tokens_details": {"cached_tokens": 3},
        "completion_tokens_details": {"reasoning_tokens": 2},
    }


TEXTS = st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=6)


@given(st.lists(TEXTS, min_size=1, max_size=3))
def test_the_chunks_join_to_the_whole_reply(answers: list[list[tuple[str, str]]]) -> None:
    heading = Heading("publisher/model", "b1")
    deltas = [
        Delta(id=1, choice=i, text=text, reasoning=reasoning)
        for i, answer in enumerate(answers)
        for reasoning, text in answer
    ] + [Delta(id=1, choice=i, finish="stop") for i in range(len(answers))]
    collected = Collected(heading, len(answers))
    streamed = heading.first(len(answers))
    for delta in deltas:
        collected.add(delta)
        streamed += heading.added(delta)
    completion = collected.completion(USAGE)
    for chunk in chunks(streamed):
        assert (chunk["id"], chunk["created"], chunk["model"]) == (completion.id, completion.created, "publisher/model")
    for choice in completion.choices:
        parts = [one for one in choices(streamed) if one["index"] == choice.index]
        assert "".join(one["delta"].get("content", "") for one in parts) == choice.message.content
        reasoning = "".join(one["delta"].get("reasoning_content", "") for one in parts)
        assert reasoning == (choice.message.reasoning_content or "")
        assert [one["finish_reason"] for one in parts if one["finish_reason"]] == ["stop"]
        assert parts[-1]["finish_reason"] == "stop"
        assert ["role" in one["delta"] for one in parts] == [True] + [False] * (len(parts) - 1)
