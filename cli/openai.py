"""What the command line reads of the replies of OpenAI's API.  Loadstone's own fields are among them."""

from __future__ import annotations

from typing import Any

from msgspec import Struct

DONE = b"[DONE]"  # the data of the last event


class FunctionDelta(Struct, frozen=True):
    """What is added to the function of a call."""

    name: str = ""
    arguments: str = ""


class CallDelta(Struct, frozen=True):
    """What is added to a call of a tool, or begins one."""

    index: int
    id: str = ""
    function: FunctionDelta = FunctionDelta()


class Delta(Struct, frozen=True):
    """What is added to an answer."""

    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[CallDelta] = []


class Choice(Struct, frozen=True):
    """An addition to an answer, or its end."""

    delta: Delta = Delta()
    finish_reason: str | None = None


class PromptDetails(Struct, frozen=True):
    """More about the tokens of a prompt."""

    cached_tokens: int = 0


class Usage(Struct, frozen=True):
    """The tokens of a request."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: PromptDetails = PromptDetails()


class Timings(Struct, frozen=True):
    """Where the time of a request went."""

    queued_ms: float = 0.0
    prompt_ms: float = 0.0
    predicted_ms: float = 0.0
    predicted_per_second: float = 0.0


class Chunk(Struct, frozen=True):
    """An event of a streamed answer.  An error is the last one."""

    model: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    timings: Timings | None = None
    error: dict[str, Any] | None = None


class Embedding(Struct, frozen=True):
    """The embedding of a text."""

    index: int
    embedding: list[float]


class Embeddings(Struct, frozen=True):
    """The embeddings of the texts of a request."""

    data: list[Embedding]
