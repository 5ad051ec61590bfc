"""Chooses the worker for a load: pure functions of the snapshots that workers publish."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Sequence
from heapq import nlargest
from itertools import accumulate
from typing import Any

from msgspec import structs

from shared.memory.placement import Demand, Search, available, once_gone, place_evicting, place_now, place_partly
from shared.schema.memory import CPU, Holding
from shared.schema.snapshot import WorkerSnapshot

LOOKED_AT = 8  # the number of workers whose devices are searched in a large pool
SEARCHES = (Search(evenly=False, any_order=False), Search(evenly=False))  # the quick one first


class Host:
    """A worker's snapshot and sums over its devices, which are computed once for all choices with this snapshot."""

    def __init__(self, worker: WorkerSnapshot) -> None:
        self.worker = worker
        gpus = [(device.available_bytes, device.id) for device in worker.devices if device.kind == "gpu"]
        self.by_room = sorted(gpus)
        self.rooms = [room for room, _ in self.by_room]
        self.sums = [
            *accumulate(max(0, room) for room in reversed(self.rooms))
        ]  # of the largest GPU, of the two largest, ...
        self.cpu_room = next((device.available_bytes for device in worker.devices if device.id == CPU), None)
        idle = [held for held in worker.held if held.is_victim]
        self.unused_since = min((held.used_at for held in idle), default=None)
        then = once_gone(available(worker.devices), idle)
        self.copies: dict[str, set[str]] = {}  # the devices that hold a model, by its key
        for held in worker.held:
            self.copies.setdefault(held.key, set()).update(held.devices)
        self.rooms_then = [then[id_] for _, id_ in gpus]  # after all evictions that are possible
        self.cpu_reach = then.get(CPU, 0)
        self.reach = sum(max(0, room) for room in self.rooms_then) if self.rooms else self.cpu_reach

    def reach_later(self) -> int:
        """Return the room after all evictions that are possible once no instance is busy."""
        evictable = [held for held in self.worker.held if held.is_evictable]
        then = once_gone(available(self.worker.devices), evictable)
        gpus = [device.id for device in self.worker.devices if device.kind == "gpu"]
        return sum(max(0, then[id_]) for id_ in gpus or [CPU] if id_ in then)

    def holding(self, more: Sequence[Holding]) -> Host:
        """Return this host with less available memory, after loads were just placed here."""
        worker = self.worker
        then = available(worker.devices)
        for held in more:
            for id_, n_bytes in held.devices.items():
                if id_ in then:
                    then[id_] -= n_bytes
        devices = [structs.replace(device, available_bytes=then[device.id]) for device in worker.devices]
        residents = worker.residents + len(more)
        return Host(structs.replace(worker, devices=devices, held=[*worker.held, *more], residents=residents))


# The position in the caller's list, the worker, the load, and the devices of the worker that already hold the model.  A
# plain tuple, because each choice creates one for every worker.
_Candidate = tuple[int, Host, Demand, Collection[str]]


def choose(hosts: Sequence[tuple[Host, Demand]]) -> int | None:
    """Choose the worker for a load.  Returns its position in the list, or None if the load fits on no worker.

    Each worker comes with the demand of the load there, which depends on the model of the worker.  Workers with the
    same model should share one Demand.
    """
    on_gpus: list[_Candidate] = []
    on_cpus: list[_Candidate] = []
    for i, (host, demand) in enumerate(hosts):
        among = on_gpus if demand.n_on_gpus and host.rooms else on_cpus
        among.append((i, host, demand, host.copies.get(demand.key, ())))
    for find, candidates in (
        (_single, on_gpus),
        (_several, on_gpus),
        (_evicting, on_gpus),
        (_partly, on_gpus),
        (_cpu, on_cpus),
        (_evicting, on_cpus),
    ):
        if (position := find(candidates)) is not None:
            return position
    return None


def _has_host_room(host: Host, demand: Demand) -> bool:
    """Return whether the host has room for the parts that stay off GPUs, by the same rule as a placement."""
    return demand.first == 0 if host.cpu_room is None else host.cpu_room >= demand.beside_bytes


def _single(candidates: Sequence[_Candidate]) -> int | None:
    """Choose the worker with the tightest fit: the GPU with the least room that is enough."""
    ranks = []
    is_held = any(copies and _has_host_room(host, demand) for _, host, demand, copies in candidates)
    for i, host, demand, copies in candidates:
        need = demand.single_bytes
        if host.rooms[-1] < need or demand.constraints.split is not None or not _has_host_room(host, demand):
            continue
        allowed = demand.constraints.devices
        second: int | None = None  # the room of a GPU that already holds the model
        for room, id_ in host.by_room[bisect_left(host.rooms, need) :]:
            if allowed and id_ not in allowed:
                continue
            if id_ not in copies:
                ranks.append((0 if copies else int(is_held), room - need, host.worker.name, i))
                break
            second = room if second is None else second
        else:
            if second is not None:
                ranks.append((2, second - need, host.worker.name, i))
    return min(ranks)[-1] if ranks else None


