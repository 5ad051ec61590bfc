"""The messages on a channel, between an API process and a runner: tagged structs, each in a frame of `shared.framing`.

They know no wire format of a client: the API translates.  Every request has an `id` that the API process chose, unique
on its channel.  A request gets, in this order: Refused; or Queued, Started, any number of deltas, and Ended or Failed;
one that embeds or ranks gets vectors instead of Started and deltas.  One that needs no step of the engine, a `Lookup`,
gets Refused or Failed; or Queued and its reply.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Literal

from msgspec import Struct, msgpack

from shared import framing

TOKEN_BYTES = 4
ITEM_BYTES = 48  # of a message, a delta or a log probability in memory, roughly
# stop: an end-of-generation token or a stop string; length: a limit of tokens; tool_calls: the model waits for results
Finish = Literal["stop", "length", "tool_calls"]
StopReason = Literal[
    "eos",  # an end-of-generation token, or a text that means the same in the model's template
    "string",  # a stop string of the request
    "max_tokens",  # the limit of the request, or of the operator
    "context",  # the context is full
]

TokenDetail = Literal["count", "tokens", "pieces"]  # what to tell of tokens: each has that before it, too

# ---- to the runner


class Sampling(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How tokens are chosen, under llama.cpp's names.  The defaults are LM Studio's, with `repeat_penalty` off."""

    temperature: float = 0.8  # 0: the most probable token
    top_k: int = 40  # 0: as many as the engine considers
    top_p: float = 0.95
    min_p: float = 0.05
    typical_p: float = 1.0
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64  # tokens; -1: all
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None  # None: a random one
    logit_bias: dict[int, float] = {}  # by token


class Schema(Struct, frozen=True, tag="schema"):
    """An answer is JSON that a schema describes."""

    schema: bytes  # JSON


class Grammar(Struct, frozen=True, tag="gbnf"):
    """An answer is a text of a grammar."""

    text: str  # GBNF, as llama.cpp has it


