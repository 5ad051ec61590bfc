"""How answers are divided into reasoning and content while they arrive, by llama.cpp's real parsers."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import worker.engine.reader
from shared.channel.messages import Delta, Finish, Stop, TokenLogprobs
from worker.chat.code import ChatCode, Message, Rendered, installed
from worker.chat.handle import HelperDied
from worker.chat.helper import reading
from worker.chat.protocol import Prompt
from worker.engine.job import Job, Piece
from worker.engine.reader import Reader

TEMPLATES = installed().parent / "chat" / "templates"
USER = {"role": "user", "content": "Hello"}
CODE = ChatCode()
JOB = Job(client="", tokens=[1], arrived_at=0.0, deadline=0.0)
STOP = Stop("string", "!")

# A template, an answer to it, and its reasoning and content.
ANSWERS = {
    "plain": ("meta-llama-Llama-3.1-8B-Instruct", " Hello <think> Zoë\n", "", " Hello <think> Zoë\n"),
    "tags": ("Qwen-Qwen3-0.6B", "<think>\nHm, ok.\n</think>\n\nHello {Zoë}\n\n!", "Hm, ok.", "Hello {Zoë}\n\n!"),
    "no reasoning": ("Qwen-Qwen3-0.6B", "Hello <think>Zoë</think>", "", "Hello <think>Zoë</think>"),
    "tag in the prompt": ("Qwen3.5-4B", "Hm, ok.\n</think>\n\nHello Zoë", "Hm, ok.", "Hello Zoë"),
    "channels": (
        "openai-gpt-oss-120b",
        "<|channel|>analysis<|message|>Hm, ok.<|end|><|start|>assistant<|channel|>final<|message|>Hello Zoë",
        "Hm, ok.",
        "Hello Zoë",
    ),
    "wrapped": (
        "CohereForAI-c4ai-command-r7b-12-2024-tool_use",
        "<|START_THINKING|>Hm, ok.<|END_THINKING|><|START_RESPONSE|>Hello Zoë<|END_RESPONSE|>",
        "Hm, ok.",
        "Hello Zoë",
    ),
}


def rendered(name: str, *more: dict[str, Any]) -> Rendered:
    templates = CODE.templates((TEMPLATES / f"{name}.jinja").read_text())
    return templates.render(json.dumps({"messages": [USER, *more]}).encode())


def prompt(source: Rendered) -> Prompt:
    passes, is_open = reading(source.parser)
    before = CODE.parser(source).parse(b"", partial=True)
    return Prompt(text="", stops=[], shown=[], source=None if passes else source, is_open=is_open, before=before)


def parsing(source: Rendered) -> Callable[[str, bool], Awaitable[Message]]:
    parser = CODE.parser(source)

    async def parse(text: str, is_partial: bool) -> Message:
        await asyncio.sleep(0)
        return parser.parse(text.encode(), partial=is_partial)

    return parse


async def read(
    source: Rendered,
    pieces: list[str],
    finish: Finish = "stop",
    parse: Callable[[str, bool], Awaitable[Message]] | None = None,
) -> tuple[list[Delta], Reader]:
    """Return the deltas of an answer that arrives in pieces of a token each."""
    deltas: list[Delta] = []
    async with asyncio.TaskGroup() as tasks:
        reader = Reader(Delta(id=1), prompt(source), parse or parsing(source), deltas.append, tasks.create_task)
        for i, text in enumerate(pieces):
            logprobs = [TokenLogprobs(text.encode(), -1.0)]
            end = finish if i == len(pieces) - 1 else None
            stop = None if end is None else STOP
            piece = Piece(job=JOB, choice=0, text=text, n_tokens=1, logprobs=logprobs, finish=end, stop=stop)
            if delta := reader.add(piece):
                deltas.append(delta)
            await asyncio.sleep(0)
    return deltas, reader


def said(deltas: list[Delta]) -> tuple[str, str]:
    return "".join(delta.reasoning for delta in deltas), "".join(delta.text for delta in deltas)


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Parse more often than in a runner."""
    monkeypatch.setattr(worker.engine.reader, "PAUSE_S", 0.0001)


@pytest.mark.parametrize("case", ANSWERS)
def test_reasoning_and_content_do_not_depend_on_the_cuts(case: str) -> None:
    name, answer, reasoning, content = ANSWERS[case]
    source = rendered(name)

    @settings(max_examples=15)
    @given(cuts=st.sets(st.integers(1, len(answer) - 1)))
    def check(cuts: set[int]) -> None:
        places = [0, *sorted(cuts), len(answer)]
        pieces = [answer[start:end] for start, end in pairwise(places)]
        deltas, _ = asyncio.run(read(source, pieces))
        found = said(deltas)
        assert (found[0].strip(), found[1]) == (reasoning, content)
        assert [(delta.finish, delta.stop) for delta in deltas if delta.finish or delta.stop] == [("stop", STOP)]
        assert deltas[-1].finish == "stop"
        assert [one.token.decode() for delta in deltas for one in delta.logprobs] == pieces
        last = max((i for i, delta in enumerate(deltas) if delta.reasoning), default=0)
        assert not any(delta.text for delta in deltas[:last])

    check()


async def test_reasoning_tokens_are_counted() -> None:
    pieces = ["<think>", "\n", "Hm", ",", " ok", ".", "\n", "</think>", "\n\n", "Hel", "lo"]
    _, reader = await read(rendered("Qwen-Qwen3-0.6B"), pieces)
    assert 4 <= reader.reasoning_tokens <= 9
    _, reader = await read(rendered("Qwen-Qwen3-0.6B"), ["Hel", "lo"])
    assert reader.reasoning_tokens == 0


@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_an_end_within_reasoning_leaves_no_content(finish: Finish) -> None:
    deltas, reader = await read(rendered("Qwen-Qwen3-0.6B"), ["<think>", "\n", "Hm", ", ok"], finish)
    assert said(deltas) == ("Hm, ok", "")
    assert deltas[-1].finish == finish
    assert reader.reasoning_tokens > 0


@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b"])
async def test_a_continued_message_is_not_repeated(name: str) -> None:
    source = rendered(name, {"role": "assistant", "content": "It is "})
    deltas, _ = await read(source, ["sun", "ny ", "today."])
    assert said(deltas) == ("", "sunny today.")


async def test_an_answer_that_is_rejected_is_text() -> None:
    source = rendered("openai-gpt-oss-120b")
    deltas, _ = await read(source, ["<|channel|>", "nonsense", "<|channel|>"])
    assert said(deltas)[1].endswith("nonsense<|channel|>")


async def test_without_its_helper_an_answer_is_text() -> None:
    async def parse(text: str, is_partial: bool) -> Message:
        raise HelperDied("SIGSEGV")

    deltas, _ = await read(rendered("Qwen-Qwen3-0.6B"), ["<think>", "Hm", "</think>", "Hello"], parse=parse)
    assert said(deltas) == ("", "<think>Hm</think>Hello")
    assert deltas[-1].finish == "stop"
