"""Tools in conversations and answers: what the template of a model does not do itself.

A template that knows no tools gets one generic form.  The system prompt lists the tools, and a call is an object with
`name` and `arguments` between tags, which a grammar enforces.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator
from typing import Any, Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from worker.chat.code import Function, Message, Rendered, ToolCall, Trigger
from worker.chat.constraint import OPTIONS, tidy, trim
from worker.chat.protocol import Constraint

OPEN, CLOSE = "<tool_call>", "</tool_call>"
RESULT, RESULT_END = "<tool_response>", "</tool_response>"
LISTED = "You may call these functions, one JSON object per line:\n<tools>\n{}\n</tools>"
HOW = (
    "To call a function, write its name and its arguments as JSON between tags, and nothing after it:\n"
    f'{OPEN}\n{{"name": "the name", "arguments": {{"a parameter": "its value"}}}}\n{CLOSE}'
)
BEGUN = re.compile(r'\s*\{"name": ("(?:[^"\\]|\\.)*"), "arguments": ')
ENDED = re.compile(rf"\}}\s*{CLOSE}")
SPACED = {**OPTIONS, "item_separator": ", ", "key_separator": ": "}  # as models write JSON
LENIENT = {**SPACED, "lenient": True, "coerce_one_of": True}  # enforces as much of a schema as is possible
KIMI = "<|tool_call_argument_begin|>"  # in templates whose models count their calls

Conversation = dict[str, Any]  # its messages decoded, its other fields as they are


class Asked(Struct, frozen=True):
    """What a conversation says of tools."""

    tools: list[dict[str, Any]] = []
    tool_choice: Literal["auto", "required"] = "auto"
    parallel_tool_calls: bool = True

    @property
    def is_required(self) -> bool:
        return self.tool_choice == "required"


def mentions_tools(conversation: bytes) -> bool:
    """Return whether a conversation may have tools, calls or results."""
    return b'"tool' in conversation


def fitted(conversation: Conversation, asked: Asked, capabilities: dict[str, bool], template: str) -> Conversation:
    """Return a conversation for a template that has a form for calls."""
    if KIMI in template:
        conversation = counted(conversation)
    if not capabilities["supports_tool_calls"]:  # it may list tools, but drops calls
        conversation = told(conversation)
    elif asked.tools and not capabilities["supports_tools"]:
        conversation = listed(conversation, asked)
    is_parallel = asked.parallel_tool_calls and capabilities["supports_parallel_tool_calls"]
    return {**conversation, "parallel_tool_calls": is_parallel}


def has_form(rendered: Rendered, asked: Asked, capabilities: dict[str, bool]) -> bool:
    """Return whether the template has a form for calls that llama.cpp can read, and enforce as far as is asked."""
    if not all(_is_enforced(tool["function"], rendered.grammar) for tool in asked.tools):
        return False
    if asked.is_required:
        return bool(rendered.grammar) and not rendered.grammar_lazy
    return bool(rendered.grammar) or capabilities["supports_tool_calls"]


def _is_enforced(function: dict[str, Any], grammar: str) -> bool:
    """Return whether a GBNF grammar enforces a strict schema.  Forms that write text without quotes allow any text."""
    texts = [json.dumps(text, ensure_ascii=False) for text in _texts(function["parameters"])]
    literals = [json.dumps(text, ensure_ascii=False)[1:-1] for text in texts]
    return not function.get("strict") or (bool(grammar) and all(literal in grammar for literal in literals))


def _texts(schema: Any) -> Iterator[str]:
    """Yield the texts that a schema enumerates."""
    todo = [schema]
    while todo:
        each = todo.pop()
        if isinstance(each, list):
            todo += each
        elif isinstance(each, dict):
            values = [*each.get("enum", []), each.get("const")]
            yield from (value for value in values if isinstance(value, str))
            todo += each.values()


def generic(conversation: Conversation, asked: Asked) -> Conversation:
    """Return a conversation for a template that has no form for calls."""
    conversation = told(listed(conversation, asked, HOW) if asked.tools else conversation)
    return {key: value for key, value in conversation.items() if key not in Asked.__struct_fields__}


def listed(conversation: Conversation, asked: Asked, *more: str) -> Conversation:
    """Return a conversation whose system prompt lists the tools, and says more."""
    functions = "\n".join(json.dumps(tool["function"], ensure_ascii=False) for tool in asked.tools)
    text = "\n\n".join([LISTED.format(functions), *more, *(["Answer with a call."] if asked.is_required else [])])
    system, *rest = conversation["messages"]
    if system["role"] != "system":
        system, rest = {"role": "system", "content": ""}, conversation["messages"]
    return {**conversation, "messages": [with_text(system, text), *rest]}


def told(conversation: Conversation) -> Conversation:
    """Return a conversation whose calls and results are text in the generic form."""
    messages: list[dict[str, Any]] = []
    for message in conversation["messages"]:
        match message:
            case {"role": "tool", "content": content}:
                text = f"{RESULT}\n{text_of(content)}\n{RESULT_END}"
                if messages and messages[-1]["role"] == "user":
                    messages[-1] = with_text(messages[-1], text, "\n")
                else:
                    messages.append({"role": "user", "content": text})
            case {"role": "user"} if messages and messages[-1]["role"] == "user" and _is_result(messages[-1]):
                messages[-1] = with_text(messages[-1], text_of(message["content"]))
            case {"tool_calls": [*calls]}:
                said = {key: value for key, value in message.items() if key != "tool_calls"}
                messages.append(with_text(said, "\n".join(map(_written, calls)), "\n"))
            case _:
                messages.append(message)
    return {**conversation, "messages": messages}


def grammar(asked: Asked, rendered: Rendered) -> Constraint:
    """Return the constraint on an answer in the generic form: on calls once one has begun, or on all of it.

    Where a call is demanded or a schema is strict, all of the schema is enforced.  Raises ConstraintError.
    """
    again = "" if not asked.parallel_tool_calls else ' ("\\n" call)*'
    rules = [f"start: call{again}"]
    calls = []
    for i, tool in enumerate(asked.tools):
        function = tool["function"]
        beginning = f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": '
        must_match = asked.is_required or function.get("strict")
        (trim if must_match else tidy)(function["parameters"])
        schema = {**function["parameters"], "x-guidance": SPACED if must_match else LENIENT}
        rules += [f"arguments_{i}: %json {json.dumps(schema)}"]
        calls.append(f"{json.dumps(beginning)} arguments_{i} {json.dumps('}' + chr(10) + CLOSE)}")
    rules.append("call: " + "\n  | ".join(calls))
    return Constraint(
        kind="lark",
        text="\n".join(rules),
        lazy=not asked.is_required,
        is_optional=not asked.is_required and not any(tool["function"].get("strict") for tool in asked.tools),
        triggers=[Trigger("word", OPEN)],
    )


def constraint(rendered: Rendered) -> Constraint | None:
    """Return llama.cpp's constraint on calls."""
    if not rendered.grammar:
        return None
    own = Constraint(kind="gbnf", text=rendered.grammar, shown=rendered.preserved_tokens)
    if not rendered.grammar_lazy:  # such a grammar begins with the end of the prompt, and has the reasoning
        return replace(own, prefix=rendered.generation_prompt)
    return _after_reasoning(replace(own, lazy=True, triggers=rendered.triggers), rendered)


