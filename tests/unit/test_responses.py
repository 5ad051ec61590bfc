"""Responses: their form, whole and as events, and what their requests mean."""

from __future__ import annotations

import json
import re
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from structlog.testing import capture_logs

from api.openai.errors import OpenAIError, OpenAIErrorReply
from api.openai.request import MOST_PIECES, generate
from api.responses.answer import Responding
from api.responses.request import LOGPROBS, chat, decoded, functions
from api.responses.response import begun
from shared.channel.messages import Delta, Finish, Generate, Sampling, Schema, TokenLogprobs, ToolDelta, Usage
from shared.errors import (
    IntegrationsRefused,
    InvalidRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    NotSupported,
    ServiceError,
)
from shared.schema.model import ModelSettings
from tests.support.responses import events, read

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    reasoning_tokens=2,
    wait_s=0.0,
    prompt_s=0.0,
    generation_s=0.0,
)
PARAMETERS = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"type": "function", "name": "get_weather", "description": "Look.", "parameters": PARAMETERS, "strict": False}


def asked(**fields: Any) -> bytes:
    return json.dumps({"input": "Hello", **fields}).encode()


def form(**fields: Any) -> Responding:
    request = decoded(asked(**fields))
    return Responding(begun(request, functions(request), "acme/tiny", Sampling(), stores=False))


def streamed(deltas: list[Delta], **fields: Any) -> Any:
    """Return the response at the end of a stream."""
    responding = form(**fields)
    sent = responding.first() + b"".join(map(responding.added, deltas)) + responding.last(USAGE)
    assert sent.endswith(b"\n\n")
    return read(events(iter(sent.decode().split("\n"))))


def whole(deltas: list[Delta], **fields: Any) -> Any:
    responding = form(**fields)
    for delta in deltas:
        responding.add(delta)
    return json.loads(msgspec.json.encode(responding.whole(USAGE)))


def said(response: Any) -> list[tuple[str, ...]]:
    """Return what a response says, item by item."""
    said: list[tuple[str, ...]] = []
    for item in response["output"]:
        if item["type"] == "function_call":
            said.append(("call", item["call_id"], item["name"], item["arguments"]))
        else:
            (part,) = item["content"]
            said.append((item["type"], part["text"]))
    return said


text = st.text(min_size=1, max_size=5)
additions = st.one_of(
    st.tuples(st.sampled_from(["reasoning", "message", "arguments"]), text),
    st.tuples(st.just("call"), st.sampled_from(["", "{"])),
    st.tuples(st.just("nothing"), st.just("")),
)


@st.composite
def answers(draw: st.DrawFn) -> tuple[list[Delta], list[tuple[str, ...]]]:
    """Return an answer in additions, and what it says."""
    deltas: list[Delta] = []
    expected: list[tuple[str, ...]] = []
    n_calls = 0
    for kind, more in draw(st.lists(additions, max_size=20)):
        tool = None
        if kind == "call":
            tool = ToolDelta(n_calls, f"call_{n_calls}", "get_weather", more)
            expected.append(("call", tool.id, tool.name, more))
            n_calls += 1
        elif kind == "arguments":
            if not expected or expected[-1][0] != "call":
                continue
            tool = ToolDelta(n_calls - 1, arguments=more)
            expected[-1] = (*expected[-1][:-1], expected[-1][-1] + more)
        elif kind != "nothing":
            if expected and expected[-1][0] == kind:
                expected[-1] = (kind, expected[-1][1] + more)
            else:
                expected.append((kind, more))
        delta = Delta(
            id=1, reasoning=more if kind == "reasoning" else "", text=more if kind == "message" else "", tool=tool
        )
        last = deltas[-1] if deltas else None
        if last is not None and draw(st.booleans()) and _order(last)[1] < _order(delta)[0]:
            deltas[-1] = Delta(
                id=1,
                reasoning=last.reasoning or delta.reasoning,
                text=last.text or delta.text,
                tool=last.tool or delta.tool,
            )
        else:
            deltas.append(delta)
    ends: st.SearchStrategy[Finish] = st.sampled_from(get_args(Finish))
    finish = draw(ends)
    end = Delta(id=1, finish=finish)
    if draw(st.booleans()) and deltas:
        end = msgspec.structs.replace(deltas.pop(), finish=end.finish)
    return [*deltas, end], expected or [("message", "")]


