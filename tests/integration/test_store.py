"""The store on a real Redis: names, fences, expiries, leases, and what is told to whom."""

from __future__ import annotations

import asyncio
import pickle
import time
from collections.abc import AsyncIterator
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
from shared.errors import ErrorBody
from shared.instance import Instance
from shared.lifecycle import Event, State
from shared.schema.http import LoadConfig, LoadRequest
from shared.schema.model import Model, Problem
from shared.schema.snapshot import WorkerSnapshot
from shared.store.connection import connected
from shared.store.instances import Fenced, Full, Head, KeyTaken, NoLease, Remembered, StopRequested
from shared.store.keys import NEWS, RETAIN_S, queue
from shared.store.queue import as_arq, pack_job, unpack_job
from shared.store.steady import CHECKED_VERSION
from shared.store.store import Store
from tests.integration.conftest import hold

DEADLINE_S = 10.0
WITHOUT_EXPIRY = {"insts", "names", "workers", "counters", "tallies"}  # as the store's header says, beside live records
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
    """Every key, with the seconds it has left; -1 for ever."""
    found: Any = raw.keys()
    return {key.decode(): raw.ttl(key) for key in found}  # type: ignore[misc]


@asynccontextmanager
async def listening(store: Store, channel: str) -> AsyncIterator[asyncio.Queue[bytes]]:
    """Messages of a channel, from when the subscription stands."""
    heard: asyncio.Queue[bytes] = asyncio.Queue()
    task = asyncio.create_task(store.listen(channel, heard.put_nowait))
    try:
        async with asyncio.timeout(DEADLINE_S):
            assert await heard.get() == b""
            yield heard
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


# ---- names


async def test_a_record_is_read_as_it_was_written(store: Store) -> None:
    made = await store.instances.create(queued())
    assert (made.instance_id, made.rev, made.state) == ("p/m", 1, State.QUEUED)
    assert made.created_at > 1.6e9
    assert await store.instances.get(made.id) == made
    assert await store.instances.named("p/m") == made.id
    assert await store.instances.live() == [made]


async def test_the_lowest_free_number_is_taken(store: Store) -> None:
    made = [await store.instances.create(queued(n)) for n in range(4)]
    assert [one.instance_id for one in made] == ["p/m", "p/m:2", "p/m:3", "p/m:4"]
    for freed in (made[2], made[0]):
        await store.instances.commit(freed, freed.after(Event.STOP))
    again = [(await store.instances.create(queued(n))).instance_id for n in range(10, 13)]
    assert again == ["p/m", "p/m:3", "p/m:5"]


async def test_a_name_that_looks_numbered_is_a_name(store: Store) -> None:
    names = [
        (await store.instances.create(queued(n, key))).instance_id
        for n, key in enumerate(["p/m:2", "p/m", "p/m", "p/m"])
    ]
    assert names == ["p/m:2", "p/m", "p/m:3", "p/m:4"]


async def test_a_hundred_creations_at_once_share_no_name_and_leave_no_gap(store: Store) -> None:
    made = await asyncio.gather(*(store.instances.create(queued(n)) for n in range(100)))
    wanted = {"p/m", *(f"p/m:{n}" for n in range(2, 101))}
    assert {one.instance_id for one in made} == wanted
    assert {one.instance_id for one in await store.instances.live()} == wanted


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(ends=st.lists(st.none() | st.integers(0, 7), max_size=12))
def test_names_by_a_simple_model(redis_server: str, raw: redis.Redis, ends: list[int | None]) -> None:
    """None creates; a number ends the live instance at that position, if there is one."""

    async def play() -> None:
        raw.flushall()
        hold(raw, "w")
        live: list[Instance] = []
        async with connected(redis_server) as client:
            store = Store(client, 10.0)
            for n, end in enumerate(ends):
                if end is None:
                    made = await store.instances.create(queued(n))
                    taken = {one.instance_id for one in live}
                    free = (name for name in ("p/m", *(f"p/m:{i}" for i in range(2, 99))) if name not in taken)
                    assert made.instance_id == next(free)
                    live.append(made)
                elif end < len(live):
                    gone = live.pop(end)
                    await store.instances.commit(gone, gone.after(Event.STOP))
            names: Any = raw.hgetall("names")
            assert names == {one.instance_id.encode(): one.id.encode() for one in live}

    asyncio.run(play())


async def test_nothing_is_given_to_a_worker_that_has_gone(store: Store) -> None:
    with pytest.raises(NoLease):
        await store.instances.create(queued(worker="gone"))
    assert await store.instances.live() == []