def _several(candidates: Sequence[_Candidate]) -> int | None:
    """Choose the worker where the load fits on the fewest GPUs."""
    ranks = []
    for at, (_, host, demand, _) in enumerate(candidates):
        if host.sums[-1] >= demand.single_bytes and _has_host_room(host, demand):
            least = bisect_left(host.sums, demand.single_bytes) + 1  # fewer GPUs cannot have room
            ranks.append((least, host.sums[least - 1], host.worker.name, at))

    def look(at: int, search: Search) -> tuple[int, int, str, int] | None:
        i, host, demand, _ = candidates[at]
        if not demand.limit.may_fit(host.rooms):
            return None
        placed = place_now(demand, host.worker, search)
        return None if placed is None else (len(placed.gpus), host.sums[len(placed.gpus) - 1], host.worker.name, i)

    return _best(sorted(ranks), look, lambda at: candidates[at][1].sums[-1])


def _evicting(candidates: Sequence[_Candidate]) -> int | None:
    """Choose the worker with the fewest evictions; of several, the worker whose victims have been idle longest."""
    ranks = []
    for at, (i, host, demand, _) in enumerate(candidates):
        is_gpus = demand.n_on_gpus and host.rooms
        reach, need = (host.reach, demand.single_bytes) if is_gpus else (host.cpu_reach, demand.cpu_bytes)
        if host.unused_since is not None and reach >= need:
            ranks.append((host.unused_since, i, at))

    def look(at: int, search: Search) -> tuple[int, float, int] | None:
        i, host, demand, _ = candidates[at]
        if demand.n_on_gpus and host.rooms and not demand.limit.may_fit(host.rooms_then):
            return None
        placed = place_evicting(demand, host.worker, search)
        if placed is None:
            return None
        return len(placed.evicts), max(held.used_at for held in placed.evicts), i

    return _best(sorted(ranks), look, lambda at: candidates[at][1].reach)


def _partly(candidates: Sequence[_Candidate]) -> int | None:
    """Choose the worker where the most layers fit on GPUs."""
    ranks = []
    for at, (_, host, demand, _) in enumerate(candidates):
        if host.worker.partly_on_cpu and demand.constraints.is_partly:
            ranks.append((-demand.limit.n_layers(host.rooms), host.worker.name, at))

    def look(at: int, search: Search) -> tuple[int, str, int] | None:
        i, host, demand, _ = candidates[at]
        placed = place_partly(demand, host.worker, search)
        return None if placed is None else (-sum(placed.layers), host.worker.name, i)

    return _best(sorted(ranks), look, lambda at: candidates[at][1].sums[-1])


def _best(
    ranks: Sequence[tuple[Any, ...]],
    look: Callable[[int, Search], tuple[Any, ...] | None],
    room: Callable[[int], int],
) -> int | None:
    """Search the devices of the most promising workers, and return the position of the best one in the caller's list.

    The last element of a rank, and of a result of `look`, is a candidate's position.  In a large pool, searching the
    devices of workers takes most of the time.  Therefore only the first LOOKED_AT workers are searched and, if the load
    fits on none of them, the LOOKED_AT others with the most room; a second round tries every order of GPUs.  In a pool
    of more than twice LOOKED_AT workers, a load may be refused although it fits on a worker that was not searched,
    if its large layers happen to suit the GPUs there.
    """
    first, others = ranks[:LOOKED_AT], ranks[LOOKED_AT:]
    for search in SEARCHES:
        results = [rank for *_, at in first if (rank := look(at, search)) is not None]
        if not results:
            most = nlargest(LOOKED_AT, (at for *_, at in others), key=room)
            results = [rank for at in most if (rank := look(at, search)) is not None]
        if results:
            best: int = min(results)[-1]
            return best
    return None


def _cpu(candidates: Sequence[_Candidate]) -> int | None:
    """Choose the worker with the fewest instances, because instances share the processors of their host."""
    ranks = [
        (CPU in copies, host.worker.residents, host.worker.name, i)
        for i, host, demand, copies in candidates
        if demand.allows_cpu and host.cpu_room is not None and host.cpu_room >= demand.cpu_bytes
    ]
    return min(ranks)[-1] if ranks else None
