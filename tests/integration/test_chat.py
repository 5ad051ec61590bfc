"""llama.cpp's chat code through `native/chat.cpp`: what it renders and parses, and what bad input does to it."""

from __future__ import annotations

import ctypes
import hashlib
import json
import shutil
import subprocess
import sys
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from msgspec.structs import replace

from tests.support.families import ARGUMENTS, FAMILIES, TEMPLATES, TOOL, template
from worker.chat.code import LIBRARY, ChatCode, ChatError, ChatUnavailable, Rendered, installed

BOS, EOS = "<|endoftext|>", "<|im_end|>"

# The first 16 digits of the SHA-256 of what llama-server 0c1e57098 answers to POST /apply-template with each template
# (--jinja --chat-template-file), a vocabulary with the tokens above that adds none, and the conversations below.
# Today's date reads DATE.  Null: it rejects the conversation.
PROMPTS: dict[str, dict[str, str | None]] = json.loads(Path(__file__).with_name("chat_prompts.json").read_text())

MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": 'Hello, Zoë! 3 < 5 & "x"'},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "What is the weather in Paris?"},
]
RESULT = [
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "call00001", "type": "function", "function": {"name": "get_weather", "arguments": ARGUMENTS}}
        ],
    },
    {"role": "tool", "tool_call_id": "call00001", "name": "get_weather", "content": '{"sky": "clear"}'},
]
KWARGS = {"datetime": "Jan 01 2026", "date_string": "01 Jan 2026", "preserve_reasoning": True}
CONVERSATIONS: dict[str, dict[str, Any]] = {
    "plain": {"messages": MESSAGES},
    "tools": {"messages": MESSAGES, "tools": [TOOL]},
    "result": {"messages": MESSAGES + RESULT, "tools": [TOOL]},
}


@pytest.fixture(scope="module")
def code() -> ChatCode:
    return ChatCode()


def encoded(**request: Any) -> bytes:
    return json.dumps(request).encode()


def rendered(code: ChatCode, name: str, **request: Any) -> Rendered:
    return code.templates(template(name)).render(encoded(**{"messages": MESSAGES, **request}))


# What llama.cpp renders


def test_the_templates_are_those_of_the_engine() -> None:
    assert {path.stem for path in TEMPLATES.glob("*.jinja")} == set(PROMPTS)


@pytest.mark.parametrize("name", PROMPTS)
def test_a_template_renders_as_in_llama_server(code: ChatCode, name: str) -> None:
    templates = code.templates(template(name), bos_token=BOS, eos_token=EOS)
    thinking = templates.capabilities["supports_thinking"]  # llama-server's default
    for conversation, expected in PROMPTS[name].items():
        request = encoded(**CONVERSATIONS[conversation], enable_thinking=thinking, chat_template_kwargs=KWARGS)
        if expected is None:
            with pytest.raises(ChatError, match="roles must alternate"):
                templates.render(request)
            continue
        today = datetime.now().date()  # local time, as strftime_now
        prompt = templates.render(request).prompt.replace(today.isoformat(), "DATE")
        assert hashlib.sha256(prompt.encode()).hexdigest()[:16] == expected, (conversation, prompt)


def test_capabilities_tell_templates_apart(code: ChatCode) -> None:
    qwen, gemma = (code.templates(template(name)).capabilities for name in ("Qwen-Qwen3-0.6B", "google-gemma-2-2b-it"))
    assert qwen["supports_tools"]
    assert qwen["supports_thinking"]
    assert not gemma["supports_tools"]
    assert not gemma["supports_thinking"]
    assert not gemma["supports_system_role"]


def test_a_forced_tool_has_a_grammar_that_is_not_lazy(code: ChatCode) -> None:
    free, forced = (
        rendered(code, "Qwen-Qwen3-0.6B", tools=[TOOL], tool_choice=choice) for choice in ("auto", "required")
    )
    assert free.grammar_lazy
    assert [trigger.value for trigger in free.triggers] == ["<tool_call>\n"]
    assert not forced.grammar_lazy
    assert "get_weather" in forced.grammar


def test_a_schema_becomes_a_grammar(code: ChatCode) -> None:
    grammar = code.grammar(b'{"type": "object", "properties": {"age": {"type": "integer"}}, "required": ["age"]}')
    assert "root ::=" in grammar
    assert '\\"age\\"' in grammar
    assert "age" in rendered(code, "Qwen-Qwen3-0.6B", json_schema={"properties": {"age": {"type": "integer"}}}).grammar


# An answer that continues the last message


