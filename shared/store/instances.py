"""The records of instances, and the one way to change them."""

from __future__ import annotations

import math
from collections.abc import AsyncGenerator, Iterable, Sequence
from typing import Any, Literal, NamedTuple, assert_never

import msgspec
from msgspec import Struct, msgpack
from redis.asyncio import Redis

from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.store import keys
from shared.store.keys import CRASH_MEMORY_S, RETAIN_S
from shared.store.pages import pages
from shared.store.queue import DELIVERY_S, delivery
from shared.store.script import Script
from shared.telemetry import log, tally

HISTORY_N = 256  # revisions that are read at once
PAGE_N = 200
FIELDS = ["rev", "instance_id", "at", "doc", "stop"]  # what of the hash makes an Instance
ENGINE_LOGS_N = 256  # some 35 KiB each
NO_LIMITS = (2**53, 2**53)
UNKNOWN_RATE_S, LONGEST_RETRY_S = 30, 300
STATES: dict[bytes | None, State] = {state.value.encode(): state for state in State if state not in TERMINAL}

Created = Literal["created", "remembered", "full", "crashed", "not desired", "name taken", "no lease"]
Rewritten = Literal["written", "there", "newer", "name taken"]


class Fenced(Exception):
    """Another writer moved this record on; what was to be written is void."""


class NoLease(Exception):
    """The worker that was to take an instance is gone."""


class Full(Exception):
    """The queue is full (`limit` waiting loads).  One leaves about every `retry_after_s` seconds."""

    def __init__(self, limit: int, retry_after_s: int) -> None:
        super().__init__(limit)
        self.limit, self.retry_after_s = limit, retry_after_s


class NameTaken(Exception):
    """Another instance lives under the id that this one was to have."""


class NotDesired(Exception):
    """What was to be restored was unloaded meanwhile."""


class Crashed(Exception):
    """The model's files crashed the engine recently, for `reason`.  They are not tried for `left_s` seconds more."""

    def __init__(self, reason: str, left_s: int) -> None:
        super().__init__(reason)
        self.reason, self.left_s = reason, left_s


class StopRequested(Exception):
    """What was to become loaded is to be stopped: that request came first."""


class Remembered(Struct, frozen=True):
    """What an Idempotency-Key stands for: a load, and the digest of the request that made it."""

    id: str
    digest: str


class KeyTaken(Exception):
    """The Idempotency-Key has made a load already."""

    def __init__(self, remembered: Remembered) -> None:
        super().__init__(remembered)
        self.remembered = remembered


class Head(NamedTuple):
    """What a live instance's record says without its document; `epoch` is "" before it is claimed."""

    id: str
    worker: str
    state: State
    epoch: str


