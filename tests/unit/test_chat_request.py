"""What a request for a chat completion means, and what is refused."""

from __future__ import annotations

import json
import tracemalloc
from typing import Any

import msgspec
import pytest

from api.openai.request import DEEPEST, MOST_PIECES, ChatRequest, decoded, generate
from shared.channel.messages import Generate, Grammar, Sampling, Schema, frame
from shared.errors import (
    BodyTooLarge,
    InvalidJSON,
    InvalidRequest,
    InvalidType,
    InvalidValue,
    MissingParameter,
    NotSupported,
)
from shared.schema.model import ModelSettings

HELLO = [{"role": "user", "content": "Hello"}]
ASSISTANT = [*HELLO, {"role": "assistant", "content": "Hi"}]


F: Any = {"type": "function", "function": {"name": "f"}}
CHOICE = {"type": "function", "function": {"name": "f"}}


def with_parameters(parameters: Any, **more: Any) -> Any:
    return {"type": "function", "function": {"name": "f", "parameters": parameters, **more}}


def strict(parameters: Any) -> Any:
    return with_parameters(parameters, strict=True)


def called(arguments: Any) -> Any:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return {"role": "assistant", "content": None, "tool_calls": [call]}


def nested(depth: int) -> dict[str, Any]:
    """Return a schema of so many levels."""
    schema: dict[str, Any] = {}
    for _ in range(depth):
        schema = {"not": schema}
    return schema


def asked(**fields: Any) -> Generate:
    body = json.dumps({"messages": HELLO, **fields}).encode()
    return generate(decoded(body), "client", ModelSettings())


def conversation(**fields: Any) -> Any:
    return json.loads(asked(**fields).conversation)


def refused(**fields: Any) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as caught:
        asked(**fields)
    return caught.value


def test_a_plain_request_has_the_defaults() -> None:
    assert asked() == Generate(id=0, client="client", conversation=b'{"messages":[{"role":"user","content":"Hello"}]}')
    assert asked().sampling == Sampling(temperature=0.8, top_k=40, top_p=0.95, min_p=0.05, repeat_penalty=1.0)


def test_null_means_absent_for_every_optional_field() -> None:
    names = [name for name in ChatRequest.__struct_fields__ if name != "messages"]
    assert asked(**dict.fromkeys(names)) == asked()


