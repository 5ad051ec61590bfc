"""Redis: every key (their scripts are in `shared.scripts`), and the one way to change an instance's record.

  inst:{id}         hash    rev, instance_id, worker, at (creation, Redis' clock, microseconds), doc (msgpack), state,
                            epoch, stop (a wish), engine (log lines)  expires RETAIN_S after a terminal state
  inst:{id}:log     stream  rev, doc: one entry a revision     expires with inst:{id}
  insts             set     ids of instances that are not terminal; insts:{worker} those of one worker
  logs              list    ids of those that have `engine`: of those that ended the last ENGINE_LOGS_N keep it
                                                              expires RETAIN_S after the last
  names             hash    instance_id -> id, while not terminal
  queued            set     ids in state queued; queued:{worker} those of one worker
  pace              list    when the last 16 left the queue (microseconds); pace:{worker} those of one worker
                                                              expires an hour after the last
  jobs              zset    id -> creation (microseconds), of the last RETAIN_S; expires RETAIN_S after the last
  idem:{digest}     hash    id, and digest of the request, that came with an Idempotency-Key; expires after RETAIN_S
  crashed:{digest}  string  why a model (Model.fingerprint) crashed the engine; expires after CRASH_MEMORY_S
  wanted:{worker}   hash    instance_id -> id of what it is to hold; expires RETAIN_S after its last beat
  workers           zset    name -> time of its last beat (seconds); forgotten after RETAIN_S
  lease:{worker}    string  epoch of its process               expires a lease after its last beat
  worker:{worker}   string  WorkerSnapshot (msgpack)           expires with the lease
  catalog:{worker}  string  list[Model] (msgpack)              expires RETAIN_S after the last beat
  counters          hash    instances that came to each state, and how often one was requeued
  tallies           hash    what /metrics adds up besides: "family|label|..." (`telemetry.tally`) -> a whole number
  tallied:{id}      string  number of the last batch that a process added to `tallies`; expires RETAIN_S after it
  arq:*             arq's own  queue, jobs and health check of each worker; queues expire RETAIN_S after the last entry
  wake:{worker}     channel "" for a delivery in its queue, an id for a wish
  news              channel ids whose record changed
  requeued          channel ids of loads that were handed back to the queue

Several keys are touched by one script, so Redis Cluster is not supported.  Scripts may be repeated after a lost
reply: each finds out that its work was done and answers as before.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
import uuid
from collections import Counter
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Literal, NamedTuple

import msgspec
from arq.connections import ArqRedis
from arq.jobs import Job, serialize_job
from msgspec import Struct, msgpack
from redis.asyncio import BlockingConnectionPool
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.memory import Taken
from shared.schema.model import Model
from shared.schema.snapshot import Sizing, WorkerSnapshot
from shared.scripts import (
    ANNOUNCE,
    CATALOG,
    COMMIT,
    CREATE,
    DELIVER,
    ENGINE_LOG,
    ENQUEUE,
    READ,
    RELEASE,
    RENEW,
    REWRITE,
    STOP,
    TALLY,
    UNWANT,
    WORKERS,
)
from shared.telemetry import log, tally

RETAIN_S = 24 * 3600
CRASH_MEMORY_S = 600
DELIVERY_S = 3600  # arq's entry; a record that is queued for longer is found by its worker's beat
SIZED_S = 30  # a large vocabulary takes the engine a second, and others may be before us
HISTORY_N = 256  # revisions that are read at once
PAGE_N = 200
RECORD = ["rev", "instance_id", "at", "doc", "stop"]  # what of the hash makes an Instance
READ_N = 500  # records, or workers, that one script reads: 2 ms, in which Redis does nothing else
ENGINE_LOGS_N = 256  # some 35 KiB each
NO_LIMITS = (2**53, 2**53)
UNKNOWN_PACE_S, LONGEST_RETRY_S = 30, 300
STATES: dict[bytes | None, State] = {state.value.encode(): state for state in State if state not in TERMINAL}
NEWS, REQUEUED = "news", "requeued"
UNAVAILABLE = (RedisError, OSError)  # redis-py lets a refused socket through as an OSError


class Fenced(Exception):
    """Somebody else moved this record on; what was to be written is void."""


class NoLease(Exception):
    """The worker that was to take an instance is gone."""


class Full(Exception):
    """As many instances wait as may: `limit`.  One leaves about every `retry_after_s` seconds."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(limit)
        self.limit, self.retry_after_s = limit, retry_after_s


