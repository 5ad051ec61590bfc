"""Requests for responses: what clients send, and the chat completion that it means.

As in chat completions, `null` means absent and unknown keys are ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.decode import known
from api.openai.fields import (
    FrequencyPenalty,
    Limit,
    PresencePenalty,
    Temperature,
    TopP,
    check_limit,
)
from api.openai.output import of_schema
from api.openai.request import (
    MOST_ALTERNATIVES,
    MOST_TOOLS,
    ChatRequest,
    Function,
    Message,
    Tool,
    check_functions,
    checked,
)
from api.responses.items import Items, messages
from shared.errors import IntegrationsRefused, InvalidValue, MissingParameter, NotSupported
from shared.telemetry import log

LOGPROBS = "message.output_text.logprobs"  # the value of `include` that asks for log probabilities
TEXT: dict[str, Any] = {"type": "text"}
MOST_METADATA = 16  # as OpenAI has it
IGNORED = frozenset(  # types of tools that clients list for all servers
    ("web_search", "web_search_preview", "file_search", "code_interpreter", "computer_use_preview", "image_generation")
) | {"custom", "local_shell", "shell", "apply_patch", "namespace", "tool_search"}


class ReasoningOptions(Struct, frozen=True):
    """How the model reasons."""

    effort: Annotated[
        str | None,
        Meta(
            description="`none` turns reasoning off; other values go to the model's chat template, `minimal` as `low` "
            "and `xhigh` as `high` if it does not know them."
        ),
    ] = None
    summary: Annotated[str | None, Meta(description="Without effect: the reasoning comes as it is.")] = None


class TextOptions(Struct, frozen=True):
    """The form of the answer."""

    format: Annotated[
        dict[str, Any] | None,
        Meta(
            description='`{"type": "json_schema", "name": "...", "schema": {...}}`: JSON that the schema describes. '
            '`{"type": "json_object"}`: a JSON object. `{"type": "text"}`: any text.'
        ),
    ] = None


class ResponseRequest(Struct, frozen=True, kw_only=True):
    """A request for a response.  Unknown fields are ignored, and `null` means absent."""

    input: Items
    model: Annotated[
        str | None,
        Meta(
            description="A model key or alias, or the id of a loaded instance. Absent: the default model, or else the "
            "only loaded LLM."
        ),
    ] = None
    instructions: Annotated[
        str | None, Meta(description="A system prompt, for this response only: a later one does not inherit it.")
    ] = None
    previous_response_id: Annotated[
        str | None, Meta(description="The id of a stored response, whose conversation the input continues.")
    ] = None
    store: Annotated[bool | None, Meta(description="Store the response. Default: true.")] = None
    stream: Annotated[bool | None, Meta(description="Send the response while it is generated, as events.")] = None
    max_output_tokens: Annotated[
        Limit | None,
        Meta(
            description="The most tokens of the answer, with its reasoning. -1 or absent: up to the end of the context."
        ),
    ] = None
    temperature: Temperature = None
    top_p: TopP = None
    presence_penalty: PresencePenalty = None
    frequency_penalty: FrequencyPenalty = None
    reasoning: Annotated[ReasoningOptions | None, Meta(description="How the model reasons.")] = None
    text: Annotated[TextOptions | None, Meta(description="The form of the answer.")] = None
    tools: Annotated[
        list[msgspec.Raw] | None,
        Meta(
            description=f"The tools that the model may call, at most {MOST_TOOLS}: "
            '`{"type": "function", "name": "...", "description": "...", "parameters": {...}, "strict": ...}`. Other '
            "types are ignored, except `mcp`, which is refused."
        ),
    ] = None
    tool_choice: Annotated[
        str | dict[str, Any] | None,
        Meta(
            description="`auto`: the model may call tools. `none`: it may not. `required`: it must. "
            '`{"type": "function", "name": "..."}`: it must call this one. Default: `auto`.'
        ),
    ] = None
    parallel_tool_calls: Annotated[
        bool | None, Meta(description="Whether an answer may have several calls. Default: true.")
    ] = None
    include: Annotated[
        list[str] | None,
        Meta(description=f"`{LOGPROBS}` returns the log probability of each token. Other values are ignored."),
    ] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None,
        Meta(description=f"Return this many of the most probable tokens at each place; needs `{LOGPROBS}`."),
    ] = None
    metadata: Annotated[
        Annotated[dict[str, str], Meta(max_length=MOST_METADATA)] | None,
        Meta(description="Texts by name, which the response repeats."),
    ] = None
    prompt_cache_key: Annotated[str | None, Meta(description="The response repeats it. Without effect.")] = None
    truncation: Annotated[
        Literal["auto", "disabled"] | None,
        Meta(description="Without effect: a conversation that is too long is an error."),
    ] = None
    background: Annotated[bool | None, Meta(description="Only `false` is served.")] = None
    conversation: Annotated[Any, Meta(description="Not served.")] = None
    prompt: Annotated[Any, Meta(description="Not served.")] = None

    @property
    def format(self) -> dict[str, Any] | None:
        """The form of the answer."""
        return None if self.text is None else self.text.format


class _Tool(Struct, frozen=True):
    type: str


class FunctionTool(Struct, frozen=True, kw_only=True):
    """A function that the model may call."""

    type: Annotated[Literal["function"], Meta(description="Always `function`.")] = "function"
    name: Annotated[str, Meta(description="Its name.")]
    description: Annotated[str | None, Meta(description="What it does, for the model.")] = None
    parameters: Annotated[
        dict[str, msgspec.Raw] | None, Meta(description="JSON schema of its arguments; null if it takes none.")
    ] = None
    strict: Annotated[
        bool | None, Meta(description="Whether all of the schema must be enforced; null: as much of it as possible.")
    ] = None


def decoded(body: bytes) -> ResponseRequest:
    """Decode the body of a request.

    Raises InvalidJSON, InvalidType, InvalidValue, MissingParameter, and NotSupported for what this server does not do.
    """
    asked = known(body, ResponseRequest, ("input",))
    check_limit(asked.max_output_tokens, "max_output_tokens")
    for param in ("background", "conversation", "prompt"):
        if getattr(asked, param):
            raise NotSupported(f"'{param}' is not supported by this server.", param=param)
    return asked


def functions(asked: ResponseRequest) -> list[FunctionTool]:
    """Return the functions among the tools of a request.

    Raises IntegrationsRefused, and MissingParameter, InvalidType, InvalidValue and NotSupported.
    """
    found: dict[str, FunctionTool] = {}
    ignored = set[str]()
    for i, raw in enumerate(asked.tools or []):
        path = f"tools[{i}]"
        kind = known(bytes(raw), _Tool, (), path).type
        if kind == "function":
            found[path] = known(bytes(raw), FunctionTool, (), path)
        elif kind == "mcp":
            raise IntegrationsRefused("This server does not call MCP servers: call them in the client.", param="tools")
        else:
            ignored.add(kind if kind in IGNORED else "unknown")
    if ignored:
        log.get("api").info("tools ignored", action="tools_ignored", types=sorted(ignored))
    check_functions({path: _function(tool) for path, tool in found.items()})
    return [*found.values()]


def chat(asked: ResponseRequest, tools: list[FunctionTool], earlier: list[Message]) -> ChatRequest:
    """Return the chat completion that a request means.  `earlier`: the messages before those of the request.

    Raises MissingParameter, InvalidType, InvalidValue and NotSupported.
    """
    system = [] if asked.instructions is None else [Message(role="system", content=asked.instructions)]
    shows_logprobs = LOGPROBS in (asked.include or ())
    request = ChatRequest(
        model=asked.model,
        messages=messages(asked.input, [*system, *earlier]),
        add_generation_prompt=True,  # items are complete: an answer continues none of them
        stream=asked.stream,
        max_completion_tokens=asked.max_output_tokens,
        temperature=asked.temperature,
        top_p=asked.top_p,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        logprobs=shows_logprobs,
        top_logprobs=asked.top_logprobs if shows_logprobs else None,
        reasoning_effort=None if asked.reasoning is None else asked.reasoning.effort,
        response_format=_response_format(asked.format),
        tools=[Tool("function", _function(tool)) for tool in tools],
        tool_choice=_tool_choice(asked.tool_choice),
        parallel_tool_calls=asked.parallel_tool_calls,
    )
    return checked(request, "text.format")


def _function(tool: FunctionTool) -> Function:
    return Function(tool.name, tool.description, tool.parameters, tool.strict)


def _tool_choice(choice: str | dict[str, Any] | None) -> str | dict[str, Any] | None:
    match choice:
        case {"type": "function", "name": str(name)}:
            return {"type": "function", "function": {"name": name}}
        case _:
            return choice


def _response_format(given: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the form of an answer as chat completions have it.  Raises MissingParameter and InvalidValue."""
    match given:
        case None | {"type": "text"}:
            return None
        case {"type": "json_object"}:
            return {"type": "json_object"}
        case {"type": "json_schema"}:
            param = "text.format.schema"
            if given.get("schema") is None:
                raise MissingParameter(f"'{param}' is required.", param=param)
            of_schema(given["schema"], param)
            return {"type": "json_schema", "json_schema": {"schema": given["schema"]}}
        case _:
            param = "text.format.type"
            raise InvalidValue(f"'{param}': expected one of 'text', 'json_object', 'json_schema'.", param=param)
