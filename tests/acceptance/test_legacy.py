"""LM Studio's API before its version 1, as its clients send and read it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import httpx
import msgspec
import pytest
from msgspec import Meta, Struct

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.chat import CHAT, EOS, HELLO, body
from tests.support.service import PATIENCE_S, TINY, Service, openai_error, up

VECTORS = "acme/vectors"
CONTEXT_LENGTH = 256
ROUTES: dict[str, dict[str, Any]] = {
    paths.V0_CHAT_COMPLETIONS: {"messages": HELLO},
    paths.V0_COMPLETIONS: {"prompt": "Hello"},
}
NEVER_ENDS, ENDS = {"logit_bias": {str(EOS): -100}}, {"logit_bias": {str(EOS): 100}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("legacy")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata={"llama.context_length": CONTEXT_LENGTH})
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    with up(home) as service:
        yield service


def ask(service: Service, path: str, **fields: Any) -> Any:
    reply = service.post(path, {"model": TINY, "temperature": 0, **ROUTES[path], **fields})
    assert reply.status == 200, reply.text
    assert reply.headers["loadstone-instance"] == TINY
    return reply.json()


def lines(service: Service, path: str, **fields: Any) -> list[str]:
    """Return the lines of a streamed reply."""
    sent = {"model": TINY, "temperature": 0, "stream": True, **ROUTES[path], **fields}
    with httpx.stream("POST", service.url + path, json=sent, timeout=PATIENCE_S, trust_env=False) as reply:
        assert reply.status_code == 200, reply.read()
        assert reply.headers["content-type"].startswith("text/event-stream")
        return [*reply.iter_lines()]


def chunks(service: Service, path: str, **fields: Any) -> list[Any]:
    data = [line.removeprefix("data: ") for line in lines(service, path, **fields) if line.startswith("data: ")]
    assert data.pop() == "[DONE]"
    return [json.loads(each) for each in data]


def text(choice: Any) -> str:
    """Return the text of a choice, whole or in a chunk, of a chat or a text completion."""
    inner = choice.get("message", choice.get("delta", choice))
    return str(inner.get("content", inner.get("text", "")))


# ---- replies


@pytest.mark.parametrize("path", ROUTES)
def test_a_reply_says_how_it_was_made(service: Service, path: str) -> None:
    reply = ask(service, path, max_tokens=20, **NEVER_ENDS)
    loaded = next(one for one in service.send("GET", paths.V0_MODELS).json()["data"] if one["id"] == TINY)
    assert reply["model_info"] == {
        "arch": loaded["arch"],
        "quant": loaded["quantization"],
        "format": "gguf",
        "context_length": loaded["loaded_context_length"],
    }
    assert reply["runtime"] == {
        "name": "llama.cpp",
        "version": reply["system_fingerprint"],
        "supported_formats": ["gguf"],
    }
    stats = reply["stats"]
    assert set(stats) == {"tokens_per_second", "time_to_first_token", "generation_time", "stop_reason"}
    assert stats["tokens_per_second"] * stats["generation_time"] == pytest.approx(reply["usage"]["completion_tokens"])
    assert stats["time_to_first_token"] > 0
    ours = service.post(
        path.replace("/api/v0", "/v1"), {"model": TINY, "temperature": 0, **ROUTES[path], "max_tokens": 1}
    )
    assert reply.keys() - ours.json().keys() == {"stats", "model_info", "runtime"}, "it is OpenAI's, and more"
    assert ours.json().keys() - reply.keys() == set()


@pytest.mark.parametrize("path", ROUTES)
def test_the_stop_reason_is_the_truth(service: Service, path: str) -> None:
    def reason(**fields: Any) -> tuple[str, str]:
        reply = ask(service, path, **fields)
        return reply["stats"]["stop_reason"], reply["choices"][0]["finish_reason"]

    whole = text(ask(service, path, max_tokens=20, **NEVER_ENDS)["choices"][0])
    assert reason(max_tokens=20, **NEVER_ENDS) == ("maxPredictedTokensReached", "length")
    assert reason(max_tokens=20, stop=[whole[3:6]], **NEVER_ENDS) == ("stopStringFound", "stop")
    assert reason(max_tokens=20, **ENDS) == ("eosFound", "stop")
    assert reason(max_tokens=-1, **NEVER_ENDS) == ("contextLengthReached", "length"), "-1 is no limit"


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("fields", [{}, {"n": 2, "stream_options": {"include_usage": True}}])
def test_the_last_chunk_says_how_the_answer_was_made(service: Service, path: str, fields: dict[str, Any]) -> None:
    *others, last = chunks(service, path, max_tokens=20, **fields, **NEVER_ENDS)
    assert not [each for each in others if {"usage", "stats", "model_info", "runtime"} & each.keys()]
    whole = ask(service, path, max_tokens=20, **{name: fields[name] for name in fields if name == "n"}, **NEVER_ENDS)
    assert last["stats"].keys() == whole["stats"].keys()
    assert last["stats"]["stop_reason"] == whole["stats"]["stop_reason"] == "maxPredictedTokensReached"
    assert (last["model_info"], last["runtime"]) == (whole["model_info"], whole["runtime"])
    assert last["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    choices = [choice for each in (*others, last) for choice in each["choices"]]
    for choice in whole["choices"]:
        own = [each for each in choices if each["index"] == choice["index"]]
        assert "".join(map(text, own)) == text(choice)
        assert [each["finish_reason"] for each in own if each["finish_reason"]] == ["length"]
        assert own[-1]["finish_reason"]


def test_embeddings_are_those_of_openais_api(service: Service) -> None:
    legacy, ours = (
        service.post(path, {"model": VECTORS, "input": ["Hello", "World"]})
        for path in (paths.V0_EMBEDDINGS, paths.EMBEDDINGS)
    )
    assert legacy.status == 200, legacy.text
    assert len(legacy.json()["data"]) == 2
    assert legacy.json().keys() == ours.json().keys()
    for one, other in zip(legacy.json()["data"], ours.json()["data"], strict=True):
        assert one["embedding"] == pytest.approx(other["embedding"], abs=1e-5)
    assert service.metric("requests_total", route=paths.V0_EMBEDDINGS, outcome="completed") >= 1
    chat = service.post(paths.V0_EMBEDDINGS, {"model": TINY, "input": "Hello"})
    assert chat.status == 400
    assert chat.json()["error"]["param"] == "model"


# ---- errors


@pytest.mark.parametrize("path", ROUTES)
def test_errors_have_the_form_of_openais(service: Service, path: str) -> None:
    (param,) = ROUTES[path]
    openai_error(service.post(path, {"model": TINY, param: []}), 400, "invalid_request_error", "invalid_value", param)
    unknown = service.post(path, {"model": "nobody/nothing", **ROUTES[path]})
    openai_error(unknown, 404, "invalid_request_error", "model_not_found", "model")
    vectors = service.post(path, {"model": VECTORS, **ROUTES[path]})
    openai_error(vectors, 400, "invalid_request_error", "invalid_value", "model")


def test_requests_are_counted_by_their_own_route(service: Service) -> None:
    ask(service, paths.V0_CHAT_COMPLETIONS, max_tokens=1)
    assert service.metric("requests_total", route=paths.V0_CHAT_COMPLETIONS, outcome="completed") >= 1


# ---- clients: what their readers require, from their facts


class ZedModel(Struct, frozen=True):
    """A model as Zed's reader has it: all but two fields are required, and one bad entry fails the list."""

    id: str
    object: Literal["model"]
    type: Literal["llm", "vlm", "embeddings"]
    publisher: str
    arch: str
    compatibility_type: Literal["gguf", "mlx"]
    quantization: str
    state: Literal["loaded", "loading", "not-loaded"]
    max_context_length: Annotated[int, Meta(ge=0)]
    loaded_context_length: Annotated[int, Meta(ge=0)] | None = None
    capabilities: list[Literal["tool_use", "vision"]] = []


