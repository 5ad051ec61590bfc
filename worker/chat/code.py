"""Calls llama.cpp's chat code: templates, prompts, grammars, and parsers of what a model answers.

The code is in `libloadstone_chat`, which `native/` adds to the build of llama-cpp-python.  A plain installation of
llama-cpp-python does not have it.

A template comes from an untrusted file.  llama.cpp reports most faults of one as errors, but deep nesting overflows
its stack, and nothing limits how long a template runs or how much it allocates (measured with commit 0c1e57098).  Call
this in a process that may die.
"""

from __future__ import annotations

import ctypes
import importlib.util
import weakref
from pathlib import Path
from typing import Any, Literal, TypeVar

import msgspec
from msgspec import json

LIBRARY = "libloadstone_chat.so"

TriggerType = Literal["token", "word", "pattern", "pattern_full"]


class ChatUnavailable(Exception):
    """The chat code is missing, or belongs to another llama.cpp; the message says which and what to do."""


class ChatError(Exception):
    """llama.cpp rejected a template, a request, a schema or an answer; the message is its reason."""


class Trigger(msgspec.Struct, frozen=True):
    """A text after which a lazy grammar applies (`common_grammar_trigger`, common/common.h)."""

    type: TriggerType
    value: str


class ParserSource(msgspec.Struct, frozen=True):
    """What makes a `Parser`: llama.cpp's name of a format, a serialized parser, and the end of the prompt, which the
    parser reads before the answer.

    `is_generic`: calls in the content are read in the form of `worker.chat.tools`.
    """

    format: str
    parser: str
    generation_prompt: str
    is_generic: bool = False


class Rendered(ParserSource, frozen=True, kw_only=True):
    """A prompt, and how the answer to it is constrained and parsed (`common_chat_params`, common/chat.h).

    `grammar` is GBNF, or empty; if it is `grammar_lazy`, it applies only after one of the `triggers`.
    `preserved_tokens` are the special tokens that the parser needs to see as text.
    """

    prompt: str
    grammar: str
    grammar_lazy: bool
    triggers: list[Trigger]
    preserved_tokens: list[str]
    stops: list[str]
    thinking: bool
    thinking_start: str
    thinking_ends: list[str]


class Function(msgspec.Struct, frozen=True):
    name: str
    arguments: str


class ToolCall(msgspec.Struct, frozen=True):
    function: Function
    id: str = ""


class Message(msgspec.Struct, frozen=True):
    """An answer, in the form of OpenAI's chat completions."""

    content: str = ""
    reasoning_content: str = ""
    tool_calls: list[ToolCall] = []


class _Compiled(msgspec.Struct, frozen=True):
    capabilities: dict[str, bool]


class _Grammar(msgspec.Struct, frozen=True):
    grammar: str


class _Parser(msgspec.Struct, frozen=True):
    pass