class Instances:
    """Reads and writes records.  Every method raises what UNAVAILABLE lists if Redis does not answer.

    `restores`: whether what this process has loaded is desired until it is unloaded.
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
        fingerprint: str = "",
        restores: str = "",
        deliver: bool = False,
    ) -> Instance:
        """Write a queued record under its instance_id, or else the lowest free name of its key: `key`, `key:2`, ...

        `at_most` may be queued at its worker, and in all.  With the digests of an Idempotency-Key and of the request
        that came with it, only the first call writes; the others raise KeyTaken.  `fingerprint` is the model's, and
        `restores` the id of the load that it is to bring back.  With `deliver` its delivery is written too.

        Raises NoLease if its worker is gone or Redis was emptied of what it publishes, Full, NameTaken, NotDesired,
        and Crashed unless the request has `force`.
        """
        worker_limit, limit = at_most
        found: list[Any]
        first, *found = await self._create(
            *_keys(instance.id),
            keys.lease(instance.worker),
            keys.idempotency(key),
            keys.crash(fingerprint),
            keys.catalog(instance.worker),
            id=instance.id,
            doc=pack(instance),
            worker=instance.worker,
            model=instance.model,
            instance_id=instance.instance_id or None,
            digest=digest or None,
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
                    instance, instance_id=found[0].decode(), created_at=int(found[1]) / 1e6, rev=1
                )
            case "remembered":
                raise KeyTaken(Remembered(found[1].decode(), found[0].decode()))
            case "full":
                most, departures, within_us = map(int, found)
                rate_s = within_us / 1e6 / departures if departures else UNKNOWN_RATE_S
                raise Full(most, min(LONGEST_RETRY_S, max(1, math.ceil(rate_s))))
            case "crashed":
                raise Crashed(found[0].decode(), int(found[1]))
            case "not desired":
                raise NotDesired(instance.instance_id)
            case "name taken":
                raise NameTaken(instance.instance_id)
            case "no lease":
                raise NoLease(f"worker '{instance.worker}' holds no lease")
            case _:
                assert_never(outcome)

    async def remembered(self, key: str) -> Remembered | None:
        """Return what the Idempotency-Key with this digest stands for."""
        id_, digest = await self._redis.hmget(keys.idempotency(key), ["id", "digest"])  # type: ignore[misc]
        return None if id_ is None or digest is None else Remembered(id_.decode(), digest.decode())

    async def commit(self, old: Instance, new: Instance) -> tuple[Instance, float]:
        """Replace `old` by `new`; return it with its revision, and Redis' time in seconds.

        A queued one that replaces another was requeued.  Raises Fenced, and StopRequested if `new` is loaded and a
        stop was requested before.
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
            desired=_is_desired(new) if has_moved and self.restores else None,
            retain_s=RETAIN_S,
            counts=tally.moved(old, new),
        )
        if now is None:
            raise Fenced(f"{new.id} is no longer at revision {old.rev}")
        if now == b"stop":
            raise StopRequested(f"{new.id} is to be stopped")
        return msgspec.structs.replace(new, rev=old.rev + 1), int(now) / 1e6

    async def rewrite(self, instance: Instance) -> Rewritten:
        """Write the record of a loaded instance again if Redis lost it, or lost its last revisions."""
        found = await self._rewrite(
            *_keys(instance.id)[:4],
            id=instance.id,
            instance_id=instance.instance_id,
            rev=instance.rev,
            worker=instance.worker,
            at=f"{instance.created_at * 1e6:.0f}",
            doc=pack(instance),
            epoch=instance.epoch or "",
            retain_s=RETAIN_S,
        )
        outcome: Rewritten = found.decode()
        return outcome

    async def request_stop(self, id_: str, *, unless_loaded: bool = False) -> State | None:
        """Request that an instance be stopped; its worker acts on it.

        Returns the state in which the request found it, None if there is no such record.  `unless_loaded`: a load
        that is over stays as it is.
        """
        state = await self._stop(keys.instance(id_), id=id_, unless_loaded=unless_loaded)
        return None if state is None else State(state.decode())

    # ---- what workers are to hold

    async def desired(self, worker: str) -> dict[str, str]:
        """Return what a worker is to hold: instance_id -> id of the load that made it."""
        found: dict[bytes, bytes] = await self._redis.hgetall(keys.desired(worker))  # type: ignore[misc]
        return {name.decode(): id_.decode() for name, id_ in found.items()}

    async def forget_desired(self, instance: Instance) -> None:
        """Have its worker hold an instance no more, unless another load has its name by now."""
        await self._forget_desired(keys.desired(instance.worker), instance_id=instance.instance_id, id=instance.id)

    async def forget_desired_everywhere(self, instance_id: str) -> bool:
        """Have no worker bring an instance back; return whether one would have."""
        names = [name.decode() for name in await self._redis.zrange(keys.WORKERS, 0, -1)]
        async with self._redis.pipeline(transaction=False) as pipe:
            for name in names:
                pipe.hdel(keys.desired(name), instance_id)
            return any(await pipe.execute())

    async def clear_desired(self, worker: str) -> None:
        """Have a worker hold nothing after a restart."""
        await self._redis.delete(keys.desired(worker))

    # ---- models that crashed the engine

    async def remember_crash(self, fingerprint: str, reason: str) -> None:
        """Have what crashed the engine refused for CRASH_MEMORY_S."""
        await self._redis.set(keys.crash(fingerprint), reason, ex=CRASH_MEMORY_S)

    async def forget_crash(self, fingerprint: str) -> None:
        """Have it tried again."""
        await self._redis.delete(keys.crash(fingerprint))

    # ---- the engine's log

    async def write_engine_log(self, id_: str, text: str, worker: str) -> None:
        """Keep what the engine logged in a load with its record, until ENGINE_LOGS_N later ones have ended.

        Does nothing if the load is another worker's by now.
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
        """Return what the engine logged in a load; None if there is nothing."""
        found: bytes | None = await self._redis.hget(keys.instance(id_), "engine")  # type: ignore[misc]
        return found

    # ---- reading

    async def get(self, id_: str) -> Instance | None:
        """Return a record, None if it does not exist."""
        fields: list[Any] = await self._redis.hmget(keys.instance(id_), FIELDS)  # type: ignore[misc]
        return unpack(id_, *fields)

    async def many(self, ids: Sequence[str]) -> list[Instance]:
        """Return the records of those of `ids` that exist."""
        found = (unpack(id_, *fields) for id_, fields in await self._fields(ids, FIELDS))
        return [instance for instance in found if instance is not None]

    async def _fields(self, ids: Sequence[str], fields: Sequence[str]) -> list[tuple[str, list[Any]]]:
        """Return some fields of many records, by id; of one that does not exist each is None."""
        found: list[tuple[str, list[Any]]] = []
        for page in pages(ids):
            found += zip(page, await self._read(fields=fields, ids=page), strict=True)
        return found

    async def newest(self) -> AsyncGenerator[Instance, None]:
        """Yield the records of the last RETAIN_S, newest first, then the older ones that live."""
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
        """Return every instance that is not in a terminal state, or those of `ids`, in no order."""
        found = await self.many(await self._members(keys.INSTANCES) if ids is None else ids)
        return [instance for instance in found if instance.state not in TERMINAL]  # some ended while we read

    async def live_at(self, worker: str, ids: Iterable[str] = ()) -> list[Instance]:
        """Return the live instances of a worker, also of `ids`, which it holds."""
        found = await self.live([*{*await self._members(keys.instances_at(worker)), *ids}])
        return [instance for instance in found if instance.worker == worker]

    async def heads(self) -> list[Head]:
        """Return of every live instance what its record says without the document."""
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
        """Return the id of the live instance with this name."""
        id_: bytes | None = await self._redis.hget(keys.NAMES, instance_id)  # type: ignore[misc]
        return None if id_ is None else id_.decode()

    async def history(self, instance: Instance, after: str = "0") -> list[tuple[str, Instance]]:
        """Return up to HISTORY_N revisions since entry `after` of a record's log, oldest first, with entry ids."""
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
        """Return the entry that a record's log ends with; "0", before the first, if there is none."""
        found = await self._redis.xrevrange(keys.log_of(id_), count=1)
        return found[0][0].decode() if found else "0"

    async def revisions(self, ids: list[str]) -> list[int | None]:
        """Return the revision of each record, None if it does not exist."""
        async with self._redis.pipeline(transaction=False) as pipe:
            for id_ in ids:
                pipe.hget(keys.instance(id_), "rev")
            return [None if rev is None else int(rev) for rev in await pipe.execute()]


def _keys(id_: str) -> list[str]:
    return [keys.instance(id_), keys.log_of(id_), keys.NAMES, keys.INSTANCES, keys.COUNTERS]


def _is_desired(new: Instance) -> bool | None:
    """Return whether a worker is to hold an instance after a change of state; None: as before, as for a lost one."""
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
    """Return the document of a record: what of it is not in fields of its own."""
    return msgpack.encode(
        msgspec.structs.replace(instance, instance_id="", created_at=0.0, rev=0, stop_requested=False)
    )


def unpack(
    id_: str, rev: bytes | None, instance_id: bytes, at: bytes, doc: bytes, stop: bytes | None
) -> Instance | None:
    """Return the record of these FIELDS; None if there is none, or a newer version's that cannot be read."""
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
