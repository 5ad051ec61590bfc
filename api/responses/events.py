"""The events of a streamed response."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from api.responses.response import Item, ItemId, Logprobs, Part, ResponseObject

Sequence = Annotated[int, Meta(description="Number of the event, from 0.")]
OutputIndex = Annotated[int, Meta(description="Number of the item in `output`, from 0.")]
ContentIndex = Annotated[int, Meta(description="Number of the part in the item: always 0.")]


class _Event(Struct, frozen=True, kw_only=True):
    sequence_number: Sequence


class _OfResponse(_Event, frozen=True, kw_only=True):
    response: Annotated[ResponseObject, Meta(description="The response, as it is now.")]


class ResponseCreated(_OfResponse, frozen=True, kw_only=True, tag="response.created"):
    """The response is begun."""


class ResponseInProgress(_OfResponse, frozen=True, kw_only=True, tag="response.in_progress"):
    """The model processes the prompt."""


class ResponseCompleted(_OfResponse, frozen=True, kw_only=True, tag="response.completed"):
    """The response is complete.  It is the last event."""


class ResponseIncomplete(_OfResponse, frozen=True, kw_only=True, tag="response.incomplete"):
    """The response was cut.  It is the last event."""


class ResponseFailed(_OfResponse, frozen=True, kw_only=True, tag="response.failed"):
    """The response failed.  It is the last event."""


class _OfOutput(_Event, frozen=True, kw_only=True):
    output_index: OutputIndex


class ItemAdded(_OfOutput, frozen=True, kw_only=True, tag="response.output_item.added"):
    """An item begins."""

    item: Annotated[Item, Meta(description="The item, without content.")]


class ItemDone(_OfOutput, frozen=True, kw_only=True, tag="response.output_item.done"):
    """An item ends."""

    item: Annotated[Item, Meta(description="The whole item.")]


class _OfItem(_OfOutput, frozen=True, kw_only=True):
    item_id: ItemId


class _OfPart(_OfItem, frozen=True, kw_only=True):
    content_index: ContentIndex = 0


class PartAdded(_OfPart, frozen=True, kw_only=True, tag="response.content_part.added"):
    """A part of an item begins."""

    part: Annotated[Part, Meta(description="The part, without text.")]


class PartDone(_OfPart, frozen=True, kw_only=True, tag="response.content_part.done"):
    """A part of an item ends."""

    part: Annotated[Part, Meta(description="The whole part.")]


class ReasoningTextDelta(_OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.delta"):
    """More of a reasoning."""

    delta: Annotated[str, Meta(description="The text.")]


class ReasoningTextDone(_OfPart, frozen=True, kw_only=True, tag="response.reasoning_text.done"):
    """The text of a reasoning ends."""

    text: Annotated[str, Meta(description="The whole text.")]


class OutputTextDelta(_OfPart, frozen=True, kw_only=True, tag="response.output_text.delta"):
    """More of a message."""

    delta: Annotated[str, Meta(description="The text.")]
    logprobs: Logprobs


class OutputTextDone(_OfPart, frozen=True, kw_only=True, tag="response.output_text.done"):
    """The text of a message ends."""

    text: Annotated[str, Meta(description="The whole text.")]
    logprobs: Logprobs


class ArgumentsDelta(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.delta"):
    """More of the arguments of a call."""

    delta: Annotated[str, Meta(description="The text.")]


class ArgumentsDone(_OfItem, frozen=True, kw_only=True, tag="response.function_call_arguments.done"):
    """The arguments of a call end."""

    name: Annotated[str, Meta(description="Name of the function.")]
    arguments: Annotated[str, Meta(description="All arguments, a JSON object as text.")]


Event = (
    ResponseCreated
    | ResponseInProgress
    | ItemAdded
    | PartAdded
    | ReasoningTextDelta
    | ReasoningTextDone
    | OutputTextDelta
    | OutputTextDone
    | PartDone
    | ArgumentsDelta
    | ArgumentsDone
    | ItemDone
    | ResponseCompleted
    | ResponseIncomplete
    | ResponseFailed
)
