"""The workers of the pool, as this API process last read them, and the choice of a worker for a load."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from itertools import count

from msgspec import UNSET, Struct, structs

from api.pool.limits import check
from shared.errors import InvalidValue, ModelNotFound, NoWorker, ServiceError
from shared.instance import Instance
from shared.lookup import by_name, folded, further_names, of_instance, preferred, similar, spelled, spellings
from shared.memory.choose import Host, choose
from shared.memory.estimate import Requirements, requirements_of
from shared.memory.figures import Figures
from shared.memory.placement import Constraints, Demand, Placement, place
from shared.memory.plan import plan
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import Holding, Usage
from shared.schema.model import Model, ModelSettings
from shared.schema.snapshot import Sizing, WorkerSnapshot, short
from shared.settings import Settings
from shared.store.keys import RETAIN_S
from shared.store.queue import SIZED_S, Queue
from shared.store.workers import Worker, Workers

MEASURED_S = 3.0  # for a dry run before a load is placed; without an answer, the formula counts
PENDING_S = 3.0  # then a placed load that its worker has not published is no longer counted


class Candidate(Struct, frozen=True, kw_only=True, gc=False):
    """A worker that accepts loads, and its model that was requested."""

    worker: str
    model: Model
    catalog: int  # number of the worker's catalog; candidates with the same number share the model


class Measured(Struct, frozen=True):
    """The requirements of a model for a request, for all workers with the same model."""

    model: Model
    requirements: Requirements


class Names(Struct, frozen=True):
    """The models of a catalog by all names that clients may use, the names by their spellings, further names as
    `shared.lookup.further_names` returns them, and the unique number of the catalog."""

    number: int
    models: Mapping[str, Model]
    spellings: Mapping[str, str]
    further: Mapping[str, str]


class Roster:
    """The workers and their catalogs, at most a beat old after `refresh`.

    The settings are the defaults for absent request fields.
    """

    def __init__(self, workers: Workers, settings: Settings) -> None:
        self._store = workers
        self._settings = settings
        self.workers: list[Worker] = []
        self.alive: dict[str, WorkerSnapshot] = {}
        self.refreshes = 0  # number of times that this was read
        self.version = 0  # number of times that a catalog was other than before
        self._last: dict[str, WorkerSnapshot] = {}  # those in `alive`, and of workers that were there a lease ago
        self.catalogs: dict[str, list[Model]] = {}  # of all workers of the last day, alive or not
        self._absent_since: dict[str, float] = {}  # worker -> time at which its lease was first missing
        self._hosts: dict[str, Host] = {}  # of workers that accept loads
        self._published: dict[str, Host] = {}  # the same without the loads that were placed since
        # By worker: expiry, and loads that it has not published yet.
        self._pending: dict[str, list[tuple[float, Holding]]] = {}
        self._digests: dict[str, str] = {}
        self._names: dict[str, Names] = {}  # by worker; workers with the same catalog share them
        self._numbers = count()
        self._models: list[Model] = []
        self._models_of: list[tuple[str, str | None]] = []  # the workers and catalog digests of `_models`

    async def refresh(self) -> dict[str, str | None]:
        """Read what the workers publish; return the epoch that holds each lease, None if there is no lease.

        Raises what UNAVAILABLE lists if Redis does not answer.
        """
        self.workers = workers = await self._store.all()
        now = time.monotonic()
        for worker in workers:
            digest = worker.snapshot.catalog if worker.snapshot else self._digests.get(worker.name, "")
            if worker.name not in self.catalogs or digest != self._digests.get(worker.name):
                catalog = await self._store.catalog(worker.name)
                if catalog is not None:  # else the worker is about to publish it, or Redis was emptied
                    self._learn(worker.name, digest, catalog)
            if worker.epoch is None:
                self._absent_since.setdefault(worker.name, now)
            else:
                self._absent_since.pop(worker.name, None)
        self.alive = {worker.name: worker.snapshot for worker in workers if worker.snapshot}
        self._hosts = {name: Host(snapshot) for name, snapshot in self.alive.items() if snapshot.state == "ready"}
        self._published = dict(self._hosts)
        self._hold_pending()
        absent = {name: one for name, one in self._last.items() if self.absent_s(name) <= self._store.lease_s}
        self._last = {**absent, **self.alive}
        self.refreshes += 1
        known = {worker.name for worker in workers}
        # These were not seen for a day, or Redis was emptied, in which case the worker is back within a beat.
        for name in self.catalogs.keys() - known:
            if now - self._absent_since.setdefault(name, now) > self._store.lease_s:
                del self.catalogs[name], self._digests[name], self._names[name], self._absent_since[name]
                self.version += 1
        for name in self._absent_since.keys() - known - self.catalogs.keys():  # the sweep may still use it
            if now - self._absent_since[name] > RETAIN_S:
                del self._absent_since[name]
        return {worker.name: worker.epoch for worker in workers}

    def _learn(self, worker: str, digest: str, catalog: list[Model]) -> None:
        """Store a catalog.  Workers with equal catalogs share one: in large pools, many hosts have the same files."""
        shared = next((name for name, known in self._digests.items() if known == digest and digest), None)
        if shared is not None and self.catalogs[shared] == catalog:
            self.catalogs[worker], self._names[worker] = self.catalogs[shared], self._names[shared]
        else:
            self.catalogs[worker] = catalog
            models = by_name(catalog)
            self._names[worker] = Names(next(self._numbers), models, spellings(models), further_names(catalog))
        self._digests[worker] = digest
        self.version += 1

    def absent_s(self, worker: str) -> float:
        """Return the seconds for which this process has seen no lease of a worker."""
        now = time.monotonic()
        return now - self._absent_since.setdefault(worker, now)

    def last_seen(self, worker: str) -> WorkerSnapshot | None:
        """Return the last snapshot of a worker that holds its lease, or held it a lease ago.

        A worker keeps its runners, and its address, when Redis was away for longer than a lease or lost everything.
        """
        return self._last.get(worker)

    def models(self) -> list[Model]:
        """Return all models of the live workers that can be loaded, once each, sorted by `full_key`.

        Returns the same list object until the catalogs change.
        """
        catalogs = [(name, self._digests.get(name)) for name in sorted(self.alive)]
        if catalogs != self._models_of:
            by_key: dict[str, Model] = {}
            for name, _ in catalogs:
                for model in self.catalogs.get(name, ()):
                    if model.problem is None:
                        by_key.setdefault(model.full_key, model)
            self._models = [by_key[key] for key in sorted(by_key)]
            self._models_of = catalogs
        return self._models

    def model_of(self, instance: Instance) -> Model | None:
        """Return the model of a loaded instance as its worker lists it now; None if its files are gone."""
        names = self._names.get(instance.worker)
        return None if names is None else of_instance(names.models, instance)

    def settings_of(self, instance: Instance) -> ModelSettings:
        """Return the settings of the model of a loaded instance as its worker has them now."""
        model = self.model_of(instance)
        return ModelSettings() if model is None else model.settings

    def meant(self, name: str) -> dict[str, Model]:
        """Return the models with a name, by worker, of all workers of the last day."""
        return {worker: model for worker, names in self._names.items() if (model := names.models.get(name))}

    def fingerprint(self, worker: str) -> str:
        """Return what identifies the engine of a worker: "b" and the commit of llama.cpp."""
        snapshot = self.alive.get(worker)
        engine = None if snapshot is None else snapshot.engine
        return "b" if engine is None else f"b{engine.llama_cpp_commit}"

    # ---- placing

    def named(self, request: LoadRequest) -> LoadRequest:
        """Return a request with the name of its model as the list has it; unchanged if no worker knows the name.

        The name of a model has precedence over an alias.  Without a name, the default model is requested.
        """
        for names in self._names.values():
            if (name := spelled(names.spellings, request.model)) is not None:
                return request if name == request.model else structs.replace(request, model=name)
        for names in self._names.values():
            if (name := names.further.get(folded(request.model))) is not None:
                return structs.replace(request, model=name)
        return request

    def candidates(self, request: LoadRequest, without: Collection[str] = ()) -> tuple[list[Candidate], Model | None]:
        """Return the workers that can take a load, and the requested model.

        These workers accept loads, have the model and at least one of the requested devices, and are not in `without`.
        All have the same variant of it: a plain key selects one for the pool.  The model is None if no worker of the
        last day has it.  Raises InvalidValue for an unknown worker, and for devices that none of the workers with the
        model has.
        """
        holders = [
            Candidate(worker=name, model=model, catalog=names.number)
            for name, names in self._names.items()
            if (model := names.models.get(request.model))
        ]
        live = self._able(holders, request)
        if len({one.catalog for one in live}) > 1:
            selected = preferred(one.model for one in live)
            live = [one for one in live if one.model.variant == selected.variant or is_same(one.model, selected)]
        live = [one for one in live if one.worker not in without]
        return live, holders[0].model if holders else None

    def everywhere(self, request: LoadRequest, model: Model) -> list[Candidate]:
        """Return the workers that could take a load if all of them had this model.  Raises InvalidValue."""
        return self._able([Candidate(worker=name, model=model, catalog=-1) for name in self._names], request)

    def _able(self, holders: Sequence[Candidate], request: LoadRequest) -> list[Candidate]:
        """Return those that accept loads and have at least one of the requested devices.  Raises InvalidValue."""
        gpu = GPURequest() if request.gpu is UNSET else request.gpu
        if gpu.worker is not UNSET and gpu.worker not in self.catalogs:
            raise InvalidValue(f"'gpu.worker': unknown worker '{gpu.worker}'.", param="gpu.worker")
        live = [one for one in holders if one.worker in self._hosts and gpu.worker in (UNSET, one.worker)]
        if gpu.devices is not UNSET and live:
            asked = {*gpu.devices}
            theirs = {one.worker: {device.id for device in self.alive[one.worker].devices} for one in live}
            if unknown := asked.difference(*theirs.values()):
                raise InvalidValue(
                    f"'gpu.devices': no available worker with '{request.model}' has the device "
                    f"{', '.join(repr(id_) for id_ in gpu.devices if id_ in unknown)}.",
                    param="gpu.devices",
                )
            live = [one for one in live if asked & theirs[one.worker]]
        return live

    def choose(
        self, candidates: Sequence[Candidate], request: LoadRequest, measured: Measured | None = None
    ) -> tuple[Candidate, Placement | None]:
        """Choose the best candidate.  Returns it with the placement that its last snapshot allows.

        If the load fits on no candidate, returns the candidate with the most memory and None: its current state may
        allow the load, or its instances may become idle.  Workers that can read the file are preferred.  Raises
        InvalidValue if the request exceeds the limits of the model.
        """
        # The roster may have been refreshed since it returned the candidates.
        readable = [one for one in candidates if one.model.problem is None and one.worker in self._hosts]
        if not readable:
            return candidates[0], None
        constraints = Constraints.of(request.gpu)
        models = {one.catalog: one.model for one in readable}
        demands = {
            catalog: Demand(self.requirements(model, request, measured), constraints, model.key)
            for catalog, model in models.items()
        }
        best: tuple[Candidate, Placement] | None = None
        # Recently placed loads may have been refused or have ended: in the second round, ignore them.
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
        ranks = [(-host.reach_later(), host.worker.residents, host.worker.name, i) for i, host in enumerate(loads)]
        return readable[min(ranks)[-1]], None

    def nowhere(self, request: LoadRequest, known: Model | None) -> ServiceError:
        """Return the error for a load without candidates.  `known`: the model, if any worker of the last day has it."""
        if known is None:
            message = f"Model {request.model} not found in downloaded models"
            listed = {name for model in self.models() for name in (model.base, model.full_key)}
            if near := similar(request.model, listed):
                message += f". Did you mean {' or '.join(repr(name) for name in near)}?"
            return ModelNotFound(message, param="model")
        holders = [name for name, names in self._names.items() if request.model in names.models]
        draining = [name for name in sorted(holders) if name in self.alive and name not in self._hosts]
        if request.gpu is not UNSET and request.gpu.worker is not UNSET:
            name = request.gpu.worker
            if name in draining:
                return NoWorker(f"Worker '{name}' is draining and accepts no new loads. Try again shortly.")
            if name in holders:
                return NoWorker(f"Worker '{name}' is not available. Try again shortly.")
            return NoWorker(f"Worker '{name}' does not have {request.model}.")
        if draining:
            names = ", ".join(f"'{name}'" for name in draining)
            return NoWorker(f"No worker accepts {request.model} now: draining: {names}. Try again shortly.")
        return NoWorker(f"No available worker has {request.model}. Try again shortly.")

    async def choose_measured(
        self, candidates: Sequence[Candidate], request: LoadRequest, queue: Queue
    ) -> tuple[Candidate, Placement | None]:
        """Choose the best candidate as `choose` does, but ask an engine before a load is refused or evicts an instance
        by a formula that was not checked.

        Raises InvalidValue, and what UNAVAILABLE lists.
        """
        best, placed = self.choose(candidates, request)
        if best.model.problem is not None or (placed is not None and not placed.evicts):
            return best, placed
        figures = self.figures(candidates, best, request, queue, within_s=MEASURED_S)
        if figures.is_checked or not any(self.alive[one.worker].devices for one in candidates):
            return best, placed
        return self.choose(candidates, request, Measured(best.model, await figures.requirements()))

    def figures(
        self,
        candidates: Sequence[Candidate],
        best: Candidate,
        request: LoadRequest,
        queue: Queue,
        within_s: float = SIZED_S,
    ) -> Figures:
        """Return what a request takes by the engine of a candidate: one with a GPU that the request allows, if there is
        one, else the best.  Raises InvalidValue if the request exceeds the limits of the model."""
        check(request, best.model)
        constraints = Constraints.of(request.gpu)
        same = [best, *(one for one in candidates if is_same(one.model, best.model))]
        gpus = {one.worker: constraints.gpus(self.alive[one.worker].devices) for one in same}
        asked = next((one for one in same if gpus[one.worker]), best)
        with_cpu = any(not gpus[name] or (constraints.is_partly and self.alive[name].partly_on_cpu) for name in gpus)

        async def ask(sizing: Sizing) -> list[list[Usage]] | None:
            return await queue.sized(asked.worker, sizing, within_s)

        return Figures(request, asked.model, self._settings, gpus[asked.worker], ask, with_cpu=with_cpu)

    def requirements(self, model: Model, request: LoadRequest, measured: Measured | None = None) -> Requirements:
        """Compute the requirements of a request.  Raises InvalidValue if it exceeds the limits of the model."""
        check(request, model)
        if measured is not None and is_same(model, measured.model):
            return measured.requirements
        return requirements_of(model, plan(request, model, self._settings))

    def has_room(
        self,
        candidates: Sequence[Candidate],
        model: Model,
        request: LoadRequest,
        beside: Mapping[str, Sequence[Holding]],
    ) -> Callable[[Requirements], bool]:
        """Return a function that says whether any candidate with this model has room for it.

        `beside`: holdings to be counted too, by worker.  Ignores the loads that were placed since the last snapshots.
        """
        constraints = Constraints.of(request.gpu)
        names = [one.worker for one in candidates if one.worker in self._published and is_same(one.model, model)]
        hosts = [self._published[name] for name in names]
        hosts = [host.holding(beside[host.worker.name]) if host.worker.name in beside else host for host in hosts]

        def has_room(requirements: Requirements) -> bool:
            demand = Demand(requirements, constraints, model.key)
            return choose([(host, demand) for host in hosts]) is not None

        return has_room

    def placed(self, instance: Instance, placement: Placement | None) -> None:
        """Count an instance that was just placed, until its worker publishes it or for PENDING_S seconds."""
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
        """Add loads that were placed too late to be in the published snapshots."""
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


def is_same(a: Model, b: Model) -> bool:
    """Return whether two models take the same memory: by their headers, they are copies of one model."""

    def header(model: Model) -> tuple[object, ...]:
        return (
            *(model.architecture, model.size_bytes, model.max_context_length, model.dimensions, model.weights),
            *(model.type, model.causal, model.pooling, model.expert_count, model.problem),
        )

    return a is b or header(a) == header(b)