# ---- the fence


async def test_of_two_writers_one_wins(store: Store) -> None:
    record = await store.instances.create(queued())
    claim, stop = record.after(Event.CLAIM, epoch="e"), record.after(Event.STOP)
    results = await asyncio.gather(
        store.instances.commit(record, claim), store.instances.commit(record, stop), return_exceptions=True
    )
    assert [type(result) for result in results if isinstance(result, BaseException)] == [Fenced]
    won = next(result for result in results if not isinstance(result, BaseException))
    assert await store.instances.get(record.id) == won[0]
    assert won[0].rev == 2


async def test_of_thirty_writers_one_wins_each_time(store: Store) -> None:
    record = await claimed(store)
    for _ in range(5):
        writes = [msgspec.structs.replace(record, loaded_bytes=record.loaded_bytes + n) for n in range(1, 31)]
        results = await asyncio.gather(*(store.instances.commit(record, new) for new in writes), return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        assert len(won) == 1
        assert {type(result) for result in results if isinstance(result, BaseException)} == {Fenced}
        record = won[0][0]
        assert await store.instances.get(record.id) == record


async def test_whoever_was_overtaken_cannot_write_again(store: Store, raw: redis.Redis) -> None:
    """A worker that was paused while its instance was declared lost wakes up and wants to go on."""
    old = await claimed(store)
    lost, _ = await store.instances.commit(old, old.after(Event.EXPIRE))
    for new in (old.after(Event.LOAD, loaded_at=1.0), old.after(Event.FAIL, error=ERROR), old.after(Event.STOP)):
        with pytest.raises(Fenced):
            await store.instances.commit(old, new)
    assert await store.instances.get(old.id) == lost
    assert raw.xlen(f"inst:{old.id}:log") == lost.rev


async def test_a_record_that_is_gone_cannot_be_written(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.flushall()
    with pytest.raises(Fenced):
        await store.instances.commit(record, record.after(Event.STOP))
    assert ttls(raw) == {}


async def test_a_new_instance_keeps_its_name_when_an_old_one_ends_late(store: Store) -> None:
    """Two records never share a name, and the end of one does not free what the other holds."""
    first, second = await store.instances.create(queued(1)), await store.instances.create(queued(2))
    await store.instances.commit(first, first.after(Event.STOP))
    third = await store.instances.create(queued(3))
    await store.instances.commit(second, second.after(Event.STOP))
    assert third.instance_id == "p/m"
    assert await store.instances.named("p/m") == third.id


# ---- scripts that are repeated after a lost reply


async def test_a_repeated_creation_changes_nothing(store: Store, raw: redis.Redis) -> None:
    made = await store.instances.create(queued())
    assert await store.instances.create(queued()) == made
    moved, _ = await store.instances.commit(made, made.after(Event.CLAIM, epoch="e"))
    again = await store.instances.create(queued())
    assert (again.instance_id, again.created_at) == (made.instance_id, made.created_at)
    assert await store.instances.get(made.id) == moved
    assert raw.xlen(f"inst:{made.id}:log") == 2
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert raw.hlen("names") == raw.scard("insts") == 1


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


async def test_repeated_wishes_renewals_and_releases(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    assert [await store.instances.request_stop(record.id) for _ in range(2)] == [State.LOADING, State.LOADING]
    assert [await store.workers.renew(snapshot()) for _ in range(2)] == ["no catalog", "no catalog"]
    for _ in range(2):
        await store.workers.release("s", "e")
    assert raw.exists("lease:s", "worker:s") == 0


# ---- the log


async def test_the_log_has_one_entry_a_revision(store: Store, raw: redis.Redis) -> None:
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


async def test_progress_is_a_revision_but_no_transition(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    for n in range(3):
        record, _ = await store.instances.commit(record, msgspec.structs.replace(record, loaded_bytes=n + 1))
    assert record.rev == 5
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert len(await store.instances.history(record)) == 5


async def test_revisions_of_what_is_there_and_of_what_is_not(store: Store) -> None:
    first, second = await claimed(store, 1), await store.instances.create(queued(2))
    assert await store.instances.revisions([second.id, "load_none", first.id]) == [1, None, 2]
    assert await store.instances.many([second.id, "load_none", first.id]) == [second, first]
    assert await store.instances.get("load_none") is None
    assert await store.instances.named("p/none") is None
    assert await store.instances.history(queued(9)) == []


# ---- the end


async def test_an_instance_that_ended_frees_its_name_and_expires(store: Store, raw: redis.Redis) -> None:
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


async def test_nothing_stays_for_ever_but_what_is_documented(store: Store, raw: redis.Redis) -> None:
    for number in range(3):
        record = await ended(store, number)
        await store.instances.request_stop(record.id)
        await as_arq(store.redis).enqueue_job("load", record.id, _job_id=record.id, _queue_name=QUEUE, _expires=3600)
    await store.workers.renew(snapshot())
    await store.workers.publish_catalog("w", [], "e")
    found = ttls(raw)
    assert {key for key, left in found.items() if left == -1} <= WITHOUT_EXPIRY | {QUEUE}
    assert len(found) > len(WITHOUT_EXPIRY)
    assert "insts" not in found
    assert "names" not in found


# ---- whose it is


async def at(store: Store, *workers: str) -> list[set[str]]:
    return [{one.id for one in await store.instances.live_at(worker)} for worker in workers]


async def test_a_worker_reads_its_own_instances_and_no_others_until_they_end(store: Store, raw: redis.Redis) -> None:
    mine = [await store.instances.create(queued(n)) for n in range(2)]
    other = await store.instances.create(queued(2, worker="another"))
    assert await at(store, "w", "another") == [{"load_0", "load_1"}, {"load_2"}]
    assert await store.instances.live_at("w", [mine[0].id, other.id, "load_none"]) in (mine, mine[::-1])
    moved, _ = await store.instances.commit(mine[0], mine[0].after(Event.CLAIM, epoch="e"))
    assert moved in await store.instances.live_at("w")
    for record in (moved, mine[1], other):
        await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    assert raw.exists("insts:w", "insts:another") == 0


@pytest.mark.parametrize("to", ["w", "another"])
async def test_what_is_given_to_another_worker_is_that_ones(store: Store, raw: redis.Redis, to: str) -> None:
    record = await claimed(store)
    given, _ = await store.instances.commit(record, record.after(Event.REQUEUE, worker=to))
    assert await at(store, "w", "another") == ([{record.id}, set()] if to == "w" else [set(), {record.id}])
    with pytest.raises(Fenced):  # whoever had it ends it late
        await store.instances.commit(record, record.after(Event.EXPIRE))
    await store.instances.commit(given, given.after(Event.STOP))
    assert raw.exists("insts", "insts:w", "insts:another") == 0


async def test_repeated_scripts_leave_an_instance_with_whom_it_is(store: Store, raw: redis.Redis) -> None:
    made = await store.instances.create(queued())
    given = made.after(Event.REQUEUE, worker="another")
    await store.instances.commit(made, given)
    for _ in range(2):
        await store.instances.create(queued())
        await store.instances.commit(made, given)
        assert await at(store, "w", "another") == [set(), {made.id}]
    assert raw.exists("insts:w") == 0


async def test_what_a_worker_holds_is_read_also_where_its_set_was_lost(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.delete("insts:w")
    assert await store.instances.live_at("w", [record.id]) == [record]


async def test_an_emptied_redis_is_told_again_whose_an_instance_is(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    loaded, _ = await store.instances.commit(record, record.after(Event.LOAD, loaded_at=1.0))
    raw.flushall()
    assert await store.instances.rewrite(loaded) == "written"
    assert await store.instances.live_at("w") == [loaded]
    assert await store.instances.heads() == [Head(loaded.id, "w", State.LOADED, "e")]


async def test_a_redis_that_lost_to_whom_an_instance_was_given_is_told_again(store: Store, raw: redis.Redis) -> None:
    """As one that keeps an append-only file, and is killed before it has written the end."""
    made = await store.instances.create(queued(worker="another"))
    before = {key: raw.dump(key) for key in ttls(raw)}
    for event, changes in ((Event.REQUEUE, {"worker": "w"}), (Event.CLAIM, {"epoch": "e"}), (Event.LOAD, {})):
        made, _ = await store.instances.commit(made, made.after(event, **changes))
    raw.flushall()
    for key, value in before.items():
        raw.restore(key, 0, value)  # type: ignore[arg-type]
    assert await at(store, "w", "another") == [set(), {made.id}]
    assert await store.instances.rewrite(made) == "written"
    assert await at(store, "w", "another") == [{made.id}, set()]
    assert raw.exists("queued", "queued:another", "insts:another") == 0, "nothing waits any more"


async def test_the_heads_tell_of_every_live_instance_where_it_is(store: Store) -> None:
    first, second, third = [await store.instances.create(queued(n)) for n in range(3)]
    first, _ = await store.instances.commit(first, first.after(Event.CLAIM, epoch="e"))
    second, _ = await store.instances.commit(second, second.after(Event.CLAIM, epoch="e"))
    await store.instances.commit(second, second.after(Event.REQUEUE, worker="another"))
    await store.instances.commit(third, third.after(Event.STOP))
    assert sorted(await store.instances.heads()) == [
        Head(first.id, "w", State.LOADING, "e"),
        Head(second.id, "another", State.QUEUED, ""),
    ]


async def test_more_records_than_a_script_reads_at_once_are_read(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared.store.pages, "READ_N", 3)
    made = [await store.instances.create(queued(n)) for n in range(7)]
    ids = [one.id for one in made]
    assert await store.instances.many(["load_none", *ids]) == made
    assert (
        {head.id for head in await store.instances.heads()}
        == {one.id for one in await store.instances.live()}
        == set(ids)
    )


# ---- who is told


async def test_a_wish_is_told_to_its_worker(store: Store) -> None:
    record = await claimed(store)
    async with listening(store, "wake:w") as heard:
        assert await store.instances.request_stop(record.id)
        assert await heard.get() == record.id.encode()
        await store.redis.publish("wake:w", b"")
        assert await heard.get() == b""
    found = await store.instances.get(record.id)
    assert found is not None
    assert found.stop_requested
    assert found.rev == record.rev, "a wish is no revision: its worker's next commit must not fail for it"


async def test_a_wish_for_what_does_not_exist_is_nobodys(store: Store, raw: redis.Redis) -> None:
    assert not await store.instances.request_stop("load_none")
    assert not raw.exists("inst:load_none")


async def test_a_wish_outlives_the_commits_that_know_nothing_of_it(store: Store) -> None:
    record = await claimed(store)
    await store.instances.request_stop(record.id)
    await store.instances.commit(record, msgspec.structs.replace(record, loaded_bytes=1))
    found = await store.instances.get(record.id)
    assert found is not None
    assert found.stop_requested


async def test_every_change_is_news(store: Store) -> None:
    async with listening(store, NEWS) as heard:
        record = await ended(store)
        assert [await heard.get() for _ in range(3)] == [record.id.encode()] * 3


# ---- leases


async def test_a_lease_has_one_holder(store: Store) -> None:
    assert await store.workers.renew(snapshot(epoch="a")) != "refused"
    assert await store.workers.renew(snapshot(epoch="b")) == "refused"
    assert await store.workers.renew(snapshot(epoch="b"), dead_epoch="c") == "refused"
    assert (await store.workers.all())[0].epoch == "a"
    assert await store.workers.renew(snapshot(epoch="b"), dead_epoch="a") != "refused", (
        "its own dead predecessor's lease is its"
    )
    assert await store.workers.renew(snapshot(epoch="a")) == "refused", (
        "the predecessor was not so dead: it must notice"
    )
    assert (await store.workers.all())[0].snapshot == snapshot(epoch="b")


async def test_only_its_holder_releases_a_lease(store: Store) -> None:
    await store.workers.renew(snapshot(epoch="a"))
    await store.workers.release("s", "b")
    assert (await store.workers.all())[0].epoch == "a"
    await store.workers.release("s", "a")
    gone = (await store.workers.all())[0]
    assert (gone.name, gone.epoch, gone.snapshot) == ("s", None, None)
    assert await store.workers.renew(snapshot(epoch="b")) != "refused"


async def test_a_lease_that_is_not_renewed_runs_out(store: Store) -> None:
    store.workers.lease_s = 0.1
    await store.workers.renew(snapshot(epoch="a"))
    async with asyncio.timeout(DEADLINE_S):
        while await store.workers.renew(snapshot(epoch="b")) == "refused":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await store.workers.all())[0].epoch == "b"


async def test_of_two_processes_at_once_one_gets_the_lease(store: Store) -> None:
    won = await asyncio.gather(*(store.workers.renew(snapshot(epoch=str(n))) for n in range(20)))
    assert sum(held != "refused" for held in won) == 1


async def test_a_worker_of_long_ago_is_forgotten(store: Store, raw: redis.Redis) -> None:
    raw.zadd("workers", {"old": 1.0})
    await store.workers.renew(snapshot())
    assert [worker.name for worker in await store.workers.all()] == ["s"]


async def test_no_worker_is_an_answer(store: Store) -> None:
    assert await store.workers.all() == []


# ---- catalogs


async def test_a_catalog_comes_back_as_it_was(store: Store, raw: redis.Redis) -> None:
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


async def test_only_the_holder_of_a_lease_publishes_under_its_name(store: Store) -> None:
    """ "e" holds it: a second process of that name must not hide what the first one has."""
    assert await store.workers.publish_catalog("w", [], "e") is not None
    assert (
        await store.workers.publish_catalog("w", [Model(key="a", base="a", variant="", shards=["a.gguf"])], "f") is None
    )
    assert await store.workers.catalog("w") == []
    assert await store.workers.publish_catalog("w", [], "f", "e") is not None, (
        "one that is known to be dead is no obstacle"
    )
    assert await store.workers.publish_catalog("new", [], "f") is not None


async def test_what_a_later_version_adds_is_no_obstacle(store: Store, raw: redis.Redis) -> None:
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
    found = await store.instances.get(record.id)
    assert found is not None
    assert (found.state, found.attempt, found.timing) == (State.QUEUED, 1, {})


# ---- jobs


@pytest.fixture(scope="module")
def uvloops() -> None:
    """uvloop has run before: what it keeps for as long as the process lives is there."""
    uvloop.run(asyncio.sleep(0))


def test_connections_are_those_of_the_checked_redis_py() -> None:
    """They reach into it: look again at `shared.store.steady` before another version is pinned."""
    assert redis.__version__ == CHECKED_VERSION


@pytest.mark.usefixtures("uvloops")
def test_a_connection_that_was_closed_is_no_fault_of_ours_on_the_loop_that_serves(redis_server: str) -> None:
    """uvloop has an error of its own for it."""

    async def write_to_a_closed_one() -> None:
        async with connected(redis_server) as client:
            connection = await client.connection_pool.get_connection()
            connection._writer.transport.abort()
            with pytest.raises(redis.ConnectionError):
                await connection.send_command("PING")
            await client.connection_pool.release(connection)
            assert await client.ping()

    uvloop.run(write_to_a_closed_one())


def test_a_job_is_msgpack_and_an_exception_in_it_is_its_text() -> None:
    assert unpack_job(pack_job({"f": "load", "a": ("id",), "k": {}})) == {"f": "load", "a": ["id"], "k": {}}
    assert unpack_job(pack_job({"r": ValueError("why")})) == {"r": "why"}
    with pytest.raises(msgspec.DecodeError):
        unpack_job(pickle.dumps({"f": "load"}))


# ---- limits

ROOM = 1000


async def refused(store: Store, number: int, at_most: tuple[int, int], worker: str = "w") -> Full:
    """How one too many was refused; nothing of it is left."""
    before = len(await store.instances.live())
    with pytest.raises(Full) as full:
        await store.instances.create(queued(number, worker=worker), at_most=at_most)
    assert await store.instances.get(f"load_{number}") is None
    assert len(await store.instances.live()) == before
    return full.value


async def test_so_many_may_wait_for_one_worker_and_no_more(store: Store) -> None:
    for number in (1, 2):
        await store.instances.create(queued(number), at_most=(2, ROOM))
    assert (await refused(store, 3, (2, ROOM))).limit == 2
    await store.instances.create(queued(4, worker="another"), at_most=(2, ROOM))
    await store.instances.create(queued(5), at_most=(3, ROOM))


async def test_so_many_may_wait_in_all_and_no_more(store: Store) -> None:
    await store.instances.create(queued(1), at_most=(ROOM, 2))
    await store.instances.create(queued(2, worker="another"), at_most=(ROOM, 2))
    for worker in ("w", "another"):
        assert (await refused(store, 3, (ROOM, 2), worker)).limit == 2


async def test_of_many_at_once_exactly_as_many_are_accepted_as_may_wait(store: Store) -> None:
    creations = (store.instances.create(queued(n, worker=("w", "another")[n % 2]), at_most=(8, 12)) for n in range(60))
    results = await asyncio.gather(*creations, return_exceptions=True)
    made = [result for result in results if isinstance(result, Instance)]
    assert len(made) == 12
    assert max(sum(one.worker == worker for one in made) for worker in ("w", "another")) <= 8
    assert {type(result) for result in results} == {Instance, Full}
    assert {one.id for one in await store.instances.live()} == {one.id for one in made}


@pytest.mark.parametrize("event", [Event.CLAIM, Event.STOP, Event.FAIL, Event.EXPIRE])
async def test_whatever_leaves_the_queue_makes_room_for_one_and_only_once(
    store: Store, raw: redis.Redis, event: Event
) -> None:
    first = await store.instances.create(queued(1), at_most=(1, 1))
    await refused(store, 2, (1, 1))
    left = first.after(event, **({"error": ERROR} if event is Event.FAIL else {}))
    for _ in range(2):  # as after a lost reply
        await store.instances.commit(first, left)
    assert raw.llen("pace") == raw.llen("pace:w") == 1
    await store.instances.create(queued(2), at_most=(1, 1))
    await refused(store, 3, (1, 1))


async def test_what_loads_or_is_loaded_does_not_wait(store: Store, raw: redis.Redis) -> None:
    for number in range(3):
        loading = await claimed(store, number)
        await store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0))
    assert raw.llen("pace") == 3, "one for each claim"
    await store.instances.create(queued(9), at_most=(1, 1))


async def test_a_creation_repeated_after_a_lost_reply_is_no_second_one_at_the_limit(store: Store) -> None:
    made = await store.instances.create(queued(1), at_most=(1, 1))
    assert await store.instances.create(queued(1), at_most=(1, 1)) == made
    moved, _ = await store.instances.commit(made, made.after(Event.CLAIM, epoch="e"))
    await store.instances.create(queued(2), at_most=(1, 1))
    assert (await store.instances.create(queued(1), at_most=(1, 1))).instance_id == moved.instance_id


# ---- when to come back


def departed(raw: redis.Redis, key: str, *seconds_ago: float) -> None:
    """That so many left the queue, so long ago each; the last one first."""
    seconds, microseconds = raw.time()  # type: ignore[misc]
    now = int(seconds) * 1_000_000 + int(microseconds)
    raw.rpush(key, *(round(now - ago * 1e6) for ago in seconds_ago))


async def test_where_nothing_left_the_queue_lately_a_client_comes_back_in_half_a_minute(store: Store) -> None:
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
async def test_a_client_comes_back_when_one_will_have_left_at_the_pace_of_the_last_ones(
    store: Store, raw: redis.Redis, seconds_ago: list[float], retry_after_s: int
) -> None:
    """In whole seconds and rounded up, and since nobody left meanwhile, it is never sooner than that."""
    await store.instances.create(queued(1))
    departed(raw, "pace:w", *seconds_ago)
    assert (await refused(store, 2, (1, ROOM))).retry_after_s == retry_after_s


async def test_the_pace_that_counts_is_that_of_what_is_full(store: Store, raw: redis.Redis) -> None:
    await store.instances.create(queued(1))
    departed(raw, "pace:w", 99.1)
    departed(raw, "pace", 49.1)
    assert (await refused(store, 2, (1, 1))).retry_after_s == 100, "its worker's"
    assert (await refused(store, 2, (ROOM, 1))).retry_after_s == 50, "that of all"


async def test_the_pace_is_that_of_the_last_departures(store: Store, raw: redis.Redis) -> None:
    departed(raw, "pace:w", *[3000.0] * 16)
    for number in range(20):
        await claimed(store, number)
    await store.instances.create(queued(21))
    assert (await refused(store, 22, (1, ROOM))).retry_after_s <= 2, "twenty left within moments"
    assert raw.llen("pace:w") == raw.llen("pace") == 16


# ---- the same request again


async def test_the_second_creation_with_a_key_is_told_of_the_first(store: Store, raw: redis.Redis) -> None:
    assert await store.instances.remembered("k") is None
    made = await store.instances.create(queued(1), key="k", digest="d")
    for digest in ("d", "another request's"):
        with pytest.raises(KeyTaken) as taken:
            await store.instances.create(queued(2), key="k", digest=digest)
        assert taken.value.remembered == Remembered("load_1", "d")
    assert await store.instances.remembered("k") == Remembered("load_1", "d")
    assert await store.instances.live() == [made]
    assert (await store.instances.create(queued(3), key="another", digest="d")).id == "load_3"


async def test_a_key_is_remembered_when_its_load_has_ended(store: Store) -> None:
    made = await store.instances.create(queued(1), key="k", digest="d")
    await store.instances.commit(made, made.after(Event.STOP))
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), key="k", digest="d")


async def test_of_many_creations_at_once_with_one_key_exactly_one_makes_a_record(
    store: Store, raw: redis.Redis
) -> None:
    creations = (store.instances.create(queued(n), key="k", digest=str(n % 2)) for n in range(100))
    results = await asyncio.gather(*creations, return_exceptions=True)
    (made,) = (result for result in results if isinstance(result, Instance))
    told = {result.remembered.id for result in results if isinstance(result, KeyTaken)}
    assert told == {made.id}
    assert len(results) == 1 + sum(isinstance(result, KeyTaken) for result in results)
    assert await store.instances.live() == [made]
    assert raw.hgetall("counters") == {b"queued": b"1"}


async def test_a_creation_with_a_key_repeated_after_a_lost_reply_is_the_first_one(store: Store) -> None:
    made = await store.instances.create(queued(1), key="k", digest="d")
    assert await store.instances.create(queued(1), key="k", digest="d") == made


async def test_what_was_refused_is_not_remembered(store: Store) -> None:
    with pytest.raises(NoLease):
        await store.instances.create(queued(1, worker="gone"), key="k", digest="d")
    await store.instances.create(queued(2))
    with pytest.raises(Full):
        await store.instances.create(queued(1), at_most=(1, 1), key="k", digest="d")
    assert await store.instances.remembered("k") is None
    assert (await store.instances.create(queued(1), key="k", digest="d")).id == "load_1"


async def test_a_known_key_is_answered_where_a_new_load_would_be_refused(store: Store, raw: redis.Redis) -> None:
    await store.instances.create(queued(1), key="k", digest="d")
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), at_most=(1, 1), key="k", digest="d")
    raw.delete("lease:w")
    with pytest.raises(KeyTaken):
        await store.instances.create(queued(2), key="k", digest="d")


