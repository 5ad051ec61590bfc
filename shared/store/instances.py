"""The records of instances.  All changes to records go through this module."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Collection, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, assert_never

import msgspec
from msgspec import Struct, msgpack
from redis.asyncio import Redis

from shared.errors import LoadFailed
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.store import keys
from shared.store.keys import CRASH_MEMORY_S, FAILURE_MEMORY_S, RETAIN_S
from shared.store.pages import pages
from shared.store.queue import DELIVERY_S, delivery
from shared.store.script import Script
from shared.telemetry import log, tally

HISTORY_N = 256  # revisions per read
PAGE_N = 200
FIELDS = ["rev", "instance_id", "at", "doc", "stop"]  # fields of the hash that form an Instance
ENGINE_LOGS_N = 256  # about 35 KiB each
NO_LIMITS = (2**53, 2**53)
UNKNOWN_RATE_S, LONGEST_RETRY_S = 30, 300
STATES: dict[bytes | None, State] = {state.value.encode(): state for state in State if state not in TERMINAL}

Created = Literal[
    "created", "remembered", "joined", "failed", "full", "crashed", "not desired", "name taken", "no lease"
]
Rewritten = Literal["written", "there", "newer", "name taken"]


class Fenced(Exception):
    """Another writer has changed the record.  Nothing was written."""


class NoLease(Exception):
    """The worker of the instance holds no lease."""


class Full(Exception):
    """The queue is full (`limit` waiting loads).  One leaves about every `retry_after_s` seconds."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(limit)
        self.limit, self.retry_after_s = limit, retry_after_s


class NameTaken(Exception):
    """The requested instance id belongs to another live instance."""


class NotDesired(Exception):
    """The instance to restore was unloaded meanwhile."""


class Crashed(Exception):
    """The files of the model crashed the engine recently, for `reason`.  They are blocked for `left_s` more seconds."""

    def __init__(self, reason: str, left_s: int) -> None:
        super().__init__(reason)
        self.reason, self.left_s = reason, left_s


class FailedRecently(Exception):
    """The last load of the model on demand failed.  The next one may begin in `left_s` seconds."""

    def __init__(self, id_: str, left_s: int) -> None:
        super().__init__(id_)
        self.id, self.left_s = id_, left_s


class StopRequested(Exception):
    """The instance cannot become loaded, because a stop was requested before."""


class Remembered(Struct, frozen=True):
    """The load of an Idempotency-Key, and the digest of the request that created it."""

    id: str
    digest: str


