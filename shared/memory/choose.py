"""Which worker a load goes to: pure functions over what workers published of their devices."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from heapq import nlargest
from itertools import accumulate
from typing import Any, NamedTuple

from msgspec import structs

from shared.memory.estimate import Requirements
from shared.memory.placement import Constraints, Smallest, arrange, available, evicting, once_gone, partly
from shared.schema.memory import CPU, Holding
from shared.schema.snapshot import WorkerSnapshot

LOOKED_AT = 8  # workers of a large pool whose devices are looked at one by one


class Host:
    """A worker's snapshot, and what choosing asks of each worker: put together once for all loads until the next."""

    def __init__(self, worker: WorkerSnapshot) -> None:
        self.worker = worker
        gpus = [(device.available_bytes, device.id) for device in worker.devices if device.kind == "gpu"]
        self.by_room = sorted(gpus)
        self.rooms = [room for room, _ in self.by_room]
        self.sums = [*accumulate(max(0, room) for room in reversed(self.rooms))]  # of the largest one, two, ...
        self.cpu_room = next((device.available_bytes for device in worker.devices if device.id == CPU), None)
        idle = [held for held in worker.held if held.is_evictable]
        self.unused_since = min((held.used_at for held in idle), default=None)
        then = once_gone(available(worker.devices), idle)
        self.copies: dict[str, set[str]] = {}  # the devices that have a model, by its key
        for held in worker.held:
            self.copies.setdefault(held.key, set()).update(held.devices)
        self.rooms_then = [then[id_] for _, id_ in gpus]  # once all idle are gone
        self.cpu_reach = then.get(CPU, 0)
        self.reach = sum(max(0, room) for room in self.rooms_then) if self.rooms else self.cpu_reach

    def holding(self, more: Sequence[Holding]) -> Host:
        """The same once loads that were just placed here have their memory."""
        worker = self.worker
        then = available(worker.devices)
        for held in more:
            for id_, n_bytes in held.devices.items():
                if id_ in then:
                    then[id_] -= n_bytes
        devices = [structs.replace(device, available_bytes=then[device.id]) for device in worker.devices]
        residents = worker.residents + len(more)
        return Host(structs.replace(worker, devices=devices, held=[*worker.held, *more], residents=residents))


class _Costs(NamedTuple):
    """What a load takes, as far as it is the same for every worker."""

    n: int  # layers that GPUs are to take
    are_all: bool
    single: int  # bytes of one GPU that takes them
    beside: int  # of the host then
    on_cpu: int  # of a host without GPUs
    smallest: Smallest

    @classmethod
    def of(cls, requirements: Requirements, constraints: Constraints) -> _Costs:
        n = constraints.n_layers(requirements)
        first = requirements.n_layers - n
        return cls(
            n=n,
            are_all=first == 0,
            single=requirements.single(first),
            beside=requirements.beside_gpus(first).total_bytes,
            on_cpu=requirements.on_cpu().total_bytes,
            smallest=Smallest.of(requirements, first),
        )


# A worker's place in the list, and of its devices those that have the model already.  A plain tuple: for each load one
# is made of every worker.
_Candidate = tuple[int, Host, Requirements, _Costs, Collection[str]]


def choose(hosts: Sequence[tuple[Host, Requirements, str]], constraints: Constraints) -> int | None:
    """Which of these workers is to be asked, by its place in the list; None where none has room.

    With each comes what the load takes there, and the key of the model.
    """
    on_gpus: list[_Candidate] = []
    on_cpus: list[_Candidate] = []
    all_costs: dict[int, _Costs] = {}
    for i, (host, requirements, key) in enumerate(hosts):
        if (costs := all_costs.get(id(requirements))) is None:
            costs = all_costs[id(requirements)] = _Costs.of(requirements, constraints)
        among = on_gpus if costs.n and host.rooms else on_cpus
        among.append((i, host, requirements, costs, host.copies.get(key, ())))
    for find, those in (
        (_single, on_gpus),
        (_several, on_gpus),
        (_evicted, on_gpus),
        (_partial, on_gpus),
        (_cpu, on_cpus),
        (_evicted, on_cpus),
    ):
        if (found := find(those, constraints)) is not None:
            return found
    return None


def _has_host_room(host: Host, costs: _Costs) -> bool:
    """As `_has_room_beside`."""
    return costs.are_all if host.cpu_room is None else host.cpu_room >= costs.beside


