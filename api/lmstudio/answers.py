"""POST /api/v0/chat/completions and /api/v0/completions: OpenAI's, with statistics and what answered."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, structs
from starlette.requests import Request
from starlette.responses import Response

from api.openai.answer import DONE, Chunk, Completion, CompletionUsage, Timings
from api.openai.chat import answer_chat
from api.openai.completions import continue_prompts
from api.openai.reply import Form
from api.openai.text import TextChunk, TextCompletion
from api.pool.listing import source_of
from api.state import State
from shared.channel.messages import Delta, StopReason, Usage
from shared.instance import Instance

DATA, END = b"data: ", b"\n\n"
LegacyStop = Literal["eosFound", "stopStringFound", "toolCalls", "maxPredictedTokensReached", "contextLengthReached"]
STOPS: dict[StopReason, LegacyStop] = {
    "eos": "eosFound",
    "string": "stopStringFound",
    "max_tokens": "maxPredictedTokensReached",
    "context": "contextLengthReached",
}


class Stats(Struct, frozen=True, kw_only=True):
    """How an answer was generated."""

    tokens_per_second: Annotated[float, Meta(description="Generated tokens per second.")]
    time_to_first_token: Annotated[
        float, Meta(description="Seconds from the arrival at the engine to the first token.")
    ]
    generation_time: Annotated[float, Meta(description="Seconds from the first token to the last one.")]
    stop_reason: Annotated[
        LegacyStop,
        Meta(
            description="Why the first answer ended: by itself, at a stop string, with calls of tools, at its limit of "
            "tokens, or at the end of the context."
        ),
    ]


class ModelInfo(Struct, frozen=True, kw_only=True):
    """The model that answered."""

    arch: Annotated[str, Meta(description="Architecture, under its name in llama.cpp.")]
    quant: Annotated[str, Meta(description="Name of the quantization; empty if unknown.")]
    format: Annotated[Literal["gguf"], Meta(description="Format of the file: always `gguf`.")] = "gguf"
    context_length: Annotated[int, Meta(description="Size of the context of the instance, in tokens.")]


class Runtime(Struct, frozen=True, kw_only=True):
    """The engine that answered."""

    name: Annotated[Literal["llama.cpp"], Meta(description="Always `llama.cpp`.")] = "llama.cpp"
    version: Annotated[str, Meta(description="`b` and the commit of llama.cpp.")]
    supported_formats: Annotated[list[str], Meta(description="Formats of files that it loads.")]


StatsOf = Annotated[Stats, Meta(description="How the answer was generated.")]
ModelInfoOf = Annotated[ModelInfo, Meta(description="The model that answered.")]
RuntimeOf = Annotated[Runtime, Meta(description="The engine that answered.")]


class LegacyCompletion(Completion, frozen=True, kw_only=True):
    """The reply to a chat completion that is not streamed."""

    stats: StatsOf
    model_info: ModelInfoOf
    runtime: RuntimeOf


class LegacyTextCompletion(TextCompletion, frozen=True, kw_only=True):
    """The reply to a text completion that is not streamed."""

    stats: StatsOf
    model_info: ModelInfoOf
    runtime: RuntimeOf


class LegacyChunk(Chunk, frozen=True, kw_only=True):
    """An event of a streamed chat completion.  The last one has the usage and what follows it."""

    stats: StatsOf | UnsetType = UNSET
    model_info: ModelInfoOf | UnsetType = UNSET
    runtime: RuntimeOf | UnsetType = UNSET


class LegacyTextChunk(TextChunk, frozen=True, kw_only=True):
    """An event of a streamed text completion.  The last one has the usage and what follows it."""

    stats: StatsOf | UnsetType = UNSET
    model_info: ModelInfoOf | UnsetType = UNSET
    runtime: RuntimeOf | UnsetType = UNSET


class Additions(Struct, frozen=True, kw_only=True):
    """What a reply has beyond OpenAI's form."""

    stats: Stats
    model_info: ModelInfo
    runtime: Runtime


class LastAdditions(Additions, frozen=True, kw_only=True):
    """What the last chunk of a stream has beyond those before it."""

    usage: CompletionUsage


class Legacy:
    """The form of one reply: another form, and additions to the whole, or to the last chunk.

    Clients read the additions beside the reason for which an answer ends, and that comes before the statistics: so the
    end of each answer waits for them.
    """

    def __init__(
        self, form: Form, kind: type[LegacyCompletion | LegacyTextCompletion], model: ModelInfo, runtime: Runtime
    ) -> None:
        self._form, self._kind, self._model, self._runtime = form, kind, model, runtime
        self._stops: dict[int, LegacyStop] = {}  # by answer
        self._ends: list[Delta] = []

    def add(self, delta: Delta) -> None:
        self._note(delta)
        self._form.add(delta)

    def whole(self, usage: Usage) -> Struct:
        return self._kind(**structs.asdict(self._form.whole(usage)), **structs.asdict(self._additions(usage)))

    def first(self) -> bytes:
        return self._form.first()

    def added(self, delta: Delta) -> bytes:
        self._note(delta)
        if delta.finish is None:
            return self._form.added(delta)
        self._ends.append(Delta(id=delta.id, choice=delta.choice, finish=delta.finish, stop=delta.stop))
        return self._form.added(structs.replace(delta, finish=None, stop=None))

    def last(self, usage: Usage) -> bytes:
        *others, last = self._ends
        more = LastAdditions(usage=CompletionUsage.of(usage), **structs.asdict(self._additions(usage)))
        return b"".join(map(self._form.added, others)) + _with(self._form.added(last), more) + DONE

    def read(self, share: float) -> bytes:
        return self._form.read(share)

    def waiting(self) -> bytes:
        return self._form.waiting()

    def failed(self, error: Struct) -> bytes:
        return self._form.failed(error)

    def _note(self, delta: Delta) -> None:
        if delta.stop is not None:
            has_calls = delta.finish == "tool_calls"
            self._stops[delta.choice] = "toolCalls" if has_calls else STOPS[delta.stop.reason]

    def _additions(self, usage: Usage) -> Additions:
        stats = Stats(
            tokens_per_second=Timings.of(usage).predicted_per_second,
            time_to_first_token=usage.wait_s + usage.prompt_s,
            generation_time=usage.generation_s,
            stop_reason=self._stops[0],
        )
        return Additions(stats=stats, model_info=self._model, runtime=self._runtime)


def _with(event: bytes, more: Struct) -> bytes:
    """Add fields to an event that is a JSON object."""
    data = msgspec.json.decode(event.removeprefix(DATA).removesuffix(END), type=dict[str, msgspec.Raw])
    return DATA + msgspec.json.encode({**data, **structs.asdict(more)}) + END


async def chat_completions(request: Request[State]) -> Response:
    """Answer a conversation."""
    return await answer_chat(request, partial(_legacy, request, LegacyCompletion))


async def completions(request: Request[State]) -> Response:
    """Continue prompts."""
    return await continue_prompts(request, partial(_legacy, request, LegacyTextCompletion))


def _legacy(
    request: Request[State], kind: type[LegacyCompletion | LegacyTextCompletion], instance: Instance, form: Form
) -> Legacy:
    model = source_of(instance)
    assert instance.load_config is not None
    info = ModelInfo(
        arch=model.architecture,
        quant=model.quantization or "",
        context_length=instance.load_config.context_length,
    )
    return Legacy(
        form,
        kind,
        info,
        Runtime(version=request.state["roster"].fingerprint(instance.worker), supported_formats=["gguf"]),
    )
