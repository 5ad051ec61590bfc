"""The forms of Anthropic's messages: what a request means, and answers that a strict client can read."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from api.anthropic.answer import Answer
from api.anthropic.request import decoded
from api.openai.request import generate
from shared.channel.messages import Delta, Finish, Generate, Schema, Stop, StopReason, ToolDelta, Usage
from shared.errors import IntegrationsRefused, InvalidRequest, ServiceError
from shared.schema.model import ModelSettings

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    reasoning_tokens=2,
    wait_s=0.0,
    prompt_s=0.0,
    generation_s=0.0,
)
HELLO = [{"role": "user", "content": "Hello"}]
TOOL = {"name": "f", "input_schema": {"type": "object", "properties": {"a": {"type": "integer"}}}}
IMAGE = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}

# ---- requests


def order(**fields: Any) -> Generate:
    body = json.dumps({"messages": HELLO, **fields}).encode()
    return generate(decoded(body), "client", ModelSettings())


def conversation(**fields: Any) -> dict[str, Any]:
    made: dict[str, Any] = json.loads(order(**fields).conversation)
    return made


def rendered(*messages: dict[str, Any], **fields: Any) -> list[Any]:
    made: list[Any] = conversation(messages=messages, **fields)["messages"]
    return made


def refused(**fields: Any) -> ServiceError:
    with pytest.raises((InvalidRequest, IntegrationsRefused)) as caught:
        order(**fields)
    return caught.value


def test_a_conversation_is_that_of_a_chat_completion() -> None:
    blocks = [
        {"type": "thinking", "thinking": "Hm.", "signature": "s"},
        {"type": "redacted_thinking", "data": "x"},
        {"type": "text", "text": "I look."},
        {"type": "tool_use", "id": "toolu_1", "name": "f", "input": {"a": 1}},
        {"type": "tool_use", "id": "toolu_2", "name": "f", "input": {}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "toolu_1", "content": "one", "cache_control": {"type": "ephemeral"}},
        {
            "type": "tool_result",
            "tool_use_id": "toolu_2",
            "content": [{"type": "text", "text": "two"}],
            "is_error": True,
        },
        {"type": "text", "text": "And?"},
    ]
    assert rendered(
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": blocks},
        {"role": "user", "content": results},
        system="Be kind.",
    ) == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hello"},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "Hm.",
            "tool_calls": [
                {"id": "toolu_1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "toolu_2", "type": "function", "function": {"name": "f", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "one", "tool_call_id": "toolu_1"},
        {"role": "tool", "content": "two", "tool_call_id": "toolu_2"},
        {"role": "user", "content": "And?"},
    ]


def test_results_come_before_the_text_that_is_sent_with_them() -> None:
    content = [{"type": "text", "text": "Look:"}, {"type": "tool_result", "tool_use_id": "toolu_1"}]
    assert rendered({"role": "user", "content": content}) == [
        {"role": "tool", "content": "", "tool_call_id": "toolu_1"},
        {"role": "user", "content": "Look:"},
    ]


def test_documents_are_texts() -> None:
    document = {"type": "document", "source": {"type": "text", "media_type": "text/plain", "data": "Facts."}}
    (message,) = rendered({"role": "user", "content": [document, {"type": "text", "text": "True?"}]})
    assert message["content"] == [{"type": "text", "text": "Facts."}, {"type": "text", "text": "True?"}]


@pytest.mark.parametrize("role", ["system", "developer"])
def test_a_system_prompt_may_be_a_message(role: str) -> None:
    assert rendered({"role": role, "content": "Be kind."}, *HELLO)[0] == {"role": "system", "content": "Be kind."}


BILLING = "x-anthropic-billing-header: cc_version=2.1.101.e51; cc_entrypoint=cli; cch={};"


def test_the_stamp_of_claude_code_changes_no_prompt() -> None:
    first, second = (
        conversation(system=[{"type": "text", "text": BILLING.format(stamp)}, {"type": "text", "text": "Be kind."}])
        for stamp in ("a5145", "00f")
    )
    assert first == second
    assert "cc_version" in json.dumps(first)
    assert conversation(system=BILLING.format("a5145") + "Be kind.")["messages"][0]["content"].endswith("Be kind.")
    assert conversation(system="Say cch=1;")["messages"][0]["content"] == "Say cch=1;"


def test_tools_are_functions() -> None:
    made = conversation(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True})
    assert [tool["function"]["name"] for tool in made["tools"]] == ["f"]
    assert made["tools"][0]["function"]["parameters"] == TOOL["input_schema"]
    assert made["parallel_tool_calls"] is False
    assert "tool_choice" not in made


@pytest.mark.parametrize(
    ("choice", "names", "is_required"),
    [
        ({"type": "auto"}, ["f", "g"], False),
        ({"type": "any"}, ["f", "g"], True),
        ({"type": "tool", "name": "g"}, ["g"], True),
        ({"type": "none"}, [], False),
    ],
)
def test_a_choice_of_tools(choice: Any, names: list[str], is_required: bool) -> None:
    made = conversation(tools=[TOOL, {**TOOL, "name": "g", "type": "custom"}], tool_choice=choice)
    assert [tool["function"]["name"] for tool in made.get("tools", [])] == names
    assert (made.get("tool_choice") == "required") == is_required


def test_what_anthropics_server_does_itself_is_ignored() -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 5}
    assert [tool["function"]["name"] for tool in conversation(tools=[search, TOOL])["tools"]] == ["f"]
    blocks = [
        {"type": "server_tool_use", "id": "srvtoolu_1", "name": "web_search", "input": {"query": "x"}},
        {"type": "web_search_tool_result", "tool_use_id": "srvtoolu_1", "content": [{"type": "web_search_result"}]},
        {"type": "web_fetch_tool_result", "tool_use_id": "srvtoolu_2", "content": {"type": "web_fetch_result"}},
        {"type": "text", "text": "Found."},
    ]
    messages = rendered(*HELLO, {"role": "assistant", "content": blocks}, *HELLO)
    assert messages[1] == {"role": "assistant", "content": "Found."}


@pytest.mark.parametrize(
    ("thinking", "switch", "budget"),
    [
        (None, None, None),
        ({"type": "adaptive"}, None, None),
        ({"type": "enabled"}, None, None),
        ({"type": "enabled", "budget_tokens": 100}, None, 100),
        ({"type": "disabled"}, False, None),
    ],
)
def test_thinking(thinking: Any, switch: bool | None, budget: int | None) -> None:
    made = order(thinking=thinking)
    assert json.loads(made.conversation).get("enable_thinking") is switch
    assert made.thinking_tokens == budget


def test_the_form_and_the_effort_of_an_answer() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    made = order(output_config={"effort": "max", "format": {"type": "json_schema", "schema": schema}})
    assert isinstance(made.output, Schema)
    assert json.loads(made.output.schema) == schema
    assert json.loads(made.conversation)["chat_template_kwargs"] == {"reasoning_effort": "xhigh"}


def test_how_tokens_are_chosen() -> None:
    made = order(max_tokens=5, temperature=0, top_p=0.5, top_k=3, stop_sequences=["a", "b"])
    assert (made.max_tokens, made.stop) == (5, ["a", "b"])
    assert (made.sampling.temperature, made.sampling.top_p, made.sampling.top_k) == (0, 0.5, 3)
    assert order(max_tokens=None).max_tokens is None


def message(*blocks: Any, role: str = "user") -> list[Any]:
    return [{"role": role, "content": [*blocks]}]


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"messages": message(IMAGE)}, "'messages[0].content[0]': images are not supported: no model of this server"),
        (
            {"messages": message({"type": "tool_result", "tool_use_id": "t", "content": [IMAGE]})},
            "'messages[0].content[0].content[0]': images are not supported: no model of this server has vision.",
        ),
        (
            {"messages": message({"type": "document", "source": {"type": "url", "url": "http://x"}})},
            "'messages[0].conten",
        ),
        ({"messages": message({"type": "search_result", "source": "x"})}, "'messages[0].content[0]': content of type"),
        ({"messages": message({"type": "text"})}, "'messages[0].content[0].text' is required."),
        (
            {"messages": message({"type": "tool_use", "id": "t", "name": "f"})},
            "'messages[0].content[0].type': a message",
        ),
        ({"messages": message({"type": "tool_result"})}, "'messages[0].content[0].tool_use_id' is required."),
        (
            {"messages": message({"type": "tool_result", "tool_use_id": "t"}, role="assistant")},
            "'messages[0].content[0].type': a message of the assistant has no block 'tool_result'.",
        ),
        (
            {"messages": message({"type": "tool_use", "id": "t", "name": "f", "input": "{}"}, role="assistant")},
            "'messages[0].content[0].input': expected an object.",
        ),
        ({"messages": []}, "'messages': expected array of length >= 1."),
        ({"messages": {}}, "'messages': expected array, got object."),
        ({"system": [IMAGE]}, "'system[0]': images are not supported"),
        ({"max_tokens": 0}, "'max_tokens': "),
        ({"stop_sequences": [""]}, "'stop_sequences': a string must not be empty."),
        ({"tools": [{"input_schema": {}}]}, "'tools[0].name' is required."),
        ({"tools": [TOOL, TOOL]}, "'tools[1].name': 'f' is there twice."),
        ({"tools": [{**TOOL, "input_schema": {"type": "array"}}]}, "'tools[0].input_schema.type': expected 'object'."),
        ({"tools": [TOOL], "tool_choice": {"type": "tool"}}, "'tool_choice.name' is required."),
        ({"tools": [TOOL], "tool_choice": {"type": "tool", "name": "g"}}, "'tool_choice': there is no function 'g'"),
        ({"tools": [TOOL], "tool_choice": {"type": "some"}}, "'tool_choice.type': Invalid enum value 'some'."),
        (
            {"tools": [TOOL], "output_config": {"format": {"type": "json_schema", "schema": {}}}},
            "'output_config.format': an answer with tools cannot have a form.",
        ),
        ({"output_config": {"format": {"type": "json_schema"}}}, "'output_config.format.schema' is required."),
        (
            {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
            "'mcp_servers': this server calls no other",
        ),
    ],
)
def test_a_request_that_is_refused_names_the_place(fields: dict[str, Any], text: str) -> None:
    assert str(refused(**fields)).startswith(text)


# ---- answers


class Reader:
    """A client that accepts only what Anthropic's documentation promises, and puts the message together."""

    def __init__(self) -> None:
        self.message: dict[str, Any] = {}
        self.open: dict[str, Any] | None = None
        self.json = ""
        self.is_signed = False
        self.has_ended = self.is_complete = False

    def read(self, data: bytes) -> dict[str, Any]:
        *events, rest = data.decode().split("\n\n")
        assert rest == ""
        for each in events:
            name, text = each.split("\n")
            parsed = json.loads(text.removeprefix("data: "))
            assert name == f"event: {parsed['type']}"
            assert not self.is_complete
            assert bool(self.message) == (parsed["type"] != "message_start")
            getattr(self, parsed["type"])(parsed)
        assert self.is_complete
        return self.message

    def message_start(self, event: Any) -> None:
        self.message = event["message"]
        assert self.message["content"] == []
        assert self.message["stop_reason"] is self.message["stop_sequence"] is None
        assert self.message["usage"]["output_tokens"] == 0

    def content_block_start(self, event: Any) -> None:
        assert self.open is None
        assert not self.has_ended
        assert event["index"] == len(self.message["content"])
        self.open, self.json, self.is_signed = event["content_block"], "", False
        empty = {"text": {"text": ""}, "thinking": {"thinking": "", "signature": ""}, "tool_use": {"input": {}}}
        block = {name: value for name, value in self.open.items() if name not in ("type", "id", "name")}
        assert block == empty[self.open["type"]]
        if self.open["type"] == "tool_use":
            assert self.open["id"].startswith("toolu_")
            assert self.open["name"]
        self.message["content"].append(self.open)

    def content_block_delta(self, event: Any) -> None:
        assert self.open is not None
        assert event["index"] == len(self.message["content"]) - 1
        assert not self.is_signed
        match self.open["type"], event["delta"]:
            case "text", {"type": "text_delta", "text": str(text)}:
                assert text
                self.open["text"] += text
            case "thinking", {"type": "thinking_delta", "thinking": str(text)}:
                assert text
                self.open["thinking"] += text
            case "thinking", {"type": "signature_delta", "signature": str(signature)}:
                self.open["signature"], self.is_signed = signature, True
            case "tool_use", {"type": "input_json_delta", "partial_json": str(text)}:
                assert text
                self.json += text
            case unexpected:
                raise AssertionError(unexpected)

    def content_block_stop(self, event: Any) -> None:
        assert self.open is not None
        assert event["index"] == len(self.message["content"]) - 1
        assert self.is_signed == (self.open["type"] == "thinking")
        if self.json:
            try:
                self.open["input"] = json.loads(self.json)
            except ValueError:  # the answer was cut
                self.open["input"] = {}
        self.open = None

    def message_delta(self, event: Any) -> None:
        assert self.open is None
        assert not self.has_ended
        self.message |= event["delta"]
        self.message["usage"] |= event["usage"]
        self.has_ended = True

    def message_stop(self, event: Any) -> None:
        assert self.has_ended
        self.is_complete = True

    def ping(self, event: Any) -> None:
        assert event == {"type": "ping"}


