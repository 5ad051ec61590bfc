"""Chat completions as clients read them: whole, and in chunks.

The order and the fields follow what real clients were measured to need: `role` in the first delta of a choice and in
no other, `index` in every choice, one choice per chunk, `finish_reason` in the last chunk of a choice, and the usage in
one chunk only.
"""

from __future__ import annotations

import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.channel.messages import Delta, Finish, TokenLogprobs, ToolDelta, Usage

DONE = b"data: [DONE]\n\n"
HEARTBEAT = b":\n\n"  # a bare comment: some clients take ": text" for the end of the stream


TokenText = Annotated[
    str, Meta(description="Text of the token. What is not whole in UTF-8 is shown as a replacement character.")
]
Log = Annotated[float, Meta(description="Natural logarithm of its probability, before sampling changed it.")]
Bytes = Annotated[list[int], Meta(description="Text of the token in UTF-8, which may be part of a character.")]
Index = Annotated[int, Meta(description="Number of the answer, from 0.")]
Id = Annotated[str, Meta(description="Id of the reply.")]
Created = Annotated[int, Meta(description="When the answer was begun, in seconds since the epoch.")]
ModelId = Annotated[str, Meta(description="Id of the instance that answered.")]
Fingerprint = Annotated[str, Meta(description="Identifies the engine: `b` and the commit of llama.cpp.")]


class Alternative(Struct, frozen=True):
    """A token that could have been chosen."""

    token: TokenText
    logprob: Log
    bytes: Bytes


class TokenInfo(Struct, frozen=True):
    """A generated token."""

    token: TokenText
    logprob: Log
    bytes: Bytes
    top_logprobs: Annotated[
        list[Alternative], Meta(description="The most probable tokens at its place, most probable first.")
    ]


class Logprobs(Struct, frozen=True):
    """Log probabilities of an answer, or of a part of it."""

    content: Annotated[list[TokenInfo], Meta(description="The tokens, in order.")]
    refusal: Annotated[None, Meta(description="Always null.")] = None


LogprobsOf = Annotated[Logprobs | None, Meta(description="The tokens, if the request has `logprobs`; else null.")]


class PromptDetails(Struct, frozen=True):
    """More about the tokens of the prompt."""

    cached_tokens: Annotated[
        int, Meta(description="How many were not processed again, since an earlier request began with them.")
    ]


class CompletionDetails(Struct, frozen=True):
    """More about the generated tokens."""

    reasoning_tokens: Annotated[int, Meta(description="How many belong to the reasoning before the answers.")]


class CompletionUsage(Struct, frozen=True, kw_only=True):
    """The tokens of a request."""

    prompt_tokens: Annotated[int, Meta(description="Tokens of the prompt.")]
    completion_tokens: Annotated[int, Meta(description="Generated tokens of all answers, with their reasoning.")]
    total_tokens: Annotated[int, Meta(description="The sum of these.")]
    prompt_tokens_details: Annotated[PromptDetails, Meta(description="More about the tokens of the prompt.")]
    completion_tokens_details: Annotated[CompletionDetails, Meta(description="More about the generated tokens.")]

    @classmethod
    def of(cls, usage: Usage) -> CompletionUsage:
        return cls(
            prompt_tokens=usage.prompt_tokens,
            completion_tokens=usage.generated_tokens,
            total_tokens=usage.prompt_tokens + usage.generated_tokens,
            prompt_tokens_details=PromptDetails(usage.cached_tokens),
            completion_tokens_details=CompletionDetails(usage.reasoning_tokens),
        )


