"""What `bench.gpu` concludes from its measurements."""

from __future__ import annotations

from typing import Any

import pytest

from bench.gpu_report import NOT_MEASURED, Bandwidth, By, Cache, Lock, Measured, Run, Several, Start, goals, lock_of
from bench.gpu_report import markdown as report_of
from worker.engine.pagelock import PageLock

N_BYTES = 8_000_000_000
BANDWIDTH = Bandwidth(disk=2e9, disk_direct=1e9, memory=7e9, pageable=7e9, pinned=50e9)
LOCKED = Lock(n_bytes=N_BYTES, lock_s=0.25, unlock_s=0.05)


def run(by: By, cache: Cache = "warm", total_s: float = 1.0, **changes: Any) -> Run:
    phases = {"metadata": 0.1, "weights": total_s - 0.15, "context": 0.02, "warmup": 0.03}
    fields: dict[str, Any] = {
        "residency": 1.0,
        "phases_s": phases,
        "lock": LOCKED if by in ("locked", "the service") else Lock(),
        "dirty_bytes": 0,
    }
    return Run(by=by, cache=cache, total_s=total_s, **{**fields, **changes})


def measured(*runs: Run, n_gpus: int = 1, **fields: Any) -> Measured:
    return Measured(about={"GPU": "one"}, model_bytes=N_BYTES, n_gpus=n_gpus, runs=[*runs], **fields)


def row(report: str, *cells: str) -> list[str]:
    """Return the other cells of the first row of a table that begins with these."""
    start = "".join(f"| {cell} " for cell in cells)
    line = next(line for line in report.splitlines() if line.startswith(f"{start}|"))
    return [cell.strip() for cell in line.removeprefix(start).strip("|").split("|")]


# ---- the engine's log


def test_the_times_of_locking_are_read_from_the_log() -> None:
    log = "load_tensors: x\npage_lock: 4050000000 bytes locked in 0.112 s\n...\npage_lock: unlocked in 0.031 s\n"
    assert lock_of(log) == Lock(n_bytes=4_050_000_000, lock_s=0.112, unlock_s=0.031)


def test_the_log_says_why_nothing_was_locked() -> None:
    why = "the weights are read, not copied from a locked mapping: the model is small"
    assert lock_of(f"page_lock: {why}\nllama_model_loader: y\n") == Lock(faults=[why])


class Cuda:
    """CUDA's runtime, whose calls return one status."""

    def __init__(self, status: int) -> None:
        self._status = status

    def __getattr__(self, name: str) -> Any:
        return lambda *_: self._status


@pytest.mark.parametrize(
    ("status", "n_bytes", "faults"),
    [(0, 7, []), (2, 0, ["not locked, and copied more slowly: cudaHostRegister returned 2"])],
)
def test_the_lines_that_the_engine_writes_are_known(
    monkeypatch: pytest.MonkeyPatch, status: int, n_bytes: int, faults: list[str]
) -> None:
    monkeypatch.setattr("worker.engine.pagelock.mappings", lambda *_: [(4096, 7)])
    lines: list[str] = []
    lock = PageLock(Cuda(status), 0, ["/a/m.gguf"], lines.append)
    lock.lock([7])
    lock.unlock()
    read = lock_of("\n".join(lines))
    assert (read.n_bytes, read.faults) == (n_bytes, faults)


# ---- the goals


def texts(*runs: Run, **fields: Any) -> list[tuple[str, bool | None]]:
    return [(goal.measured, goal.is_met) for goal in goals(measured(*runs, bandwidth=BANDWIDTH, **fields))]


def test_goals_that_are_met() -> None:
    quicker, adds, disk, whole, clean = texts(
        *(run("none", total_s=0.9), run("mmap", total_s=0.8), run("direct", total_s=4.0)),
        *(run("locked", total_s=0.3), run("locked", total_s=0.4), run("locked", total_s=0.5)),
        *(run("the service", total_s=0.45), run("the service", "cold", 4.0)),
    )
    assert quicker == ("0.50 (0.400 s / 0.800 s, mmap)", True)
    assert adds == ("50 ms", True)
    assert disk == ("1.00 (2.00 / 2.00 GB/s)", True)
    assert (whole, clean) == (("1.00", True), ("0.00", True))


def test_goals_that_are_not_met() -> None:
    verdicts = texts(
        run("mmap", total_s=0.8),
        run("locked", total_s=0.5, dirty_bytes=N_BYTES),
        run("the service", total_s=0.57, lock=Lock()),
        run("the service", "cold", 5.0),
    )
    assert [is_met for _, is_met in verdicts] == [False] * 5
    assert [text for text, _ in verdicts[1:]] == ["70 ms", "0.80 (1.60 / 2.00 GB/s)", "0.00", "1.00"]


def test_goals_that_were_not_measured() -> None:
    assert {(goal.measured, goal.is_met) for goal in goals(measured())} == {(NOT_MEASURED, None)}
    plain = goals(measured(run("none"), bandwidth=BANDWIDTH))
    assert {goal.is_met for goal in plain} == {None}


# ---- the report


def test_the_report_of_a_run_that_ended_at_once() -> None:
    report = report_of(measured())
    assert "## Goals: 0 of 5 met" in report
    assert row(report, "warm", "locked") == [NOT_MEASURED, *[""] * 7]
    assert "## Several GPUs\n\nNot measured: one GPU." in report


def test_the_report_has_the_times_of_locking() -> None:
    start = Start(backends_s=0.2, first_s=0.15, second_s=0.01)
    report = report_of(measured(run("locked", total_s=1.0), run("none"), bandwidth=BANDWIDTH, start=start))
    # 0.85 s of weights, and 8 GB in the 0.95 s of the model beyond the 0.15 s of a tiny one
    assert row(report, "warm", "locked") == ["1.000", "0.950", "0.250", "0.550", "0.050", "10.00", "50.00", "0.20"]
    assert row(report, "warm", "none") == ["1.000", "0.950", "", "", "", "10.00", "7.00", "1.43"]
    assert row(report, "so the CUDA context, which no runner creates ahead of the load") == ["0.140"]


def test_the_report_of_several_gpus() -> None:
    several = Several(split_s=[0.9], at_once_s=[])
    report = report_of(measured(run("locked", total_s=0.6), n_gpus=2, several=several))
    assert row(report, "split over 2 GPUs") == ["0.900", "1.50"]
    assert row(report, "the same file onto each of 2 GPUs at once, the slowest load") == [NOT_MEASURED, ""]


def test_the_report_says_what_failed() -> None:
    faulty = run("locked", lock=Lock(faults=["only 5 bytes could be locked"]))
    refused = run("mmap", lock=Lock(faults=["layers stay on the CPU"]))
    report = report_of(measured(faulty, refused, failed={"split over 2 GPUs, 1": "out of\nmemory"}))
    assert "- only 5 bytes could be locked" in report
    assert "layers stay on the CPU" not in report
    assert "- split over 2 GPUs, 1: out of memory" in report


@pytest.mark.parametrize(
    ("by", "cache", "rate"),
    [
        ("none", "cold", 2e9),
        ("none", "warm", 7e9),
        ("direct", "warm", 2e9),
        ("locked", "warm", 50e9),
        ("the service", "cold", 2e9),
    ],
)
def test_a_load_is_limited_by_the_slowest_part(by: By, cache: Cache, rate: float) -> None:
    assert BANDWIDTH.possible(by, cache) == rate
