"""POST /v1/responses and /v1/responses/input_tokens."""

from __future__ import annotations

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from api.decode import read_any
from api.openai.chat import answer
from api.openai.fields import sampling
from api.openai.reply import Form, check_draining
from api.openai.request import Message
from api.responses.answer import Responding
from api.responses.request import ResponseRequest, chat, decoded, functions
from api.responses.response import begun
from api.state import State
from api.tokens.forms import CountReply
from api.tokens.routes import counted
from shared.errors import PreviousResponseNotFound
from shared.instance import Instance

INPUT = "input"


async def create(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream."""
    asked = await _asked(request)
    tools = functions(asked)
    meant = chat(asked, tools, _earlier(asked))
    roster = request.state["roster"]

    def form(instance: Instance, _: int) -> Form:
        applied = sampling(meant, roster.settings_of(instance).sampling)
        return Responding(begun(asked, tools, instance.instance_id, applied))

    return await answer(request, meant, form, INPUT)


async def input_tokens(request: Request[State]) -> Response:
    """Return the number of tokens of a conversation."""
    asked = await _asked(request)
    instance, n = await counted(request, chat(asked, functions(asked), _earlier(asked)))
    headers = {"Loadstone-Instance": instance.instance_id}
    return Response(msgspec.json.encode(CountReply(input_tokens=n)), headers=headers, media_type="application/json")


async def _asked(request: Request[State]) -> ResponseRequest:
    check_draining(request)
    return decoded(await read_any(request, request.state["max_body_bytes"]))


def _earlier(asked: ResponseRequest) -> list[Message]:
    """Return the messages before those of a request."""
    if asked.previous_response_id is None:
        return []
    raise PreviousResponseNotFound(
        f"Previous response with id '{asked.previous_response_id}' not found.", param="previous_response_id"
    )
