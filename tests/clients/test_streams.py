"""What nine published readers make of our streams of chat completions.

The streams are those that our form makes of an answer, served by a socket; no model is asked.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from api.errors import shaped
from api.openai.answer import Chat, Heading
from shared import paths
from shared.channel.messages import Delta, ToolDelta, Usage
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
# The additions of an answer, and what is to be read of them: texts and ends by choice, calls, and the reasoning.
ANSWERS: dict[str, tuple[list[Delta], list[str], list[str], list[Any], str]] = {
    "text": (
        [Delta(id=1, text="Grüne "), Delta(id=1, text="Bäume 🌳", finish="stop")],
        ["Grüne Bäume 🌳"],
        ["stop"],
        [],
        "",
    ),
    "cut": ([Delta(id=1, text="Gr"), Delta(id=1, finish="length")], ["Gr"], ["length"], [], ""),
    "reasoning": (
        [
            Delta(id=1, reasoning="Trees "),
            Delta(id=1, reasoning="are", text="Green"),
            Delta(id=1, text=".", finish="stop"),
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
            Delta(id=1, finish="tool_calls"),
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
            Delta(id=1, choice=1, text=" and blue", finish="stop"),
            Delta(id=1, choice=0, finish="stop"),
        ],
        ["Green", "Red and blue"],
        ["stop", "stop"],
        [],
        "",
    ),
}
FAILED = "failed"
PYTHON = ["openai", "openai stream()", "langchain", "litellm", "llama_index"]
NODE = ["openai", "openai stream()", "langchain", "ai_sdk"]
ONE_CHOICE = ("langchain", "litellm", "llama_index", "ai_sdk")  # they read one answer, or one end of several
SHOW_REASONING = {("python", "openai"), ("python", "litellm"), ("node", "openai"), ("node", "ai_sdk")}


def form(choices: int) -> Chat:
    return Chat(Heading("acme/tiny", "b1"), choices, with_usage=True)


def recorded() -> dict[str, bytes]:
    """Return the streams by name."""
    streams = {}
    for name, (deltas, texts, *_) in ANSWERS.items():
        made = form(len(texts))
        streams[name] = made.first() + b"".join(map(made.added, deltas)) + made.last(USAGE)
    made = form(1)
    error = made.failed(shaped(RequestFailed(STOPPED).body(), paths.CHAT_COMPLETIONS)[1])
    return streams | {FAILED: made.first() + made.added(Delta(id=1, text="Green")) + error}


@contextmanager
def serving(streams: dict[str, bytes]) -> Iterator[str]:
    """Serve each stream to requests for the model of its name, in pieces.  Yields the base URL."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream; charset=utf-8")
            self.end_headers()
            stream = streams[asked["model"]]
            for i in range(0, len(stream), 100):  # also within events and characters
                self.wfile.write(stream[i : i + 100])
                self.wfile.flush()

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
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


def check(read: Any, language: str, stack: str) -> None:
    for name, (_, texts, finishes, calls, reasoning) in ANSWERS.items():
        if name == "choices" and stack in ONE_CHOICE:
            continue
        if name == "cut" and (language, stack) == ("python", "openai stream()"):  # which parses, and wants it whole
            assert read[stack][name]["error"].startswith("LengthFinishReasonError")
            continue
        assert read[stack][name] == {
            "texts": texts,
            "finishes": [one.replace("_", "-") for one in finishes] if stack == "ai_sdk" else finishes,
            "tokens": [USAGE.prompt_tokens, USAGE.generated_tokens],
            "calls": calls,
            "reasoning": reasoning if (language, stack) in SHOW_REASONING else "",
        }, name
    assert STOPPED in read[stack][FAILED]["error"]


@pytest.mark.parametrize("stack", PYTHON)
def test_a_library_for_python_reads_our_streams(in_python: Any, stack: str) -> None:
    check(in_python, "python", stack)


@pytest.mark.parametrize("stack", NODE)
def test_a_library_for_node_reads_our_streams(in_node: Any, stack: str) -> None:
    check(in_node, "node", stack)
