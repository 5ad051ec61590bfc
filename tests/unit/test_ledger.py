"""The memory ledger: reservations against the readings of devices."""

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
    """Return a reading of a device of 100 GiB; `used` and `users`, by PID, in GiB."""
    named = {pid: n * GIB for pid, n in (users or {}).items()}
    free = TOTAL - used * GIB
    return Reading(id=id_, is_gpu=id_ != CPU, name="", total_bytes=TOTAL, free_bytes=free, users=named)


def usage(weights: int, *, context: int = 0, id_: str = GPU) -> Usage:
    return Usage(id=id_, weights_bytes=weights * GIB, context_bytes=context * GIB)


@pytest.fixture
def ledger() -> Ledger:
    made = Ledger(lambda _: KEPT)
    made.update([reading()])
    return made


def loaded(ledger: Ledger, instance: str, pid: int, weights: int) -> None:
    ledger.reserve(instance, [usage(weights)])
    ledger.started(instance, pid)
    ledger.settle(instance, [usage(weights)])


def device(ledger: Ledger, id_: str = GPU) -> Device:
    return next(device for device in ledger.devices() if device.id == id_)


def available(ledger: Ledger, id_: str = GPU) -> float:
    return device(ledger, id_).available_bytes / GIB


def leaked(ledger: Ledger) -> float:
    return device(ledger).leaked_bytes / GIB


# ---- reservations


def test_reserved_memory_is_not_available(ledger: Ledger) -> None:
    assert available(ledger) == 98
    ledger.reserve("a", [usage(30)])
    assert (available(ledger), device(ledger).reserved_bytes) == (68, 30 * GIB)
    ledger.release("a")
    assert available(ledger) == 98
    ledger.release("a")
    assert available(ledger) == 98, "a second release has no effect"


def test_a_load_does_not_count_beside_its_reservation(ledger: Ledger) -> None:
    ledger.reserve("a", [usage(30)])
    ledger.started("a", 10)
    for used in (0, 10, 30):
        ledger.update([reading(used, {10: used})])
        assert (available(ledger), leaked(ledger)) == (68, 0)


def test_the_usage_of_the_engine_replaces_the_estimate(ledger: Ledger) -> None:
    ledger.reserve("a", [usage(30)])
    ledger.started("a", 10)
    ledger.settle("a", [usage(25)])
    assert available(ledger) == 73


def test_other_memory_of_a_runner_counts_as_its_own(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(33, {10: 33})])
    assert (available(ledger), leaked(ledger)) == (65, 0)
    assert ledger.others(GPU) == {}


# ---- changing a reservation


def test_a_changed_reservation_keeps_its_process(ledger: Ledger) -> None:
    ledger.reserve("a", [usage(30)])
    ledger.started("a", 10)
    assert ledger.change("a", [usage(98)]) == {}
    assert available(ledger) == 0
    ledger.update([reading(40, {10: 40})])
    assert ledger.others(GPU) == {}, "PID 10 is still the runner"


def test_a_change_without_room_names_the_missing_bytes(ledger: Ledger) -> None:
    ledger.reserve("a", [usage(30)])
    ledger.reserve("b", [usage(60)])
    assert ledger.change("a", [usage(45)]) == {GPU: 7 * GIB}
    assert available(ledger) == 8
    assert ledger.change("a", [usage(38)]) == {}


def test_a_device_of_another_worker_is_not_counted(ledger: Ledger) -> None:
    ledger.reserve("a", [usage(30)])
    assert ledger.change("a", [usage(30), usage(500, id_=CPU)]) == {}
    ledger.settle("a", [usage(30), usage(500, id_=CPU)])
    assert ledger.reservations["a"].bytes == {GPU: 30 * GIB}


# ---- other programs


def test_memory_of_another_program_is_available_once_it_ends(ledger: Ledger) -> None:
    ledger.update([reading(20, {99: 20})])
    assert (available(ledger), leaked(ledger)) == (78, 0)
    assert ledger.others(GPU) == {99: 20 * GIB}
    ledger.update([reading()])
    assert available(ledger) == 98


def test_another_program_counts_beside_instances(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {10: 30})])
    ledger.reserve("b", [usage(20)])
    ledger.started("b", 11)
    ledger.update([reading(45, {10: 30, 11: 5, 99: 10})])
    assert (available(ledger), leaked(ledger)) == (38, 0)


# ---- memory without a named process


def test_memory_in_use_at_the_start_is_not_a_leak() -> None:
    ledger = Ledger(lambda _: KEPT)
    ledger.update([reading(3)])
    assert (available(ledger), leaked(ledger)) == (95, 0)
    ledger.update([reading(1)])
    assert (available(ledger), leaked(ledger)) == (97, 0)
    ledger.update([reading(3)])
    assert (available(ledger), leaked(ledger)) == (95, 2), "memory used after the start is leaked"


def test_leaked_memory_is_available_once_it_is_free(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {10: 30})])
    ledger.leaving("a")
    ledger.update([reading(12)])
    ledger.release("a")
    ledger.update([reading(12)])
    assert (available(ledger), leaked(ledger)) == (86, 12)
    ledger.update([reading(0)])
    assert (available(ledger), leaked(ledger)) == (98, 0)


