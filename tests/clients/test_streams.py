"""What published readers make of our streams: nine of chat completions, and those of responses and messages.

The streams are those that our forms make of an answer, with heartbeats, served by a socket; no model is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import msgspec
import pytest

from api.anthropic.answer import Answer
from api.errors import shaped
from api.openai.answer import Chat, Heading
from api.openai.reply import Form
from api.responses.answer import Responding
from api.responses.request import ResponseRequest
from api.responses.response import begun
from shared.channel.messages import Delta, Finish, Sampling, Stop, ToolDelta, Usage
from shared.errors import RequestFailed
from tests.support.published import DRIVERS, run

USAGE = Usage(
    prompt_tokens=7,
    cached_tokens=3,
    generated_tokens=5,
    reasoning_tokens=2,
    wait_s=0.0,
    prompt_s=0.0,
    generation_s=0.0,
)
STOPPED = "The runner stopped."


def end(finish: Finish, *, choice: int = 0, text: str = "") -> Delta:
    """Return the last addition of an answer."""
    return Delta(
        id=1, choice=choice, text=text, finish=finish, stop=Stop("max_tokens" if finish == "length" else "eos")
    )


# The additions of an answer, and what is to be read of them: texts and ends by choice, calls, and the reasoning.
ANSWERS: dict[str, tuple[list[Delta], list[str], list[str], list[Any], str]] = {
    "text": (
        [Delta(id=1, text="Grüne "), end("stop", text="Bäume 🌳")],
        ["Grüne Bäume 🌳"],
        ["stop"],
        [],
        "",
    ),
    "cut": ([Delta(id=1, text="Gr"), end("length")], ["Gr"], ["length"], [], ""),
    "reasoning": (
        [
            Delta(id=1, reasoning="Trees "),
            Delta(id=1, reasoning="are", text="Green"),
            end("stop", text="."),
        ],
        ["Green."],
        ["stop"],
        [],
        "Trees are",
    ),
    "tools": (
        [
            Delta(id=1, text="I will look."),
            Delta(id=1, tool=ToolDelta(0, "call_a", "get_weather", '{"city": ')),
            Delta(id=1, tool=ToolDelta(0, arguments='"Paris"}')),
            Delta(id=1, tool=ToolDelta(1, "call_b", "get_weather")),
            Delta(id=1, tool=ToolDelta(1, arguments='{"city": "Rome"}')),
            end("tool_calls"),
        ],
        ["I will look."],
        ["tool_calls"],
        [["call_a", "get_weather", {"city": "Paris"}], ["call_b", "get_weather", {"city": "Rome"}]],
        "",
    ),
    "choices": (
        [
            Delta(id=1, choice=1, text="Red"),
            Delta(id=1, choice=0, text="Green"),
            end("stop", choice=1, text=" and blue"),
            end("stop", choice=0),
        ],
        ["Green", "Red and blue"],
        ["stop", "stop"],
        [],
        "",
    ),
}
FAILED = "failed"
CHAT, RESPONSES, MESSAGES = "/v1/chat/completions", "/v1/responses", "/v1/messages"
PYTHON = {
    "openai": CHAT,
    "openai stream()": CHAT,
    "langchain": CHAT,
    "litellm": CHAT,
    "llama_index": CHAT,
    "openai responses": RESPONSES,
    "langchain responses": RESPONSES,
    "anthropic": MESSAGES,
    "langchain anthropic": MESSAGES,
    "litellm anthropic": MESSAGES,
}
NODE = {
    "openai": CHAT,
    "openai stream()": CHAT,
    "langchain": CHAT,
    "ai_sdk": CHAT,
    "openai responses": RESPONSES,
    "ai_sdk responses": RESPONSES,
    "anthropic": MESSAGES,
}
SEVERAL_CHOICES = ("openai", "openai stream()")  # others read one answer, or one end of several
NO_REASONING = ("openai stream()", "langchain", "llama_index", "langchain responses")  # they drop it
FINISHES: dict[str, dict[str, str]] = {
    CHAT: {},
    RESPONSES: {"stop": "completed", "tool_calls": "completed", "length": "incomplete"},
    MESSAGES: {"stop": "end_turn", "tool_calls": "tool_use", "length": "max_tokens"},
}


def form(path: str, choices: int) -> Form:
    match path:
        case "/v1/chat/completions":
            return Chat(Heading("acme/tiny", "b1"), choices, with_usage=True)
        case "/v1/responses":
            request = msgspec.json.decode(b'{"input": "Hello"}', type=ResponseRequest)
            return Responding(begun(request, [], "acme/tiny", Sampling(), stores=False))
        case _:
            return Answer("acme/tiny", USAGE.prompt_tokens)


def recorded() -> dict[tuple[str, str], bytes]:
    """Return the streams by path and name."""
    streams = {}
    for path in (CHAT, RESPONSES, MESSAGES):
        for name, (deltas, texts, *_) in ANSWERS.items():
            n = len(texts) if path == CHAT else 1  # others have one answer
            made = form(path, n)
            added = b"".join(made.waiting() + made.added(delta) for delta in deltas if delta.choice < n)
            streams[path, name] = made.first() + added + made.last(USAGE)
        made = form(path, 1)
        error = made.failed(shaped(RequestFailed(STOPPED).body(), path)[1])
        streams[path, FAILED] = made.first() + made.added(Delta(id=1, text="Green")) + error
    return streams


@contextmanager
def serving(streams: dict[tuple[str, str], bytes]) -> Iterator[str]:
    """Serve each stream to requests for the model of its name, in pieces.  Yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            stream = streams[self.path.partition("?")[0], asked["model"]]
            for i in range(0, len(stream), 100):  # also within events and characters
                self.wfile.write(stream[i : i + 100])
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def stub() -> Iterator[str]:
    with serving(recorded()) as base_url:
        yield base_url