async def test_without_a_key_nothing_is_remembered(store: Store, raw: redis.Redis) -> None:
    for number in (1, 2):
        await store.instances.create(queued(number))
    assert not [key for key in ttls(raw) if key.startswith("idem:")]


async def test_what_helps_to_find_a_load_expires_after_it(store: Store, raw: redis.Redis) -> None:
    made = await store.instances.create(queued(1), key="k", digest="d")
    await store.instances.commit(made, made.after(Event.STOP))
    found = ttls(raw)
    assert 0 < found["pace"] <= 3600
    assert 0 < found["pace:w"] <= 3600
    for key in ("idem:k", "jobs"):
        assert RETAIN_S - 60 < found[key] <= RETAIN_S
    assert {key for key, left in found.items() if left == -1} == {"counters", "tallies"}


# ---- the list


async def listed(store: Store) -> list[str]:
    return [instance.id async for instance in store.instances.newest()]


async def test_records_are_listed_newest_first_whatever_has_become_of_them(store: Store) -> None:
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


async def test_a_list_longer_than_a_page_is_whole(store: Store) -> None:
    made = await asyncio.gather(*(store.instances.create(queued(n)) for n in range(shared.store.instances.PAGE_N + 1)))
    wanted = sorted(made, key=lambda one: one.created_at, reverse=True)
    assert await listed(store) == [one.id for one in wanted]