IGNORED: dict[str, Any] = {  # what OpenAI's API, llama.cpp's server and LM Studio have, and clients send to all servers
    **{"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "prompt_cache_key": "x"},
    **{"safety_identifier": "x", "verbosity": "low", "prediction": {"type": "content", "content": "x"}},
    **{"web_search_options": {}, "modalities": ["text"], "draft_model": "x", "options": {"num_ctx": 5}},
    **{"mirostat": 2, "mirostat_tau": 5.0, "dry_multiplier": 0.8, "xtc_probability": 0.1, "dynatemp_range": 1},
    **{"n_sigma": 1, "top_n_sigma": 1, "samplers": ["top_k"], "cache_prompt": True, "id_slot": 0, "lora": []},
    **{"return_progress": True, "timings_per_token": True, "reasoning_format": "auto", "sse_ping_interval": 5},
    **{"stream_options": {"include_usage": True, "include_obfuscation": False}, "contextOverflowPolicy": "stopAtLimit"},
}


@pytest.mark.parametrize("field", IGNORED)
def test_unknown_keys_are_ignored(field: str) -> None:
    assert asked(**{field: IGNORED[field]}) == asked()


FREE = {"ttl", "audio"}  # any value is one
TYPES: dict[str, set[type]] = {  # of the values below: those that a field takes
    "model": {str},
    "stream": {bool},
    "stream_options": {dict},
    "repeat_penalty": {float},
    "stop": {str},
    "reasoning_effort": {str},
    "chat_template_kwargs": {dict},
    "add_generation_prompt": {bool},
    "parallel_tool_calls": {bool},
    "logprobs": {bool},
    "grammar": {str},
    "json_schema": {dict},
}


@pytest.mark.parametrize("field", [name for name in ChatRequest.__struct_fields__ if name not in FREE])
@pytest.mark.parametrize("value", [[5], True, "x", 7.5, {"x": [1]}])
def test_a_value_of_a_wrong_type_is_refused_by_name(field: str, value: Any) -> None:
    """Each field takes at most some of these types."""
    if type(value) in TYPES.get(field, set()):
        assert asked(**{field: value})
        return
    error = refused(**{field: value})
    assert str(error.param).partition("[")[0].partition(".")[0] == field
    assert f"'{field}" in str(error)


@pytest.mark.parametrize(
    ("fields", "limit"),
    [
        ({"max_tokens": 5}, 5),
        ({"n_predict": 8}, 8),
        ({"max_tokens": 5, "n_predict": 8}, 5),
        ({"max_tokens": 5, "max_completion_tokens": 9}, 9),
        ({"max_tokens": -1}, None),
        ({"max_tokens": 5.0}, 5),
        ({"max_tokens": None, "max_completion_tokens": 3}, 3),
        ({"max_tokens": 5, "max_completion_tokens": -1}, None),
    ],
)
def test_the_newer_limit_of_tokens_wins(fields: dict[str, Any], limit: int | None) -> None:
    assert asked(**fields).max_tokens == limit


def test_sampling_is_taken_over() -> None:
    given: dict[str, Any] = {
        "temperature": 0,
        "top_k": 7,
        "top_p": 0.5,
        "min_p": 0,
        "typical_p": 0.9,
        "repeat_penalty": 1.2,
    }
    more: dict[str, Any] = {"repeat_last_n": -1, "presence_penalty": -2, "frequency_penalty": 2, "seed": 12}
    sampling = asked(**given, **more, logit_bias={"5": -100, "6": 1.5}).sampling
    assert sampling == Sampling(**given, **more, logit_bias={5: -100.0, 6: 1.5})
    assert asked(logit_bias=[[5, -100], ["6", 1.5]]).sampling.logit_bias == {5: -100.0, 6: 1.5}


def test_the_seed_minus_one_is_a_random_one() -> None:
    assert asked(seed=-1).sampling.seed is None
    assert asked(seed=0).sampling.seed == 0


def test_one_stop_string_is_a_list_of_one() -> None:
    assert asked(stop="END").stop == ["END"]
    assert asked(stop=["a", "b"]).stop == ["a", "b"]
    assert asked(stop=[str(i) for i in range(16)]).stop == [str(i) for i in range(16)]
    assert asked(stop=[]) == asked()


def test_log_probabilities_have_a_number_of_alternatives() -> None:
    assert asked(logprobs=True).logprobs == 0
    assert asked(logprobs=True, top_logprobs=3).logprobs == 3
    assert asked(logprobs=False).logprobs is None


def test_the_developer_is_the_system() -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO]
    assert conversation(messages=messages)["messages"][0] == {"role": "system", "content": "Be brief."}


def test_parts_of_text_stay_parts() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}, {"type": "refusal", "refusal": "c"}]
    rendered = conversation(messages=[{"role": "user", "content": parts}])["messages"][0]["content"]
    assert rendered == [{"type": "text", "text": text} for text in "abc"]


def test_earlier_reasoning_goes_to_the_template_by_either_name() -> None:
    for name in ("reasoning_content", "reasoning"):
        messages = [*HELLO, {"role": "assistant", "content": "Hi", name: "Greet."}, *HELLO]
        assert conversation(messages=messages)["messages"][1]["reasoning_content"] == "Greet."


def test_reasoning_is_turned_off_by_effort_or_by_the_variable() -> None:
    assert conversation(reasoning_effort="none")["enable_thinking"] is False
    assert conversation(chat_template_kwargs={"enable_thinking": False})["enable_thinking"] is False
    high = conversation(reasoning_effort="high", chat_template_kwargs={"x": 1})
    assert "enable_thinking" not in high
    assert high["chat_template_kwargs"] == {"reasoning_effort": "high", "x": 1}


@pytest.mark.parametrize("messages", [[], {}, "x", None, 5, [5], ["x"], [None]])
def test_messages_that_are_none_are_refused_by_name(messages: Any) -> None:
    error = refused(messages=messages)
    assert isinstance(error, (InvalidType, InvalidValue))
    assert str(error.param).startswith("messages")


