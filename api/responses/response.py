"""Responses as clients read them, and the items that they consist of."""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Any, Literal

from msgspec import Meta, Struct

from api.openai.answer import PromptDetails, TokenInfo
from api.responses.request import TEXT, FunctionTool, ReasoningOptions, ResponseRequest
from shared.channel.messages import Sampling, Usage

ItemStatus = Literal["in_progress", "completed", "incomplete"]

ItemId = Annotated[str, Meta(description="Id of the item.")]
ItemStatusOf = Annotated[ItemStatus, Meta(description="`incomplete`: the answer was cut within the item.")]
Logprobs = Annotated[list[TokenInfo], Meta(description="The tokens, if the request includes them; else none.")]


class OutputText(Struct, frozen=True, kw_only=True, tag="output_text"):
    """The text of a message."""

    text: Annotated[str, Meta(description="The text.")]
    annotations: Annotated[list[Any], Meta(description="Always empty.")] = []
    logprobs: Logprobs = []


class ReasoningText(Struct, frozen=True, kw_only=True, tag="reasoning_text"):
    """The text of a reasoning."""

    text: Annotated[str, Meta(description="The text.")]


Part = OutputText | ReasoningText


class ReasoningItem(Struct, frozen=True, kw_only=True, tag="reasoning"):
    """The reasoning before a message or a call."""

    id: ItemId
    status: ItemStatusOf
    summary: Annotated[list[Any], Meta(description="Always empty.")] = []
    content: Annotated[list[ReasoningText], Meta(description="Its text.")]


class MessageItem(Struct, frozen=True, kw_only=True, tag="message"):
    """A message."""

    id: ItemId
    status: ItemStatusOf
    role: Annotated[Literal["assistant"], Meta(description="Always `assistant`.")] = "assistant"
    content: Annotated[list[OutputText], Meta(description="Its text.")]


class CallItem(Struct, frozen=True, kw_only=True, tag="function_call"):
    """A call of a tool."""

    id: ItemId
    status: ItemStatusOf
    call_id: Annotated[str, Meta(description="Id of the call, to which its `function_call_output` refers.")]
    name: Annotated[str, Meta(description="Name of the function.")]
    arguments: Annotated[str, Meta(description="The arguments, a JSON object as text.")]


Item = ReasoningItem | MessageItem | CallItem


class OutputDetails(Struct, frozen=True):
    """More about the generated tokens."""

    reasoning_tokens: Annotated[int, Meta(description="How many belong to reasoning.")]


class ResponseUsage(Struct, frozen=True, kw_only=True):
    """The tokens of a response."""

    input_tokens: Annotated[int, Meta(description="Tokens of the prompt.")]
    input_tokens_details: Annotated[PromptDetails, Meta(description="More about the tokens of the prompt.")]
    output_tokens: Annotated[int, Meta(description="Generated tokens, with the reasoning.")]
    output_tokens_details: Annotated[OutputDetails, Meta(description="More about the generated tokens.")]
    total_tokens: Annotated[int, Meta(description="The sum of these.")]

    @classmethod
    def of(cls, usage: Usage) -> ResponseUsage:
        return cls(
            input_tokens=usage.prompt_tokens,
            input_tokens_details=PromptDetails(usage.cached_tokens),
            output_tokens=usage.generated_tokens,
            output_tokens_details=OutputDetails(usage.reasoning_tokens),
            total_tokens=usage.prompt_tokens + usage.generated_tokens,
        )


class IncompleteDetails(Struct, frozen=True):
    """Why a response is incomplete."""

    reason: Annotated[
        Literal["max_output_tokens"],
        Meta(description="It reached `max_output_tokens`, the operator's limit, or the end of the context."),
    ] = "max_output_tokens"


class ResponseError(Struct, frozen=True):
    """Why a response failed."""

    code: Annotated[str, Meta(description="The error, for programs.")]
    message: Annotated[str, Meta(description="The error, for people.")]


class ReasoningSettings(Struct, frozen=True):
    """How the model was to reason."""

    effort: Annotated[str | None, Meta(description="As the request has it.")] = None
    summary: Annotated[str | None, Meta(description="As the request has it.")] = None


class TextSettings(Struct, frozen=True):
    """The form that the answer was to have."""

    format: Annotated[dict[str, Any], Meta(description="As the request has it.")]