def _order(delta: Delta) -> tuple[int, int]:
    """Return the first and the last of what an addition has: reasoning, then text, then a call."""
    has = [i for i, part in enumerate((delta.reasoning, delta.text, delta.tool)) if part]
    return (has[0], has[-1]) if has else (3, -1)


@settings(max_examples=1000)
@given(answers())
def test_events_are_in_order_and_tell_what_the_response_has(answer: tuple[list[Delta], list[tuple[str, ...]]]) -> None:
    deltas, expected = answer
    response = streamed(deltas)
    assert said(response) == expected
    assert response["status"] == ("incomplete" if deltas[-1].finish == "length" else "completed")
    other = whole(deltas)
    assert (said(other), other["status"]) == (expected, response["status"])
    assert [item["status"] for item in other["output"]] == [item["status"] for item in response["output"]]


def test_a_response_has_the_fields_that_clients_read() -> None:
    fields: dict[str, Any] = {
        "instructions": "Be brief.",
        "max_output_tokens": 9,
        "metadata": {"a": "b"},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_object"}},
        "tools": [TOOL, {"type": "web_search"}],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "prompt_cache_key": "k",
        "truncation": "auto",
    }
    found = whole([Delta(id=1, text="Hi", finish="stop")], **fields)
    assert re.fullmatch("resp_[0-9a-f]{48}", found.pop("id"))
    assert found["completed_at"] >= found.pop("created_at") > 0
    assert found.pop("completed_at")
    (item,) = found.pop("output")
    assert item.pop("id").startswith("msg_")
    assert item == {
        "type": "message",
        "status": "completed",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "Hi", "annotations": [], "logprobs": []}],
    }
    assert found == {
        "object": "response",
        "status": "completed",
        "incomplete_details": None,
        "error": None,
        "model": "acme/tiny",
        "previous_response_id": None,
        "instructions": "Be brief.",
        "tools": [TOOL],
        "tool_choice": "required",
        "parallel_tool_calls": False,
        "truncation": "disabled",
        "text": {"format": {"type": "json_object"}},
        "reasoning": {"effort": "low", "summary": None},
        "temperature": 0.8,
        "top_p": 0.95,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "top_logprobs": 0,
        "max_output_tokens": 9,
        "max_tool_calls": None,
        "store": False,
        "background": False,
        "service_tier": "default",
        "metadata": {"a": "b"},
        "safety_identifier": None,
        "prompt_cache_key": "k",
        "usage": {
            "input_tokens": 7,
            "input_tokens_details": {"cached_tokens": 3},
            "output_tokens": 5,
            "output_tokens_details": {"reasoning_tokens": 2},
            "total_tokens": 12,
        },
    }


def test_log_probabilities_belong_to_the_text_alone() -> None:
    def one(token: bytes) -> list[TokenLogprobs]:
        return [TokenLogprobs(token, -0.5)]

    deltas = [
        Delta(id=1, reasoning="r", logprobs=one(b"r")),
        Delta(id=1, logprobs=one(b"\xc3")),
        Delta(id=1, text="ü", logprobs=one(b"\xbc")),
        Delta(id=1, logprobs=one(b"end"), finish="stop"),
    ]
    for response in (streamed(deltas), whole(deltas)):
        (part,) = response["output"][1]["content"]
        assert [bytes(token["bytes"]) for token in part["logprobs"]] == [b"\xc3", b"\xbc", b"end"]


