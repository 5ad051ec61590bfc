"""The helper of a runner: a real process, with templates and conversations that kill it."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from shared.channel.messages import Grammar, Schema
from tests.support.families import ARGUMENTS, PROMPTS, TEMPLATES, TOOL, template
from tests.support.service import Process, below, is_alive, wait_gone
from worker.chat.code import ChatCode, ChatError, Message
from worker.chat.constraint import ConstraintError
from worker.chat.handle import Helper, HelperDied
from worker.chat.helper import reading
from worker.chat.protocol import Constraint, Prompt, Template
from worker.engine.confine import confine

CPU_S = 1.0
MEMORY_BYTES = 300 << 20
MESSAGES = [{"role": "user", "content": "Hello"}]

# A template that a conversation can make do anything.
TRAP = """
{%- macro deeper() %}{{ deeper() }}{% endmacro %}
{%- set text = messages[0].content %}
{%- if text.startswith('crash') %}{{ deeper() }}{% endif %}
{%- if text.startswith('hang') %}
    {%- for i in range(1000000) %}{% for j in range(1000000) %}{% set x = i + j %}{% endfor %}{% endfor %}
{%- endif %}
{%- if text.startswith('fill') %}
    {%- set all = namespace(text='xxxxxxxx') %}
    {%- for i in range(40) %}{% set all.text = all.text ~ all.text %}{% endfor %}
{%- endif %}
{%- if text == 'reject' %}{{ raise_exception('not today') }}{% endif -%}
user: {{ text }}
assistant:"""


def conversation(text: str, **options: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": text}], **options}).encode()


@pytest.fixture
def helper() -> Iterator[Helper]:
    created = Helper(confine, cpu_s=CPU_S, memory_bytes=MEMORY_BYTES)
    yield created
    created.close()


@pytest.fixture
def trapped(helper: Helper) -> Helper:
    helper.compile(Template(source=TRAP)).result()
    return helper


def processes() -> list[Process]:
    """Return the zygote and its helper.  Other tests of this process may have started multiprocessing's own helpers."""
    return [p for p in below(os.getpid()) if not any("multiprocessing" in word for word in p.words)]


async def test_the_helper_renders_as_the_library(helper: Helper) -> None:
    source = (TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text()
    capabilities = helper.compile(Template(source=source)).result()
    templates = ChatCode().templates(source)
    assert capabilities == templates.capabilities
    prompt = await helper.render(conversation("Hello"))
    assert prompt.text == templates.render(conversation("Hello")).prompt
    assert prompt.source is not None
    message = await helper.parse(prompt.source, "<think>\nHm.\n</think>\n\nHello, Zoë!", partial=False)
    assert message == Message(content="Hello, Zoë!", reasoning_content="Hm.\n")


@pytest.mark.parametrize(
    ("options", "is_off"),
    [({}, False), ({"enable_thinking": True}, False), ({"enable_thinking": False}, True)],
    ids=["default", "on", "off"],
)
async def test_thinking_is_on_unless_a_client_turns_it_off(
    helper: Helper, options: dict[str, Any], is_off: bool
) -> None:
    helper.compile(Template(source=(TEMPLATES / "Qwen-Qwen3-0.6B.jinja").read_text())).result()
    prompt = await helper.render(conversation("Hello", **options))
    assert prompt.text.endswith("<think>\n\n</think>\n\n") == is_off


async def test_variables_of_a_client_reach_the_template(helper: Helper) -> None:
    source = "{{ preserve_reasoning }} {{ mood }} {{ enable_thinking }}{{ messages[0].content }}"
    helper.compile(Template(source=source)).result()
    prompt = await helper.render(conversation("!", chat_template_kwargs={"mood": "calm"}))
    assert prompt.text == "True calm False!"
    prompt = await helper.render(conversation("!", chat_template_kwargs={"preserve_reasoning": False}))
    assert prompt.text == "False  False!"


@pytest.mark.parametrize(
    ("source", "reason"), [("{% for %}", "Unexpected token"), ("{{ raise_exception('not today') }}", "not today")]
)
def test_a_template_that_does_not_render_is_an_error(helper: Helper, source: str, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        helper.compile(Template(source=source)).result()


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "its process was ended by SIGSEGV"),
        (TRAP.replace("'hang'", "''"), "it took longer than 1 s"),
        (TRAP.replace("'fill'", "''"), "it took "),  # memory, or time: llama.cpp renders it several times
    ],
    ids=["crash", "hang", "fill"],
)
def test_a_template_that_kills_the_helper_says_how(helper: Helper, source: str, reason: str) -> None:
    with pytest.raises(HelperDied, match=re.escape(reason)):
        helper.compile(Template(source=source)).result()


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("crash", "its process was ended by SIGSEGV"),
        ("hang", "it took longer than 1 s"),
        ("fill", "it took more than 300 MiB of memory"),
    ],
)
async def test_only_the_fatal_request_fails(trapped: Helper, text: str, reason: str) -> None:
    texts = ["Hello", text, "One", "Two"]
    first, fatal, *others = await asyncio.gather(
        *(trapped.render(conversation(text)) for text in texts), return_exceptions=True
    )
    assert isinstance(fatal, HelperDied)
    assert str(fatal) == reason
    rendered = [prompt.text for prompt in (first, *others) if not isinstance(prompt, BaseException)]
    assert rendered == [f"user: {text}\nassistant:" for text in ("Hello", "One", "Two")]


