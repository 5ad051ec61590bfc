"""Requests for messages: what clients of Anthropic's API send, translated to a chat completion.

As elsewhere, `null` means absent, and unknown keys are ignored.  What would change the answer and is not served is
refused.  What Anthropic's server does itself, such as its own tools, is skipped: clients list it for all servers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar, assert_never

import msgspec
from msgspec import Meta, Struct, field

from api.decode import known
from api.openai import request as openai
from api.openai.fields import Stream, Temperature, TopK, TopP, stops
from api.openai.output import of_schema
from api.openai.request import ChatRequest, Function, arguments, check_functions, checked
from shared.errors import IntegrationsRefused, InvalidType, InvalidValue, MissingParameter, NotSupported
from shared.telemetry import log

LARGE = ("messages", "system")
BILLING = "x-anthropic-billing-header:"  # with which Claude Code begins its system prompt
STAMP = re.compile(r" ?\bcch=[^;\s]*;?")  # in it; another one in each request, which would share no prefix
EFFORTS = {"max": "xhigh"}  # the others are the same
LONGEST_TYPE = 64  # characters in the log

T = TypeVar("T")


class Source(Struct, frozen=True):
    """Where the content of a block comes from."""

    type: Annotated[str, Meta(description="`text`. Others are not served.")]
    data: Annotated[str | None, Meta(description="The text.")] = None


class Block(Struct, frozen=True, kw_only=True):
    """A block of a message."""

    type: Annotated[
        str,
        Meta(
            description="`text`, `document` with a text, `tool_use`, `tool_result`, `thinking` or `redacted_thinking`. "
            "The calls and results of tools that Anthropic's server runs are ignored. Others are not served."
        ),
    ]
    text: Annotated[str | None, Meta(description="The text of a `text`.")] = None
    thinking: Annotated[str | None, Meta(description="The reasoning of a `thinking`.")] = None
    id: Annotated[str | None, Meta(description="Id of a `tool_use`.")] = None
    name: Annotated[str | None, Meta(description="Name of the tool of a `tool_use`.")] = None
    input: Annotated[msgspec.Raw, Meta(description="The arguments of a `tool_use`, an object.")] = field(
        default_factory=msgspec.Raw
    )
    tool_use_id: Annotated[str | None, Meta(description="Id of the call of which a `tool_result` is the result.")] = (
        None
    )
    content: Annotated[
        str | list[Block] | dict[str, msgspec.Raw] | None,
        Meta(description="The result of a `tool_result`: a text, or a list of `text` and `document` blocks."),
    ] = None
    source: Annotated[Source | str | None, Meta(description="The content of a `document`.")] = None


class Turn(Struct, frozen=True):
    """A message of a conversation."""

    role: Annotated[
        Literal["user", "assistant", "system", "developer"],
        Meta(description="Who wrote it; `developer` means `system`."),
    ]
    content: Annotated[str | list[Block], Meta(description="The text, or a list of blocks.")]


class CustomTool(Struct, frozen=True, kw_only=True):
    """A tool that the model may call."""

    type: Annotated[
        str | None,
        Meta(description="`custom`, or absent. Tools of other types, which Anthropic defines, are ignored."),
    ] = None
    name: Annotated[
        str | None,
        Meta(description="Its name: at most 128 letters, digits, `_`, `-` and `.`, unlike those of the others."),
    ] = None
    description: Annotated[str | None, Meta(description="What it does, for the model.")] = None
    input_schema: Annotated[
        dict[str, msgspec.Raw] | None,
        Meta(description="JSON schema of its arguments, an object. Absent: it takes none."),
    ] = None
    strict: Annotated[
        bool | None,
        Meta(
            description="Whether all of the schema must be enforced; a schema for which that is not possible is "
            "refused. Default: as much of it as is possible."
        ),
    ] = None


class ToolChoice(Struct, frozen=True, kw_only=True):
    """Which tools the model may or must call."""

    type: Annotated[
        Literal["auto", "any", "tool", "none"],
        Meta(
            description="`auto`: the model may call tools. `any`: it must. `tool`: it must call the one of this "
            "`name`. `none`: it may not."
        ),
    ]
    name: Annotated[str | None, Meta(description="Name of a tool, for the type `tool`.")] = None
    disable_parallel_tool_use: Annotated[
        bool | None, Meta(description="Whether an answer may have one call only. Default: false.")
    ] = None


class Thinking(Struct, frozen=True, kw_only=True):
    """Whether the model reasons before it answers."""

    type: Annotated[
        Literal["enabled", "adaptive", "disabled"],
        Meta(description="`disabled` turns reasoning off. The others leave it to the model's chat template."),
    ]
    budget_tokens: Annotated[
        Annotated[int, Meta(ge=0)] | None,
        Meta(description="The most tokens of the reasoning, for the type `enabled`. Absent: any number."),
    ] = None


class OutputFormat(Struct, frozen=True, kw_only=True):
    """The form of the answer."""

    type: Annotated[Literal["json_schema"], Meta(description="Always `json_schema`.")]
    schema: Annotated[Any, Meta(description="A JSON schema that the answer follows.")] = None


class OutputConfig(Struct, frozen=True, kw_only=True):
    """How the model answers."""

    effort: Annotated[
        str | None,
        Meta(
            description="For the model's chat template, if that knows it: `low`, `medium`, `high`, `xhigh` or `max`, "
            "which means `xhigh`."
        ),
    ] = None
    format: Annotated[OutputFormat | None, Meta(description="The form of the answer.")] = None


class MessagesRequest(Struct, frozen=True, kw_only=True):
    """A request for an answer in the form of Anthropic's API.  Unknown fields are ignored, and `null` means absent."""

    model: Annotated[
        str | None,
        Meta(
            description="A model key or alias, or the id of a loaded instance. Absent: the default model, or else the "
            "only loaded LLM."
        ),
    ] = None
    messages: Annotated[
        list[Turn],
        Meta(
            min_length=1,
            description="The conversation, oldest message first. If the last one is the assistant's, the answer "
            "continues it.",
        ),
    ]
    system: Annotated[
        str | list[Block] | None, Meta(description="The system prompt, a text or a list of `text` blocks.")
    ] = None
    max_tokens: Annotated[
        Annotated[int, Meta(ge=1)] | None,
        Meta(description="The most tokens of the answer. Absent: up to the end of the context."),
    ] = None
    stream: Stream = None
    stop_sequences: Annotated[
        list[str] | None, Meta(description="Texts that end the answer, at most 16. The answer does not include them.")
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    tools: Annotated[
        list[CustomTool] | None,
        Meta(description=f"The tools that the model may call, at most {openai.MOST_TOOLS}."),
    ] = None
    tool_choice: Annotated[
        ToolChoice | None, Meta(description="Which tools the model may or must call. Default: `auto`.")
    ] = None
    thinking: Annotated[
        Thinking | None, Meta(description="Whether the model reasons first. Default: as its chat template says.")
    ] = None
    output_config: Annotated[OutputConfig | None, Meta(description="How the model answers.")] = None
    mcp_servers: Annotated[
        list[msgspec.Raw] | None, Meta(description="Refused: this server calls no other servers.")
    ] = None


def decoded(body: bytes) -> ChatRequest:
    """Decode the body of a request, and translate it.

    Raises InvalidJSON, InvalidType, InvalidValue, MissingParameter, NotSupported, and IntegrationsRefused.
    """
    asked = known(body, MessagesRequest, LARGE)
    if asked.mcp_servers:
        raise IntegrationsRefused("'mcp_servers': this server calls no other servers.", param="mcp_servers")
    config, thinking, choice = asked.output_config or OutputConfig(), asked.thinking, asked.tool_choice
    skipped: set[str] = set()
    functions = _functions(asked.tools or [], skipped)
    messages = [message for i, turn in enumerate(asked.messages) for message in _messages(turn, i, skipped)]
    for kind in sorted(skipped):
        log.get("api").info("content ignored", action="content_ignored", type=kind[:LONGEST_TYPE])
    request = ChatRequest(
        model=asked.model,
        messages=[*_system(asked.system), *messages],
        max_tokens=asked.max_tokens,
        stream=asked.stream,
        stop=stops(asked.stop_sequences, "stop_sequences"),
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=asked.top_k,
        tools=[openai.Tool("function", function) for function in functions],
        tool_choice=None if choice is None else _choice(choice),
        parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
        reasoning_effort=EFFORTS.get(config.effort, config.effort) if config.effort else None,
        chat_template_kwargs={"enable_thinking": False} if thinking and thinking.type == "disabled" else None,
        thinking_budget_tokens=thinking.budget_tokens if thinking and thinking.type == "enabled" else None,
        json_schema=None if config.format is None else _schema(config.format),
    )
    return checked(request, form="output_config.format")


def _functions(tools: list[CustomTool], skipped: set[str]) -> list[Function]:
    functions = {}
    for i, tool in enumerate(tools):
        path = f"tools[{i}]"
        if tool.type not in (None, "custom"):
            skipped.add(tool.type or "")
        else:
            name = _required(tool.name, f"{path}.name")
            functions[path] = Function(name, tool.description, tool.input_schema, tool.strict)
    check_functions(functions, "input_schema")
    return [*functions.values()]


def _choice(choice: ToolChoice) -> str | dict[str, Any]:
    match choice.type:
        case "auto" | "none":
            return choice.type
        case "any":
            return "required"
        case "tool":
            return {"type": "function", "function": {"name": _required(choice.name, "tool_choice.name")}}
        case _:
            assert_never(choice.type)


def _schema(form: OutputFormat) -> Any:
    path = "output_config.format.schema"
    of_schema(_required(form.schema, path), path)
    return form.schema


def _system(system: str | list[Block] | None) -> Iterator[openai.Message]:
    match system:
        case None | "":
            return
        case str():
            yield openai.Message("system", _unstamped(system))
        case _:
            texts = [_text(block, f"system[{i}]") for i, block in enumerate(system)]
            yield openai.Message("system", _content([_unstamped(text) for text in texts]))


def _unstamped(text: str) -> str:
    """Return a text of a system prompt without what differs in each request of a conversation."""
    return STAMP.sub("", text, count=1) if text.startswith(BILLING) else text


def _messages(turn: Turn, index: int, skipped: set[str]) -> Iterator[openai.Message]:
    """Yield the messages of a turn: the results of calls are messages of their own, before the rest of the turn."""
    path = f"messages[{index}]"
    if isinstance(turn.content, str):
        yield openai.Message(turn.role, turn.content)
        return
    texts: list[str] = []
    reasoning: list[str] = []
    calls: list[openai.ToolCall] = []
    n_results = 0
    for i, block in enumerate(turn.content):
        at = f"{path}.content[{i}]"
        match block.type:
            case "tool_use" if turn.role == "assistant":
                calls.append(_call(block, at))
            case "thinking" if turn.role == "assistant":
                reasoning.append(_required(block.thinking, f"{at}.thinking"))
            case "redacted_thinking" if turn.role == "assistant":
                pass
            case "tool_result" if turn.role == "user":
                yield _result(block, at)
                n_results += 1
            case "tool_use" | "thinking" | "redacted_thinking" | "tool_result":
                raise InvalidValue(
                    f"'{at}.type': a message of the {turn.role} has no block '{block.type}'.", param=f"{at}.type"
                )
            case kind if kind.endswith(("_tool_use", "_tool_result")):
                skipped.add(kind)
            case _:
                texts.append(_text(block, at))
    if texts or not n_results:
        yield openai.Message(
            turn.role,
            _content(texts),
            reasoning_content="".join(reasoning) or None,
            tool_calls=calls or None,
        )


def _call(block: Block, path: str) -> openai.ToolCall:
    given = bytes(block.input) or b"null"
    if given != b"null" and not given.startswith(b"{"):
        raise InvalidType(f"'{path}.input': expected an object.", param=f"{path}.input")
    function = openai.CalledFunction(_required(block.name, f"{path}.name"), msgspec.Raw(given))
    arguments(function, f"{path}.input")
    return openai.ToolCall(function, _required(block.id, f"{path}.id"))


def _result(block: Block, path: str) -> openai.Message:
    content: str | list[openai.Part]
    match block.content:
        case None:
            content = ""
        case str(text):
            content = text
        case list(blocks):
            content = _content([_text(each, f"{path}.content[{i}]") for i, each in enumerate(blocks)])
        case _:
            raise InvalidType(f"'{path}.content': expected a string or an array.", param=f"{path}.content")
    return openai.Message("tool", content, tool_call_id=_required(block.tool_use_id, f"{path}.tool_use_id"))


def _text(block: Block, path: str) -> str:
    """Return the text of a block.  Raises MissingParameter, and NotSupported for what is none."""
    match block:
        case Block(type="text"):
            return _required(block.text, f"{path}.text")
        case Block(type="document", source=Source(type="text", data=data)):
            return _required(data, f"{path}.source.data")
        case Block(type="image"):
            raise NotSupported(f"'{path}': images are not supported: no model of this server has vision.", param=path)
        case Block(type="document"):
            raise NotSupported(f"'{path}': only documents with a source of type 'text' are supported.", param=path)
        case _:
            raise NotSupported(f"'{path}': content of type '{block.type}' is not supported.", param=path)


def _content(texts: list[str]) -> str | list[openai.Part]:
    return "".join(texts) if len(texts) < 2 else [openai.Part("text", text) for text in texts]


def _required(value: T | None, path: str) -> T:
    if value is None:
        raise MissingParameter(f"'{path}' is required.", param=path)
    return value
