"""The loaded instances of the pool as this process knows them, by the names of their models."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Sequence
from itertools import count
from typing import Literal, NamedTuple

from msgspec import Struct

from api.pool.listing import source_of
from api.pool.roster import Roster
from shared.channel.address import reachable
from shared.instance import Instance
from shared.lifecycle import State
from shared.schema.model import ModelType
from shared.schema.snapshot import WorkerSnapshot
from shared.store.instances import Head, Instances

Reach = Literal["open", "doubtful", "none"]


class Name(NamedTuple):
    """What instances are found by."""

    kind: Literal["id", "key", "base", "type"]  # key: the full one of its model
    name: str


class Known(Struct, frozen=True, gc=False):
    """A loaded instance with its names."""

    instance: Instance
    seed: int  # `seed_of` its load
    full_key: str
    names: list[Name]


class Copies(Struct, frozen=True, gc=False):
    """The loaded instances of a name: those that can be asked, with a number of each (`seed_of`), and the others.

    The others may be gone or out of reach: they are for requests that would find none otherwise.
    """

    open: list[Instance]
    seeds: list[int]
    others: list[Instance]

    def without(self, ids: Collection[str]) -> Copies:
        """Return these without the instances of some loads."""
        kept = [i for i, instance in enumerate(self.open) if instance.id not in ids]
        others = [instance for instance in self.others if instance.id not in ids]
        return Copies([self.open[i] for i in kept], [self.seeds[i] for i in kept], others)


class View:
    """The loaded instances that this process has read.

    `follow` compares it with Redis at every beat, `catch_up` when an instance is missed.  Between, news make an
    instance doubtful until it is read again.  If Redis loses its records, the instances stay that their workers hold.
    """

    def __init__(self, roster: Roster, instances: Instances) -> None:
        self._roster = roster
        self._instances = instances
        self._loaded: dict[str, Known] = {}  # by id of the load
        self._doubtful: set[str] = set()  # of these, the ones that changed since they were read
        self._reading: dict[int, set[str]] = {}  # by read: the records that changed during it
        self._numbers = count()
        self._named: dict[Name, dict[str, Known]] = {}  # by id of the load
        self._catalogs = -1  # the version of the catalogs that the names are of
        self._changes = 0  # number of changes of what is above
        self._copies: dict[Name, tuple[int, int, Copies]] = {}  # with `_changes` and the roster's `refreshes`
        self._routes: dict[str, tuple[WorkerSnapshot, bool]] = {}  # by worker: whether there is a route to it

    # ---- reading

    async def follow(self, heads: Iterable[Head]) -> None:
        """Take over what Redis has, by the heads of all live instances.  Raises what UNAVAILABLE lists."""
        now = {head.id: head for head in heads if head.state is State.LOADED}
        same = {id_ for id_, one in self._loaded.items() if id_ in now and one.instance.epoch == now[id_].epoch}
        await self._read({*now, *self._loaded} - (same - self._doubtful))

    async def catch_up(self) -> None:
        """Read the instances that are not known, and those that are doubtful.  Raises what UNAVAILABLE lists."""
        ids = await self._instances.ids()
        await self._read({*(ids - self._loaded.keys()), *self._doubtful})

    def changed(self, id_: str) -> None:
        """Note that a record has changed."""
        for changed in self._reading.values():
            changed.add(id_)
        if id_ in self._loaded:
            self._doubtful.add(id_)
            self._changes += 1

    async def _read(self, ids: Collection[str]) -> None:
        """Read records, again if they change meanwhile."""
        number = next(self._numbers)
        try:
            while ids:
                changed = self._reading[number] = set()
                records = {record.id: record for record in await self._instances.many([*ids])}
                for id_ in ids:
                    self._learn(id_, records.get(id_))
                ids = changed.intersection(ids)
        finally:
            self._reading.pop(number, None)

    def _learn(self, id_: str, record: Instance | None) -> None:
        known = self._loaded.get(id_)
        if record is None and known is not None and self._is_held(known.instance):  # Redis was emptied
            return
        self._doubtful.discard(id_)
        if known is not None:
            self._remove(known)
        if record is not None and record.state is State.LOADED:
            self._add(record)
        self._changes += known is not None or (record is not None and record.state is State.LOADED)

    def _is_held(self, instance: Instance) -> bool:
        """Return whether the worker of an instance publishes it as loaded, or was there a lease ago."""
        worker = self._roster.last_seen(instance.worker)
        if worker is None or worker.epoch != instance.epoch:
            return False
        is_published = any(one.instance_id == instance.instance_id and one.used_at for one in worker.held)
        return is_published or instance.worker not in self._roster.alive

    # ---- names

    def _add(self, instance: Instance) -> None:
        model = self._roster.model_of(instance) or source_of(instance)
        key = model.full_key
        names = [Name("id", instance.instance_id), Name("key", key), Name("base", model.base), Name("type", model.type)]
        known = self._loaded[instance.id] = Known(instance, seed_of(instance.id.encode()), key, names)
        for name in names:
            self._named.setdefault(name, {})[instance.id] = known

    def _remove(self, known: Known) -> None:
        del self._loaded[known.instance.id]
        for name in known.names:
            of_name = self._named[name]
            del of_name[known.instance.id]
            if not of_name:
                del self._named[name]
                self._copies.pop(name, None)

    def _rename(self) -> None:
        """Name all instances anew if a catalog has changed."""
        if self._catalogs != self._roster.version:
            self._catalogs = self._roster.version
            self._changes += 1
            for known in [*self._loaded.values()]:
                self._remove(known)
                self._add(known.instance)

    # ---- asking

    def with_id(self, instance_id: str) -> Copies:
        """Return the instance with an id."""
        return self._found(Name("id", instance_id))

    def with_key(self, name: str) -> Copies:
        """Return the instances of the model with a name.  A plain key also means a variant that it does not select."""
        base = Name("base", name)
        return self._found(base if base in self._named else Name("key", name))

    def of_type(self, type_: ModelType) -> Copies:
        """Return the instances of all models of a type."""
        return self._found(Name("type", type_))

    def _found(self, name: Name) -> Copies:
        self._rename()
        kept = self._copies.get(name)
        if kept is not None and kept[:2] == (self._changes, self._roster.refreshes):
            return kept[2]
        of_name = [*self._named.get(name, {}).values()]
        if name.kind in ("key", "base"):
            keys = {worker: model.full_key for worker, model in self._roster.meant(name.name).items()}
            of_name = [one for one in of_name if keys.get(one.instance.worker) == one.full_key] or of_name
        copies = self._copies_of(of_name)
        if name in self._named:  # names that clients make up are not kept
            self._copies[name] = self._changes, self._roster.refreshes, copies
        return copies

    def _copies_of(self, known: Sequence[Known]) -> Copies:
        reaches = [self._reach(one.instance) for one in known]
        usable = [one for one, reach in zip(known, reaches, strict=True) if reach == "open"]
        others = [one.instance for one, reach in zip(known, reaches, strict=True) if reach == "doubtful"]
        return Copies([one.instance for one in usable], [one.seed for one in usable], others)

    def _reach(self, instance: Instance) -> Reach:
        worker = self._roster.last_seen(instance.worker)
        if worker is None or worker.epoch != instance.epoch:
            return "none"
        is_alive = instance.worker in self._roster.alive and instance.id not in self._doubtful
        return "open" if is_alive and self._has_route(worker) else "doubtful"

    def _has_route(self, worker: WorkerSnapshot) -> bool:
        kept = self._routes.get(worker.name)
        if kept is None or kept[0] is not worker:
            has_route = worker.channels is not None and reachable(worker.channels)
            kept = self._routes[worker.name] = worker, has_route
        return kept[1]


def seed_of(data: bytes) -> int:
    """Return a number below 2**56 that is the same in every process."""
    return int.from_bytes(hashlib.blake2b(data, digest_size=7).digest(), "big")
