"""Requests for vectors and scores, for the routes of all families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AsyncExitStack

from msgspec import Struct
from starlette.requests import Request

from api.answering import Ask, told
from api.channel.answer import Answer
from api.state import State
from api.waiting import waited_for
from shared.channel.messages import Deltas, Ended, Usage, Vectors
from shared.errors import ServiceError
from shared.instance import Instance

FLOAT_BYTES = 4  # little-endian, as on every processor that the engine runs on here


class Computed(Struct, frozen=True, kw_only=True):
    """What an instance computed."""

    instance: Instance
    pieces: list[Vectors]
    usage: Usage

    @property
    def headers(self) -> dict[str, str]:
        return {"Loadstone-Instance": self.instance.instance_id}

    def vectors(self) -> Iterator[bytes]:
        """Yield the vector of each text, in order."""
        for piece in self.pieces:
            size = len(piece.data) // piece.n
            for at in range(0, len(piece.data), size):
                yield piece.data[at : at + size]


async def computed(request: Request[State], ask: Ask) -> Computed:
    """Return all that a model computes for a request.  Raises the reason why it does not."""
    async with AsyncExitStack() as undo:
        undo.enter_context(request.state["replies"].place(request.state["caller"]))
        instance, answer = await waited_for(request, request.state["answering"].begin(ask, undo))
        pieces, usage = await waited_for(request, collected(answer))
    return Computed(instance=instance, pieces=pieces, usage=usage)


async def collected(answer: Answer) -> tuple[list[Vectors], Usage]:
    """Return all vectors of a request that was accepted.  Raises the error of one that fails."""
    pieces: list[Vectors] = []
    async for message in answer:
        match told(message):
            case Vectors() as piece:
                pieces.append(piece)
            case Ended(usage=usage):
                return pieces, usage
            case Deltas() | None:
                pass
    raise ServiceError("The answer has no end.")
