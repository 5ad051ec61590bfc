"""The event stream of a load on a real Redis, without a socket: silence, shutdown and lost clients."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack, aclosing
from typing import Any

import pytest

import api.loads.follow
import api.waiting
from api.loads.follow import Follower
from api.loads.stream import events
from api.replies import OpenReplies
from api.waiting import EventStream
from shared.errors import TooManyWaiting
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.http import LoadRequest
from shared.store.store import Store
from tests.support.channel import Channel, running

DEADLINE_S = 60.0


@pytest.fixture
async def record(store: Store) -> Instance:
    request = LoadRequest(model="p/m")
    return await store.instances.create(
        Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=request)
    )


async def test_comments_are_sent_while_there_is_no_progress(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Proxies cut an idle connection, and a load may be queued for long."""
    monkeypatch.setattr(api.loads.stream, "HEARTBEAT_S", 0.01)
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(events(Follower(store.instances, store.listen), record, "0", asyncio.Event())) as stream,
    ):
        chunks = [await anext(stream) for _ in range(3)]
    assert [chunk.startswith(b"id: ") for chunk in chunks].count(True) == 1
    assert chunks.count(b": nothing new\n\n") == 2


async def test_a_stopping_process_ends_streams_without_an_outcome(store: Store, record: Instance) -> None:
    """A client can then continue at another process with the last event ID."""
    closing = asyncio.Event()
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(events(Follower(store.instances, store.listen), record, "0", closing)) as stream,
    ):
        await anext(stream)
        closing.set()
        assert [chunk async for chunk in stream] == [b": shutting down\n\n"]


async def test_a_lost_record_ends_the_stream_with_an_error(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(api.loads.follow, "RECHECK_S", 0.01)
    follower = Follower(store.instances, Channel().listen)
    stream = events(follower, record, "0", asyncio.Event())
    async with asyncio.timeout(DEADLINE_S), running(follower), aclosing(stream):
        await anext(stream)
        await store.redis.flushall()
        (last,) = [chunk async for chunk in stream]
    assert last.startswith(b'event: error\ndata: {"type":"error","error":{"type":"service_unavailable"')


async def test_no_event_follows_the_terminal_event(store: Store, record: Instance) -> None:
    claimed, _ = await store.instances.commit(record, record.after(Event.CLAIM, epoch="e"))
    stopping, _ = await store.instances.commit(claimed, claimed.after(Event.STOP))
    await store.instances.commit(stopping, stopping.after(Event.EXIT))
    async with (
        asyncio.timeout(DEADLINE_S),
        aclosing(events(Follower(store.instances, store.listen), record, "0", asyncio.Event())) as stream,
    ):
        names = [chunk.partition(b"event: ")[2].partition(b"\n")[0] async for chunk in stream]
    assert names == [b"model_load.start", b"model_load.progress", b"model_load.progress", b"error"]


async def test_a_client_that_reads_nothing_does_not_block_shutdown(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unread events stay in Redis: one event is being sent, and no event is read ahead."""
    monkeypatch.setattr(api.waiting, "LAST_WORDS_S", 0.01)
    replies, closing = OpenReplies(1), asyncio.Event()
    async with AsyncExitStack() as undo:
        undo.enter_context(replies.place(""))
        place = undo.pop_all()
    sent: list[Any] = []

    async def send(message: Any) -> None:
        sent.append(message)
        if len(sent) == 2:  # the head of the response is sent; the first event never is
            closing.set()
            await asyncio.Event().wait()

    async def receive() -> Any:
        await asyncio.Event().wait()

    stream = EventStream(events(Follower(store.instances, store.listen), record, "0", closing), place, closing)
    with pytest.raises(TooManyWaiting), replies.place(""):
        pass
    async with asyncio.timeout(DEADLINE_S):
        await stream({"type": "http"}, receive, send)
    assert len(sent) == 2
    with replies.place(""):
        pass


async def test_a_client_may_leave_at_any_moment(store: Store, record: Instance) -> None:
    """Also during a read: there is no error and no task left, and the place is free."""
    follower = Follower(store.instances, store.listen)
    before = asyncio.all_tasks()
    for turns in range(40):
        gone = asyncio.Event()

        async def send(message: Any) -> None: ...

        async def receive(gone: asyncio.Event = gone) -> Any:
            await gone.wait()
            return {"type": "http.disconnect"}

        replies = OpenReplies(1)
        async with AsyncExitStack() as undo:
            undo.enter_context(replies.place(""))
            place = undo.pop_all()
        stream = EventStream(events(follower, record, "0", asyncio.Event()), place, asyncio.Event())
        async with asyncio.timeout(DEADLINE_S):
            streaming = asyncio.create_task(stream({"type": "http"}, receive, send))
            for _ in range(turns):
                await asyncio.sleep(0)
            gone.set()
            await streaming
        assert replies.taken.total() == 0
    left = asyncio.all_tasks() - before  # a shared read continues to its end
    if left:
        _, late = await asyncio.wait(left, timeout=DEADLINE_S)
        assert not late
    assert not follower.followed
