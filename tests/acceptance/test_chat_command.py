"""`loadstone chat`, on a terminal and in a pipe, against a running service."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager

import pytest

from shared.synthetic import models as synthetic
from tests.support.chat import answered, busy
from tests.support.service import LOADSTONE, TINY, Service, until, up
from tests.support.terminal import Terminal, terminal

LONG = "acme/long"
CONTEXT_LENGTH, ENDLESS_CONTEXT = 256, 131_072  # the second: for an answer that lasts as long as a test needs it
MANAGE, INFER = "the-token-of-the-operator", "the-token-of-a-client"
SETTINGS = "".join(f'[models."{key}".sampling]\ntemperature = 0\n' for key in (TINY, LONG))
ENDS_S = 60.0


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("chat")
    for key, name, length in ((TINY, "tiny", CONTEXT_LENGTH), (LONG, "long", ENDLESS_CONTEXT)):
        synthetic.tiny_llama(home / f"models/{key}/{name}-f16.gguf", metadata={"llama.context_length": length})
    (home / "models/models.toml").write_text(SETTINGS)
    tokens = home / "tokens"
    tokens.write_text(f"{MANAGE} scope=manage\n{INFER} scope=infer\n")
    with up(home, token=MANAGE, LOADSTONE_API_TOKENS_FILE=str(tokens)) as service:
        until(lambda: set(service.models()) == {TINY, LONG}, "the models are listed")
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


# ---- a terminal


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
