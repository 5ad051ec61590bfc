"""Text completions as clients read them: whole, and in chunks.

Log probabilities have the form of OpenAI's older models, which evaluations read: a list for each property of a token,
and the most probable tokens by their text.
"""

from __future__ import annotations

import codecs
import math
import secrets
import time
from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from api.openai.answer import DONE, CompletionUsage, Created, Events, Fingerprint, Id, ModelId, Timings
from shared.channel.messages import Delta, Finish, TokenLogprobs, Usage

Log = Annotated[float, Meta(description="Natural logarithm of a probability, before sampling changed it.")]
Tops = Annotated[
    dict[str, float], Meta(description="The most probable tokens at the place of a token, and this one, by their text.")
]


class TextLogprobs(Struct, frozen=True):
    """Log probabilities of an answer, or of a part of it: of its tokens, in order."""

    tokens: Annotated[
        list[str],
        Meta(
            description="Their texts. One that is not whole in UTF-8 is `bytes:` and its bytes, such as `\\xe2\\x82`."
        ),
    ]
    token_logprobs: Annotated[
        list[Log | None], Meta(description="Natural logarithms of their probabilities; null for the first of a prompt.")
    ]
    top_logprobs: Annotated[
        list[Tops | None], Meta(description="The most probable tokens at their places; null for the first of a prompt.")
    ]
    text_offset: Annotated[list[int], Meta(description="The places in the text of the answer at which they begin.")]


TextLogprobsOf = Annotated[
    TextLogprobs | None, Meta(description="The tokens, if the request has `logprobs`; else null.")
]
TextIndex = Annotated[
    int, Meta(description="Number of the answer, from 0: the answers to the first prompt come first.")
]


class TextChoice(Struct, frozen=True, kw_only=True):
    """One answer."""

    text: Annotated[str, Meta(description="Text of the answer, which begins with its prompt if `echo` is set.")]
    index: TextIndex
    logprobs: TextLogprobsOf
    finish_reason: Annotated[
        Finish,
        Meta(description="`stop`: the model ended the answer, or it reached a stop string. `length`: it was cut."),
    ]


class TextCompletion(Struct, frozen=True, kw_only=True):
    """The reply to a request that is not streamed."""

    id: Id
    object: Annotated[Literal["text_completion"], Meta(description="Always `text_completion`.")] = "text_completion"
    created: Created
    model: ModelId
    system_fingerprint: Fingerprint
    choices: Annotated[list[TextChoice], Meta(description="The answers, `n` to each prompt.")]
    usage: Annotated[CompletionUsage, Meta(description="The tokens of the request.")]
    timings: Annotated[
        Timings | UnsetType, Meta(description="Where the time of the request went; absent if it has several prompts.")
    ] = UNSET


class TextAddition(Struct, frozen=True, kw_only=True):
    """An addition to one answer."""

    text: Annotated[str, Meta(description="Text of the answer.")]
    index: TextIndex
    logprobs: TextLogprobsOf = None
    finish_reason: Annotated[Finish | None, Meta(description="Why the answer ends, in its last chunk; else null.")] = (
        None
    )


class TextChunk(Struct, frozen=True, kw_only=True):
    """An event of a streamed reply."""

    id: Id
    object: Annotated[Literal["text_completion"], Meta(description="Always `text_completion`.")] = "text_completion"
    created: Created
    model: ModelId
    system_fingerprint: Fingerprint
    choices: Annotated[list[TextAddition], Meta(description="One addition; none in the chunk with the usage.")]
    usage: Annotated[
        CompletionUsage | UnsetType,
        Meta(description="The tokens of the request, in the last chunk if `stream_options.include_usage` is set."),
    ] = UNSET
    timings: Annotated[
        Timings | UnsetType,
        Meta(description="Where the time of the request went, in the chunk with the usage, if it has one prompt."),
    ] = UNSET