class _Refused(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    error: str


Result = TypeVar("Result")


class ChatCode:
    """The library.  Raises `ChatUnavailable`."""

    def __init__(self, directory: Path | None = None) -> None:
        """Load the library from a directory; by default from that of llama-cpp-python's libraries."""
        path = (directory or installed()) / LIBRARY
        if not path.exists():
            raise ChatUnavailable("llama-cpp-python was built without Loadstone's chat code")
        try:
            lib: Any = ctypes.CDLL(str(path))
            # A symbol is looked up in the library's dependencies too: this is the ggml that the library would call.
            for name in ("loadstone_chat_commit", "ggml_commit"):
                getattr(lib, name).restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            reason = str(error).replace(str(path), LIBRARY)  # clients see it, but no directory
            raise ChatUnavailable(f"{LIBRARY} cannot be loaded: {reason}") from error
        built, present = lib.loadstone_chat_commit().decode(), lib.ggml_commit().decode()
        if built != present:
            raise ChatUnavailable(f"{LIBRARY} was built for llama.cpp {built}, but llama.cpp {present} is installed")
        for name in ("templates", "render", "grammar", "parser", "parse"):
            getattr(lib, f"loadstone_chat_{name}").restype = ctypes.c_void_p
        self._lib = lib

    def templates(self, template: str, *, bos_token: str = "", eos_token: str = "") -> Templates:
        """Compile a Jinja template.  Raises `ChatError`."""
        request = {"template": template, "bos_token": bos_token, "eos_token": eos_token}
        handle = ctypes.c_void_p()
        reply = self._call("templates", _Compiled, json.encode(request), ctypes.byref(handle))
        return Templates(self, handle, reply.capabilities)

    def parser(
        self, source: ParserSource, *, reasoning_format: str = "deepseek", parse_tool_calls: bool = True
    ) -> Parser:
        """Make a parser of the answers to a prompt.  Raises `ChatError`."""
        request = {
            "format": source.format,
            "parser": source.parser,
            "generation_prompt": source.generation_prompt,
            "reasoning_format": reasoning_format,
            "parse_tool_calls": parse_tool_calls,
        }
        handle = ctypes.c_void_p()
        self._call("parser", _Parser, json.encode(request), ctypes.byref(handle))
        return Parser(self, handle)

    def grammar(self, schema: bytes) -> str:
        """Convert a JSON schema, given as JSON, to a GBNF grammar.  Raises `ChatError`."""
        return self._call("grammar", _Grammar, schema).grammar

    def render(self, templates: ctypes.c_void_p, request: bytes) -> Rendered:
        return self._call("render", Rendered, templates, request)

    def parse(self, parser: ctypes.c_void_p, answer: bytes, partial: bool) -> Message:
        size, is_partial = ctypes.c_size_t(len(answer)), ctypes.c_bool(partial)
        return self._call("parse", Message, parser, answer, size, is_partial)

    def free(self, kind: Literal["templates", "parser"], handle: ctypes.c_void_p) -> None:
        getattr(self._lib, f"loadstone_chat_{kind}_free")(handle)

    def _call(self, name: str, result: type[Result], *arguments: object) -> Result:
        pointer = getattr(self._lib, f"loadstone_chat_{name}")(*arguments)
        if not pointer:
            raise MemoryError
        try:
            reply = ctypes.string_at(pointer)
        finally:
            self._lib.loadstone_chat_free(ctypes.c_void_p(pointer))
        if reply.startswith(b'{"error":'):
            raise ChatError(json.decode(reply, type=_Refused).error)
        return json.decode(reply, type=result)


class Templates:
    """A compiled template.

    `capabilities` is what llama.cpp found out by rendering it, such as "supports_tools" (common/jinja/caps.h).
    """

    def __init__(self, code: ChatCode, handle: ctypes.c_void_p, capabilities: dict[str, bool]) -> None:
        self.capabilities = capabilities
        self._code, self._handle = code, handle
        weakref.finalize(self, code.free, "templates", handle)

    def render(self, request: bytes) -> Rendered:
        """Render a conversation, given as a JSON object: `messages`, and optionally `tools`, `tool_choice`,
        `parallel_tool_calls`, `json_schema`, `add_generation_prompt`, `continue_final_message`, `enable_thinking`,
        `reasoning_format` and `chat_template_kwargs`.  The first three are those of OpenAI's chat completions.

        The answer continues the last message if that is the assistant's.  Raises `ChatError`.
        """
        return self._code.render(self._handle, request)


class Parser:
    """Parses the answers to one prompt."""

    def __init__(self, code: ChatCode, handle: ctypes.c_void_p) -> None:
        self._code, self._handle = code, handle
        weakref.finalize(self, code.free, "parser", handle)

    def parse(self, answer: bytes, *, partial: bool = False) -> Message:
        """Parse an answer, or the beginning of one.

        Raises `ChatError` if a whole answer does not have the format of its prompt.
        """
        return self._code.parse(self._handle, answer, partial)


def available() -> str | None:
    """Return the reason why the chat code cannot be used; None if it can."""
    try:
        ChatCode()
    except ChatUnavailable as e:
        return str(e)
    return None


def installed() -> Path:
    """Return the directory of llama-cpp-python's libraries, without importing it."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ChatUnavailable("llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"