def test_a_request_without_messages_names_them() -> None:
    with pytest.raises(MissingParameter, match=r"^'messages' is required\.$"):
        decoded(b"{}")


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [*HELLO, {"role": "wizard", "content": "x"}]}, "messages[1].role"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "user", "content": [{"type": "x"}]}]}, "messages[0].content[0].type"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -2}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"temperature": 2.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 1.1}, "top_p"),
        ({"top_k": 1.5}, "top_k"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"repeat_penalty": 0}, "repeat_penalty"),
        ({"stop": ""}, "stop"),
        ({"stop": ["a", ""]}, "stop"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": 5}, "stop"),
        ({"n": 0}, "n"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logit_bias": {"cat": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(2**70): 1}}, "logit_bias"),
        ({"logit_bias": [[1, 2, 3]]}, "logit_bias"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"response_format": {}}, "response_format"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema.schema"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format.json_schema.schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"schema": True}}},
            "response_format.json_schema.schema",
        ),
        ({"response_format": {"type": "json_object", "schema": 3}}, "response_format.schema"),
        ({"response_format": {"type": "json_object"}, "grammar": 'root ::= "a"'}, "response_format"),
        ({"response_format": {"type": "json_object"}, "json_schema": {}}, "response_format"),
        ({"json_schema": nested(65)}, "json_schema"),
        ({"json_schema": {"enum": ["x" * 600_000]}}, "json_schema"),
        ({"grammar": 5}, "grammar"),
        ({"continue_final_message": True}, "continue_final_message"),
        (
            {"messages": ASSISTANT, "continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
        ),
        ({"seed": 1.5}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"tools": {}}, "tools"),
        ({"tools": [{"function": {"name": "f"}}]}, "tools[0].type"),
        ({"tools": [{"type": "function"}]}, "tools[0].function"),
        ({"tools": [{"type": "function", "function": {}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"tools": [{"type": "function", "function": {"name": "x" * 129}}]}, "tools[0].function.name"),
        ({"tools": [F, F]}, "tools[1].function.name"),
        ({"tools": [{"type": "function", "function": {"name": f"f{i}"}} for i in range(129)]}, "tools"),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
            "tools[0].function.parameters",
        ),
        ({"tools": [with_parameters({"type": "array"})]}, "tools[0].function.parameters.type"),
        ({"tools": [with_parameters({"properties": nested(64)})]}, "tools[0].function.parameters"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tool_choice": CHOICE}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function", "function": {"name": "g"}}}, "tool_choice"),
        ({"tools": [F], "tool_choice": "f"}, "tool_choice"),
        ({"tools": [F], "tool_choice": {"type": "function"}}, "tool_choice"),
        ({"functions": [F["function"]], "function_call": {"name": "g"}}, "function_call"),
        ({"functions": [F["function"]], "function_call": "required"}, "function_call"),
        ({"functions": [F["function"]], "tools": [F]}, "functions"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id"),
        ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].name"),
        ({"messages": [called(5)]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [called(nested(64))]}, "messages[0].tool_calls[0].function.arguments"),
        ({"messages": [called(json.dumps(nested(64)))]}, "messages[0].tool_calls[0].function.arguments"),
    ],
)
def test_a_wrong_value_is_refused_by_the_name_of_its_field(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert error.param == param
    assert f"'{param}" in str(error)


WEBP = "data:image/webp;base64,UklGRhIAAABXRUJQVlA4TAYAAAAvQWxvAGs="
NOT_SERVED: list[Any] = [
    *({"type": "image_url", "image_url": {"url": url}} for url in (WEBP, "http://localhost/x", "file:///etc/passwd")),
    {"type": "image_url", "image_url": WEBP},
    {"type": "image_url"},
    {"type": "input_image", "image_url": WEBP},
    {"type": "input_audio", "input_audio": {"data": "AA==", "format": "wav"}},
    {"type": "file", "file": {"file_id": "x"}},
    {"type": "input_file", "file_id": "x"},
    {"type": "video_url", "video_url": {"url": "http://localhost/x"}},
]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0]"),
        ({"tools": [F], "tool_choice": {"type": "allowed_tools", "allowed_tools": {}}}, "tool_choice"),
        ({"tools": [strict({"pattern": "a"})]}, "tools[0].function.parameters"),
        ({"tools": [strict({"properties": {"a": {"not": {}}}})]}, "tools[0].function.parameters"),
        *(
            ({"tools": [strict({"properties": {"a": schema}})]}, "tools[0].function.parameters")
            for schema in (
                {"type": "number", "minimum": 0},
                {"type": ["integer", "number"], "maximum": 1},
                {"type": "integer", "minimum": 0, "exclusiveMinimum": 1},
                {"type": "integer", "minimum": 0, "exclusiveMinimum": True},
                {"type": "integer", "maximum": 2**53 + 1},
                {"type": "array", "items": [{}], "minItems": 1},
            )
        ),
        ({"modalities": ["text", "audio"]}, "modalities"),
        ({"audio": {"voice": "x"}}, "audio"),
        ({"tools": [F], "response_format": {"type": "json_object"}}, "response_format"),
        *(({"messages": [{"role": "user", "content": [part]}]}, "messages[0].content[0]") for part in NOT_SERVED),
    ],
)
def test_what_would_change_the_answer_is_not_dropped(fields: dict[str, Any], param: str) -> None:
    error = refused(**fields)
    assert isinstance(error, NotSupported)
    assert error.param == param