class Order(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What requests for text have in common."""

    id: int
    client: str  # opaque; requests of one client share prefixes, and clients get equal shares
    choices: int = 1  # number of answers to a prompt
    max_tokens: int | None = None  # of each answer; None: up to the end of the context
    sampling: Sampling = Sampling()
    stop: list[str] = []
    logprobs: int | None = None  # how many alternatives to report for each token; None: no log probabilities


class Generate(Order, frozen=True, kw_only=True, omit_defaults=True, tag="generate"):
    """Answer a conversation."""

    conversation: bytes  # a JSON object, as `worker.chat.code.Templates.render` takes it
    output: Schema | Grammar | None = None  # the form of each answer; None: any text
    thinking_tokens: int | None = None  # of the reasoning of each answer; None: any number
    reports_progress: bool = False  # with Progress, while the prompt is processed


class Complete(Order, frozen=True, kw_only=True, omit_defaults=True, tag="complete"):
    """Continue prompts, with no template.  The answers to one prompt have consecutive numbers, prompt after prompt."""

    prompts: list[str | list[int]]  # at least one, each a text or tokens
    suffix: str = ""  # a text that is to follow the answers; only for models with tokens for it
    echo: bool = False  # answers begin with their prompt, and so do their log probabilities


class Render(Struct, frozen=True, kw_only=True, tag="render"):
    """Render a conversation with the model's chat template.  The reply is Text."""

    id: int
    client: str  # opaque; as in Generate
    conversation: bytes  # as in Generate


class Tokenize(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokenize"):
    """Tokenize a text; or a conversation, as for an answer to it.  One of the two is given.  The reply is Tokens."""

    id: int
    client: str
    text: str | None = None
    add_special: bool = True  # to a text: the tokens that begin and end every prompt
    parse_special: bool = True  # control tokens that a text spells become tokens
    conversation: bytes | None = None
    detail: TokenDetail = "tokens"


class Detokenize(Struct, frozen=True, kw_only=True, tag="detokenize"):
    """Return the text of tokens.  The reply is Text."""

    id: int
    client: str
    tokens: list[int]


class Describe(Struct, frozen=True, kw_only=True, tag="describe"):
    """Describe the tokenizer.  The reply is Described."""

    id: int
    client: str


class Embed(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="embed"):
    """Compute the vector of each text, or of each list of tokens; one of the two is given."""

    id: int
    client: str  # opaque; clients take turns
    texts: list[str] = []
    tokens: list[list[int]] = []


class Rank(Struct, frozen=True, kw_only=True, tag="rank"):
    """Score how well each document answers a query.  Each score is a vector of its document."""

    id: int
    client: str  # opaque; clients take turns
    query: str
    documents: list[str]


class Cancel(Struct, frozen=True, tag="cancel"):
    """End a request.  Nothing follows, not even Ended; unknown ids are ignored: the request may have ended."""

    id: int


Lookup = Render | Tokenize | Detokenize | Describe
ToModel = Generate | Complete | Embed | Rank | Lookup
ToRunner = ToModel | Cancel

# ---- from the runner

RefusedCode = Literal[
    "invalid_request",  # the template or the engine rejects it; the message says why
    "context_length_exceeded",  # `prompt_tokens` and `context_length` are set
    "queue_full",  # `retry_after_s` is set
    "queue_timeout",
    "wrong_type",  # the model does not do what is asked: it embeds, it ranks, or it generates text
    "chat_unavailable",  # this build of the engine has no chat code, or the model no template
    "closing",  # the instance is being unloaded; another one may answer
    "helper_crashed",  # the template code crashed on this request, or took too long; a repeat is refused for a while
]
FailedCode = Literal[
    "engine_failed",  # the engine reported an error
    "deadline",  # the request took longer than it may
]


class Refused(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="refused"):
    """The request was not begun.  Nothing follows."""

    id: int
    code: RefusedCode
    message: str
    param: str | None = None  # the field that is at fault, by OpenAI's name
    prompt_tokens: int = 0
    context_length: int = 0
    retry_after_s: int = 0


class Queued(Struct, frozen=True, kw_only=True, tag="queued"):
    """The request is rendered and tokenized, and it fits.  It cannot be refused any more, except for its wait."""

    id: int
    prompt_tokens: int  # of all prompts
    ahead: int  # number of requests that wait before it


class Started(Struct, frozen=True, kw_only=True, tag="started"):
    """The engine processes the first prompt."""

    id: int
    cached_tokens: int  # of this prompt, which are not processed again


class Progress(Struct, frozen=True, kw_only=True, tag="progress"):
    """How far the engine is with the first prompt, if the request wants to know."""

    id: int
    tokens: int  # of the prompt that are processed
    of: int  # tokens of the prompt


class Logprob(Struct, frozen=True, array_like=True):
    """A token with its log probability (natural logarithm) before sampling changed it."""

    token: bytes  # its text, which may be part of a character
    logprob: float


class TokenLogprobs(Struct, frozen=True, array_like=True):
    """A token of an answer, and the most probable ones at its place, most probable first."""

    token: bytes
    logprob: float  # NaN: the first token of a prompt, for which the model computes none
    top: list[Logprob] = []


class ToolDelta(Struct, frozen=True, array_like=True, omit_defaults=True):
    """The beginning of a call of a tool, which has `id` and `name`, or more of its arguments."""

    index: int  # of the call in its answer
    id: str = ""
    name: str = ""
    arguments: str = ""  # JSON, as far as it has come


class Stop(Struct, frozen=True, omit_defaults=True):
    """Why an answer ended, in more detail than Finish."""

    reason: StopReason
    string: str | None = None  # the stop string, for the reason "string"


class Delta(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What was generated of one answer since the last delta: reasoning, then text, then a call.

    `finish` and `stop` are set in the last one.
    """

    id: int
    choice: int = 0
    text: str = ""
    reasoning: str = ""
    tool: ToolDelta | None = None
    logprobs: list[TokenLogprobs] = []
    echo: str = ""  # a prompt, for all of its answers, of which this is the first: they begin with it
    skipped: int = 0  # characters with which the tokens of the prompt begin, and `echo` does not
    finish: Finish | None = None
    stop: Stop | None = None


def size_of(delta: Delta) -> int:
    """Return roughly how many bytes of memory a delta holds, without what the client sent itself."""
    logprobs = sum(1 + len(one.top) for one in delta.logprobs)
    tool = 0 if delta.tool is None else ITEM_BYTES + len(delta.tool.name) + len(delta.tool.arguments)
    return len(delta.text) + len(delta.reasoning) + tool + ITEM_BYTES * (1 + logprobs)


class Deltas(Struct, frozen=True, tag="deltas"):
    """The deltas of one step of the engine, or of several if the channel is behind."""

    deltas: list[Delta]


class Vectors(Struct, frozen=True, kw_only=True, tag="vectors"):
    """The next vectors of a request, in the order of its texts: of length 1, or the scores of a model that ranks."""

    id: int
    n: int
    data: bytes  # little-endian 32-bit floats


class Text(Struct, frozen=True, kw_only=True, tag="text"):
    """The text that was asked for.  Nothing follows."""

    id: int
    text: str


class Tokens(Struct, frozen=True, kw_only=True, omit_defaults=True, tag="tokens"):
    """The tokens that were asked for.  Nothing follows."""

    id: int
    n: int
    tokens: bytes = b""  # TOKEN_BYTES each: little-endian integers
    pieces: list[bytes] = []  # the text of each, which may be part of a character


class Described(Struct, frozen=True, kw_only=True, tag="described"):
    """The tokenizer of the model.  Nothing follows."""

    id: int
    bos: str | None  # text of the token that begins a text; None: the model has none
    eos: str | None  # text of the token that ends one
    template: str | None  # chat template, in Jinja


def listed(tokens: bytes) -> list[int]:
    """Return the tokens in `Tokens`."""
    return [*struct.unpack(f"<{len(tokens) // TOKEN_BYTES}i", tokens)]


class Usage(Struct, frozen=True, kw_only=True):
    """Tokens and seconds of a request, with all its prompts."""

    prompt_tokens: int
    cached_tokens: int
    generated_tokens: int  # of all answers
    reasoning_tokens: int
    wait_s: float  # from the arrival at the runner to the first step with a prompt of it
    prompt_s: float  # from then to the first token
    generation_s: float  # from then to the last token


class Ended(Struct, frozen=True, kw_only=True, tag="ended"):
    """All answers are complete."""

    id: int
    usage: Usage


class Failed(Struct, frozen=True, kw_only=True, tag="request_failed"):
    """The request ended without a complete answer."""

    id: int
    code: FailedCode
    message: str


FromRunner = Refused | Queued | Started | Progress | Deltas | Vectors | Text | Tokens | Described | Ended | Failed


class Closing(Struct, frozen=True, tag="closing"):
    """The instance is unloaded: the runner exits, and all requests of the channel end here."""


MOST_BYTES = 64 << 20  # of a message; a longer one ends the channel

frame: Callable[[ToRunner | FromRunner | Closing], bytes] = framing.frame
decode_to_runner: Callable[[bytes], ToRunner] = msgpack.Decoder(ToRunner).decode
decode_from_runner: Callable[[bytes], FromRunner] = msgpack.Decoder(FromRunner).decode
