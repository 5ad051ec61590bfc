"""Answers in the form of Anthropic's API: a message of blocks, whole or as events.

Each block is closed before the next one begins, and has deltas of its own kind only: clients fail on anything else.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from typing import Annotated, Literal, assert_never

import msgspec
from msgspec import Meta, Struct

from api.waiting import encoded
from shared.channel.messages import Delta, Usage

StopReason = Literal["end_turn", "max_tokens", "stop_sequence", "tool_use", "model_context_window_exceeded"]
Kind = Literal["thinking", "text", "tool_use"]
EMPTY = msgspec.Raw(b"{}")

Index = Annotated[int, Meta(description="Number of the block, from 0.")]


class TextBlock(Struct, frozen=True, tag="text"):
    """Text of the answer."""

    text: Annotated[str, Meta(description="The text; empty where the block begins.")]


class ThinkingBlock(Struct, frozen=True, tag="thinking"):
    """The reasoning before the answer."""

    thinking: Annotated[str, Meta(description="The reasoning; empty where the block begins.")]
    signature: Annotated[str, Meta(description="Always empty.")] = ""


class ToolUseBlock(Struct, frozen=True, tag="tool_use"):
    """A call of a tool."""

    id: Annotated[str, Meta(description="Id of the call, to which the `tool_result` refers.")]
    name: Annotated[str, Meta(description="Name of the tool.")]
    input: Annotated[
        msgspec.Raw,
        Meta(
            description="The arguments, an object. Empty where the block begins, and if the answer was cut within them."
        ),
    ]


Block = ThinkingBlock | TextBlock | ToolUseBlock


class MessageUsage(Struct, frozen=True, kw_only=True):
    """The tokens of a request."""

    input_tokens: Annotated[
        int,
        Meta(
            description="Tokens of the prompt that were processed. In `message_start`, when they are not known yet: "
            "all tokens of the prompt."
        ),
    ]
    cache_creation_input_tokens: Annotated[int, Meta(description="Always 0.")] = 0
    cache_read_input_tokens: Annotated[
        int,
        Meta(description="Tokens of the prompt that were not processed again, since an earlier request began so."),
    ] = 0
    output_tokens: Annotated[int, Meta(description="Generated tokens, with those of the reasoning.")]

    @classmethod
    def of(cls, usage: Usage) -> MessageUsage:
        return cls(
            input_tokens=usage.prompt_tokens - usage.cached_tokens,
            cache_read_input_tokens=usage.cached_tokens,
            output_tokens=usage.generated_tokens,
        )


StopReasonOf = Annotated[
    StopReason | None,
    Meta(
        description="`end_turn`: the model ended the answer. `stop_sequence`: it wrote one. `tool_use`: it ended it "
        "with calls of tools. `max_tokens`: it reached the limit of the request, or of the operator. "
        "`model_context_window_exceeded`: the context is full. Null in `message_start`."
    ),
]
StopSequenceOf = Annotated[str | None, Meta(description="The stop sequence that the model wrote; else null.")]


class AnthropicMessage(Struct, frozen=True, kw_only=True):
    """An answer."""

    id: Annotated[str, Meta(description="Id of the answer.")]
    type: Annotated[Literal["message"], Meta(description="Always `message`.")] = "message"
    role: Annotated[Literal["assistant"], Meta(description="Always `assistant`.")] = "assistant"
    model: Annotated[str, Meta(description="Id of the instance that answered.")]
    content: Annotated[
        list[Block], Meta(description="The blocks, in the order in which they were generated; none in `message_start`.")
    ]
    stop_reason: StopReasonOf
    stop_sequence: StopSequenceOf
    usage: Annotated[MessageUsage, Meta(description="The tokens of the request.")]


# ---- events


class TextDelta(Struct, frozen=True, tag="text_delta"):
    """An addition to a block of text."""

    text: Annotated[str, Meta(description="The text.")]


class ThinkingDelta(Struct, frozen=True, tag="thinking_delta"):
    """An addition to a block of reasoning."""

    thinking: Annotated[str, Meta(description="The text.")]


class SignatureDelta(Struct, frozen=True, tag="signature_delta"):
    """The last addition to a block of reasoning."""

    signature: Annotated[str, Meta(description="Always empty.")] = ""


class InputDelta(Struct, frozen=True, tag="input_json_delta"):
    """An addition to a call of a tool."""

    partial_json: Annotated[str, Meta(description="Text of the arguments; all of it joins to a JSON object.")]


BlockDelta = TextDelta | ThinkingDelta | SignatureDelta | InputDelta


class MessageStart(Struct, frozen=True, tag="message_start"):
    """The answer begins."""

    message: Annotated[AnthropicMessage, Meta(description="The answer, without any content.")]


class BlockStart(Struct, frozen=True, tag="content_block_start"):
    """A block begins."""

    index: Index
    content_block: Annotated[Block, Meta(description="The block, without its content.")]


class BlockAddition(Struct, frozen=True, tag="content_block_delta"):
    """A block gets more content."""

    index: Index
    delta: Annotated[BlockDelta, Meta(description="What is added, of the kind of the block.")]


class BlockStop(Struct, frozen=True, tag="content_block_stop"):
    """A block ends.  The next one begins later."""

    index: Index


class Ending(Struct, frozen=True, kw_only=True):
    """How an answer ended."""

    stop_reason: StopReasonOf
    stop_sequence: StopSequenceOf


class MessageEnd(Struct, frozen=True, tag="message_delta"):
    """All blocks have ended."""

    delta: Annotated[Ending, Meta(description="How the answer ended.")]
    usage: Annotated[MessageUsage, Meta(description="The tokens of the request.")]


class MessageStop(Struct, frozen=True, tag="message_stop"):
    """The answer is complete.  Nothing follows."""


class Ping(Struct, frozen=True, tag="ping"):
    """Nothing has happened for a while."""


Event = MessageStart | BlockStart | BlockAddition | BlockStop | MessageEnd | MessageStop | Ping


class _Piece(Struct, frozen=True):
    """What is added to a block, or begins one."""

    kind: Kind
    text: str
    id: str = ""  # of a call that begins
    name: str = ""

    def continues(self, kind: Kind | None) -> bool:
        """Return whether this belongs to a block of a kind that is open."""
        return self.kind == kind and not self.id

    def delta(self) -> BlockDelta:
        match self.kind:
            case "thinking":
                return ThinkingDelta(self.text)
            case "text":
                return TextDelta(self.text)
            case "tool_use":
                return InputDelta(self.text)
            case _:
                assert_never(self.kind)

    def block(self, content: str) -> Block:
        """Return the block that this begins, with some content."""
        match self.kind:
            case "thinking":
                return ThinkingBlock(content)
            case "text":
                return TextBlock(content)
            case "tool_use":
                return ToolUseBlock(self.id, self.name, _object(content))
            case _:
                assert_never(self.kind)


class Answer:
    """The form of one reply."""

    def __init__(self, model: str, prompt_tokens: int) -> None:
        self._id = f"msg_{secrets.token_hex(12)}"
        self._model, self._prompt_tokens = model, prompt_tokens
        self._blocks: list[tuple[_Piece, list[str]]] = []  # of a whole reply
        self._open: Kind | None = None  # block of a stream
        self._n_begun = 0
        self._end = Ending(stop_reason=None, stop_sequence=None)

    def add(self, delta: Delta) -> None:
        for piece in _pieces(delta):
            if not self._blocks or not piece.continues(self._blocks[-1][0].kind):
                self._blocks.append((piece, []))
            self._blocks[-1][1].append(piece.text)
        self._note(delta)

    def whole(self, usage: Usage) -> AnthropicMessage:
        content = [piece.block("".join(texts)) for piece, texts in self._blocks]
        return self._message(content, MessageUsage.of(usage))

    def first(self) -> bytes:
        usage = MessageUsage(input_tokens=self._prompt_tokens, output_tokens=0)
        return encoded(MessageStart(self._message([], usage)))

    def added(self, delta: Delta) -> bytes:
        """Return the events for an addition."""
        events: list[Event] = []
        for piece in _pieces(delta):
            if not piece.continues(self._open):
                events += self._closed()
                events.append(BlockStart(self._n_begun, piece.block("")))
                self._open, self._n_begun = piece.kind, self._n_begun + 1
            if piece.text:
                events.append(BlockAddition(self._n_begun - 1, piece.delta()))
        self._note(delta)
        return b"".join(map(encoded, events))

    def last(self, usage: Usage) -> bytes:
        return b"".join(map(encoded, [*self._closed(), MessageEnd(self._end, MessageUsage.of(usage)), MessageStop()]))

    def read(self, share: float) -> bytes:
        return b""

    def waiting(self) -> bytes:
        return encoded(Ping())

    def failed(self, error: Struct) -> bytes:
        return b"event: error\ndata: %b\n\n" % msgspec.json.encode(error)

    def _closed(self) -> list[Event]:
        """Return the events that end the open block, if there is one."""
        if self._open is None:
            return []
        index = self._n_begun - 1
        signed: list[Event] = [BlockAddition(index, SignatureDelta())] if self._open == "thinking" else []
        self._open = None
        return [*signed, BlockStop(index)]

    def _note(self, delta: Delta) -> None:
        if delta.finish is not None:
            self._end = _ending(delta)

    def _message(self, content: list[Block], usage: MessageUsage) -> AnthropicMessage:
        end = self._end
        return AnthropicMessage(
            id=self._id,
            model=self._model,
            content=content,
            stop_reason=end.stop_reason,
            stop_sequence=end.stop_sequence,
            usage=usage,
        )


def _pieces(delta: Delta) -> Iterator[_Piece]:
    """Yield reasoning, text and a call.  The rest of a call comes before the text, which follows it."""
    call = delta.tool
    if call is not None and not call.id:
        yield _Piece("tool_use", call.arguments)
    if delta.reasoning:
        yield _Piece("thinking", delta.reasoning)
    if delta.text:
        yield _Piece("text", delta.text)
    if call is not None and call.id:
        yield _Piece("tool_use", call.arguments, f"toolu_{call.id.removeprefix('call_')}", call.name)


def _ending(delta: Delta) -> Ending:
    """Return how an answer ended, from its last addition."""
    assert delta.stop is not None
    if delta.finish == "tool_calls":
        return Ending(stop_reason="tool_use", stop_sequence=None)
    match delta.stop.reason:
        case "eos":
            return Ending(stop_reason="end_turn", stop_sequence=None)
        case "string":
            return Ending(stop_reason="stop_sequence", stop_sequence=delta.stop.string)
        case "max_tokens":
            return Ending(stop_reason="max_tokens", stop_sequence=None)
        case "context":
            return Ending(stop_reason="model_context_window_exceeded", stop_sequence=None)
        case _:
            assert_never(delta.stop.reason)


def _object(arguments: str) -> msgspec.Raw:
    """Return arguments as an object; an empty one if they are not whole."""
    try:
        msgspec.json.decode(arguments, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, RecursionError):
        return EMPTY
    return msgspec.Raw(arguments.encode())