async def test_what_was_made_while_a_list_is_read_does_not_move_it(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.store.instances, "PAGE_N", 2)
    for number in range(5):
        await store.instances.create(queued(number))
    found = []
    async for instance in store.instances.newest():
        found.append(instance.id)
        await ended(store, 10 + len(found))
    assert [id_ for id_ in found if id_ in {f"load_{n}" for n in range(5)}] == [f"load_{n}" for n in (4, 3, 2, 1, 0)]
    assert len(found) == len({*found})


async def test_records_of_long_ago_are_listed_last_and_only_if_they_live(store: Store, raw: redis.Redis) -> None:
    """A loaded instance may be older than the index; one that has ended by then is forgotten."""
    old = [await claimed(store, number) for number in (1, 2)]
    await ended(store, 3)
    now = round(time.time())
    raw.zadd("jobs", {f"load_{number}": (now - RETAIN_S - number) * 1_000_000 for number in (1, 2, 3)})
    assert (await listed(store))[0] == "load_1", "nothing has cleared the index yet"
    new = await store.instances.create(queued(4))
    assert raw.zcard("jobs") == 1
    assert await listed(store) == [new.id, old[1].id, old[0].id]


async def test_a_record_that_expired_is_left_out_of_the_list(store: Store, raw: redis.Redis) -> None:
    for number in (1, 2, 3):
        await ended(store, number)
    raw.delete("inst:load_2", "inst:load_2:log")
    assert await listed(store) == ["load_3", "load_1"]