class _Answer:
    """One answer, as far as it has arrived."""

    def __init__(self) -> None:
        self.text: list[str] = []
        self.logprobs: TextLogprobs | None = None
        self.finish: Finish | None = None
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._at = 0  # place in the text at which the next token begins; < 0: the text does not have it

    def skip(self, n: int) -> None:
        """Take no notice of the first `n` characters of the tokens."""
        self._at -= n

    def read(self, delta: Delta) -> TextLogprobs | None:
        """Return the log probabilities of an addition.  Must get all of them, in order."""
        if not delta.logprobs:
            return None
        return TextLogprobs(
            [_text(one.token) for one in delta.logprobs],
            [None if math.isnan(one.logprob) else one.logprob for one in delta.logprobs],
            [None if math.isnan(one.logprob) else _tops(one) for one in delta.logprobs],
            [self._offset(one.token) for one in delta.logprobs],
        )

    def add(self, delta: Delta) -> None:
        """Collect an addition."""
        logprobs = self.read(delta)
        self.text.append(delta.text)
        self.finish = delta.finish
        if logprobs is None:
            return
        if self.logprobs is None:
            self.logprobs = logprobs
            return
        self.logprobs.tokens.extend(logprobs.tokens)
        self.logprobs.token_logprobs.extend(logprobs.token_logprobs)
        self.logprobs.top_logprobs.extend(logprobs.top_logprobs)
        self.logprobs.text_offset.extend(logprobs.text_offset)

    def _offset(self, token: bytes) -> int:
        """Return the place in the text at which a token begins, and go on to its end.

        What is decoded may begin with a character that an earlier token began and this one does not complete.
        """
        text, own = self._decoder.decode(token), token.decode("utf-8", "replace")
        at = self._at + max(0, len(text) - len(own))
        self._at += len(text)
        return max(0, at)


class Text(Events):
    """The form of one reply."""

    def __init__(self, model: str, fingerprint: str, *, prompts: int, choices: int, with_usage: bool) -> None:
        """`choices`: of each prompt.  `with_usage`: a stream ends with the usage."""
        self._id = f"cmpl-{secrets.token_hex(12)}"
        self._created = int(time.time())
        self._model, self._fingerprint = model, fingerprint
        self._prompts, self._choices, self._with_usage = prompts, choices, with_usage
        self._answers = [_Answer() for _ in range(prompts * choices)]

    def add(self, delta: Delta) -> None:
        for index in self._echoed(delta):
            self._answers[index].text.append(delta.echo)
        self._answers[delta.choice].add(delta)

    def whole(self, usage: Usage) -> TextCompletion:
        choices = []
        for index, answer in enumerate(self._answers):
            assert answer.finish is not None
            choices.append(
                TextChoice(
                    text="".join(answer.text), index=index, logprobs=answer.logprobs, finish_reason=answer.finish
                )
            )
        return TextCompletion(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=CompletionUsage.of(usage),
            timings=self._timings(usage),
        )

    def first(self) -> bytes:
        return b""

    def added(self, delta: Delta) -> bytes:
        """Return the chunks for an addition: the prompt, then text, then the end."""
        echo = [self._chunk([TextAddition(text=delta.echo, index=index)]) for index in self._echoed(delta)]
        logprobs = self._answers[delta.choice].read(delta)
        chunks = b"".join(echo)
        if delta.text or logprobs is not None:
            chunks += self._chunk([TextAddition(text=delta.text, index=delta.choice, logprobs=logprobs)])
        if delta.finish is not None:
            chunks += self._chunk([TextAddition(text="", index=delta.choice, finish_reason=delta.finish)])
        return chunks

    def last(self, usage: Usage) -> bytes:
        return (self._chunk([], usage) if self._with_usage else b"") + DONE

    def _echoed(self, delta: Delta) -> range:
        """Return the numbers of the answers that begin with the prompt in an addition."""
        if not delta.echo and not delta.skipped:
            return range(0)
        indices = range(delta.choice, delta.choice + self._choices)
        for index in indices:
            self._answers[index].skip(delta.skipped)
        return indices

    def _chunk(self, choices: list[TextAddition], usage: Usage | None = None) -> bytes:
        chunk = TextChunk(
            id=self._id,
            created=self._created,
            model=self._model,
            system_fingerprint=self._fingerprint,
            choices=choices,
            usage=UNSET if usage is None else CompletionUsage.of(usage),
            timings=UNSET if usage is None else self._timings(usage),
        )
        return b"data: %b\n\n" % msgspec.json.encode(chunk)

    def _timings(self, usage: Usage) -> Timings | UnsetType:
        """Return where the time went.  Prompts that are processed side by side have no rate of their own."""
        return Timings.of(usage) if self._prompts == 1 else UNSET


def _tops(one: TokenLogprobs) -> dict[str, float]:
    """Return log probabilities by text.  Of tokens with one text, the most probable one counts."""
    tops: dict[str, float] = {}
    for other in one.top:
        tops.setdefault(_text(other.token), other.logprob)
    tops.setdefault(_text(one.token), one.logprob)
    return tops


def _text(token: bytes) -> str:
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)
