"""Which devices a load goes to: pure functions over what workers know of their devices.

An API chooses with them the worker that is asked, from snapshots that may be a second old; the worker decides which of
its devices the load gets, from what it knows then.  Both prefer, in this order:

1. One GPU that has room: of those the one where the least stays free, so that big holes stay whole.
2. The fewest GPUs of one worker that have room together, each with layers by what it has free.
3. The same once instances are unloaded that may be: those that were not used for the longest time, and none that need
   not be.
4. Where the request or the worker allows it, as many layers as have room on GPUs, and the rest on the CPU.
5. The CPU, of a worker without GPUs, or of any if the request says so; here too others are unloaded only if they must.

A further instance of a model goes rather to a device that has none of it, and best to one of a worker that has: its
page cache has the file.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
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

ORDERED = 8  # of so many GPUs every order is looked at
HALVINGS = 10  # how evenly layers are spread: to a thousandth of what is free


class Constraints(Struct, frozen=True, kw_only=True):
    """Where a client wants a load to go."""

    offload: float = 1.0  # part of the layers that GPUs take
    is_partly: bool = True  # fewer may do, where the worker allows it
    devices: list[str] = []  # the only ones that may be used; []: any
    split: Literal["even", "priority"] | list[float] | None = None

    @classmethod
    def of(cls, asked: GPURequest | UnsetType) -> Constraints:
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
        """How many layers GPUs are to take."""
        return 0 if self.devices == [CPU] else int(self.offload * requirements.n_layers + 1e-9)

    def gpus(self, devices: Sequence[Device]) -> list[str]:
        """Those of a worker's GPUs that may be used, in the order that the client gave, or the worker has."""
        found = [device.id for device in devices if device.kind == "gpu"]
        return [id_ for id_ in self.devices if id_ in found] if self.devices else found


class Placement(Struct, frozen=True, kw_only=True):
    """Where a load goes: GPUs in the order in which they take layers, and how many layers each of them takes; the
    first layers, which none takes, stay with the CPU."""

    gpus: list[str] = []
    layers: list[int] = []
    usage: list[Usage]  # of the GPUs, then of the CPU
    evicts: list[Holding] = []
    exact: bool  # whether `taken` is from a formula that was compared with the engine

    @property
    def devices(self) -> list[str]:
        """Those that have layers."""
        return self.gpus or [CPU]

    @property
    def bytes(self) -> dict[str, int]:
        return {taken.id: taken.total_bytes for taken in self.usage}


Free = Mapping[str, int]  # bytes that may be given, by device


def place(
    requirements: Requirements, constraints: Constraints, worker: WorkerSnapshot, key: str = ""
) -> Placement | None:
    """The place of a load of model `key` on this worker; None where it has no room, whatever were unloaded."""
    free = available(worker.devices)
    copies = {id_ for held in worker.held if held.key == key for id_ in held.devices}
    return (
        arrange(requirements, constraints, worker.devices, free, copies)
        or evicting(requirements, constraints, worker, free)
        or partly(requirements, constraints, worker, free)
    )


def available(devices: Sequence[Device]) -> dict[str, int]:
    return {device.id: device.available_bytes for device in devices}


def once_gone(free: Free, victims: Iterable[Holding]) -> dict[str, int]:
    """What may be given once these are unloaded."""
    then = dict(free)
    for held in victims:
        for id_, n_bytes in held.devices.items():
            then[id_] = then.get(id_, 0) + n_bytes
    return then


def arrange(
    requirements: Requirements,
    constraints: Constraints,
    devices: Sequence[Device],
    free: Free,
    copies: Collection[str] = (),
    *,
    evenly: bool = True,
    any_order: bool = True,
) -> Placement | None:
    """A place where there is room as it is, with as many layers on GPUs as was wished.  Without `evenly`, of several
    GPUs the last ones may get little; without `any_order`, not every order of them is tried."""
    n = constraints.n_layers(requirements)
    if n == 0 or not has_gpu(devices):
        return _on_cpu(requirements, constraints, free)
    gpus, first = constraints.gpus(devices), requirements.n_layers - n
    if not gpus or not _has_room_beside(requirements, first, free):
        return None
    return _on_gpus(requirements, constraints, first, gpus, free, copies, HALVINGS if evenly else 0, any_order)


