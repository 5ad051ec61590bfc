"""POST /tokenize, /detokenize, /apply-template, /v1/chat/completions/input_tokens, and GET /tokenizer_info."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import msgspec
from msgspec import Struct, structs
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.decode import MAX_BODY_BYTES, known, read_any
from api.openai.fields import ttl_s
from api.openai.reply import check_draining
from api.openai.request import ChatRequest, beginning, decoded, generate
from api.state import State
from api.tokens.forms import (
    CountReply,
    DetokenizeReply,
    DetokenizeRequest,
    TemplateReply,
    TokenizeRequest,
    TokenizerReply,
    tokenized,
)
from api.waiting import waited_for
from shared.channel.messages import Describe, Described, Detokenize, Lookup, Render, Text, TokenDetail, Tokenize, Tokens
from shared.errors import InvalidValue, MissingParameter
from shared.instance import Instance

Reply = TypeVar("Reply", Text, Tokens, Described)


FEW_PIECES = 1000  # to write more takes milliseconds, and happens in another thread


async def tokenize(request: Request[State]) -> Response:
    """Return the tokens of a text, or of a conversation."""
    body = await _body(request)
    asked = known(body, TokenizeRequest, {"messages"})
    if not asked.given:
        raise MissingParameter("'content', 'prompt' or 'messages' is required.", param="content")
    if len(asked.given) > 1:
        raise InvalidValue(f"Expected only one of {' and '.join(map(repr, asked.given))}.", param=asked.given[1])
    if asked.given == ["messages"]:
        chat = decoded(body)
        ask = _about(request, chat, partial(_tokens, request.state["caller"], asked.detail))
    else:
        ask = _ask(request, asked.model, _text_tokens(asked, request.state["caller"]))
    instance, tokens = await _looked_up(request, ask, Tokens)
    reply = partial(_tokenized, asked, tokens, instance)
    return await asyncio.to_thread(reply) if len(tokens.pieces) > FEW_PIECES else reply()


async def detokenize(request: Request[State]) -> Response:
    """Return the text of tokens."""
    asked = known(await _body(request, MAX_BODY_BYTES), DetokenizeRequest, {"tokens"})
    ask = _ask(request, asked.model, Detokenize(id=0, client=request.state["caller"], tokens=asked.tokens))
    instance, text = await _looked_up(request, ask, Text)
    return _json(DetokenizeReply(content=text.text, prompt=text.text), instance)


async def tokenizer_info(request: Request[State]) -> Response:
    """Return what a client needs to know of a tokenizer."""
    check_draining(request)
    model = request.query_params.get("model")
    ask = _ask(request, model, Describe(id=0, client=request.state["caller"]))
    instance, found = await _looked_up(request, ask, Described)
    return _json(TokenizerReply(found.bos, found.eos, found.template), instance)


async def apply_template(request: Request[State]) -> Response:
    """Return the prompt of a conversation."""
    chat = decoded(await _body(request))
    ask = _about(request, chat, partial(_render, request.state["caller"]))
    instance, text = await _looked_up(request, ask, Text)
    return _json(TemplateReply(text.text), instance)


async def input_tokens(request: Request[State]) -> Response:
    """Return the number of tokens of a conversation."""
    instance, n = await counted(request, decoded(await _body(request)))
    return _json(CountReply(input_tokens=n), instance)


async def counted(request: Request[State], chat: ChatRequest) -> tuple[Instance, int]:
    """Return the number of tokens of a conversation, and the instance that counted them."""
    ask = _about(request, chat, partial(_tokens, request.state["caller"], "count"))
    instance, tokens = await _looked_up(request, ask, Tokens)
    return instance, tokens.n


def _text_tokens(asked: TokenizeRequest, client: str) -> Tokenize:
    """Return the request for the tokens of a text, with the defaults of its form."""
    lookup = Tokenize(id=0, client=client, detail=asked.detail)
    if asked.content is not None:
        return structs.replace(
            lookup,
            text=asked.content,
            add_special=bool(asked.add_special),
            parse_special=asked.parse_special is not False,
        )
    return structs.replace(lookup, text=asked.prompt, add_special=asked.add_special_tokens is not False)


def _tokens(client: str, detail: TokenDetail, conversation: bytes) -> Tokenize:
    return Tokenize(id=0, client=client, conversation=conversation, detail=detail)


def _render(client: str, conversation: bytes) -> Render:
    return Render(id=0, client=client, conversation=conversation)


def _tokenized(asked: TokenizeRequest, tokens: Tokens, instance: Instance) -> Response:
    assert instance.load_config is not None
    return _json(tokenized(asked, tokens, instance.load_config.context_length), instance)


async def _body(request: Request[State], most_bytes: int | None = None) -> bytes:
    check_draining(request)
    return await read_any(request, request.state["max_body_bytes"] if most_bytes is None else most_bytes)


async def _looked_up(request: Request[State], ask: Ask, kind: type[Reply]) -> tuple[Instance, Reply]:
    with request.state["replies"].place(request.state["caller"]):
        return await waited_for(request, request.state["answering"].looked_up(ask, kind))


def _ask(request: Request[State], model: str | None, lookup: Lookup) -> Ask:
    """Return the request about a text or tokens."""
    return Ask(
        model=model,
        type=None,
        order=lambda _: lookup,
        route=request.scope["route"].path,
        prompt="",
        traceparent=request.state["traceparent"],
    )


def _about(request: Request[State], chat: ChatRequest, kind: Callable[[bytes], Lookup]) -> Ask:
    """Return the request about a conversation.  It is translated as for an answer, with the settings of the model."""
    caller, roster = request.state["caller"], request.state["roster"]

    def order(instance: Instance) -> Lookup:
        return kind(generate(chat, caller, roster.settings_of(instance)).conversation)

    return Ask(
        model=chat.model,
        order=order,
        route=request.scope["route"].path,
        prompt="messages",
        beginning=beginning(chat, caller),
        ttl_s=ttl_s(chat.ttl),
        traceparent=request.state["traceparent"],
    )


def _json(value: Struct, instance: Instance) -> Response:
    headers = {"Loadstone-Instance": instance.instance_id}
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")