def _single(candidates: Sequence[_Candidate], constraints: Constraints) -> int | None:
    """The worker with the GPU that has the least room of those that have enough."""
    if constraints.split is not None:
        return None
    ranks = []
    is_held = any(copies and _has_host_room(host, costs) for _, host, _, costs, copies in candidates)
    for i, host, _, costs, copies in candidates:
        need = costs.single
        if host.rooms[-1] < need or not _has_host_room(host, costs):
            continue
        second: int | None = None  # the room of one that has the model already
        for room, id_ in host.by_room[bisect_left(host.rooms, need) :]:
            if constraints.devices and id_ not in constraints.devices:
                continue
            if id_ not in copies:
                ranks.append((0 if copies else int(is_held), room - need, host.worker.name, i))
                break
            second = room if second is None else second
        else:
            if second is not None:
                ranks.append((2, second - need, host.worker.name, i))
    return min(ranks)[-1] if ranks else None


def _several(candidates: Sequence[_Candidate], constraints: Constraints) -> int | None:
    """The worker where a load has room on the fewest GPUs."""
    ranks = []
    for at, (_, host, _, costs, _) in enumerate(candidates):
        if host.sums[-1] >= costs.single and _has_host_room(host, costs):
            least = bisect_left(host.sums, costs.single) + 1  # fewer cannot have room
            ranks.append((least, host.sums[least - 1], host.worker.name, at))

    def look(at: int, any_order: bool) -> tuple[int, int, str, int] | None:
        i, host, requirements, costs, _ = candidates[at]
        if not costs.smallest.may_have(host.rooms):
            return None
        free = available(host.worker.devices)
        placed = arrange(requirements, constraints, host.worker.devices, free, evenly=False, any_order=any_order)
        return None if placed is None else (len(placed.gpus), host.sums[len(placed.gpus) - 1], host.worker.name, i)

    return _best(sorted(ranks), look, lambda at: candidates[at][1].sums[-1])


def _evicted(candidates: Sequence[_Candidate], constraints: Constraints) -> int | None:
    """The worker where the fewest have to be unloaded; where that is the same, those that were not used for longer."""
    ranks = []
    for at, (i, host, _, costs, _) in enumerate(candidates):
        is_gpus = costs.n and host.rooms
        reach, need = (host.reach, costs.single) if is_gpus else (host.cpu_reach, costs.on_cpu)
        if host.unused_since is not None and reach >= need:
            ranks.append((host.unused_since, i, at))

    def look(at: int, any_order: bool) -> tuple[int, float, int] | None:
        i, host, requirements, costs, _ = candidates[at]
        if costs.n and host.rooms and not costs.smallest.may_have(host.rooms_then):
            return None
        free = available(host.worker.devices)
        placed = evicting(requirements, constraints, host.worker, free, evenly=False, any_order=any_order)
        if placed is None:
            return None
        return len(placed.evicts), max(held.used_at for held in placed.evicts), i

    return _best(sorted(ranks), look, lambda at: candidates[at][1].reach)


def _partial(candidates: Sequence[_Candidate], constraints: Constraints) -> int | None:
    """The worker where the most layers have room on GPUs."""
    ranks = []
    for at, (_, host, _, costs, _) in enumerate(candidates):
        if host.worker.partly_on_cpu and constraints.is_partly:
            ranks.append((-costs.smallest.n_layers(host.rooms), host.worker.name, at))

    def look(at: int, any_order: bool) -> tuple[int, str, int] | None:
        i, host, requirements, _, _ = candidates[at]
        free = available(host.worker.devices)
        placed = partly(requirements, constraints, host.worker, free, evenly=False, any_order=any_order)
        return None if placed is None else (-sum(placed.layers), host.worker.name, i)

    return _best(sorted(ranks), look, lambda at: candidates[at][1].sums[-1])


def _best(
    ranks: Sequence[tuple[Any, ...]],
    look: Callable[[int, bool], tuple[Any, ...] | None],
    room: Callable[[int], int],
) -> int | None:
    """The place in `choose`'s list of the worker that is best by a look at its devices, which is what takes the longest
    in a large pool.  So the first ones are looked at, and where these have no room, those that have the most; at first
    without trying every order of GPUs.  A pool of more than twice LOOKED_AT may be said to be full where only another
    worker had room, to which large layers happen to fit."""
    first, others = ranks[:LOOKED_AT], ranks[LOOKED_AT:]
    for any_order in (False, True):
        found = [one for *_, at in first if (one := look(at, any_order)) is not None]
        if not found:
            most = nlargest(LOOKED_AT, (at for *_, at in others), key=room)
            found = [one for at in most if (one := look(at, any_order)) is not None]
        if found:
            best: int = min(found)[-1]
            return best
    return None


def _cpu(candidates: Sequence[_Candidate], constraints: Constraints) -> int | None:
    """The worker that holds the fewest instances, since they share their host's processors."""
    if constraints.devices and CPU not in constraints.devices:
        return None
    ranks = [
        (CPU in copies, host.worker.residents, host.worker.name, i)
        for i, host, _, costs, copies in candidates
        if host.cpu_room is not None and host.cpu_room >= costs.on_cpu
    ]
    return min(ranks)[-1] if ranks else None
