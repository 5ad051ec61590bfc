"""/v1/responses: create a response, count its tokens, get and remove those that are stored."""

from __future__ import annotations

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from api.decode import read_any
from api.openai.chat import answer
from api.openai.fields import sampling
from api.openai.reply import Form, check_draining
from api.responses.answer import Responding
from api.responses.memory import Memory
from api.responses.request import ResponseRequest, chat, decoded, functions
from api.responses.response import DeletedResponse, DeletedResponses, begun
from api.state import State
from api.tokens.forms import CountReply
from api.tokens.routes import counted
from shared.channel.messages import Usage
from shared.errors import NotSupported, ResponseNotFound
from shared.instance import Instance

INPUT = "input"


async def create(request: Request[State]) -> Response:
    """Answer a conversation, whole or as a stream, and store the response."""
    asked = await _asked(request)
    memory, roster = _memory(request), request.state["roster"]
    tools = functions(asked)
    meant = chat(asked, tools, await memory.earlier(asked.previous_response_id))
    stores = asked.store is not False and memory.is_on

    def form(instance: Instance, _: int) -> Form:
        applied = sampling(meant, roster.settings_of(instance).sampling)
        return Responding(begun(asked, tools, instance.instance_id, applied, stores=stores))

    async def keep(form: Form, usage: Usage) -> None:
        assert isinstance(form, Responding)
        messages = meant.messages[1:] if asked.instructions is not None else meant.messages
        if stores and not await memory.keep(form.whole(usage), messages):
            form.is_not_stored(usage)

    return await answer(request, meant, form, keep, prompt=INPUT)


async def input_tokens(request: Request[State]) -> Response:
    """Return the number of tokens of a conversation."""
    asked = await _asked(request)
    meant = chat(asked, functions(asked), await _memory(request).earlier(asked.previous_response_id))
    instance, n = await counted(request, meant)
    return _json(CountReply(input_tokens=n), {"Loadstone-Instance": instance.instance_id})


async def stored(request: Request[State]) -> Response:
    """Return a stored response."""
    if request.query_params.get("stream") == "true":
        raise NotSupported("'stream': a stored response is not streamed.", param="stream")
    found = await _memory(request).get(request.path_params["response_id"])
    if found is None or not found.response:
        raise _not_found(request)
    return Response(found.response, media_type="application/json")


async def delete(request: Request[State]) -> Response:
    """Remove a stored response."""
    if not await _memory(request).delete(request.path_params["response_id"]):
        raise _not_found(request)
    return _json(DeletedResponse(id=request.path_params["response_id"]))


async def delete_all(request: Request[State]) -> Response:
    """Remove all stored responses of the client."""
    return _json(DeletedResponses(deleted=await _memory(request).delete_all()))


async def _asked(request: Request[State]) -> ResponseRequest:
    check_draining(request)
    return decoded(await read_any(request, request.state["max_body_bytes"]))


def _memory(request: Request[State]) -> Memory:
    return Memory(request.state["responses"], request.state["caller"])


def _not_found(request: Request[State]) -> ResponseNotFound:
    return ResponseNotFound(f"Response with id '{request.path_params['response_id']}' not found.", param="response_id")


def _json(value: Struct, headers: dict[str, str] | None = None) -> Response:
    return Response(msgspec.json.encode(value), headers=headers, media_type="application/json")
