"""Counts on a real Redis: added exactly once, also after lost replies."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import msgspec
import pytest
import redis
from redis.exceptions import ConnectionError as RedisConnectionError

from shared.errors import LoadFailed
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadRequest
from shared.schema.snapshot import WorkerSnapshot
from shared.store.connection import UNAVAILABLE
from shared.store.instances import Fenced
from shared.store.keys import RETAIN_S
from shared.store.store import Store
from shared.telemetry.tally import Tally


def queued(number: int, **fields: Any) -> Instance:
    request = LoadRequest(model="p/m")
    return Instance(id=f"load_{number}", model="p/m", key="p/m", type="llm", worker="w", request=request, **fields)


async def claimed(store: Store, number: int) -> Instance:
    record = await store.instances.create(queued(number, total_size_bytes=1000))
    return (await store.instances.commit(record, record.after(Event.CLAIM, epoch="e")))[0]


def tallies(raw: redis.Redis) -> dict[str, int]:
    stored: Any = raw.hgetall("tallies")
    return {name.decode(): int(n) for name, n in stored.items()}


class LossyStore:
    """A store that loses the given number of replies."""

    def __init__(self, store: Store, lost: int) -> None:
        self.store, self.lost = store, lost

    async def add(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        await self.store.counters.add(process, number, counts)
        if self.lost:
            self.lost -= 1
            raise RedisConnectionError("the reply is lost")


async def test_a_commit_repeated_after_a_lost_reply_counts_once(store: Store, raw: redis.Redis) -> None:
    loading = await claimed(store, 1)
    new = loading.after(Event.LOAD, loaded_at=1.0, timing={"queue": 0.5, "weights": 0.25})
    await store.instances.commit(loading, new)
    once = tallies(raw)
    assert (once["loads|loaded|"], once["loaded_bytes"], once["load_seconds|under_1GiB|sum"]) == (1, 1000, 750_000)
    await store.instances.commit(loading, new)
    assert tallies(raw) == once


async def test_only_one_of_several_racing_ends_counts(store: Store, raw: redis.Redis) -> None:
    loading = await claimed(store, 1)
    error = LoadFailed("load_stalled", "llm", "p/m", "why").body()
    ends = [loading.after(Event.EXPIRE), loading.after(Event.FAIL, error=error), loading.after(Event.EXPIRE)]
    results = await asyncio.gather(*(store.instances.commit(loading, end) for end in ends), return_exceptions=True)
    assert sum(isinstance(result, Fenced) for result in results) == 2
    assert list(tallies(raw).values()) == [1]


async def test_a_restoration_repeated_after_a_lost_reply_counts_once(store: Store, raw: redis.Redis) -> None:
    for _ in range(2):
        await store.instances.create(queued(1, restoring=1, instance_id="p/m"))
    assert tallies(raw) == {"restorations": 1}


async def test_a_batch_with_a_lost_reply_is_added_once(store: Store, raw: redis.Redis) -> None:
    tally, lossy = Tally(), LossyStore(store, lost=2)
    tally.add({"a": 1, "b": 5})
    for _ in range(2):
        with pytest.raises(UNAVAILABLE):
            await tally.hand_over(lossy.add)
        tally.add({"a": 10})
    await tally.hand_over(lossy.add)
    await tally.hand_over(lossy.add)
    assert tallies(raw) == {"a": 21, "b": 5}


async def test_concurrent_batches_of_several_processes_add_up(store: Store, raw: redis.Redis) -> None:
    processes = [Tally() for _ in range(5)]
    for _ in range(4):
        for tally in processes:
            tally.add({"a": 1})
        await asyncio.gather(*(tally.hand_over(store.counters.add) for tally in processes for _ in range(3)))
    assert tallies(raw) == {"a": 20}
    left = [raw.ttl(key) for key in raw.keys("tallied:*")]  # type: ignore[union-attr]
    assert len(left) == 5
    assert all(RETAIN_S - 60 < seconds <= RETAIN_S for seconds in left)  # type: ignore[operator]


async def test_a_batch_older_than_the_last_one_is_not_added(store: Store, raw: redis.Redis) -> None:
    await store.counters.add("p", 2, {"a": 1})
    await store.counters.add("p", 1, {"a": 1})
    assert tallies(raw) == {"a": 1}


async def test_a_process_without_counts_writes_nothing(store: Store, raw: redis.Redis) -> None:
    await Tally().hand_over(store.counters.add)
    assert raw.keys("tall*") == []


async def test_readings_match_the_records(store: Store) -> None:
    await store.workers.renew(
        WorkerSnapshot(name="w", epoch="e", version="0", catalog="", residents=0, lease_s=store.workers.lease_s)
    )
    loading = await claimed(store, 1)
    await store.instances.create(queued(2))
    await store.instances.create(msgspec.structs.replace(queued(3), worker="another"))
    ended = await claimed(store, 4)
    await store.instances.commit(ended, ended.after(Event.EXPIRE))
    readings = await store.counters.read()
    assert [worker.name for worker in readings.workers] == ["w"]
    assert (readings.queued, readings.queued_at) == (2, {"w": 1})
    assert readings.live == {("w", "loading"): 1, ("w", "queued"): 1, ("another", "queued"): 1}
    assert readings.counters == {"queued": 4, "loading": 2, "lost": 1}
    assert readings.tallies == {"loads|lost|": 1}
    assert loading.state is State.LOADING
