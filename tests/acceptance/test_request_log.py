"""The line that each request to a model leaves in the log: for every way out, and without what was said."""

from __future__ import annotations

import json
import os
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import CHAT, ENDLESS, begun, body, busy, chunks, connected, rest, streaming
from tests.support.service import JSON, TINY, Service, until, up

CONTEXT_LENGTH = 32_768  # long enough for an answer that lasts as long as a test needs it
TRACE_ID, SPAN_ID = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
SECRET = "Hush4711"
ALICE, NAMELESS = "alices-token-of-the-test", "another-token-of-the-test"
ENDED = "request_ended"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("log")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf", metadata={"llama.context_length": CONTEXT_LENGTH})
    tokens = home / "tokens"
    tokens.write_text(f"{NAMELESS} scope=manage\n{ALICE} name=alice scope=infer\n")
    with up(
        home,
        token=NAMELESS,
        LOADSTONE_API_TOKENS_FILE=str(tokens),
        LOADSTONE_JIT="off",
        LOADSTONE_LOG_FORMAT="json",
        LOADSTONE_LOG_LEVEL="debug",
        LOADSTONE_UNLOAD_WAIT_S="0.5",
    ) as service:
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


def lines(service: Service) -> list[Any]:
    """Return the lines of requests that have ended, oldest first."""
    whole = service.stderr.split("\n")[:-1]
    return [line for text in whole if text.startswith("{") and (line := json.loads(text)).get("action") == ENDED]


def line_after(service: Service, n: int) -> Any:
    """Wait for the line of the next request after `n` lines; there must be one only."""
    (line,) = until(lambda: lines(service)[n:], "the line of the request")
    return line


def ask(service: Service, token: str = NAMELESS, **fields: Any) -> Any:
    content = json.dumps(body(**fields)).encode()
    headers = {**JSON, "Authorization": f"Bearer {token}", "traceparent": f"00-{TRACE_ID}-{SPAN_ID}-01"}
    return service.send("POST", CHAT, content=content, headers=headers)


@pytest.mark.parametrize("stream", [False, True])
def test_a_completed_request_has_its_numbers(service: Service, stream: bool) -> None:
    job_id = service.accepted(TINY)["job_id"]
    assert service.job(job_id, wait_s=60)["status"] == "loaded"
    n = len(lines(service))
    if stream:
        usage = chunks(service, max_tokens=5, stream_options={"include_usage": True})[-1]["usage"]
    else:
        usage = ask(service, ALICE, max_tokens=5).json()["usage"]
    line = line_after(service, n)
    assert (line["route"], line["outcome"], line["status"]) == (CHAT, "completed", 200)
    assert (line["model"], line["instance"], line["job"]) == (TINY, TINY, job_id)
    assert line.get("token") == (None if stream else "alice")
    assert [line[name] for name in ("prompt_tokens", "cached_tokens", "generated_tokens")] == [
        usage["prompt_tokens"],
        usage["prompt_tokens_details"]["cached_tokens"],
        usage["completion_tokens"],
    ]
    parts = [line[name] for name in ("wait_s", "prompt_s", "generation_s")]
    assert all(part >= 0 for part in parts)
    assert sum(parts) <= line["seconds"] + 0.001


def test_the_line_is_the_span_of_its_request(service: Service) -> None:
    service.loaded(TINY)
    n = len(lines(service))
    ask(service, max_tokens=1)
    line = line_after(service, n)
    assert (line["trace_id"], line["parent_span_id"]) == (TRACE_ID, SPAN_ID)
    assert re.fullmatch(r"[0-9a-f]{16}", line["span_id"])
    assert line["span_id"] != SPAN_ID


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("fields", "status", "outcome"),
    [
        ({"messages": []}, 400, "invalid_value"),
        ({"model": "acme/nothing"}, 404, "model_not_found"),
        ({"messages": [{"role": "user", "content": "Hello " * 1000}]}, 400, "context_length_exceeded"),
    ],
)
def test_a_refused_request_has_the_code_of_its_error(
    service: Service, fields: dict[str, Any], status: int, outcome: str, stream: bool
) -> None:
    service.loaded(TINY, context_length=256)
    n = len(lines(service))
    assert ask(service, stream=stream, **fields).status == status
    line = line_after(service, n)
    assert (line["status"], line["outcome"]) == (status, outcome)
    assert "generated_tokens" not in line
    assert (line.get("prompt_tokens", 0) > 1000) == (outcome == "context_length_exceeded")


