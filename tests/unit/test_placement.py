"""Placement compared with an exhaustive search over splits, victims and workers of small pools."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import combinations, permutations
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec import UNSET, structs

from shared.memory.choose import Host, choose
from shared.memory.estimate import CELLS, Requirements, requirements_of
from shared.memory.figures import Figures
from shared.memory.placement import (
    Constraints,
    Demand,
    Placement,
    available,
    has_gpu,
    place,
    place_now,
)
from shared.memory.plan import plan
from shared.schema.http import GPURequest, LoadRequest
from shared.schema.memory import CPU, Device, Holding
from shared.schema.model import Dimensions, Model, Weights
from shared.schema.snapshot import Sizing, WorkerSnapshot
from shared.settings import Settings

GPUS = ["GPU-a", "GPU-b", "GPU-c", "GPU-d"]
ANY = Constraints()
Kind = Literal["one", "several", "evicting", "partly", "cpu", "evicting on the cpu"]
KINDS: list[Kind] = ["one", "several", "evicting", "partly", "cpu", "evicting on the cpu"]


def requiring(*weights: int, **fields: Any) -> Requirements:
    """Return requirements with these weights per layer; all other parts are zero except these fields."""
    usual: dict[str, Any] = {
        "context": [0] * len(weights),
        "tied_bytes": 0,
        "input_bytes": 0,
        "compute_bytes": 0,
        "inner_compute_bytes": 0,
        "cpu_compute_bytes": 0,
        "cpu_inner_compute_bytes": 0,
        "host_compute_bytes": 0,
        "offload_kqv": True,
        "exact": True,
    }
    return Requirements(weights=[*weights], **usual | fields)


def device(id_: str, room: int) -> Device:
    kind: Literal["gpu", "cpu"] = "cpu" if id_ == CPU else "gpu"
    return Device(id=id_, kind=kind, name="", total_bytes=1000, free_bytes=max(0, room), available_bytes=room)


def worker(
    rooms: Sequence[int], cpu: int | None = 1000, held: Sequence[Holding] = (), name: str = "w", partly: bool = False
) -> WorkerSnapshot:
    """Return a worker whose GPUs and host memory have so much room; None: the worker does not own the CPU."""
    devices = [device(id_, room) for id_, room in zip(GPUS, rooms, strict=False)]
    return WorkerSnapshot(
        name=name,
        epoch="",
        version="",
        catalog="",
        residents=len(held),
        devices=devices if cpu is None else [*devices, device(CPU, cpu)],
        held=[*held],
        partly_on_cpu=partly,
    )


def holding(name: str, used_at: float = 0.0, *, evictable: bool = True, key: str = "", **bytes_: int) -> Holding:
    devices = {CPU if id_ == "cpu" else f"GPU-{id_}": n for id_, n in bytes_.items()}
    return Holding(instance_id=name, key=key, devices=devices, used_at=used_at, is_evictable=evictable)


# ---- any requirements, constraints and workers


@st.composite
def any_requirements(draw: st.DrawFn) -> Requirements:
    n = draw(st.integers(1, 6))
    size = st.integers(0, 8)
    inner, host = draw(size), draw(size)
    cpu_inner = host + draw(size)
    return requiring(
        *draw(st.lists(st.integers(0, 30), min_size=n, max_size=n)),
        context=draw(st.lists(size, min_size=n, max_size=n)),
        tied_bytes=draw(size),
        input_bytes=draw(size),
        inner_compute_bytes=inner,
        compute_bytes=inner + draw(size),
        host_compute_bytes=host,
        cpu_compute_bytes=cpu_inner + draw(size),
        cpu_inner_compute_bytes=cpu_inner,
        offload_kqv=draw(st.booleans()),
    )


split_ways = st.sampled_from(["even", "priority"]) | st.lists(
    st.integers(1, 5).map(float), min_size=len(GPUS), max_size=len(GPUS)
)
any_constraints = st.builds(
    Constraints,
    offload=st.sampled_from([1.0, 1.0, 1.0, 0.7, 0.3, 0.0]),
    is_partly=st.booleans(),
    devices=st.just([]) | st.permutations([*GPUS, CPU]).flatmap(lambda ids: st.integers(1, 5).map(lambda n: ids[:n])),
    split=st.none() | st.none() | split_ways,
).map(lambda constraints: structs.replace(constraints, is_partly=constraints.is_partly and constraints.offload == 1.0))

held_ = st.builds(
    Holding,
    instance_id=st.uuids().map(str),
    key=st.sampled_from(["m", "other"]),
    devices=st.dictionaries(st.sampled_from([*GPUS, CPU]), st.integers(0, 60), min_size=1, max_size=2),
    used_at=st.integers(0, 5).map(float),
    is_evictable=st.sampled_from([True, True, False]),
    is_busy=st.sampled_from([False, False, False, True]),
)


@st.composite
def workers(draw: st.DrawFn, name: str = "w") -> WorkerSnapshot:
    rooms = draw(st.lists(st.integers(-10, 90), max_size=len(GPUS)))
    cpu = draw(st.none() | st.integers(0, 250))
    held = []
    for one in draw(st.lists(held_, max_size=4)):
        devices = {
            id_: n for id_, n in one.devices.items() if id_ in {*GPUS[: len(rooms)], *([] if cpu is None else [CPU])}
        }
        held.append(structs.replace(one, devices=devices))
    return worker(rooms, cpu, held, name, partly=draw(st.booleans()))


# ---- the oracle: an exhaustive search


def splits(requirements: Requirements, first: int, gpus: Sequence[str], free: Mapping[str, int]) -> Iterator[int]:
    """Yield the number of parts for every split of the layers from `first` on over these GPUs, in this order, in which
    each GPU has room for its part."""
    if len(gpus) == 1:
        if (
            first < requirements.n_layers
            and requirements.on_gpu("", first, requirements.n_layers).total_bytes <= free[gpus[0]]
        ):
            yield 1
        return
    for end in range(first + 1, requirements.n_layers):
        if requirements.on_gpu("", first, end).total_bytes <= free[gpus[0]]:
            yield from (1 + n for n in splits(requirements, end, gpus[1:], free))


def fewest(
    requirements: Requirements, constraints: Constraints, first: int, there: WorkerSnapshot, free: Mapping[str, int]
) -> int | None:
    """Return the fewest GPUs that have room for the layers from `first` on; None if all GPUs together have not."""
    gpus = constraints.gpus(there.devices)
    n = requirements.n_layers - first
    if not gpus:
        return None
    if constraints.split is not None and constraints.split != "priority":
        if not isinstance(constraints.split, str) and len(constraints.split) > len(gpus):
            return None
        ratios = [1] * len(gpus) if constraints.split == "even" else [int(ratio) for ratio in constraints.split]
        cumulated = [Fraction(sum(ratios[: i + 1]), sum(ratios)) for i in range(len(ratios))]
        # llama.cpp's load_tensors: std::upper_bound of i / n in the cumulated parts, at most the last device.
        of = [min(sum(part <= Fraction(i, n) for part in cumulated), len(gpus) - 1) for i in range(n)]
        used = sorted(set(of))
        has_room = all(
            requirements.on_gpu("", first + of.index(i), first + n - of[::-1].index(i)).total_bytes <= free[gpus[i]]
            for i in used
        )
        return len(used) if has_room else None
    for k in range(1, min(len(gpus), n) + 1):
        orders = combinations(gpus, k) if constraints.split == "priority" else permutations(gpus, k)
        if any(True for order in orders for _ in splits(requirements, first, order, free)):
            return k
    return None


def first_of(requirements: Requirements, constraints: Constraints) -> int:
    return requirements.n_layers - (
        0 if constraints.devices == [CPU] else int(constraints.offload * requirements.n_layers + 1e-9)
    )


def beside_has_room(requirements: Requirements, first: int, free: Mapping[str, int]) -> bool:
    return requirements.beside_gpus(first).total_bytes <= free[CPU] if CPU in free else first == 0


def cpu_has_room(requirements: Requirements, constraints: Constraints, free: Mapping[str, int]) -> bool:
    return (
        CPU in free
        and requirements.on_cpu().total_bytes <= free[CPU]
        and (not constraints.devices or CPU in constraints.devices)
    )


def has_room(
    requirements: Requirements, constraints: Constraints, there: WorkerSnapshot, free: Mapping[str, int]
) -> bool:
    """Return whether any placement has as many layers on GPUs as the constraints ask for."""
    first = first_of(requirements, constraints)
    if first == requirements.n_layers or not has_gpu(there.devices):
        return cpu_has_room(requirements, constraints, free)
    return (
        beside_has_room(requirements, first, free) and fewest(requirements, constraints, first, there, free) is not None
    )


def without(there: WorkerSnapshot, victims: Collection[Holding]) -> dict[str, int]:
    free = available(there.devices)
    for held in victims:
        for id_, n_bytes in held.devices.items():
            free[id_] += n_bytes
    return free


def oldest_first(there: WorkerSnapshot) -> list[Holding]:
    return sorted((held for held in there.held if held.is_victim), key=lambda held: (held.used_at, held.instance_id))


def victims_of(requirements: Requirements, constraints: Constraints, there: WorkerSnapshot) -> list[Holding] | None:
    """Return the victims that make room, compared by the most recently used instance first: a set that spares it is
    better than a set that does not, then by the next one, and so on."""
    idle = oldest_first(there)
    enough = (
        chosen
        for n in range(len(idle) + 1)
        for chosen in combinations(idle, n)
        if has_room(requirements, constraints, there, without(there, chosen))
    )
    return min(map(list, enough), key=lambda chosen: [held in chosen for held in idle[::-1]], default=None)


def most_layers(requirements: Requirements, constraints: Constraints, there: WorkerSnapshot) -> int | None:
    """Return the most layers that fit on GPUs with the others on the CPU; None if there is no such placement."""
    free = available(there.devices)
    if not (there.partly_on_cpu and constraints.is_partly and has_gpu(there.devices)) or CPU not in free:
        return None
    if constraints.devices and CPU not in constraints.devices:
        return None
    for first in range(1, requirements.n_layers):
        if (
            beside_has_room(requirements, first, free)
            and fewest(requirements, constraints, first, there, free) is not None
        ):
            return requirements.n_layers - first
    return 0 if cpu_has_room(requirements, constraints, free) else None


def kind_of(requirements: Requirements, constraints: Constraints, there: WorkerSnapshot, placed: Placement) -> Kind:
    is_on_cpu = first_of(requirements, constraints) == requirements.n_layers or not has_gpu(there.devices)
    if placed.evicts:
        return "evicting on the cpu" if is_on_cpu else "evicting"
    if is_on_cpu:
        return "cpu"
    if sum(placed.layers) < requirements.n_layers - first_of(requirements, constraints):
        return "partly"
    return "one" if len(placed.gpus) == 1 and constraints.split is None else "several"


# ---- one worker


@settings(max_examples=200)
@given(any_requirements(), any_constraints, workers())
def test_a_load_is_placed_exactly_if_there_is_room(
    requirements: Requirements, constraints: Constraints, there: WorkerSnapshot
) -> None:
    placed = place(Demand(requirements, constraints), there)
    expected = victims_of(requirements, constraints, there)
    fewer = most_layers(requirements, constraints, there) if expected is None else None
    if placed is None:
        assert expected is None
        assert fewer is None
    elif expected is not None:
        assert sorted(held.instance_id for held in placed.evicts) == sorted(held.instance_id for held in expected)
        assert sum(placed.layers) in (requirements.n_layers - first_of(requirements, constraints), 0)
    else:
        assert fewer == sum(placed.layers), "as many layers as there is room for"
        assert not placed.evicts


@settings(max_examples=150)
@given(any_requirements(), any_constraints, workers())
def test_parts_fit_their_devices_and_make_up_the_model(
    requirements: Requirements, constraints: Constraints, there: WorkerSnapshot
) -> None:
    if (placed := place(Demand(requirements, constraints), there)) is None:
        return
    free = without(there, placed.evicts)
    assert all(n_bytes <= free[id_] for id_, n_bytes in placed.bytes.items())
    assert len(placed.gpus) == len(placed.layers) == len(set(placed.gpus))
    assert all(n > 0 for n in placed.layers)
    assert set(placed.gpus) <= set(constraints.gpus(there.devices))
    start = first = requirements.n_layers - sum(placed.layers)
    for id_, n in zip(placed.gpus, placed.layers, strict=True):
        assert placed.bytes[id_] == requirements.on_gpu(id_, start, start + n).total_bytes
        start += n
    beside = requirements.beside_gpus(first) if placed.gpus else requirements.on_cpu()
    assert placed.bytes.get(CPU) == (beside.total_bytes if CPU in free else None)
    if constraints.devices and not placed.gpus:
        assert CPU in constraints.devices


@settings(max_examples=150)
@given(any_requirements(), st.lists(st.integers(0, 90), min_size=1, max_size=4))
def test_the_tightest_gpu_is_used_else_the_fewest_gpus(requirements: Requirements, rooms: list[int]) -> None:
    there = worker(rooms)
    placed = place_now(Demand(requirements, ANY), there)
    enough = [room for room in rooms if room >= requirements.single(0)]
    if enough:
        assert placed is not None
        assert [rooms[GPUS.index(id_)] for id_ in placed.gpus] == [min(enough)]
    else:
        k = fewest(requirements, ANY, 0, there, available(there.devices))
        assert (None if placed is None else len(placed.gpus)) == k


@settings(max_examples=150)
@given(any_requirements(), any_constraints, workers())
def test_no_victim_is_unnecessary(requirements: Requirements, constraints: Constraints, there: WorkerSnapshot) -> None:
    placed = place(Demand(requirements, constraints), there)
    if placed is None or not placed.evicts:
        return
    assert all(held.is_evictable and not held.is_busy and held in there.held for held in placed.evicts)
    assert has_room(requirements, constraints, there, without(there, placed.evicts))
    for held in placed.evicts:
        others = [one for one in placed.evicts if one is not held]
        assert not has_room(requirements, constraints, there, without(there, others)), (
            "there is room without this victim"
        )


def test_the_older_of_two_sufficient_victims_is_evicted() -> None:
    there = worker(
        [10], held=[holding("new", 2.0, a=40), holding("old", 1.0, a=40), holding("busy", evictable=False, a=9)]
    )
    placed = place(Demand(requiring(45), ANY), there)
    assert placed is not None
    assert [held.instance_id for held in placed.evicts] == ["old"]


def test_an_old_instance_too_small_to_help_is_spared() -> None:
    there = worker([10], held=[holding("old", 1.0, a=5), holding("new", 2.0, a=40)])
    placed = place(Demand(requiring(45), ANY), there)
    assert placed is not None
    assert [held.instance_id for held in placed.evicts] == ["new"]


def test_several_gpus_are_filled_about_equally() -> None:
    there = worker([100, 200, 100])
    placed = place(Demand(requiring(*[1] * 300, compute_bytes=5, inner_compute_bytes=5), ANY), there)
    assert placed is not None
    parts = {id_: placed.bytes[id_] / available(there.devices)[id_] for id_ in placed.gpus}
    assert len(parts) == 3
    assert max(parts.values()) - min(parts.values()) < 0.05


def test_layers_that_fit_in_only_one_order_are_placed() -> None:
    """Only the GPU with 31 has room for the layer of 30; it has neither the most nor the least room."""
    placed = place(Demand(requiring(40, 30, 10), ANY), worker([31, 11, 41]))
    assert placed is not None
    assert placed.gpus == ["GPU-c", "GPU-a", "GPU-b"]
    middle = place(Demand(requiring(9, 30, 10), ANY), worker([30, 9, 10]))
    assert middle is not None
    assert middle.gpus == ["GPU-b", "GPU-a", "GPU-c"]


# ---- constraints of a request


@pytest.mark.parametrize(
    ("offload", "n"), [(UNSET, 33), ("max", 33), ("off", 0), (1.0, 33), (0.0, 0), (0.5, 16), (1 / 33, 1), (0.999, 32)]
)
def test_the_offload_ratio_is_rounded_down_to_whole_layers(offload: Any, n: int) -> None:
    assert Constraints.of(GPURequest(offload=offload)).n_layers(requiring(*[1] * 33)) == n


def test_only_automatic_offload_may_use_fewer_gpu_layers() -> None:
    there = worker([25], partly=True)
    requirements = requiring(10, 10, 10)
    for request, expected in ((GPURequest(), [2]), (GPURequest(offload="max"), None), (GPURequest(offload=1.0), None)):
        placed = place(Demand(requirements, Constraints.of(request)), there)
        assert (None if placed is None else placed.layers) == expected, request
    assert place(Demand(requirements, ANY), structs.replace(there, partly_on_cpu=False)) is None


def test_the_cpu_holds_exactly_the_layers_that_no_gpu_can() -> None:
    """The CPU would not have room for half of the layers."""
    placed = place(Demand(requiring(10, 10, 10, 10), ANY), worker([35], cpu=10, partly=True))
    assert placed is not None
    assert placed.layers == [3]


def test_a_worker_without_the_cpu_puts_no_layers_there() -> None:
    half = Constraints(offload=0.5, is_partly=False)
    assert place(Demand(requiring(10, 10), half), worker([100], cpu=None)) is None
    assert choose([(Host(worker([100], cpu=None)), Demand(requiring(10, 10), half))]) is None
    assert place(Demand(requiring(10, 10), ANY), worker([100], cpu=None)) is not None


def test_gpus_take_layers_in_the_order_of_the_request() -> None:
    constraints = Constraints(devices=["GPU-c", "GPU-a"], split="even")
    placed = place(Demand(requiring(1, 1, 1), constraints), worker([9, 9, 9]))
    assert placed is not None
    assert (placed.gpus, placed.layers) == (["GPU-c", "GPU-a"], [2, 1])


def test_priority_fills_gpus_in_order_and_skips_full_ones() -> None:
    constraints = Constraints(split="priority")
    placed = place(Demand(requiring(10, 10, 10, 10), constraints), worker([25, 5, 90]))
    assert placed is not None
    assert (placed.gpus, placed.layers) == (["GPU-a", "GPU-c"], [2, 2])


@given(st.integers(1, 130), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.booleans())
def test_a_split_is_the_same_as_in_llama_cpp(n: int, ratios: list[int], even: bool) -> None:
    ratios = [1] * len(ratios) if even else ratios
    constraints = Constraints(split="even" if even else [*map(float, ratios)])
    placed = place(Demand(requiring(*[1] * n), constraints), worker([1000] * len(ratios)))
    assert placed is not None
    parts = [Fraction(sum(ratios[: i + 1]), sum(ratios)) for i in range(len(ratios))]
    expected = [0] * len(ratios)
    for i in range(n):
        expected[sum(part <= Fraction(i, n) for part in parts)] += 1
    assert dict(zip(placed.gpus, placed.layers, strict=True)) == {
        id_: layers for id_, layers in zip(GPUS, expected, strict=False) if layers
    }


def test_a_load_restricted_to_the_cpu_is_placed_there() -> None:
    there = worker([100], held=[holding("idle", cpu=50)], cpu=20)
    only = Constraints(devices=[CPU])
    placed = place(Demand(requiring(10), only), there)
    assert placed is not None
    assert placed.devices == [CPU]
    evicting = place(Demand(requiring(60), only), there)
    assert evicting is not None
    assert [held.instance_id for held in evicting.evicts] == ["idle"]


def test_a_load_without_gpus_evicts_from_host_memory() -> None:
    there = worker([0], held=[holding("idle", cpu=50)], cpu=20)
    off = Constraints(offload=0.0, is_partly=False)
    requirements = requiring(60, input_bytes=5, tied_bytes=5)
    demand = Demand(requirements, off)
    assert place(demand, there) is not None
    assert choose([(Host(there), demand)]) == 0


# ---- among workers


@settings(max_examples=200)
@given(any_requirements(), any_constraints, st.data())
def test_the_best_kind_of_placement_of_all_workers_is_chosen(
    requirements: Requirements, constraints: Constraints, data: st.DataObject
) -> None:
    pool = [data.draw(workers(f"w{i}")) for i in range(data.draw(st.integers(1, 3)))]
    demand = Demand(requirements, constraints, "m")
    placed = [place(demand, there) for there in pool]
    kinds = [
        None if placement is None else kind_of(requirements, constraints, there, placement)
        for there, placement in zip(pool, placed, strict=True)
    ]
    i = choose([(Host(there), demand) for there in pool])
    if i is None:
        assert kinds == [None] * len(pool)
        return
    kind, placement = kinds[i], placed[i]
    assert kind is not None
    assert placement is not None
    assert KINDS.index(kind) == min(KINDS.index(other) for other in kinds if other is not None)
    alike = {j: one for j, one in enumerate(placed) if one is not None and kinds[j] == kind}
    match kind:
        case "one" if not any(
            held.key == "m" for there in pool for held in there.held
        ):  # otherwise copies of the model decide first
            left = {j: available(pool[j].devices)[one.gpus[0]] - one.bytes[one.gpus[0]] for j, one in alike.items()}
            assert left[i] == min(left.values())
        case "several":
            assert len(placement.gpus) == min(len(other.gpus) for other in alike.values())
        case "evicting" | "evicting on the cpu":
            assert len(placement.evicts) == min(len(other.evicts) for other in alike.values())
        case "partly":
            assert sum(placement.layers) == max(sum(other.layers) for other in alike.values())


def test_the_worker_with_the_tightest_gpu_is_chosen() -> None:
    demand = Demand(requiring(40), ANY)
    pool = [(Host(worker(rooms, name=f"w{i}")), demand) for i, rooms in enumerate([[90, 50], [45, 100], [60]])]
    assert choose(pool) == 1


def test_a_second_instance_prefers_another_device() -> None:
    first = holding("m", key="m", evictable=False, a=40)
    beside, elsewhere = worker([100, 50], held=[first], name="w0"), worker([45], name="w1")
    alone = worker([100], held=[first], name="w0")
    demand = Demand(requiring(40), ANY, "m")

    def chosen(*pool: WorkerSnapshot) -> tuple[int, list[str]]:
        i = choose([(Host(there), demand) for there in pool])
        assert i is not None
        placed = place(demand, pool[i])
        assert placed is not None
        return i, placed.gpus

    assert chosen(elsewhere, beside) == (1, ["GPU-b"])
    assert chosen(elsewhere, alone) == (0, ["GPU-a"])
    assert chosen(alone) == (0, ["GPU-a"])


def test_a_new_placement_counts_before_the_next_snapshot() -> None:
    host = Host(worker([50]))
    later = host.holding([holding("m", key="m", evictable=False, a=40)])
    demand = Demand(requiring(40), ANY)
    assert choose([(host, demand)]) == 0
    assert choose([(later, demand)]) is None


def test_the_cpu_worker_with_the_fewest_instances_is_chosen() -> None:
    busy = worker([], held=[holding("x", evictable=False, cpu=1)], name="w0")
    demand = Demand(requiring(10), ANY)
    assert choose([(Host(there), demand) for there in (busy, worker([], cpu=500, name="w1"))]) == 1


# ---- the largest context

MAXIMUM = 8192
MODEL = Model(
    key="p/m",
    base="p/m",
    variant="",
    shards=[],
    size_bytes=4200,
    architecture="llama",
    max_context_length=MAXIMUM,
    dimensions=Dimensions(
        block_count=4,
        embedding_length=8,
        head_count=2,
        head_count_kv=2,
        key_length=4,
        value_length=4,
        feed_forward_length=16,
        vocabulary=100,
    ),
    weights=Weights(input_bytes=1000, repeating_bytes=4000, output_bytes=1000, has_output=True),
)


async def no_engine(_: Sizing) -> None:
    """Be an engine that does not answer."""


@settings(max_examples=50)
@given(
    st.lists(st.integers(0, 9_000_000), max_size=3),
    st.none() | st.integers(0, 9_000_000),
    st.sampled_from(
        [ANY, Constraints(split="even"), Constraints(split="priority"), Constraints(offload=0.5, is_partly=False)]
    ),
    st.booleans(),
)
def test_the_largest_context_length_is_the_longest_that_fits(
    rooms: list[int], cpu: int | None, constraints: Constraints, partly: bool
) -> None:
    there, defaults = worker(rooms, cpu, partly=partly), Settings()

    def fits(requirements: Requirements) -> bool:
        return place(Demand(requirements, constraints), there) is not None

    def fits_with(context_length: int) -> bool:
        request = LoadRequest(model="p/m", context_length=context_length)
        return fits(requirements_of(MODEL, plan(request, MODEL, defaults)))

    lengths = [length for length in range(CELLS, MAXIMUM + 1, CELLS) if fits_with(length)]
    figures = Figures(LoadRequest(model="p/m"), MODEL, defaults, [], no_engine)
    now = fits(figures.formula)
    assert asyncio.run(figures.largest_context_length(fits, fits=now)) == max(lengths, default=None)
