"""Following a record on a real Redis: nobody waits for what has happened already."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

import api.follow
from api.follow import Follower
from shared.errors import QueueUnavailable
from shared.lifecycle import Event, State
from shared.schema import Instance, LoadRequest
from shared.store import Store

DEADLINE_S = 10.0


@pytest.fixture
async def record(store: Store) -> Instance:
    request = LoadRequest(model="p/m")
    return await store.create(Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=request))


async def states(follower: Follower, record: Instance, first: asyncio.Event) -> list[State]:
    found = []
    async with asyncio.timeout(DEADLINE_S), aclosing(follower.follow(record)) as revisions:
        async for _, revision in revisions:
            found.append(revision.state)
            first.set()
    return found


async def test_every_revision_is_seen_from_the_first_on(store: Store, record: Instance) -> None:
    claimed, _ = await store.commit(record, record.after(Event.CLAIM, epoch="e"))
    await store.commit(claimed, claimed.after(Event.EXPIRE))
    assert await states(Follower(store), record, asyncio.Event()) == [State.QUEUED, State.LOADING, State.LOST]


@pytest.fixture
async def waiting(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> tuple[Follower, asyncio.Task[list[State]]]:
    """Somebody who follows, has seen what there was, and hears of nothing."""
    monkeypatch.setattr(api.follow, "RECHECK_S", 0.01)
    follower, first = Follower(store), asyncio.Event()
    following = asyncio.create_task(states(follower, record, first))
    async with asyncio.timeout(DEADLINE_S):
        await first.wait()
    return follower, following


async def test_a_change_whose_notification_was_lost_is_found(
    store: Store, record: Instance, waiting: tuple[Follower, asyncio.Task[list[State]]]
) -> None:
    """Also one that came before anybody looked for the first time."""
    follower, following = waiting
    await store.commit(record, record.after(Event.STOP))
    looking = asyncio.create_task(follower._recheck())
    assert await following == [State.QUEUED, State.CANCELLED]
    looking.cancel()


async def test_a_record_that_is_gone_ends_the_wait(
    store: Store, waiting: tuple[Follower, asyncio.Task[list[State]]]
) -> None:
    follower, following = waiting
    await store.redis.flushall()
    looking = asyncio.create_task(follower._recheck())
    with pytest.raises(QueueUnavailable):
        await following
    looking.cancel()