async def test_a_fatal_request_is_not_tried_again(trapped: Helper) -> None:
    with pytest.raises(HelperDied, match="SIGSEGV"):
        await trapped.render(conversation("crash"))
    await trapped.render(conversation("Hello"))
    before = processes()
    with pytest.raises(HelperDied, match="before"):
        await trapped.render(conversation("crash"))
    assert processes() == before
    with pytest.raises(HelperDied, match="SIGSEGV"):
        await trapped.render(conversation("crash, but another one"))


async def test_a_rejected_request_leaves_the_helper_alive(trapped: Helper) -> None:
    before = processes()
    for request, reason in [
        (conversation("reject"), "not today"),
        (b"{", "not valid"),
        (b'{"messages": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", "not valid"),
        (b'{"messages": [], "chat_template_kwargs": 3}', "not valid"),
    ]:
        with pytest.raises(ChatError, match=reason):
            await trapped.render(request)
    assert processes() == before


async def test_a_helper_that_was_killed_idle_costs_nothing(trapped: Helper) -> None:
    zygote, helper = processes()
    os.kill(helper.pid, signal.SIGKILL)
    wait_gone([helper])
    assert (await trapped.render(conversation("Hello"))).text == "user: Hello\nassistant:"
    assert processes()[0] == zygote


async def test_without_the_zygote_there_is_an_error(trapped: Helper) -> None:
    zygote, helper = processes()
    os.kill(zygote.pid, signal.SIGKILL)  # the helper dies with it
    wait_gone([helper])
    for _ in range(2):
        with pytest.raises(HelperDied, match="the process that starts helpers has ended"):
            await trapped.render(conversation("Hello"))


def test_the_processes_are_confined(trapped: Helper) -> None:
    zygote, helper = (Path(f"/proc/{process.pid}") for process in processes())
    assert [(path / "comm").read_text() for path in (zygote, helper)] == ["chat zygote\n", "chat helper\n"]
    for path, sockets in ((zygote, 2), (helper, 1)):
        assert re.search(r"^NoNewPrivs:\s+1$", (path / "status").read_text(), re.M)
        assert re.search(r"^Max core file size\s+0\s+0 ", (path / "limits").read_text(), re.M)
        targets = sorted(str(entry.readlink()).partition(":")[0] for entry in (path / "fd").iterdir())
        assert targets == ["/dev/null"] * 3 + ["socket"] * sockets
    (bytes_,) = re.findall(r"^Max address space\s+(\d+) ", (helper / "limits").read_text(), re.M)
    assert MEMORY_BYTES < int(bytes_) < MEMORY_BYTES + (4 << 30)
    assert (helper / "oom_score_adj").read_text() == "1000\n"


RUNNER = """
import os, sys
from worker.chat.handle import Helper
from worker.chat.protocol import Template
from worker.engine.confine import confine
helper = Helper(confine)
helper.compile(Template(source="Hello")).result()
if sys.argv[1] == "hangs":
    helper.compile(Template(source="{% for i in range(1000000000) %}{% endfor %}"))
print("started", flush=True)
if sys.argv[1] == "leaves":
    os._exit(0)
sys.stdin.read()
"""


@pytest.mark.parametrize("how", ["leaves", "is killed", "hangs"])
def test_the_helper_ends_with_its_runner(how: str) -> None:
    with subprocess.Popen([sys.executable, "-c", RUNNER, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as runner:
        assert runner.stdout is not None
        if how == "leaves":
            assert runner.stdout.read() == b"started\n"  # up to the end of the stream: the processes do not hold it
        else:
            assert runner.stdout.readline() == b"started\n"
            started = below(runner.pid)
            assert len(started) == 2
            runner.kill()
            wait_gone(started)
    assert not [process for process in processes() if is_alive(process)]


# How an answer is read


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("meta-llama-Llama-3.1-8B-Instruct", (True, True)),
        ("Qwen-Qwen2.5-7B-Instruct", (True, True)),
        ("Qwen-Qwen3-0.6B", (False, True)),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", (False, True)),
        ("CohereForAI-c4ai-command-r7b-12-2024-tool_use", (False, False)),
        ("openai-gpt-oss-120b", (False, False)),
    ],
)
def test_simple_parsers_are_recognised(name: str, expected: tuple[bool, bool]) -> None:
    templates = ChatCode().templates((TEMPLATES / f"{name}.jinja").read_text())
    assert reading(templates.render(conversation("Hello")).parser) == expected


ANSWERS = [
    "Hello",
    " \n Hello <think>\nor not </think> {} [] \n",
    "<think>\nHm. </think>\n\n <tool_call> Zoë </tool_call>",
    "[TOOL_CALLS][{}]",
    "<|channel|>final<|message|>x",
]


@pytest.mark.parametrize("name", sorted(path.stem for path in TEMPLATES.glob("*.jinja")))
@pytest.mark.parametrize("answer", ANSWERS)
def test_text_that_passes_is_read_alike(name: str, answer: str) -> None:
    code = ChatCode()
    rendered = code.templates((TEMPLATES / f"{name}.jinja").read_text()).render(conversation("Hello"))
    passes, is_open = reading(rendered.parser)
    parser = code.parser(rendered)
    if passes:
        assert parser.parse(answer.encode()) == Message(content=answer)
    if is_open:
        contents = [parser.parse(answer[:size].encode(), partial=True).content for size in range(len(answer) + 1)]
        for size, (content, longer) in enumerate(pairwise(contents)):
            if content.strip():
                assert longer == content + answer[size]


@pytest.mark.parametrize(
    ("effort", "known", "other"),
    [("low", "low", "low"), ("minimal", "minimal", "low"), ("xhigh", "xhigh", "high"), ("none", "none", "")],
)
async def test_an_effort_that_a_template_does_not_know_is_the_nearest(
    helper: Helper, effort: str, known: str, other: str
) -> None:
    source = "{{ reasoning_effort }}"
    for text, expected in ((source + f"{{# '{effort}' #}}", known), (source, other)):
        helper.compile(Template(source=text + "{{ messages[0].content }}")).result()
        prompt = await helper.render(conversation("!", chat_template_kwargs={"reasoning_effort": effort}))
        assert prompt.text == f"{expected}!"


# ---- tools

CALLED = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {
            "id": "call_0123456789abcdef",
            "type": "function",
            "function": {"name": "get_weather", "arguments": ARGUMENTS},
        }
    ],
}
ANSWERED = [*MESSAGES, CALLED, {"role": "tool", "tool_call_id": "call_0123456789abcdef", "content": "Sunny."}]