@pytest.mark.parametrize("name", PROMPTS)
def test_a_last_message_of_the_assistant_is_continued(code: ChatCode, name: str) -> None:
    templates = code.templates(template(name))
    begun = [*MESSAGES, {"role": "assistant", "content": "It is sunny"}]
    requests = [encoded(messages=begun, **option) for option in ({}, {"continue_final_message": True})]
    first, second = (templates.render(request) for request in requests)
    assert first == second
    assert first.prompt.endswith("It is sunny")
    assert "What is the weather in Paris?" in first.prompt


@pytest.mark.parametrize("option", [{"add_generation_prompt": True}, {"continue_final_message": False}])
@pytest.mark.parametrize("name", ["meta-llama-Llama-3.1-8B-Instruct", "Qwen-Qwen3-0.6B", "openai-gpt-oss-120b"])
def test_another_message_follows_the_last_one(code: ChatCode, name: str, option: dict[str, Any]) -> None:
    begun = [*MESSAGES, {"role": "assistant", "content": "It is sunny"}]
    found = code.templates(template(name)).render(encoded(messages=begun, **option))
    before, _, generated = found.prompt.rpartition(found.generation_prompt)
    assert "It is sunny" in before
    assert (bool(found.generation_prompt), generated) == (True, "")


def test_reasoning_is_continued(code: ChatCode) -> None:
    begun = {"role": "assistant", "content": "", "reasoning_content": "Let me see"}
    prompt = rendered(code, "Qwen-Qwen3-0.6B", messages=[*MESSAGES, begun])
    assert prompt.prompt.endswith("<think>\nLet me see")
    message = code.parser(prompt).parse(b": Paris.\n</think>\n\nSunny.")
    assert message.reasoning_content.strip() == "Let me see: Paris."
    assert message.content == "Sunny."


# What llama.cpp reads in an answer


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tool_call_is_parsed(code: ChatCode, family: str) -> None:
    name, answer, expected = FAMILIES[family]
    message = code.parser(rendered(code, name, tools=[TOOL])).parse(answer.encode())
    (found,) = message.tool_calls
    assert {
        "content": message.content.strip(),
        "reasoning": message.reasoning_content.strip(),
        "name": found.function.name,
        "arguments": json.loads(found.function.arguments),
    } == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_every_beginning_of_an_answer_is_parsed(code: ChatCode, family: str) -> None:
    name, answer, expected = FAMILIES[family]
    parser = code.parser(rendered(code, name, tools=[TOOL]))
    whole = answer.encode()
    reasoning = ""
    for size in range(len(whole) + 1):  # cuts UTF-8 sequences too
        message = parser.parse(whole[:size], partial=True)
        assert message.reasoning_content.startswith(reasoning.rstrip())
        reasoning = message.reasoning_content
    assert reasoning.strip() == expected["reasoning"]


def test_a_whole_answer_in_another_format_is_an_error(code: ChatCode) -> None:
    parser = code.parser(rendered(code, "Qwen-Qwen3-0.6B", tools=[TOOL]))
    with pytest.raises(ChatError, match="does not match the expected peg-native format"):
        parser.parse(b'<tool_call>\n{"name": "no_such_tool", "arguments": {}}\n</tool_call>')


