"""Requests for LM Studio's chat: what clients send, and the chat completion that each means.

Unlike OpenAI's routes, this one refuses unknown keys, as LM Studio does.  `null` means absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta, Struct

from api.decode import strict, unrecognized
from api.openai.fields import (
    Limit,
    MinP,
    RepeatPenalty,
    Stream,
    Temperature,
    TopK,
    TopP,
    check_limit,
)
from api.openai.request import MOST_PIECES, ChatRequest, Message, Part, checked
from shared.errors import IntegrationsRefused, InvalidType, InvalidUnion, InvalidValue, NotSupported
from shared.schema.http import Positive

REASONING = Literal["off", "on", "low", "medium", "high", "xhigh"]


class ChatInput(Struct, frozen=True, kw_only=True):
    """What the user says, or shows."""

    type: Annotated[str, Meta(description="`text`, or `message`, which means the same. `image` is not served.")]
    content: Annotated[str, Meta(description="The text.")]


class NativeChatRequest(Struct, frozen=True, kw_only=True):
    """A request for an answer of LM Studio's chat.  Unknown fields are refused, and `null` means absent."""

    model: Annotated[str, Meta(description="A model key or alias, or the id of a loaded instance.")]
    input: Annotated[
        str | list[ChatInput],
        Meta(description="What the user says: a text, or a list of texts, which are one message together."),
    ]
    system_prompt: Annotated[
        str | None,
        Meta(description="What goes before the conversation, instead of the system prompt that it has already."),
    ] = None
    integrations: Annotated[
        list[Any] | None,
        Meta(description="Only an empty list is served: this server calls no tools and no MCP servers."),
    ] = None
    stream: Stream = None
    temperature: Temperature = None
    top_p: TopP = None
    top_k: TopK = None
    min_p: MinP = None
    repeat_penalty: RepeatPenalty = None
    max_output_tokens: Annotated[
        Limit | None,
        Meta(
            description="The most tokens of the answer, with its reasoning. -1 or absent: up to the end of the context."
        ),
    ] = None
    reasoning: Annotated[
        REASONING | None,
        Meta(description="How the model reasons: one of the `allowed_options` of its `capabilities`."),
    ] = None
    context_length: Annotated[
        Positive | None,
        Meta(description="Size of the context in tokens, if this request loads the model. It is ignored otherwise."),
    ] = None
    store: Annotated[bool | None, Meta(description="Store the conversation, to continue it. Default: true.")] = None
    previous_response_id: Annotated[
        str | None, Meta(description="The id of a stored response, whose conversation this request continues.")
    ] = None


class _Request(NativeChatRequest, frozen=True, kw_only=True):
    """A request whose input is decoded later: one by one, so that an error tells which item is wrong."""

    input: str | list[msgspec.Raw]  # type: ignore[assignment]


def decoded(body: bytes) -> NativeChatRequest:
    """Decode the body of a request.

    Raises IntegrationsRefused, InvalidJSON, InvalidType, InvalidValue, InvalidUnion, MissingParameter, NotSupported and
    UnrecognizedKeys.
    """
    asked = strict(body, _Request, ("input",))
    if asked.integrations:
        raise IntegrationsRefused(
            "'integrations': this server calls no tools and no MCP servers: call them in the client.",
            param="integrations",
        )
    check_limit(asked.max_output_tokens, "max_output_tokens")
    fields = {name: getattr(asked, name) for name in NativeChatRequest.__struct_fields__}
    return NativeChatRequest(**{**fields, "input": _items(asked.input)})


def chat(asked: NativeChatRequest, earlier: Sequence[Message]) -> ChatRequest:
    """Return the chat completion that a request means.  `earlier`: the messages that it continues.

    Raises InvalidValue.
    """
    thinks = {"enable_thinking": True} if asked.reasoning == "on" else None
    return checked(
        ChatRequest(
            model=asked.model,
            messages=[*_system(asked, earlier), Message(role="user", content=_content(asked.input))],
            stream=asked.stream,
            temperature=asked.temperature,
            top_p=asked.top_p,
            top_k=asked.top_k,
            min_p=asked.min_p,
            repeat_penalty=asked.repeat_penalty,
            max_completion_tokens=asked.max_output_tokens,
            reasoning_effort=_effort(asked.reasoning),
            chat_template_kwargs=thinks,
        )
    )


def check_reasoning(setting: str | None, model: str, options: Sequence[str]) -> None:
    """Refuse a setting of reasoning that a model does not have among its `options`.  Raises InvalidValue."""
    if setting is None or setting in options:
        return
    if not options:
        raise InvalidValue(f"Model '{model}' does not expose reasoning configuration.", param="reasoning")
    raise InvalidValue(
        f"Reasoning setting '{setting}' is not supported by model '{model}'. "
        f"Supported settings: {', '.join(map(repr, options))}.",
        param="reasoning",
    )


def _items(given: str | list[msgspec.Raw]) -> str | list[ChatInput]:
    if isinstance(given, str):
        return given
    if not given:
        raise InvalidValue("'input': expected a text, or a list with at least one item.", param="input")
    if len(given) > MOST_PIECES:
        raise InvalidValue(f"'input': expected at most {MOST_PIECES:,} items, got {len(given):,}.", param="input")
    return [_item(bytes(raw), f"input.{i}") for i, raw in enumerate(given)]


def _item(raw: bytes, path: str) -> ChatInput:
    """Decode an item.  LM Studio's clients know these errors, which name all that is wrong with an item."""
    try:
        item = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    except msgspec.ValidationError:
        raise InvalidType(f"'{path}': expected an object.", param="input") from None
    match kind := _text(item, "type"):
        case "text" | "message":
            pass
        case "image":
            raise NotSupported(f"'{path}': images are not supported by this server.", param="input")
        case _:
            raise InvalidUnion("Invalid discriminator value. Expected 'text' | 'image'", param="input")
    content = _text(item, "content")
    problems = []
    if "content" not in item:
        problems.append(f"'{path}.content' is required")
    elif content is None:
        problems.append(f"'{path}.content': expected a string")
    if unknown := [key for key in item if key not in ChatInput.__struct_fields__]:
        problems.append(unrecognized(unknown))
    if problems:
        raise InvalidUnion(", ".join(problems), param="input")
    assert content is not None
    return ChatInput(type=kind, content=content)


def _text(item: dict[str, msgspec.Raw], name: str) -> str | None:
    """Return a field that has a text; None if it has none."""
    try:
        return msgspec.json.decode(item.get(name, b"null"), type=str | None)
    except msgspec.ValidationError:
        return None


def _content(given: str | list[ChatInput]) -> str | list[Part]:
    """Return the content of the message of the user."""
    if isinstance(given, str):
        return given
    return given[0].content if len(given) == 1 else [Part("text", item.content) for item in given]


def _system(asked: NativeChatRequest, earlier: Sequence[Message]) -> list[Message]:
    """Return earlier messages, with the system prompt of a request if it has one."""
    if asked.system_prompt is None:
        return [*earlier]
    others = earlier[1:] if earlier and earlier[0].role == "system" else earlier
    return [Message(role="system", content=asked.system_prompt), *others]


def _effort(setting: str | None) -> str | None:
    """Return a setting of reasoning as chat completions have it."""
    match setting:
        case None | "on":
            return None
        case "off":
            return "none"
        case _:
            return setting