class Timings(Struct, frozen=True, kw_only=True):
    """Where the time of a request went, as llama-server reports it, and how long it waited."""

    queued_ms: Annotated[float, Meta(description="Milliseconds from its arrival at the engine to its first step.")]
    cache_n: Annotated[int, Meta(description="Tokens of the prompt that were not processed again.")]
    prompt_n: Annotated[int, Meta(description="Tokens of the prompt that were processed.")]
    prompt_ms: Annotated[float, Meta(description="Milliseconds from the first step to the first token.")]
    prompt_per_second: Annotated[float, Meta(description="Processed tokens of the prompt per second.")]
    predicted_n: Annotated[int, Meta(description="Generated tokens of all answers.")]
    predicted_ms: Annotated[float, Meta(description="Milliseconds from the first token to the last one.")]
    predicted_per_second: Annotated[float, Meta(description="Generated tokens per second.")]

    @classmethod
    def of(cls, usage: Usage) -> Timings:
        processed = usage.prompt_tokens - usage.cached_tokens
        return cls(
            queued_ms=usage.wait_s * 1000,
            cache_n=usage.cached_tokens,
            prompt_n=processed,
            prompt_ms=usage.prompt_s * 1000,
            prompt_per_second=_rate(processed, usage.prompt_s),
            predicted_n=usage.generated_tokens,
            predicted_ms=usage.generation_s * 1000,
            predicted_per_second=_rate(usage.generated_tokens, usage.generation_s),
        )


def _rate(n: int, seconds: float) -> float:
    return n / seconds if seconds > 0 else 0.0


class CalledFunction(Struct, frozen=True):
    """The function of a call."""

    name: Annotated[str, Meta(description="Name of the tool.")]
    arguments: Annotated[str, Meta(description="The arguments, a JSON object as text.")]


class Call(Struct, frozen=True, kw_only=True):
    """A call of a tool."""

    id: Annotated[str, Meta(description="Id of the call, to which the message with its result refers.")]
    type: Annotated[Literal["function"], Meta(description="Always `function`.")] = "function"
    function: Annotated[CalledFunction, Meta(description="What is called.")]