# ---- wishes


async def test_what_is_to_be_stopped_does_not_become_loaded(store: Store, raw: redis.Redis) -> None:
    """Whoever was told that his cancel was heard must not find the load at its end."""
    loading = await claimed(store)
    assert await store.instances.request_stop(loading.id, unless_loaded=True) is State.LOADING
    with pytest.raises(StopRequested):
        await store.instances.commit(loading, loading.after(Event.LOAD, loaded_at=1.0))
    found = await store.instances.get(loading.id)
    assert found is not None
    assert (found.state, found.rev) == (State.LOADING, loading.rev)
    assert raw.xlen(f"inst:{loading.id}:log") == loading.rev
    stopping, _ = await store.instances.commit(loading, loading.after(Event.STOP))
    assert (await store.instances.commit(stopping, stopping.after(Event.EXIT)))[0].state is State.CANCELLED


async def test_a_wish_after_the_load_does_not_undo_it(store: Store) -> None:
    loading = await claimed(store)
    new = loading.after(Event.LOAD, loaded_at=1.0)
    loaded, _ = await store.instances.commit(loading, new)
    assert await store.instances.request_stop(loading.id) is State.LOADED
    assert (await store.instances.commit(loading, new))[0] == loaded, "its reply may have been lost"
    stopping, _ = await store.instances.commit(loaded, loaded.after(Event.STOP))
    assert (await store.instances.commit(stopping, stopping.after(Event.EXIT)))[0].state is State.UNLOADED


