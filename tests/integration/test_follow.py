"""Following a record on a real Redis: no follower misses a revision or waits for an existing one."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing

import msgspec
import pytest
from redis.exceptions import ConnectionError as RedisConnectionError

import api.loads.follow
import shared.store.instances
from api.loads.follow import Follower
from shared.errors import QueueUnavailable
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadRequest
from shared.store.instances import HISTORY_N
from shared.store.store import Store
from tests.support.channel import Channel, running

DEADLINE_S = 60.0


@pytest.fixture
async def record(store: Store) -> Instance:
    request = LoadRequest(model="p/m")
    return await store.instances.create(
        Instance(id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=request)
    )


async def states(follower: Follower, record: Instance, first: asyncio.Event) -> list[State]:
    seen_states = []
    async with asyncio.timeout(DEADLINE_S), aclosing(follower.follow(record)) as revisions:
        async for _, revision in revisions:
            seen_states.append(revision.state)
            first.set()
    return seen_states


async def test_every_revision_is_seen_from_the_first(store: Store, record: Instance) -> None:
    claimed, _ = await store.instances.commit(record, record.after(Event.CLAIM, epoch="e"))
    await store.instances.commit(claimed, claimed.after(Event.EXPIRE))
    assert await states(Follower(store.instances, store.listen), record, asyncio.Event()) == [
        State.QUEUED,
        State.LOADING,
        State.LOST,
    ]


@pytest.fixture
async def waiting(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> tuple[Follower, asyncio.Task[list[State]]]:
    """A follower that has seen all revisions of a record and gets no notification."""
    monkeypatch.setattr(api.loads.follow, "RECHECK_S", 0.01)
    follower, first = Follower(store.instances, Channel().listen), asyncio.Event()
    following = asyncio.create_task(states(follower, record, first))
    async with asyncio.timeout(DEADLINE_S):
        await first.wait()
    return follower, following


async def test_a_change_without_a_notification_is_found(
    store: Store, record: Instance, waiting: tuple[Follower, asyncio.Task[list[State]]]
) -> None:
    """The change may come before the first recheck."""
    follower, following = waiting
    await store.instances.commit(record, record.after(Event.STOP))
    async with running(follower):
        assert await following == [State.QUEUED, State.CANCELLED]


async def test_a_deleted_record_ends_the_wait(
    store: Store, waiting: tuple[Follower, asyncio.Task[list[State]]]
) -> None:
    follower, following = waiting
    await store.redis.flushall()
    async with running(follower):
        with pytest.raises(QueueUnavailable):
            await following


@pytest.fixture
def channel() -> Channel:
    return Channel()


@pytest.fixture
async def follower(store: Store, channel: Channel, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Follower]:
    """A running follower that only the channel wakes."""
    monkeypatch.setattr(api.loads.follow, "RECHECK_S", 3600.0)
    created = Follower(store.instances, channel.listen)
    async with running(created):
        yield created


# ---- the first entry


async def moved(store: Store, record: Instance, revisions: int, *, ended: bool) -> Instance:
    """Add revisions to the log of a record, the last of them terminal or not."""
    record, _ = await store.instances.commit(record, record.after(Event.CLAIM, epoch="e"))
    while record.rev < revisions - ended:
        new = msgspec.structs.replace(record, loaded_bytes=record.loaded_bytes + 1)
        record, _ = await store.instances.commit(record, new)
    if ended:
        record, _ = await store.instances.commit(record, record.after(Event.EXPIRE))
    assert record.rev == revisions
    return record


async def seen(follower: Follower, record: Instance, after: str = "0", most: int = 10_000) -> list[int]:
    """Return the revisions that a follower sees until the end or up to this number."""
    numbers: list[int] = []
    async with asyncio.timeout(DEADLINE_S), aclosing(follower.follow(record, after)) as revisions:
        async for _, revision in revisions:
            numbers.append(revision.rev)
            if len(numbers) == most:
                break
    return numbers


async def test_a_follower_continues_after_the_entry_it_names(store: Store, record: Instance) -> None:
    await moved(store, record, 6, ended=True)
    entries = [entry for entry, _ in await store.instances.history(record)]
    for n, entry in enumerate(entries):
        assert await seen(Follower(store.instances, store.listen), record, entry) == [*range(n + 2, 7)]
    assert await seen(Follower(store.instances, store.listen), record, "9999999999999-0") == []


async def test_a_follower_at_the_last_entry_waits_for_the_next(
    store: Store, record: Instance, follower: Follower, channel: Channel
) -> None:
    last = await moved(store, record, 3, ended=False)
    (*_, (entry, _)) = await store.instances.history(record)
    following = asyncio.create_task(seen(follower, record, entry))
    await reading_done(store, follower)
    assert not following.done()
    await store.instances.commit(last, last.after(Event.EXPIRE))
    channel.send(record.id)
    assert await following == [4]


async def reading_done(store: Store, follower: Follower) -> None:
    """Wait until a record is followed and its existing revisions have been read."""
    async with asyncio.timeout(DEADLINE_S):
        while not follower.followed:  # noqa: ASYNC110
            await asyncio.sleep(0)
        for _ in range(20):
            await store.redis.ping()


@pytest.mark.parametrize("revisions", [7, 8, 9, 15, 16, 17, 40])
async def test_a_log_of_several_reads_is_seen_completely_and_once(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch, revisions: int
) -> None:
    for module in (api.loads.follow, shared.store.instances):
        monkeypatch.setattr(module, "HISTORY_N", 8)
    last = await moved(store, record, revisions, ended=False)
    assert await seen(Follower(store.instances, store.listen), record, most=revisions) == [*range(1, revisions + 1)]
    await store.instances.commit(last, last.after(Event.EXPIRE))
    assert await seen(Follower(store.instances, store.listen), record) == [*range(1, revisions + 2)]


async def test_a_log_longer_than_one_read_is_seen_completely(store: Store, record: Instance) -> None:
    await moved(store, record, HISTORY_N + 2, ended=True)
    assert await seen(Follower(store.instances, store.listen), record) == [*range(1, HISTORY_N + 3)]


# ---- many followers


class Readings:
    """Counts the reads of logs and can hold back their results."""

    def __init__(self, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.passing = asyncio.Event()
        self.passing.set()
        self.held = asyncio.Event()
        self._history = store.instances.history
        monkeypatch.setattr(store.instances, "history", self._read)

    async def _read(self, instance: Instance, after: str = "0") -> list[tuple[str, Instance]]:
        self.count += 1
        passing = self.passing
        entries = await self._history(instance, after)
        if not passing.is_set():
            self.held.set()
        await passing.wait()
        return entries


@pytest.fixture
def readings(store: Store, monkeypatch: pytest.MonkeyPatch) -> Readings:
    return Readings(store, monkeypatch)


async def test_followers_woken_together_share_one_read(
    store: Store, record: Instance, readings: Readings, follower: Follower, channel: Channel
) -> None:
    following = [asyncio.create_task(seen(follower, record)) for _ in range(200)]
    await reading_done(store, follower)
    last = await moved(store, record, 5, ended=False)
    channel.send(record.id)
    await reading_done(store, follower)
    await store.instances.commit(last, last.after(Event.EXPIRE))
    channel.send(record.id)
    assert await asyncio.gather(*following) == [[*range(1, 7)]] * 200
    assert readings.count <= 6, "there was something to read three times"


async def test_followers_of_different_loads_or_entries_do_not_share(store: Store, record: Instance) -> None:
    other = await store.instances.create(msgspec.structs.replace(record, id="load_2", instance_id=""))
    await moved(store, record, 6, ended=True)
    await moved(store, other, 3, ended=True)
    entries = [entry for entry, _ in await store.instances.history(record)]
    follower = Follower(store.instances, store.listen)
    revisions = await asyncio.gather(
        seen(follower, record), seen(follower, other), seen(follower, record, entries[3]), seen(follower, record)
    )
    assert (*revisions,) == ([1, 2, 3, 4, 5, 6], [1, 2, 3], [5, 6], [1, 2, 3, 4, 5, 6])


async def test_a_later_follower_does_not_share_an_earlier_read(
    store: Store, record: Instance, readings: Readings, follower: Follower, channel: Channel
) -> None:
    """With the earlier result it would wait until the recheck for a revision that exists already."""
    readings.passing.clear()
    early = asyncio.create_task(seen(follower, record))
    async with asyncio.timeout(DEADLINE_S):
        await readings.held.wait()
    held, readings.passing = readings.passing, asyncio.Event()
    readings.passing.set()
    await store.instances.commit(record, record.after(Event.STOP))
    assert await seen(follower, record) == [1, 2]
    assert not early.done()
    channel.send(record.id)
    held.set()
    assert await early == [1, 2]


async def test_a_cancelled_follower_does_not_affect_the_others(
    store: Store, record: Instance, readings: Readings
) -> None:
    """One of the cancelled followers is the one that started the read."""
    await moved(store, record, 3, ended=True)
    follower = Follower(store.instances, store.listen)
    readings.passing.clear()
    following = [asyncio.create_task(seen(follower, record)) for _ in range(5)]
    async with asyncio.timeout(DEADLINE_S):
        await readings.held.wait()
    gone = [following.pop(0), following.pop(1)]
    for one in gone:
        one.cancel()
    done, _ = await asyncio.wait(gone, timeout=DEADLINE_S)
    assert all(one.cancelled() for one in done)
    assert len(done) == 2
    readings.passing.set()
    assert await asyncio.gather(*following) == [[1, 2, 3]] * 3
    assert readings.count == 1
    assert not follower.followed, "no state is kept for followers that are gone"
    assert await seen(follower, record) == [1, 2, 3]
    assert readings.count == 2, "and no result of their read"


@pytest.mark.parametrize("turns", range(24))
async def test_a_follower_ends_at_whatever_moment_it_is_cancelled(store: Store, record: Instance, turns: int) -> None:
    """Redis' client may lose a cancellation: the follower of a load that nobody wants to see went on until its end."""
    follower = Follower(store.instances, Channel().listen)
    following = asyncio.create_task(follower.until(record.id, lambda revision: revision.state is State.LOADED))
    for _ in range(turns):
        await asyncio.sleep(0)
    following.cancel()
    done, _ = await asyncio.wait([following], timeout=DEADLINE_S)
    following.cancel()
    assert done
    assert following.cancelled()
    assert not follower.followed


async def test_a_failed_shared_read_fails_all_and_is_not_kept(
    store: Store, record: Instance, monkeypatch: pytest.MonkeyPatch
) -> None:
    await moved(store, record, 3, ended=True)
    follower, history = Follower(store.instances, store.listen), store.instances.history

    async def fail(instance: Instance, after: str = "0") -> list[tuple[str, Instance]]:
        await history(instance, after)
        raise RedisConnectionError("away")

    with monkeypatch.context() as patched:
        patched.setattr(store.instances, "history", fail)
        outcomes = await asyncio.gather(*(seen(follower, record) for _ in range(5)), return_exceptions=True)
    assert [type(one) for one in outcomes] == [RedisConnectionError] * 5
    assert await seen(follower, record) == [1, 2, 3]