class NameTaken(Exception):
    """Another instance lives under the id that this one was to have."""


class Unwanted(Exception):
    """What was to be restored was unloaded meanwhile."""


class Crashed(Exception):
    """The model's files crashed the engine lately: `reason`.  They are not tried for `left_s` seconds more."""

    def __init__(self, reason: str, left_s: int) -> None:
        super().__init__(reason)
        self.reason, self.left_s = reason, left_s


class StopWished(Exception):
    """What was to become loaded is to be stopped: that wish came first."""


class Remembered(Struct, frozen=True):
    """What an Idempotency-Key stands for: a load, and the digest of the request that made it."""

    id: str
    digest: str


class KeyTaken(Exception):
    """The Idempotency-Key has made a load already."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__(remembered)
        self.remembered = remembered


class Worker(Struct, frozen=True, kw_only=True):
    """A worker as Redis knows it: `snapshot` is None while it holds no lease."""

    name: str
    epoch: str | None
    snapshot: WorkerSnapshot | None
    lease_left_s: float = 0.0


class Head(NamedTuple):
    """What a live instance's record says without its document; `epoch` is "" before it is claimed."""

    id: str
    worker: str
    state: State
    epoch: str


class Readings(Struct, frozen=True, kw_only=True):
    """What the pool is and has done, as Redis has it: `counters` and `tallies` as the head of this file says."""

    workers: list[Worker]
    counters: dict[str, int]
    tallies: dict[str, int]
    queued: int
    queued_at: dict[str, int]  # by worker
    live: dict[tuple[str, str], int]  # instances by worker and state


def queue_of(worker: str) -> str:
    """The arq queue of a worker."""
    return f"arq:queue:{worker}"


def pack_job(value: dict[str, Any]) -> bytes:
    """arq's job serializer: msgpack, since unpickling would run whatever is written into Redis.

    An exception (a job that failed) becomes its text.
    """
    return msgpack.encode(value, enc_hook=str)


def unpack_job(data: bytes) -> dict[str, Any]:
    found: dict[str, Any] = msgpack.decode(data, type=dict[str, Any])
    return found


