"""The store on a real Redis: names, fences, expiries, leases, notifications and limits."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import redis
import uvloop
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import msgpack

import shared.store.instances
import shared.store.pages
from shared.errors import ErrorBody, LoadFailure, NoWorker
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.model import FileStat, Model, Problem
from shared.schema.snapshot import WorkerSnapshot
from shared.store.connection import connected
from shared.store.instances import (
    FailedRecently,
    Fenced,
    Full,
    Head,
    Joined,
    KeyTaken,
    NoLease,
    Remembered,
    StopRequested,
)
from shared.store.keys import FAILURE_MEMORY_S, NEWS, RETAIN_S, queue
from shared.store.queue import as_arq, pack_job, unpack_job
from shared.store.steady import CHECKED_VERSION
from shared.store.store import Store
from tests.integration.conftest import hold

DEADLINE_S = 60.0
WITHOUT_EXPIRY = {"insts", "names", "workers", "counters", "tallies"}  # besides live records, as the store documents
ERROR = ErrorBody(type="model_load_failed", code="engine_crashed", message="why", detail={"n": 1})
QUEUE = queue("w")


def queued(number: int = 1, key: str = "p/m", worker: str = "w") -> Instance:
    request = LoadRequest(model=key, context_length=100)
    return Instance(id=f"load_{number}", model=key, key=key, type="llm", worker=worker, request=request)


async def claimed(store: Store, number: int = 1) -> Instance:
    record = await store.instances.create(queued(number))
    return (await store.instances.commit(record, record.after(Event.CLAIM, epoch="e")))[0]


async def ended(store: Store, number: int = 1) -> Instance:
    record = await claimed(store, number)
    return (await store.instances.commit(record, record.after(Event.FAIL, error=ERROR)))[0]


def snapshot(name: str = "s", epoch: str = "e", **fields: Any) -> WorkerSnapshot:
    return WorkerSnapshot(name=name, epoch=epoch, version="0", catalog="", residents=0, **fields)


def ttls(raw: redis.Redis) -> dict[str, int]:
    """Return the remaining seconds of every key; -1 without an expiry."""
    names: Any = raw.keys()
    return {key.decode(): raw.ttl(key) for key in names}  # type: ignore[misc]


@asynccontextmanager
async def listening(store: Store, channel: str) -> AsyncIterator[asyncio.Queue[bytes]]:
    """Yield the messages of a channel, once the subscription is active."""
    received: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.create_task(store.listen(channel, received.put_nowait))
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert await received.get() == b""
            yield received
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---- names


async def test_a_record_is_read_as_it_was_written(store: Store) -> None:
    created = await store.instances.create(queued())
    assert (created.instance_id, created.rev, created.state) == ("p/m", 1, State.QUEUED)
    assert created.created_at > 1.6e9
    assert await store.instances.get(created.id) == created
    assert await store.instances.named("p/m") == created.id
    assert await store.instances.live() == [created]


async def test_the_lowest_free_number_is_taken(store: Store) -> None:
    created = [await store.instances.create(queued(n)) for n in range(4)]
    assert [one.instance_id for one in created] == ["p/m", "p/m:2", "p/m:3", "p/m:4"]
    for freed in (created[2], created[0]):
        await store.instances.commit(freed, freed.after(Event.STOP))
    again = [(await store.instances.create(queued(n))).instance_id for n in range(10, 13)]
    assert again == ["p/m", "p/m:3", "p/m:5"]


async def test_a_name_that_looks_numbered_is_a_name(store: Store) -> None:
    names = [
        (await store.instances.create(queued(n, key))).instance_id
        for n, key in enumerate(["p/m:2", "p/m", "p/m", "p/m"])
    ]
    assert names == ["p/m:2", "p/m", "p/m:3", "p/m:4"]


async def test_concurrent_creations_get_distinct_names_without_gaps(store: Store) -> None:
    created = await asyncio.gather(*(store.instances.create(queued(n)) for n in range(100)))
    expected = {"p/m", *(f"p/m:{n}" for n in range(2, 101))}
    assert {one.instance_id for one in created} == expected
    assert {one.instance_id for one in await store.instances.live()} == expected


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=30)
@given(ends=st.lists(st.none() | st.integers(0, 7), max_size=12))
def test_names_match_a_simple_model(redis_server: str, raw: redis.Redis, ends: list[int | None]) -> None:
    """None creates; a number ends the live instance at that position, if there is one."""

    async def play() -> None:
        raw.flushall()
        hold(raw, "w")
        live: list[Instance] = []
        async with connected(redis_server) as client:
            store = Store(client, 10.0)
            for n, end in enumerate(ends):
                if end is None:
                    created = await store.instances.create(queued(n))
                    taken = {one.instance_id for one in live}
                    free = (name for name in ("p/m", *(f"p/m:{i}" for i in range(2, 99))) if name not in taken)
                    assert created.instance_id == next(free)
                    live.append(created)
                elif end < len(live):
                    gone = live.pop(end)
                    await store.instances.commit(gone, gone.after(Event.STOP))
            names: Any = raw.hgetall("names")
            assert names == {one.instance_id.encode(): one.id.encode() for one in live}

    asyncio.run(play())


async def test_a_worker_without_a_lease_gets_no_instance(store: Store) -> None:
    with pytest.raises(NoLease):
        await store.instances.create(queued(worker="gone"))
    assert await store.instances.live() == []


# ---- the fence


async def test_one_of_two_concurrent_writers_wins(store: Store) -> None:
    record = await store.instances.create(queued())
    claim, stop = record.after(Event.CLAIM, epoch="e"), record.after(Event.STOP)
    results = await asyncio.gather(
        store.instances.commit(record, claim), store.instances.commit(record, stop), return_exceptions=True
    )
    assert [type(result) for result in results if isinstance(result, BaseException)] == [Fenced]
    won = next(result for result in results if not isinstance(result, BaseException))
    assert await store.instances.get(record.id) == won[0]
    assert won[0].rev == 2


async def test_one_of_thirty_concurrent_writers_wins_each_time(store: Store) -> None:
    record = await claimed(store)
    for _ in range(5):
        writes = [msgspec.structs.replace(record, loaded_bytes=record.loaded_bytes + n) for n in range(1, 31)]
        results = await asyncio.gather(*(store.instances.commit(record, new) for new in writes), return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        assert len(won) == 1
        assert {type(result) for result in results if isinstance(result, BaseException)} == {Fenced}
        record = won[0][0]
        assert await store.instances.get(record.id) == record


async def test_a_writer_with_an_old_revision_is_fenced(store: Store, raw: redis.Redis) -> None:
    """A worker may continue after a pause in which its instance was declared lost."""
    old = await claimed(store)
    lost, _ = await store.instances.commit(old, old.after(Event.EXPIRE))
    for new in (old.after(Event.LOAD, loaded_at=1.0), old.after(Event.FAIL, error=ERROR), old.after(Event.STOP)):
        with pytest.raises(Fenced):
            await store.instances.commit(old, new)
    assert await store.instances.get(old.id) == lost
    assert raw.xlen(f"inst:{old.id}:log") == lost.rev


async def test_a_deleted_record_cannot_be_written(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.flushall()
    with pytest.raises(Fenced):
        await store.instances.commit(record, record.after(Event.STOP))
    assert ttls(raw) == {}


async def test_a_new_instance_keeps_its_name_when_an_old_one_ends_late(store: Store) -> None:
    """Two records never share a name, and the end of one does not free the name of the other."""
    first, second = await store.instances.create(queued(1)), await store.instances.create(queued(2))
    await store.instances.commit(first, first.after(Event.STOP))
    third = await store.instances.create(queued(3))
    await store.instances.commit(second, second.after(Event.STOP))
    assert third.instance_id == "p/m"
    assert await store.instances.named("p/m") == third.id


# ---- scripts that are repeated after a lost reply


async def test_a_repeated_creation_changes_nothing(store: Store, raw: redis.Redis) -> None:
    created = await store.instances.create(queued())
    assert await store.instances.create(queued()) == created
    moved, _ = await store.instances.commit(created, created.after(Event.CLAIM, epoch="e"))
    again = await store.instances.create(queued())
    assert (again.instance_id, again.created_at) == (created.instance_id, created.created_at)
    assert await store.instances.get(created.id) == moved
    assert raw.xlen(f"inst:{created.id}:log") == 2
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert raw.hlen("names") == raw.scard("insts") == 1


async def test_a_repeated_creation_joins_the_same_load(store: Store) -> None:
    first, other = await store.instances.create(queued(1)), await store.instances.create(queued(2))
    await store.instances.leave({first.id: "digest", other.id: "digest"})
    for _ in range(2):
        with pytest.raises(Joined, match=first.id):
            await store.instances.create(queued(3), joins="digest")
    with pytest.raises(Joined, match=other.id):
        await store.instances.create(queued(4), joins="digest")
    assert (await store.instances.create(queued(5), joins="digest")).instance_id == "p/m:3"


@pytest.mark.parametrize("event", [Event.STOP, Event.EXPIRE, Event.LOAD])
async def test_a_repeated_commit_answers_as_before(store: Store, raw: redis.Redis, event: Event) -> None:
    record = await claimed(store)
    new = record.after(event, loaded_at=5.0)
    done, _ = await store.instances.commit(record, new)
    before = raw.hgetall("counters")
    assert (await store.instances.commit(record, new))[0] == done
    assert raw.hgetall("counters") == before
    assert raw.xlen(f"inst:{record.id}:log") == done.rev
    assert await store.instances.get(record.id) == done


async def test_stop_requests_renewals_and_releases_are_repeatable(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    assert [await store.instances.request_stop(record.id) for _ in range(2)] == [State.LOADING, State.LOADING]
    assert [await store.workers.renew(snapshot()) for _ in range(2)] == ["no catalog", "no catalog"]
    for _ in range(2):
        await store.workers.release("s", "e")
    assert raw.exists("lease:s", "worker:s") == 0


# ---- the log


async def test_the_log_has_one_entry_for_each_revision(store: Store, raw: redis.Redis) -> None:
    revisions = [await store.instances.create(queued())]
    for event, changes in (
        (Event.CLAIM, {"epoch": "e"}),
        (Event.LOAD, {"loaded_at": 1.0, "load_config": LoadConfig(context_length=100)}),
        (Event.STOP, {}),
        (Event.EXIT, {}),
    ):
        revisions.append((await store.instances.commit(revisions[-1], revisions[-1].after(event, **changes)))[0])
    assert revisions[-1].state is State.UNLOADED
    history = await store.instances.history(revisions[0])
    assert [revision for _, revision in history] == revisions
    assert [revision.rev for revision in revisions] == [1, 2, 3, 4, 5]
    for n, (entry, _) in enumerate(history):
        assert [revision for _, revision in await store.instances.history(revisions[0], entry)] == revisions[n + 1 :]
    assert raw.hgetall("counters") == dict.fromkeys((b"queued", b"loading", b"loaded", b"unloading", b"unloaded"), b"1")


async def test_progress_is_a_revision_but_not_a_transition(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    for n in range(3):
        record, _ = await store.instances.commit(record, msgspec.structs.replace(record, loaded_bytes=n + 1))
    assert record.rev == 5
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert len(await store.instances.history(record)) == 5


async def test_missing_records_have_no_revision(store: Store) -> None:
    first, second = await claimed(store, 1), await store.instances.create(queued(2))
    assert await store.instances.revisions([second.id, "load_none", first.id]) == [1, None, 2]
    assert await store.instances.many([second.id, "load_none", first.id]) == [second, first]
    assert await store.instances.get("load_none") is None
    assert await store.instances.named("p/none") is None
    assert await store.instances.history(queued(9)) == []


# ---- the end


async def test_an_ended_instance_frees_its_name_and_expires(store: Store, raw: redis.Redis) -> None:
    record = await ended(store)
    assert await store.instances.live() == []
    assert await store.instances.named("p/m") is None
    assert raw.exists("insts", "names") == 0
    for key in (f"inst:{record.id}", f"inst:{record.id}:log"):
        assert RETAIN_S - 60 < int(raw.ttl(key)) <= RETAIN_S == 24 * 3600  # type: ignore[arg-type]
    kept = await store.instances.get(record.id)
    assert kept == record
    assert kept is not None
    assert kept.error == ERROR


async def test_a_live_instance_does_not_expire(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    await store.instances.request_stop(record.id)
    assert raw.ttl(f"inst:{record.id}") == raw.ttl(f"inst:{record.id}:log") == -1


async def test_only_documented_keys_have_no_expiry(store: Store, raw: redis.Redis) -> None:
    for number in range(3):
        record = await ended(store, number)
        await store.instances.request_stop(record.id)
        await as_arq(store.redis).enqueue_job("load", record.id, _job_id=record.id, _queue_name=QUEUE, _expires=3600)
    await store.workers.renew(snapshot())
    await store.workers.publish_catalog("w", [], "e")
    left_s = ttls(raw)
    assert {key for key, seconds in left_s.items() if seconds == -1} <= WITHOUT_EXPIRY | {QUEUE}
    assert len(left_s) > len(WITHOUT_EXPIRY)
    assert "insts" not in left_s
    assert "names" not in left_s


# ---- loads on demand

FILES = Model(key="p/m", base="p/m", variant="", shards=["m.gguf"], files=[FileStat(1, 2, 3)])


def demanded(number: int, key: str = "p/m", worker: str = "w", **fields: Any) -> Instance:
    fields = {"on_demand": True, "source": FILES, **fields}
    return msgspec.structs.replace(queued(number, key, worker), **fields)


async def demand(store: Store, number: int, without: Sequence[str] = (), **fields: Any) -> str:
    """Load on demand; return the id of the load that was created or joined, or of the one that failed."""
    record = demanded(number, **fields)
    fingerprint = "" if record.source is None else record.source.fingerprint
    try:
        return (await store.instances.create(record, fingerprint=fingerprint, without=without)).id
    except Joined as e:
        return e.id
    except FailedRecently as e:
        return f"{e.id} failed"


async def after(store: Store, record: Instance, event: Event, **changes: Any) -> Instance:
    return (await store.instances.commit(record, record.after(event, **changes)))[0]


async def failed(store: Store, number: int, error: ErrorBody, **fields: Any) -> Instance:
    record = await store.instances.create(demanded(number, **fields), fingerprint=FILES.fingerprint)
    return await after(store, record, Event.FAIL, error=error)


async def test_a_thousand_demands_are_one_load(store: Store, raw: redis.Redis) -> None:
    ids = await asyncio.gather(*(demand(store, n, worker=("w", "another")[n % 2]) for n in range(1000)))
    assert len(set(ids)) == 1
    assert raw.scard("insts") == 1
    assert await demand(store, 1000, source=None, key="p/other") == "load_1000"


@pytest.mark.parametrize("on_demand", [True, False])
async def test_a_demand_joins_an_instance_until_it_ends(store: Store, raw: redis.Redis, on_demand: bool) -> None:
    """Whatever created it: a load of a client under way is joined as well."""
    first = msgspec.structs.replace(demanded(1), on_demand=on_demand, epoch="e")
    record = await store.instances.create(first)
    assert await demand(store, 2) == record.id
    record = await after(store, record, Event.CLAIM, epoch="e")
    assert await demand(store, 3) == record.id
    record = await after(store, record, Event.LOAD, loaded_at=1.0)
    assert await demand(store, 4) == record.id
    assert await demand(store, 5, [record.id]) == "load_5", "the caller could not use it"
    assert await demand(store, 6, [record.id]) == "load_5"
    record = await after(store, record, Event.STOP)
    assert await demand(store, 7) == "load_5"
    await after(store, record, Event.EXIT)
    assert raw.smembers("copies:p/m") == {b"load_5"}


async def test_a_load_of_a_client_joins_nothing(store: Store) -> None:
    assert await demand(store, 1) == "load_1"
    assert (await store.instances.create(queued(2))).instance_id == "p/m:2"


async def test_a_demand_does_not_join_what_is_being_stopped(store: Store) -> None:
    record = await claimed(store)
    assert await demand(store, 2) == record.id
    await store.instances.request_stop(record.id)
    assert await demand(store, 3) == "load_3"


async def test_a_demand_joins_no_loaded_instance_of_a_dead_worker(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.delete("lease:w")
    assert await demand(store, 2) == record.id, "a load is requeued"
    await after(store, record, Event.LOAD, loaded_at=1.0)
    assert await demand(store, 3, worker="another") == "load_3"
    raw.set("lease:another", "a later epoch")
    assert await demand(store, 4, worker="another") == "load_3"


async def test_a_failed_demand_is_remembered_for_a_while(store: Store, raw: redis.Redis) -> None:
    record = await failed(store, 1, ERROR)
    assert await demand(store, 2) == f"{record.id} failed"
    with pytest.raises(FailedRecently) as recently:
        await store.instances.create(demanded(2), fingerprint=FILES.fingerprint)
    assert 0 < recently.value.left_s <= FAILURE_MEMORY_S
    assert FAILURE_MEMORY_S - 5 <= int(raw.ttl(f"failed:{FILES.fingerprint}")) <= FAILURE_MEMORY_S  # type: ignore[arg-type]
    assert await demand(store, 3, [record.id]) == "load_3", "the caller has waited for that failure"
    raw.flushall()
    hold(raw, "w")
    record = await failed(store, 4, ERROR)
    other = msgspec.structs.replace(FILES, files=[FileStat(1, 3, 3)])
    assert await demand(store, 5, source=other) == "load_5", "the file was replaced"


async def test_a_load_of_the_model_ends_the_memory_of_a_failure(store: Store, raw: redis.Redis) -> None:
    await failed(store, 1, ERROR)
    record = await store.instances.create(msgspec.structs.replace(queued(2), source=FILES))
    record = await after(store, record, Event.CLAIM, epoch="e")
    record = await after(store, record, Event.LOAD, loaded_at=1.0)
    record = await after(store, record, Event.STOP)
    await after(store, record, Event.EXIT)
    assert await demand(store, 3) == "load_3"


@pytest.mark.parametrize("code", ["insufficient_memory", "invalid_model_file", "load_stalled"])
async def test_failures_of_the_load_itself_are_remembered(store: Store, code: LoadFailure) -> None:
    await failed(store, 1, msgspec.structs.replace(ERROR, code=code))
    assert await demand(store, 2) == "load_1 failed"


@pytest.mark.parametrize(
    "error", [msgspec.structs.replace(ERROR, code="worker_lost"), NoWorker("none").body()], ids=lambda e: str(e.code)
)
async def test_the_loss_of_a_worker_is_not_remembered(store: Store, error: ErrorBody) -> None:
    await failed(store, 1, error)
    assert await demand(store, 2) == "load_2"


async def test_other_ends_are_not_remembered_as_failures(store: Store) -> None:
    """A failed load of a client may have asked for what does not fit; a loaded instance may die of a request."""
    await failed(store, 1, ERROR, on_demand=False)
    cancelled = await store.instances.create(demanded(2), fingerprint=FILES.fingerprint)
    await after(store, cancelled, Event.STOP)
    died = await store.instances.create(demanded(3), fingerprint=FILES.fingerprint)
    died = await after(store, died, Event.CLAIM, epoch="e")
    died = await after(store, died, Event.LOAD, loaded_at=1.0)
    await after(store, died, Event.FAIL, error=ERROR)
    assert await demand(store, 4) == "load_4"


async def test_a_repeated_demand_answers_as_before(store: Store) -> None:
    created = await store.instances.create(demanded(1))
    assert await store.instances.create(demanded(1)) == created
    assert [await demand(store, 2) for _ in range(2)] == ["load_1", "load_1"]


async def test_a_rewritten_instance_is_joined(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    loaded = await after(store, record, Event.LOAD, loaded_at=1.0)
    raw.flushall()
    hold(raw, "w")
    assert await store.instances.rewrite(loaded) == "written"
    assert await demand(store, 2) == record.id


# ---- the worker of an instance


async def at(store: Store, *workers: str) -> list[set[str]]:
    return [{one.id for one in await store.instances.live_at(worker)} for worker in workers]


async def test_a_worker_reads_only_its_own_live_instances(store: Store, raw: redis.Redis) -> None:
    own = [await store.instances.create(queued(n)) for n in range(2)]
    other = await store.instances.create(queued(2, worker="another"))
    assert await at(store, "w", "another") == [{"load_0", "load_1"}, {"load_2"}]
    assert await store.instances.live_at("w", [own[0].id, other.id, "load_none"]) in (own, own[::-1])
    moved, _ = await store.instances.commit(own[0], own[0].after(Event.CLAIM, epoch="e"))
    assert moved in await store.instances.live_at("w")
    for record in (moved, own[1], other):
        await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    assert raw.exists("insts:w", "insts:another") == 0


@pytest.mark.parametrize("to", ["w", "another"])
async def test_a_requeued_instance_belongs_to_its_new_worker(store: Store, raw: redis.Redis, to: str) -> None:
    record = await claimed(store)
    given, _ = await store.instances.commit(record, record.after(Event.REQUEUE, worker=to))
    assert await at(store, "w", "another") == ([{record.id}, set()] if to == "w" else [set(), {record.id}])
    with pytest.raises(Fenced):  # the previous worker ends it late
        await store.instances.commit(record, record.after(Event.EXPIRE))
    await store.instances.commit(given, given.after(Event.STOP))
    assert raw.exists("insts", "insts:w", "insts:another") == 0


async def test_repeated_scripts_keep_the_worker_of_an_instance(store: Store, raw: redis.Redis) -> None:
    created = await store.instances.create(queued())
    given = created.after(Event.REQUEUE, worker="another")
    await store.instances.commit(created, given)
    for _ in range(2):
        await store.instances.create(queued())
        await store.instances.commit(created, given)
        assert await at(store, "w", "another") == [set(), {created.id}]
    assert raw.exists("insts:w") == 0


async def test_instances_held_by_a_worker_are_read_without_its_set(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.delete("insts:w")
    assert await store.instances.live_at("w", [record.id]) == [record]


async def test_a_rewrite_restores_the_worker_in_an_emptied_redis(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    loaded, _ = await store.instances.commit(record, record.after(Event.LOAD, loaded_at=1.0))
    raw.flushall()
    assert await store.instances.rewrite(loaded) == "written"
    assert await store.instances.live_at("w") == [loaded]
    assert await store.instances.heads() == [Head(loaded.id, "w", State.LOADED, "e")]


async def test_a_rewrite_corrects_a_lost_change_of_worker(store: Store, raw: redis.Redis) -> None:
    """A Redis with an append-only file may be killed before it has written the last seconds."""
    created = await store.instances.create(queued(worker="another"))
    before = {key: raw.dump(key) for key in ttls(raw)}
    for event, changes in ((Event.REQUEUE, {"worker": "w"}), (Event.CLAIM, {"epoch": "e"}), (Event.LOAD, {})):
        created, _ = await store.instances.commit(created, created.after(event, **changes))
    raw.flushall()
    for key, value in before.items():
        raw.restore(key, 0, value)  # type: ignore[arg-type]
    assert await at(store, "w", "another") == [set(), {created.id}]
    assert await store.instances.rewrite(created) == "written"
    assert await at(store, "w", "another") == [{created.id}, set()]
    assert raw.exists("queued", "queued:another", "insts:another") == 0, "no load is queued"


async def test_heads_give_worker_and_state_of_live_instances(store: Store) -> None:
    first, second, third = [await store.instances.create(queued(n)) for n in range(3)]
    first, _ = await store.instances.commit(first, first.after(Event.CLAIM, epoch="e"))
    second, _ = await store.instances.commit(second, second.after(Event.CLAIM, epoch="e"))
    await store.instances.commit(second, second.after(Event.REQUEUE, worker="another"))
    await store.instances.commit(third, third.after(Event.STOP))
    assert sorted(await store.instances.heads()) == [
        Head(first.id, "w", State.LOADING, "e"),
        Head(second.id, "another", State.QUEUED, ""),
    ]


async def test_records_are_read_in_several_pages(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.pages, "READ_N", 3)
    created = [await store.instances.create(queued(n)) for n in range(7)]
    ids = [one.id for one in created]
    assert await store.instances.many(["load_none", *ids]) == created
    assert (
        {head.id for head in await store.instances.heads()}
        == {one.id for one in await store.instances.live()}
        == set(ids)
    )


# ---- notifications


async def test_a_stop_request_notifies_the_worker(store: Store) -> None:
    record = await claimed(store)
    async with listening(store, "wake:w") as received:
        assert await store.instances.request_stop(record.id)
        assert await received.get() == record.id.encode()
        await store.redis.publish("wake:w", b"")
        assert await received.get() == b""
    stored = await store.instances.get(record.id)
    assert stored is not None
    assert stored.stop_requested
    assert stored.rev == record.rev, "a stop request is not a revision: the next commit of the worker must not fail"


async def test_a_stop_request_for_a_missing_record_has_no_effect(store: Store, raw: redis.Redis) -> None:
    assert not await store.instances.request_stop("load_none")
    assert not raw.exists("inst:load_none")


async def test_a_stop_request_survives_later_commits(store: Store) -> None:
    record = await claimed(store)
    await store.instances.request_stop(record.id)
    await store.instances.commit(record, msgspec.structs.replace(record, loaded_bytes=1))
    stored = await store.instances.get(record.id)
    assert stored is not None
    assert stored.stop_requested


async def test_every_revision_is_published(store: Store) -> None:
    async with listening(store, NEWS) as received:
        record = await ended(store)
        assert [await received.get() for _ in range(3)] == [record.id.encode()] * 3


# ---- leases


async def test_a_lease_has_one_holder(store: Store) -> None:
    assert await store.workers.renew(snapshot(epoch="a")) != "refused"
    assert await store.workers.renew(snapshot(epoch="b")) == "refused"
    assert await store.workers.renew(snapshot(epoch="b"), dead_epoch="c") == "refused"
    assert (await store.workers.all())[0].epoch == "a"
    assert await store.workers.renew(snapshot(epoch="b"), dead_epoch="a") != "refused", (
        "a process takes over the lease of its dead predecessor"
    )
    assert await store.workers.renew(snapshot(epoch="a")) == "refused", "a predecessor that is still alive must notice"
    assert (await store.workers.all())[0].snapshot == snapshot(epoch="b")


async def test_only_the_holder_releases_a_lease(store: Store) -> None:
    await store.workers.renew(snapshot(epoch="a"))
    await store.workers.release("s", "b")
    assert (await store.workers.all())[0].epoch == "a"
    await store.workers.release("s", "a")
    gone = (await store.workers.all())[0]
    assert (gone.name, gone.epoch, gone.snapshot) == ("s", None, None)
    assert await store.workers.renew(snapshot(epoch="b")) != "refused"


async def test_a_lease_that_is_not_renewed_expires(store: Store) -> None:
    store.workers.lease_s = 0.1
    await store.workers.renew(snapshot(epoch="a"))
    async with asyncio.timeout(DEADLINE_S):
        while await store.workers.renew(snapshot(epoch="b")) == "refused":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await store.workers.all())[0].epoch == "b"


async def test_one_of_many_concurrent_processes_gets_the_lease(store: Store) -> None:
    won = await asyncio.gather(*(store.workers.renew(snapshot(epoch=str(n))) for n in range(20)))
    assert sum(held != "refused" for held in won) == 1


async def test_a_worker_that_left_long_ago_is_forgotten(store: Store, raw: redis.Redis) -> None:
    raw.zadd("workers", {"old": 1.0})
    await store.workers.renew(snapshot())
    assert [worker.name for worker in await store.workers.all()] == ["s"]


async def test_a_pool_may_have_no_workers(store: Store) -> None:
    assert await store.workers.all() == []


# ---- catalogs


async def test_a_catalog_is_read_as_it_was_published(store: Store, raw: redis.Redis) -> None:
    full = Model(
        key="p/m@q8_0",
        base="p/m",
        variant="q8_0",
        shards=["p/m/a-00001-of-00002.gguf", "p/m/a-00002-of-00002.gguf"],
        size_bytes=2**40,
        type="embedding",
        publisher="p",
        display_name="M \u00e9\U0001f9f2",
        description="",
        architecture="bert",
        quantization="Q8_0",
        bits_per_weight=8.5,
        params_string="7B",
        max_context_length=512,
        expert_count=8,
        causal=False,
        pooling=1,
        vision=True,
        trained_for_tool_use=True,
    )
    broken = Model(
        key="x", base="x", variant="", shards=["x.gguf"], problem=Problem(code="invalid_model_file", message="why")
    )
    assert await store.workers.catalog("nobody") is None
    digest = await store.workers.publish_catalog("w", [full, broken], "e")
    assert await store.workers.catalog("w") == [full, broken]
    assert 0 < int(raw.ttl("catalog:w")) <= RETAIN_S  # type: ignore[arg-type]
    assert await store.workers.publish_catalog("w", [full, broken], "e") == digest
    assert await store.workers.publish_catalog("w", [full], "e") != digest


# ---- two versions on one Redis


async def test_only_the_holder_of_a_lease_publishes_a_catalog(store: Store) -> None:
    """A second process of the same name must not replace the catalog of the first, which holds "e"."""
    assert await store.workers.publish_catalog("w", [], "e") is not None
    assert (
        await store.workers.publish_catalog("w", [Model(key="a", base="a", variant="", shards=["a.gguf"])], "f") is None
    )
    assert await store.workers.catalog("w") == []
    assert await store.workers.publish_catalog("w", [], "f", "e") is not None, (
        "the lease of a dead epoch does not block"
    )
    assert await store.workers.publish_catalog("new", [], "f") is not None


async def test_unknown_fields_of_a_later_version_are_ignored(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    known: Any = raw.hget(f"inst:{record.id}", "doc")
    document = {**msgpack.decode(known), "of_tomorrow": {"a": [1]}}
    document["request"]["of_tomorrow"] = True
    raw.hset(f"inst:{record.id}", mapping={"doc": msgpack.encode(document), "field_of_tomorrow": 1})
    assert await store.instances.get(record.id) == record
    moved, _ = await store.instances.commit(record, record.after(Event.STOP))
    assert moved.state is State.UNLOADING

    raw.set("worker:w", msgpack.encode({**msgspec.to_builtins(snapshot()), "of_tomorrow": 1}))
    raw.set("lease:w", "e")
    raw.zadd("workers", {"w": 9e9})
    assert (await store.workers.all())[0].snapshot == snapshot()


async def test_a_record_of_an_earlier_version_has_defaults(store: Store, raw: redis.Redis) -> None:
    record = await store.instances.create(queued())
    document = {key: getattr(record, key) for key in ("id", "model", "key", "type", "worker")}
    raw.hset(f"inst:{record.id}", mapping={"doc": msgpack.encode({**document, "request": {"model": "p/m"}})})
    stored = await store.instances.get(record.id)
    assert stored is not None
    assert (stored.state, stored.attempt, stored.timing) == (State.QUEUED, 1, {})


# ---- jobs


@pytest.fixture(scope="module")
def uvloops() -> None:
    """Run uvloop once, so that its lasting state exists."""
    uvloop.run(asyncio.sleep(0))


def test_the_installed_redis_py_is_the_checked_version() -> None:
    """`shared.store.steady` uses internals of redis-py: check it before another version is pinned."""
    assert redis.__version__ == CHECKED_VERSION


@pytest.mark.usefixtures("uvloops")
def test_a_closed_connection_is_a_connection_error_on_uvloop(redis_server: str) -> None:
    """uvloop raises its own error for a closed transport."""

    async def write_to_a_closed_connection() -> None:
        async with connected(redis_server) as client:
            connection = await client.connection_pool.get_connection()
            connection._writer.transport.abort()
            with pytest.raises(redis.ConnectionError):
                await connection.send_command("PING")
            await client.connection_pool.release(connection)
            assert await client.ping()

    uvloop.run(write_to_a_closed_connection())


def test_a_job_is_msgpack_with_exceptions_as_text() -> None:
    assert unpack_job(pack_job({"f": "load", "a": ("id",), "k": {}})) == {"f": "load", "a": ["id"], "k": {}}
    assert unpack_job(pack_job({"r": ValueError("why")})) == {"r": "why"}
    with pytest.raises(msgspec.DecodeError):
        unpack_job(pickle.dumps({"f": "load"}))


# ---- limits

ROOM = 1000


async def refused(store: Store, number: int, at_most: tuple[int, int], worker: str = "w") -> Full:
    """Return the refusal of one instance too many, of which no record is left."""
    before = len(await store.instances.live())
    with pytest.raises(Full) as full:
        await store.instances.create(queued(number, worker=worker), at_most=at_most)
    assert await store.instances.get(f"load_{number}") is None
    assert len(await store.instances.live()) == before
    return full.value


async def test_the_queue_of_a_worker_is_limited(store: Store) -> None:
    for number in (1, 2):
        await store.instances.create(queued(number), at_most=(2, ROOM))
    assert (await refused(store, 3, (2, ROOM))).limit == 2
    await store.instances.create(queued(4, worker="another"), at_most=(2, ROOM))
    await store.instances.create(queued(5), at_most=(3, ROOM))


async def test_the_queue_of_the_pool_is_limited(store: Store) -> None:
    await store.instances.create(queued(1), at_most=(ROOM, 2))
    await store.instances.create(queued(2, worker="another"), at_most=(ROOM, 2))
    for worker in ("w", "another"):
        assert (await refused(store, 3, (ROOM, 2), worker)).limit == 2


async def test_concurrent_creations_respect_the_limits_exactly(store: Store) -> None:
    creations = (store.instances.create(queued(n, worker=("w", "another")[n % 2]), at_most=(8, 12)) for n in range(60))
    results = await asyncio.gather(*creations, return_exceptions=True)
    created = [result for result in results if isinstance(result, Instance)]
    assert len(created) == 12
    assert max(sum(one.worker == worker for one in created) for worker in ("w", "another")) <= 8
    assert {type(result) for result in results} == {Instance, Full}
    assert {one.id for one in await store.instances.live()} == {one.id for one in created}


@pytest.mark.parametrize("event", [Event.CLAIM, Event.STOP, Event.FAIL, Event.EXPIRE])
async def test_leaving_the_queue_makes_room_for_one_load(store: Store, raw: redis.Redis, event: Event) -> None:
    first = await store.instances.create(queued(1), at_most=(1, 1))
    await refused(store, 2, (1, 1))
    left = first.after(event, **({"error": ERROR} if event is Event.FAIL else {}))
    for _ in range(2):  # as after a lost reply
        await store.instances.commit(first, left)
    assert raw.llen("pace") == raw.llen("pace:w") == 1
    await store.instances.create(queued(2), at_most=(1, 1))
    await refused(store, 3, (1, 1))


async def test_only_queued_loads_count_for_the_limits(store: Store, raw: redis.Redis) -> None:
    for number in range(3):
        loading = await claimed(store, number)
        await store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0))
    assert raw.llen("pace") == 3, "one departure for each claim"
    await store.instances.create(queued(9), at_most=(1, 1))


async def test_a_repeated_creation_counts_once_for_the_limit(store: Store) -> None:
    created = await store.instances.create(queued(1), at_most=(1, 1))
    assert await store.instances.create(queued(1), at_most=(1, 1)) == created
    moved, _ = await store.instances.commit(created, created.after(Event.CLAIM, epoch="e"))
    await store.instances.create(queued(2), at_most=(1, 1))
    assert (await store.instances.create(queued(1), at_most=(1, 1))).instance_id == moved.instance_id


# ---- Retry-After


def departed(raw: redis.Redis, key: str, *seconds_ago: float) -> None:
    """Record departures from a queue, each so long ago, the latest first."""
    seconds, microseconds = raw.time()  # type: ignore[misc]
    now = int(seconds) * 1_000_000 + int(microseconds)
    raw.rpush(key, *(round(now - ago * 1e6) for ago in seconds_ago))


async def test_retry_after_is_30_s_without_recent_departures(store: Store) -> None:
    await store.instances.create(queued(1))
    assert (await refused(store, 2, (1, ROOM))).retry_after_s == 30
    assert (await refused(store, 2, (ROOM, 1))).retry_after_s == 30


@pytest.mark.parametrize(
    ("seconds_ago", "retry_after_s"),
    [
        ([9.0], 10),
        ([0.0, 1.0, 2.0, 9.0], 3),
        ([0.5] * 16, 1),  # the least
        ([0.0], 1),
        ([299.5], 300),
        ([3000.0], 300),  # the most
        ([0.0, 3500.0], 300),
    ],
)
async def test_retry_after_follows_the_rate_of_departures(
    store: Store, raw: redis.Redis, seconds_ago: list[float], retry_after_s: int
) -> None:
    """In whole seconds, rounded up; time without a further departure never shortens it."""
    await store.instances.create(queued(1))
    departed(raw, "pace:w", *seconds_ago)
    assert (await refused(store, 2, (1, ROOM))).retry_after_s == retry_after_s


async def test_retry_after_uses_the_rate_of_the_full_queue(store: Store, raw: redis.Redis) -> None:
    await store.instances.create(queued(1))
    departed(raw, "pace:w", 99.1)
    departed(raw, "pace", 49.1)
    assert (await refused(store, 2, (1, 1))).retry_after_s == 100, "the rate of the worker"
    assert (await refused(store, 2, (ROOM, 1))).retry_after_s == 50, "the rate of the pool"


async def test_the_rate_is_that_of_the_last_departures(store: Store, raw: redis.Redis) -> None:
    departed(raw, "pace:w", *[3000.0] * 16)
    for number in range(20):
        await claimed(store, number)
    await store.instances.create(queued(21))
    assert (await refused(store, 22, (1, ROOM))).retry_after_s <= 2, "twenty left within moments"
    assert raw.llen("pace:w") == raw.llen("pace") == 16


# ---- idempotency keys


async def test_a_second_creation_with_a_key_names_the_first(store: Store, raw: redis.Redis) -> None:
    assert await store.instances.remembered("k") is None
    created = await store.instances.create(queued(1), key="k", digest="d")
    for digest in ("d", "another request's"):
        with pytest.raises(KeyTaken) as taken:
            await store.instances.create(queued(2), key="k", digest=digest)
        assert taken.value.remembered == Remembered("load_1", "d")
    assert await store.instances.remembered("k") == Remembered("load_1", "d")
    assert await store.instances.live() == [created]
    assert (await store.instances.create(queued(3), key="another", digest="d")).id == "load_3"


async def test_a_key_is_remembered_when_its_load_has_ended(store: Store) -> None:
    created = await store.instances.create(queued(1), key="k", digest="d")
    await store.instances.commit(created, created.after(Event.STOP))
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), key="k", digest="d")


async def test_concurrent_creations_with_one_key_make_one_record(store: Store, raw: redis.Redis) -> None:
    creations = (store.instances.create(queued(n), key="k", digest=str(n % 2)) for n in range(100))
    results = await asyncio.gather(*creations, return_exceptions=True)
    (created,) = (result for result in results if isinstance(result, Instance))
    named = {result.remembered.id for result in results if isinstance(result, KeyTaken)}
    assert named == {created.id}
    assert len(results) == 1 + sum(isinstance(result, KeyTaken) for result in results)
    assert await store.instances.live() == [created]
    assert raw.hgetall("counters") == {b"queued": b"1"}


async def test_a_repeated_creation_with_a_key_returns_the_first(store: Store) -> None:
    created = await store.instances.create(queued(1), key="k", digest="d")
    assert await store.instances.create(queued(1), key="k", digest="d") == created


async def test_a_key_of_a_refused_load_is_not_remembered(store: Store) -> None:
    with pytest.raises(NoLease):
        await store.instances.create(queued(1, worker="gone"), key="k", digest="d")
    await store.instances.create(queued(2))
    with pytest.raises(Full):
        await store.instances.create(queued(1), at_most=(1, 1), key="k", digest="d")
    assert await store.instances.remembered("k") is None
    assert (await store.instances.create(queued(1), key="k", digest="d")).id == "load_1"


async def test_a_known_key_is_answered_also_at_the_limits(store: Store, raw: redis.Redis) -> None:
    await store.instances.create(queued(1), key="k", digest="d")
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), at_most=(1, 1), key="k", digest="d")
    raw.delete("lease:w")
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), key="k", digest="d")


async def test_a_load_without_a_key_is_not_remembered(store: Store, raw: redis.Redis) -> None:
    for number in (1, 2):
        await store.instances.create(queued(number))
    assert not [key for key in ttls(raw) if key.startswith("idem:")]


async def test_indexes_of_a_load_expire_after_it(store: Store, raw: redis.Redis) -> None:
    created = await store.instances.create(queued(1), key="k", digest="d")
    await store.instances.commit(created, created.after(Event.STOP))
    left_s = ttls(raw)
    assert 0 < left_s["pace"] <= 3600
    assert 0 < left_s["pace:w"] <= 3600
    for key in ("idem:k", "jobs"):
        assert RETAIN_S - 60 < left_s[key] <= RETAIN_S
    assert {key for key, seconds in left_s.items() if seconds == -1} == {"counters", "tallies"}


# ---- the list


async def listed(store: Store) -> list[str]:
    return [instance.id async for instance in store.instances.newest()]


async def test_records_of_all_states_are_listed_newest_first(store: Store) -> None:
    assert await listed(store) == []
    first, second = await ended(store, 1), await claimed(store, 2)
    third = await store.instances.create(queued(3, worker="another"))
    assert [instance async for instance in store.instances.newest()] == [third, second, first]


async def test_a_list_of_several_pages_has_every_record_once(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    for page in (1, 7, 20, 21, 200):
        monkeypatch.setattr(shared.store.instances, "PAGE_N", page)
        if not await store.instances.live():
            for number in range(20):
                await (ended if number % 3 else claimed)(store, number)
        assert await listed(store) == [f"load_{number}" for number in reversed(range(20))]


async def test_a_list_longer_than_a_page_is_complete(store: Store) -> None:
    created = await asyncio.gather(
        *(store.instances.create(queued(n)) for n in range(shared.store.instances.PAGE_N + 1))
    )
    expected = sorted(created, key=lambda one: one.created_at, reverse=True)
    assert await listed(store) == [one.id for one in expected]


async def test_a_list_is_stable_while_records_are_created(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.instances, "PAGE_N", 2)
    for number in range(5):
        await store.instances.create(queued(number))
    ids = []
    async for instance in store.instances.newest():
        ids.append(instance.id)
        await ended(store, 10 + len(ids))
    assert [id_ for id_ in ids if id_ in {f"load_{n}" for n in range(5)}] == [f"load_{n}" for n in (4, 3, 2, 1, 0)]
    assert len(ids) == len({*ids})


async def test_old_records_are_listed_last_and_only_if_live(store: Store, raw: redis.Redis) -> None:
    """A loaded instance may be older than the index; an ended instance of that age is forgotten."""
    old = [await claimed(store, number) for number in (1, 2)]
    await ended(store, 3)
    now = round(time.time())
    raw.zadd("jobs", {f"load_{number}": (now - RETAIN_S - number) * 1_000_000 for number in (1, 2, 3)})
    assert (await listed(store))[0] == "load_1", "nothing has cleared the index yet"
    new = await store.instances.create(queued(4))
    assert raw.zcard("jobs") == 1
    assert await listed(store) == [new.id, old[1].id, old[0].id]


async def test_an_expired_record_is_left_out_of_the_list(store: Store, raw: redis.Redis) -> None:
    for number in (1, 2, 3):
        await ended(store, number)
    raw.delete("inst:load_2", "inst:load_2:log")
    assert await listed(store) == ["load_3", "load_1"]


# ---- stop requests


async def test_a_load_with_a_stop_request_does_not_become_loaded(store: Store, raw: redis.Redis) -> None:
    """A client whose cancel was confirmed must not see the load succeed."""
    loading = await claimed(store)
    assert await store.instances.request_stop(loading.id, unless_loaded=True) is State.LOADING
    with pytest.raises(StopRequested):
        await store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0))
    stored = await store.instances.get(loading.id)
    assert stored is not None
    assert (stored.state, stored.rev) == (State.LOADING, loading.rev)
    assert raw.xlen(f"inst:{loading.id}:log") == loading.rev
    stopping, _ = await store.instances.commit(loading, loading.after(Event.STOP))
    assert (await store.instances.commit(stopping, stopping.after(Event.EXIT)))[0].state is State.CANCELLED


async def test_a_stop_request_after_the_load_does_not_undo_it(store: Store) -> None:
    loading = await claimed(store)
    new = loading.after(Event.LOAD, loaded_at=1.0)
    loaded, _ = await store.instances.commit(loading, new)
    assert await store.instances.request_stop(loading.id) is State.LOADED
    assert (await store.instances.commit(loading, new))[0] == loaded, "its reply may have been lost"
    stopping, _ = await store.instances.commit(loaded, loaded.after(Event.STOP))
    assert (await store.instances.commit(stopping, stopping.after(Event.EXIT)))[0].state is State.UNLOADED


async def test_either_a_cancel_or_the_end_of_a_load_wins(store: Store) -> None:
    for number in range(20):
        loading = await claimed(store, number)
        state, done = await asyncio.gather(
            store.instances.request_stop(loading.id, unless_loaded=True),
            store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0)),
            return_exceptions=True,
        )
        if state is State.LOADING:
            assert isinstance(done, StopRequested)
        else:
            assert state is State.LOADED
            assert isinstance(done, tuple)


PATHS: dict[State, list[Event]] = {
    State.QUEUED: [],
    State.LOADING: [Event.CLAIM],
    State.LOADED: [Event.CLAIM, Event.LOAD],
    State.UNLOADING: [Event.CLAIM, Event.LOAD, Event.STOP],
    State.UNLOADED: [Event.CLAIM, Event.LOAD, Event.STOP, Event.EXIT],
    State.CANCELLED: [Event.STOP],
    State.FAILED: [Event.CLAIM, Event.FAIL],
    State.LOST: [Event.CLAIM, Event.EXPIRE],
}


async def in_state(store: Store, state: State) -> Instance:
    record = await store.instances.create(queued())
    for event in PATHS[state]:
        changes = {"loaded_at": 1.0} if event is Event.LOAD else {"error": ERROR} if event is Event.FAIL else {}
        record, _ = await store.instances.commit(record, record.after(event, **changes))
    assert record.state is state
    return record


@pytest.mark.parametrize("state", list(State))
async def test_a_cancel_is_recorded_only_before_the_load_ends(store: Store, raw: redis.Redis, state: State) -> None:
    record = await in_state(store, state)
    assert raw.hmget(f"inst:{record.id}", ["state"]) == [state.value.encode()]
    async with listening(store, "wake:w") as received:
        assert await store.instances.request_stop(record.id, unless_loaded=True) is state
        await store.redis.publish("wake:w", b"")
        notified = await received.get() == record.id.encode()
    stored = await store.instances.get(record.id)
    assert stored is not None
    assert stored.stop_requested == notified == (state in (State.QUEUED, State.LOADING))


@pytest.mark.parametrize("state", list(State))
async def test_an_unload_is_recorded_in_any_state(store: Store, state: State) -> None:
    record = await in_state(store, state)
    assert await store.instances.request_stop(record.id) is state
    stored = await store.instances.get(record.id)
    assert stored is not None
    assert stored.stop_requested


# ---- output of the engine


async def test_the_engine_log_is_kept_as_long_as_the_record(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    assert await store.instances.engine_log(record.id) is None
    await store.instances.write_engine_log(record.id, "one\n", "w")
    await store.instances.write_engine_log(record.id, "one\ntwo \u00e9\n", "w")
    assert await store.instances.engine_log(record.id) == "one\ntwo \u00e9\n".encode()
    assert await store.instances.get(record.id) == record, "the engine log is not a revision"
    failed, _ = await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    await store.instances.write_engine_log(record.id, "three\n", "w")
    assert await store.instances.engine_log(record.id) == b"three\n"
    assert await store.instances.get(record.id) == failed
    assert RETAIN_S - 60 < int(raw.ttl(f"inst:{record.id}")) <= RETAIN_S  # type: ignore[arg-type]


async def test_live_and_recently_ended_instances_keep_their_log(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.instances, "ENGINE_LOGS_N", 3)
    alive = await claimed(store, 1)
    await store.instances.write_engine_log(alive.id, "it lives", "w")
    for number in range(2, 8):
        record = await claimed(store, number)
        await store.instances.write_engine_log(record.id, "first", "w")
        await store.instances.write_engine_log(record.id, f"of {number}", "w")
        await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    logs = [await store.instances.engine_log(f"load_{number}") for number in range(1, 8)]
    assert logs[0] == b"it lives"
    assert logs[1:4] == [None, None, None]
    assert logs[-1] == b"of 7"


async def test_the_log_of_a_previous_worker_is_not_kept(store: Store) -> None:
    record = await claimed(store)
    await store.instances.commit(record, record.after(Event.REQUEUE, worker="another"))
    await store.instances.write_engine_log(record.id, "of the second attempt\n", "another")
    await store.instances.write_engine_log(record.id, "of the first\n", "w")
    assert await store.instances.engine_log(record.id) == b"of the second attempt\n"


async def test_an_engine_log_does_not_recreate_a_deleted_record(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.flushall()
    await store.instances.write_engine_log(record.id, "one\n", "w")
    assert await store.instances.engine_log(record.id) is None
    assert ttls(raw) == {}
