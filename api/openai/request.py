"""Requests for chat completions: what clients send, and what a runner gets.

The fields are those of OpenAI's API and of llama.cpp's server.  As there, `null` means absent, and unknown keys are
ignored: clients send many.  What would change the answer and is not served is refused, never dropped.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.decode import known
from api.openai.fields import Limit, TextRequest, check_sampling, limit, sampling, stops
from shared.channel.messages import Generate
from shared.errors import InvalidValue, NotSupported
from shared.schema.model import ModelSettings

DEEPEST = 64  # nesting of a conversation: llama.cpp's template code recurses over it
MOST_PIECES = 65_536  # messages of a conversation, and their parts: to check and to render each takes microseconds
MOST_ALTERNATIVES = 20  # `top_logprobs`, as OpenAI has it
ROLES = {"developer": "system"}  # the others are their own


class Part(Struct, frozen=True):
    """A part of a message."""

    type: Annotated[str, Meta(description="`text`; also `input_text` and `refusal`. Others are not served.")]
    text: Annotated[str | None, Meta(description="The text.")] = None
    refusal: Annotated[str | None, Meta(description="The text of a `refusal`.")] = None


class ToolCall(Struct, frozen=True):
    """A call of a tool.  Not served yet."""

    id: Annotated[str, Meta(description="The id of the call.")]


class Message(Struct, frozen=True):
    """A message of a conversation."""

    role: Annotated[
        Literal["system", "developer", "user", "assistant", "tool", "function"],
        Meta(description="Who wrote it; `developer` means `system`. `tool` and `function` are not served yet."),
    ]
    content: Annotated[
        str | list[Part] | None,
        Meta(description='The text, or a list of parts such as `{"type": "text", "text": "Hello!"}`.'),
    ] = None
    name: Annotated[str | None, Meta(description="Name of the writer, for the model's chat template.")] = None
    reasoning_content: Annotated[
        str | None, Meta(description="The reasoning before an earlier answer, for the model's chat template.")
    ] = None
    reasoning: Annotated[str | None, Meta(description="The same under another name.")] = None
    tool_calls: Annotated[list[ToolCall] | None, Meta(description="Not served yet: must be empty.")] = None


class ChatRequest(TextRequest, frozen=True, kw_only=True):
    """A request for a chat completion.  Unknown fields are ignored, and `null` means absent."""

    messages: Annotated[
        list[Message],
        Meta(
            min_length=1,
            description="The conversation, oldest message first. If the last one is the assistant's, the answer "
            "continues it.",
        ),
    ]
    max_completion_tokens: Annotated[
        Limit | None, Meta(description="The same under OpenAI's newer name, which wins over `max_tokens`.")
    ] = None
    logprobs: Annotated[bool | None, Meta(description="Return the log probability of each token.")] = None
    top_logprobs: Annotated[
        Annotated[int, Meta(ge=0, le=MOST_ALTERNATIVES)] | None,
        Meta(description="Return this many of the most probable tokens at each place; needs `logprobs`."),
    ] = None
    reasoning_effort: Annotated[
        str | None,
        Meta(description="`none` turns reasoning off; other values go to the model's chat template."),
    ] = None
    chat_template_kwargs: Annotated[
        dict[str, Any] | None,
        Meta(description="Variables for the model's chat template, such as `enable_thinking`."),
    ] = None
    add_generation_prompt: Annotated[
        bool | None, Meta(description="Begin an answer of the assistant. Default: unless the last message is its own.")
    ] = None
    continue_final_message: Annotated[
        bool | None, Meta(description="Continue the last message. Default: if it is the assistant's.")
    ] = None
    response_format: Annotated[dict[str, Any] | None, Meta(description='Only `{"type": "text"}` is served yet.')] = None
    tools: Annotated[list[Any] | None, Meta(description="Not served yet: must be empty.")] = None
    tool_choice: Annotated[str | dict[str, Any] | None, Meta(description="Only `none` and `auto` are served yet.")] = (
        None
    )
    functions: Annotated[list[Any] | None, Meta(description="Not served: must be empty.")] = None
    modalities: Annotated[list[str] | None, Meta(description='Only `["text"]` is served.')] = None
    audio: Annotated[Any, Meta(description="Not served.")] = None
    grammar: Annotated[Any, Meta(description="Not served yet.")] = None
    json_schema: Annotated[Any, Meta(description="Not served yet.")] = None


def decoded(body: bytes) -> ChatRequest:
    """Decode the body of a request.

    Raises InvalidJSON, InvalidType, InvalidValue, MissingParameter, and NotSupported for what this server does not do.
    """
    request = known(body, ChatRequest, {"messages"})
    if _depth(request.chat_template_kwargs) > DEEPEST - 2:  # those of the conversation and of this object
        param = "chat_template_kwargs"
        raise InvalidValue(f"'{param}': a conversation is nested at most {DEEPEST} levels deep.", param=param)
    _check(request)
    n_pieces = len(request.messages) + sum(
        len(one.content) for one in request.messages if isinstance(one.content, list)
    )
    if n_pieces > MOST_PIECES:
        raise InvalidValue(
            f"'messages': expected at most {MOST_PIECES:,} messages and parts, got {n_pieces:,}.", param="messages"
        )
    for i, message in enumerate(request.messages):
        _check_message(message, f"messages[{i}]")
    check_sampling(request)
    return request


def generate(request: ChatRequest, client: str, settings: ModelSettings) -> Generate:
    """Translate a decoded request for a runner, without an id.  `settings` are those of the model."""
    effort = request.reasoning_effort
    variables = {**({"reasoning_effort": effort} if effort else {}), **(request.chat_template_kwargs or {})}
    thinks = variables.pop("enable_thinking", False if effort == "none" else None)
    conversation = {
        "messages": [*_prompted(request, settings), *(_rendered(message) for message in request.messages)],
        "add_generation_prompt": request.add_generation_prompt,
        "continue_final_message": request.continue_final_message,
        "enable_thinking": thinks,
        "chat_template_kwargs": variables or None,
    }
    return Generate(
        id=0,
        client=client,
        conversation=msgspec.json.encode({key: value for key, value in conversation.items() if value is not None}),
        choices=request.n or 1,
        max_tokens=limit(
            request.max_tokens if request.max_completion_tokens is None else request.max_completion_tokens
        ),
        sampling=sampling(request, settings.sampling),
        stop=stops(request.stop),
        logprobs=(request.top_logprobs or 0) if request.logprobs else None,
    )


def beginning(request: ChatRequest, client: str) -> bytes:
    """Return what all requests of a conversation have in common: its client, and its messages up to the user's first.

    Prefixes are shared between requests of one client only.
    """
    messages = request.messages
    first = next((i for i, message in enumerate(messages) if message.role == "user"), len(messages))
    return client.encode() + msgspec.json.encode(messages[: first + 1])


def _check(request: ChatRequest) -> None:
    if request.max_tokens == 0 or request.max_completion_tokens == 0:
        param = "max_tokens" if request.max_tokens == 0 else "max_completion_tokens"
        raise InvalidValue(f"'{param}': expected a number > 0, or -1 for no limit, got 0.", param=param)
    if request.top_logprobs is not None and not request.logprobs:
        raise InvalidValue("'top_logprobs': it needs \"logprobs\": true.", param="top_logprobs")
    if request.continue_final_message and request.add_generation_prompt:
        raise InvalidValue(
            "'continue_final_message' and 'add_generation_prompt' exclude each other.", param="continue_final_message"
        )
    if request.continue_final_message and request.messages[-1].role != "assistant":
        raise InvalidValue(
            "'continue_final_message': the last message must be the assistant's.", param="continue_final_message"
        )
    for param, value in (
        ("tools", request.tools),
        ("functions", request.functions),
        ("audio", request.audio),
        ("grammar", request.grammar),
        ("json_schema", request.json_schema),
    ):
        if value:
            raise NotSupported(f"'{param}' is not supported by this server yet.", param=param)
    if request.tool_choice not in (None, "none", "auto"):
        raise NotSupported("'tool_choice': tools are not supported by this server yet.", param="tool_choice")
    if set(request.modalities or ()) - {"text"}:
        raise NotSupported("'modalities': only text is supported.", param="modalities")
    kind = "text" if request.response_format is None else request.response_format.get("type")
    if kind in ("json_object", "json_schema"):
        raise NotSupported(f"'response_format': '{kind}' is not supported by this server yet.", param="response_format")
    if kind != "text":
        raise InvalidValue(
            "'response_format.type': expected one of 'text', 'json_object', 'json_schema'.", param="response_format"
        )


def _check_message(message: Message, path: str) -> None:
    """Check what the types do not say.  Images, audio, files and tool calls are refused."""
    match message.role:
        case "tool" | "function":
            raise NotSupported(f"'{path}.role': tools are not supported by this server yet.", param=f"{path}.role")
        case "assistant":
            if message.tool_calls:
                param = f"{path}.tool_calls"
                raise NotSupported(f"'{param}': tools are not supported by this server yet.", param=param)
        case "system" | "developer" | "user":
            if message.content is None:
                raise InvalidValue(f"'{path}.content' is required.", param=f"{path}.content")
    for i, part in enumerate(message.content if isinstance(message.content, list) else []):
        param, kind = f"{path}.content[{i}]", part.type
        match kind:
            case "text" | "input_text" | "refusal":
                name = "refusal" if kind == "refusal" else "text"
                if (part.refusal if kind == "refusal" else part.text) is None:
                    raise InvalidValue(f"'{param}.{name}': expected a string.", param=f"{param}.{name}")
            case "image_url" | "input_image":
                raise NotSupported(f"'{param}': images are not supported by this server.", param=param)
            case "input_audio" | "file" | "input_file" | "video_url":
                raise NotSupported(f"'{param}': content of type '{kind}' is not supported.", param=param)
            case _:
                raise InvalidValue(f"'{param}.type': expected 'text', got {kind!r}.", param=f"{param}.type")


def _rendered(message: Message) -> dict[str, Any]:
    """Return a message as llama.cpp's chat code reads it (common_chat_msgs_parse_oaicompat, common/chat.cpp)."""
    content: Any = message.content
    if isinstance(content, list):
        content = [{"type": "text", "text": part.refusal if part.type == "refusal" else part.text} for part in content]
    rendered = {"role": ROLES.get(message.role, message.role), "content": "" if content is None else content}
    if message.name is not None:
        rendered["name"] = message.name
    reasoning = message.reasoning if message.reasoning_content is None else message.reasoning_content
    if reasoning:
        rendered["reasoning_content"] = reasoning
    return rendered


def _prompted(request: ChatRequest, settings: ModelSettings) -> list[dict[str, Any]]:
    """Return the system prompt of the model for a conversation that has none of its own."""
    if settings.system_prompt is None or any(message.role in ("system", "developer") for message in request.messages):
        return []
    return [{"role": "system", "content": settings.system_prompt}]


def _depth(value: Any) -> int:
    """Return how deeply lists and objects are nested, without recursion."""
    level, depth = [value], 0
    while level:
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        depth += 1
    return depth - 1
