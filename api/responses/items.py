"""The input of a response: items, and the messages that they make.

What a turn of the assistant consists of are several items: its reasoning, its text and its calls.  Items of kinds that
this server does not have are left out: clients send back the whole of a conversation, also with another server.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from api.decode import known
from api.openai.request import MOST_PIECES, CalledFunction, Message, Part, ToolCall, arguments
from shared.errors import InvalidValue, MissingParameter, NotSupported
from shared.telemetry import log

TEXTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")  # types of parts with a text
IGNORED = frozenset(  # types of items that other servers make themselves
    ("web_search_call", "file_search_call", "code_interpreter_call", "computer_call", "computer_call_output")
) | {"image_generation_call", "mcp_call", "mcp_list_tools", "mcp_approval_request", "mcp_approval_response"}


class _Part(Struct, frozen=True):
    type: str
    text: str | None = None
    refusal: str | None = None


class _Head(Struct, frozen=True):
    type: str | None = None
    role: str | None = None


class _Message(Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]


class _Call(Struct, frozen=True):
    call_id: str
    name: str
    arguments: str


class _CustomCall(Struct, frozen=True):
    call_id: str
    name: str
    input: str


class _ShellCall(Struct, frozen=True):
    action: msgspec.Raw
    id: str | None = None
    call_id: str | None = None


class _Result(Struct, frozen=True):
    call_id: str
    output: str | list[_Part]


class _ShellResult(Struct, frozen=True):
    output: str
    id: str | None = None
    call_id: str | None = None


class _Reasoning(Struct, frozen=True):
    summary: list[_Part] | None = None
    content: list[_Part] | None = None


Items = Annotated[
    str | list[msgspec.Raw],
    Meta(description="What the model answers: a text of the user, or a list of items, oldest first."),
]


def messages(given: str | list[msgspec.Raw], earlier: list[Message]) -> list[Message]:
    """Return earlier messages, and after them those of an input.

    Raises MissingParameter, InvalidType and InvalidValue, and NotSupported for what would change the answer if it were
    left out.
    """
    if isinstance(given, str):
        return [*earlier, Message(role="user", content=given)]
    made = Conversation(earlier)
    for i, raw in enumerate(given):
        _add(made, bytes(raw), f"input[{i}]")
        made.check_size(len(given) - i - 1)
    if made.ignored:
        log.get("api").info("items ignored", action="items_ignored", types=sorted(made.ignored))
    found = made.whole()
    if len(found) == len(earlier):
        raise InvalidValue("'input': expected a text, or a list with at least one item.", param="input")
    return found


class Conversation:
    """Messages, of which the assistant's are put together from several items."""

    def __init__(self, earlier: list[Message]) -> None:
        self.ignored = set[str]()  # types of the items that were left out
        self._messages = [*earlier]
        self._n_pieces = len(earlier)
        self._clear()

    def _clear(self) -> None:
        self._reasoning: list[str] = []
        self._content: str | list[Part] | None = None
        self._calls: list[ToolCall] = []

    def add(self, message: Message) -> None:
        """Add a message that is not the assistant's."""
        self._end()
        self._count(message.content)
        self._messages.append(message)

    def reason(self, text: str) -> None:
        """Add reasoning, which comes before the text and the calls of its turn."""
        if self._content is not None or self._calls:
            self._end()
        self._n_pieces += 1
        self._reasoning.append(text)

    def say(self, content: str | list[Part]) -> None:
        """Add a text of the assistant."""
        if self._content is not None or self._calls:
            self._end()
        self._count(content)
        self._content = content

    def call(self, call: ToolCall) -> None:
        """Add a call, which belongs to the text before it."""
        self._n_pieces += 1
        self._calls.append(call)

    def check_size(self, more: int) -> None:
        """Raise InvalidValue if there are too many messages and parts, with this many items to come."""
        if self._n_pieces + more > MOST_PIECES:
            raise InvalidValue(f"'input': expected at most {MOST_PIECES:,} items and parts.", param="input")

    def whole(self) -> list[Message]:
        """Return all messages."""
        self._end()
        return self._messages

    def _count(self, content: str | list[Part] | None) -> None:
        self._n_pieces += 1 + (len(content) if isinstance(content, list) else 0)

    def _end(self) -> None:
        """End the turn of the assistant, if there is one."""
        if self._reasoning or self._content is not None or self._calls:
            self._messages.append(
                Message(
                    role="assistant",
                    content=self._content,
                    reasoning_content="\n".join(self._reasoning) or None,
                    tool_calls=self._calls or None,
                )
            )
        self._clear()


