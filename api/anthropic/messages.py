"""POST /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

from typing import Annotated

import msgspec
from msgspec import Meta, Struct
from starlette.requests import Request
from starlette.responses import Response

from api.anthropic.answer import Answer
from api.anthropic.request import decoded
from api.decode import read_any
from api.openai.chat import answer
from api.openai.reply import check_draining
from api.openai.request import ChatRequest
from api.state import State
from api.tokens.routes import counted
from shared.instance import Instance


class TokenCount(Struct, frozen=True):
    """How long a conversation is."""

    input_tokens: Annotated[
        int, Meta(description="How many tokens the prompt of the conversation has, also if they exceed the context.")
    ]


async def messages(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream."""
    return await answer(request, await _asked(request), _form)


async def count_tokens(request: Request[State]) -> Response:
    """Return the number of tokens of a conversation."""
    instance, n = await counted(request, await _asked(request))
    headers = {"Loadstone-Instance": instance.instance_id}
    return Response(msgspec.json.encode(TokenCount(n)), headers=headers, media_type="application/json")


async def _asked(request: Request[State]) -> ChatRequest:
    check_draining(request)
    return decoded(await read_any(request, request.state["max_body_bytes"]))


def _form(instance: Instance, prompt_tokens: int) -> Answer:
    return Answer(instance.instance_id, prompt_tokens)