def check_cancelled() -> None:
    """Raise CancelledError in a task that was cancelled without learning of it; for loops without end.

    `asyncio.wait_for`, through which redis-py writes, can lose a cancellation before Python 3.12 (cpython #86296).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def connect(url: str) -> ArqRedis:
    """A client for a redis://, rediss:// or unix:// URL.  Nothing is sent yet.

    At most 16 connections; a caller waits up to 5 s for one, a command up to 5 s for its reply.  A command whose
    connection broke is repeated on a new one a few times within about half a second.
    """
    options: dict[str, Any] = {}
    if not url.startswith("unix:"):
        options = {"socket_keepalive": True}
    if url.startswith("rediss:"):
        options["ssl_check_hostname"] = True
    broken: tuple[Any, ...] = (RedisConnectionError, OSError)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=16,
        timeout=5,
        socket_timeout=5,
        socket_connect_timeout=2,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.01), 4, broken),
        retry_on_error=list(broken),
        **options,
    )
    pool.connection_class = _told(pool.connection_class)
    return ArqRedis(pool, job_serializer=pack_job, job_deserializer=unpack_job)


def _told(kind: Any) -> Any:
    """A class of connections that tells of a closed one as the rest of redis-py 5.3 expects it.

    Writing to one raises an OSError on asyncio's loop, but a RuntimeError on uvloop ("the handler is closed",
    uvloop/handles/handle.pyx), which would be taken for a fault of ours.  And one that is dropped while it is being
    made would be made anew from within, with all the retries at each level: 16 commands at a server that accepts
    connections and drops them had no answer after 12 s.
    """

    class Told(kind):  # type: ignore[misc]
        is_being_made = False

        async def connect(self) -> None:
            if self.is_connected:
                return
            if self.is_being_made:
                raise RedisConnectionError("Connection dropped while it was being made.")
            self.is_being_made = True
            try:
                await super().connect()
            finally:
                self.is_being_made = False

        async def send_packed_command(self, *args: Any, **options: Any) -> None:
            try:
                await super().send_packed_command(*args, **options)
            except RuntimeError as e:
                raise RedisConnectionError(str(e)) from e

    return Told


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[ArqRedis]:
    redis = connect(url)
    try:
        yield redis
    finally:
        with suppress(*UNAVAILABLE):  # what hangs never answers the end of TLS
            await redis.aclose(close_connection_pool=True)


class Store:
    """The records in Redis.  Every method raises what UNAVAILABLE lists when Redis does not answer.

    `restores`: what this process has loaded is wanted until it is unloaded.
    """

    def __init__(self, redis: ArqRedis, lease_s: float, *, restores: bool = True) -> None:
        self.redis = redis
        self.lease_s = lease_s
        self.restores = restores
        self._engine_log = redis.register_script(ENGINE_LOG)
        self._create = redis.register_script(ENQUEUE + CREATE)
        self._deliver = redis.register_script(ENQUEUE + DELIVER)
        self._read = redis.register_script(READ)
        self._rewrite = redis.register_script(REWRITE)
        self._commit = redis.register_script(COMMIT)
        self._stop = redis.register_script(STOP)
        self._unwant = redis.register_script(UNWANT)
        self._renew = redis.register_script(RENEW)
        self._announce = redis.register_script(ANNOUNCE)
        self._release = redis.register_script(RELEASE)
        self._catalog = redis.register_script(CATALOG)
        self._tally = redis.register_script(TALLY)
        self._workers = redis.register_script(WORKERS)

    # ---- instances

    async def create(
        self,
        instance: Instance,
        *,
        at_most: tuple[int, int] = NO_LIMITS,
        key: str = "",
        digest: str = "",
        fingerprint: str = "",
        restores: str = "",
        deliver: bool = False,
    ) -> Instance:
        """Write a queued record under its instance_id, or else the lowest free name of its key: `key`, `key:2`, ...

        `at_most` may be queued at its worker, and in all.  With the digests of an Idempotency-Key and of the request
        that came with it, only the first call writes; the others raise KeyTaken.  `fingerprint` is the model's, and
        `restores` the id of the load that it is to bring back.  With `deliver` its delivery is written too.

        Raises NoLease if its worker is gone or Redis was emptied of what it publishes, Full, NameTaken, Unwanted, and
        Crashed unless the request has `force`.
        """
        name, force = instance.instance_id, "1" if instance.request.force or not fingerprint else ""
        outcome, *found = await self._create(
            keys=[
                *_keys(instance.id),
                f"lease:{instance.worker}",
                f"idem:{key}",
                f"crashed:{fingerprint}",
                f"catalog:{instance.worker}",
            ],
            args=[
                instance.id,
                instance.model,
                _pack(instance),
                instance.worker,
                digest,
                *at_most,
                RETAIN_S,
                name,
                force,
                restores,
                _entry("load", instance.id) if deliver else "",
                DELIVERY_S * 1000,
                *_pairs(tally.accepted(instance)),
            ],
        )
        match outcome:
            case b"created":
                return msgspec.structs.replace(
                    instance, instance_id=found[0].decode(), created_at=int(found[1]) / 1e6, rev=1
                )
            case b"remembered":
                raise KeyTaken(Remembered(found[1].decode(), found[0].decode()))
            case b"full":
                limit, departures, within_us = map(int, found)
                pace = within_us / 1e6 / departures if departures else UNKNOWN_PACE_S
                raise Full(limit, min(LONGEST_RETRY_S, max(1, math.ceil(pace))))
            case b"crashed":
                raise Crashed(found[0].decode(), int(found[1]))
            case b"unwanted":
                raise Unwanted(name)
            case b"name taken":
                raise NameTaken(name)
        raise NoLease(f"worker '{instance.worker}' holds no lease")

    async def remembered(self, key: str) -> Remembered | None:
        """What the Idempotency-Key with this digest stands for."""
        id_, digest = await self.redis.hmget(f"idem:{key}", ["id", "digest"])  # type: ignore[misc]
        return None if id_ is None or digest is None else Remembered(id_.decode(), digest.decode())

    async def commit(self, old: Instance, new: Instance) -> tuple[Instance, float]:
        """Replace `old` by `new`; returns it with its revision, and Redis' time in seconds.

        A queued one that replaces another was requeued.  Raises Fenced, and StopWished where `new` is loaded and
        somebody wished it stopped before.
        """
        assert old.id == new.id
        retain = RETAIN_S if new.state in TERMINAL else ""
        state = new.state.value if new.state is not old.state else ""
        requeued_at = new.worker if new.state is State.QUEUED else ""
        now = await self._commit(
            keys=_keys(new.id),
            args=[
                new.id,
                old.rev,
                old.rev + 1,
                _pack(new),
                state,
                retain,
                requeued_at,
                _wanted(new) if state and self.restores else "",
                new.epoch or "",
                *_pairs(tally.moved(old, new)),
            ],
        )
        if now is None:
            raise Fenced(f"{new.id} is no longer at revision {old.rev}")
        if now == b"stop":
            raise StopWished(f"{new.id} is to be stopped")
        return msgspec.structs.replace(new, rev=old.rev + 1), int(now) / 1e6

    async def deliver(self, instance: Instance) -> None:
        """Put a queued instance into its worker's queue, and ring.

        Where that fails the record stands: its worker finds it at one of its next beats.
        """
        try:
            await self._enqueue(
                instance.worker, f"{instance.id}:{instance.rev}", _entry("load", instance.id), DELIVERY_S
            )
        except UNAVAILABLE as e:
            log.get("store").warning("delivery lost", action="delivery_lost", **instance.ids, error=str(e))

    async def sized(self, worker: str, sizing: Sizing) -> list[Taken] | None:
        """What a worker's engine says that a load would take; None where it does not say within SIZED_S."""
        id_ = uuid.uuid4().hex
        await self._enqueue(worker, id_, _entry("size", msgpack.encode(sizing)), SIZED_S)
        job = Job(id_, self.redis, queue_of(worker), unpack_job)
        try:
            found: bytes = await job.result(timeout=SIZED_S, poll_delay=0.02)
        except TimeoutError:
            return None
        return msgpack.decode(found, type=list[Taken] | None)

    async def _enqueue(self, worker: str, id_: str, entry: bytes, within_s: int) -> None:
        await self._deliver(args=[worker, id_, entry, within_s * 1000, RETAIN_S])

    async def rewrite(self, instance: Instance) -> Literal["written", "there", "newer", "name taken"]:
        """Write the record of a loaded instance again that Redis lost, or of which it lost the last revisions; nothing
        where it did not."""
        found: Any = await self._rewrite(
            keys=_keys(instance.id),
            args=[
                instance.id,
                instance.instance_id,
                instance.rev,
                instance.worker,
                round(instance.created_at * 1e6),
                _pack(instance),
                RETAIN_S,
                instance.epoch or "",
            ],
        )
        outcome: Literal["written", "there", "newer", "name taken"] = found.decode()
        return outcome

    async def wanted(self, worker: str) -> dict[str, str]:
        """What a worker is to hold: instance_id -> id of the load that made it."""
        found: dict[bytes, bytes] = await self.redis.hgetall(f"wanted:{worker}")  # type: ignore[misc]
        return {name.decode(): id_.decode() for name, id_ in found.items()}

    async def unwant(self, instance: Instance) -> None:
        """Have its worker want an instance no more."""
        await self._unwant(keys=[f"wanted:{instance.worker}"], args=[instance.instance_id, instance.id])

    async def unwant_everywhere(self, instance_id: str) -> bool:
        """Have no worker bring an instance back; whether one would have."""
        names = [name.decode() for name in await self.redis.zrange("workers", 0, -1)]
        async with self.redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hdel(f"wanted:{name}", instance_id)
            return any(await pipe.execute())

    async def want_nothing(self, worker: str) -> None:
        await self.redis.delete(f"wanted:{worker}")

    async def remember_crash(self, fingerprint: str, reason: str) -> None:
        """Have what crashed the engine refused for CRASH_MEMORY_S."""
        await self.redis.set(f"crashed:{fingerprint}", reason, ex=CRASH_MEMORY_S)

    async def forget_crash(self, fingerprint: str) -> None:
        await self.redis.delete(f"crashed:{fingerprint}")

    async def write_engine_log(self, id_: str, text: str, worker: str) -> None:
        """Keep what the engine said in a load with its record, until ENGINE_LOGS_N later ones have ended; nothing where
        the load is another worker's by now."""
        args: list[str | int] = [text, id_, ENGINE_LOGS_N, RETAIN_S, worker]
        await self._engine_log(keys=[f"inst:{id_}", "logs", "insts"], args=args)

    async def engine_log(self, id_: str) -> bytes | None:
        found: bytes | None = await self.redis.hget(f"inst:{id_}", "engine")  # type: ignore[misc]
        return found

    async def get(self, id_: str) -> Instance | None:
        fields: list[Any] = await self.redis.hmget(f"inst:{id_}", RECORD)  # type: ignore[misc]
        return _unpack(id_, *fields)

    async def many(self, ids: Sequence[str]) -> list[Instance]:
        """The records of those of `ids` that exist."""
        found = (_unpack(id_, *fields) for id_, fields in await self._fields(ids, RECORD))
        return [instance for instance in found if instance is not None]

    async def _fields(self, ids: Sequence[str], fields: Sequence[str]) -> list[tuple[str, list[Any]]]:
        """Some fields of many records, by id; of one that does not exist each is None."""
        found: list[tuple[str, list[Any]]] = []
        for page in _pages(ids):
            found += zip(page, await self._read(args=[len(fields), *fields, *page]), strict=True)
        return found

    async def newest(self) -> AsyncGenerator[Instance, None]:
        """The records of the last RETAIN_S, newest first, then the older ones that live."""
        seen: set[str] = set()
        before: Any = "+inf"
        while page := await self.redis.zrevrangebyscore("jobs", before, "-inf", 0, PAGE_N, withscores=True):
            ids = [id_.decode() for id_, _ in page]
            seen.update(ids)
            for instance in await self.many(ids):
                yield instance
            before = f"({page[-1][1]:.0f}"
        old = [instance for instance in await self.live() if instance.id not in seen]
        for instance in sorted(old, key=lambda i: i.created_at, reverse=True):
            yield instance

    async def live(self, ids: Sequence[str] | None = None) -> list[Instance]:
        """Every instance that is not in a terminal state, or those of `ids`, in no order."""
        found = await self.many(await self._members("insts") if ids is None else ids)
        return [instance for instance in found if instance.state not in TERMINAL]  # some ended while we read

    async def live_at(self, worker: str, ids: Iterable[str] = ()) -> list[Instance]:
        """The live instances that are a worker's, also of `ids`, which it holds."""
        found = await self.live([*{*await self._members(f"insts:{worker}"), *ids}])
        return [instance for instance in found if instance.worker == worker]

    async def heads(self) -> list[Head]:
        """What there is to know of every live instance without its document."""
        rows = await self._fields(await self._members("insts"), ("worker", "state", "epoch"))
        return [
            Head(id_, worker.decode(), STATES[state], (epoch or b"").decode())
            for id_, (worker, state, epoch) in rows
            if worker is not None and state in STATES
        ]

    async def _members(self, key: str) -> list[str]:
        ids: set[bytes] = await self.redis.smembers(key)  # type: ignore[misc]
        return [id_.decode() for id_ in ids]

    async def named(self, instance_id: str) -> str | None:
        """The id of the live instance with this name."""
        id_: bytes | None = await self.redis.hget("names", instance_id)  # type: ignore[misc]
        return None if id_ is None else id_.decode()

    async def history(self, instance: Instance, after: str = "0") -> list[tuple[str, Instance]]:
        """Up to HISTORY_N revisions since entry `after` of a record's log, oldest first, each with its entry's id."""
        entries = await self.redis.xrange(f"inst:{instance.id}:log", min=f"({after}", count=HISTORY_N)
        return [
            (
                entry.decode(),
                msgspec.structs.replace(
                    msgpack.decode(fields[b"doc"], type=Instance),
                    instance_id=instance.instance_id,
                    created_at=instance.created_at,
                    rev=int(fields[b"rev"]),
                ),
            )
            for entry, fields in entries
        ]

    async def last_entry(self, id_: str) -> str:
        """The entry that a record's log ends with; the one before the first where there is none."""
        found = await self.redis.xrevrange(f"inst:{id_}:log", count=1)
        return found[0][0].decode() if found else "0"

    async def revisions(self, ids: list[str]) -> list[int | None]:
        async with self.redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hget(f"inst:{id_}", "rev")
            return [None if rev is None else int(rev) for rev in await pipe.execute()]

    async def request_stop(self, id_: str, *, unless_loaded: bool = False) -> State | None:
        """Wish that an instance be stopped; its worker acts on it.

        Returns the state in which the wish found it, None if there is no such record.  `unless_loaded`: a load that
        is over stays as it is.
        """
        state = await self._stop(keys=[f"inst:{id_}"], args=[id_, int(unless_loaded)])
        return None if state is None else State(state.decode())

    # ---- workers

    async def renew(self, snapshot: WorkerSnapshot, dead_epoch: str = "") -> Literal["held", "no catalog", "refused"]:
        """Hold the lease of a name for this epoch; refused if another epoch holds it (`dead_epoch` may be replaced).

        "no catalog": held, but Redis was emptied of what was published.
        """
        name = snapshot.name
        found = await self._renew(
            keys=[f"lease:{name}", f"worker:{name}", f"catalog:{name}", "workers"],
            args=[
                snapshot.epoch,
                dead_epoch,
                round(self.lease_s * 1000),
                msgpack.encode(snapshot),
                name,
                round(time.time()),
                RETAIN_S,
            ],
        )
        return ("refused", "no catalog", "held")[found]

    async def announce(self, snapshot: WorkerSnapshot) -> None:
        """Publish what is new of a worker between two beats; its lease stays as it is."""
        name = snapshot.name
        await self._announce(keys=[f"lease:{name}", f"worker:{name}"], args=[snapshot.epoch, msgpack.encode(snapshot)])

    async def release(self, worker: str, epoch: str) -> None:
        await self._release(keys=[f"lease:{worker}", f"worker:{worker}"], args=[epoch])

    async def workers(self) -> list[Worker]:
        """Every worker of the last RETAIN_S, alive or not.

        Raises what UNAVAILABLE lists also where Redis can be read but not written to, as with a full disk: workers
        cannot renew their leases then, and would be taken for dead.  It refuses a PING there as it does a write
        (src/server.c of Redis and Valkey: MISCONF, "write commands or PING").
        """
        async with self.redis.pipeline(transaction=False) as pipeline:
            pipeline.ping()
            pipeline.zrange("workers", 0, -1)
            _, found = await pipeline.execute()
        names = [name.decode() for name in found]
        rows = [row for page in _pages(names) for row in await self._workers(args=page)]
        return [
            Worker(
                name=name,
                epoch=lease.decode() if lease else None,
                snapshot=msgpack.decode(snapshot, type=WorkerSnapshot) if lease and snapshot else None,
                lease_left_s=max(0, left_ms) / 1000,
            )
            for name, (lease, snapshot, left_ms) in zip(names, rows, strict=True)
        ]

    async def publish_catalog(self, worker: str, models: list[Model], epoch: str, dead_epoch: str = "") -> str | None:
        """Publish what a worker has on its disk; returns the digest that its snapshot is to carry, None where another
        process holds its lease (`dead_epoch` does not count)."""
        data = msgpack.encode(models)
        keys = [f"lease:{worker}", f"catalog:{worker}"]
        if not await self._catalog(keys=keys, args=[epoch, dead_epoch, data, RETAIN_S]):
            return None
        return hashlib.sha256(data).hexdigest()[:16]

    async def catalog(self, worker: str) -> list[Model] | None:
        """What a worker published last; None if Redis has nothing of it."""
        data = await self.redis.get(f"catalog:{worker}")
        return None if data is None else msgpack.decode(data, type=list[Model])

    # ---- what /metrics tells

    async def add_tally(self, process: str, number: int, counts: Mapping[str, int]) -> None:
        """Add the batch of a process with this number, unless it was added before."""
        await self._tally(keys=[f"tallied:{process}"], args=[number, RETAIN_S, *_pairs(counts)])

    async def readings(self) -> Readings:
        workers = await self.workers()
        async with self.redis.pipeline(transaction=False) as pipe:
            pipe.hgetall("counters")
            pipe.hgetall("tallies")
            pipe.scard("queued")
            for worker in workers:
                pipe.scard(f"queued:{worker.name}")
            counters, tallies, queued, *queued_at = await pipe.execute()
        return Readings(
            workers=workers,
            counters={name.decode(): int(n) for name, n in counters.items()},
            tallies={name.decode(): int(n) for name, n in tallies.items()},
            queued=queued,
            queued_at={worker.name: n for worker, n in zip(workers, queued_at, strict=True)},
            live=Counter((head.worker, head.state.value) for head in await self.heads()),
        )

    # ---- notifications

    async def listen(self, channel: str, heard: Callable[[bytes], None]) -> None:
        """Call `heard` with each message on a channel, and with b"" once the subscription stands.

        Runs until Redis drops the connection (raises one of UNAVAILABLE) or the task is cancelled.  Messages sent
        while nobody listens are lost, so whoever listens looks for himself from time to time.
        """
        async with self.redis.pubsub() as pubsub:
            await pubsub.subscribe(channel)
            while True:
                message = await pubsub.get_message(timeout=5)
                check_cancelled()
                if message is not None:
                    heard(message["data"] if message["type"] == "message" else b"")


