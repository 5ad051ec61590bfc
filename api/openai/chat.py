"""POST /v1/chat/completions."""

from __future__ import annotations

from functools import partial

from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.decode import read_any
from api.openai.answer import Chat, Heading
from api.openai.fields import check_choices, ttl_s
from api.openai.reply import Around, BeforeEnd, Form, FormOf, at_once, check_draining, plain, reply
from api.openai.request import ChatRequest, beginning, decoded, generate
from api.pool.roster import Roster
from api.state import State
from shared.channel.messages import Generate
from shared.instance import Instance

MESSAGES = "messages"


async def chat_completions(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream."""
    return await answer_chat(request)


async def answer_chat(request: Request[State], around: Around = plain) -> Response:
    """Answer a conversation, in a form around that of this API."""
    check_draining(request)
    asked = decoded(await read_any(request, request.state["max_body_bytes"]))
    roster = request.state["roster"]

    def form(instance: Instance, _: int) -> Form:
        heading = Heading(instance.instance_id, roster.fingerprint(instance.worker))
        return around(instance, Chat(heading, asked.n or 1, with_usage=asked.wants_usage))

    return await answer(request, asked, form)


async def answer(
    request: Request[State],
    asked: ChatRequest,
    form: FormOf,
    before_end: BeforeEnd = at_once,
    *,
    prompt: str = MESSAGES,
) -> Response:
    """Answer a decoded request, in a form of any API.  `prompt` is the field with the conversation, for errors."""
    return await reply(request, asking(request, asked, prompt), form, before_end, streams=bool(asked.stream))


def asking(request: Request[State], asked: ChatRequest, prompt: str) -> Ask:
    """Return what a decoded request asks a model."""
    caller, roster = request.state["caller"], request.state["roster"]
    return Ask(
        model=asked.model,
        order=partial(_order, asked, caller, roster),
        route=request.scope["route"].path,
        prompt=prompt,
        beginning=beginning(asked, caller),
        ttl_s=ttl_s(asked.ttl),
        traceparent=request.state["traceparent"],
    )


def _order(asked: ChatRequest, client: str, roster: Roster, instance: Instance) -> Generate:
    """Return the order for an instance, with the settings of its model.

    Raises InvalidValue if it cannot generate so many answers at once.
    """
    check_choices(asked, instance)
    return generate(asked, client, roster.settings_of(instance))