async def test_of_a_cancel_and_the_end_of_a_load_at_once_exactly_one_wins(store: Store) -> None:
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
async def test_a_cancel_is_told_the_state_and_is_wished_only_of_what_is_not_loaded_yet(
    store: Store, raw: redis.Redis, state: State
) -> None:
    record = await in_state(store, state)
    assert raw.hmget(f"inst:{record.id}", ["state"]) == [state.value.encode()]
    async with listening(store, "wake:w") as heard:
        assert await store.instances.request_stop(record.id, unless_loaded=True) is state
        await store.redis.publish("wake:w", b"")
        wished = await heard.get() == record.id.encode()
    found = await store.instances.get(record.id)
    assert found is not None
    assert found.stop_requested == wished == (state in (State.QUEUED, State.LOADING))


@pytest.mark.parametrize("state", list(State))
async def test_an_unload_is_wished_of_anything(store: Store, state: State) -> None:
    record = await in_state(store, state)
    assert await store.instances.request_stop(record.id) is state
    found = await store.instances.get(record.id)
    assert found is not None
    assert found.stop_requested


# ---- what the engine said


async def test_what_the_engine_said_is_kept_with_the_record_for_as_long_as_that(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    assert await store.instances.engine_log(record.id) is None
    await store.instances.write_engine_log(record.id, "one\n", "w")
    await store.instances.write_engine_log(record.id, "one\ntwo \u00e9\n", "w")
    assert await store.instances.engine_log(record.id) == "one\ntwo \u00e9\n".encode()
    assert await store.instances.get(record.id) == record, "it is no revision"
    failed, _ = await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    await store.instances.write_engine_log(record.id, "three\n", "w")
    assert await store.instances.engine_log(record.id) == b"three\n"
    assert await store.instances.get(record.id) == failed
    assert RETAIN_S - 60 < int(raw.ttl(f"inst:{record.id}")) <= RETAIN_S  # type: ignore[arg-type]


async def test_the_last_that_ended_keep_what_the_engine_said_and_so_does_what_lives(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shared.store.instances, "ENGINE_LOGS_N", 3)
    alive = await claimed(store, 1)
    await store.instances.write_engine_log(alive.id, "it lives", "w")
    for number in range(2, 8):
        record = await claimed(store, number)
        await store.instances.write_engine_log(record.id, "first", "w")
        await store.instances.write_engine_log(record.id, f"of {number}", "w")
        await store.instances.commit(record, record.after(Event.FAIL, error=ERROR))
    said = [await store.instances.engine_log(f"load_{number}") for number in range(1, 8)]
    assert said[0] == b"it lives"
    assert said[1:4] == [None, None, None]
    assert said[-1] == b"of 7"


async def test_what_the_engine_said_to_a_worker_that_lost_the_load_is_not_kept(store: Store) -> None:
    record = await claimed(store)
    await store.instances.commit(record, record.after(Event.REQUEUE, worker="another"))
    await store.instances.write_engine_log(record.id, "of the second attempt\n", "another")
    await store.instances.write_engine_log(record.id, "of the first\n", "w")
    assert await store.instances.engine_log(record.id) == b"of the second attempt\n"


async def test_what_the_engine_said_does_not_bring_back_a_record_that_is_gone(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.flushall()
    await store.instances.write_engine_log(record.id, "one\n", "w")
    assert await store.instances.engine_log(record.id) is None
    assert ttls(raw) == {}
