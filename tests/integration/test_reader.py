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
from msgspec.structs import replace

import worker.engine.reader
from shared.channel.messages import Delta, Finish, Stop, TokenLogprobs
from tests.support.families import ARGUMENTS, FAMILIES, TEMPLATES, TOOL, template
from worker.chat.code import ChatCode, Message, Rendered
from worker.chat.handle import HelperDied
from worker.chat.helper import reading
from worker.chat.protocol import Prompt
from worker.chat.tools import constraint
from worker.engine.job import Job, Piece
from worker.engine.reader import Reader

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
    given: Prompt | None = None,
    *,
    slowly: bool = False,
) -> tuple[list[Delta], Reader]:
    """Return the deltas of an answer that arrives in pieces of a token each, if `slowly`, each read before the next."""
    deltas: list[Delta] = []
    async with asyncio.TaskGroup() as tasks:
        parse = parse or parsing(source)
        reader = Reader(Delta(id=1), given or prompt(source), parse, deltas.extend, tasks.create_task)
        for i, text in enumerate(pieces):
            logprobs = [TokenLogprobs(text.encode(), -1.0)]
            end = finish if i == len(pieces) - 1 else None
            stop = None if end is None else STOP
            piece = Piece(job=JOB, choice=0, text=text, n_tokens=1, logprobs=logprobs, finish=end, stop=stop)
            if delta := reader.add(piece):
                deltas.append(delta)
            await asyncio.sleep(0)
            if slowly and reader._task is not None:
                await reader._task
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


@pytest.mark.parametrize("slowly", [False, True])
async def test_reasoning_tokens_are_counted(slowly: bool) -> None:
    """As many however the answer is cut into readings: with the tags around the reasoning."""
    pieces = ["<think>", "\n", "Hm", ",", " ok", ".", "\n", "</think>", "\n\n", "Hel", "lo"]
    _, reader = await read(rendered("Qwen-Qwen3-0.6B"), pieces, slowly=slowly)
    assert reader.reasoning_tokens == 9
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


# ---- calls of tools


def with_tools(name: str, **options: Any) -> tuple[Rendered, Prompt]:
    request = {"messages": [USER], "tools": [TOOL], **options}
    source = CODE.templates(template(name)).render(json.dumps(request).encode())
    return source, replace(prompt(source), constraint=constraint(source), most_calls=None)


def called(deltas: list[Delta]) -> list[tuple[str, str]]:
    """Return the calls that deltas make, each with its arguments; their form must be right."""
    calls: list[list[str]] = []
    for tool in (delta.tool for delta in deltas if delta.tool is not None):
        if tool.index == len(calls):
            assert tool.id
            calls.append([tool.name, tool.arguments])
        else:
            assert (tool.id, tool.name) == ("", "")
            calls[tool.index][1] += tool.arguments
    ids = [delta.tool.id for delta in deltas if delta.tool is not None and delta.tool.id]
    assert len({*ids}) == len(ids)
    return [(name, arguments) for name, arguments in calls]


