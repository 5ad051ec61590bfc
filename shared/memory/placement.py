"""Decides which devices of a worker a load gets: pure functions over what workers publish of their devices.

An API uses them to choose the worker, from snapshots that may be a second old.  That worker uses them to choose among
its devices, from what it knows then.  Both prefer, in this order:

1. One GPU that has room: of several the one that keeps the least free, so that large gaps stay whole.
2. The fewest GPUs of one worker that have room together, each with layers in proportion to its free memory.
3. The same after evictions: of the evictable instances those that were not used for the longest time, and only those
   that have to leave.
4. If the request and the worker allow it, as many layers as fit on GPUs, and the rest on the CPU.
5. The CPU, on a worker without GPUs, or on any worker if the request says so.  Here too, instances are evicted only if
   the load does not fit otherwise.

A further instance of a model prefers a device that does not hold the model yet, and first of all such a device of a
worker that holds it: the file is in that host's page cache.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cached_property
from itertools import accumulate, islice, repeat
from operator import add
from typing import Literal, NamedTuple

from msgspec import UNSET, Struct, UnsetType, structs

from shared.memory.estimate import CELLS, Requirements, requirements_of
from shared.memory.plan import plan
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import CPU, Device, Holding, Usage
from shared.schema.model import Model
from shared.schema.snapshot import WorkerSnapshot
from shared.settings import Settings

ORDERED = 8  # the most GPUs of which every order is tried
HALVINGS = 10  # steps of the bisection that spreads layers evenly: to a thousandth of the free bytes

Free = Mapping[str, int]  # bytes that may be given to loads, by device


# ---- what is asked


class Constraints(Struct, frozen=True, kw_only=True):
    """Where a client allows a load to go."""

    offload: float = 1.0  # the part of the layers that GPUs take
    is_partly: bool = True  # GPUs may take fewer layers, if the worker allows it
    devices: list[str] = []  # the only devices that the load may use; []: any
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
        """Return the ids of the GPUs that the load may use, in the client's order, or else in the worker's."""
        found = [device.id for device in devices if device.kind == "gpu"]
        return [id_ for id_ in self.devices if id_ in found] if self.devices else found


class Demand:
    """A load to place: what it takes, where it may go, and the key of its model.

    It has the sums that do not depend on the worker: make one for each model, and share it between all workers.
    """

    def __init__(self, requirements: Requirements, constraints: Constraints, key: str = "") -> None:
        self.requirements = requirements
        self.constraints = constraints
        self.key = key
        self.n_on_gpus = constraints.n_layers(requirements)  # layers that GPUs are to take
        self.first = requirements.n_layers - self.n_on_gpus  # of them; those before it go to the CPU
        self.single_bytes = requirements.single(self.first)  # of one GPU that takes all of them
        self.beside_bytes = requirements.beside_gpus(self.first).total_bytes  # of the host then
        self.cpu_bytes = requirements.on_cpu().total_bytes  # of the host if it takes all layers
        self.allows_cpu = constraints.allows(CPU)
        self.limit = LayerLimit.of(requirements, self.first)

    @cached_property
    def sums(self) -> list[int]:
        """The bytes that the first 0, 1, 2, ... layers take on GPUs, without those that come with the output."""
        of = self.requirements
        return [*accumulate(map(add, of.weights, of.context) if of.offload_kqv else of.weights, initial=0)]


class LayerLimit(NamedTuple):
    """An upper limit of the layers that fit on GPUs, for a quick no: it looks at no single layer.

    It takes each layer before the output for as small as the smallest, and each GPU's compute buffer too.
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
        """Return how many layers before the output fit at most on GPUs with these free bytes."""
        return sum((room - self.compute_bytes) // self.layer_bytes for room in rooms if room > self.compute_bytes)


class Search(Struct, frozen=True):
    """How thoroughly to search for room on several GPUs."""

    evenly: bool = True  # fill all GPUs to the same part; False: fill each before the next, so the last may get little
    any_order: bool = True  # try every order of up to ORDERED GPUs; False: only two orders


THOROUGH = Search()


# ---- the answer


class Placement(Struct, frozen=True, kw_only=True):
    """The devices that a load goes to.

    `gpus` are in the order in which they take layers; `layers` says how many each takes.  The first layers, which no
    GPU takes, stay on the CPU.
    """

    gpus: list[str] = []
    layers: list[int] = []
    usage: list[Usage]  # of the GPUs, then of the CPU
    evicts: list[Holding] = []
    exact: bool  # whether `usage` is from a formula that was compared with the engine

    @property
    def devices(self) -> list[str]:
        """The ids of the devices that take layers."""
        return self.gpus or [CPU]

    @property
    def bytes(self) -> dict[str, int]:
        """The bytes that the load takes, by device."""
        return {one.id: one.total_bytes for one in self.usage}


def place(demand: Demand, worker: WorkerSnapshot) -> Placement | None:
    """Place a load on this worker.  Returns None if it does not fit, whatever is evicted."""
    return place_now(demand, worker) or place_evicting(demand, worker) or place_partly(demand, worker)


def place_now(demand: Demand, worker: WorkerSnapshot, search: Search = THOROUGH) -> Placement | None:
    """Place a load in memory that is free now, with as many layers on GPUs as its constraints say.

    Returns None if it does not fit.
    """
    copies = {id_ for held in worker.held if held.key == demand.key for id_ in held.devices}
    return _Attempt(demand, worker.devices, available(worker.devices), search, copies).place()


def place_evicting(demand: Demand, worker: WorkerSnapshot, search: Search = THOROUGH) -> Placement | None:
    """Place a load as `place_now` does, in memory that is free after evictions.

    Returns None if it does not fit, whatever is evicted, or if there is nothing to evict.
    """
    free = available(worker.devices)
    idle = sorted(
        (held for held in worker.held if held.is_evictable), key=lambda held: (held.used_at, held.instance_id)
    )

    def without(victims: Sequence[Holding], search: Search) -> Placement | None:
        return _Attempt(demand, worker.devices, once_gone(free, victims), search).place()

    rough = structs.replace(search, evenly=False)
    enough = next((n for n in range(1, len(idle) + 1) if without(idle[:n], rough) is not None), None)
    if enough is None:
        return None
    victims = idle[:enough]
    for held in idle[:enough][::-1]:  # the last used is spared first
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

    n = 0  # the most layers that fit on GPUs: the fewer they take, the more is left to the CPU
    if attempt.gpus and constraints.split in (None, "priority"):
        n = bisect_left(range(1, requirements.n_layers), True, key=lambda n: on_gpus(n) is None)
    elif attempt.gpus:  # with fixed parts a GPU takes other layers as they get fewer, and these may be larger
        n = next((n for n in range(requirements.n_layers - 1, 0, -1) if on_gpus(n) is not None), 0)
    if n == 0:
        return attempt.on_cpu()
    return on_gpus(n) if attempt.has_room_beside(requirements.n_layers - n) else None


def available(devices: Sequence[Device]) -> dict[str, int]:
    """Return the bytes that loads may be given now, by device."""
    return {device.id: device.available_bytes for device in devices}


def once_gone(free: Free, victims: Iterable[Holding]) -> dict[str, int]:
    """Return the bytes that loads may be given after these instances are unloaded, by device."""
    then = dict(free)
    for held in victims:
        for id_, n_bytes in held.devices.items():
            then[id_] = then.get(id_, 0) + n_bytes
    return then


def has_gpu(devices: Sequence[Device]) -> bool:
    """Return whether a worker with these devices has a GPU."""
    return any(device.kind == "gpu" for device in devices)


def largest_context_length(
    request: LoadRequest, model: Model, settings: Settings, has_room: Callable[[Requirements], bool]
) -> int | None:
    """Return the largest context length with which a request fits: a multiple of 256, or the model's maximum.

    Returns None if no context is small enough.  More context never takes less memory.
    """

    def fits(context_length: int) -> bool:
        return has_room(
            requirements_of(model, plan(structs.replace(request, context_length=context_length), model, settings))
        )

    if fits(model.max_context_length):
        return model.max_context_length
    low, high = 0, -(-model.max_context_length // CELLS)  # in multiples: `low` fits, or is 0; `high` does not fit
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELLS) else (low, middle)
    return low * CELLS or None


# ---- one search


class _Attempt(Struct, frozen=True, dict=True):
    """One search for room for a load on a worker's devices, where `free` may be given to loads.

    `copies` are the devices that hold the model already.
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
        """Place as many layers on GPUs as the constraints say, and the others on the CPU."""
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
        """Return whether the layers before `first` fit into the host's memory, with all else that does not go to GPUs.

        A worker that does not own that memory must not put layers there; what else a load takes of it is not counted.
        """
        if CPU not in self.free:
            return first == 0
        return self.demand.requirements.beside_gpus(first).total_bytes <= self.free[CPU]

    def on_gpus(self, first: int) -> Placement | None:
        """Place the layers from `first` on GPUs, of which there is at least one.  Ignores the host's memory."""
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
        """Return the placement with so many layers on each of these GPUs, or None if a GPU has no room for its part."""
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
        """Yield orders in which these GPUs may have room: two that nearly always do, then one that does if any does."""
        yield gpus
        yield gpus[::-1]
        if self.search.any_order and (order := self._order(first, gpus)):
            yield order

    def _order(self, first: int, gpus: Sequence[str]) -> list[str]:
        """Find an order in which these GPUs have room, each filled before the next.  Returns [] if there is none.

        A layer cannot be cut, so what stays free on a GPU depends on the layers that it takes.  The search goes over
        sets of GPUs, by the layers that they take together: of a set's orders only the one that takes the most counts.
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
                rooms = {free[id_]: id_ for id_ in gpus if id_ not in order}  # of GPUs with the same room, one
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
        """Return the layers for each of these GPUs in this order, at least one for each, or None if they do not fit.

        With an even search all GPUs are about equally full.
        """

        def filled(part: float) -> list[int] | None:
            return self._filled(first, [int(self.free[id_] * part) for id_ in gpus])

        best = filled(1.0)
        low, high = 0.0, 1.0  # of the free bytes: the layers fit into `high`, and not into `low`
        for _ in range(HALVINGS if self.search.evenly and best is not None else 0):
            middle = (low + high) / 2
            if (layers := filled(middle)) is None:
                low = middle
            else:
                best, high = layers, middle
        return best

    def _filled(self, first: int, rooms: Sequence[int]) -> list[int] | None:
        """Return the layers for each of some GPUs with these bytes, where each is filled before the next."""
        requirements, sums = self.demand.requirements, self.demand.sums
        layers, start, n = [], first, requirements.n_layers
        for left, room in zip(range(len(rooms) - 1, -1, -1), rooms, strict=True):
            if left == 0:
                end, besides = n, requirements.tied_bytes + requirements.compute_bytes
            else:  # each of the GPUs that are left is to get a layer
                besides = requirements.inner_compute_bytes
                end = min(n - left, bisect_right(sums, sums[start] + room - besides, start) - 1)
            if end <= start or sums[end] - sums[start] + besides > room:
                return None
            layers.append(end - start)
            start = end
        return layers

    def _by_priority(self, first: int) -> list[int]:
        """Return the layers for each GPU, where each is filled before the next, whether or not they fit."""
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

    Layer i of n goes to the first device whose part, and those before it, are more than i / n (load_tensors of
    src/llama-model.cpp).
    """
    ends = [*accumulate(ratios)]
    layers = [0] * n_gpus
    for i in range(n):
        layers[min(bisect_right(ends, i * ends[-1] / n), n_gpus - 1)] += 1
    return layers
