"""Tools through the whole service: real templates of eleven families, and models that recite an answer to each."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import paths
from tests.support.chat import answered, ask, chunks
from tests.support.families import ARGUMENTS, CALL, FAMILIES, TOOL, template
from tests.support.reciting import reciting
from tests.support.service import Service, openai_error, up
from worker.chat.code import ChatCode

GENERIC = "generic"
ZONE = {"type": "object", "properties": {"zone": {"type": "string"}}, "required": ["zone"]}
TIME = {"type": "function", "function": {"name": "get_time", "parameters": ZONE}}
CALLS = f'{CALL}\n<tool_call>\n{{"name": "get_time", "arguments": {{"zone": "CET"}}}}\n</tool_call>'
BROKEN = '{"name": "get_weather", "parameters": {"city": Paris}}'
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
RESULT = {"role": "tool", "tool_call_id": "", "content": "Sunny."}


def key(family: str) -> str:
    return f"acme/{family.replace(' ', '-').lower()}"


def write(models: Path, family: str) -> None:
    name, answer, _ = FAMILIES[family]
    source = template(name)
    request = json.dumps({"messages": QUESTION, "tools": [TOOL]}).encode()
    rendered = ChatCode().templates(source).render(request)
    path = models / key(family) / "recites-f32.gguf"
    special = {*rendered.preserved_tokens} - {"<|end|>"}  # which ends answers, unless the vocabulary is that of gpt-oss
    reciting(path, answer, source, special=special, after=rendered.generation_prompt)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("tools")
    for family in FAMILIES:
        write(home / "models", family)
    reciting(home / "models/acme" / GENERIC / "recites-f32.gguf", CALL, "chatml")
    reciting(home / "models/acme/twice/recites-f32.gguf", CALLS, "chatml")
    llama = template(FAMILIES["Llama 3.1"][0])
    reciting(home / "models/acme/broken/recites-f32.gguf", BROKEN, llama)
    with up(home) as service:
        yield service


def message(service: Service, **fields: Any) -> tuple[Any, str]:
    (choice,) = answered(service, **fields)["choices"]
    return choice["message"], choice["finish_reason"]


def streamed(service: Service, **fields: Any) -> tuple[list[Any], str]:
    """Return the deltas of a streamed answer, and its end."""
    received = [chunk["choices"][0] for chunk in chunks(service, **fields)]
    assert [one["finish_reason"] for one in received[:-1]] == [None] * (len(received) - 1)
    assert received[-1]["delta"] == {}
    assert received[0]["delta"] == {"role": "assistant", "content": ""}
    assert not any("role" in one["delta"] for one in received[1:])
    return [one["delta"] for one in received[1:-1]], received[-1]["finish_reason"]


def joined(deltas: list[Any]) -> dict[str, Any]:
    """Return the message that deltas make, which must be as clients need them."""
    made: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    for delta in deltas:
        ((field, value),) = delta.items()
        if field != "tool_calls":
            assert not made["tool_calls"]
            made[field] += value
            continue
        (call,) = value
        if call["index"] == len(made["tool_calls"]):
            assert set(call) == {"index", "id", "type", "function"}
            made["tool_calls"].append({**call, "function": {**call["function"]}})
        else:
            assert set(call) == {"index", "function"}
            assert set(call["function"]) == {"arguments"}
            made["tool_calls"][call["index"]]["function"]["arguments"] += call["function"]["arguments"]
    return made


def said(message: dict[str, Any]) -> dict[str, Any]:
    (call,) = message["tool_calls"]
    assert call["id"].startswith("call_")
    assert call["type"] == "function"
    return {
        "content": (message["content"] or "").strip(),
        "reasoning": message.get("reasoning_content", "").strip(),
        "name": call["function"]["name"],
        "arguments": json.loads(call["function"]["arguments"]),
    }


@pytest.mark.parametrize("choice", ["auto", "required", "named"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_calls_a_tool(service: Service, family: str, choice: str) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    fields: dict[str, Any] = {"model": key(family), "messages": QUESTION, "tools": [TOOL]}
    fields["tool_choice"] = named if choice == "named" else choice
    expected = FAMILIES[family][2]
    if family == "Gemma 4" and choice != "auto":  # its grammar then begins with the call
        expected = {**expected, "content": ""}
    whole, finish = message(service, **fields)
    assert (said(whole), finish) == (expected, "tool_calls")
    assert (whole["content"] is None) == (not expected["content"])
    deltas, finish = streamed(service, **fields)
    assert (said(joined(deltas)), finish) == (expected, "tool_calls")


def test_a_template_without_tools_gets_the_general_form(service: Service) -> None:
    fields: dict[str, Any] = {"model": f"acme/{GENERIC}", "messages": QUESTION, "tools": [TOOL]}
    whole, finish = message(service, **fields)
    assert (said(whole)["arguments"], whole["content"], finish) == (
        json.loads(ARGUMENTS),
        "I will look.\n",
        "tool_calls",
    )
    deltas, finish = streamed(service, **fields)
    assert (said(joined(deltas)), finish) == (said(whole), "tool_calls")


def test_the_older_api_says_that_an_answer_ended_with_calls(service: Service) -> None:
    fields = {"model": f"acme/{GENERIC}", "messages": QUESTION, "tools": [TOOL]}
    reply = service.post(paths.V0_CHAT_COMPLETIONS, fields).json()
    assert reply["choices"][0]["finish_reason"] == "tool_calls"
    assert reply["stats"]["stop_reason"] == "toolCalls"


def test_a_call_is_only_text_to_a_client_without_tools(service: Service) -> None:
    whole, finish = message(service, model=f"acme/{GENERIC}", messages=QUESTION, tools=[TOOL], tool_choice="none")
    assert (whole["content"], finish) == (CALL, "stop")
    assert "tool_calls" not in whole


def test_two_calls_are_told_apart(service: Service) -> None:
    """`joined` demands one call in a chunk, its index, and an id and a name in the first addition to it alone."""
    fields: dict[str, Any] = {"model": "acme/twice", "messages": QUESTION, "tools": [TOOL, TIME]}
    expected = [("get_weather", json.loads(ARGUMENTS)), ("get_time", {"zone": "CET"})]

    def calls(message: Any) -> list[tuple[str, Any]]:
        assert len({call["id"] for call in message["tool_calls"]}) == len(message["tool_calls"])
        functions = [call["function"] for call in message["tool_calls"]]
        return [(function["name"], json.loads(function["arguments"])) for function in functions]

    whole, finish = message(service, **fields)
    assert (calls(whole), whole["content"], finish) == (expected, "I will look.\n", "tool_calls")
    deltas, finish = streamed(service, **fields)
    assert (calls(joined(deltas)), joined(deltas)["content"], finish) == (expected, "I will look.\n", "tool_calls")


@pytest.mark.parametrize("family", FAMILIES)
def test_calls_differ_in_their_ids_and_may_be_answered(service: Service, family: str) -> None:
    """Clients send the arguments back as text, which the templates of some families need as an object."""
    fields: dict[str, Any] = {"model": key(family), "tools": [TOOL]}
    first, _ = message(service, messages=QUESTION, **fields)
    (call,) = first["tool_calls"]
    assert isinstance(call["function"]["arguments"], str)
    messages = [*QUESTION, first, {**RESULT, "tool_call_id": call["id"]}]
    prompt = service.post(paths.APPLY_TEMPLATE, {"model": key(family), "messages": messages}).json()["prompt"]
    assert "days" in prompt
    assert "Sunny." in prompt
    second, _ = message(service, messages=messages, **fields)
    assert second["tool_calls"][0]["id"] != call["id"]
    assert said(second)["arguments"] == json.loads(ARGUMENTS)


@pytest.mark.parametrize("end", ["stop", "length"])
def test_what_looks_like_a_call_and_is_none_is_text(service: Service, end: str) -> None:
    """Without a grammar for it, as with this template, the model may write anything."""
    fields: dict[str, Any] = {"model": "acme/broken", "messages": QUESTION, "tools": [TOOL]}
    whole, finish = message(service, **fields, **({"max_tokens": 8} if end == "length" else {}))
    assert BROKEN.startswith(whole["content"])
    assert (whole["content"] == BROKEN) == (end == "stop")
    assert "tool_calls" not in whole
    assert finish == end
    deltas, finish = streamed(service, **fields)
    assert joined(deltas)["content"] == BROKEN
    assert (joined(deltas)["tool_calls"], finish) == ([], "stop")


NOT, LOOKS_AROUND = {"not": {"const": 1}}, {"type": "string", "pattern": "(?=P)P"}
POINTS_NOWHERE = {"$ref": "#/$defs/nothing"}


def with_parameter(schema: Any) -> list[Any]:
    tool: dict[str, Any] = json.loads(json.dumps(TOOL))
    tool["function"]["parameters"]["properties"]["other"] = schema
    return [tool]


@pytest.mark.parametrize("schema", [NOT, LOOKS_AROUND, POINTS_NOWHERE])
def test_a_schema_that_must_be_enforced_and_cannot_is_refused(service: Service, schema: Any) -> None:
    tools = with_parameter(schema)
    reply = ask(service, model=f"acme/{GENERIC}", messages=QUESTION, tools=tools, tool_choice="required")
    message = openai_error(reply, 400, "invalid_request_error", "invalid_value", "tools")
    assert message.startswith("This server cannot enforce the form of calls of the tools: ")
    strict = [{**tool, "function": {**tool["function"], "strict": True}} for tool in tools]
    assert ask(service, model=f"acme/{GENERIC}", messages=QUESTION, tools=strict).status == 400


@pytest.mark.parametrize("name", [GENERIC, "qwen3"])
@pytest.mark.parametrize("bounds", [{"minimum": 3, "maximum": 3}, {"exclusiveMinimum": 2, "exclusiveMaximum": 4}])
def test_a_strict_schema_bounds_an_integer(service: Service, name: str, bounds: Any) -> None:
    """The model would say 2."""
    tool: dict[str, Any] = json.loads(json.dumps(TOOL))
    tool["function"]["strict"] = True
    tool["function"]["parameters"]["additionalProperties"] = False
    tool["function"]["parameters"]["properties"]["days"] |= bounds
    fields: dict[str, Any] = {"model": f"acme/{name}", "messages": QUESTION, "tools": [tool]}
    whole, _ = message(service, **fields, tool_choice="required", parallel_tool_calls=False)
    assert said(whole)["arguments"] == {"city": "Paris", "days": 3}


@pytest.mark.parametrize("schema", [NOT, LOOKS_AROUND, POINTS_NOWHERE])
def test_other_schemas_are_enforced_as_far_as_possible(service: Service, schema: Any) -> None:
    fields: dict[str, Any] = {"model": f"acme/{GENERIC}", "messages": QUESTION, "tools": with_parameter(schema)}
    whole, finish = message(service, **fields)
    assert (said(whole)["arguments"], finish) == (json.loads(ARGUMENTS), "tool_calls")
    deltas, finish = streamed(service, **fields)
    assert (said(joined(deltas)), finish) == (said(whole), "tool_calls")


def test_the_list_says_how_reasoning_can_be_set(service: Service) -> None:
    models = {model["key"]: model for model in service.send("GET", "/api/v1/models").json()["models"]}
    found = {family: models[key(family)]["capabilities"].get("reasoning") for family in FAMILIES}
    switch = {"allowed_options": ["off", "on"], "default": "on"}
    assert found["Qwen3"] == switch
    assert found["gpt-oss"] == {"allowed_options": ["low", "medium", "high"], "default": "medium"}
    assert found["Hermes 3"] is None


def test_reasoning_can_be_turned_off(service: Service) -> None:
    """The template then writes the reasoning itself, empty; this model repeats it, which is content."""
    whole, _ = message(service, model=key("Qwen3"), messages=QUESTION, reasoning_effort="none", max_tokens=10)
    assert "reasoning_content" not in whole
    whole, _ = message(service, model=key("Qwen3"), messages=QUESTION, max_tokens=10)
    assert whole["reasoning_content"]


def test_reasoning_ends_at_the_limit_of_the_request(service: Service) -> None:
    """What follows is content: the model recites its whole text after any beginning that is not its own."""
    request: dict[str, Any] = {"model": key("Qwen3"), "messages": QUESTION}
    free, _ = message(service, **request)
    whole, _ = message(service, **request, thinking_budget_tokens=2)
    assert free["reasoning_content"].startswith(whole["reasoning_content"])
    assert 0 < len(whole["reasoning_content"]) < len(free["reasoning_content"])
    assert whole["content"].endswith(free["content"])
    deltas, _ = streamed(service, **request, thinking_budget_tokens=2)
    assert "".join(one.get("reasoning_content", "") for one in deltas) == whole["reasoning_content"]
    none, _ = message(service, **request, thinking_budget_tokens=0)
    assert "reasoning_content" not in none
    assert none["content"].endswith(free["content"])