TEXTS = st.just("") | st.text(max_size=4)
ARGUMENTS = st.lists(st.sampled_from(["", '{"a": 1}', '{"a": {"b": [1, "x"]}}', "{}", '{"a"']), max_size=1)


@st.composite
def answers(draw: st.DrawFn) -> list[Delta]:
    """Generate an answer as a runner sends it: the parts of a call follow each other."""
    deltas: list[Delta] = []
    n_calls = 0
    for _ in range(draw(st.integers(0, 5))):
        deltas.append(Delta(id=1, reasoning=draw(TEXTS), text=draw(TEXTS)))
        if draw(st.booleans()):
            arguments = "".join(draw(ARGUMENTS))
            cut = draw(st.integers(0, len(arguments)))
            begun = ToolDelta(n_calls, f"call_{n_calls}", "f", arguments[:cut])
            rest = ToolDelta(n_calls, arguments=arguments[cut:])
            deltas.append(Delta(id=1, reasoning=draw(TEXTS), text=draw(TEXTS), tool=begun))
            deltas.append(Delta(id=1, text=draw(TEXTS), tool=rest))
            n_calls += 1
    finish: Finish = draw(st.sampled_from(["stop", "length"]))
    reasons: list[StopReason] = ["eos", "string"] if finish == "stop" else ["max_tokens", "context"]
    reason = draw(st.sampled_from(reasons))
    if n_calls and reason == "eos":
        finish = "tool_calls"
    stop = Stop(reason, draw(TEXTS) if reason == "string" else None)
    return [*deltas, Delta(id=1, text=draw(TEXTS), finish=finish, stop=stop)]