def _pages(words: Sequence[str]) -> Iterator[Sequence[str]]:
    return (words[start : start + READ_N] for start in range(0, len(words), READ_N))


def _entry(function: str, argument: str | bytes) -> bytes:
    """A call, as arq has it in its queue."""
    return serialize_job(function, (argument,), {}, None, round(time.time() * 1000), serializer=pack_job)


def _keys(id_: str) -> list[str]:
    return [f"inst:{id_}", f"inst:{id_}:log", "names", "insts", "counters"]


def _pairs(counts: Mapping[str, int]) -> list[str | int]:
    return [part for pair in counts.items() for part in pair]


def _wanted(new: Instance) -> int | str:
    """What a change of state says of whether an instance is wanted: what was lost is still."""
    if new.state is State.LOADED:
        return RETAIN_S
    was_loaded = new.state is State.FAILED and new.loaded_at is not None
    return "no" if was_loaded or new.state in (State.UNLOADED, State.CANCELLED) else ""


def _pack(instance: Instance) -> bytes:
    return msgpack.encode(
        msgspec.structs.replace(instance, instance_id="", created_at=0.0, rev=0, stop_requested=False)
    )


def _unpack(
    id_: str, rev: bytes | None, instance_id: bytes, at: bytes, doc: bytes, stop: bytes | None
) -> Instance | None:
    """The record of these fields, RECORD; None where there is none, or a newer version's that this one cannot read."""
    if rev is None:
        return None
    try:
        instance = msgpack.decode(doc, type=Instance)
    except msgspec.ValidationError as e:
        log.get("store").error("unreadable record", action="unreadable_record", job=id_, error=str(e))
        return None
    return msgspec.structs.replace(
        instance,
        instance_id=instance_id.decode(),
        created_at=int(at) / 1e6,
        rev=int(rev),
        stop_requested=stop is not None,
    )