def _on_gpus(
    requirements: Requirements,
    constraints: Constraints,
    first: int,
    gpus: Sequence[str],
    free: Free,
    copies: Collection[str],
    halvings: int,
    any_order: bool,
) -> Placement | None:
    """A place for the layers from `first` on, whatever is left of the host's memory."""
    if isinstance(constraints.split, list) and len(constraints.split) > len(gpus):
        return None
    if constraints.split is not None:
        return _placed(requirements, first, gpus, _as_wished(requirements, first, gpus, free, constraints.split), free)
    need, n = requirements.single(first), requirements.n_layers - first
    roomy = [(id_ in copies, free[id_] - need, i) for i, id_ in enumerate(gpus) if free[id_] >= need]
    if roomy:
        return _placed(requirements, first, [gpus[min(roomy)[2]]], [n], free)
    if sum(max(0, free[id_]) for id_ in gpus) < need:
        return None
    by_room = sorted(gpus, key=lambda id_: -free[id_])
    sums, smallest = _sums(requirements), Smallest.of(requirements, first)
    for k in range(2, min(len(gpus), n) + 1):
        rooms = [free[id_] for id_ in by_room[:k]]
        if sum(rooms) < need + (k - 1) * requirements.inner_compute_bytes or not smallest.may_have(rooms):
            continue
        for order in _orders(requirements, first, by_room[:k], free, sums, any_order):
            if (layers := _by_room(requirements, first, order, free, sums, halvings)) is not None:
                return _placed(requirements, first, order, layers, free)
    return None


