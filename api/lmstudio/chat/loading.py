"""The load of a model that a request waits for, as events."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from typing import Any

from api.lmstudio.chat.events import ChatLoadEnd, ChatLoadProgress, ChatLoadStart, ChatStart
from api.openai.answer import HEARTBEAT
from api.waiting import HEARTBEAT_S, encoded
from shared.instance import Instance
from shared.lifecycle import State

PROGRESS_S = 0.1  # the least time between two events of progress


class Loading:
    """What a request has seen of the load that it waits for."""

    def __init__(self) -> None:
        self.begun = asyncio.Event()
        self._seen: Instance | None = None  # the latest revision of a load that has begun

    def saw(self, revision: Instance) -> None:
        """Note a revision.  A load begins when it has memory: until then it can be refused like a request."""
        if revision.state in (State.LOADING, State.LOADED):
            self._seen = revision
            self.begun.set()

    @property
    def instance_id(self) -> str:
        """The id of the instance, once the load has begun."""
        assert self._seen is not None
        return self._seen.instance_id

    @property
    def load_s(self) -> float | None:
        """How long the load took, in seconds; None if the request waited for none."""
        return None if self._seen is None else self._seen.load_time_seconds

    async def events(self, until: asyncio.Future[Any]) -> AsyncGenerator[bytes, None]:
        """Yield the events of a load that has begun, until `until` is done: without the end of one that fails."""
        instance_id = self.instance_id
        yield encoded(ChatStart(instance_id)) + encoded(ChatLoadStart(instance_id))
        clock = asyncio.get_running_loop().time
        told, last = 0.0, clock()
        while True:
            done, _ = await asyncio.wait((until,), timeout=PROGRESS_S)
            assert self._seen is not None
            if done:
                break
            if self._seen.progress > told:
                told, last = self._seen.progress, clock()
                yield encoded(ChatLoadProgress(instance_id, told))
            elif clock() > last + HEARTBEAT_S:
                last = clock()
                yield HEARTBEAT
        if self.load_s is not None:
            yield encoded(ChatLoadEnd(instance_id, self.load_s))
