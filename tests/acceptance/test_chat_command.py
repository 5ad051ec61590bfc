"""`loadstone chat`, on a terminal and in a pipe, against a running service."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import answered, busy
from tests.support.families import ARGUMENTS, CALL, TOOL
from tests.support.reciting import reciting
from tests.support.service import LOADSTONE, TINY, Service, until, up
from tests.support.terminal import Terminal, terminal

LONG, CALLING = "acme/long", "acme/calling"
CONTEXT_LENGTH, ENDLESS_CONTEXT = 256, 131_072  # the second: for an answer that lasts as long as a test needs it
MANAGE, INFER = "the-token-of-the-operator", "the-token-of-a-client"
SETTINGS = "".join(f'[models."{key}".sampling]\ntemperature = 0\n' for key in (TINY, LONG))
ENDS_S = 60.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("chat")
    for key, name, length in ((TINY, "tiny", CONTEXT_LENGTH), (LONG, "long", ENDLESS_CONTEXT)):
        synthetic.tiny_llama(home / f"models/{key}/{name}-f16.gguf", metadata={"llama.context_length": length})
    reciting(home / f"models/{CALLING}/recites-f32.gguf", CALL, "chatml")
    (home / "models/models.toml").write_text(SETTINGS)
    tokens = home / "tokens"
    tokens.write_text(f"{MANAGE} scope=manage\n{INFER} scope=infer\n")
    with up(home, token=MANAGE, LOADSTONE_API_TOKENS_FILE=str(tokens)) as service:
        until(lambda: set(service.models()) == {TINY, LONG, CALLING}, "the models are listed")
        yield service


@pytest.fixture
def service(running: Service) -> Iterator[Service]:
    """Return the module's service; unload everything after the test."""
    yield running
    running.unload_all()


def environ(service: Service, token: str = MANAGE) -> dict[str, str]:
    return {
        "PATH": os.environ["PATH"],
        "HOME": str(service.directory),
        "TERM": "xterm",
        "COLUMNS": "120",
        "LOADSTONE_URL": service.url,
        "LOADSTONE_TOKEN": token,
    }


def piped(service: Service, question: str, *words: str, token: str = MANAGE) -> subprocess.CompletedProcess[str]:
    """Ask one question through a pipe."""
    return subprocess.run(
        [str(LOADSTONE), "chat", *words],
        env=environ(service, token),
        input=question,
        capture_output=True,
        text=True,
        timeout=ENDS_S,
        check=False,
    )


def conversation(service: Service, *words: str) -> AbstractContextManager[Terminal]:
    return terminal(str(LOADSTONE), "chat", *words, environ=environ(service))


def written(service: Service, name: str, value: object) -> str:
    path = service.directory / name
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return str(path)


# ---- a pipe


def test_a_pipe_gets_only_the_answer(service: Service) -> None:
    done = piped(service, "Hello\n", TINY, "--system", "Be brief.")
    assert done.returncode == 0, done.stderr
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    expected = answered(service, model=TINY, messages=messages)["choices"][0]["message"]["content"]
    assert "The answer was cut" in done.stderr
    assert done.stdout.removesuffix("\n") == expected.removesuffix("\n")


def test_a_pipe_gets_the_reply_as_json(service: Service) -> None:
    done = piped(service, "Hello", TINY, "--json")
    assert done.returncode == 0, done.stderr
    assert '"chat.completion"' in done.stdout


def test_a_client_without_rights_to_loads_can_chat(service: Service) -> None:
    done = piped(service, "Hello", TINY, token=INFER)
    assert (done.returncode, bool(done.stdout)) == (0, True), done.stderr
    assert "scope" not in done.stderr


