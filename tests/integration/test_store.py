"""The store on a real Redis: names, fences, expiries, leases, and what is told to whom."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest
import redis
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from msgspec import msgpack

from shared.errors import ErrorBody
from shared.lifecycle import Event, State
from shared.schema import Instance, LoadConfig, LoadRequest, Model, Problem, WorkerSnapshot
from shared.store import NEWS, RETAIN_S, Fenced, NoLease, Store, connected, pack_job, queue_of, unpack_job

DEADLINE_S = 10.0
WITHOUT_EXPIRY = {"insts", "names", "workers", "counters"}  # as the store's header says, beside live records
ERROR = ErrorBody(type="model_load_failed", code="engine_crashed", message="why", detail={"n": 1})


def queued(number: int = 1, key: str = "p/m", worker: str = "w") -> Instance:
    request = LoadRequest(model=key, context_length=100)
    return Instance(id=f"load_{number}", model=key, key=key, type="llm", worker=worker, request=request)


async def claimed(store: Store, number: int = 1) -> Instance:
    record = await store.create(queued(number))
    return (await store.commit(record, record.after(Event.CLAIM, epoch="e")))[0]


async def ended(store: Store, number: int = 1) -> Instance:
    record = await claimed(store, number)
    return (await store.commit(record, record.after(Event.FAIL, error=ERROR)))[0]


def snapshot(name: str = "s", epoch: str = "e", **fields: Any) -> WorkerSnapshot:
    return WorkerSnapshot(name=name, epoch=epoch, version="0", catalog="", residents=0, **fields)


def keys(raw: redis.Redis) -> dict[str, int]:
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
    made = await store.create(queued())
    assert (made.instance_id, made.rev, made.state) == ("p/m", 1, State.QUEUED)
    assert made.created_at > 1.6e9
    assert await store.get(made.id) == made
    assert await store.named("p/m") == made.id
    assert await store.live() == [made]


async def test_the_lowest_free_number_is_taken(store: Store) -> None:
    made = [await store.create(queued(n)) for n in range(4)]
    assert [one.instance_id for one in made] == ["p/m", "p/m:2", "p/m:3", "p/m:4"]
    for freed in (made[2], made[0]):
        await store.commit(freed, freed.after(Event.STOP))
    again = [(await store.create(queued(n))).instance_id for n in range(10, 13)]
    assert again == ["p/m", "p/m:3", "p/m:5"]


async def test_a_name_that_looks_numbered_is_a_name(store: Store) -> None:
    names = [(await store.create(queued(n, key))).instance_id for n, key in enumerate(["p/m:2", "p/m", "p/m", "p/m"])]
    assert names == ["p/m:2", "p/m", "p/m:3", "p/m:4"]


async def test_a_hundred_creations_at_once_share_no_name_and_leave_no_gap(store: Store) -> None:
    made = await asyncio.gather(*(store.create(queued(n)) for n in range(100)))
    wanted = {"p/m", *(f"p/m:{n}" for n in range(2, 101))}
    assert {one.instance_id for one in made} == wanted
    assert {one.instance_id for one in await store.live()} == wanted


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30, deadline=None)
@given(ends=st.lists(st.none() | st.integers(0, 7), max_size=12))
def test_names_by_a_simple_model(redis_server: str, raw: redis.Redis, ends: list[int | None]) -> None:
    """None creates; a number ends the live instance at that position, if there is one."""

    async def play() -> None:
        raw.flushall()
        raw.set("lease:w", "e", ex=60)
        live: list[Instance] = []
        async with connected(redis_server) as client:
            store = Store(client, 10.0)
            for n, end in enumerate(ends):
                if end is None:
                    made = await store.create(queued(n))
                    taken = {one.instance_id for one in live}
                    free = (name for name in ("p/m", *(f"p/m:{i}" for i in range(2, 99))) if name not in taken)
                    assert made.instance_id == next(free)
                    live.append(made)
                elif end < len(live):
                    gone = live.pop(end)
                    await store.commit(gone, gone.after(Event.STOP))
            names: Any = raw.hgetall("names")
            assert names == {one.instance_id.encode(): one.id.encode() for one in live}

    asyncio.run(play())


async def test_nothing_is_given_to_a_worker_that_has_gone(store: Store) -> None:
    with pytest.raises(NoLease):
        await store.create(queued(worker="gone"))
    assert await store.live() == []


# ---- the fence


async def test_of_two_writers_one_wins(store: Store) -> None:
    record = await store.create(queued())
    claim, stop = record.after(Event.CLAIM, epoch="e"), record.after(Event.STOP)
    results = await asyncio.gather(store.commit(record, claim), store.commit(record, stop), return_exceptions=True)
    assert [type(result) for result in results if isinstance(result, BaseException)] == [Fenced]
    won = next(result for result in results if not isinstance(result, BaseException))
    assert await store.get(record.id) == won[0]
    assert won[0].rev == 2


async def test_of_thirty_writers_one_wins_each_time(store: Store) -> None:
    record = await claimed(store)
    for _ in range(5):
        writes = [msgspec.structs.replace(record, loaded_bytes=record.loaded_bytes + n) for n in range(1, 31)]
        results = await asyncio.gather(*(store.commit(record, new) for new in writes), return_exceptions=True)
        won = [result for result in results if not isinstance(result, BaseException)]
        assert len(won) == 1
        assert {type(result) for result in results if isinstance(result, BaseException)} == {Fenced}
        record = won[0][0]
        assert await store.get(record.id) == record


async def test_whoever_was_overtaken_cannot_write_again(store: Store, raw: redis.Redis) -> None:
    """A worker that was paused while its instance was declared lost wakes up and wants to go on."""
    old = await claimed(store)
    lost, _ = await store.commit(old, old.after(Event.EXPIRE))
    for new in (old.after(Event.LOAD, loaded_at=1.0), old.after(Event.FAIL, error=ERROR), old.after(Event.STOP)):
        with pytest.raises(Fenced):
            await store.commit(old, new)
    assert await store.get(old.id) == lost
    assert raw.xlen(f"inst:{old.id}:log") == lost.rev


async def test_a_record_that_is_gone_cannot_be_written(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    raw.flushall()
    with pytest.raises(Fenced):
        await store.commit(record, record.after(Event.STOP))
    assert keys(raw) == {}


async def test_a_new_instance_keeps_its_name_when_an_old_one_ends_late(store: Store) -> None:
    """Two records never share a name, and the end of one does not free what the other holds."""
    first, second = await store.create(queued(1)), await store.create(queued(2))
    await store.commit(first, first.after(Event.STOP))
    third = await store.create(queued(3))
    await store.commit(second, second.after(Event.STOP))
    assert third.instance_id == "p/m"
    assert await store.named("p/m") == third.id


# ---- scripts that are repeated after a lost reply


async def test_a_repeated_creation_changes_nothing(store: Store, raw: redis.Redis) -> None:
    made = await store.create(queued())
    assert await store.create(queued()) == made
    moved, _ = await store.commit(made, made.after(Event.CLAIM, epoch="e"))
    again = await store.create(queued())
    assert (again.instance_id, again.created_at) == (made.instance_id, made.created_at)
    assert await store.get(made.id) == moved
    assert raw.xlen(f"inst:{made.id}:log") == 2
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert raw.hlen("names") == raw.scard("insts") == 1


@pytest.mark.parametrize("event", [Event.STOP, Event.EXPIRE, Event.LOAD])
async def test_a_repeated_commit_answers_as_before(store: Store, raw: redis.Redis, event: Event) -> None:
    record = await claimed(store)
    new = record.after(event, loaded_at=5.0)
    done, _ = await store.commit(record, new)
    before = raw.hgetall("counters")
    assert (await store.commit(record, new))[0] == done
    assert raw.hgetall("counters") == before
    assert raw.xlen(f"inst:{record.id}:log") == done.rev
    assert await store.get(record.id) == done


async def test_repeated_wishes_renewals_and_releases(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    assert [await store.request_stop(record.id) for _ in range(2)] == [State.LOADING, State.LOADING]
    assert [await store.renew(snapshot()) for _ in range(2)] == ["no catalog", "no catalog"]
    for _ in range(2):
        await store.release("s", "e")
    assert raw.exists("lease:s", "worker:s") == 0


# ---- the log


async def test_the_log_has_one_entry_a_revision(store: Store, raw: redis.Redis) -> None:
    revisions = [await store.create(queued())]
    for event, changes in (
        (Event.CLAIM, {"epoch": "e"}),
        (Event.LOAD, {"loaded_at": 1.0, "load_config": LoadConfig(context_length=100)}),
        (Event.STOP, {}),
        (Event.EXIT, {}),
    ):
        revisions.append((await store.commit(revisions[-1], revisions[-1].after(event, **changes)))[0])
    assert revisions[-1].state is State.UNLOADED
    history = await store.history(revisions[0])
    assert [revision for _, revision in history] == revisions
    assert [revision.rev for revision in revisions] == [1, 2, 3, 4, 5]
    for n, (entry, _) in enumerate(history):
        assert [revision for _, revision in await store.history(revisions[0], entry)] == revisions[n + 1 :]
    assert raw.hgetall("counters") == dict.fromkeys((b"queued", b"loading", b"loaded", b"unloading", b"unloaded"), b"1")


async def test_progress_is_a_revision_but_no_transition(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    for n in range(3):
        record, _ = await store.commit(record, msgspec.structs.replace(record, loaded_bytes=n + 1))
    assert record.rev == 5
    assert raw.hgetall("counters") == {b"queued": b"1", b"loading": b"1"}
    assert len(await store.history(record)) == 5


async def test_revisions_of_what_is_there_and_of_what_is_not(store: Store) -> None:
    first, second = await claimed(store, 1), await store.create(queued(2))
    assert await store.revisions([second.id, "load_none", first.id]) == [1, None, 2]
    assert await store.many([second.id, "load_none", first.id]) == [second, first]
    assert await store.get("load_none") is None
    assert await store.named("p/none") is None
    assert await store.history(queued(9)) == []


# ---- the end


async def test_an_instance_that_ended_frees_its_name_and_expires(store: Store, raw: redis.Redis) -> None:
    record = await ended(store)
    assert await store.live() == []
    assert await store.named("p/m") is None
    assert raw.exists("insts", "names") == 0
    for key in (f"inst:{record.id}", f"inst:{record.id}:log"):
        assert RETAIN_S - 60 < int(raw.ttl(key)) <= RETAIN_S == 24 * 3600  # type: ignore[arg-type]
    kept = await store.get(record.id)
    assert kept == record
    assert kept is not None
    assert kept.error == ERROR


async def test_a_live_instance_does_not_expire(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    await store.request_stop(record.id)
    assert raw.ttl(f"inst:{record.id}") == raw.ttl(f"inst:{record.id}:log") == -1


async def test_nothing_stays_for_ever_but_what_is_documented(store: Store, raw: redis.Redis) -> None:
    for number in range(3):
        record = await ended(store, number)
        await store.request_stop(record.id)
        await store.redis.enqueue_job("load", record.id, _job_id=record.id, _queue_name=queue_of("w"), _expires=3600)
    await store.renew(snapshot())
    await store.publish_catalog("w", [])
    found = keys(raw)
    assert {key for key, left in found.items() if left == -1} <= WITHOUT_EXPIRY | {queue_of("w")}
    assert len(found) > len(WITHOUT_EXPIRY)
    assert "insts" not in found
    assert "names" not in found


# ---- who is told


async def test_a_wish_is_told_to_its_worker(store: Store) -> None:
    record = await claimed(store)
    async with listening(store, "wake:w") as heard:
        assert await store.request_stop(record.id)
        assert await heard.get() == record.id.encode()
        await store.ring("w")
        assert await heard.get() == b""
    found = await store.get(record.id)
    assert found is not None
    assert found.stop_requested
    assert found.rev == record.rev, "a wish is no revision: its worker's next commit must not fail for it"


async def test_a_wish_for_what_does_not_exist_is_nobodys(store: Store, raw: redis.Redis) -> None:
    assert not await store.request_stop("load_none")
    assert not raw.exists("inst:load_none")


async def test_a_wish_outlives_the_commits_that_know_nothing_of_it(store: Store) -> None:
    record = await claimed(store)
    await store.request_stop(record.id)
    await store.commit(record, msgspec.structs.replace(record, loaded_bytes=1))
    found = await store.get(record.id)
    assert found is not None
    assert found.stop_requested


async def test_every_change_is_news(store: Store) -> None:
    async with listening(store, NEWS) as heard:
        record = await ended(store)
        assert [await heard.get() for _ in range(3)] == [record.id.encode()] * 3


# ---- leases


async def test_a_lease_has_one_holder(store: Store) -> None:
    assert await store.renew(snapshot(epoch="a")) != "refused"
    assert await store.renew(snapshot(epoch="b")) == "refused"
    assert await store.renew(snapshot(epoch="b"), dead_epoch="c") == "refused"
    assert (await store.workers())[0].epoch == "a"
    assert await store.renew(snapshot(epoch="b"), dead_epoch="a") != "refused", (
        "its own dead predecessor's lease is its"
    )
    assert await store.renew(snapshot(epoch="a")) == "refused", "the predecessor was not so dead: it must notice"
    assert (await store.workers())[0].snapshot == snapshot(epoch="b")


async def test_only_its_holder_releases_a_lease(store: Store) -> None:
    await store.renew(snapshot(epoch="a"))
    await store.release("s", "b")
    assert (await store.workers())[0].epoch == "a"
    await store.release("s", "a")
    gone = (await store.workers())[0]
    assert (gone.name, gone.epoch, gone.snapshot) == ("s", None, None)
    assert await store.renew(snapshot(epoch="b")) != "refused"


async def test_a_lease_that_is_not_renewed_runs_out(store: Store) -> None:
    store.lease_s = 0.1
    await store.renew(snapshot(epoch="a"))
    async with asyncio.timeout(DEADLINE_S):
        while await store.renew(snapshot(epoch="b")) == "refused":  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert (await store.workers())[0].epoch == "b"


async def test_of_two_processes_at_once_one_gets_the_lease(store: Store) -> None:
    won = await asyncio.gather(*(store.renew(snapshot(epoch=str(n))) for n in range(20)))
    assert sum(held != "refused" for held in won) == 1


async def test_a_worker_of_long_ago_is_forgotten(store: Store, raw: redis.Redis) -> None:
    raw.zadd("workers", {"old": 1.0})
    await store.renew(snapshot())
    assert [worker.name for worker in await store.workers()] == ["s"]


async def test_no_worker_is_an_answer(store: Store) -> None:
    assert await store.workers() == []


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
    assert await store.catalog("w") is None
    digest = await store.publish_catalog("w", [full, broken])
    assert await store.catalog("w") == [full, broken]
    assert 0 < int(raw.ttl("catalog:w")) <= RETAIN_S  # type: ignore[arg-type]
    assert await store.publish_catalog("w", [full, broken]) == digest
    assert await store.publish_catalog("w", [full]) != digest


# ---- two versions on one Redis


async def test_what_a_later_version_adds_is_no_obstacle(store: Store, raw: redis.Redis) -> None:
    record = await claimed(store)
    known: Any = raw.hget(f"inst:{record.id}", "doc")
    document = {**msgpack.decode(known), "of_tomorrow": {"a": [1]}}
    document["request"]["of_tomorrow"] = True
    raw.hset(f"inst:{record.id}", mapping={"doc": msgpack.encode(document), "field_of_tomorrow": 1})
    assert await store.get(record.id) == record
    moved, _ = await store.commit(record, record.after(Event.STOP))
    assert moved.state is State.UNLOADING

    raw.set("worker:w", msgpack.encode({**msgspec.to_builtins(snapshot()), "of_tomorrow": 1}))
    raw.set("lease:w", "e")
    raw.zadd("workers", {"w": 9e9})
    assert (await store.workers())[0].snapshot == snapshot()


async def test_a_record_of_an_earlier_version_has_defaults(store: Store, raw: redis.Redis) -> None:
    record = await store.create(queued())
    document = {key: getattr(record, key) for key in ("id", "model", "key", "type", "worker")}
    raw.hset(f"inst:{record.id}", mapping={"doc": msgpack.encode({**document, "request": {"model": "p/m"}})})
    found = await store.get(record.id)
    assert found is not None
    assert (found.state, found.attempt, found.timing) == (State.QUEUED, 1, {})


# ---- jobs


def test_a_job_is_msgpack_and_an_exception_in_it_is_its_text() -> None:
    assert unpack_job(pack_job({"f": "load", "a": ("id",), "k": {}})) == {"f": "load", "a": ["id"], "k": {}}
    assert unpack_job(pack_job({"r": ValueError("why")})) == {"r": "why"}
    with pytest.raises(msgspec.DecodeError):
        unpack_job(pickle.dumps({"f": "load"}))