# Bad input


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("", "must not be empty"),
        ("{% for %}", "Unexpected token"),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ messages | no_such_filter }}", "no_such_filter"),
        ("{{ 'open", "unexpected end of input"),
    ],
)
def test_a_broken_template_is_an_error(code: ChatCode, source: str, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        code.templates(source).render(encoded(messages=MESSAGES))


@pytest.mark.parametrize(
    ("request_", "reason"),
    [
        (b"", "parse error"),
        (b"{", "parse error"),
        (b"\xff", "parse error"),
        (b"[]", "must be a JSON object"),
        (b"{}", "messages"),
        (b'{"messages": 3}', "Expected 'messages' to be an array"),
        (b'{"messages": [3]}', "Expected 'message' to be an object"),
        (b'{"messages": [{"role": 3, "content": ""}]}', "must be string"),
        (b'{"messages": [{"role": "user", "content": {}}]}', "Invalid 'content' type"),
        (b'{"messages": [], "tools": 3}', "Expected 'tools' to be an array"),
        (b'{"messages": [], "tools": [{"type": "function", "function": {}}]}', "name"),
        (b'{"messages": [], "tool_choice": "perhaps"}', "Invalid tool_choice"),
        (b'{"messages": [], "enable_thinking": "yes"}', "`enable_thinking` must be true or false"),
        (b'{"messages": [], "chat_template_kwargs": []}', "must be an object"),
        (b'{"messages": [], "reasoning_format": "odd"}', "Unknown reasoning format"),
        (b'{"messages": [], "continue_final_message": true}', "needs a last message of the assistant"),
        (
            b'{"messages": [{"role": "assistant", "content": "a"}, {"role": "assistant", "content": "b"}]}',
            "must not both be the assistant's",
        ),
        (
            b'{"messages": [{"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": '
            b'{"name": "f", "arguments": "{}"}}]}]}',
            "cannot be continued if it has tool calls",
        ),
    ],
)
def test_a_bad_request_is_an_error(code: ChatCode, request_: bytes, reason: str) -> None:
    with pytest.raises(ChatError, match=reason):
        code.templates(template("Qwen-Qwen3-0.6B")).render(request_)


@pytest.mark.parametrize("schema", [b"", b"{", b"3", b'{"type": "no such type"}', b'{"$ref": "#/nowhere"}'])
def test_a_bad_schema_is_an_error(code: ChatCode, schema: bytes) -> None:
    with pytest.raises(ChatError):
        code.grammar(schema)


@pytest.mark.parametrize(("field", "value"), [("format", "no such format"), ("parser", "{"), ("parser", "[3]")])
def test_a_bad_parser_is_an_error(code: ChatCode, field: str, value: str) -> None:
    with pytest.raises(ChatError):
        code.parser(replace(rendered(code, "Qwen-Qwen3-0.6B"), **{field: value}))


@pytest.mark.parametrize("function", ["templates", "parser"])
@pytest.mark.parametrize("request_", [b"", b"{", b"\xff\xfe", b"[]", b"null", b'{"template": 3, "format": 3}'])
def test_the_library_itself_refuses_a_bad_request(function: str, request_: bytes) -> None:
    library = ctypes.CDLL(str(installed() / LIBRARY))
    call = library[f"loadstone_chat_{function}"]
    call.restype = ctypes.c_void_p
    handle = ctypes.c_void_p(1)
    reply = ctypes.string_at(call(request_, ctypes.byref(handle)))
    assert json.loads(reply)["error"]
    assert not handle


HOSTILE = """
import json, sys
from tests.support.families import ARGUMENTS, FAMILIES, TEMPLATES, TOOL, template
from worker.chat.code import LIBRARY, ChatCode, ChatError
code, many = ChatCode(), 50_000
messages = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
nested = b"[" * many + b"]" * many
chatml = code.templates("chatml")
try:
    match sys.argv[1]:
        case "template": code.templates("{{ " + "(" * many + ")" * many + " }}").render(messages)
        case "brackets": code.templates("{{ " + "[" * many + "]" * many + " }}").render(messages)
        case "ifs": code.templates("{% if true %}" * many + "{% endif %}" * many).render(messages)
        case "macro": code.templates("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}").render(messages)
        case "request": chatml.render(b'{"messages": ' + nested + b"}")
        case "kwargs": chatml.render(messages[:-1] + b', "chat_template_kwargs": {"x": ' + nested + b"}}")
        case "schema": code.grammar(b'{"items": ' * many + b"{}" + b"}" * many)
        case "answer": code.parser(chatml.render(messages)).parse(nested)
except ChatError as error:
    print("refused")
else:
    print("done")
"""


@pytest.mark.parametrize("what", ["template", "brackets", "ifs", "macro", "request", "kwargs", "schema", "answer"])
def test_deep_nesting_is_an_error_or_ends_the_process(what: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", HOSTILE, what], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stdout in ("refused\n", "done\n") or done.returncode < 0, done


# The library and the engine


def test_without_the_library_the_reason_is_given(tmp_path: Path) -> None:
    with pytest.raises(ChatUnavailable, match="built without"):
        ChatCode(tmp_path)


def test_a_library_for_another_engine_is_not_called(tmp_path: Path) -> None:
    """The other library has none of the functions but the one that says what it was built for."""
    source = tmp_path / "other.c"
    source.write_text(
        'const char *loadstone_chat_commit(void) { return "1234567"; }\n'
        'const char *ggml_commit(void) { return "7654321"; }\n'
    )
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    assert compiler is not None
    subprocess.run([compiler, "-shared", "-fPIC", "-o", tmp_path / "libloadstone_chat.so", source], check=True)
    with pytest.raises(ChatUnavailable, match=r"built for llama\.cpp 1234567, but llama\.cpp 7654321 is installed"):
        ChatCode(tmp_path)


def test_rendering_gives_its_memory_back(code: ChatCode) -> None:
    """A leak of each returned text would add 100 MB."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    templates = code.templates("{{ messages[0].content }}")
    request = encoded(messages=[{"role": "user", "content": "x" * 100_000}])
    templates.render(request)
    before = resident()
    for _ in range(1000):
        templates.render(request)
    assert resident() - before < 30e6
