"""Answers of LM Studio's chat: the whole one, and the events of one that is streamed."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from api.lmstudio.answers import LegacyStop
from shared.errors import ErrorBody

NativeStop = LegacyStop | Literal["failed"]
InstanceId = Annotated[str, Meta(description="Id of the instance that answers.")]
Progress = Annotated[float, Meta(description="How much is done, from 0 to 1.")]
Content = Annotated[str, Meta(description="The text.")]


class ChatMessage(Struct, frozen=True, tag="message"):
    """The answer itself."""

    content: Content


class ChatReasoning(Struct, frozen=True, tag="reasoning"):
    """The reasoning before the answer."""

    content: Content


Output = ChatReasoning | ChatMessage


class ChatStats(Struct, frozen=True, kw_only=True):
    """How an answer was generated."""

    input_tokens: Annotated[int, Meta(description="Tokens of the prompt, with the conversation that it continues.")]
    total_output_tokens: Annotated[int, Meta(description="Generated tokens, with those of the reasoning.")]
    reasoning_output_tokens: Annotated[int, Meta(description="How many of them belong to the reasoning.")]
    tokens_per_second: Annotated[float, Meta(description="Generated tokens per second.")]
    time_to_first_token_seconds: Annotated[
        float, Meta(description="Seconds from the arrival at the engine to the first token.")
    ]
    model_load_time_seconds: Annotated[
        float | UnsetType, Meta(description="Seconds that the load of the model took, if the request waited for one.")
    ] = UNSET
    stop_reason: Annotated[
        NativeStop,
        Meta(
            description="Why the answer ended: by itself, at a stop string, at its limit of tokens, or at the end of "
            "the context. `failed`: after an error, of which the other statistics but `input_tokens` are 0."
        ),
    ]


class ChatResult(Struct, frozen=True, kw_only=True):
    """An answer of LM Studio's chat."""

    model_instance_id: Annotated[str, Meta(description="Id of the instance that answered.")]
    output: Annotated[list[Output], Meta(description="The reasoning, if there is any, and the answer.")]
    stats: Annotated[ChatStats, Meta(description="How the answer was generated.")]
    response_id: Annotated[
        str | UnsetType,
        Meta(
            description="Id with which a later request continues the conversation; absent if it is not stored.",
        ),
    ] = UNSET


class ChatStart(Struct, frozen=True, tag="chat.start"):
    """The request is accepted, or the load of its model has begun."""

    model_instance_id: InstanceId


class ChatLoadStart(Struct, frozen=True, tag="model_load.start"):
    """The model is being loaded.  Without such a load there are no events about one."""

    model_instance_id: InstanceId


class ChatLoadProgress(Struct, frozen=True, tag="model_load.progress"):
    """More of the model is loaded."""

    model_instance_id: InstanceId
    progress: Progress


class ChatLoadEnd(Struct, frozen=True, tag="model_load.end"):
    """The model is loaded."""

    model_instance_id: InstanceId
    load_time_seconds: Annotated[float, Meta(description="How long that took, in seconds.")]


class ChatPromptStart(Struct, frozen=True, tag="prompt_processing.start"):
    """The model has the prompt."""


class ChatPromptProgress(Struct, frozen=True, tag="prompt_processing.progress"):
    """More of the prompt is processed."""

    progress: Progress


class ChatPromptEnd(Struct, frozen=True, tag="prompt_processing.end"):
    """The prompt is processed."""


class ChatReasoningStart(Struct, frozen=True, tag="reasoning.start"):
    """The model begins to reason."""


class ChatReasoningDelta(Struct, frozen=True, tag="reasoning.delta"):
    """More of the reasoning."""

    content: Content


class ChatReasoningEnd(Struct, frozen=True, tag="reasoning.end"):
    """The reasoning is over."""


class ChatMessageStart(Struct, frozen=True, tag="message.start"):
    """The answer begins."""


class ChatMessageDelta(Struct, frozen=True, tag="message.delta"):
    """More of the answer."""

    content: Content


class ChatMessageEnd(Struct, frozen=True, tag="message.end"):
    """The answer is over."""


class ChatError(Struct, frozen=True, tag="error"):
    """The request failed.  Only `chat.end` follows."""

    error: Annotated[ErrorBody, Meta(description="Why.")]


class ChatEnd(Struct, frozen=True, tag="chat.end"):
    """The last event."""

    result: Annotated[ChatResult, Meta(description="The whole answer, as a request without `stream` gets it.")]


Event = (
    ChatStart
    | ChatLoadStart
    | ChatLoadProgress
    | ChatLoadEnd
    | ChatPromptStart
    | ChatPromptProgress
    | ChatPromptEnd
    | ChatReasoningStart
    | ChatReasoningDelta
    | ChatReasoningEnd
    | ChatMessageStart
    | ChatMessageDelta
    | ChatMessageEnd
    | ChatError
    | ChatEnd
)