def _add(made: Conversation, raw: bytes, path: str) -> None:
    """Add what an item says."""
    head = known(raw, _Head, (), path)
    match head.type or ("message" if head.role else None):
        case None:
            raise MissingParameter(f"'{path}.type' is required.", param=f"{path}.type")
        case "message":
            item = known(raw, _Message, ("content",), path)
            content = _content(item.content, f"{path}.content")
            if item.role == "assistant":
                made.say(content)
            else:
                made.add(Message(role=item.role, content=content))
        case "reasoning":
            thought = known(raw, _Reasoning, ("content", "summary"), path)
            field = "content" if thought.content else "summary"
            made.reason("\n".join(_texts(thought.content or thought.summary or [], f"{path}.{field}")))
        case "function_call":
            call = known(raw, _Call, ("arguments",), path)
            made.call(_call(call.call_id, call.name, msgspec.json.encode(call.arguments), f"{path}.arguments"))
        case "custom_tool_call":
            custom = known(raw, _CustomCall, ("input",), path)
            made.call(_call(custom.call_id, custom.name, msgspec.json.encode({"input": custom.input}), path))
        case "local_shell_call":
            shell = known(raw, _ShellCall, ("action",), path)
            made.call(_call(_id(shell, path), "local_shell", bytes(shell.action), f"{path}.action"))
        case "function_call_output" | "custom_tool_call_output":
            result = known(raw, _Result, ("output",), path)
            made.add(
                Message(role="tool", tool_call_id=result.call_id, content=_content(result.output, f"{path}.output"))
            )
        case "local_shell_call_output":
            shown = known(raw, _ShellResult, ("output",), path)
            made.add(Message(role="tool", tool_call_id=_id(shown, path), content=shown.output))
        case "item_reference":
            raise NotSupported(f"'{path}': references to items are not supported by this server.", param=path)
        case kind:
            made.ignored.add(kind if kind in IGNORED else "unknown")


def _id(item: _ShellCall | _ShellResult, path: str) -> str:
    id_ = item.call_id or item.id
    if id_ is None:
        raise MissingParameter(f"'{path}.call_id' is required.", param=f"{path}.call_id")
    return id_


def _call(id_: str, name: str, raw: bytes, path: str) -> ToolCall:
    function = CalledFunction(name, msgspec.Raw(raw))
    arguments(function, path)
    return ToolCall(function, id_)


def _content(given: str | list[_Part], path: str) -> str | list[Part]:
    """Return what a message says: a text, unless it has several."""
    if isinstance(given, str):
        return given
    texts = _texts(given, path)
    return "".join(texts) if len(texts) < 2 else [Part("text", text) for text in texts]


def _texts(parts: list[_Part], path: str) -> list[str]:
    """Return the texts of parts.  Raises InvalidValue, and NotSupported for images, audio and files."""
    texts = []
    for i, part in enumerate(parts):
        param, kind = f"{path}[{i}]", part.type
        if kind in ("input_image", "image_url"):
            raise NotSupported(f"'{param}': images are not supported by this server.", param=param)
        if kind in ("input_audio", "input_file"):
            raise NotSupported(f"'{param}': content of type '{kind}' is not supported.", param=param)
        if kind not in (*TEXTS, "refusal"):
            raise InvalidValue(f"'{param}.type': expected 'input_text', got {kind!r}.", param=f"{param}.type")
        name, text = ("refusal", part.refusal) if kind == "refusal" else ("text", part.text)
        if text is None:
            raise InvalidValue(f"'{param}.{name}': expected a string.", param=f"{param}.{name}")
        texts.append(text)
    return texts
