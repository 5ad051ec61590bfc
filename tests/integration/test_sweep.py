"""The sweep of an API process on a real Redis: lost instances, and the records that it reads."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import redis
from msgspec import msgpack

import api.pool.sweep
from api.pool.roster import Roster
from api.pool.sweep import Sweep, doubtful
from api.pool.view import View
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadRequest
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store


@pytest.fixture
async def roster(store: Store) -> Roster:
    """A roster with the live workers "w" and "another" of epoch "e"."""
    for name in ("w", "another"):
        await store.workers.renew(WorkerSnapshot(name=name, epoch="e", version="0", catalog="", residents=0))
    return Roster(store.workers, Settings())


@pytest.fixture
def sweep(store: Store, roster: Roster) -> Sweep:
    """A sweep that does not wait for leases to expire."""
    return Sweep(
        roster, View(roster, store.instances), store.instances, store.queue, store.listen, lease_s=0.0, load_attempts=3
    )


async def doubted(store: Store, roster: Roster) -> list[str]:
    return doubtful(await store.instances.heads(), await roster.refresh())


async def queued(store: Store, number: int, worker: str = "w") -> Instance:
    request = LoadRequest(model="p/m")
    return await store.instances.create(
        Instance(id=f"load_{number}", model="p/m", key="p/m", type="llm", worker=worker, request=request)
    )


async def loaded(store: Store, number: int, worker: str = "w", epoch: str = "e") -> Instance:
    record = await queued(store, number, worker)
    for event, changes in ((Event.CLAIM, {"epoch": epoch}), (Event.LOAD, {"loaded_at": 1.0})):
        record, _ = await store.instances.commit(record, record.after(event, **changes))
    return record


async def state(store: Store, instance: Instance) -> State | None:
    stored = await store.instances.get(instance.id)
    return None if stored is None else stored.state


async def test_only_instances_without_a_live_process_are_lost(sweep: Sweep, store: Store) -> None:
    """One instance belongs to a worker that is gone, one to an earlier process of a live worker."""
    here, before, away = await loaded(store, 1), await loaded(store, 2, epoch="d"), await loaded(store, 3, "another")
    await store.workers.release("another", "e")
    await sweep.beat()
    assert [await state(store, one) for one in (here, before, away)] == [State.LOADED, State.LOST, State.LOST]


async def test_documents_of_consistent_instances_are_not_read(roster: Roster, store: Store) -> None:
    ids = [(await loaded(store, n, worker)).id for n, worker in enumerate(("w", "another"))]
    assert await doubted(store, roster) == []
    await store.workers.release("another", "e")
    assert await doubted(store, roster) == ids[1:]


async def test_documents_of_queued_instances_are_read(roster: Roster, store: Store) -> None:
    """The document names the workers that refused the load; also after a requeue."""
    waiting, again = await queued(store, 1), await queued(store, 2)
    claimed, _ = await store.instances.commit(again, again.after(Event.CLAIM, epoch="e"))
    assert await doubted(store, roster) == [waiting.id]
    await store.instances.commit(claimed, claimed.after(Event.REQUEUE))
    assert sorted(await doubted(store, roster)) == [waiting.id, again.id]


async def test_the_document_decides_whether_an_instance_is_lost(
    sweep: Sweep, roster: Roster, store: Store, raw: redis.Redis
) -> None:
    """An earlier version wrote no epoch beside the document."""
    record = await loaded(store, 1)
    raw.hdel(f"inst:{record.id}", "epoch")
    assert await doubted(store, roster) == [record.id]
    await sweep.beat()
    assert await state(store, record) is State.LOADED
    document: Any = raw.hget(f"inst:{record.id}", "doc")
    raw.hset(f"inst:{record.id}", mapping={"doc": msgpack.encode({**msgpack.decode(document), "epoch": "d"})})
    await sweep.beat()
    assert await state(store, record) is State.LOST


async def test_sweep_waits_for_a_lease_after_an_outage(
    roster: Roster, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """While Redis was away, or this process not there, no worker could renew its lease: it gets the time for that."""
    clock: Any = SimpleNamespace(now_s=100.0)
    clock.monotonic = lambda: clock.now_s
    monkeypatch.setattr(api.pool.sweep, "time", clock)
    sweep = Sweep(
        roster, View(roster, store.instances), store.instances, store.queue, store.listen, lease_s=10.0, load_attempts=3
    )
    made = await loaded(store, 1)
    await store.workers.release("w", "e")

    async def state_at(now_s: float) -> State | None:
        clock.now_s = now_s
        await sweep.beat()
        return await state(store, made)

    assert [await state_at(now_s) for now_s in (100.0, 109.0)] == [State.LOADED, State.LOADED]

    async def refresh() -> None:
        raise redis.ConnectionError("away")

    with monkeypatch.context() as patched:
        patched.setattr(roster, "refresh", refresh)
        await sweep.beat()
    assert [await state_at(now_s) for now_s in (111.0, 120.0, 122.0)] == [State.LOADED, State.LOADED, State.LOST]