def test_a_response_that_fails_has_the_error_and_what_ended() -> None:
    responding = form()
    sent = responding.first() + responding.added(Delta(id=1, reasoning="r"))
    sent += responding.added(Delta(id=1, text="a"))
    error = OpenAIError(message="Too long.", type="t", param=None, code="context_length_exceeded")
    sent += responding.failed(OpenAIErrorReply(error))
    response = read(events(iter(sent.decode().split("\n"))))
    assert response["error"] == {"code": "context_length_exceeded", "message": "Too long."}
    assert (response["status"], said(response)) == ("failed", [("reasoning", "r")])


# ---- requests


def order(**fields: Any) -> Generate:
    request = decoded(asked(**fields))
    return generate(chat(request, functions(request), []), "client", ModelSettings())


def conversation(**fields: Any) -> Any:
    return json.loads(order(**fields).conversation)


def test_a_text_is_a_message_of_the_user_after_instructions() -> None:
    assert conversation(instructions="Be brief.")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
    ]


def test_no_answer_continues_the_last_message() -> None:
    items = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi"}]
    assert conversation(input=items)["add_generation_prompt"] is True


def test_what_codex_loads_a_model_with_is_a_request() -> None:
    assert conversation(input="", max_output_tokens=1)["messages"] == [{"role": "user", "content": ""}]


def parts(kind: str, text: str) -> list[dict[str, str]]:
    return [{"type": kind, "text": text}]


def test_items_of_one_turn_are_one_message() -> None:
    items = [
        {"role": "developer", "content": [{"type": "input_text", "text": "Be brief."}]},
        {"type": "message", "role": "user", "content": [*parts("input_text", "a"), *parts("text", "b")]},
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "short"}], "encrypted_content": "x"},
        {"type": "message", "role": "assistant", "content": parts("output_text", "I look.")},
        {"type": "function_call", "call_id": "c1", "name": "f", "arguments": '{"a": 1}', "id": "fc_1"},
        {"type": "function_call", "call_id": "c2", "name": "g", "arguments": ""},
        {"type": "function_call_output", "call_id": "c1", "output": "Sunny."},
        {"type": "function_call_output", "call_id": "c2", "output": [{"type": "input_text", "text": "Dry."}]},
        {"type": "reasoning", "summary": [], "content": [{"type": "reasoning_text", "text": "long"}]},
        {"type": "message", "role": "assistant", "content": "First."},
        {"type": "message", "role": "assistant", "content": [{"type": "refusal", "refusal": "No."}]},
    ]
    assert conversation(input=items)["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {
            "role": "assistant",
            "content": "I look.",
            "reasoning_content": "short",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
                {"id": "c2", "type": "function", "function": {"name": "g", "arguments": "{}"}},
            ],
        },
        {"role": "tool", "content": "Sunny.", "tool_call_id": "c1"},
        {"role": "tool", "content": "Dry.", "tool_call_id": "c2"},
        {"role": "assistant", "content": "First.", "reasoning_content": "long"},
        {"role": "assistant", "content": "No."},
    ]


def test_items_of_other_servers_are_rendered_or_left_out() -> None:
    items = [
        {"role": "user", "content": "Hello"},
        {"type": "web_search_call", "id": "ws_1", "action": {"type": "search"}, "status": "completed"},
        {"type": "computer_call_output", "output": {"type": "computer_screenshot"}, "call_id": "x"},
        {"type": "custom_tool_call", "call_id": "c1", "name": "patch", "input": "+a"},
        {"type": "custom_tool_call_output", "call_id": "c1", "output": "Done."},
        {"type": "local_shell_call", "id": "l1", "action": {"type": "exec", "command": ["ls"]}},
        {"type": "local_shell_call_output", "id": "l1", "output": "a.txt"},
        {"type": "something_new", "arguments": 1},
    ]
    found = conversation(input=items)["messages"]
    assert [message["role"] for message in found] == ["user", "assistant", "tool", "assistant", "tool"]
    calls = [call["function"] for message in found for call in message.get("tool_calls", [])]
    assert [call["name"] for call in calls] == ["patch", "local_shell"]
    assert json.loads(calls[0]["arguments"]) == {"input": "+a"}
    assert json.loads(calls[1]["arguments"]) == {"type": "exec", "command": ["ls"]}
    assert [message.get("tool_call_id") for message in found if message["role"] == "tool"] == ["c1", "l1"]


