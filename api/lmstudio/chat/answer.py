"""The form of answers of LM Studio's chat: phases, each of which comes at most once, in a strict order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, assert_never

from msgspec import UNSET, Struct

from api.errors import ErrorReply
from api.lmstudio.answers import STOPS
from api.lmstudio.chat.events import (
    ChatEnd,
    ChatError,
    ChatMessage,
    ChatMessageDelta,
    ChatMessageEnd,
    ChatMessageStart,
    ChatPromptEnd,
    ChatPromptProgress,
    ChatPromptStart,
    ChatReasoning,
    ChatReasoningDelta,
    ChatReasoningEnd,
    ChatReasoningStart,
    ChatResult,
    ChatStart,
    ChatStats,
    Event,
    NativeStop,
    Output,
)
from api.openai.answer import HEARTBEAT, Timings
from api.openai.request import Message
from api.waiting import encoded
from shared.channel.messages import Delta, Usage

Phase = Literal["prompt", "reasoning", "message", "over"]


class Chatting:
    """The form of one answer.

    Strict clients allow each phase once.  A model that reasons again after it has begun its answer goes on with the
    answer, so what it generates is neither lost nor out of order.
    """

    def __init__(self, instance_id: str, prompt_tokens: int, *, load_s: float | None, response_id: str | None) -> None:
        """`load_s`: how long the load took that the request waited for; None: it waited for none.

        `response_id`: of the conversation, if it is going to be stored.
        """
        self._instance_id, self._prompt_tokens = instance_id, prompt_tokens
        self._load_s, self._response_id = load_s, response_id
        self._phase: Phase = "prompt"
        self._reasoning: list[str] = []
        self._message: list[str] = []
        self._stop: NativeStop = "failed"

    @property
    def said(self) -> Message:
        """The answer, as the conversation has it."""
        return Message(
            role="assistant", content="".join(self._message), reasoning_content="".join(self._reasoning) or None
        )

    def is_not_stored(self) -> None:
        """Let the answer say that its conversation cannot be continued."""
        self._response_id = None

    def add(self, delta: Delta) -> None:
        for _ in self._events(delta):
            pass

    def whole(self, usage: Usage) -> ChatResult:
        return self._result(
            ChatStats(
                input_tokens=usage.prompt_tokens,
                total_output_tokens=usage.generated_tokens,
                reasoning_output_tokens=usage.reasoning_tokens,
                tokens_per_second=Timings.of(usage).predicted_per_second,
                time_to_first_token_seconds=usage.wait_s + usage.prompt_s,
                model_load_time_seconds=UNSET if self._load_s is None else self._load_s,
                stop_reason=self._stop,
            )
        )

    def first(self) -> bytes:
        """Return the first events.  Those of a load have already told of the start."""
        starts: list[Event] = [] if self._load_s is not None else [ChatStart(self._instance_id)]
        return _joined([*starts, ChatPromptStart()])

    def added(self, delta: Delta) -> bytes:
        return _joined(self._events(delta))

    def last(self, usage: Usage) -> bytes:
        return encoded(ChatEnd(self.whole(usage)))

    def read(self, share: float) -> bytes:
        return encoded(ChatPromptProgress(share))

    def waiting(self) -> bytes:
        return HEARTBEAT

    def failed(self, error: Struct) -> bytes:
        """Return the error, and the end with what there is.  Of the statistics, the prompt's tokens are all that is
        known."""
        assert isinstance(error, ErrorReply)
        self._stop, self._response_id = "failed", None
        stats = ChatStats(
            input_tokens=self._prompt_tokens,
            total_output_tokens=0,
            reasoning_output_tokens=0,
            tokens_per_second=0.0,
            time_to_first_token_seconds=0.0,
            model_load_time_seconds=UNSET if self._load_s is None else self._load_s,
            stop_reason="failed",
        )
        return _joined([ChatError(error.error), ChatEnd(self._result(stats))])

    def _result(self, stats: ChatStats) -> ChatResult:
        reasoning, message = "".join(self._reasoning), "".join(self._message)
        output: list[Output] = [ChatReasoning(reasoning)] if reasoning else []
        if message or not reasoning:
            output.append(ChatMessage(message))
        return ChatResult(
            model_instance_id=self._instance_id,
            output=output,
            stats=stats,
            response_id=self._response_id or UNSET,
        )

    def _events(self, delta: Delta) -> Iterator[Event]:
        """Yield the events for an addition: of reasoning, then of text, then of the end."""
        if delta.reasoning:
            yield from self._more("message" if self._phase == "message" else "reasoning", delta.reasoning)
        if delta.text:
            yield from self._more("message", delta.text)
        if delta.finish is not None:
            assert delta.stop is not None
            self._stop = STOPS[delta.stop.reason]
            if not self._reasoning and not self._message:
                yield from self._enter("message")
            yield from self._enter("over")

    def _more(self, phase: Literal["reasoning", "message"], text: str) -> Iterator[Event]:
        if self._phase != phase:
            yield from self._enter(phase)
        match phase:
            case "reasoning":
                self._reasoning.append(text)
                yield ChatReasoningDelta(text)
            case "message":
                self._message.append(text)
                yield ChatMessageDelta(text)
            case _:
                assert_never(phase)

    def _enter(self, phase: Phase) -> Iterator[Event]:
        """End a phase, and begin the next one."""
        match self._phase:
            case "prompt":
                yield ChatPromptEnd()
            case "reasoning":
                yield ChatReasoningEnd()
            case "message":
                yield ChatMessageEnd()
            case "over":
                pass
            case _:
                assert_never(self._phase)
        self._phase = phase
        match phase:
            case "reasoning":
                yield ChatReasoningStart()
            case "message":
                yield ChatMessageStart()
            case "prompt" | "over":
                pass
            case _:
                assert_never(phase)


def _joined(events: Iterator[Event] | list[Event]) -> bytes:
    return b"".join(map(encoded, events))