async def with_tools(helper: Helper, name: str, messages: list[Any] = MESSAGES, **options: Any) -> Prompt:
    helper.compile(Template(source=name if name == "chatml" else template(name))).result()
    return await helper.render(json.dumps({"messages": messages, **{"tools": [TOOL], **options}}).encode())


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("Qwen-Qwen3-0.6B", "gbnf"),
        ("deepseek-ai-DeepSeek-V3.1", "gbnf"),  # it has a form for calls, but lists no tools
        ("chatml", "lark"),
        ("google-gemma-2-2b-it", "lark"),  # it has no system messages
        ("ibm-granite-granite-3.3-2B-Instruct", "lark"),  # it lists tools, but llama.cpp reads no calls of it
    ],
)
@pytest.mark.parametrize("choice", ["auto", "required"])
async def test_a_prompt_lists_the_tools_and_enforces_calls(helper: Helper, name: str, kind: str, choice: str) -> None:
    prompt = await with_tools(helper, name, tool_choice=choice)
    assert prompt.text.count('"get_weather"') == 1
    assert prompt.constraint is not None
    assert (prompt.constraint.kind, prompt.constraint.lazy) == (kind, choice == "auto")
    assert prompt.most_calls is None


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("tools", [[TOOL], []])
async def test_earlier_calls_and_results_are_in_every_prompt(helper: Helper, name: str, tools: list[Any]) -> None:
    prompt = await with_tools(helper, name, ANSWERED, tools=tools)
    assert "Paris" in prompt.text
    assert "Sunny." in prompt.text