def _after_reasoning(constraint: Constraint, rendered: Rendered) -> Constraint:
    begun = rendered.generation_prompt.rfind(rendered.thinking_start) if rendered.thinking_start else -1
    ended = max((rendered.generation_prompt.rfind(end) for end in rendered.thinking_ends), default=-1)
    return replace(
        constraint,
        is_thinking=begun > ended,
        thinking_start=rendered.thinking_start,
        thinking_ends=rendered.thinking_ends,
    )


def read(message: Message, *, partial: bool) -> Message:
    """Tell the calls in the content of a message from the rest.  A content that is not well-formed stays as it is."""
    content, opened, rest = message.content.partition(OPEN)
    if not opened:
        return replace(message, content=content[: len(content) - _overlap(content)]) if partial else message
    calls = []
    while opened:
        begun = BEGUN.match(rest)
        arguments, end = _value(rest[begun.end() :]) if begun else ("", None)
        if begun:
            calls.append(ToolCall(Function(json.loads(begun[1]), arguments)))
        ended = ENDED.match(rest, begun.end() + end) if begun and end is not None else None
        if ended is None:
            break
        between, opened, rest = rest[ended.end() :].partition(OPEN)
        if between.strip():
            ended = None
            break
    if not partial and ended is None:
        return message
    return replace(message, content=content, tool_calls=calls)


