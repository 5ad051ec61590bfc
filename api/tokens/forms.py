"""Requests about tokens and prompts, and their replies.

llama.cpp's server and vLLM have routes of the same name.  A request has the keys of one of them, a reply those of both.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType, field

from shared.channel.messages import TokenDetail, Tokens, listed

LARGEST = 2**31 - 1  # integer of llama.cpp

ModelName = Annotated[
    str | None,
    Meta(
        description="A model key or alias, or the id of a loaded instance. Absent: the default model, or else the only "
        "loaded LLM."
    ),
]


class TokenizeRequest(Struct, frozen=True, kw_only=True):
    """A request for the tokens of a text or a conversation: it has `content`, `prompt` or `messages`."""

    model: ModelName = None
    content: Annotated[str | None, Meta(description="The text, as llama.cpp's server takes it.")] = None
    add_special: Annotated[
        bool | None,
        Meta(description="Add the tokens that begin and end each prompt to `content`. Default: false."),
    ] = None
    parse_special: Annotated[
        bool | None,
        Meta(description="Make tokens of control tokens that `content` spells. Default: true."),
    ] = None
    with_pieces: Annotated[bool | None, Meta(description="Return each token with its text. Only with `content`.")] = (
        None
    )
    prompt: Annotated[str | None, Meta(description="The text, as vLLM takes it.")] = None
    add_special_tokens: Annotated[
        bool | None,
        Meta(description="Add the tokens that begin and end each prompt to `prompt`. Default: true."),
    ] = None
    return_token_strs: Annotated[
        bool | None, Meta(description="Return the text of each token in `token_strs`. Not with `content`.")
    ] = None
    messages: Annotated[
        msgspec.Raw,
        Meta(
            description="A conversation, as vLLM takes it. It and the other fields of the body are those of `POST "
            "/v1/chat/completions`."
        ),
    ] = field(default_factory=msgspec.Raw)

    @property
    def given(self) -> list[str]:
        """The names of the fields that say what to tokenize."""
        has = {
            "content": self.content is not None,
            "prompt": self.prompt is not None,
            "messages": bytes(self.messages) not in (b"", b"null"),
        }
        return [name for name in has if has[name]]

    @property
    def detail(self) -> TokenDetail:
        shows = self.with_pieces if self.content is not None else self.return_token_strs
        return "pieces" if shows else "tokens"


class Piece(Struct, frozen=True):
    """A token with its text."""

    id: Annotated[int, Meta(description="The token.")]
    piece: Annotated[str | list[int], Meta(description="Its text; or the bytes of it, if they are not whole in UTF-8.")]


class TokenizeReply(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The tokens of a text or a conversation."""

    tokens: Annotated[list[int | Piece], Meta(description="The tokens; with their texts if `with_pieces` is set.")]
    count: Annotated[int, Meta(description="The number of tokens.")]
    max_model_len: Annotated[int, Meta(description="Size of the context of the instance, in tokens.")]
    token_strs: Annotated[
        list[str] | UnsetType,
        Meta(
            description="The text of each token, if `return_token_strs` is set. What is not whole in UTF-8 is shown as "
            "a replacement character."
        ),
    ] = UNSET


class DetokenizeRequest(Struct, frozen=True, kw_only=True):
    """A request for the text of tokens."""

    tokens: Annotated[
        list[Annotated[int, Meta(ge=0, le=LARGEST)]],
        Meta(description="The tokens, of the vocabulary of the model."),
    ]
    model: ModelName = None


class DetokenizeReply(Struct, frozen=True):
    """The text of tokens.  What is not whole in UTF-8 is a replacement character."""

    content: Annotated[str, Meta(description="The text.")]
    prompt: Annotated[str, Meta(description="The same, as vLLM names it.")]


class TokenizerReply(Struct, frozen=True):
    """The tokenizer of a model, as its file describes it."""

    bos_token: Annotated[str | None, Meta(description="Text of the token that begins a text; null if there is none.")]
    eos_token: Annotated[str | None, Meta(description="Text of the token that ends a text; null if there is none.")]
    chat_template: Annotated[str | None, Meta(description="The model's chat template, in Jinja; null if it has none.")]


class TemplateReply(Struct, frozen=True):
    """A conversation as the model reads it."""

    prompt: Annotated[str, Meta(description="The text that the model's chat template makes of the conversation.")]


class CountReply(Struct, frozen=True, kw_only=True):
    """How long a conversation is."""

    object: Annotated[Literal["response.input_tokens"], Meta(description="Always `response.input_tokens`.")] = (
        "response.input_tokens"
    )
    input_tokens: Annotated[
        int, Meta(description="How many tokens the prompt of the conversation has, also if they exceed the context.")
    ]


def tokenized(request: TokenizeRequest, found: Tokens, context_length: int) -> TokenizeReply:
    """Return the reply with the tokens that a runner found."""
    tokens = listed(found.tokens)
    ids: list[int | Piece] = [*tokens]
    with_pieces = request.detail == "pieces"
    is_llama = request.content is not None
    return TokenizeReply(
        tokens=[Piece(id_, _piece(piece)) for id_, piece in zip(tokens, found.pieces, strict=True)]
        if with_pieces and is_llama
        else ids,
        count=found.n,
        max_model_len=context_length,
        token_strs=[piece.decode("utf-8", "replace") for piece in found.pieces]
        if with_pieces and not is_llama
        else UNSET,
    )


def _piece(piece: bytes) -> str | list[int]:
    try:
        return piece.decode()
    except UnicodeDecodeError:
        return [*piece]