@pytest.mark.parametrize(("token", "line"), [(MANAGE, f"{TINY}: 0%"), (INFER, f"Waiting for {TINY}.")])
def test_a_load_that_a_question_waits_for_is_shown(service: Service, token: str, line: str) -> None:
    with service.frozen():
        command = subprocess.Popen(
            [str(LOADSTONE), "chat", TINY],
            env=environ(service, token),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        assert command.stdin
        assert command.stderr
        command.stdin.write(b"Hello")
        command.stdin.close()
        assert command.stderr.readline().decode().startswith(f"loadstone: {line}")
    assert command.wait(ENDS_S) == 0
    command.stderr.close()
    assert command.stdout
    assert command.stdout.read()
    command.stdout.close()


@pytest.mark.parametrize(
    ("question", "model", "status", "message"),
    [
        ("Hello", "acme/nothing", 1, "acme/nothing"),
        ("", TINY, 2, "no question"),
        ("Hello " * 1000, TINY, 1, f"maximum context length is {CONTEXT_LENGTH} tokens"),
    ],
)
def test_a_question_without_an_answer_fails(
    service: Service, question: str, model: str, status: int, message: str
) -> None:
    done = piped(service, question, model)
    assert (done.returncode, done.stdout) == (status, "")
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_an_answer_follows_the_schema_of_a_file(service: Service) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"]}
    path = written(service, "schema.json", {**schema, "additionalProperties": False})
    done = piped(service, "Hello", TINY, "--schema", path)
    assert done.returncode == 0, done.stderr
    assert isinstance(json.loads(done.stdout)["a"], bool)
    long = written(service, "long.json", {"type": "array", "items": {"type": "boolean"}, "minItems": 2000})
    done = piped(service, "Hello", TINY, "--schema", long)
    assert (done.returncode, "The answer was cut" in done.stderr) == (1, True), "half of a document is none"


def test_a_pipe_gets_the_calls_of_tools(service: Service) -> None:
    path = written(service, "tools.json", [TOOL])
    done = piped(service, "Hello", CALLING, "--tools", path)
    assert done.returncode == 0, done.stderr
    text, call = done.stdout.splitlines()
    assert (text, json.loads(call)["name"]) == ("I will look.", "get_weather")
    assert json.loads(call)["arguments"] == json.loads(ARGUMENTS)


@pytest.mark.parametrize(
    ("option", "text", "message"),
    [
        ("--schema", '{"a": ]', "is not valid JSON: Expecting value (line 1, column 7)."),
        ("--schema", "[]", "a JSON schema is an object."),
        ("--tools", "{}", "tools are a list of objects."),
        ("--tools", "[" * 100_000, "is nested too deeply."),
    ],
)
def test_a_file_that_cannot_be_used_is_named(service: Service, option: str, text: str, message: str) -> None:
    path = written(service, "wrong.json", text)
    done = piped(service, "Hello", TINY, option, path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.splitlines()[-1] == f"Error: Invalid value for {option}: '{path}'" + (
        f" {message}" if message.startswith("is") else f": {message}"
    )
    missing = piped(service, "Hello", TINY, option, "/nowhere.json")
    assert "'/nowhere.json' cannot be read: No such file or directory." in missing.stderr


def test_a_tool_that_the_server_refuses_is_reported(service: Service) -> None:
    done = piped(service, "Hello", TINY, "--tools", written(service, "tools.json", [{"type": "function"}]))
    assert done.returncode == 1
    assert "tools[0]" in done.stderr


# ---- a terminal


def test_the_user_says_what_a_tool_returns(service: Service) -> None:
    path = written(service, "tools.json", [TOOL])
    with conversation(service, CALLING, "--tools", path) as its:
        its.wait("> ")
        its.send("Hello\n")
        its.wait("get_weather(")
        its.wait("get_weather returns: ")
        its.send("Sunny.\n")
        its.wait("I will look.")
        its.wait("get_weather returns: ")  # the model of this test calls it after any prompt
        its.send("\x04")
        its.wait("a call has no result")
        its.send("/stats\n")
        its.wait("answer: ")


def test_a_terminal_holds_a_conversation(service: Service) -> None:
    with conversation(service, TINY) as screen:
        screen.wait("> ")
        screen.send("/stats\n")
        screen.wait("There is no answer yet.")
        screen.send("\udcff\n")  # a byte that begins no character
        screen.wait("The line is not UTF-8.")
        screen.send("Hello\n")
        until(lambda: TINY in service.instances(), "the question loads the model")
        screen.wait("\n> ")
        screen.send("/stats\n")
        assert " 0 of them kept" in screen.wait("per second")
        screen.send("/clear\n")
        screen.wait("> ")
        screen.send("\x04")
        assert screen.command.wait(ENDS_S) == 0


def test_a_question_that_is_too_long_costs_nothing(service: Service) -> None:
    service.loaded(TINY)
    with conversation(service, TINY) as screen:
        screen.wait("> ")
        screen.send("Hello " * 400 + "\n")
        shown = screen.wait("exceeds the available context size")
        assert f"maximum context length is {CONTEXT_LENGTH} tokens" in shown
        screen.wait("\n> ")
        screen.send("Hello\n")
        screen.wait("\n> ")
        screen.send("/stats\n")
        screen.wait("per second")


def test_ctrl_c_stops_the_answer_and_twice_the_program(service: Service) -> None:
    service.loaded(LONG, context_length=ENDLESS_CONTEXT)
    with conversation(service, LONG) as screen:
        screen.wait("> ")
        screen.send("Hello\n")
        until(lambda: busy(service, LONG) == (1, 0), "the answer runs")
        screen.send("\x03")
        screen.wait("The answer was stopped.")
        until(lambda: busy(service, LONG) == (0, 0), "the server stopped it too")
        screen.wait("> ")
        screen.send("/stats\n")
        screen.wait("There is no answer yet.")
        screen.send("\x03")
        screen.wait("Press Ctrl-C again")
        screen.wait("> ")
        screen.send("\x03")
        assert screen.command.wait(ENDS_S) == 130
        assert "Traceback" not in screen.shown


def test_an_unknown_model_ends_a_conversation_before_it(service: Service) -> None:
    with conversation(service, "acme/nothing") as screen:
        screen.wait("acme/nothing")
        assert screen.command.wait(ENDS_S) == 1