@pytest.mark.parametrize("so_far", [0, 5, 20])
def test_a_load_in_progress_does_not_change_a_leak(ledger: Ledger, so_far: int) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {10: 30})])
    ledger.reserve("b", [usage(20)])
    ledger.started("b", 11)
    users = {11: so_far} if so_far else {}
    ledger.update([reading(30 + so_far, {10: 30, **users})])
    assert leaked(ledger) == 0
    ledger.leaving("a")
    ledger.release("a")
    ledger.update([reading(so_far + 8, users)])
    assert (available(ledger), leaked(ledger)) == (70, 8)
    ledger.settle("b", [usage(20)])
    ledger.update([reading(28, {11: 20})])
    assert (available(ledger), leaked(ledger)) == (70, 8)


def test_an_earlier_leak_stays_during_a_load_without_a_pid() -> None:
    """In a container the driver may name no process."""
    ledger = Ledger(lambda _: KEPT)
    ledger.update([reading()])
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(38)])
    assert leaked(ledger) == 8
    ledger.reserve("b", [usage(20)])
    ledger.started("b", 11)
    for so_far in (0, 10, 20):
        ledger.update([reading(38 + so_far)])
        assert (available(ledger), leaked(ledger)) == (40, 8)


def test_host_memory_of_other_programs_is_not_available() -> None:
    ledger = Ledger(lambda _: KEPT)
    ledger.update([reading(10, id_=CPU)])
    assert (available(ledger, CPU), device(ledger, CPU).leaked_bytes) == (88, 0)
    ledger.reserve("a", [usage(30, context=5, id_=CPU)])
    ledger.started("a", 10)
    ledger.settle("a", [usage(30, context=5, id_=CPU)])
    ledger.update([reading(15, id_=CPU)])
    assert available(ledger, CPU) == 53, "the weights are in the page cache, which counts as free"
    assert device(ledger, CPU).leaked_bytes == 0


def test_a_lost_gpu_has_nothing_available_until_it_is_back(ledger: Ledger) -> None:
    ledger.update([reading(100)])
    assert available(ledger) <= 0
    ledger.update([reading(0)])
    assert available(ledger) == 98


# ---- in a container, where the driver shows PIDs of another namespace


def test_runners_with_foreign_pids_are_not_counted_twice(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(31, {1010: 31})])
    assert (available(ledger), leaked(ledger)) == (67, 0), "memory beside the model belongs to an unknown process"
    ledger.update([reading(51, {1010: 31, 99: 20})])
    assert (available(ledger), leaked(ledger)) == (47, 0)


@pytest.mark.parametrize("so_far", [0, 5, 20])
def test_a_load_with_a_foreign_pid_is_not_counted_twice(ledger: Ledger, so_far: int) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(40, {1010: 30, 99: 10})])
    ledger.reserve("b", [usage(20)])
    ledger.started("b", 11)
    ledger.update([reading(40 + so_far, {1010: 30, 99: 10, 1011: so_far})])
    assert (available(ledger), leaked(ledger)) == (38, 0)


# ---- memory of a stopped runner


def test_memory_is_back_once_the_readings_show_it(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    loaded(ledger, "b", 11, 20)
    ledger.update([reading(60, {10: 30, 11: 20, 99: 10})])
    ledger.leaving("a")
    still_there: list[tuple[int, dict[int, int]]] = [
        (60, {10: 30, 11: 20, 99: 10}),
        (30, {10: 0, 11: 20, 99: 10}),
        (50, {11: 20, 99: 10}),
    ]
    for used, users in still_there:
        ledger.update([reading(used, users)])
        assert not ledger.is_back("a"), (used, users)
    ledger.update([reading(30, {11: 20, 99: 10})])
    assert ledger.is_back("a")


def test_a_small_difference_counts_as_rounding(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {10: 30})])
    ledger.leaving("a")
    for more, is_back in ((TOLERANCE_BYTES, True), (TOLERANCE_BYTES + 1, False)):
        idle: Any = reading()
        ledger.update([Reading(id=GPU, is_gpu=True, name="", total_bytes=TOTAL, free_bytes=idle.free_bytes - more)])
        assert ledger.is_back("a") is is_back


def test_host_memory_is_back_at_once() -> None:
    ledger = Ledger(lambda _: KEPT)
    ledger.update([reading(10, id_=CPU)])
    ledger.reserve("a", [usage(30, id_=CPU)])
    ledger.leaving("a")
    assert ledger.is_back("a")


def test_memory_of_a_foreign_pid_is_back_once_it_is_free(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {1010: 30})])
    ledger.leaving("a")
    ledger.update([reading(30, {1010: 30})])
    assert not ledger.is_back("a")
    ledger.update([reading(0)])
    assert ledger.is_back("a")


def test_memory_of_a_leaving_instance_is_not_yet_available(ledger: Ledger) -> None:
    loaded(ledger, "a", 10, 30)
    ledger.update([reading(30, {10: 30})])
    ledger.leaving("a")
    ledger.update([reading(0)])
    assert available(ledger) == 68
    ledger.release("a")
    assert available(ledger) == 98
