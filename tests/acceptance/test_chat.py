"""Chat completions through the whole service, with a tiny model of random weights."""

from __future__ import annotations

import json
import math
import os
import signal
from collections.abc import Iterator
from contextlib import ExitStack
from http.client import HTTPResponse
from itertools import groupby
from typing import Any

import pytest

from shared import paths
from shared.synthetic import models as synthetic
from shared.synthetic import tokenizers
from tests.support.chat import (
    CHAT,
    DONE,
    ENDLESS,
    EOS,
    HELLO,
    answered,
    ask,
    begun,
    body,
    busy,
    chunks,
    connected,
    rest,
    streaming,
)
from tests.support.service import TINY, Service, openai_error, until, up

VECTORS, BARE = "acme/vectors", "acme/bare"
CONTEXT_LENGTH = 32_768  # long enough for an answer that lasts as long as a test needs it
MOST_WAITING = 8
WEBP = {"type": "image_url", "image_url": {"url": "data:image/webp;base64,UklGRhIAAABXRUJQVlA4TAYAAAAvQWxvAGs="}}


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("chat")
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata=metadata)
    synthetic.tiny_llama(home / f"models/{BARE}/bare-f16.gguf", drop={"tokenizer.chat_template"})
    synthetic.tiny_bert(home / f"models/{VECTORS}/vectors-f32.gguf")
    with up(
        home, LOADSTONE_REQUESTS_WAITING=str(MOST_WAITING), LOADSTONE_UNLOAD_WAIT_S="0.5", LOADSTONE_JIT="off"
    ) as service:
        yield service


@pytest.fixture
def model(service: Service) -> str:
    """Load the tiny model with its whole context; return its id."""
    return str(service.loaded(TINY, context_length=CONTEXT_LENGTH)["instance_id"])


ROUTES: dict[str, dict[str, Any]] = {CHAT: {}, paths.COMPLETIONS: {"prompt": "Hello"}}


def is_idle(service: Service) -> bool:
    return busy(service) == (0, 0)


def ended(service: Service, outcome: str, route: str = CHAT) -> float:
    """Return how many requests of a route ended with an outcome."""
    labels = {"outcome": outcome, "route": route}
    is_counted = f'outcome="{outcome}",route="{route}"' in service.send("GET", "/metrics").text
    return service.metric("requests_total", **labels) if is_counted else 0.0


# ---- answers


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"temperature": 1, "seed": 7},
        {"logprobs": True, "top_logprobs": 2},
        {"logit_bias": {str(EOS): 100}},  # the model ends it
    ],
)
def test_a_stream_has_the_answer_of_a_whole_reply(service: Service, model: str, fields: dict[str, Any]) -> None:
    whole = answered(service, model=model, max_tokens=20, **fields)
    parts = chunks(service, model=model, max_tokens=20, stream_options={"include_usage": True}, **fields)
    (choice,) = whole["choices"]
    *parts, last = parts
    streamed = [each["choices"][0] for each in parts]
    assert "".join(each["delta"].get("content", "") for each in streamed) == choice["message"]["content"]
    assert [each["finish_reason"] for each in streamed] == [None] * (len(streamed) - 1) + [choice["finish_reason"]]
    assert ["role" in each["delta"] for each in streamed] == [True] + [False] * (len(streamed) - 1)
    logprobs = [info for each in streamed if each["logprobs"] for info in each["logprobs"]["content"]]
    expected = choice["logprobs"]["content"] if "logprobs" in fields else []
    assert [(info["bytes"], len(info["top_logprobs"])) for info in logprobs] == [
        (info["bytes"], len(info["top_logprobs"])) for info in expected
    ]
    assert last["choices"] == []
    counted = ("prompt_tokens", "completion_tokens", "total_tokens")
    assert [last["usage"][name] for name in counted] == [whole["usage"][name] for name in counted]
    assert {each["id"] for each in parts} == {last["id"]}
    assert {each["model"] for each in parts} == {whole["model"]} == {TINY}
    assert whole["system_fingerprint"].startswith("b")


