"""Chooses the devices of a worker for a load: pure functions of the snapshots that workers publish.

API processes use them to choose the worker, from snapshots that may be a second old.  The worker uses them to choose
among its devices, from its current state.  Both prefer, in this order:

1. One GPU with enough room; of several, the GPU with the least room, which keeps large gaps whole.
2. The smallest number of GPUs of one worker that have enough room together; each takes layers in proportion to its free
   memory.
3. The same after evictions.  The instances that have been idle longest are evicted first, and only as many as
   necessary.  No instance is evicted while it is busy.
4. As many layers as fit on GPUs, and the rest on the CPU, if the request and the worker allow it.
5. The CPU, on a worker without GPUs, or on any worker if the request says so.  Here too, instances are evicted only if
   the load does not fit otherwise.

Another instance of a model is preferably placed on a device that does not hold the model yet, first of all on a worker
that already holds it: its file is in the page cache of that host.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, islice, repeat
from operator import add
from typing import Literal, NamedTuple

from msgspec import UNSET, Struct, UnsetType, structs

from shared.memory.estimate import Requirements
from shared.schema.http import GPURequest
from shared.schema.memory import CPU, Device, Holding, Usage
from shared.schema.snapshot import WorkerSnapshot

DRY_RUNS = 3  # at most this many dry runs of placements, if each result exceeds the memory of the chosen place
ORDERED = 8  # the largest number of GPUs for which every order is tried
HALVINGS = 10  # steps of the bisection that spreads layers evenly; precise to a thousandth of the free bytes

Free = Mapping[str, int]  # bytes available for loads, by device


# ---- the request


class Constraints(Struct, frozen=True, kw_only=True):
    """Constraints of a client on the placement of a load."""

    offload: float = 1.0  # the share of the layers that GPUs take
    is_partly: bool = True  # GPUs may take fewer layers, if the worker allows it
    devices: list[str] = []  # the permitted devices; []: all
    split: Literal["even", "priority"] | list[float] | None = None

    @classmethod
    def of(cls, asked: GPURequest | UnsetType) -> Constraints:
        """Translate the `gpu` field of a load request."""
        if asked is UNSET:
            return cls()
        offload = {UNSET: 1.0, "max": 1.0, "off": 0.0}.get(asked.offload, asked.offload)
        assert isinstance(offload, float)
        return cls(
            offload=offload,
            is_partly=asked.offload is UNSET,
            devices=[] if asked.devices is UNSET else asked.devices,
            split=None if asked.split is UNSET else asked.split,
        )

    def n_layers(self, requirements: Requirements) -> int:
        """Return the number of layers that GPUs are to take."""
        return 0 if self.devices == [CPU] else int(self.offload * requirements.n_layers + 1e-9)

    def allows(self, device: str) -> bool:
        """Return whether the load may use this device."""
        return not self.devices or device in self.devices

    def gpus(self, devices: Sequence[Device]) -> list[str]:
        """Return the ids of the permitted GPUs, in the order of the request if it lists devices."""
        gpus = [device.id for device in devices if device.kind == "gpu"]
        return [id_ for id_ in self.devices if id_ in gpus] if self.devices else gpus


class Demand:
    """A load to place: its requirements, its constraints and the key of its model.

    It caches sums that do not depend on the worker: create one per model, and share it between all workers.
    """

    def __init__(self, requirements: Requirements, constraints: Constraints, key: str = "") -> None:
        self.requirements = requirements
        self.constraints = constraints
        self.key = key
        self.n_on_gpus = constraints.n_layers(requirements)  # number of layers for GPUs
        self.first = requirements.n_layers - self.n_on_gpus  # the first layer for GPUs; those before it go to the CPU
        self.single_bytes = requirements.single(self.first)  # on one GPU that takes all layers for GPUs
        self.beside_bytes = requirements.beside_gpus(self.first).total_bytes  # on the host in that case
        self.cpu_bytes = requirements.on_cpu().total_bytes  # on the host if the CPU takes all layers
        self.allows_cpu = constraints.allows(CPU)
        self.limit = LayerLimit.of(requirements, self.first)

    @cached_property
    def sums(self) -> list[int]:
        """The bytes of the first 0, 1, 2, ... layers on GPUs, without the tied embeddings of the output."""
        of = self.requirements
        return [*accumulate(map(add, of.weights, of.context) if of.offload_kqv else of.weights, initial=0)]


class LayerLimit(NamedTuple):
    """An upper bound on the number of layers that fit on GPUs, for a quick rejection.

    It assumes that every layer before the output is as small as the smallest one, and so for the compute buffers.
    """

    layer_bytes: int
    compute_bytes: int
    n: int  # the layers before the output

    @classmethod
    def of(cls, requirements: Requirements, first: int) -> LayerLimit:
        """Compute the limit for the layers from `first` on."""
        contexts = requirements.context if requirements.offload_kqv else repeat(0)
        last = max(first, requirements.n_layers - 1)
        layers = map(add, islice(requirements.weights, first, last), islice(contexts, first, last))
        least = min(requirements.compute_bytes, requirements.inner_compute_bytes)
        return cls(max(1, min(layers, default=1)), least, last - first)

    def may_fit(self, rooms: Iterable[int]) -> bool:
        """Return False if GPUs with these free bytes cannot take all layers."""
        return self.n_layers(rooms) >= self.n

    def n_layers(self, rooms: Iterable[int]) -> int:
        """Return the maximum number of layers before the output that fit on GPUs with these free bytes."""
        return sum((room - self.compute_bytes) // self.layer_bytes for room in rooms if room > self.compute_bytes)


class Search(Struct, frozen=True):
    """How thoroughly to search for room on several GPUs."""

    evenly: bool = True  # fill all GPUs to the same share; False: fill each before the next
    any_order: bool = True  # try every order of up to ORDERED GPUs; False: only two orders


THOROUGH = Search()


# ---- the result


class Placement(Struct, frozen=True, kw_only=True):
    """The devices of a load.

    `gpus` are in the order in which they take layers, and `layers` is the number of layers of each.  The remaining
    first layers stay on the CPU.
    """

    gpus: list[str] = []
    layers: list[int] = []
    usage: list[Usage]  # of the GPUs, followed by the CPU
    evicts: list[Holding] = []
    exact: bool  # whether `usage` is verified against the engine, or needs no dry run

    @property
    def devices(self) -> list[str]:
        """The ids of the devices that take layers."""
        return self.gpus or [CPU]

    @property
    def bytes(self) -> dict[str, int]:
        """The bytes that the load takes, by device."""
        return {one.id: one.total_bytes for one in self.usage}


def place(demand: Demand, worker: WorkerSnapshot) -> Placement | None:
    """Place a load on this worker.  Returns None if it does not fit even after evictions."""
    return place_now(demand, worker) or place_evicting(demand, worker) or place_partly(demand, worker)


def place_now(demand: Demand, worker: WorkerSnapshot, search: Search = THOROUGH) -> Placement | None:
    """Place a load in memory that is free now, with as many layers on GPUs as its constraints require.

    Returns None if it does not fit.
    """
    copies = {id_ for held in worker.held if held.key == demand.key for id_ in held.devices}
    return _Attempt(demand, worker.devices, available(worker.devices), search, copies).place()


def place_evicting(demand: Demand, worker: WorkerSnapshot, search: Search = THOROUGH) -> Placement | None:
    """Place a load as `place_now` does, but in memory that is free after evictions.

    Returns None if it does not fit even after evictions, or if there is nothing to evict.
    """
    free = available(worker.devices)
    idle = sorted((held for held in worker.held if held.is_victim), key=lambda held: (held.used_at, held.instance_id))

    def without(victims: Sequence[Holding], search: Search) -> Placement | None:
        return _Attempt(demand, worker.devices, once_gone(free, victims), search).place()

    rough = structs.replace(search, evenly=False)
    enough = next((n for n in range(1, len(idle) + 1) if without(idle[:n], rough) is not None), None)
    if enough is None:
        return None
    victims = idle[:enough]
    for held in idle[:enough][::-1]:  # spare the most recently used first
        if without(spared := [one for one in victims if one is not held], rough) is not None:
            victims = spared
    placed = without(victims, search)
    assert placed is not None
    return structs.replace(placed, evicts=victims)


def place_partly(demand: Demand, worker: WorkerSnapshot, search: Search = THOROUGH) -> Placement | None:
    """Place as many layers of a load on GPUs as fit there now, and the others on the CPU.

    Returns None if the worker or the constraints do not allow that, or if the others do not fit on the CPU.
    """
    requirements, constraints, free = demand.requirements, demand.constraints, available(worker.devices)
    if not (worker.partly_on_cpu and constraints.is_partly and has_gpu(worker.devices)):
        return None
    if CPU not in free or not demand.allows_cpu:
        return None
    attempt = _Attempt(demand, worker.devices, free, search)

    def on_gpus(n: int) -> Placement | None:
        return attempt.on_gpus(requirements.n_layers - n)

    n = 0  # the maximum number of layers on GPUs, which leaves the least to the CPU
    if attempt.gpus and constraints.split in (None, "priority"):
        n = bisect_left(range(1, requirements.n_layers), True, key=lambda n: on_gpus(n) is None)
    elif attempt.gpus:  # with fixed ratios, fewer layers may put larger ones on a GPU: no bisection
        n = next((n for n in range(requirements.n_layers - 1, 0, -1) if on_gpus(n) is not None), 0)
    if n == 0:
        return attempt.on_cpu()
    return on_gpus(n) if attempt.has_room_beside(requirements.n_layers - n) else None


def available(devices: Sequence[Device]) -> dict[str, int]:
    """Return the bytes that are available for loads now, by device."""
    return {device.id: device.available_bytes for device in devices}


def once_gone(free: Free, victims: Iterable[Holding]) -> dict[str, int]:
    """Return the bytes that are available for loads once these instances are unloaded, by device."""
    then = dict(free)
    for held in victims:
        for id_, n_bytes in held.devices.items():
            then[id_] = then.get(id_, 0) + n_bytes
    return then


def has_gpu(devices: Sequence[Device]) -> bool:
    """Return whether a worker with these devices has a GPU."""
    return any(device.kind == "gpu" for device in devices)


# ---- one search


class _Attempt(Struct, frozen=True, dict=True):
    """One search for room for a load on the devices of a worker; `free` bytes are available.

    `copies` are the devices that already hold the model.
    """

    demand: Demand
    devices: Sequence[Device]
    free: Free
    search: Search
    copies: Collection[str] = ()

    @cached_property
    def gpus(self) -> list[str]:
        """The GPUs that the load may use."""
        return self.demand.constraints.gpus(self.devices)

    def place(self) -> Placement | None:
        """Place as many layers on GPUs as the constraints require, and the others on the CPU."""
        demand = self.demand
        if demand.n_on_gpus == 0 or not has_gpu(self.devices):
            return self.on_cpu()
        if not self.gpus or not self.has_room_beside(demand.first):
            return None
        return self.on_gpus(demand.first)

    def on_cpu(self) -> Placement | None:
        """Place all layers on the CPU."""
        requirements = self.demand.requirements
        usage = requirements.on_cpu()
        if CPU not in self.free or usage.total_bytes > self.free[CPU] or not self.demand.allows_cpu:
            return None
        return Placement(usage=[usage], exact=requirements.is_exact(0, requirements.n_layers))

    def has_room_beside(self, first: int) -> bool:
        """Return whether the layers before `first`, and all other parts that stay off GPUs, fit into host memory.

        A worker that does not own the CPU must not place layers there; other host memory of the load is not counted.
        """
        if CPU not in self.free:
            return first == 0
        return self.demand.requirements.beside_gpus(first).total_bytes <= self.free[CPU]

    def on_gpus(self, first: int) -> Placement | None:
        """Place all layers but those before `first` on GPUs, at least one.  Ignores the host memory."""
        requirements, split, gpus, free = self.demand.requirements, self.demand.constraints.split, self.gpus, self.free
        if isinstance(split, list) and len(split) > len(gpus):
            return None
        if split == "priority":
            return self._placed(first, gpus, self._by_priority(first))
        if split is not None:
            ratios = [1.0] * len(gpus) if split == "even" else split
            return self._placed(first, gpus, _by_ratio(ratios, requirements.n_layers - first, len(gpus)))
        need, n = requirements.single(first), requirements.n_layers - first
        roomy = [(id_ in self.copies, free[id_] - need, i) for i, id_ in enumerate(gpus) if free[id_] >= need]
        if roomy:
            return self._placed(first, [gpus[min(roomy)[2]]], [n])
        if sum(max(0, free[id_]) for id_ in gpus) < need:
            return None
        by_room = sorted(gpus, key=lambda id_: -free[id_])
        limit = LayerLimit.of(requirements, first)
        for k in range(2, min(len(gpus), n) + 1):
            rooms = [free[id_] for id_ in by_room[:k]]
            if sum(rooms) < need + (k - 1) * requirements.inner_compute_bytes or not limit.may_fit(rooms):
                continue
            for order in self._orders(first, by_room[:k]):
                if (layers := self._by_room(first, order)) is not None:
                    return self._placed(first, order, layers)
        return None

    def _placed(self, first: int, gpus: Sequence[str], layers: Sequence[int]) -> Placement | None:
        """Return the placement with these layer counts on these GPUs, or None if a GPU has no room for its part."""
        requirements, free = self.demand.requirements, self.free
        ends = [*accumulate(layers, initial=first)]
        used = [(id_, n, start) for id_, n, start in zip(gpus, layers, ends, strict=False) if n]
        usage = [requirements.on_gpu(id_, start, start + n) for id_, n, start in used]
        if any(one.total_bytes > free[one.id] for one in usage):
            return None
        beside = [requirements.beside_gpus(first)] if CPU in free else []
        return Placement(
            gpus=[id_ for id_, _, _ in used],
            layers=[n for _, n, _ in used],
            usage=[*usage, *beside],
            exact=requirements.is_exact(len(used), first),
        )

    def _orders(self, first: int, gpus: Sequence[str]) -> Iterator[Sequence[str]]:
        """Yield orders of GPUs to try: two simple ones that nearly always fit, then an order that fits if any does."""
        yield gpus
        yield gpus[::-1]
        if self.search.any_order and (order := self._order(first, gpus)):
            yield order

    def _order(self, first: int, gpus: Sequence[str]) -> list[str]:
        """Find an order in which these GPUs have room, each filled before the next.  Returns [] if there is none.

        A layer cannot be divided, so the rest that stays free on a GPU depends on which layers it takes.  The search is
        over sets of GPUs: for each set, it keeps only the order that takes the most layers.
        """
        if len(gpus) > ORDERED:
            return []
        requirements, sums, free = self.demand.requirements, self.demand.sums, self.free
        last = requirements.n_layers - 1  # the output, which the last GPU takes
        inner = requirements.inner_compute_bytes
        reached: dict[tuple[str, ...], tuple[int, list[str]]] = {(): (first, [])}
        for _ in gpus[1:]:
            further: dict[tuple[str, ...], tuple[int, list[str]]] = {}
            for start, order in reached.values():
                rooms = {free[id_]: id_ for id_ in gpus if id_ not in order}  # one of several GPUs with the same room
                for room, id_ in rooms.items():
                    end = min(last, bisect_right(sums, sums[start] + room - inner, start) - 1)
                    chosen = tuple(sorted([*order, id_]))
                    if end > start and end > further.get(chosen, (0, []))[0]:
                        further[chosen] = end, [*order, id_]
            reached = further
        for start, order in reached.values():
            (id_,) = (id_ for id_ in gpus if id_ not in order)
            if sums[-1] - sums[start] + requirements.tied_bytes + requirements.compute_bytes <= free[id_]:
                return [*order, id_]
        return []

    def _by_room(self, first: int, gpus: Sequence[str]) -> list[int] | None:
        """Return the number of layers for each of these GPUs, at least one for each, or None if they do not fit.

        An even search fills all GPUs to about the same share.
        """

        def filled(part: float) -> list[int] | None:
            return self._filled(first, [int(self.free[id_] * part) for id_ in gpus])

        best = filled(1.0)
        low, high = 0.0, 1.0  # shares of the free bytes: the layers fit into `high`, but not into `low`
        for _ in range(HALVINGS if self.search.evenly and best is not None else 0):
            middle = (low + high) / 2
            if (layers := filled(middle)) is None:
                low = middle
            else:
                best, high = layers, middle
        return best

    def _filled(self, first: int, rooms: Sequence[int]) -> list[int] | None:
        """Return the number of layers for each GPU, filling each before the next; None if they do not fit.

        `rooms` are the free bytes of the GPUs, in order.
        """
        requirements, sums = self.demand.requirements, self.demand.sums
        layers, start, n = [], first, requirements.n_layers
        for left, room in zip(range(len(rooms) - 1, -1, -1), rooms, strict=True):
            if left == 0:
                end, besides = n, requirements.tied_bytes + requirements.compute_bytes
            else:  # leave at least one layer for each of the other GPUs
                besides = requirements.inner_compute_bytes
                end = min(n - left, bisect_right(sums, sums[start] + room - besides, start) - 1)
            if end <= start or sums[end] - sums[start] + besides > room:
                return None
            layers.append(end - start)
            start = end
        return layers

    def _by_priority(self, first: int) -> list[int]:
        """Return the number of layers for each GPU, filling each before the next, whether or not they fit."""
        requirements, free = self.demand.requirements, self.free
        layers: list[int] = []
        start = first
        for id_ in self.gpus:
            if requirements.single(start) <= free[id_]:
                return [*layers, requirements.n_layers - start]
            end, bytes_ = start, requirements.inner_compute_bytes
            while end < requirements.n_layers - 1 and (bytes_ := bytes_ + requirements.of_layer(end)) <= free[id_]:
                end += 1
            layers.append(end - start)
            start = end
        return [requirements.n_layers - first]  # they do not fit: the first GPU has no room for all of them


def _by_ratio(ratios: Sequence[float], n: int, n_gpus: int) -> list[int]:
    """Return how many of `n` layers each GPU takes, as llama.cpp splits them, whether or not they fit.

    Layer i of n goes to the first device whose cumulative share exceeds i / n (load_tensors in src/llama-model.cpp).
    """
    ends = [*accumulate(ratios)]
    layers = [0] * n_gpus
    for i in range(n):
        layers[min(bisect_right(ends, i * ends[-1] / n), n_gpus - 1)] += 1
    return layers