@pytest.fixture(scope="module")
def in_python(stub: str, python: Path) -> Any:
    written = run(str(python), str(DRIVERS / "streams_driver.py"), stub, *ANSWERS, FAILED)
    return json.loads(written.splitlines()[-1])


@pytest.fixture(scope="module")
def in_node(stub: str, node: Path) -> Any:
    return json.loads(run("node", str(node / "streams.mjs"), stub, *ANSWERS, FAILED))


def check(read: Any, language: str, stack: str, path: str) -> None:
    for name, (_, texts, finishes, calls, reasoning) in ANSWERS.items():
        if name == "choices" and path == CHAT and stack not in SEVERAL_CHOICES:
            continue
        n = len(texts) if path == CHAT else 1
        if name == "cut" and (language, stack) == ("python", "openai stream()"):  # which parses, and wants it whole
            assert read[stack][name]["error"].startswith("LengthFinishReasonError")
            continue
        assert read[stack][name] == {
            "texts": texts[:n],
            "finishes": [finish(stack, path, one) for one in finishes[:n]],
            "tokens": [USAGE.prompt_tokens, USAGE.generated_tokens],
            "calls": [[called(path, id), *call] for id, *call in calls],
            "reasoning": "" if stack in NO_REASONING else reasoning,
        }, name
    if stack == "ai_sdk responses":  # which keeps no message
        assert read[stack][FAILED]["finishes"] == ["error"]
    else:
        assert STOPPED in read[stack][FAILED]["error"]


def called(path: str, id: str) -> str:
    return id.replace("call_", "toolu_") if path == MESSAGES else id


def finish(stack: str, path: str, finish: str) -> str:
    """Return the end of an answer as a library tells it."""
    if stack.startswith("ai_sdk"):
        return finish.replace("_", "-")
    return finish if stack.startswith("litellm") else FINISHES[path].get(finish, finish)


@pytest.mark.parametrize("stack", PYTHON)
def test_a_library_for_python_reads_our_streams(in_python: Any, stack: str) -> None:
    check(in_python, "python", stack, PYTHON[stack])


@pytest.mark.parametrize("stack", NODE)
def test_a_library_for_node_reads_our_streams(in_node: Any, stack: str) -> None:
    check(in_node, "node", stack, NODE[stack])
