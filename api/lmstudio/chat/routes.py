"""The route of LM Studio's chat."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from functools import partial

from msgspec import structs
from starlette.requests import Request
from starlette.responses import Response

from api.answering import Ask
from api.channel.answer import Answer
from api.decode import read_any
from api.errors import shaped, unavailable
from api.lmstudio.chat.answer import Chatting
from api.lmstudio.chat.loading import Loading
from api.lmstudio.chat.request import NativeChatRequest, chat, check_reasoning, decoded
from api.openai.chat import asking
from api.openai.reply import BeforeEnd, Form, FormOf, check_draining, reply, streamed
from api.pool.roster import Roster
from api.responses.memory import Memory
from api.state import State
from api.waiting import EventStream, waited_for
from shared.channel.messages import Generate, ToModel, Usage
from shared.errors import ServiceError
from shared.instance import Instance
from shared.race import first, racing
from shared.schema.http import LoadRequest
from shared.store.connection import UNAVAILABLE

INPUT = "input"
Begun = asyncio.Task[tuple[Instance, Answer]]


async def chat_with(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream, and store it."""
    check_draining(request)
    asked = decoded(await read_any(request, request.state["max_body_bytes"]))
    roster, memory = request.state["roster"], Memory(request.state["responses"], request.state["caller"])
    key = roster.named(LoadRequest(model=asked.model)).model
    for model in roster.meant(key).values():  # before it is loaded for a request that is refused then
        check_reasoning(asked.reasoning, key, model.reasoning)
    meant = chat(asked, await memory.earlier(asked.previous_response_id))
    loading = Loading()
    ask = asking(request, meant, prompt=INPUT)
    ask = structs.replace(
        ask,
        order=partial(_order, ask, asked, roster),
        context_length=asked.context_length,
        watch=loading.saw,
    )
    response_id = f"resp_{secrets.token_hex(24)}" if asked.store is not False and memory.is_on else None

    def form(instance: Instance, prompt_tokens: int) -> Form:
        return Chatting(instance.instance_id, prompt_tokens, load_s=loading.load_s, response_id=response_id)

    async def keep(form: Form, _: Usage) -> None:
        assert isinstance(form, Chatting)
        if response_id is not None and not await memory.keep_chat(response_id, [*meant.messages, form.said]):
            form.is_not_stored()

    if not asked.stream:
        return await reply(request, ask, form, keep, streams=False)
    return await _streaming(request, ask, form, keep, loading)


def _order(ask: Ask, asked: NativeChatRequest, roster: Roster, instance: Instance) -> ToModel:
    """Return the order for an instance.  Raises InvalidValue if its model lacks the setting of reasoning."""
    if (model := roster.model_of(instance)) is not None:
        check_reasoning(asked.reasoning, model.key, model.reasoning)
    order = ask.order(instance)
    return structs.replace(order, reports_progress=True) if isinstance(order, Generate) and asked.stream else order


async def _streaming(
    request: Request[State], ask: Ask, form_of: FormOf, before_end: BeforeEnd, loading: Loading
) -> Response:
    """Reply with a stream.  It begins when the request is accepted, or with the load of its model if that is earlier.

    What is refused before that is refused with its status.
    """
    async with AsyncExitStack() as undo:
        undo.enter_context(request.state["replies"].place(request.state["caller"]))
        held = await undo.enter_async_context(AsyncExitStack())  # what `begin` adds later is closed with the reply
        begun = asyncio.create_task(request.state["answering"].begin(ask, held))
        await undo.enter_async_context(racing(begun))
        await waited_for(request, _begins(begun, loading))
        if begun.done():
            begun.result()  # raises why the request is refused
        instance_id = loading.instance_id if loading.begun.is_set() else begun.result()[0].instance_id
        events = _events(begun, loading, ask, form_of, before_end)
        return EventStream(events, undo.pop_all(), request.state["closing"], {"Loadstone-Instance": instance_id})


async def _begins(begun: Begun, loading: Loading) -> None:
    async with racing(loading.begun.wait()) as (waiting,):
        await first((begun, waiting))


async def _events(
    begun: Begun, loading: Loading, ask: Ask, form_of: FormOf, before_end: BeforeEnd
) -> AsyncGenerator[bytes, None]:
    """Yield the events of the load for which the request waits, if there is one, and then those of the answer."""
    if loading.begun.is_set():
        async for event in loading.events(begun):
            yield event
    try:
        instance, answer = await begun
    except (ServiceError, *UNAVAILABLE) as e:
        body = (e if isinstance(e, ServiceError) else unavailable(e, ask.route)).body()
        failed = Chatting(loading.instance_id, 0, load_s=loading.load_s, response_id=None)
        yield failed.failed(shaped(body, ask.route)[1])
        return
    async for event in streamed(answer, form_of(instance, answer.prompt_tokens or 0), ask.route, before_end):
        yield event
