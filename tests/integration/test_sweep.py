"""The sweep of an API process, on a real Redis: what it moves, and that it leaves the rest alone, and unread."""

from __future__ import annotations

from typing import Any

import pytest
import redis
from msgspec import msgpack

from api.pool.roster import Roster
from api.pool.sweep import Sweep, doubtful
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadRequest
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings
from shared.store.store import Store


@pytest.fixture
async def roster(store: Store) -> Roster:
    """The roster of "w" and "another", which are alive, with epoch "e"."""
    for name in ("w", "another"):
        await store.workers.renew(WorkerSnapshot(name=name, epoch="e", version="0", catalog="", residents=0))
    return Roster(store.workers, Settings())


@pytest.fixture
def sweep(store: Store, roster: Roster) -> Sweep:
    """A sweep that waits for no lease to expire."""
    return Sweep(roster, store.instances, store.queue, store.listen, lease_s=0.0, load_attempts=3)


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
    found = await store.instances.get(instance.id)
    return None if found is None else found.state


async def test_what_no_live_process_holds_is_lost_and_the_rest_stays(sweep: Sweep, store: Store) -> None:
    """Of a worker that is gone, and of the process that worked under a live one's name before."""
    here, before, away = await loaded(store, 1), await loaded(store, 2, epoch="d"), await loaded(store, 3, "another")
    await store.workers.release("another", "e")
    await sweep.beat()
    assert [await state(store, one) for one in (here, before, away)] == [State.LOADED, State.LOST, State.LOST]


async def test_of_what_is_in_order_no_document_is_read(roster: Roster, store: Store) -> None:
    ids = [(await loaded(store, n, worker)).id for n, worker in enumerate(("w", "another"))]
    assert await doubted(store, roster) == []
    await store.workers.release("another", "e")
    assert await doubted(store, roster) == ids[1:]


async def test_of_what_waits_the_document_is_read(roster: Roster, store: Store) -> None:
    """It tells who refused it; also of what was handed back after a claim."""
    waiting, again = await queued(store, 1), await queued(store, 2)
    claimed, _ = await store.instances.commit(again, again.after(Event.CLAIM, epoch="e"))
    assert await doubted(store, roster) == [waiting.id]
    await store.instances.commit(claimed, claimed.after(Event.REQUEUE))
    assert sorted(await doubted(store, roster)) == [waiting.id, again.id]


async def test_the_document_tells_whether_an_instance_is_in_order(
    sweep: Sweep, roster: Roster, store: Store, raw: redis.Redis
) -> None:
    """An earlier version wrote no epoch beside it."""
    made = await loaded(store, 1)
    raw.hdel(f"inst:{made.id}", "epoch")
    assert await doubted(store, roster) == [made.id]
    await sweep.beat()
    assert await state(store, made) is State.LOADED
    document: Any = raw.hget(f"inst:{made.id}", "doc")
    raw.hset(f"inst:{made.id}", mapping={"doc": msgpack.encode({**msgpack.decode(document), "epoch": "d"})})
    await sweep.beat()
    assert await state(store, made) is State.LOST