def test_log_probabilities_are_those_of_the_text(service: Service, model: str) -> None:
    (choice,) = answered(service, max_tokens=20, logprobs=True, top_logprobs=2, **ENDLESS)["choices"]
    tokens = choice["logprobs"]["content"]
    assert len(tokens) == 20
    text = b"".join(bytes(token["bytes"]) for token in tokens)
    assert text.decode(errors="replace") == choice["message"]["content"]
    for token in tokens:
        assert token["token"] == bytes(token["bytes"]).decode(errors="replace")
        assert -math.inf < token["logprob"] <= 0
        assert token["logprob"] == token["top_logprobs"][0]["logprob"] > token["top_logprobs"][1]["logprob"]
        assert sum(math.exp(other["logprob"]) for other in token["top_logprobs"]) <= 1


def test_a_stream_is_not_kept_by_proxies(service: Service, model: str) -> None:
    reply = ask(service, stream=True, stream_options={"include_usage": True}, max_tokens=1)
    assert reply.headers["content-type"].startswith("text/event-stream")
    assert "no-cache" in reply.headers["cache-control"]
    assert reply.headers["x-accel-buffering"] == "no"
    *events, end = reply.text.split("\n\n")
    assert end == ""
    assert all(event.startswith("data: ") and "\n" not in event for event in events if event != ":")
    whole = ask(service, stream_options={"include_usage": True}, max_tokens=1)
    assert (whole.status, whole.headers["content-type"]) == (200, "application/json")


def test_timings_tell_where_the_time_went(service: Service, model: str) -> None:
    whole = answered(service, model=model, max_tokens=5)
    last = chunks(service, model=model, max_tokens=5, stream_options={"include_usage": True})[-1]
    for reply in (whole, last):
        usage, timings = reply["usage"], reply["timings"]
        assert timings["predicted_n"] == usage["completion_tokens"]
        assert timings["prompt_n"] + timings["cache_n"] == usage["prompt_tokens"]
        assert timings["prompt_per_second"] == pytest.approx(1000 * timings["prompt_n"] / timings["prompt_ms"])
        assert timings["predicted_per_second"] == pytest.approx(1000 * timings["predicted_n"] / timings["predicted_ms"])
        assert timings["queued_ms"] >= 0


def test_usage_is_sent_only_on_request(service: Service, model: str) -> None:
    for options in ({}, {"stream_options": {"include_usage": False}}, {"stream_options": None}):
        assert all("usage" not in each for each in chunks(service, max_tokens=2, **options))


def test_an_answer_ends_by_its_limit_or_by_its_model(service: Service, model: str) -> None:
    cut = answered(service, max_tokens=5, **ENDLESS)
    assert (cut["choices"][0]["finish_reason"], cut["usage"]["completion_tokens"]) == ("length", 5)
    ended = answered(service, logit_bias={str(EOS): 100})
    assert (ended["choices"][0]["finish_reason"], ended["choices"][0]["message"]["content"]) == ("stop", "")
    nothing = dict.fromkeys(("max_tokens", "stop", "tools", "n", "response_format", "logprobs", "seed"))
    assert answered(service, logit_bias={str(EOS): 100}, **nothing)["choices"] == ended["choices"]
    newer = answered(service, max_tokens=50, max_completion_tokens=3, **ENDLESS)
    assert newer["usage"]["completion_tokens"] == 3


def test_a_full_context_ends_an_answer(service: Service) -> None:
    service.loaded(TINY, context_length=256)
    whole = answered(service, **ENDLESS)
    assert whole["choices"][0]["finish_reason"] == "length"
    assert whole["usage"]["total_tokens"] in (256, 257)


def test_answers_that_fill_the_context_end_no_other(service: Service) -> None:
    """Together they need three times the memory that they share: each has all of the context in the end."""
    service.loaded(TINY, context_length=1024, parallel=3)
    with ExitStack() as streams:
        asked = [
            streams.enter_context(streaming(service, stream_options={"include_usage": True}, **ENDLESS))
            for _ in range(3)
        ]
        for each in asked:
            begun(each)
        for each in asked:
            *_, last, usage, done = each
            assert done == DONE
            assert json.loads(last)["choices"][0]["finish_reason"] == "length"
            assert json.loads(usage)["usage"]["total_tokens"] in (1024, 1025)
    assert answered(service, max_tokens=5, **ENDLESS)["usage"]["completion_tokens"] == 5


