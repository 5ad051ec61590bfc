"""Anthropic's messages through the whole service, as its clients send and read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.families import ARGUMENTS, CALL, FAMILIES, template
from tests.support.reciting import reciting
from tests.support.service import PATIENCE_S, TINY, Reply, Service, up
from tests.unit.test_messages import Reader
from worker.chat.code import ChatCode

CONTEXT_LENGTH = 256
LONG, LONG_CONTEXT = "acme/long", 32_768
THINKS, GENERIC = "acme/thinks", "acme/generic"
HELLO = [{"role": "user", "content": "Hello"}]
QUESTION = [{"role": "user", "content": "What is the weather in Paris?"}]
TOOL = {
    "name": "get_weather",
    "description": "Get the weather of a city.",
    "input_schema": {
        "type": "object",
        "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
        "required": ["city"],
    },
}
NAMED = {"type": "tool", "name": "get_weather"}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("messages")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata={"llama.context_length": CONTEXT_LENGTH})
    synthetic.tiny_llama(home / f"models/{LONG}/long-f16.gguf", metadata={"llama.context_length": LONG_CONTEXT})
    reciting(home / f"models/{GENERIC}/recites-f32.gguf", CALL, "chatml")
    name, answer, _ = FAMILIES["Qwen3"]
    source = template(name)
    rendered = ChatCode().templates(source).render(json.dumps({"messages": QUESTION}).encode())
    reciting(
        home / f"models/{THINKS}/recites-f32.gguf",
        answer,
        source,
        special=rendered.preserved_tokens,
        after=rendered.generation_prompt,
    )
    with up(home) as service:
        yield service


def ask(service: Service, path: str = paths.MESSAGES, **fields: Any) -> Reply:
    return service.post(path, {"model": TINY, "messages": HELLO, "max_tokens": 8, "temperature": 0, **fields})


def answered(service: Service, **fields: Any) -> Any:
    reply = ask(service, **fields)
    assert reply.status == 200, reply.text
    assert reply.headers["loadstone-instance"] == reply.json()["model"]
    return reply.json()


def failed(reply: Reply, status: int, kind: str) -> str:
    """Return the message of an error, which must have Anthropic's form."""
    assert reply.status == status, reply.text
    body = reply.json()
    assert (body["type"], body["error"]["type"]) == ("error", kind)
    assert set(body) == {"type", "error"}
    return str(body["error"]["message"])


@contextmanager
def streaming(service: Service, **fields: Any) -> Iterator[Iterator[str]]:
    sent = {"model": TINY, "messages": HELLO, "temperature": 0, "stream": True, **fields}
    with (
        httpx.Client(base_url=service.url, timeout=PATIENCE_S, trust_env=False) as http,
        http.stream("POST", f"{paths.MESSAGES}?beta=true", json=sent, headers={"anthropic-version": "x"}) as reply,
    ):
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        yield reply.iter_lines()


def streamed(service: Service, **fields: Any) -> dict[str, Any]:
    """Return the message that a stream makes, which a strict client must accept."""
    with streaming(service, **fields) as lines:
        return Reader().read("".join(f"{line}\n" for line in lines).encode())


def same(service: Service, **fields: Any) -> Any:
    """Return the answer, which must be the same whole and streamed."""
    whole, stream = answered(service, **fields), streamed(service, **{"max_tokens": 8, **fields})
    for message in (whole, stream):
        message["usage"]["prompt"] = message["usage"].pop("input_tokens") + message["usage"].pop(
            "cache_read_input_tokens"
        )
        assert message.pop("id").startswith("msg_")
        for block in message["content"]:
            assert block.pop("id", "toolu_").startswith("toolu_")
    assert whole == stream
    return whole


def test_an_answer_is_the_same_whole_and_streamed(service: Service) -> None:
    message = same(service)
    assert (message["type"], message["role"], message["model"]) == ("message", "assistant", TINY)
    assert (message["stop_reason"], message["stop_sequence"]) == ("max_tokens", None)
    (block,) = message["content"]
    assert block["type"] == "text"
    assert block["text"]
    assert message["usage"]["output_tokens"] == 8
    assert message["usage"]["prompt"] == ask(service, paths.COUNT_TOKENS).json()["input_tokens"]


def test_tokens_that_are_reused_are_not_input(service: Service) -> None:
    first, second = answered(service)["usage"], answered(service)["usage"]
    assert second["cache_read_input_tokens"] > 0
    assert sum(first[name] for name in ("input_tokens", "cache_read_input_tokens")) == sum(
        second[name] for name in ("input_tokens", "cache_read_input_tokens")
    )


def test_an_answer_ends_at_a_stop_sequence_and_names_it(service: Service) -> None:
    (block,) = answered(service)["content"]
    sequence = block["text"][2:5]
    message = same(service, stop_sequences=["never", sequence])
    assert (message["stop_reason"], message["stop_sequence"]) == ("stop_sequence", sequence)
    assert "".join(block["text"] for block in message["content"]) == block["text"].partition(sequence)[0]


def test_an_answer_ends_with_the_context(service: Service) -> None:
    schema = {"type": "array", "items": {"const": "again"}, "minItems": CONTEXT_LENGTH}
    message = same(service, max_tokens=None, output_config={"format": {"type": "json_schema", "schema": schema}})
    assert message["stop_reason"] == "model_context_window_exceeded"