def test_functions_are_used_and_other_tools_left_out() -> None:
    tools = [
        TOOL,
        *({"type": kind, "name": "x"} for kind in ("web_search", "custom", "namespace", "local_shell", "new")),
    ]
    found = conversation(tools=tools, tool_choice={"type": "function", "name": "get_weather"})
    assert [tool["function"]["name"] for tool in found["tools"]] == ["get_weather"]
    assert found["tools"][0]["function"]["parameters"] == PARAMETERS
    assert found["tool_choice"] == "required"
    assert "tools" not in conversation(tools=[{"type": "web_search"}])


def test_what_a_request_says_of_the_answer_reaches_the_runner() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    found = order(
        text={"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}},
        max_output_tokens=9,
        top_p=0.5,
        include=[LOGPROBS, "reasoning.encrypted_content"],
        top_logprobs=2,
        reasoning={"effort": "high", "summary": "auto"},
    )
    assert isinstance(found.output, Schema)
    assert json.loads(found.output.schema) == schema
    assert (found.max_tokens, found.sampling.top_p, found.logprobs) == (9, 0.5, 2)
    assert json.loads(found.conversation)["chat_template_kwargs"] == {"reasoning_effort": "high"}
    assert order(top_logprobs=2).logprobs is None
    assert order(include=[LOGPROBS]).logprobs == 0


DEEP = '{"a": ' * 70 + "1" + "}" * 70
IMAGE = {"type": "input_image", "image_url": "data:image/png;base64,AAAA"}
WRONG: list[tuple[dict[str, Any], type[ServiceError], str]] = [
    ({"input": None}, InvalidType, "input"),
    ({"input": []}, InvalidValue, "input"),
    ({"input": [{"type": "web_search_call"}]}, InvalidValue, "input"),
    ({"input": [{}]}, MissingParameter, "input[0].type"),
    ({"input": ["x"]}, InvalidType, "input[0]"),
    ({"input": [{"role": "tool", "content": "x"}]}, InvalidValue, "input[0].role"),
    ({"input": [{"role": "user"}]}, MissingParameter, "input[0].content"),
    ({"input": [{"role": "user", "content": [IMAGE]}]}, NotSupported, "input[0].content[0]"),
    ({"input": [{"role": "user", "content": [{"type": "x"}]}]}, InvalidValue, "input[0].content[0].type"),
    ({"input": [{"role": "user", "content": [{"type": "input_text"}]}]}, InvalidValue, "input[0].content[0].text"),
    ({"input": [{"type": "function_call", "name": "f"}]}, MissingParameter, "input[0].call_id"),
    (
        {"input": [{"type": "function_call", "call_id": "c", "name": "f", "arguments": DEEP}]},
        InvalidValue,
        "input[0].arguments",
    ),
    (
        {"input": [{"type": "function_call_output", "call_id": "c", "output": [IMAGE]}]},
        NotSupported,
        "input[0].output[0]",
    ),
    ({"input": [{"type": "item_reference", "id": "msg_1"}]}, NotSupported, "input[0]"),
    ({"input": [{"role": "user", "content": ""}] * (MOST_PIECES + 1)}, InvalidValue, "input"),
    ({"max_output_tokens": 0}, InvalidValue, "max_output_tokens"),
    ({"temperature": 3}, InvalidValue, "temperature"),
    ({"background": True}, NotSupported, "background"),
    ({"conversation": "conv_1"}, NotSupported, "conversation"),
    ({"prompt": {"id": "p"}}, NotSupported, "prompt"),
    ({"tools": [{"type": "mcp", "server_url": "http://example.com"}]}, IntegrationsRefused, "tools"),
    ({"tools": [{"type": "function"}]}, MissingParameter, "tools[0].name"),
    ({"tools": [{"type": "function", "name": "a b"}]}, InvalidValue, "tools[0].name"),
    ({"tools": [TOOL, TOOL]}, InvalidValue, "tools[1].name"),
    ({"tools": [{**TOOL, "parameters": {"type": "string"}}]}, InvalidValue, "tools[0].parameters.type"),
    ({"tools": [{**TOOL, "parameters": {"not": {}}, "strict": True}]}, NotSupported, "tools[0].parameters"),
    ({"tools": [TOOL], "tool_choice": {"type": "function", "name": "x"}}, InvalidValue, "tool_choice"),
    ({"tools": [TOOL], "tool_choice": {"type": "allowed_tools"}}, NotSupported, "tool_choice"),
    ({"tool_choice": "required"}, InvalidValue, "tool_choice"),
    ({"text": {"format": {"type": "x"}}}, InvalidValue, "text.format.type"),
    ({"text": {"format": {"type": "json_schema"}}}, MissingParameter, "text.format.schema"),
    ({"text": {"format": {"type": "json_schema", "schema": 1}}}, InvalidValue, "text.format.schema"),
    ({"text": {"format": {"type": "json_object"}}, "tools": [TOOL]}, NotSupported, "text.format"),
    ({"metadata": {"a": 1}}, InvalidType, "metadata[...]"),
]


@pytest.mark.parametrize(("fields", "kind", "param"), WRONG)
def test_what_is_wrong_is_refused_with_its_place(fields: dict[str, Any], kind: type[ServiceError], param: str) -> None:
    with pytest.raises(kind) as refused:
        order(**fields)
    assert (type(refused.value), refused.value.param) == (kind, param)
    assert str(refused.value)


def test_null_means_absent() -> None:
    names = [name for name in decoded(asked()).__struct_fields__ if name != "input"]
    assert order(**dict.fromkeys(names)) == order()


NAMES = ("role", "content", "call_id", "name", "arguments", "output", "summary", "action", "id", "input")
TYPES = ("message", "function_call", "function_call_output", "reasoning", "custom_tool_call", "local_shell_call")
nested = st.recursive(st.none() | st.booleans() | st.integers() | st.text(max_size=3), st.lists)
some_parts = st.lists(st.fixed_dictionaries({"type": st.just("text") | st.text(max_size=3), "text": nested}))


@given(
    st.lists(
        st.fixed_dictionaries(
            {"type": st.sampled_from(TYPES)}, optional=dict.fromkeys(NAMES, nested | st.just("user") | some_parts)
        ),
        max_size=3,
    )
)
def test_any_item_is_taken_or_refused_with_its_place(items: list[Any]) -> None:
    assert refused(items).startswith("input")


def refused(items: list[Any]) -> str:
    """Return the place in items for which they are refused."""
    try:
        order(input=items)
    except InvalidRequest as e:
        return str(e.param)
    return "input"


def test_what_is_left_out_is_one_line_in_the_log() -> None:
    """A request has as many items as fit: a line for each would occupy the process, and fill the log."""
    items = [{"type": "web_search_call"}, {"type": "secret"}] * 100
    tools = [{"type": "web_search"}, {"type": "secret"}] * 100
    with capture_logs() as logged:
        order(input=[*items, {"role": "user", "content": ""}], tools=tools)
    assert [(line["action"], line["types"]) for line in logged] == [
        ("tools_ignored", ["unknown", "web_search"]),
        ("items_ignored", ["unknown", "web_search_call"]),
    ]
