"""Responses through the whole service: real templates, and models that recite an answer."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.families import ARGUMENTS, CALL, FAMILIES, TOOL, template
from tests.support.reciting import reciting
from tests.support.responses import read, respond, responded, responding
from tests.support.service import TINY, Service, openai_error, until, up
from worker.chat.code import ChatCode

THINKING, CALLING = "acme/thinking", "acme/calling"
FUNCTION = {"type": "function", **TOOL["function"]}  # type: ignore[dict-item]
OTHERS = [{"type": "web_search"}, {"type": "custom", "name": "patch"}, {"type": "namespace", "name": "n", "tools": []}]


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("responses")
    models = home / "models"
    synthetic.tiny_llama(models / TINY / "tiny-f16.gguf")
    write(models / THINKING / "recites-f32.gguf", "Qwen3")
    reciting(models / CALLING / "recites-f32.gguf", CALL, "chatml")
    with up(home) as service:
        yield service


def write(path: Path, family: str) -> None:
    """Write a model of a family that reasons, speaks and calls a tool."""
    name, answer, _ = FAMILIES[family]
    source = template(name)
    request = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "tools": [TOOL]}).encode()
    rendered = ChatCode().templates(source).render(request)
    reciting(path, answer, source, special={*rendered.preserved_tokens}, after=rendered.generation_prompt)


def both(service: Service, **fields: Any) -> Any:
    """Return a response, which must say the same whole and as events."""
    whole = responded(service, **fields)
    with responding(service, **fields) as received:
        streamed = read(received)
    assert shape(streamed) == shape(whole)
    return whole


def shape(response: Any) -> Any:
    """Return a response without what differs from one to the next."""
    changing = {"id", "call_id", "created_at", "completed_at", "usage"}
    if isinstance(response, dict):
        return {name: shape(value) for name, value in response.items() if name not in changing}
    return [shape(value) for value in response] if isinstance(response, list) else response


def test_a_text_is_answered_with_a_message(service: Service) -> None:
    reply = respond(service, model=TINY, max_output_tokens=4, top_p=0.5)
    assert reply.headers["loadstone-instance"] == TINY
    found = both(service, model=TINY, max_output_tokens=4, top_p=0.5)
    (item,) = found["output"]
    assert (item["type"], item["status"], found["status"]) == ("message", "incomplete", "incomplete")
    assert found["incomplete_details"] == {"reason": "max_output_tokens"}
    assert found["usage"]["output_tokens"] == 4
    assert found["usage"]["total_tokens"] == found["usage"]["input_tokens"] + 4
    assert (found["model"], found["temperature"], found["top_p"]) == (TINY, 0.0, 0.5)


def test_the_answer_is_that_of_chat_completions(service: Service) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    chat = service.post(
        paths.CHAT_COMPLETIONS, {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 8}
    ).json()
    found = responded(service, model=TINY, instructions="Be brief.", max_output_tokens=8)
    assert found["output"][0]["content"][0]["text"] == chat["choices"][0]["message"]["content"]
    assert found["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_a_model_reasons_speaks_and_calls_a_tool(service: Service) -> None:
    found = both(service, model=THINKING, tools=[*OTHERS, FUNCTION], tool_choice="auto")
    reasoning, message, call = found["output"]
    assert reasoning["content"][0]["text"].strip() == "Paris, two days."
    assert message["content"][0]["text"].strip() == "I will look."
    assert (call["type"], call["name"], json.loads(call["arguments"])) == (
        "function_call",
        "get_weather",
        json.loads(ARGUMENTS),
    )
    assert found["status"] == "completed"
    assert found["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    assert [tool["name"] for tool in found["tools"]] == ["get_weather"]
    again = [{"role": "user", "content": "Hello"}, *found["output"]]
    again.append({"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny."})
    assert responded(service, model=THINKING, input=again, tools=[FUNCTION])["status"] == "completed"


def test_a_call_may_be_required_by_its_name(service: Service) -> None:
    other = {**FUNCTION, "name": "get_time"}
    choice = {"type": "function", "name": "get_weather"}
    found = both(service, model=CALLING, tools=[other, FUNCTION], tool_choice=choice, parallel_tool_calls=False)
    call = found["output"][-1]
    assert (call["name"], json.loads(call["arguments"])) == ("get_weather", json.loads(ARGUMENTS))
    assert (found["tool_choice"], found["parallel_tool_calls"]) == (choice, False)
    none = both(service, model=CALLING, tools=[FUNCTION], tool_choice="none")
    assert [item["type"] for item in none["output"]] == ["message"]


def test_a_schema_is_enforced(service: Service) -> None:
    schema: dict[str, Any] = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    schema["additionalProperties"] = False
    text = {"format": {"type": "json_schema", "name": "n", "strict": True, "schema": schema}}
    found = both(service, model=TINY, text=text)
    assert isinstance(json.loads(found["output"][0]["content"][0]["text"])["a"], bool)
    assert found["text"] == text


def test_log_probabilities_come_with_the_text(service: Service) -> None:
    found = both(service, model=TINY, max_output_tokens=4, include=["message.output_text.logprobs"], top_logprobs=2)
    (part,) = found["output"][0]["content"]
    assert b"".join(bytes(token["bytes"]) for token in part["logprobs"]).decode(errors="replace") == part["text"]
    assert [len(token["top_logprobs"]) for token in part["logprobs"]] == [2] * 4


def test_what_codex_sends_is_answered(service: Service) -> None:
    assert respond(service, model=TINY, input="", max_output_tokens=1).status == 200
    turn: dict[str, Any] = {
        "instructions": "You are a coding agent.",
        "input": [{"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Hello"}]}],
        "tools": [FUNCTION, {"type": "local_shell"}, *OTHERS],
        "tool_choice": "auto",
        "parallel_tool_calls": False,
        "reasoning": {"effort": "medium", "summary": "auto"},
        "store": False,
        "include": ["reasoning.encrypted_content"],
        "prompt_cache_key": "key",
        "client_metadata": {"a": 1},
    }
    with responding(service, model=CALLING, **turn) as received:
        events = list(received)
    last = events[-1]["response"]
    assert (events[-1]["type"], last["store"]) == ("response.completed", False)
    assert last["usage"]["input_tokens_details"].keys() == {"cached_tokens"}
    assert [event["item"] for event in events if event["type"] == "response.output_item.done"] == last["output"]


def test_input_tokens_are_counted_as_the_usage_has_them(service: Service) -> None:
    fields: dict[str, Any] = {"model": THINKING, "input": "Hello", "instructions": "Be brief.", "tools": [FUNCTION]}
    counted = service.post(paths.RESPONSES_INPUT_TOKENS, fields).json()
    assert counted == {
        "object": "response.input_tokens",
        "input_tokens": responded(service, **fields)["usage"]["input_tokens"],
    }


def test_refusals_come_with_a_status_also_for_a_stream(service: Service) -> None:
    service.loaded(TINY)
    for stream in (False, True):
        reply = respond(service, model=TINY, input="Hello " * 10_000, stream=stream)
        error = reply.json()["error"]
        assert (reply.status, error["code"], error["param"]) == (400, "context_length_exceeded", "input")
        assert "too large to process" not in error["message"], "it is not one of several texts"
        reply = respond(service, model="acme/nothing", stream=stream)
        openai_error(reply, 404, "invalid_request_error", "model_not_found", "model")
        reply = respond(service, model=TINY, tools=[{"type": "mcp", "server_label": "x"}], stream=stream)
        openai_error(reply, 403, "invalid_request_error", "integrations_not_supported", "tools")
        reply = respond(service, model=TINY, previous_response_id="resp_x", stream=stream)
        code = "previous_response_not_found"
        message = openai_error(reply, 400, "invalid_request_error", code, "previous_response_id")
        assert message == "Previous response with id 'resp_x' not found."


def test_a_response_fails_if_its_model_is_unloaded(service: Service) -> None:
    service.loaded(TINY)
    with responding(service, model=TINY, **endless()) as received:
        events = [next(received)]
        while events[-1]["type"] != "response.output_text.delta":
            events.append(next(received))
        service.unload_all()
        events += received
    response = read(iter(events))
    assert (response["status"], response["error"]["code"]) == ("failed", "model_unloaded")


def test_a_client_that_leaves_cancels_its_response(service: Service) -> None:
    service.loaded(TINY)
    assert service.send("DELETE", paths.RESPONSES).status == 200
    with responding(service, model=TINY, **endless()) as received:
        next(event for event in received if event["type"] == "response.output_text.delta")
    until(lambda: service.metric("requests_running", instance=TINY) == 0, "the request ends")
    assert service.send("DELETE", paths.RESPONSES).json() == {"object": "list", "deleted": 0}, "nothing is stored"


# ---- stored responses


def path(response: Any) -> str:
    return paths.RESPONSE.format(response_id=response["id"])


def test_a_response_continues_another_as_if_all_was_sent(service: Service) -> None:
    """Streamed or not, with all items, and without the instructions of the one before."""
    first = responded(service, model=THINKING, tools=[FUNCTION], instructions="Be brief.")
    call = first["output"][-1]
    result = {"type": "function_call_output", "call_id": call["call_id"], "output": "Sunny."}
    everything = [{"role": "user", "content": "Hello"}, *first["output"], result]
    whole = {"model": THINKING, "tools": [FUNCTION], "input": everything}
    more = {"model": THINKING, "tools": [FUNCTION], "input": [result], "previous_response_id": first["id"]}
    second = both(service, **more)
    assert second["previous_response_id"] == first["id"]
    assert second["usage"]["input_tokens"] == responded(service, **whole)["usage"]["input_tokens"]
    counted = [service.post(paths.RESPONSES_INPUT_TOKENS, fields).json() for fields in (more, whole)]
    assert counted[0] == counted[1]
    with responding(service, **more) as received:
        third = read(received)
    fourth = [
        responded(service, model=TINY, max_output_tokens=1, previous_response_id=id_)["usage"]["input_tokens"]
        for id_ in (first["id"], second["id"], third["id"])
    ]
    assert fourth[0] < fourth[1] == fourth[2], "each continues its own, also with another model"


def test_a_streamed_response_continues_a_streamed_one(service: Service) -> None:
    with responding(service, model=TINY, input="One", max_output_tokens=4) as received:
        first = read(received)
    with responding(
        service, model=TINY, input="Two", max_output_tokens=4, previous_response_id=first["id"]
    ) as received:
        second = read(received)
    assert second["previous_response_id"] == first["id"]
    everything = [{"role": "user", "content": "One"}, *first["output"], {"role": "user", "content": "Two"}]
    whole = responded(service, model=TINY, input=everything, max_output_tokens=4)
    assert shape(second["output"]) == shape(whole["output"])
    assert second["usage"]["input_tokens"] == whole["usage"]["input_tokens"]


def test_a_stored_response_is_read_and_removed(service: Service) -> None:
    first = responded(service, model=TINY, max_output_tokens=2)
    with responding(service, model=TINY, max_output_tokens=2, previous_response_id=first["id"]) as received:
        second = read(received)
    assert (first["store"], second["store"]) == (True, True)
    assert [service.send("GET", path(one)).json() for one in (first, second)] == [first, second]
    openai_error(
        service.send("GET", f"{path(first)}?stream=true"), 400, "invalid_request_error", "not_supported", "stream"
    )
    assert service.send("DELETE", path(first)).json() == {"id": first["id"], "object": "response", "deleted": True}
    for method in ("GET", "DELETE"):
        message = openai_error(service.send(method, path(first)), 404, "invalid_request_error", None, "response_id")
        assert message == f"Response with id '{first['id']}' not found."
    refused = respond(service, model=TINY, previous_response_id=first["id"])
    openai_error(refused, 400, "invalid_request_error", "previous_response_not_found", "previous_response_id")
    assert responded(service, model=TINY, max_output_tokens=1, previous_response_id=second["id"])
    assert service.send("DELETE", paths.RESPONSES).json()["deleted"] >= 2
    assert service.send("GET", path(second)).status == 404


def test_a_response_that_is_not_to_be_stored_is_not(service: Service) -> None:
    found = both(service, model=TINY, max_output_tokens=1, store=False)
    assert found["store"] is False
    assert service.send("GET", path(found)).status == 404


def test_an_id_names_no_other_key(service: Service) -> None:
    found = responded(service, model=TINY, max_output_tokens=1)
    for other in (found["id"].upper(), found["id"] + "0", f":{found['id']}", "*", "%2A", found["id"] + "%0A"):
        assert service.send("GET", f"{paths.RESPONSES}/{other}").status == 404


def endless() -> dict[str, Any]:
    """Return fields for an answer up to the end of the context."""
    schema = {"type": "array", "items": {"type": "boolean"}, "minItems": 2000}
    return {"text": {"format": {"type": "json_schema", "name": "n", "schema": schema}}}
