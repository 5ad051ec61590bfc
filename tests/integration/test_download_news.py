"""How clients of the API learn of a change of a download, on a real Redis."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import aclosing, asynccontextmanager
from typing import Any

import msgspec
import pytest

from api.downloads import intake, jobs
from api.downloads.intake import Downloads
from api.downloads.news import News
from shared.download import Download, Event, Plan
from shared.errors import JobNotFound, QueueUnavailable
from shared.store.store import Store
from tests.support.channel import Channel

DEADLINE_S = 60.0
unused: Any = None


@pytest.fixture
async def record(store: Store) -> Download:
    plan = Plan(repository="org/name", commit="a" * 40, files=[])
    return await store.downloads.create(
        Download(id="job_1", model="org/name", worker="w", store="s", plan=plan, created_at=time.time())
    )


async def end(store: Store, record: Download) -> None:
    ended = msgspec.structs.replace(record.after(Event.FINISH, time.time()), rev=record.rev + 1)
    assert await store.downloads.commit(ended)


@asynccontextmanager
async def followed(store: Store) -> AsyncIterator[Downloads]:
    """Run the subscription during the block; it is there when the block starts."""
    subscribed = asyncio.Event()

    async def listen(channel: str, on_message: Any) -> None:
        def heard(data: bytes) -> None:
            subscribed.set()
            on_message(data)

        await store.listen(channel, heard)

    news = News(listen)
    task = asyncio.create_task(news.run())
    try:
        await subscribed.wait()
        yield Downloads(unused, unused, store.downloads, unused, news)
    finally:
        task.cancel()
        await asyncio.wait([task])


async def test_a_change_wakes_those_that_wait(store: Store, record: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "RECHECK_S", 3600.0)
    async with asyncio.timeout(DEADLINE_S), followed(store) as downloads:
        async with aclosing(jobs.events(downloads, record.id, 0, asyncio.Event())) as events:
            assert b"event: download.progress\n" in await anext(events)
            await end(store, record)
            assert b"event: download.end\n" in await anext(events)
            assert [event async for event in events] == []
        assert (await downloads.done(record.id, "run")).rev == 2


async def test_a_change_without_news_is_found(store: Store, record: Download) -> None:
    downloads = Downloads(unused, unused, store.downloads, unused, News(Channel().listen))
    async with asyncio.timeout(DEADLINE_S), aclosing(jobs.events(downloads, record.id, 1, asyncio.Event())) as events:
        coming = asyncio.ensure_future(anext(events))
        await end(store, record)
        assert b"event: download.end\n" in await coming


async def test_a_silent_stream_is_kept_open(store: Store, record: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "RECHECK_S", 0.01)
    monkeypatch.setattr(jobs, "HEARTBEAT_S", 0.0)
    downloads = Downloads(unused, unused, store.downloads, unused, News(Channel().listen))
    async with asyncio.timeout(DEADLINE_S), aclosing(jobs.events(downloads, record.id, 1, asyncio.Event())) as events:
        assert await anext(events) == b": nothing new\n\n"


async def test_a_wait_for_a_worker_ends(store: Store, record: Download, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(intake, "DONE_S", 0.05)
    async with asyncio.timeout(DEADLINE_S), followed(store) as downloads:
        with pytest.raises(QueueUnavailable, match="The worker of the download does not answer"):
            await downloads.done(record.id, "pause")
        with pytest.raises(JobNotFound):
            await downloads.done("job_2", "pause")