def test_a_stop_string_ends_an_answer_before_itself(service: Service, model: str) -> None:
    letters = {str(token): 100 for token in (token_of("a"), token_of("b"))}
    plain = answered(service, temperature=2, seed=1, max_tokens=64, logit_bias=letters)
    text = plain["choices"][0]["message"]["content"]
    assert {"a", "b"} == set(text), text
    stopped = answered(service, temperature=2, seed=1, max_tokens=64, logit_bias=letters, stop=["ab", "zz"])
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["message"]["content"] == text[: text.index("ab")]


def token_of(letter: str) -> int:
    """Return the token of a letter in the tokenizer of `synthetic.tiny_llama`."""
    tokens: Any = tokenizers.spm()["tokenizer.ggml.tokens"]
    return int(tokens.index(letter))


def test_several_answers_come_with_their_numbers(service: Service, model: str) -> None:
    parts = chunks(service, n=3, max_tokens=6, temperature=1.5, seed=3)
    assert [each["choices"][0]["index"] for each in parts[:3]] == [0, 1, 2]
    whole = answered(service, n=3, max_tokens=6, temperature=1.5, seed=3)
    assert [each["index"] for each in whole["choices"]] == [0, 1, 2]
    choices = sorted((each["choices"][0] for each in parts), key=lambda choice: choice["index"])
    texts = [
        "".join(choice["delta"].get("content", "") for choice in own)
        for _, own in groupby(choices, lambda choice: choice["index"])
    ]
    assert len(texts) == len(set(texts)) == 3, "the answers have seeds of their own"


def test_a_repeated_prompt_is_not_processed_again(service: Service, model: str) -> None:
    long = [{"role": "user", "content": "Hello World " * 50}]
    first, second = (answered(service, messages=long, max_tokens=1)["usage"] for _ in range(2))
    assert first["prompt_tokens_details"]["cached_tokens"] < 50
    assert second["prompt_tokens_details"]["cached_tokens"] == second["prompt_tokens"] - 1


# ---- which instance


def test_a_name_means_an_instance_or_a_key(service: Service) -> None:
    first, second = (service.loaded(TINY)["instance_id"] for _ in range(2))
    assert (first, second) == (TINY, f"{TINY}:2")
    for name, meant in ((TINY, {first, second}), (TINY.upper(), {first, second}), (second, {second})):
        reply = ask(service, model=name, max_tokens=1)
        assert reply.status == 200, reply.text
        assert reply.json()["model"] == reply.headers["loadstone-instance"], name
        assert reply.headers["loadstone-instance"] in meant, name
    openai_error(ask(service, model=second.upper()), 404, "invalid_request_error", "model_not_found", "model")
    message = openai_error(ask(service), 400, "invalid_request_error", "missing_required_parameter", "model")
    assert "2 LLMs are loaded" in message


def test_without_a_name_the_only_llm_answers(service: Service) -> None:
    openai_error(ask(service), 400, "invalid_request_error", "missing_required_parameter", "model")
    service.loaded(VECTORS)
    service.loaded(TINY)
    for fields in ({}, {"model": ""}, {"model": None}):
        assert answered(service, max_tokens=1, **fields)["model"] == TINY


def test_a_model_that_cannot_answer_is_refused_by_name(service: Service) -> None:
    openai_error(ask(service, model="acme/nothing"), 404, "invalid_request_error", "model_not_found", "model")
    near = openai_error(ask(service, model="acme/tinny"), 404, "invalid_request_error", "model_not_found", "model")
    assert f"'{TINY}'" in near
    hint = openai_error(ask(service, model=TINY), 404, "invalid_request_error", "model_not_loaded", "model")
    assert f"POST {paths.LOAD}" in hint
    assert "embedding" in openai_error(
        ask(service, model=VECTORS), 400, "invalid_request_error", "invalid_value", "model"
    )
    service.loaded(VECTORS)
    openai_error(ask(service, model=VECTORS), 400, "invalid_request_error", "invalid_value", "model")
    service.loaded(TINY)
    openai_error(ask(service, model="acme/nothing"), 404, "invalid_request_error", "model_not_found", "model")
    reply = ask(service, model=TINY, max_tokens=1)
    assert reply.status == 200, reply.text


def test_a_model_without_a_template_does_not_chat(service: Service) -> None:
    service.loaded(BARE)
    reply = ask(service, model=BARE, stream=True)
    openai_error(reply, 501, "not_supported_error", "chat_unavailable")
    assert reply.headers["x-should-retry"] == "false"