class Smallest(NamedTuple):
    """The least that a layer before the output takes of a GPU, and that a GPU has to have besides: it tells of many
    GPUs, without a look at every layer, that they have no room."""

    layer: int
    besides: int
    n: int  # so many layers there are

    @classmethod
    def of(cls, requirements: Requirements, first: int) -> Smallest:
        contexts = requirements.context if requirements.offload_kqv else repeat(0)
        last = max(first, requirements.n_layers - 1)
        layers = map(add, islice(requirements.weights, first, last), islice(contexts, first, last))
        least = min(requirements.compute_bytes, requirements.inner_compute_bytes)
        return cls(max(1, min(layers, default=1)), least, last - first)

    def may_have(self, rooms: Iterable[int]) -> bool:
        return self.n_layers(rooms) >= self.n

    def n_layers(self, rooms: Iterable[int]) -> int:
        """GPUs with so much room have room for no more of them."""
        return sum((room - self.besides) // self.layer for room in rooms if room > self.besides)


def has_gpu(devices: Sequence[Device]) -> bool:
    return any(device.kind == "gpu" for device in devices)


def _on_cpu(requirements: Requirements, constraints: Constraints, free: Free) -> Placement | None:
    taken = requirements.on_cpu()
    if CPU not in free or taken.total_bytes > free[CPU] or (constraints.devices and CPU not in constraints.devices):
        return None
    return Placement(usage=[taken], exact=requirements.is_exact(0, requirements.n_layers))


def _has_room_beside(requirements: Requirements, first: int, free: Free) -> bool:
    """Whether the host's memory has room for what does not go to GPUs.  A worker that does not own it may not put
    layers there, and what it needs of it besides is not counted."""
    if CPU not in free:
        return first == 0
    return requirements.beside_gpus(first).total_bytes <= free[CPU]


def _placed(
    requirements: Requirements, first: int, gpus: Sequence[str], layers: Sequence[int], free: Free
) -> Placement | None:
    """The placement with so many layers on each of these GPUs, unless one of them has no room for them."""
    ends = [*accumulate(layers, initial=first)]
    used = [(id_, n, start) for id_, n, start in zip(gpus, layers, ends, strict=False) if n]
    taken = [requirements.on_gpu(id_, start, start + n) for id_, n, start in used]
    if any(one.total_bytes > free[one.id] for one in taken):
        return None
    beside = [requirements.beside_gpus(first)] if CPU in free else []
    return Placement(
        gpus=[id_ for id_, _, _ in used],
        layers=[n for _, n, _ in used],
        usage=[*taken, *beside],
        exact=requirements.is_exact(len(used), first),
    )


def _by_room(
    requirements: Requirements, first: int, gpus: Sequence[str], free: Free, sums: Sequence[int], halvings: int
) -> list[int] | None:
    """Layers for each of these GPUs, in this order, such that all are as full as each other, or None where they have
    no room.  Each gets at least one."""
    if not gpus:
        return None

    def filled(part: float) -> list[int] | None:
        return _filled(requirements, first, [int(free[id_] * part) for id_ in gpus], sums)

    best = filled(1.0)
    low, high = 0.0, 1.0  # `high` does
    for _ in range(halvings if best is not None else 0):
        middle = (low + high) / 2
        if (found := filled(middle)) is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _sums(requirements: Requirements) -> list[int]:
    """What the first none, one, two, ... layers take of GPUs, without what comes with the output."""
    layers = map(add, requirements.weights, requirements.context) if requirements.offload_kqv else requirements.weights
    return [*accumulate(layers, initial=0)]


def _orders(
    requirements: Requirements, first: int, gpus: Sequence[str], free: Free, sums: Sequence[int], any_order: bool
) -> Iterator[Sequence[str]]:
    """Orders in which these GPUs may have room: two that nearly always do, then one that does if any does."""
    yield gpus
    yield gpus[::-1]
    if any_order:
        yield _order(requirements, first, gpus, free, sums)


def _order(requirements: Requirements, first: int, gpus: Sequence[str], free: Free, sums: Sequence[int]) -> list[str]:
    """An order in which these GPUs have room, each filled before the next, or none.

    Layers cannot be cut, so what is left over of each GPU depends on which layers it takes.  By how far the layers
    reach that a set of GPUs can take: of its orders only the one that reaches furthest matters.
    """
    if len(gpus) > ORDERED:
        return []
    last = requirements.n_layers - 1  # the output, which the last GPU takes
    reached: dict[tuple[str, ...], tuple[int, list[str]]] = {(): (first, [])}
    for _ in gpus[1:]:
        further: dict[tuple[str, ...], tuple[int, list[str]]] = {}
        for start, order in reached.values():
            rooms = {free[id_]: id_ for id_ in gpus if id_ not in order}  # of GPUs with the same room, one
            for room, id_ in rooms.items():
                end = min(last, bisect_right(sums, sums[start] + room - requirements.inner_compute_bytes, start) - 1)
                taken = tuple(sorted([*order, id_]))
                if end > start and end > further.get(taken, (0, []))[0]:
                    further[taken] = end, [*order, id_]
        reached = further
    for start, order in reached.values():
        (id_,) = (id_ for id_ in gpus if id_ not in order)
        if sums[-1] - sums[start] + requirements.tied_bytes + requirements.compute_bytes <= free[id_]:
            return [*order, id_]
    return []


def _filled(requirements: Requirements, first: int, rooms: Sequence[int], sums: Sequence[int]) -> list[int] | None:
    """Layers for each of some GPUs with so much room, where each is filled before the next."""
    layers, start, n = [], first, requirements.n_layers
    for left, room in zip(range(len(rooms) - 1, -1, -1), rooms, strict=True):
        if left == 0:
            end, besides = n, requirements.tied_bytes + requirements.compute_bytes
        else:  # each of those that are left is to get one
            besides = requirements.inner_compute_bytes
            end = min(n - left, bisect_right(sums, sums[start] + room - besides, start) - 1)
        if end <= start or sums[end] - sums[start] + besides > room:
            return None
        layers.append(end - start)
        start = end
    return layers


def _as_wished(
    requirements: Requirements,
    first: int,
    gpus: Sequence[str],
    free: Free,
    split: Literal["even", "priority"] | list[float],
) -> list[int]:
    """Layers for each of these GPUs, whether or not they have room."""
    n = requirements.n_layers - first
    if split == "priority":
        layers: list[int] = []
        start = first
        for id_ in gpus:
            if requirements.single(start) <= free[id_]:
                return [*layers, requirements.n_layers - start]
            end, bytes_ = start, requirements.inner_compute_bytes
            while end < requirements.n_layers - 1 and (bytes_ := bytes_ + requirements.of_layer(end)) <= free[id_]:
                end += 1
            layers.append(end - start)
            start = end
        return [n]  # which has no room on the first
    ratios = [1.0] * len(gpus) if split == "even" else split
    # As llama.cpp does it (load_tensors of src/llama-model.cpp): layer i of n goes to the first device whose part, and
    # those before it, are more than i / n.
    ends = [*accumulate(ratios)]
    layers = [0] * len(gpus)
    for i in range(n):
        layers[min(bisect_right(ends, i * ends[-1] / n), len(gpus) - 1)] += 1
    return layers


def partly(
    requirements: Requirements,
    constraints: Constraints,
    worker: WorkerSnapshot,
    free: Free,
    *,
    evenly: bool = True,
    any_order: bool = True,
) -> Placement | None:
    """As many layers on GPUs as there is room for, where that may be fewer than all."""
    if not (worker.partly_on_cpu and constraints.is_partly and has_gpu(worker.devices)) or CPU not in free:
        return None
    if constraints.devices and CPU not in constraints.devices:
        return None
    gpus = constraints.gpus(worker.devices)

    def on_gpus(n: int) -> Placement | None:
        return _on_gpus(
            requirements, constraints, requirements.n_layers - n, gpus, free, (), HALVINGS if evenly else 0, any_order
        )

    n = 0  # the most layers that GPUs have room for: the fewer they take, the more is left to the CPU
    if gpus and constraints.split in (None, "priority"):
        n = bisect_left(range(1, requirements.n_layers), True, key=lambda n: on_gpus(n) is None)
    elif gpus:  # in fixed parts each GPU takes other layers as they get fewer, and these may be larger
        n = next((n for n in range(requirements.n_layers - 1, 0, -1) if on_gpus(n) is not None), 0)
    if n == 0:
        return _on_cpu(requirements, constraints, free)
    return on_gpus(n) if _has_room_beside(requirements, requirements.n_layers - n, free) else None


def evicting(
    requirements: Requirements,
    constraints: Constraints,
    worker: WorkerSnapshot,
    free: Free,
    *,
    evenly: bool = True,
    any_order: bool = True,
) -> Placement | None:
    """A place where there is room once others are unloaded."""
    idle = sorted(
        (held for held in worker.held if held.is_evictable), key=lambda held: (held.used_at, held.instance_id)
    )

    def without(victims: Sequence[Holding], *, evenly: bool = False) -> Placement | None:
        return arrange(
            requirements, constraints, worker.devices, once_gone(free, victims), evenly=evenly, any_order=any_order
        )

    enough = next((n for n in range(1, len(idle) + 1) if without(idle[:n]) is not None), None)
    if enough is None:
        return None
    victims = idle[:enough]
    for held in idle[:enough][::-1]:  # what was used last is spared first
        if without(spared := [one for one in victims if one is not held]) is not None:
            victims = spared
    placed = without(victims, evenly=evenly)
    assert placed is not None
    return structs.replace(placed, evicts=victims)


def largest_context_length(
    request: LoadRequest, model: Model, settings: Settings, has_room: Callable[[Requirements], bool]
) -> int | None:
    """The largest context length with which a request has room: a multiple of 256, or the model's maximum; None where
    no context is small enough.  More context never takes less memory."""

    def fits(context_length: int) -> bool:
        return has_room(
            requirements_of(model, plan(structs.replace(request, context_length=context_length), model, settings))
        )

    if fits(model.max_context_length):
        return model.max_context_length
    low, high = 0, -(-model.max_context_length // CELLS)  # in multiples: `low` fits, or is none; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * CELLS) else (low, middle)
    return low * CELLS or None