@settings(max_examples=1000)
@given(answers(), st.sets(st.integers(0, 20)))
def test_a_strict_reader_gets_the_message_of_the_whole_reply(deltas: list[Delta], pings: set[int]) -> None:
    stream, collected = Answer("publisher/model", 7), Answer("publisher/model", 7)
    data = stream.first()
    for i, delta in enumerate(deltas):
        data += (stream.waiting() if i in pings else b"") + stream.added(delta)
        collected.add(delta)
    data += stream.last(USAGE)
    whole = json.loads(msgspec.json.encode(collected.whole(USAGE)))
    read = Reader().read(data)
    assert {**read, "id": ""} == {**whole, "id": ""}
    assert read["id"].startswith("msg_")
    kinds = {"thinking": "thinking", "text": "text"}
    for name, kind in kinds.items():
        texts = "".join(block[name] for block in read["content"] if block["type"] == kind)
        assert texts == "".join(delta.text if name == "text" else delta.reasoning for delta in deltas)
    calls: dict[int, str] = {}
    for delta in deltas:
        if delta.tool is not None:
            calls[delta.tool.index] = calls.get(delta.tool.index, "") + delta.tool.arguments
    inputs = [json.loads(text) if text.endswith("}") else {} for text in calls.values()]
    assert [block["input"] for block in read["content"] if block["type"] == "tool_use"] == inputs


@pytest.mark.parametrize(
    ("finish", "stop", "expected"),
    [
        ("stop", Stop("eos"), ("end_turn", None)),
        ("stop", Stop("string", "END"), ("stop_sequence", "END")),
        ("tool_calls", Stop("eos"), ("tool_use", None)),
        ("length", Stop("max_tokens"), ("max_tokens", None)),
        ("length", Stop("context"), ("model_context_window_exceeded", None)),
    ],
)
def test_why_an_answer_ended(finish: Finish, stop: Stop, expected: tuple[str, str | None]) -> None:
    answer = Answer("m", 7)
    answer.add(Delta(id=1, finish=finish, stop=stop))
    whole = answer.whole(USAGE)
    assert (whole.stop_reason, whole.stop_sequence) == expected


def test_the_usage_divides_the_prompt() -> None:
    answer = Answer("m", 7)
    (_, start), *_ = [each.split(b"\ndata: ") for each in answer.first().split(b"\n\n") if each]
    assert json.loads(start)["message"]["usage"]["input_tokens"] == 7
    assert json.loads(msgspec.json.encode(answer.whole(USAGE)))["usage"] == {
        "input_tokens": 4,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": 3,
        "output_tokens": 5,
    }