BRIEF, LATER = {"role": "system", "content": "Be brief."}, {"role": "system", "content": "The user is a pilot."}
ANSWER = {"role": "assistant", "content": "Hello!"}


@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("tools", [{"tools": [TOOL]}, {}], ids=["tools", "plain"])
async def test_every_system_message_is_in_every_prompt(helper: Helper, name: str, tools: dict[str, Any]) -> None:
    """Some templates refuse all but the first one, and others leave them out, or all but the last."""
    conversations: list[list[Any]] = [
        [BRIEF, LATER, *MESSAGES],
        [BRIEF, *MESSAGES, ANSWER, LATER, *MESSAGES],
        [*MESSAGES, BRIEF, {**LATER, "content": [{"type": "text", "text": LATER["content"]}]}],
    ]
    helper.compile(Template(source=template(name))).result()
    for messages in conversations:
        prompt = await helper.render(json.dumps({"messages": messages, **tools}).encode())
        assert "Be brief." in prompt.text
        assert "The user is a pilot." in prompt.text


@pytest.mark.parametrize("name", PROMPTS)
async def test_several_messages_of_the_user_are_in_every_prompt(helper: Helper, name: str) -> None:
    """Agents send what they know of their surroundings as a message of its own.  Some templates want turns."""
    pilot = {"role": "user", "content": [{"type": "text", "text": "I am a pilot."}]}
    helper.compile(Template(source=template(name))).result()
    for messages in ([BRIEF, pilot, *MESSAGES], [*MESSAGES, ANSWER, *MESSAGES, pilot]):
        prompt = await helper.render(json.dumps({"messages": messages}).encode())
        assert "I am a pilot." in prompt.text
        assert "Hello" in prompt.text


@pytest.mark.parametrize("name", ["Qwen3.5-4B", "openai-gpt-oss-120b", "MiniMax-M2"])
async def test_a_system_message_at_the_end_is_answered(helper: Helper, name: str) -> None:
    """Without it, the assistant's message is the last one, which would be continued."""
    helper.compile(Template(source=template(name))).result()
    late = json.dumps({"messages": [BRIEF, *MESSAGES, ANSWER, LATER]}).encode()
    users = json.dumps({"messages": [BRIEF, *MESSAGES, ANSWER, {**LATER, "role": "user"}]}).encode()
    assert (await helper.render(late)).text == (await helper.render(users)).text


