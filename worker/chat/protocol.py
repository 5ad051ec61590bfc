"""The messages between a runner and its helper: tagged structs, each in a frame of `shared.framing`.

The helper answers each message of the runner with one of its own, in order.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from msgspec import Struct, msgpack

from shared import framing
from shared.channel.messages import Grammar, Schema
from worker.chat.code import Message, ParserSource, Trigger


class Constraint(Struct, frozen=True, kw_only=True):
    """What the text of an answer must match, to its end.

    Reasoning is free: an answer that begins with `thinking_start`, or whose prompt ends within reasoning, is matched
    only after one of `thinking_ends`.
    """

    kind: Literal["json_schema", "gbnf", "lark"]
    text: str
    prefix: str = ""  # the end of the prompt, which the grammar matches before the answer
    lazy: bool = False  # it applies only to what follows a trigger, as llama.cpp's lazy grammars do
    triggers: list[Trigger] = []
    is_optional: bool = False  # answers may do without it, if it cannot be enforced
    is_thinking: bool = False  # the prompt ends within reasoning
    thinking_start: str = ""  # empty: the model does not reason
    thinking_ends: list[str] = []
    shown: list[str] = []  # control tokens that GBNF means by their text


class Thinking(Struct, frozen=True, kw_only=True):
    """Where an answer reasons: from `start`, at its beginning, to one of `ends`."""

    is_open: bool  # the prompt ends within reasoning, which therefore has begun
    start: str
    ends: list[str]
    close: str  # the text that ends reasoning and begins the answer


# ---- to the helper


class Template(Struct, frozen=True, kw_only=True, tag="template"):
    """Compile a template, and render a short conversation with it.  Answered with Compiled."""

    source: str  # Jinja
    bos: str = ""  # the text of the token, as the template writes it
    eos: str = ""


class Render(Struct, frozen=True, tag="render"):
    """Render a conversation.  Answered with Prompt."""

    conversation: bytes  # as `worker.chat.code.Templates.render` takes it
    output: Schema | Grammar | None = None  # the form of the answers


class Parse(Struct, frozen=True, tag="parse"):
    """Parse an answer, or the beginning of one.  Answered with Answer."""

    source: ParserSource
    answer: str
    partial: bool


class Check(Struct, frozen=True, tag="check"):
    """Compile a constraint.  Answered with Checked."""

    constraint: Constraint


ToHelper = Template | Render | Parse | Check

# ---- from the helper


class Compiled(Struct, frozen=True, tag="compiled"):
    """What the template supports."""

    capabilities: dict[str, bool]


class Prompt(Struct, frozen=True, kw_only=True, tag="prompt"):
    """A rendered conversation, and how an answer to it is read."""

    text: str
    stops: list[str]
    shown: list[str]  # control tokens that the parser has to see
    source: ParserSource | None  # of the answers' parser; None: an answer is content, as it is
    is_open: bool = False  # content that has begun extends to the end of the answer
    before: Message = Message()  # what the parser makes of the prompt's end alone: it is not part of the answer
    constraint: Constraint | None = None  # None: an answer is any text
    thinking: Thinking | None = None  # None: an answer does not reason
    most_calls: int | None = 0  # of tools, in an answer; None: any number


class Answer(Struct, frozen=True, tag="answer"):
    """A parsed answer."""

    message: Message


class Rejected(Struct, frozen=True, tag="rejected"):
    """llama.cpp rejects the template, the conversation or the answer."""

    reason: str


class Checked(Struct, frozen=True, tag="checked"):
    """The constraint can be enforced."""


class Unenforceable(Struct, frozen=True, tag="unenforceable"):
    """The constraint cannot be enforced."""

    reason: str


FromHelper = Compiled | Prompt | Answer | Checked | Rejected | Unenforceable


frame: Callable[[ToHelper | FromHelper], bytes] = framing.frame
decode_to_helper: Callable[[bytes], ToHelper] = msgpack.Decoder(ToHelper).decode
decode_from_helper: Callable[[bytes], FromHelper] = msgpack.Decoder(FromHelper).decode