def _value(text: str) -> tuple[str, int | None]:
    """Return the JSON at the beginning of a text, and its end; None if it is not whole."""
    try:
        _, end = json.JSONDecoder().raw_decode(text)
    except (ValueError, RecursionError):
        return text, None
    return text[:end], end


def _overlap(content: str) -> int:
    """Return the length of the longest end of a text with which OPEN begins."""
    return next((n for n in range(len(OPEN) - 1, 0, -1) if content.endswith(OPEN[:n])), 0)


def _written(call: dict[str, Any]) -> str:
    function = call["function"]
    return f'{OPEN}\n{{"name": {json.dumps(function["name"])}, "arguments": {function["arguments"]}}}\n{CLOSE}'


def _is_result(message: dict[str, Any]) -> bool:
    return text_of(message["content"]).endswith(RESULT_END)


def text_of(content: Any) -> str:
    """Return the text of a content, which may have parts."""
    return content if isinstance(content, str) else "\n".join(part["text"] for part in content)


def with_text(message: dict[str, Any], text: str, between: str = "\n\n") -> dict[str, Any]:
    """Return a message with a text after its own."""
    before = text_of(message.get("content") or "")
    return {**message, "content": f"{before}{between}{text}" if before else text}


# ---- ids and arguments of earlier calls


def counted(conversation: Conversation) -> Conversation:
    """Return a conversation whose calls have ids such as "functions.name:0", as Kimi's models write them."""
    ids: dict[str, str] = {}

    def id_of(id_: str, name: str) -> str:
        return ids.setdefault(id_, f"functions.{name}:{len(ids)}")

    return _with_ids(conversation, id_of)


def repaired(conversation: Conversation) -> Conversation:
    """Return a conversation that more templates accept.

    Ids have nine letters and digits, as Mistral's templates require.  Arguments that are not JSON are the member of an
    object, since templates iterate over members.
    """

    def id_of(id_: str, _: str) -> str:
        return hashlib.sha256(id_.encode()).hexdigest()[:9]

    repaired = _with_ids(conversation, id_of)
    for call in _calls(repaired["messages"]):
        try:
            json.loads(call["function"]["arguments"])
        except (ValueError, RecursionError):
            call["function"]["arguments"] = json.dumps({"arguments": call["function"]["arguments"]})
    return repaired


def _with_ids(conversation: Conversation, id_of: Callable[[str, str], str]) -> Conversation:
    messages = msgspec.json.decode(msgspec.json.encode(conversation["messages"]))
    ids = {}
    for call in _calls(messages):
        name = call["function"]["name"]
        ids[call.get("id", "")] = call["id"] = id_of(call.get("id", ""), name)
    for message in messages:
        if message.get("tool_call_id") in ids:
            message["tool_call_id"] = ids[message["tool_call_id"]]
    return {**conversation, "messages": messages}


def _calls(messages: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    for message in messages:
        yield from message.get("tool_calls", [])