# ---- what is refused, before the first byte


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "code", "param"),
    [
        ({"messages": []}, "invalid_value", "messages"),
        ({"messages": "Hello"}, "invalid_type", "messages"),
        ({"messages": [{"role": "user"}]}, "invalid_value", "messages[0].content"),
        ({"temperature": 3}, "invalid_value", "temperature"),
        ({"max_tokens": "many"}, "invalid_type", "max_tokens"),
        ({"n": 5}, "invalid_value", "n"),
        ({"logit_bias": {"99999": 1}}, "invalid_value", "logit_bias"),
        ({"tools": [{"type": "custom"}]}, "not_supported", "tools[0]"),
        ({"messages": [{"role": "user", "content": [WEBP]}]}, "not_supported", "messages[0].content[0]"),
        ({"response_format": {"type": "yaml"}}, "invalid_value", "response_format"),
        ({"json_schema": {"not": {}}}, "invalid_value", "response_format"),
    ],
)
def test_what_is_wrong_is_refused_before_the_first_byte(
    service: Service, model: str, fields: dict[str, Any], code: str, param: str, stream: bool
) -> None:
    openai_error(ask(service, stream=stream, **fields), 400, "invalid_request_error", code, param)


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_over_the_context_is_refused_in_known_words(service: Service, stream: bool) -> None:
    service.loaded(TINY, context_length=256)
    reply = ask(service, messages=[{"role": "user", "content": "Hello " * 1000}], stream=stream)
    assert reply.status == 400
    error = reply.json()["error"]
    n_tokens = error["n_prompt_tokens"]
    assert n_tokens > 1000
    assert error == {
        "message": f"This model's maximum context length is 256 tokens. However, your messages resulted in {n_tokens} "
        f"tokens. The request ({n_tokens} tokens) exceeds the available context size (256 tokens).",
        "type": "exceed_context_size_error",
        "param": "messages",
        "code": "context_length_exceeded",
        "n_prompt_tokens": n_tokens,
        "n_ctx": 256,
    }
    assert answered(service, max_tokens=1), "nothing else is lost"


def test_a_prompt_must_leave_room_for_one_token(service: Service) -> None:
    """A limit that does not fit beside it is none: the answer is cut."""
    service.loaded(TINY, context_length=256)
    count = service.post(paths.CHAT_INPUT_TOKENS, body()).json()["input_tokens"]
    for n, fits in ((255, True), (256, False), (257, False)):
        messages = [{"role": "user", "content": HELLO[0]["content"] + "\n" * (n - count)}]
        for stream in (False, True):
            reply = ask(service, messages=messages, max_tokens=100, stream=stream, **ENDLESS)
            assert reply.status == (200 if fits else 400), reply.text
            if not fits:
                assert reply.json()["error"]["n_prompt_tokens"] == n
            elif not stream:
                (choice,) = reply.json()["choices"]
                assert choice["finish_reason"] == "length"
                assert reply.json()["usage"]["completion_tokens"] in (1, 2)


def test_a_body_of_any_type_is_read_as_json(service: Service, model: str) -> None:
    content = b'{"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}'
    assert service.send("POST", CHAT, content=content).status == 200
    assert service.send("POST", CHAT, content=content, headers={"Content-Type": "text/plain"}).status == 200
    openai_error(service.post(CHAT, b"{"), 400, "invalid_request_error", "invalid_json")
    openai_error(service.post(CHAT, b" " * ((8 << 20) + 1)), 413, "invalid_request_error", "request_too_large")


def test_a_full_queue_refuses_with_a_time_to_retry(service: Service) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH, parallel=1)
    with ExitStack() as streams:
        begun(streams.enter_context(streaming(service, **ENDLESS)))
        for _ in range(MOST_WAITING):  # each is accepted, and waits
            next(streams.enter_context(streaming(service, **ENDLESS)))
        reply = ask(service, stream=True)
        openai_error(reply, 429, "rate_limit_error", "queue_full")
        assert int(reply.headers["retry-after"]) >= 1
    until(lambda: is_idle(service), "no request is left")