HOSTED = ["web_search", "web_search_preview_2025_03_11", "file_search", "code_interpreter", "computer"]
HOSTED += ["computer_use_preview", "image_generation"]


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "integer", "minimum": -(2**53) + 1, "maximum": 2**53 - 1},  # what zod makes of int()
        {"type": ["integer", "null"], "exclusiveMinimum": 0, "exclusiveMaximum": 9},
        {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 3},
    ],
)
def test_a_strict_schema_may_bound_integers_and_arrays(schema: Any) -> None:
    (tool,) = conversation(tools=[strict({"properties": {"a": schema}})])["tools"]
    assert tool["function"]["parameters"]["properties"] == {"a": schema}


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": []},
        {"tools": [F], "tool_choice": "none"},
        {"functions": [F["function"]], "function_call": "none"},
        *({"tools": [{"type": kind}]} for kind in HOSTED),
        {"tool_choice": "none"},
        {"tool_choice": "auto"},
        {"parallel_tool_calls": False},
        {"response_format": {"type": "text"}},
    ],
)
def test_what_asks_for_nothing_is_accepted(fields: dict[str, Any]) -> None:
    assert asked(**fields) == asked()


def test_tools_go_to_the_template_with_all_that_it_may_read() -> None:
    g: Any = {"name": "g", "description": "Do it.", "parameters": {"properties": {"a": {"type": "string"}}}}
    found = conversation(tools=[F, {"type": "function", "function": g}, {"type": "web_search"}])
    empty = {"name": "f", "description": "", "parameters": {"type": "object", "properties": {}}}
    assert [tool["function"] for tool in found["tools"]] == [
        empty,
        {**g, "parameters": {"type": "object", **g["parameters"]}},
    ]
    assert "tool_choice" not in found
    assert "parallel_tool_calls" not in found
    assert conversation(functions=[F["function"]])["tools"] == found["tools"][:1]


@pytest.mark.parametrize(
    "fields",
    [
        {"tools": [F, with_parameters({}) | {"function": {"name": "g"}}], "tool_choice": CHOICE},
        {"functions": [F["function"], {"name": "g"}], "function_call": {"name": "f"}},
    ],
)
def test_a_choice_of_one_function_is_a_call_of_the_only_one(fields: dict[str, Any]) -> None:
    found = conversation(**fields, parallel_tool_calls=False)
    assert [tool["function"]["name"] for tool in found["tools"]] == ["f"]
    assert found["tool_choice"] == "required"
    assert found["parallel_tool_calls"] is False


@pytest.mark.parametrize("arguments", ['{"a": 1}', {"a": 1}, ' {"a": 1}'])
def test_calls_and_results_go_to_the_template(arguments: Any) -> None:
    result = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "ok"}]}
    _, call, answer = conversation(messages=[*HELLO, called(arguments), result])["messages"]
    assert json.loads(call["tool_calls"][0]["function"].pop("arguments")) == {"a": 1}
    assert call == {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}],
    }
    assert answer == result


