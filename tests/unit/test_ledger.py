"""The ledger against what the devices say."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from shared.schema.memory import CPU, Device, Usage
from worker.memory.ledger import TOLERANCE_BYTES, Ledger
from worker.memory.nvml import Reading

GIB = 1 << 30
TOTAL = 100 * GIB
KEPT = 2 * GIB
GPU = "GPU-a"


def reading(used: int = 0, users: Mapping[int, int] | None = None, id_: str = GPU) -> Reading:
    """Of a device of 100 GiB; in GiB, by process what the driver names."""
    named = {pid: n * GIB for pid, n in (users or {}).items()}
    free = TOTAL - used * GIB
    return Reading(id=id_, is_gpu=id_ != CPU, name="", total_bytes=TOTAL, free_bytes=free, users=named)


def takes(weights: int, *, context: int = 0, id_: str = GPU) -> Usage:
    return Usage(id=id_, weights_bytes=weights * GIB, context_bytes=context * GIB)


@pytest.fixture
def pool() -> Ledger:
    made = Ledger(lambda _: KEPT)
    made.update([reading()])
    return made


def loaded(pool: Ledger, instance: str, pid: int, weights: int) -> None:
    pool.reserve(instance, [takes(weights)])
    pool.started(instance, pid)
    pool.settle(instance, [takes(weights)])


def device(pool: Ledger, id_: str = GPU) -> Device:
    return next(device for device in pool.devices() if device.id == id_)


def available(pool: Ledger, id_: str = GPU) -> float:
    return device(pool, id_).available_bytes / GIB


def leaked(pool: Ledger) -> float:
    return device(pool).leaked_bytes / GIB


# ---- what is reserved


def test_what_is_reserved_or_kept_free_is_not_given_again(pool: Ledger) -> None:
    assert available(pool) == 98
    pool.reserve("a", [takes(30)])
    assert (available(pool), device(pool).reserved_bytes) == (68, 30 * GIB)
    pool.release("a")
    assert available(pool) == 98
    pool.release("a")
    assert available(pool) == 98, "nothing is given back twice"


def test_memory_that_a_load_uses_is_not_counted_beside_its_reservation(pool: Ledger) -> None:
    pool.reserve("a", [takes(30)])
    pool.started("a", 10)
    for used in (0, 10, 30):
        pool.update([reading(used, {10: used})])
        assert (available(pool), leaked(pool)) == (68, 0)


def test_what_the_engine_says_that_it_took_is_believed_over_the_estimate(pool: Ledger) -> None:
    pool.reserve("a", [takes(30)])
    pool.started("a", 10)
    pool.settle("a", [takes(25)])
    assert available(pool) == 73


def test_what_a_process_has_beside_its_model_counts_as_its_own(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(33, {10: 33})])
    assert (available(pool), leaked(pool)) == (65, 0)
    assert pool.others(GPU) == {}


# ---- changing a reservation


def test_a_reservation_is_changed_where_there_is_room_and_keeps_its_process(pool: Ledger) -> None:
    pool.reserve("a", [takes(30)])
    pool.started("a", 10)
    assert pool.change("a", [takes(98)]) == {}
    assert available(pool) == 0
    pool.update([reading(40, {10: 40})])
    assert pool.others(GPU) == {}, "10 is its runner still"


def test_where_there_is_no_room_for_a_change_it_says_what_lacks_and_nothing_is_changed(pool: Ledger) -> None:
    pool.reserve("a", [takes(30)])
    pool.reserve("b", [takes(60)])
    assert pool.change("a", [takes(45)]) == {GPU: 7 * GIB}
    assert available(pool) == 8
    assert pool.change("a", [takes(38)]) == {}


def test_a_device_that_the_worker_does_not_own_is_not_counted(pool: Ledger) -> None:
    pool.reserve("a", [takes(30)])
    assert pool.change("a", [takes(30), takes(500, id_=CPU)]) == {}
    pool.settle("a", [takes(30), takes(500, id_=CPU)])
    assert pool.reservations["a"].bytes == {GPU: 30 * GIB}


# ---- others


def test_what_another_program_uses_is_not_given_and_is_again_once_it_is_gone(pool: Ledger) -> None:
    pool.update([reading(20, {99: 20})])
    assert (available(pool), leaked(pool)) == (78, 0)
    assert pool.others(GPU) == {99: 20 * GIB}
    pool.update([reading()])
    assert available(pool) == 98


def test_another_program_counts_beside_what_loads_and_what_is_loaded(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {10: 30})])
    pool.reserve("b", [takes(20)])
    pool.started("b", 11)
    pool.update([reading(45, {10: 30, 11: 5, 99: 10})])
    assert (available(pool), leaked(pool)) == (38, 0)


# ---- what nobody is named for


def test_what_was_used_at_the_start_is_no_leak_and_is_given_once_it_goes_away() -> None:
    pool = Ledger(lambda _: KEPT)
    pool.update([reading(3)])
    assert (available(pool), leaked(pool)) == (95, 0)
    pool.update([reading(1)])
    assert (available(pool), leaked(pool)) == (97, 0)
    pool.update([reading(3)])
    assert (available(pool), leaked(pool)) == (95, 2), "what comes after the start is leaked"


def test_a_leak_is_seen_and_not_given_and_is_given_once_it_is_back(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {10: 30})])
    pool.leaving("a")
    pool.update([reading(12)])
    pool.release("a")
    pool.update([reading(12)])
    assert (available(pool), leaked(pool)) == (86, 12)
    pool.update([reading(0)])
    assert (available(pool), leaked(pool)) == (98, 0)


@pytest.mark.parametrize("so_far", [0, 5, 20])
def test_a_load_on_its_way_neither_hides_a_leak_nor_looks_like_one(pool: Ledger, so_far: int) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {10: 30})])
    pool.reserve("b", [takes(20)])
    pool.started("b", 11)
    users = {11: so_far} if so_far else {}
    pool.update([reading(30 + so_far, {10: 30, **users})])
    assert leaked(pool) == 0
    pool.leaving("a")
    pool.release("a")
    pool.update([reading(so_far + 8, users)])
    assert (available(pool), leaked(pool)) == (70, 8)
    pool.settle("b", [takes(20)])
    pool.update([reading(28, {11: 20})])
    assert (available(pool), leaked(pool)) == (70, 8)


def test_a_leak_of_before_stays_known_while_something_loads_that_nobody_names() -> None:
    """In a container in which the driver names no process."""
    pool = Ledger(lambda _: KEPT)
    pool.update([reading()])
    loaded(pool, "a", 10, 30)
    pool.update([reading(38)])
    assert leaked(pool) == 8
    pool.reserve("b", [takes(20)])
    pool.started("b", 11)
    for so_far in (0, 10, 20):
        pool.update([reading(38 + so_far)])
        assert (available(pool), leaked(pool)) == (40, 8)


def test_the_hosts_memory_leaks_nothing_and_what_others_use_of_it_is_not_given() -> None:
    pool = Ledger(lambda _: KEPT)
    pool.update([reading(10, id_=CPU)])
    assert (available(pool, CPU), device(pool, CPU).leaked_bytes) == (88, 0)
    pool.reserve("a", [takes(30, context=5, id_=CPU)])
    pool.started("a", 10)
    pool.settle("a", [takes(30, context=5, id_=CPU)])
    pool.update([reading(15, id_=CPU)])
    assert available(pool, CPU) == 53, "its weights are in the page cache, which counts as free"
    assert device(pool, CPU).leaked_bytes == 0


def test_of_a_gpu_that_the_driver_has_lost_nothing_is_given_until_it_is_back(pool: Ledger) -> None:
    pool.update([reading(100)])
    assert available(pool) <= 0
    pool.update([reading(0)])
    assert available(pool) == 98


# ---- in a container, where the driver names our processes by numbers that we do not know


def test_our_processes_under_foreign_numbers_are_not_counted_twice(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(31, {1010: 31})])
    assert (available(pool), leaked(pool)) == (67, 0), "what it has beside its model is somebody's"
    pool.update([reading(51, {1010: 31, 99: 20})])
    assert (available(pool), leaked(pool)) == (47, 0)


@pytest.mark.parametrize("so_far", [0, 5, 20])
def test_a_load_on_its_way_under_a_foreign_number_is_not_counted_twice(pool: Ledger, so_far: int) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(40, {1010: 30, 99: 10})])
    pool.reserve("b", [takes(20)])
    pool.started("b", 11)
    pool.update([reading(40 + so_far, {1010: 30, 99: 10, 1011: so_far})])
    assert (available(pool), leaked(pool)) == (38, 0)


# ---- giving back


def test_memory_is_back_once_its_process_is_not_named_and_no_more_is_used_than_others_explain(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    loaded(pool, "b", 11, 20)
    pool.update([reading(60, {10: 30, 11: 20, 99: 10})])
    pool.leaving("a")
    still_there: list[tuple[int, dict[int, int]]] = [
        (60, {10: 30, 11: 20, 99: 10}),
        (30, {10: 0, 11: 20, 99: 10}),
        (50, {11: 20, 99: 10}),
    ]
    for used, users in still_there:
        pool.update([reading(used, users)])
        assert not pool.is_back("a"), (used, users)
    pool.update([reading(30, {11: 20, 99: 10})])
    assert pool.is_back("a")


def test_a_little_more_than_before_is_taken_for_rounding(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {10: 30})])
    pool.leaving("a")
    for more, is_back in ((TOLERANCE_BYTES, True), (TOLERANCE_BYTES + 1, False)):
        found: Any = reading()
        pool.update([Reading(id=GPU, is_gpu=True, name="", total_bytes=TOTAL, free_bytes=found.free_bytes - more)])
        assert pool.is_back("a") is is_back


def test_memory_of_the_host_is_back_at_once() -> None:
    pool = Ledger(lambda _: KEPT)
    pool.update([reading(10, id_=CPU)])
    pool.reserve("a", [takes(30, id_=CPU)])
    pool.leaving("a")
    assert pool.is_back("a")


def test_under_a_foreign_number_memory_is_back_once_it_is_free(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {1010: 30})])
    pool.leaving("a")
    pool.update([reading(30, {1010: 30})])
    assert not pool.is_back("a")
    pool.update([reading(0)])
    assert pool.is_back("a")


def test_what_is_leaving_is_not_given_before_it_is_released(pool: Ledger) -> None:
    loaded(pool, "a", 10, 30)
    pool.update([reading(30, {10: 30})])
    pool.leaving("a")
    pool.update([reading(0)])
    assert available(pool) == 68
    pool.release("a")
    assert available(pool) == 98