class ResponseObject(Struct, frozen=True, kw_only=True):
    """A response."""

    id: Annotated[str, Meta(description="Its id: `resp_` and 48 hexadecimal digits.")]
    object: Annotated[Literal["response"], Meta(description="Always `response`.")] = "response"
    created_at: Annotated[int, Meta(description="When it was begun, in seconds since the epoch.")]
    completed_at: Annotated[int | None, Meta(description="When it was completed; null if it is not.")] = None
    status: Annotated[
        Literal["in_progress", "completed", "incomplete", "failed"],
        Meta(description="What became of it: a response that was cut is `incomplete`."),
    ] = "in_progress"
    incomplete_details: Annotated[
        IncompleteDetails | None, Meta(description="Why it is incomplete; null if it is not.")
    ] = None
    error: Annotated[ResponseError | None, Meta(description="Why it failed; null if it did not.")] = None
    model: Annotated[str, Meta(description="Id of the instance that answered.")]
    previous_response_id: Annotated[str | None, Meta(description="The response that it continues; null if none.")]
    instructions: Annotated[str | None, Meta(description="As the request has them.")]
    output: Annotated[list[Item], Meta(description="What the model generated, in order.")] = []
    tools: Annotated[list[FunctionTool], Meta(description="The functions that the model could call.")]
    tool_choice: Annotated[str | dict[str, Any], Meta(description="As the request has it.")]
    parallel_tool_calls: Annotated[bool, Meta(description="Whether it could have several calls.")]
    truncation: Annotated[Literal["disabled"], Meta(description="Always `disabled`.")] = "disabled"
    text: Annotated[TextSettings, Meta(description="The form that the answer was to have.")]
    reasoning: Annotated[ReasoningSettings, Meta(description="How the model was to reason.")]
    temperature: Annotated[float, Meta(description="As it applied.")]
    top_p: Annotated[float, Meta(description="As it applied.")]
    presence_penalty: Annotated[float, Meta(description="As it applied.")]
    frequency_penalty: Annotated[float, Meta(description="As it applied.")]
    top_logprobs: Annotated[int, Meta(description="How many tokens at each place were to be returned.")]
    max_output_tokens: Annotated[int | None, Meta(description="As the request has it.")]
    max_tool_calls: Annotated[None, Meta(description="Always null.")] = None
    store: Annotated[bool, Meta(description="Whether it is stored.")]
    background: Annotated[bool, Meta(description="Always false.")] = False
    service_tier: Annotated[Literal["default"], Meta(description="Always `default`.")] = "default"
    metadata: Annotated[dict[str, str], Meta(description="As the request has them.")]
    safety_identifier: Annotated[None, Meta(description="Always null.")] = None
    prompt_cache_key: Annotated[str | None, Meta(description="As the request has it.")]
    usage: Annotated[ResponseUsage | None, Meta(description="Its tokens; null until it ends.")] = None


def begun(
    asked: ResponseRequest, tools: list[FunctionTool], model: str, sampling: Sampling, *, stores: bool
) -> ResponseObject:
    """Return a response of which nothing is generated.  `model` is the id of its instance."""
    reasoning = asked.reasoning or ReasoningOptions()
    return ResponseObject(
        id=f"resp_{secrets.token_hex(24)}",
        created_at=int(time.time()),
        model=model,
        previous_response_id=asked.previous_response_id,
        instructions=asked.instructions,
        tools=tools,
        tool_choice=asked.tool_choice or "auto",
        parallel_tool_calls=asked.parallel_tool_calls is not False,
        text=TextSettings(asked.format or TEXT),
        reasoning=ReasoningSettings(reasoning.effort, reasoning.summary),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        top_logprobs=asked.top_logprobs or 0,
        max_output_tokens=asked.max_output_tokens,
        store=stores,
        metadata=asked.metadata or {},
        prompt_cache_key=asked.prompt_cache_key,
    )


class DeletedResponse(Struct, frozen=True, kw_only=True):
    """A response that was removed."""

    id: Annotated[str, Meta(description="Its id.")]
    object: Annotated[Literal["response"], Meta(description="Always `response`.")] = "response"
    deleted: Annotated[bool, Meta(description="Always true.")] = True


class DeletedResponses(Struct, frozen=True, kw_only=True):
    """The responses that were removed."""

    object: Annotated[Literal["list"], Meta(description="Always `list`.")] = "list"
    deleted: Annotated[int, Meta(description="How many there were.")]