def test_a_request_without_a_token_is_logged(service: Service) -> None:
    n = len(lines(service))
    assert ask(service, "wrong").status == 401
    assert line_after(service, n)["outcome"] == "invalid_api_key"


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_is_logged_as_cancelled(service: Service, stream: bool) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    n = len(lines(service))
    if stream:
        with streaming(service, **ENDLESS) as received:
            begun(received)
    else:
        connection = connected(service, **ENDLESS)
        until(lambda: busy(service) == (1, 0), "the answer runs")
        connection.close()
    line = line_after(service, n)
    assert (line["outcome"], line["instance"]) == ("cancelled", TINY)
    assert line["prompt_tokens"] > 0
    assert line["cached_tokens"] >= 0


def test_an_answer_that_fails_is_logged_with_its_error(service: Service) -> None:
    service.loaded(TINY, context_length=CONTEXT_LENGTH)
    n = len(lines(service))
    with streaming(service, **ENDLESS) as received:
        begun(received)
        os.kill(service.runners()[0].pid, signal.SIGKILL)
        assert rest(received)["code"] == "runner_lost"
    line = line_after(service, n)
    assert (line["outcome"], line["status"], line["instance"]) == ("runner_lost", 200, TINY)
    until(lambda: not service.instances(), "the instance failed")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_logged(running: Service, tmp_path: Path, stream: bool) -> None:
    models = running.models_dir
    with up(tmp_path, models=models, LOADSTONE_LOG_FORMAT="json", LOADSTONE_REQUEST_S="1") as own:
        own.loaded(TINY, context_length=CONTEXT_LENGTH)
        reply = own.post(CHAT, body(stream=stream, **ENDLESS))
        line = line_after(own, 0)
        assert line["outcome"] in ("deadline", "queue_timeout"), "on a busy machine it may still wait then"
        assert line["status"] == reply.status


def test_no_log_has_what_was_said(service: Service) -> None:
    job_id = service.accepted(TINY)["job_id"]
    assert service.job(job_id, wait_s=60)["status"] == "loaded"
    said = [{"role": "system", "content": SECRET}, {"role": "user", "content": f"Hello {SECRET}"}]
    answers = []
    n = len(lines(service))
    for temperature in (0, 1):
        fields: dict[str, Any] = {"temperature": temperature, "messages": said, "max_tokens": 40, **ENDLESS}
        reply = ask(service, user=SECRET, **fields)
        answers.append(reply.json()["choices"][0]["message"]["content"])
        parts = chunks(service, **fields)
        answers.append("".join(part["choices"][0]["delta"].get("content", "") for part in parts))
    refused: list[dict[str, Any]] = [
        {"model": SECRET},
        {"messages": [{"role": SECRET, "content": SECRET}]},
        {"messages": said, "stop": [SECRET] * 100},
        {"messages": [{"role": "user", "content": f"{SECRET} " * 5000}]},
        {"messages": said, "response_format": {"type": SECRET}},
    ]
    for fields in refused:
        assert ask(service, **fields).status in (400, 404), fields
    until(lambda: len(lines(service)) == n + 9, "every request has its line")
    logs = service.stderr + service.send("GET", f"/api/v1/models/load/status/{job_id}/logs").text
    assert SECRET not in logs
    for answer in answers:
        assert len(answer) >= 20
        assert answer[:20] not in logs
        assert json.dumps(answer)[1:20] not in logs