async def test_a_late_system_message_stays_where_it_may(helper: Helper) -> None:
    helper.compile(Template(source="chatml")).result()
    prompt = await helper.render(json.dumps({"messages": [*MESSAGES, LATER]}).encode())
    assert prompt.text.index("Hello") < prompt.text.index("The user is a pilot.")


async def test_ids_of_calls_are_those_that_the_model_knows(helper: Helper) -> None:
    kimi = await with_tools(helper, "moonshotai-Kimi-K2", ANSWERED)
    assert kimi.text.count("functions.get_weather:0") == 2
    nemo = await with_tools(helper, "mistralai-Mistral-Nemo-Instruct-2407", ANSWERED)
    (id_,) = re.findall(r'"id": "([^"]*)"', nemo.text)
    assert re.fullmatch("[a-zA-Z0-9]{9}", id_)
    assert f'"call_id": "{id_}"' in nemo.text


async def test_arguments_that_are_no_json_are_rendered_as_text(helper: Helper) -> None:
    broken = json.loads(json.dumps(ANSWERED).replace(json.dumps(ARGUMENTS), json.dumps('{"city": "Par')))
    assert "Par" in (await with_tools(helper, "Qwen3-Coder", broken)).text


async def test_a_strict_schema_is_enforced_or_in_the_general_form(helper: Helper) -> None:
    """Forms that write text without quotes take any text for one of a few."""
    parameters = {"type": "object", "properties": {"sky": {"enum": ["clear", "grey"]}}}
    for is_strict, kind in ((False, "gbnf"), (True, "lark")):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters, "strict": is_strict}}
        prompt = await with_tools(helper, "Qwen3-Coder", tools=[tool])
        assert prompt.constraint is not None
        assert prompt.constraint.kind == kind
        prompt = await with_tools(helper, "Qwen-Qwen3-0.6B", tools=[tool])
        assert prompt.constraint is not None
        assert prompt.constraint.kind == "gbnf"


async def test_one_odd_keyword_leaves_the_rest_enforced(helper: Helper) -> None:
    """What cannot be enforced at all, such as a pattern that looks around, frees all calls instead."""
    odd: dict[str, Any] = json.loads(json.dumps(TOOL))
    odd["function"]["parameters"]["properties"]["city"]["not"] = {"const": "Rome"}
    free: dict[str, Any] = json.loads(json.dumps(TOOL))
    free["function"]["parameters"]["properties"]["city"]["pattern"] = "(?=P)P"
    for tool, is_enforced in ((odd, True), (free, False)):
        assert bool((await with_tools(helper, "chatml", tools=[tool])).constraint) == is_enforced
        with pytest.raises(ConstraintError):
            await with_tools(helper, "chatml", tools=[tool], tool_choice="required")


@pytest.mark.parametrize(
    ("answer", "content", "calls"),
    [
        ("Hi <tool", "Hi <tool", []),
        ("Hi\n{}", "Hi\n", [ARGUMENTS]),
        ("{}\n{}", "", [ARGUMENTS, ARGUMENTS]),
        ("{} and so on", None, []),
        ("{}{}x", None, []),
        ('<tool_call>\n{"name": "get_weather"}\n</tool_call>', None, []),
        ("<tool_call>\n", None, []),
    ],
)
async def test_calls_in_the_general_form_are_read(
    helper: Helper, answer: str, content: str | None, calls: list[str]
) -> None:
    prompt = await with_tools(helper, "chatml")
    assert prompt.source is not None
    text = answer.replace("{}", f'<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>')
    message = await helper.parse(prompt.source, text, partial=False)
    assert message.content == (text if content is None else content)
    assert [call.function.arguments for call in message.tool_calls] == calls