class KeyTaken(Exception):
    """A load with this Idempotency-Key already exists."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__(remembered)
        self.remembered = remembered


class Joined(Exception):
    """Another load takes the place of this one: an identical one under way, whose requester had left, or for a load on
    demand any instance of the model that is queued, loading or loaded."""

    def __init__(self, id_: str) -> None:
        super().__init__(id_)
        self.id = id_


class Head(NamedTuple):
    """The fields of a live instance that are stored outside its document; `epoch` is "" until it is claimed."""

    id: str
    worker: str
    state: State
    epoch: str


class Instances:
    """Reads and writes records.  Every method raises what UNAVAILABLE lists if Redis does not answer.

    `restores`: whether instances that this process loads stay desired until they are unloaded.
    """

    def __init__(self, redis: Redis, *, restores: bool = True) -> None:
        self.restores = restores
        self._redis = redis
        self._create = Script(redis, "create", "enqueue")
        self._commit = Script(redis, "commit")
        self._rewrite = Script(redis, "rewrite")
        self._read = Script(redis, "read")
        self._stop = Script(redis, "stop")
        self._forget_desired = Script(redis, "forget_desired")
        self._engine_log = Script(redis, "engine_log")

    # ---- writing

    async def create(
        self,
        instance: Instance,
        *,
        at_most: tuple[int, int] = NO_LIMITS,
        key: str = "",
        digest: str = "",
        joins: str = "",
        fingerprint: str = "",
        restores: str = "",
        without: Collection[str] = (),
        deliver: bool = False,
    ) -> Instance:
        """Write a queued record under its instance_id, or if that is "", the first free of `key`, `key:2`, `key:3`, ...

        `at_most` limits the queue of its worker, and the whole queue.  `key` and `digest` are the digests of an
        Idempotency-Key and of its request: only the first call with a key writes, the others raise KeyTaken.
        `joins` is the digest of a request that joins an identical load under way whose requester has left (`leave`):
        then raises Joined, and the load has a requester again.  `fingerprint` is the model's, `restores` the id of the
        load to restore.  `deliver`: write a delivery too.

        A load on demand joins the oldest instance of its model that is queued, loading or loaded, except those in
        `without`, whose failure does not count either.

        Raises FailedRecently if the last load on demand of the model failed, NoLease if the worker holds no lease or
        Redis lost its catalog, Full, NameTaken, NotDesired, and, unless the request has `force`, Crashed.
        """
        worker_limit, limit = at_most
        rest: list[Any]
        first, *rest = await self._create(
            *_keys(instance.id),
            keys.lease(instance.worker),
            keys.idempotency(key),
            keys.crash(fingerprint),
            keys.catalog(instance.worker),
            keys.left(joins),
            keys.copies(instance.full_key),
            keys.failure(fingerprint),
            id=instance.id,
            doc=pack(instance),
            worker=instance.worker,
            model=instance.model,
            instance_id=instance.instance_id or None,
            digest=digest or None,
            joins=bool(joins),
            of=instance.full_key,
            on_demand=instance.on_demand,
            without=[*without],
            worker_limit=worker_limit,
            limit=limit,
            ignore_crash=instance.request.force or not fingerprint,
            restores=restores or None,
            entry=delivery(instance.id) if deliver else None,
            expires_ms=DELIVERY_S * 1000,
            retain_s=RETAIN_S,
            counts=tally.accepted(instance),
        )
        outcome: Created = first.decode()
        match outcome:
            case "created":
                return msgspec.structs.replace(
                    instance, instance_id=rest[0].decode(), created_at=int(rest[1]) / 1e6, rev=1
                )
            case "remembered":
                raise KeyTaken(Remembered(rest[1].decode(), rest[0].decode()))
            case "joined":
                raise Joined(rest[0].decode())
            case "failed":
                raise FailedRecently(rest[0].decode(), int(rest[1]))
            case "full":
                most, departures, within_us = map(int, rest)
                rate_s = within_us / 1e6 / departures if departures else UNKNOWN_RATE_S
                raise Full(most, min(LONGEST_RETRY_S, max(1, math.ceil(rate_s))))
            case "crashed":
                raise Crashed(rest[0].decode(), int(rest[1]))
            case "not desired":
                raise NotDesired(instance.instance_id)
            case "name taken":
                raise NameTaken(instance.instance_id)
            case "no lease":
                raise NoLease(f"worker '{instance.worker}' holds no lease")
            case _:
                assert_never(outcome)

    async def leave(self, departures: Mapping[str, str]) -> None:
        """Note that the requesters of loads have left.  `departures`: id of the load -> digest of its request."""
        async with self._redis.pipeline(transaction=True) as pipe:
            for id_, digest in departures.items():
                pipe.hset(keys.left(digest), id_, "")
                pipe.expire(keys.left(digest), RETAIN_S)
            await pipe.execute()

    async def remembered(self, key: str) -> Remembered | None:
        """Return the load of the Idempotency-Key with this digest; None if there is none."""
        id_, digest = await self._redis.hmget(keys.idempotency(key), ["id", "digest"])  # type: ignore[misc]
        return None if id_ is None or digest is None else Remembered(id_.decode(), digest.decode())

    async def commit(self, old: Instance, new: Instance) -> tuple[Instance, float]:
        """Replace `old` by `new`; return `new` with its revision, and the time of Redis in seconds.

        If `new` is queued, the load is requeued.  Raises Fenced, and StopRequested if `new` is loaded and a stop was
        requested before.
        """
        assert old.id == new.id
        has_moved = new.state is not old.state
        now = await self._commit(
            *_keys(new.id),
            id=new.id,
            rev=old.rev,
            doc=pack(new),
            epoch=new.epoch or "",
            state=new.state.value if has_moved else None,
            ended=new.state in TERMINAL,
            requeued_at=new.worker if new.state is State.QUEUED else None,
            failed=_failure(new) if has_moved else None,
            forgets=new.state is State.LOADED,
            remember_s=FAILURE_MEMORY_S,
            desired=_is_desired(new) if has_moved and self.restores else None,
            retain_s=RETAIN_S,
            counts=tally.moved(old, new),
        )
        if now is None:
            raise Fenced(f"{new.id} is no longer at revision {old.rev}")
        if now == b"stop":
            raise StopRequested(f"a stop of {new.id} was requested")
        return msgspec.structs.replace(new, rev=old.rev + 1), int(now) / 1e6

    async def rewrite(self, instance: Instance) -> Rewritten:
        """Write the record of a loaded instance again if Redis lost the record or its last revisions."""
        reply = await self._rewrite(
            *_keys(instance.id)[:4],
            id=instance.id,
            instance_id=instance.instance_id,
            of=instance.full_key,
            rev=instance.rev,
            worker=instance.worker,
            at=f"{instance.created_at * 1e6:.0f}",
            doc=pack(instance),
            epoch=instance.epoch or "",
            retain_s=RETAIN_S,
        )
        outcome: Rewritten = reply.decode()
        return outcome

    async def request_stop(self, id_: str, *, unless_loaded: bool = False) -> State | None:
        """Request that the worker stop an instance.

        Returns the state at the time of the request, None if there is no such record.  `unless_loaded`: do nothing if
        the load has ended.
        """
        state = await self._stop(keys.instance(id_), id=id_, unless_loaded=unless_loaded)
        return None if state is None else State(state.decode())

    # ---- desired instances

    async def desired(self, worker: str) -> dict[str, str]:
        """Return the desired instances of a worker: instance_id -> id of the load that created it."""
        ids: dict[bytes, bytes] = await self._redis.hgetall(keys.desired(worker))  # type: ignore[misc]
        return {name.decode(): id_.decode() for name, id_ in ids.items()}

    async def forget_desired(self, instance: Instance) -> None:
        """Remove an instance from the desired ones of its worker, unless another load has its name meanwhile."""
        await self._forget_desired(keys.desired(instance.worker), instance_id=instance.instance_id, id=instance.id)

    async def forget_desired_everywhere(self, instance_id: str) -> bool:
        """Remove an instance from the desired ones of all workers; return whether any worker had it."""
        names = [name.decode() for name in await self._redis.zrange(keys.WORKERS, 0, -1)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hdel(keys.desired(name), instance_id)
            return any(await pipe.execute())

    async def clear_desired(self, worker: str) -> None:
        """Remove all desired instances of a worker."""
        await self._redis.delete(keys.desired(worker))

    async def write_uses(self, worker: str, used: Mapping[str, float]) -> None:
        """Replace the last uses of the desired instances of a worker: id of the load -> seconds since the epoch."""
        async with self._redis.pipeline(transaction=True) as pipe:
            pipe.delete(keys.used(worker))
            if used:
                pipe.hset(keys.used(worker), mapping={id_: repr(at) for id_, at in used.items()})
                pipe.expire(keys.used(worker), RETAIN_S)
            await pipe.execute()

    async def uses(self, worker: str) -> dict[str, float]:
        """Return the last uses of the desired instances of a worker, as written last."""
        used: dict[bytes, bytes] = await self._redis.hgetall(keys.used(worker))  # type: ignore[misc]
        return {id_.decode(): float(at) for id_, at in used.items()}

    # ---- models that crashed the engine

    async def remember_crash(self, fingerprint: str, reason: str) -> None:
        """Block a model that crashed the engine for CRASH_MEMORY_S seconds."""
        await self._redis.set(keys.crash(fingerprint), reason, ex=CRASH_MEMORY_S)

    async def forget_crash(self, fingerprint: str) -> None:
        """Unblock a model."""
        await self._redis.delete(keys.crash(fingerprint))

    # ---- the engine's log

    async def write_engine_log(self, id_: str, text: str, worker: str) -> None:
        """Store the engine's log of a load with its record, until ENGINE_LOGS_N later logs have been stored.

        Does nothing if the load belongs to another worker meanwhile.
        """
        await self._engine_log(
            keys.instance(id_),
            keys.LOGS,
            keys.INSTANCES,
            id=id_,
            text=text,
            worker=worker,
            kept=ENGINE_LOGS_N,
            retain_s=RETAIN_S,
        )

    async def engine_log(self, id_: str) -> bytes | None:
        """Return the engine's log of a load; None if there is none."""
        text: bytes | None = await self._redis.hget(keys.instance(id_), "engine")  # type: ignore[misc]
        return text

    # ---- reading

    async def get(self, id_: str) -> Instance | None:
        """Return a record; None if it does not exist."""
        fields: list[Any] = await self._redis.hmget(keys.instance(id_), FIELDS)  # type: ignore[misc]
        return unpack(id_, *fields)

    async def many(self, ids: Sequence[str]) -> list[Instance]:
        """Return the records with these ids, without those that do not exist."""
        records = (unpack(id_, *fields) for id_, fields in await self._fields(ids, FIELDS))
        return [instance for instance in records if instance is not None]

    async def _fields(self, ids: Sequence[str], fields: Sequence[str]) -> list[tuple[str, list[Any]]]:
        """Return the requested fields of records, by id; None for each field of a record that does not exist."""
        rows: list[tuple[str, list[Any]]] = []
        for page in pages(ids):
            rows += zip(page, await self._read(fields=fields, ids=page), strict=True)
        return rows

    async def newest(self) -> AsyncGenerator[Instance, None]:
        """Yield the records of the last RETAIN_S seconds, newest first, then the older live records."""
        seen: set[str] = set()
        before: Any = "+inf"
        while page := await self._redis.zrevrangebyscore(keys.JOBS, before, "-inf", 0, PAGE_N, withscores=True):
            ids = [id_.decode() for id_, _ in page]
            seen.update(ids)
            for instance in await self.many(ids):
                yield instance
            before = f"({page[-1][1]:.0f}"
        old = [instance for instance in await self.live() if instance.id not in seen]
        for instance in sorted(old, key=lambda i: i.created_at, reverse=True):
            yield instance

    async def live(self, ids: Sequence[str] | None = None) -> list[Instance]:
        """Return all instances that are not in a terminal state, or those among `ids`, in the order accepted."""
        records = await self.many(await self._members(keys.INSTANCES) if ids is None else ids)
        live = [instance for instance in records if instance.state not in TERMINAL]  # some ended during the read
        return sorted(live, key=lambda instance: instance.created_at)

    async def ids(self) -> set[str]:
        """Return the ids of all instances that are not in a terminal state."""
        return {*await self._members(keys.INSTANCES)}

    async def has_copies(self, full_key: str) -> bool:
        """Return whether the model with this full key has an instance that is not terminal."""
        return bool(await self._redis.scard(keys.copies(full_key)))  # type: ignore[misc]

    async def live_at(self, worker: str, ids: Iterable[str] = ()) -> list[Instance]:
        """Return the live instances of a worker, in the order accepted.  `ids` are further instances to consider."""
        records = await self.live([*{*await self._members(keys.instances_at(worker)), *ids}])
        return [instance for instance in records if instance.worker == worker]

    async def heads(self) -> list[Head]:
        """Return the Head of every live instance."""
        rows = await self._fields(await self._members(keys.INSTANCES), ("worker", "state", "epoch"))
        return [
            Head(id_, worker.decode(), STATES[state], (epoch or b"").decode())
            for id_, (worker, state, epoch) in rows
            if worker is not None and state in STATES
        ]

    async def _members(self, key: str) -> list[str]:
        ids: set[bytes] = await self._redis.smembers(key)  # type: ignore[misc]
        return [id_.decode() for id_ in ids]

    async def named(self, instance_id: str) -> str | None:
        """Return the id of the load of the live instance with this instance_id; None if there is none."""
        id_: bytes | None = await self._redis.hget(keys.NAMES, instance_id)  # type: ignore[misc]
        return None if id_ is None else id_.decode()

    async def history(self, instance: Instance, after: str = "0") -> list[tuple[str, Instance]]:
        """Return up to HISTORY_N revisions after entry `after` of the log of a record, oldest first, with entry ids."""
        entries = await self._redis.xrange(keys.log_of(instance.id), min=f"({after}", count=HISTORY_N)
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
        """Return the id of the last entry of the log of a record; "0" if the log is empty."""
        entries = await self._redis.xrevrange(keys.log_of(id_), count=1)
        return entries[0][0].decode() if entries else "0"

    async def revisions(self, ids: list[str]) -> list[int | None]:
        """Return the revision of each record; None if it does not exist."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hget(keys.instance(id_), "rev")
            return [None if rev is None else int(rev) for rev in await pipe.execute()]


def _keys(id_: str) -> list[str]:
    return [keys.instance(id_), keys.log_of(id_), keys.NAMES, keys.INSTANCES, keys.COUNTERS]


def _failure(new: Instance) -> str | None:
    """Return the key that remembers a failure of the model, if an instance in a new state sets or deletes it.

    A load on demand sets it by its failure, unless other workers or the next moment may have another outcome.
    """
    fingerprint = "" if new.source is None else new.source.fingerprint
    match new.state:
        case State.LOADED:
            is_concerned = True
        case State.FAILED:
            is_load = new.on_demand and new.loaded_at is None
            error = new.error
            is_concerned = (
                is_load and error is not None and error.type == LoadFailed.type and error.code != "worker_lost"
            )
        case State.QUEUED | State.LOADING | State.UNLOADING | State.UNLOADED | State.CANCELLED | State.LOST:
            is_concerned = False
        case _:
            assert_never(new.state)
    return keys.failure(fingerprint) if fingerprint and is_concerned else None


def _is_desired(new: Instance) -> bool | None:
    """Return whether an instance in a new state is desired; None if the state does not change that, such as `lost`."""
    match new.state:
        case State.LOADED:
            return True
        case State.UNLOADED | State.CANCELLED:
            return False
        case State.FAILED:
            return None if new.loaded_at is None else False
        case State.QUEUED | State.LOADING | State.UNLOADING | State.LOST:
            return None
        case _:
            assert_never(new.state)


def pack(instance: Instance) -> bytes:
    """Return the document of a record, without the values that are stored in separate fields."""
    return msgpack.encode(
        msgspec.structs.replace(instance, instance_id="", created_at=0.0, rev=0, stop_requested=False)
    )


def unpack(
    id_: str, rev: bytes | None, instance_id: bytes, at: bytes, doc: bytes, stop: bytes | None
) -> Instance | None:
    """Return the record with these FIELDS; None if there is none, or if it cannot be decoded (newer version)."""
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
