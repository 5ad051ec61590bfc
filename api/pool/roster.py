"""What the workers publish, as this API process last read it, and which of them is to take a load."""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from itertools import count

from msgspec import UNSET, Struct

from api.pool.limits import check
from shared.errors import InvalidValue, ModelNotFound, NoWorker, ServiceError
from shared.instance import Instance
from shared.lookup import by_name
from shared.memory.choose import Host, choose
from shared.memory.estimate import Requirements, requirements_of
from shared.memory.placement import Constraints, Demand, Placement, largest_context_length, place
from shared.memory.plan import plan
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import Holding
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot, short
from shared.settings import Settings
from shared.store.keys import RETAIN_S
from shared.store.workers import Worker, Workers

PENDING_S = 3.0  # after this time, a placed load that its worker has not published counts no more


class Candidate(Struct, frozen=True, kw_only=True, gc=False):
    """A worker that takes loads, and a model that it has."""

    worker: str
    model: Model
    catalog: int  # the number of the worker's catalog: candidates with the same one share the model


class Names(Struct, frozen=True):
    """The models of a catalog by each name that a client may use, and a number that no other catalog gets."""

    number: int
    models: Mapping[str, Model]


class Roster:
    """Holds workers and catalogs, at most a beat old.  `refresh` reads them now.

    The settings are the defaults of what a request leaves out.
    """

    def __init__(self, workers: Workers, settings: Settings) -> None:
        self._store = workers
        self._settings = settings
        self.workers: list[Worker] = []
        self.alive: dict[str, WorkerSnapshot] = {}
        self.catalogs: dict[str, list[Model]] = {}  # of every worker of the last day, alive or not
        self._absent_since: dict[str, float] = {}  # worker -> when its lease was first seen gone
        self._hosts: dict[str, Host] = {}  # of those that take loads
        self._published: dict[str, Host] = {}  # the same without what was placed since
        self._pending: dict[str, list[tuple[float, Holding]]] = {}  # by worker: until when, and what is on its way
        self._digests: dict[str, str] = {}
        self._names: dict[str, Names] = {}  # by worker; workers with the same catalog share one
        self._numbers = count()
        self._models: list[Model] = []
        self._models_of: list[tuple[str, str | None]] = []  # which workers, with which catalogs

    async def refresh(self) -> dict[str, str | None]:
        """Read what the workers publish; return the epoch that holds the lease of each, None if none does.

        Raises what UNAVAILABLE lists if Redis does not answer.
        """
        self.workers = workers = await self._store.all()
        now = time.monotonic()
        for worker in workers:
            digest = worker.snapshot.catalog if worker.snapshot else self._digests.get(worker.name, "")
            if worker.name not in self.catalogs or digest != self._digests.get(worker.name):
                catalog = await self._store.catalog(worker.name)
                if catalog is not None:  # else its worker is about to publish it, or Redis was emptied
                    self._learn(worker.name, digest, catalog)
            if worker.epoch is None:
                self._absent_since.setdefault(worker.name, now)
            else:
                self._absent_since.pop(worker.name, None)
        self.alive = {worker.name: worker.snapshot for worker in workers if worker.snapshot}
        self._hosts = {name: Host(snapshot) for name, snapshot in self.alive.items() if snapshot.state == "ready"}
        self._published = dict(self._hosts)
        self._hold_pending()
        known = {worker.name for worker in workers}
        # Not seen for a day, or Redis was emptied: then the worker is back within a beat.
        for name in self.catalogs.keys() - known:
            if now - self._absent_since.setdefault(name, now) > self._store.lease_s:
                del self.catalogs[name], self._digests[name], self._names[name], self._absent_since[name]
        for name in self._absent_since.keys() - known - self.catalogs.keys():  # the sweep may still count from it
            if now - self._absent_since[name] > RETAIN_S:
                del self._absent_since[name]
        return {worker.name: worker.epoch for worker in workers}

    def _learn(self, worker: str, digest: str, catalog: list[Model]) -> None:
        """Keep a catalog, once for all workers that have the same: many hosts of a large pool have the same files."""
        shared = next((name for name, known in self._digests.items() if known == digest and digest), None)
        if shared is not None and self.catalogs[shared] == catalog:
            self.catalogs[worker], self._names[worker] = self.catalogs[shared], self._names[shared]
        else:
            self.catalogs[worker] = catalog
            self._names[worker] = Names(next(self._numbers), by_name(catalog))
        self._digests[worker] = digest

    def absent_s(self, worker: str) -> float:
        """Return for how many seconds a worker has held no lease, as far as this process has seen."""
        now = time.monotonic()
        return now - self._absent_since.setdefault(worker, now)

    def models(self) -> list[Model]:
        """Return every model of the live workers that can be loaded, once, by key.

        It is the same list as before while the catalogs are the same.
        """
        catalogs = [(name, self._digests.get(name)) for name in sorted(self.alive)]
        if catalogs != self._models_of:
            by_key: dict[str, Model] = {}
            for name, _ in catalogs:
                for model in self.catalogs.get(name, ()):
                    if model.problem is None:
                        by_key.setdefault(model.key, model)
            self._models = [by_key[key] for key in sorted(by_key)]
            self._models_of = catalogs
        return self._models

    # ---- placing

    def candidates(self, request: LoadRequest, without: Collection[str] = ()) -> tuple[list[Candidate], Model | None]:
        """Return the workers that take loads and have the requested model and one of the requested devices, except for
        those in `without`; and the model as the first worker knows it, even one that is away, or None.

        Raises InvalidValue for an unknown worker, or for devices that none of these workers has.
        """
        found = [
            Candidate(worker=name, model=model, catalog=names.number)
            for name, names in self._names.items()
            if (model := names.models.get(request.model))
        ]
        gpu = GPURequest() if request.gpu is UNSET else request.gpu
        if gpu.worker is not UNSET and gpu.worker not in self.catalogs:
            raise InvalidValue(f"'gpu.worker': there is no worker '{gpu.worker}'.", param="gpu.worker")
        live = [one for one in found if one.worker in self._hosts and gpu.worker in (UNSET, one.worker)]
        if gpu.devices is not UNSET and live:
            asked = {*gpu.devices}
            theirs = {one.worker: {device.id for device in self.alive[one.worker].devices} for one in live}
            if unknown := asked.difference(*theirs.values()):
                raise InvalidValue(
                    f"'gpu.devices': no worker that has '{request.model}' has "
                    f"{', '.join(repr(id_) for id_ in gpu.devices if id_ in unknown)}.",
                    param="gpu.devices",
                )
            live = [one for one in live if asked & theirs[one.worker]]
        live = [one for one in live if one.worker not in without]
        return live, found[0].model if found else None

    def choose(self, candidates: Sequence[Candidate], request: LoadRequest) -> tuple[Candidate, Placement | None]:
        """Choose the best candidate.  Returns it with the placement that its last snapshot allows; if the load fits on
        none, the candidate with the most memory and None: that worker may know better.

        A worker that can read the file is preferred.  Raises InvalidValue if the request exceeds the model's limits.
        """
        readable = [one for one in candidates if one.model.problem is None]
        if not readable:
            return candidates[0], None
        constraints = Constraints.of(request.gpu)
        models = {one.catalog: one.model for one in readable}
        demands = {
            catalog: Demand(self.requirements(model, request), constraints, model.key)
            for catalog, model in models.items()
        }
        best: tuple[Candidate, Placement] | None = None
        # A load that was placed a moment ago may have been refused, or be gone: second, do not count those.
        for hosts in (self._hosts, self._published) if self._pending else (self._hosts,):
            asked = [(hosts[one.worker], demands[one.catalog]) for one in readable]
            if (i := choose(asked)) is not None:
                host, demand = asked[i]
                placed = place(demand, host.worker)
                if placed is not None and (best is None or len(placed.evicts) < len(best[1].evicts)):
                    best = readable[i], placed
            if best is not None and not best[1].evicts:
                return best
        if best is not None:
            return best
        loads = [self._hosts[one.worker] for one in readable]
        ranks = [(-host.reach, host.worker.residents, host.worker.name, i) for i, host in enumerate(loads)]
        return readable[min(ranks)[-1]], None

    def requirements(self, model: Model, request: LoadRequest) -> Requirements:
        """Compute what a request takes.  Raises InvalidValue if it exceeds the model's limits."""
        check(request, model)
        return requirements_of(model, plan(request, model, self._settings))

    def largest_context_length(self, candidates: Sequence[Candidate], model: Model, request: LoadRequest) -> int | None:
        """Return the largest context length (tokens) with which a request fits on any candidate, None if none does."""
        constraints = Constraints.of(request.gpu)

        def has_room(requirements: Requirements) -> bool:
            demand = Demand(requirements, constraints, model.key)
            return choose([(self._published[one.worker], demand) for one in candidates]) is not None

        return largest_context_length(request, model, self._settings, has_room)

    def placed(self, instance: Instance, placement: Placement | None) -> None:
        """Count an instance that was just given to a worker, until the worker publishes it, or for PENDING_S."""
        held = Holding(
            id=instance.id,
            instance_id=instance.instance_id,
            key=instance.key,
            devices={} if placement is None else placement.bytes,
            used_at=0.0,
            is_evictable=False,
        )
        self._pending.setdefault(instance.worker, []).append((time.monotonic() + PENDING_S, held))
        self._hold(instance.worker, [held])

    def _hold(self, worker: str, more: Sequence[Holding]) -> None:
        if more and (host := self._hosts.get(worker)) is not None:
            self._hosts[worker] = host.holding(more)

    def _hold_pending(self) -> None:
        """Add to what was published what was placed too late to be in it."""
        now = time.monotonic()
        for worker, pending in [*self._pending.items()]:
            published = self.alive.get(worker)
            known = [] if published is None else published.taken
            self._pending[worker] = [
                (until, held) for until, held in pending if until > now and short(held.id) not in known
            ]
            self._hold(worker, [held for _, held in self._pending[worker]])
            if not self._pending[worker]:
                del self._pending[worker]


def nowhere(request: LoadRequest, known: Model | None) -> ServiceError:
    """Return why no worker can take a load; `known` is the model as any worker of the last day has it."""
    if known is None:
        return ModelNotFound(f"Model {request.model} not found in downloaded models", param="model")
    if request.gpu is not UNSET and request.gpu.worker is not UNSET:
        return NoWorker(f"The worker '{request.gpu.worker}' is not alive, or has no {request.model}.")
    return NoWorker(f"No worker that has {request.model} is alive. Try again shortly.")