@pytest.mark.parametrize("choice", ["auto", "required"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_call_does_not_depend_on_the_cuts(family: str, choice: str) -> None:
    name, answer, expected = FAMILIES[family]
    if family == "Gemma 4" and choice == "required":
        answer, expected = answer.replace("I will look.", ""), {**expected, "content": ""}
    source, with_calls = with_tools(name, tool_choice=choice)

    @settings(max_examples=10)
    @given(cuts=st.sets(st.integers(1, len(answer) - 1)))
    def check(cuts: set[int]) -> None:
        places = [0, *sorted(cuts), len(answer)]
        pieces = [answer[start:end] for start, end in pairwise(places)]
        deltas, _ = asyncio.run(read(source, pieces, given=with_calls))
        reasoning, text = said(deltas)
        assert (reasoning.strip(), text.strip()) == (expected["reasoning"], expected["content"])
        ((function, arguments),) = called(deltas)
        assert (function, json.loads(arguments)) == (expected["name"], expected["arguments"])
        assert [delta.finish for delta in deltas if delta.finish] == ["tool_calls"]
        first = next(i for i, delta in enumerate(deltas) if delta.tool is not None)
        assert not any(delta.text or delta.reasoning for delta in deltas[first + 1 :])

    check()


@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_arguments_arrive_while_they_are_written(choice: str) -> None:
    name, answer, _ = FAMILIES["Hermes 3"]
    source, with_calls = with_tools(name, tool_choice=choice)
    deltas, _ = await read(source, [*answer], given=with_calls, slowly=True)
    added = [delta.tool.arguments for delta in deltas if delta.tool is not None]
    assert "".join(added) == ARGUMENTS
    assert max(map(len, added)) <= 2  # a letter, and a space that waited for it


async def test_a_call_that_nothing_enforces_arrives_once_it_is_whole() -> None:
    name, answer, expected = FAMILIES["Llama 3.1"]
    source, with_calls = with_tools(name)
    assert with_calls.constraint is None
    deltas, _ = await read(source, [*answer], given=with_calls)
    ((function, arguments),) = called(deltas)
    assert (function, json.loads(arguments)) == (expected["name"], expected["arguments"])
    assert deltas[-1].tool is not None


@pytest.mark.parametrize(
    "answer",
    [
        '{"name": "get_weather", "parameters": {"city": Paris}}',
        '{"name": "get_weather", "parameters": {"city": "Paris"',
        '{"name": "unknown", "parameters": {}}',
    ],
)
@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_what_is_no_call_is_text(answer: str, finish: Finish) -> None:
    source, with_calls = with_tools(FAMILIES["Llama 3.1"][0])
    deltas, _ = await read(source, [*answer], finish, given=with_calls)
    assert (said(deltas), called(deltas)) == (("", answer), [])
    assert [delta.finish for delta in deltas if delta.finish] == [finish]


@pytest.mark.parametrize("finish", ["stop", "length"])
async def test_a_call_that_is_cut_keeps_what_was_sent(finish: Finish) -> None:
    name, answer, _ = FAMILIES["Hermes 3"]
    source, with_calls = with_tools(name)
    deltas, _ = await read(source, [*answer[: answer.index("Paris") + 3]], finish, given=with_calls)
    assert called(deltas) == [("get_weather", '{"city": "Par')]
    assert (said(deltas)[1], deltas[-1].finish) == ("I will look.\n", finish)


@pytest.mark.parametrize(("most", "n"), [(None, 2), (1, 1)])
async def test_no_more_calls_than_the_request_permits(most: int | None, n: int) -> None:
    name, answer, expected = FAMILIES["Hermes 3"]
    source, with_calls = with_tools(name, parallel_tool_calls=True)
    both = answer + "\n" + answer.removeprefix("I will look.\n")
    deltas, _ = await read(source, [*both], given=replace(with_calls, most_calls=most))
    assert [name for name, _ in called(deltas)] == [expected["name"]] * n
    assert (said(deltas)[1], deltas[-1].finish) == ("I will look.\n", "tool_calls")


async def test_without_its_helper_a_call_ends() -> None:
    name, answer, _ = FAMILIES["Hermes 3"]
    source, with_calls = with_tools(name)
    parse, n = parsing(source), answer.index("Paris")

    async def dying(text: str, is_partial: bool) -> Message:
        if len(text) > n:
            raise HelperDied("SIGSEGV")
        return await parse(text, is_partial)

    deltas, _ = await read(source, [*answer], parse=dying, given=with_calls)
    assert (said(deltas)[1], deltas[-1].finish) == ("I will look.\n", "stop")
    assert [name for name, _ in called(deltas)] == ["get_weather"]


async def test_a_call_is_no_reasoning() -> None:
    pieces = ["<think>", "\n", "Hm", ".", "\n", "</think>", "\n\n", "<tool_call>", '\n{"name', '": "get_weather"']
    pieces += [', "arg', 'uments": {"ci', 'ty": "a b c d e f"}}', "\n</tool_call>"]
    source, with_calls = with_tools("Qwen-Qwen3-0.6B")
    deltas, reader = await read(source, pieces, given=with_calls, slowly=True)
    assert called(deltas) == [("get_weather", '{"city": "a b c d e f"}')]
    assert 2 <= reader.reasoning_tokens <= 4