def test_an_answer_is_read_again_as_libraries_keep_it() -> None:
    """With null for all that it does not have, or an empty list of calls, and with fields of other servers."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("refusal", "annotations", "audio", "function_call", "tool_calls", "reasoning_content")
    )
    plain = conversation(messages=[*ASSISTANT, *HELLO])
    others: list[dict[str, Any]] = [{"tool_calls": []}, {"provider_specific_fields": {"x": [1]}, "images": []}]
    for more in (nothing, *others):
        assert conversation(messages=[*HELLO, {**ASSISTANT[1], **more}, *HELLO]) == plain


def test_arguments_that_are_none_are_an_empty_object() -> None:
    values: list[Any] = ["", None, "{}", {}]
    for arguments in values:
        call = conversation(messages=[*HELLO, called(arguments), *HELLO])["messages"][1]
        assert call["tool_calls"][0]["function"]["arguments"] == "{}"


def test_calls_in_the_older_form_have_an_id() -> None:
    older = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    _, call, answer = conversation(messages=[*HELLO, older, {"role": "function", "name": "f", "content": "ok"}])[
        "messages"
    ]
    (made,) = call["tool_calls"]
    assert answer == {"role": "tool", "content": "ok", "name": "f", "tool_call_id": made["id"]}


@pytest.mark.parametrize(
    ("fields", "output"),
    [
        ({}, None),
        ({"response_format": {"type": "text"}, "grammar": "", "json_schema": None}, None),
        ({"response_format": {"type": "json_object"}}, Schema(b'{"type":"object"}')),
        ({"response_format": {"type": "json_object", "schema": {"minLength": 1}}}, Schema(b'{"minLength":1}')),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "strict": False, "schema": {}}}},
            Schema(b"{}"),
        ),
        ({"json_schema": nested(64)}, Schema(json.dumps(nested(64), separators=(",", ":")).encode())),
        ({"grammar": 'root ::= "a"'}, Grammar('root ::= "a"')),
    ],
)
def test_an_answer_has_the_form_that_is_asked_for(fields: dict[str, Any], output: Schema | Grammar | None) -> None:
    assert asked(**fields).output == output


def test_a_continued_message_has_no_form() -> None:
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "{"}]
    with pytest.raises(NotSupported):
        asked(messages=messages, json_schema={})
    assert asked(messages=messages, json_schema={}, add_generation_prompt=True)


def test_ignored_values_are_not_kept() -> None:
    """Millions of them would take seconds and gigabytes, in the process that answers all other requests."""
    junk = b"[" + b",".join([b"[1]"] * 1_000_000) + b"]"
    message = b'{"role": "user", "content": [{"type": "text", "text": "Hello", "x": %b}], "x": %b}' % (junk, junk)
    body = b'{"messages": [%b], "x": %b}' % (message, junk)
    tracemalloc.start()
    request = decoded(body)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert request == decoded(b'{"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]}')
    assert peak < 1 << 20


@pytest.mark.parametrize("field", ["tools", "stop", "chat_template_kwargs", "logit_bias", "audio"])
def test_only_the_conversation_may_be_large(field: str) -> None:
    large = b"[" + b",".join([b"[1]"] * 300_000) + b"]"
    with pytest.raises(BodyTooLarge, match="The fields other than 'messages' exceed the limit of 1,048,576 bytes"):
        decoded(b'{"messages": [{"role": "user", "content": "Hello"}], "%b": %b}' % (field.encode(), large))
    text = "x" * 5_000_000
    assert decoded(msgspec.json.encode({"messages": [{"role": "user", "content": text}]})).messages[0].content == text


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "x"}] * (MOST_PIECES + 1),
        [{"role": "user", "content": [{"type": "text", "text": "x"}] * MOST_PIECES}],
    ],
)
def test_a_conversation_has_a_limited_number_of_pieces(messages: Any) -> None:
    assert "expected at most 65,536 messages and parts, got 65,537" in str(refused(messages=messages))


def test_a_number_out_of_range_is_invalid_json() -> None:
    for field in (b'"temperature": 1e400', b'"seed": ' + b"9" * 5000, b'"chat_template_kwargs": {"x": 1e400}'):
        with pytest.raises(InvalidJSON, match=r"^A number in the body is out of range\.$"):
            decoded(b'{"messages": [{"role": "user", "content": "x"}], %b}' % field)


def test_a_whole_number_may_have_a_fraction_of_zero() -> None:
    message = b'"messages": [{"role": "user", "content": "x"}]'
    request = decoded(b'{"max_tokens": 5.0, "n": 2e0, %b, "seed": -1.0, "temperature": 1.0}' % message)
    assert (request.max_tokens, request.n, request.seed, request.temperature) == (5, 2, -1, 1.0)
    with pytest.raises(InvalidType, match="'max_tokens': expected integer, got number"):
        decoded(b'{"max_tokens": 5.5, %b}' % message)


def test_a_huge_limit_of_tokens_is_as_good_as_none() -> None:
    body = b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 1%b}' % (b"0" * 30)
    frame(generate(decoded(body), "", ModelSettings()))


def test_a_deeply_nested_request_is_refused() -> None:
    nested: Any = 1
    for _ in range(DEEPEST):
        nested = [nested]
    assert "nested" in str(refused(chat_template_kwargs={"x": nested}))
