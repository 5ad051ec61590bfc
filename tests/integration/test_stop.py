"""Stopping instances for clients that leave, on a real Redis."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import redis
from starlette.requests import ClientDisconnect, Request

from api import routes
from api.loads.follow import Follower
from api.loads.records import Records
from api.loads.stop import Stopper
from api.replies import Bodies
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.http import LoadRequest
from shared.store.store import Store
from tests.integration.conftest import DEADLINE_S


async def test_an_unload_is_never_half_done(store: Store, raw: redis.Redis) -> None:
    """If its client leaves, an instance that will not be restored is stopped all the same."""
    made = await store.instances.create(
        Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"))
    )
    loading, _ = await store.instances.commit(made, made.after(Event.CLAIM, epoch="e"))
    await store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0))
    raw.zadd("workers", {"w": 1.0})
    body = [b'{"instance_id": "p/m"}']

    async def receive() -> Any:
        if body:
            return {"type": "http.request", "body": body.pop(), "more_body": False}
        while raw.hexists("wanted:w", "p/m"):  # noqa: ASYNC110
            await asyncio.sleep(0)
        return {"type": "http.disconnect"}

    state = {
        "stopper": Stopper(store.instances, Records(store.instances), Follower(store.instances, store.listen), 0.0),
        "closing": asyncio.Event(),
        "bodies": Bodies(),
        "caller": "",
    }
    headers = [(b"content-type", b"application/json")]
    request: Request[Any] = Request({"type": "http", "method": "POST", "headers": headers, "state": state}, receive)
    async with asyncio.timeout(DEADLINE_S):
        with pytest.raises(ClientDisconnect):
            await routes.unload(request)
    assert raw.hexists("inst:load_1", "stop")
