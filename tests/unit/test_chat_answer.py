"""The form of chat completions, whole and in chunks."""

from __future__ import annotations

import json
import re
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.channel.answer import Answer
from api.openai.answer import Chat, Collected, Heading
from api.openai.reply import at_once, streamed
from api.openai.text import Text
from api.waiting import HEARTBEAT_S
from shared.channel.messages import Delta, Ended, Logprob, Queued, Started, TokenLogprobs, ToolDelta, Usage

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
        assert not {"usage", "timings"} & chunk.keys()
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


def test_every_chunk_says_of_which_reply_it_is() -> None:
    heading = Heading("publisher/model", "b1")
    (first,) = chunks(heading.first(1))
    assert re.fullmatch("chatcmpl-[0-9a-f]{24}", first["id"])
    assert 0 < first["created"] < 2**32
    assert (first["model"], first["system_fingerprint"]) == ("publisher/model", "b1")
    same = ("id", "object", "created", "model", "system_fingerprint")
    for data in (heading.added(Delta(id=1, text="a", finish="stop")), heading.usage(USAGE)):
        assert all(chunk[name] == first[name] for chunk in chunks(data) for name in same)
    assert chunks(Heading("publisher/model", "b1").first(1))[0]["id"] != first["id"]


CALLING = [Delta(id=1, text="a", tool=ToolDelta(0, "call_1", "f", "{}")), Delta(id=1, finish="tool_calls")]
SPEAKING = [Delta(id=1, text="a"), Delta(id=1, text="b", finish="stop")]


@pytest.mark.parametrize(
    ("form", "deltas"),
    [
        (Chat(Heading("m", "f"), 1, with_usage=True), SPEAKING),
        (Chat(Heading("m", "f"), 1, with_usage=True), CALLING),
        (Text("m", "f", prompts=1, choices=1, with_usage=True), SPEAKING),
    ],
    ids=["chat", "chat-calls", "text"],
)
async def test_a_bare_comment_comes_while_there_is_nothing_else(
    form: Chat | Text, deltas: list[Delta], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is no data, some clients take `: text` for the end, and proxies close connections that are silent for long."""
    assert HEARTBEAT_S <= 15
    monkeypatch.setattr("api.openai.reply.HEARTBEAT_S", 0.001)
    answer, expected = Answer(), [form.added(delta) for delta in deltas]
    stream = streamed(answer, form, "/v1/chat/completions", at_once)
    assert await anext(stream) == form.first(), "before anything has arrived"
    answer.put(Queued(id=1, prompt_tokens=7, ahead=3))
    assert await anext(stream) == b":\n\n"
    answer.put(Started(id=1, cached_tokens=0))
    for delta, data in zip(deltas, expected, strict=True):
        assert [await anext(stream) for _ in range(3)] == [b":\n\n"] * 3
        answer.extend([delta])
        assert await anext(stream) == data
    answer.put(Ended(id=1, usage=USAGE))
    assert [part async for part in stream] == [form.last(USAGE)]


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


def test_a_call_has_its_name_once_and_then_arguments() -> None:
    heading, collected = Heading("m", "f"), Collected(Heading("m", "f"), 1)
    deltas = [
        Delta(id=1, text="Let me look.", tool=ToolDelta(0, "call_1", "f", '{"a"')),
        Delta(id=1, tool=ToolDelta(0, arguments=": 1}")),
        Delta(id=1, tool=ToolDelta(1, "call_2", "g", "{}"), finish="tool_calls"),
    ]
    found = [choice for delta in deltas for choice in choices(heading.added(delta))]
    assert [choice["delta"] for choice in found] == [
        {"content": "Let me look."},
        {"tool_calls": [{"index": 0, "id": "call_1", "type": "function", "function": {"name": "f", "arguments": ""}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '{"a"'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": ": 1}"}}]},
        {"tool_calls": [{"index": 1, "id": "call_2", "type": "function", "function": {"name": "g", "arguments": ""}}]},
        {"tool_calls": [{"index": 1, "function": {"arguments": "{}"}}]},
        {},
    ]
    assert [choice["finish_reason"] for choice in found] == [None] * 6 + ["tool_calls"]
    for delta in deltas:
        collected.add(delta)
    (choice,) = json.loads(msgspec.json.encode(collected.completion(USAGE)))["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "Let me look.",
        "tool_calls": [
            {"id": "call_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"id": "call_2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }


@pytest.mark.parametrize(("tool", "content"), [(ToolDelta(0, "call_1", "f", "{}"), None), (None, "")])
def test_content_is_null_only_beside_calls(tool: ToolDelta | None, content: str | None) -> None:
    collected = Collected(Heading("m", "f"), 1)
    collected.add(Delta(id=1, tool=tool, finish="stop"))
    assert collected.completion(USAGE).choices[0].message.content == content


TEXTS = st.lists(st.tuples(st.text(max_size=5), st.text(max_size=5)), max_size=6)


@settings(max_examples=1000)
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