async def test_every_beginning_of_a_call_in_the_general_form_is_read(helper: Helper) -> None:
    prompt = await with_tools(helper, "chatml")
    assert prompt.source is not None
    text = f'Hi\n<tool_call>\n{{"name": "get_weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
    content = arguments = ""
    for size in range(len(text)):
        message = await helper.parse(prompt.source, text[:size], partial=True)
        assert message.content.startswith(content)
        content = message.content
        for call in message.tool_calls:
            assert call.function.arguments.startswith(arguments)
            arguments = call.function.arguments
    assert (content, arguments) == ("Hi\n", ARGUMENTS)


# ---- constraints


def chained(n: int) -> bytes:
    """Return a schema whose compilation overflows the stack."""
    links = {f"d{i}": {"$ref": f"#/$defs/d{i + 1}"} for i in range(n)}
    return json.dumps({"$ref": "#/$defs/d0", "$defs": {**links, f"d{n}": {}}}).encode()


SLOW = {"type": "string", "allOf": [{"pattern": f"^.*a.{{{i}}}$"} for i in range(40)]}  # for minutes


@pytest.mark.parametrize(
    ("schema", "reason"),
    [(json.dumps(SLOW).encode(), "longer than"), (chained(20_000), "SIGSEGV|SIGABRT")],
    ids=["slow", "deep"],
)
async def test_a_hostile_schema_costs_only_its_helper(trapped: Helper, schema: bytes, reason: str) -> None:
    with pytest.raises(ConstraintError, match=reason):
        await trapped.render(conversation("Hello"), Schema(schema))
    with pytest.raises(ConstraintError, match="before"):
        await trapped.render(conversation("Hello again"), Schema(schema))
    prompt = await trapped.render(conversation("Hello"), Schema(b"{}"))
    assert prompt.constraint == Constraint(kind="json_schema", text="{}")


@pytest.mark.parametrize(
    ("schema", "is_enforced"),
    [
        ({"enum": [f"value {i}" for i in range(20_000)]}, True),
        ({"type": "array", "minItems": 100_000}, True),
        ({"type": "string", "maxLength": 10**9}, True),
        ({"type": "string", "pattern": "^(a+)+$"}, True),
        ({"type": "string", "pattern": "(x+x+)+y" * 50}, True),
        ({"type": "string", "pattern": "((a{0,100}){0,100}){0,100}"}, True),
        ({"type": "string", "pattern": "(" * 5000 + "a" + ")" * 5000}, False),
    ],
    ids=["choices", "items", "length", "stars", "plus", "counts", "parentheses"],
)
async def test_a_large_schema_is_bounded(trapped: Helper, schema: Any, is_enforced: bool) -> None:
    before = processes()
    if is_enforced:
        assert await trapped.render(conversation("Hello"), Schema(json.dumps(schema).encode()))
    else:
        with pytest.raises(ConstraintError):
            await trapped.render(conversation("Hello"), Schema(json.dumps(schema).encode()))
    assert [p.pid for p in processes()] == [p.pid for p in before]


@pytest.mark.parametrize(
    ("template", "options", "expected"),
    [
        ("Qwen-Qwen3-0.6B", {}, {"thinking_start": "<think>", "thinking_ends": ["</think>"]}),
        ("Qwen-Qwen3-0.6B", {"enable_thinking": False}, {"thinking_ends": ["</think>"]}),
        ("deepseek-ai-DeepSeek-R1-Distill-Qwen-32B", {}, {"is_thinking": True, "thinking_ends": ["</think>"]}),
        ("openai-gpt-oss-120b", {}, {"is_thinking": True, "thinking_ends": ["<|channel|>final<|message|>"]}),
    ],
)
async def test_reasoning_comes_before_the_form(
    helper: Helper, template: str, options: dict[str, Any], expected: dict[str, Any]
) -> None:
    helper.compile(Template(source=(TEMPLATES / f"{template}.jinja").read_text())).result()
    prompt = await helper.render(conversation("Hello", **options), Grammar('root ::= "a"'))
    assert prompt.constraint == Constraint(kind="gbnf", text='root ::= "a"', **expected)