@pytest.mark.parametrize("choice", [{"type": "auto"}, {"type": "any"}, NAMED])
def test_a_tool_is_called_and_its_result_is_read(service: Service, choice: Any) -> None:
    fields: dict[str, Any] = {"model": GENERIC, "messages": QUESTION, "tools": [TOOL], "max_tokens": 200}
    message = same(service, **fields, tool_choice=choice)
    assert message["stop_reason"] == "tool_use"
    call = message["content"][-1]
    assert call == {"type": "tool_use", "name": "get_weather", "input": json.loads(ARGUMENTS)}
    assert [block["type"] for block in message["content"][:-1]] == (["text"] if choice["type"] == "auto" else [])
    whole = answered(service, **fields, tool_choice=choice)["content"]
    result = {"type": "tool_result", "tool_use_id": whole[-1]["id"], "content": [{"type": "text", "text": "Sunny."}]}
    conversation = [*QUESTION, {"role": "assistant", "content": whole}, {"role": "user", "content": [result]}]
    assert answered(service, **{**fields, "messages": conversation})["stop_reason"] == "tool_use"


def test_reasoning_text_and_a_call_are_blocks_in_this_order(service: Service) -> None:
    fields: dict[str, Any] = {"model": THINKS, "messages": QUESTION, "tools": [TOOL], "max_tokens": 200}
    message = same(service, **fields, thinking={"type": "adaptive"})
    thinking, text, call = message["content"]
    assert (thinking["type"], thinking["thinking"].strip()) == ("thinking", "Paris, two days.")
    assert (text["type"], text["text"].strip()) == ("text", "I will look.")
    assert (call["type"], call["input"]) == ("tool_use", json.loads(ARGUMENTS))
    shorter = answered(service, **fields, thinking={"type": "enabled", "budget_tokens": 2})["content"][0]
    assert 0 < len(shorter["thinking"]) < len(thinking["thinking"])


def test_reasoning_can_be_turned_off(service: Service) -> None:
    fields: dict[str, Any] = {"model": THINKS, "messages": QUESTION, "max_tokens": 10}
    assert answered(service, **fields, thinking={"type": "disabled"})["content"][0]["type"] == "text"
    assert answered(service, **fields)["content"][0]["type"] == "thinking"


def test_an_answer_follows_a_schema(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    form = {"type": "json_schema", "schema": schema}
    message = same(service, output_config={"format": form}, max_tokens=40)
    assert json.loads(message["content"][0]["text"])["a"] in (1, 2)


def test_tools_count_and_the_context_does_not_bound_a_count(service: Service) -> None:
    def count(**fields: Any) -> int:
        reply = ask(service, f"{paths.COUNT_TOKENS}?beta=true", **fields)
        assert reply.status == 200, reply.text
        assert set(reply.json()) == {"input_tokens"}
        return int(reply.json()["input_tokens"])

    assert 0 < count() < count(system="Be kind.") < count(tools=[TOOL])
    assert count(messages=[{"role": "user", "content": "word " * CONTEXT_LENGTH}]) > CONTEXT_LENGTH


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_does_not_fit_has_anthropics_words(service: Service, stream: bool) -> None:
    long = [{"role": "user", "content": "word " * CONTEXT_LENGTH}]
    n = ask(service, paths.COUNT_TOKENS, messages=long).json()["input_tokens"]
    message = failed(ask(service, messages=long, stream=stream), 400, "invalid_request_error")
    assert message == f"prompt is too long: {n} tokens > {CONTEXT_LENGTH} maximum"
    assert answered(service)


@pytest.mark.parametrize("path", [paths.MESSAGES, paths.COUNT_TOKENS])
def test_what_is_not_served_is_refused_before_the_first_byte(service: Service, path: str) -> None:
    def refusal(status: int, kind: str, **fields: Any) -> str:
        return failed(ask(service, path, stream=True, **fields), status, kind)

    image = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    result = {"type": "tool_result", "tool_use_id": "toolu_1", "content": [image]}
    message = refusal(400, "invalid_request_error", messages=[{"role": "user", "content": [result]}])
    assert "vision" in message
    servers = [{"type": "url", "url": "http://localhost", "name": "x"}]
    assert "mcp_servers" in refusal(403, "permission_error", mcp_servers=servers)
    assert "acme/nothing" in refusal(404, "not_found_error", model="acme/nothing")
    assert "'messages'" in refusal(400, "invalid_request_error", messages="Hello")


def test_an_error_in_a_stream_is_its_last_event(service: Service) -> None:
    service.loaded(LONG, context_length=LONG_CONTEXT)
    schema = {"type": "array", "items": {"const": "again"}, "minItems": 10_000}  # it fills the context
    form = {"type": "json_schema", "schema": schema}
    with streaming(service, model=LONG, output_config={"format": form}) as lines:
        next(line for line in lines if line.startswith("event: content_block_delta"))
        service.unload_all()
        *_, name, data, empty = lines
    assert (name, empty) == ("event: error", "")
    error = json.loads(data.removeprefix("data: "))
    assert (error["type"], error["error"]["type"]) == ("error", "overloaded_error")
    assert error["error"]["code"] == "model_unloaded"
