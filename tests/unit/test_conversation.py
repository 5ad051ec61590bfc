"""`loadstone chat`: what it keeps of a conversation and how it prints an answer, with answers that are lists."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import click
import pytest

from cli.chat import Conversation, Printed, answer, obeyed
from cli.failure import Failure, error
from cli.openai import Choice, Chunk, Delta, Timings, Usage
from shared.schema.http import JobList

MODEL = "p/m"


def text(content: str = "", reasoning: str = "", finish: str | None = None) -> Chunk:
    return Chunk(choices=[Choice(delta=Delta(content=content, reasoning_content=reasoning), finish_reason=finish)])


def server_of(*chunks: Chunk | Failure) -> Any:
    def chat(_request: Any) -> Iterator[Chunk]:
        for chunk in chunks:
            if isinstance(chunk, Failure):
                raise chunk
            yield chunk

    return SimpleNamespace(chat=chat, jobs=lambda **_: JobList(jobs=[]))


def printed(*chunks: Chunk, is_terminal: bool = True) -> tuple[Conversation, Printed]:
    """Print an answer; return the conversation and what printed it."""
    conversation, its = Conversation(MODEL, None), Printed(is_terminal=is_terminal)
    its.print(server_of(*chunks), conversation, conversation.request("Hello"), lambda: None)
    return conversation, its


def test_a_request_has_the_conversation_before_it() -> None:
    conversation = Conversation(MODEL, "Be brief.")
    conversation.answered("one", "1")
    conversation.answered("lost", "")  # it has no answer
    conversation.answered("two", "2, and the")  # it was stopped
    roles = [(message["role"], message["content"]) for message in conversation.request("three")["messages"]]
    assert roles == [
        ("system", "Be brief."),
        ("user", "one"),
        ("assistant", "1"),
        ("user", "two"),
        ("assistant", "2, and the"),
        ("user", "three"),
    ]


def test_clear_forgets_all_but_the_system_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(MODEL, None)
    conversation.answered("one", "1")
    obeyed(conversation, "/system  Be brief. ")
    obeyed(conversation, "/clear")
    assert conversation.request("two")["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "two"},
    ]
    obeyed(conversation, "/system")
    assert capsys.readouterr().err == "Be brief.\n"


def test_an_unknown_command_is_no_question(capsys: pytest.CaptureFixture[str]) -> None:
    obeyed(Conversation(MODEL, None), "/bye")
    assert capsys.readouterr().err == "loadstone: There is no command /bye. /help lists the commands.\n"
    obeyed(Conversation(MODEL, None), "/help")
    assert "/clear" in capsys.readouterr().err


def test_reasoning_is_dimmed_on_a_terminal_only(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("click.utils.should_strip_ansi", lambda *_: False)
    chunks = (text(reasoning="Hm."), text("It is "), text("4."), text(finish="stop"))
    _, its = printed(*chunks)
    assert capsys.readouterr().out == f"{click.style('Hm.', dim=True)}\n\nIt is 4.\n"
    assert its.text == "It is 4."
    printed(*chunks, is_terminal=False)
    assert capsys.readouterr().out == "It is 4.\n"


def test_control_characters_reach_a_pipe_but_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    for is_terminal, shown in ((True, "a\ufffd[1m\n"), (False, "a\x1b[1m\n")):
        printed(text("a\x1b[1m\n"), is_terminal=is_terminal)
        assert capsys.readouterr().out == shown


def test_a_cut_answer_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    printed(text("It is"), text(finish="length"))
    out, err = capsys.readouterr()
    assert out == "It is\n"
    assert err.startswith("loadstone: The answer was cut")


def test_an_answer_that_fails_keeps_its_beginning(capsys: pytest.CaptureFixture[str]) -> None:
    conversation = Conversation(MODEL, None)
    assert answer(server_of(text("It is"), Failure(error("runner_lost", "It was lost."))), conversation, "2+2?")
    assert conversation.has_turns
    assert capsys.readouterr() == ("It is\n", "loadstone: It was lost.\n")


def test_stats_has_the_numbers_of_the_last_answer() -> None:
    assert Conversation(MODEL, None).stats() == "There is no answer yet."
    usage = Usage(prompt_tokens=12, completion_tokens=34)
    timings = Timings(queued_ms=10, prompt_ms=200, predicted_ms=3000, predicted_per_second=11.33)
    conversation, _ = printed(text("4"), Chunk(usage=usage, timings=timings))
    assert conversation.stats().splitlines() == [
        "prompt: 12 tokens, 0 of them kept from before",
        "answer: 34 tokens, 11.3 per second",
        "times: waited 0.01 s, prompt 0.20 s, answer 3.00 s",
    ]