# ---- clients that leave


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_ends_its_answer(service: Service, model: str, path: str, stream: bool) -> None:
    cancelled = ended(service, "cancelled", path)
    connection = connected(service, path=path, stream=stream, **ROUTES[path], **ENDLESS)
    until(lambda: busy(service) == (1, 0), "the answer runs")
    connection.close()
    until(lambda: is_idle(service), "the answer was cancelled")
    until(lambda: ended(service, "cancelled", path) == cancelled + 1, "it is counted")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_the_queue_is_not_answered(service: Service, path: str, stream: bool) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH, parallel=1)
    with streaming(service, **ENDLESS) as running:
        begun(running)
        connection = connected(service, path=path, stream=stream, **ROUTES[path], **ENDLESS)
        until(lambda: busy(service) == (1, 1), "a request waits")
        connection.close()
        until(lambda: busy(service) == (1, 0), "it waits no more")
    until(lambda: is_idle(service), "no request is left")


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_its_prompt_is_not_answered(service: Service, model: str, path: str, stream: bool) -> None:
    cancelled = ended(service, "cancelled", path)
    text = "Hello World " * 10_000
    long: dict[str, Any] = (
        {"prompt": text} if path == paths.COMPLETIONS else {"messages": [{**HELLO[0], "content": text}]}
    )
    connection = connected(service, path=path, stream=stream, **long, **ENDLESS)
    until(lambda: busy(service) == (1, 0), "it was accepted")
    connection.close()
    until(lambda: ended(service, "cancelled", path) == cancelled + 1, "the API process noticed")
    until(lambda: is_idle(service), "no request is left")
    assert answered(service, max_tokens=1), "the engine goes on"


def test_many_clients_that_vanish_leave_nothing(service: Service, model: str) -> None:
    connections = [connected(service, stream=i % 2 == 0, n=1 + i % 2, **ENDLESS) for i in range(200)]
    until(lambda: busy(service)[0] > 0, "some run")
    for connection in connections:
        connection.close()
    until(lambda: is_idle(service), "no request is left")
    assert answered(service, max_tokens=1)["usage"]["completion_tokens"] == 1


# ---- what ends under its clients


def test_a_runner_that_dies_ends_every_answer_with_an_error(service: Service) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH, parallel=10)
    with ExitStack() as streams:
        received = [streams.enter_context(streaming(service, **ENDLESS)) for _ in range(10)]
        for each in received:
            begun(each)
        os.kill(service.runners()[0].pid, signal.SIGKILL)
        for each in received:
            error = rest(each)
            assert (error["type"], error["code"]) == ("unavailable_error", "runner_lost")
    reply = ask(service, model=TINY)
    assert reply.json()["error"]["code"] in ("runner_lost", "no_route", "model_unloaded", "model_not_loaded")
    assert reply.status in (404, 503)
    until(lambda: not service.instances(), "the instance failed")
    openai_error(ask(service, model=TINY), 404, "invalid_request_error", "model_not_loaded", "model")


def test_a_runner_that_dies_fails_whole_replies(service: Service, model: str) -> None:
    with connected(service, **ENDLESS) as connection:
        until(lambda: busy(service) == (1, 0), "the answer runs")
        os.kill(service.runners()[0].pid, signal.SIGKILL)
        reply = HTTPResponse(connection)
        reply.begin()
        assert (reply.status, json.loads(reply.read())["error"]["code"]) == (503, "runner_lost")
        reply.close()
    until(lambda: not service.instances(), "the instance failed")


def test_an_unload_ends_answers_with_its_reason(service: Service, model: str) -> None:
    with streaming(service, **ENDLESS) as received:
        begun(received)
        assert service.unload(model).status == 200
        error = rest(received)
    assert (error["type"], error["code"]) == ("unavailable_error", "model_unloaded")
    openai_error(ask(service, model=model), 404, "invalid_request_error", "model_not_loaded", "model")


def test_a_service_that_stops_ends_streams_with_an_error(running: Service, tmp_path: Any) -> None:
    with up(tmp_path, models=running.models_dir, LOADSTONE_JIT="off") as own:
        own.loaded(TINY, context_length=CONTEXT_LENGTH)
        with streaming(own, **ENDLESS) as received:
            begun(received)
            own.popen.send_signal(signal.SIGTERM)
            error = rest(received)
        assert error["type"] == "unavailable_error"
        own.popen.wait()