class AnswerMessage(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The message of an answer."""

    role: Annotated[Literal["assistant"], Meta(description="Always `assistant`.")]
    content: Annotated[str | None, Meta(description="Text of the answer. Null if there is none beside calls of tools.")]
    reasoning_content: Annotated[
        str | UnsetType, Meta(description="The reasoning before the answer; absent if there is none.")
    ] = UNSET
    tool_calls: Annotated[list[Call] | UnsetType, Meta(description="The calls of tools; absent if there are none.")] = (
        UNSET
    )


class Choice(Struct, frozen=True, kw_only=True):
    """One answer."""

    index: Index
    message: Annotated[AnswerMessage, Meta(description="The answer.")]
    logprobs: LogprobsOf
    finish_reason: Annotated[
        Finish,
        Meta(
            description="`stop`: the model ended the answer, or it reached a stop string. `tool_calls`: it ended it "
            "with calls of tools. `length`: it was cut."
        ),
    ]


class Completion(Struct, frozen=True, kw_only=True):
    """The reply to a request that is not streamed."""

    id: Id
    object: Annotated[Literal["chat.completion"], Meta(description="Always `chat.completion`.")] = "chat.completion"
    created: Created
    model: ModelId
    system_fingerprint: Fingerprint
    choices: Annotated[list[Choice], Meta(description="The answers, `n` of them.")]
    usage: Annotated[CompletionUsage, Meta(description="The tokens of the request.")]
    timings: Annotated[Timings, Meta(description="Where the time of the request went.")]


class FunctionDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is added to the function of a call."""

    name: Annotated[
        str | UnsetType, Meta(description="Name of the tool, in the first addition to a call and in no other.")
    ] = UNSET
    arguments: Annotated[str, Meta(description="Text of the arguments, which joins to a JSON object.")]


class CallDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is added to a call of a tool."""

    index: Annotated[int, Meta(description="Number of the call in the answer, from 0.")]
    id: Annotated[str | UnsetType, Meta(description="Id of the call, in the first addition to it and in no other.")] = (
        UNSET
    )
    type: Annotated[
        Literal["function"] | UnsetType, Meta(description="`function`, in the first addition and in no other.")
    ] = UNSET
    function: Annotated[FunctionDelta, Meta(description="What is added to its function.")]


class ChunkDelta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What is added to an answer."""

    role: Annotated[
        Literal["assistant"] | UnsetType, Meta(description="In the first chunk of an answer, and in no other.")
    ] = UNSET
    content: Annotated[str | UnsetType, Meta(description="Text of the answer.")] = UNSET
    reasoning_content: Annotated[str | UnsetType, Meta(description="Text of the reasoning before it.")] = UNSET
    tool_calls: Annotated[
        list[CallDelta] | UnsetType, Meta(description="An addition to one call of a tool, without any text.")
    ] = UNSET


class ChunkChoice(Struct, frozen=True, kw_only=True):
    """An addition to one answer."""

    index: Index
    delta: Annotated[ChunkDelta, Meta(description="What is added.")]
    logprobs: LogprobsOf = None
    finish_reason: Annotated[Finish | None, Meta(description="Why the answer ends, in its last chunk; else null.")] = (
        None
    )


class Chunk(Struct, frozen=True, kw_only=True):
    """An event of a streamed reply."""

    id: Id
    object: Annotated[Literal["chat.completion.chunk"], Meta(description="Always `chat.completion.chunk`.")] = (
        "chat.completion.chunk"
    )
    created: Created
    model: ModelId
    system_fingerprint: Fingerprint
    choices: Annotated[list[ChunkChoice], Meta(description="One addition; none in the chunk with the usage.")]
    usage: Annotated[
        CompletionUsage | UnsetType,
        Meta(description="The tokens of the request, in the last chunk if `stream_options.include_usage` is set."),
    ] = UNSET
    timings: Annotated[
        Timings | UnsetType, Meta(description="Where the time of the request went, in the chunk with the usage.")
    ] = UNSET


class Heading:
    """What every part of one reply repeats."""

    def __init__(self, model: str, fingerprint: str) -> None:
        self.id = f"chatcmpl-{secrets.token_hex(12)}"
        self.created = int(time.time())
        self.model = model
        self.fingerprint = fingerprint

    def chunk(self, choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
        """Return a chunk as an event."""
        chunk = Chunk(
            id=self.id,
            created=self.created,
            model=self.model,
            system_fingerprint=self.fingerprint,
            choices=choices,
            usage=UNSET if usage is None else CompletionUsage.of(usage),
            timings=UNSET if usage is None else Timings.of(usage),
        )
        return b"data: %b\n\n" % msgspec.json.encode(chunk)

    def first(self, choices: int) -> bytes:
        """Return the first chunk of each choice, in order."""
        delta = ChunkDelta(role="assistant", content="")
        return b"".join(self.chunk([ChunkChoice(index=i, delta=delta)]) for i in range(choices))

    def added(self, delta: Delta) -> bytes:
        """Return the chunks for an addition: reasoning, then text, then a call, then the end."""
        parts = []
        logprobs = _logprobs(delta.logprobs)
        if delta.reasoning:
            parts.append(ChunkDelta(reasoning_content=delta.reasoning))
        if delta.text:
            parts.append(ChunkDelta(content=delta.text))
        if delta.tool is not None:
            parts += [ChunkDelta(tool_calls=[call]) for call in _called(delta.tool)]
        if logprobs is not None and not parts:
            parts.append(ChunkDelta(content=""))
        chunks = []
        for part in parts:
            choice = ChunkChoice(index=delta.choice, delta=part, logprobs=logprobs if part is parts[-1] else None)
            chunks.append(self.chunk([choice]))
        if delta.finish is not None:
            last = ChunkChoice(index=delta.choice, delta=ChunkDelta(), finish_reason=delta.finish)
            chunks.append(self.chunk([last]))
        return b"".join(chunks)

    def usage(self, usage: Usage) -> bytes:
        """Return the chunk with the usage."""
        return self.chunk([], usage)


class Collected:
    """The answers of a reply that is not streamed."""

    def __init__(self, heading: Heading, choices: int) -> None:
        self._heading = heading
        self._deltas: list[list[Delta]] = [[] for _ in range(choices)]

    def add(self, delta: Delta) -> None:
        self._deltas[delta.choice].append(delta)

    def completion(self, usage: Usage) -> Completion:
        """Return the reply, once every answer has finished."""
        heading = self._heading
        return Completion(
            id=heading.id,
            created=heading.created,
            model=heading.model,
            system_fingerprint=heading.fingerprint,
            choices=[_choice(index, deltas) for index, deltas in enumerate(self._deltas)],
            usage=CompletionUsage.of(usage),
            timings=Timings.of(usage),
        )


class Events:
    """What the streams of all of OpenAI's forms do alike."""

    def read(self, share: float) -> bytes:
        return b""

    def waiting(self) -> bytes:
        return HEARTBEAT

    def failed(self, error: Struct) -> bytes:
        return b"data: %b\n\n" % msgspec.json.encode(error)


class Chat(Events):
    """The form of one reply."""

    def __init__(self, heading: Heading, choices: int, *, with_usage: bool) -> None:
        """`with_usage`: a stream ends with the usage."""
        self._heading, self._choices, self._with_usage = heading, choices, with_usage
        self._collected = Collected(heading, choices)

    def add(self, delta: Delta) -> None:
        self._collected.add(delta)

    def whole(self, usage: Usage) -> Completion:
        return self._collected.completion(usage)

    def first(self) -> bytes:
        return self._heading.first(self._choices)

    def added(self, delta: Delta) -> bytes:
        return self._heading.added(delta)

    def last(self, usage: Usage) -> bytes:
        return (self._heading.usage(usage) if self._with_usage else b"") + DONE


def _choice(index: int, deltas: list[Delta]) -> Choice:
    finish = deltas[-1].finish
    assert finish is not None
    text, reasoning = "".join(delta.text for delta in deltas), "".join(delta.reasoning for delta in deltas)
    calls = _calls([delta.tool for delta in deltas if delta.tool is not None])
    return Choice(
        index=index,
        message=AnswerMessage(
            role="assistant",
            content=text or (None if calls else ""),
            reasoning_content=reasoning or UNSET,
            tool_calls=calls or UNSET,
        ),
        logprobs=_logprobs([one for delta in deltas for one in delta.logprobs]),
        finish_reason=finish,
    )


def _calls(tools: list[ToolDelta]) -> list[Call]:
    """Return the calls that additions make."""
    calls = []
    for first in (tool for tool in tools if tool.id):
        arguments = "".join(tool.arguments for tool in tools if tool.index == first.index)
        calls.append(Call(id=first.id, function=CalledFunction(first.name, arguments)))
    return calls


def _called(tool: ToolDelta) -> list[CallDelta]:
    """Return the additions to a call: first its name, then arguments."""
    additions = []
    if tool.id:
        function = FunctionDelta(name=tool.name, arguments="")
        additions.append(CallDelta(index=tool.index, id=tool.id, type="function", function=function))
    if tool.arguments:
        additions.append(CallDelta(index=tool.index, function=FunctionDelta(arguments=tool.arguments)))
    return additions


def _logprobs(tokens: list[TokenLogprobs]) -> Logprobs | None:
    return Logprobs(token_infos(tokens)) if tokens else None


def token_infos(tokens: list[TokenLogprobs]) -> list[TokenInfo]:
    """Return tokens as clients read them."""
    return [
        TokenInfo(
            token=_text(one.token),
            logprob=one.logprob,
            bytes=[*one.token],
            top_logprobs=[Alternative(_text(other.token), other.logprob, [*other.token]) for other in one.top],
        )
        for one in tokens
    ]


def _text(token: bytes) -> str:
    return token.decode("utf-8", "replace")
