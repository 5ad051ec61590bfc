"""Describes models of the hub that no worker has, by a process for each question, and keeps their headers."""

from __future__ import annotations

import asyncio
import shutil
import time
from contextlib import aclosing
from itertools import count
from pathlib import Path
from typing import assert_never

import msgspec
from msgspec import structs

from shared.download import InspectRequest, Offer, Refusal
from shared.errors import ErrorBody, ServiceUnavailable
from shared.schema.model import Model
from shared.schema.snapshot import Described
from shared.telemetry import log
from worker.hub.child import answers
from worker.hub.client import Access
from worker.hub.protocol import Busy, Describe, Description, Finished, Progressed

AT_ONCE = 2  # processes
WITHIN_S = 50.0
UNREACHABLE_S = 30.0  # a hub that could not be reached is not tried again for an estimate
KEPT_N = 4  # models whose headers are kept

_log = log.get("worker")


class Describer:
    """Answers questions about models of the hub."""

    def __init__(self, access: Access | None, directory: Path) -> None:
        """`access`: None if there is no hub.  `directory`: for headers; what a predecessor left there is removed."""
        shutil.rmtree(directory, ignore_errors=True)
        self._access = access
        self._directory = directory
        self._numbers = count()
        self._known: dict[tuple[object, ...], Model] = {}  # by its source; the latest last
        self._places = asyncio.Semaphore(AT_ONCE)
        self._unreachable: tuple[float, Description | None] = (0.0, None)  # until when that is the answer

    @property
    def is_on(self) -> bool:
        return self._access is not None

    async def answer(self, question: bytes) -> bytes:
        """Answer an `InspectRequest` with a `Described`, both as msgpack."""
        if self._access is None:
            return _failed(ServiceUnavailable("The worker has no hub.").body())
        request = msgspec.msgpack.decode(question, type=InspectRequest)
        directory = self._directory / str(next(self._numbers))
        answer: Description | None = None
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                ask = Describe(access=self._access, request=request, directory=str(directory))
                answer = await self._asked(ask)
        except TimeoutError:
            _log.warning("hub not asked", action="hub_not_asked", repository=request.repository)
        if answer is None or not answer.files:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if answer is None:
            return _failed(ServiceUnavailable("The hub did not answer in time.").body())
        if answer.described.model is not None and answer.files:
            # An attacker in the process could name files elsewhere.
            await self._keep(answer.described.model, [str(directory / Path(name).name) for name in answer.files])
        return msgspec.msgpack.encode(answer.described)

    def of(self, source: Model | None) -> Model | None:
        """Return a model that was described lately, with the files of its headers; None if it is none of these."""
        return None if source is None else self._known.get(_identity(source))

    async def _asked(self, ask: Describe) -> Description | None:
        """Run the process for a question, unless the hub could not be reached a moment ago.  None if it fails."""
        until, known = self._unreachable
        if time.monotonic() < until:
            return known
        answer = await _run(ask)
        if answer is not None and answer.is_unreachable:
            self._unreachable = time.monotonic() + UNREACHABLE_S, answer
        return answer

    async def _keep(self, model: Model, files: list[str]) -> None:
        before = self._known.pop(_identity(model), None)
        self._known[_identity(model)] = structs.replace(model, shards=files)
        old = [before] if before is not None else []
        while len(self._known) > KEPT_N:
            old.append(self._known.pop(next(iter(self._known))))
        for one in old:
            await asyncio.to_thread(shutil.rmtree, Path(one.shards[0]).parent, ignore_errors=True)


def _identity(model: Model) -> tuple[object, ...]:
    return (*model.shards, *model.files)


async def _run(ask: Describe) -> Description | None:
    """Run the process for a question.  Returns None if it fails; it is killed and reaped then."""
    async with aclosing(answers(ask)) as told:
        async for one in told:
            match one:
                case Description():
                    return one
                case Refusal():
                    return Description(Described(error=one.error))
                case Offer() | Progressed() | Finished() | Busy():
                    raise AssertionError("it was not asked for")
                case _:
                    assert_never(one)
    return None


def _failed(error: ErrorBody) -> bytes:
    return msgspec.msgpack.encode(Described(error=error))