class ZedList(Struct, frozen=True):
    data: list[ZedModel]


class ZedDelta(Struct, frozen=True):
    role: Literal["user", "assistant", "system", "tool"] | None = None
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[Any] | None = None


class ZedChoice(Struct, frozen=True):
    index: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    delta: ZedDelta
    finish_reason: str | None = None


class ZedUsage(Struct, frozen=True):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class ZedChunk(Struct, frozen=True):
    created: Annotated[int, Meta(ge=0, le=2**32 - 1)]
    model: str
    object: str
    choices: list[ZedChoice]
    usage: ZedUsage | None = None


def test_zed_reads_the_list_and_the_stream(service: Service) -> None:
    service.loaded(TINY)
    listed = msgspec.json.decode(service.send("GET", paths.V0_MODELS).text, type=ZedList)
    assert {(one.id, one.type, one.state) for one in listed.data} == {
        (TINY, "llm", "loaded"),
        (VECTORS, "embeddings", "not-loaded"),
    }
    content = [{"type": "text", "text": "Hello"}]
    sent = {"messages": [{"role": "user", "content": content}], "max_tokens": -1, "stop": [], "temperature": 1.0}
    answered, finished = "", []
    for line in lines(service, paths.V0_CHAT_COMPLETIONS, **{**sent, **NEVER_ENDS}):
        if (data := line.removeprefix("data: ")) == line:  # it drops other lines
            assert line in ("", ":")
            continue
        if data == "[DONE]":
            break
        chunk = msgspec.json.decode(data, type=ZedChunk)
        answered += "".join(choice.delta.content or "" for choice in chunk.choices)
        finished += [choice.finish_reason for choice in chunk.choices if choice.finish_reason]
    assert answered
    assert finished == ["length"]


def test_cline_reads_the_list_and_an_overflow(service: Service) -> None:
    """It lists without a key, chats at OpenAI's route, and takes an overflow for one by its code."""
    service.loaded(TINY)
    listed = {one["id"]: one for one in service.send("GET", paths.V0_MODELS).json()["data"]}
    assert listed[TINY]["max_context_length"] == listed[TINY]["loaded_context_length"] == CONTEXT_LENGTH
    assert "loaded_context_length" not in listed[VECTORS]
    long = [{"role": "user", "content": 400 * "word "}]
    reply = service.post(CHAT, body(model=TINY, messages=long))
    assert (reply.status, reply.json()["error"]["code"]) == (400, "context_length_exceeded")
