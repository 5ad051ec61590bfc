"""LM Studio's chat through the whole service: real templates, and models that recite an answer."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from shared import paths
from shared.synthetic import models as synthetic
from tests.support.families import FAMILIES, template
from tests.support.native import read, said, say, saying
from tests.support.reciting import reciting
from tests.support.responses import responded
from tests.support.service import TINY, Service, error, meanwhile, until, up
from worker.chat.code import ChatCode

THINKING, DEFECT = "acme/thinking", "acme/defect"
CONTEXT_LENGTH = 8192


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("native")
    write(home / "models")
    with up(home) as service:
        yield service


def write(models: Path) -> None:
    metadata = {"llama.context_length": CONTEXT_LENGTH}
    synthetic.tiny_llama(models / TINY / "tiny-f16.gguf", metadata=metadata)
    synthetic.tiny_llama(models / DEFECT / "defect-f16.gguf", drop=["blk.1.ffn_up.weight"])
    source = template(FAMILIES["Qwen3"][0])
    rendered = ChatCode().templates(source).render(b'{"messages":[{"role":"user","content":"Hello"}]}')
    answer = "<think>\nGreet.\n</think>\n\nHello there!"
    path = models / THINKING / "recites-f32.gguf"
    reciting(path, answer, source, special={"<think>", "</think>"}, after=rendered.generation_prompt)


def both(service: Service, **fields: Any) -> Any:
    """Return an answer, which must say the same whole and as events."""
    if fields["model"] not in service.instances():  # another load would make another instance
        service.loaded(fields["model"])
    whole = said(service, **fields)
    with saying(service, **fields) as received:
        streamed = read(received)
    assert shape(streamed) == shape(whole)
    return whole


def shape(result: Any) -> Any:
    """Return a result without what differs from one to the next."""
    stats = {name: n for name, n in result["stats"].items() if "seconds" not in name and "second" not in name}
    return {**result, "stats": stats, "response_id": "response_id" in result}


def test_a_text_is_answered(service: Service) -> None:
    reply = say(service, model=TINY, max_output_tokens=4)
    assert reply.headers["loadstone-instance"] == reply.json()["model_instance_id"] == TINY
    found = both(service, model=TINY, max_output_tokens=4, top_p=0.5)
    (item,) = found["output"]
    assert item["type"] == "message"
    stats = found["stats"]
    assert (stats["total_output_tokens"], stats["stop_reason"]) == (4, "maxPredictedTokensReached")
    assert stats["tokens_per_second"] > 0
    assert stats["time_to_first_token_seconds"] > 0
    assert "model_load_time_seconds" not in stats


def test_the_answer_is_that_of_chat_completions(service: Service) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    fields = {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 8}
    chat = service.post(paths.CHAT_COMPLETIONS, fields).json()
    found = said(service, model=TINY, system_prompt="Be brief.", max_output_tokens=8)
    assert found["output"][0]["content"] == chat["choices"][0]["message"]["content"]
    assert found["stats"]["input_tokens"] == chat["usage"]["prompt_tokens"]


def test_reasoning_comes_before_the_answer_and_can_be_turned_off(service: Service) -> None:
    found = both(service, model=THINKING)
    assert [(item["type"], item["content"].strip()) for item in found["output"]] == [
        ("reasoning", "Greet."),
        ("message", "Hello there!"),
    ]
    assert 0 < found["stats"]["reasoning_output_tokens"] < found["stats"]["total_output_tokens"]
    assert found["stats"]["stop_reason"] == "eosFound"
    assert [item["type"] for item in both(service, model=THINKING, reasoning="off")["output"]] == ["message"]
    for stream in (False, True):
        reply = say(service, model=THINKING, reasoning="high", stream=stream)
        assert error(reply, 400, "invalid_request", "invalid_value", "reasoning")["message"] == (
            f"Reasoning setting 'high' is not supported by model '{THINKING}'. Supported settings: 'off', 'on'."
        )
        service.unload_all()  # it is refused without a load, too
        refused = say(service, model=TINY, reasoning="on", stream=stream)
        message = error(refused, 400, "invalid_request", "invalid_value", "reasoning")["message"]
        assert message == f"Model '{TINY}' does not expose reasoning configuration."
        assert service.instances() == {}


def test_a_long_prompt_tells_how_far_it_is(service: Service) -> None:
    service.unload_all()
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    with saying(service, model=TINY, input="Hello " * 6000, max_output_tokens=1) as received:
        events = list(received)
    read(iter(events))
    told = [event["progress"] for event in events if event["type"] == "prompt_processing.progress"]
    assert told, "such a prompt takes several batches"
    assert all(0 < progress < 1 for progress in told)


def test_a_request_loads_its_model_and_tells_of_it(service: Service) -> None:
    service.unload_all()
    with ExitStack() as slow:
        slow.enter_context(service.frozen())
        with saying(service, model=TINY, max_output_tokens=4, context_length=2048) as received:
            events = [next(received), next(received)]
            assert [event["type"] for event in events] == ["chat.start", "model_load.start"]
            assert service.state(TINY) == "loading"
            slow.close()
            events += received
    result = read(iter(events), loads=True)
    assert result["stats"]["model_load_time_seconds"] > 0
    assert service.instances()[TINY]["config"]["context_length"] == 2048
    again = said(service, model=TINY, max_output_tokens=1, context_length=1024)
    assert again["model_instance_id"] == TINY
    assert "model_load_time_seconds" not in again["stats"]
    assert service.instances()[TINY]["config"]["context_length"] == 2048
    service.unload_all()
    assert said(service, model=TINY, max_output_tokens=1)["stats"]["model_load_time_seconds"] > 0


def test_a_load_that_fails_ends_the_stream_with_its_reason(service: Service) -> None:
    service.unload_all()
    with ExitStack() as slow:
        slow.enter_context(service.frozen())
        with saying(service, model=DEFECT) as received:
            events = [next(received), next(received)]
            slow.close()
            events += received
    assert [event["type"] for event in events] == ["chat.start", "model_load.start", "error", "chat.end"]
    result = read(iter(events), loads=True)
    assert (result["output"], "response_id" in result) == ([{"type": "message", "content": ""}], False)
    assert events[2]["error"]["type"] == "model_load_failed"
    reply = say(service, model=DEFECT, stream=True)  # its failure is remembered
    assert error(reply, 500, "model_load_failed", events[2]["error"]["code"])["message"]


def test_a_conversation_goes_on_from_any_of_its_answers(service: Service) -> None:
    first = both(service, model=TINY, max_output_tokens=4, system_prompt="Be brief.", input="One")
    second = both(service, model=TINY, max_output_tokens=4, input="Two", previous_response_id=first["response_id"])
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "One"},
        {"role": "assistant", "content": first["output"][0]["content"]},
        {"role": "user", "content": "Two"},
    ]
    fields = {"model": TINY, "messages": messages, "temperature": 0, "max_tokens": 4}
    chat = service.post(paths.CHAT_COMPLETIONS, fields).json()
    assert second["stats"]["input_tokens"] == chat["usage"]["prompt_tokens"]
    assert second["output"][0]["content"] == chat["choices"][0]["message"]["content"]
    branch = said(service, model=THINKING, input="Two", previous_response_id=first["response_id"])
    assert branch["output"][-1]["content"] == "Hello there!"
    response = responded(service, model=TINY, previous_response_id=second["response_id"], max_output_tokens=1)
    assert response["usage"]["input_tokens"] > second["stats"]["input_tokens"], "OpenAI's route continues it, too"
    back = said(service, model=TINY, max_output_tokens=1, previous_response_id=response["id"])
    assert back["stats"]["input_tokens"] > response["usage"]["input_tokens"]


def test_a_stored_conversation_is_removed(service: Service) -> None:
    found = said(service, model=TINY, max_output_tokens=1)
    path = paths.RESPONSE.format(response_id=found["response_id"])
    assert service.send("GET", path).status == 404, "it has not the form of a response"
    assert service.send("DELETE", path).json()["deleted"] is True
    for stream in (False, True):
        reply = say(service, model=TINY, previous_response_id=found["response_id"], stream=stream)
        error(reply, 400, "invalid_request", "previous_response_not_found", "previous_response_id")
    assert "response_id" not in both(service, model=TINY, max_output_tokens=1, store=False)


@pytest.mark.parametrize("stream", [False, True])
def test_refusals_come_with_a_status(service: Service, stream: bool) -> None:
    reply = say(service, model="acme/nothing", stream=stream)
    error(reply, 404, "model_not_found", None, "model")
    reply = say(service, model=TINY, integrations=["mcp/playwright"], stream=stream)
    error(reply, 403, "not_implemented", "integrations_not_supported", "integrations")
    reply = say(service, model=TINY, tools=[], ttl=1, stream=stream)
    message = error(reply, 400, "invalid_request", "unrecognized_keys")["message"]
    assert re.fullmatch(r"Unrecognized key\(s\) in object: '(tools', 'ttl|ttl', 'tools)'", message)
    service.loaded(TINY)
    reply = say(service, model=TINY, input="Hello " * 10_000, stream=stream)
    error(reply, 400, "invalid_request", "context_length_exceeded", "input")


def test_an_answer_fails_if_its_model_is_unloaded(service: Service) -> None:
    service.loaded(TINY)
    with saying(service, model=TINY) as received:
        events = [next(received)]
        while events[-1]["type"] != "message.delta":
            events.append(next(received))
        with meanwhile(service.unload_all):
            events += received
    result = read(iter(events))
    assert (events[-2]["type"], events[-2]["error"]["code"]) == ("error", "model_unloaded")
    assert result["output"][0]["content"]


def test_a_client_that_leaves_cancels_its_answer(service: Service) -> None:
    service.loaded(TINY)
    assert service.send("DELETE", paths.RESPONSES).status == 200
    with saying(service, model=TINY) as received:
        next(event for event in received if event["type"] == "message.delta")
    until(lambda: service.metric("requests_running", instance=TINY) == 0, "the request ends")
    assert service.send("DELETE", paths.RESPONSES).json()["deleted"] == 0, "nothing is stored"


def test_a_client_that_leaves_while_its_model_loads_lets_it_load(service: Service) -> None:
    service.unload_all()
    with service.frozen():
        with saying(service, model=TINY) as received:
            assert [next(received)["type"], next(received)["type"]] == ["chat.start", "model_load.start"]
        assert service.state(TINY) == "loading"
    until(lambda: TINY in service.instances(), "the load goes on")
    assert service.metric("requests_running", instance=TINY) == 0
