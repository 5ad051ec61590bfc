"""The rate of a load: bytes per second over the last seconds."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.runner.rate import WINDOW_S, Rate


def test_a_load_without_bytes_has_no_rate() -> None:
    rate = Rate(10.0)
    assert rate.per_second() is None
    rate.add(11.0, 0)
    assert rate.per_second() is None


def test_the_first_rate_counts_from_the_start() -> None:
    rate = Rate(10.0)
    rate.add(10.5, 300)
    assert rate.per_second() == 600
    rate.add(11.0, 400)
    assert rate.per_second() == 400


def test_bytes_in_no_time_have_no_rate() -> None:
    rate = Rate(10.0)
    rate.add(10.0, 300)
    assert rate.per_second() is None


def test_progress_before_the_window_is_forgotten() -> None:
    """With half of a file in the page cache, the rate of the second half is that of the disk."""
    rate = Rate(0.0)
    for step in range(1, 11):
        rate.add(step / 10, step * 1000)
    assert rate.per_second() == pytest.approx(10_000)
    for step in range(1, 41):
        rate.add(1 + step / 10, 10_000 + step * 10)
    assert rate.per_second() == pytest.approx(100)


def test_a_load_without_progress_in_the_window_has_no_rate() -> None:
    rate = Rate(0.0)
    rate.add(1.0, 1000)
    for step in range(1, 9):
        rate.add(1.0 + step, 1000)
    assert rate.per_second() is None


def test_a_long_gap_between_reports_counts_in_full() -> None:
    rate = Rate(0.0)
    rate.add(1.0, 1000)
    rate.add(1.0 + 10 * WINDOW_S, 1000 + 30_000)
    assert rate.per_second() == pytest.approx(1000, rel=0.1)


@given(steps=st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 1 << 40)), max_size=50))
def test_the_rate_is_between_the_slowest_and_fastest_step(steps: list[tuple[float, int]]) -> None:
    now, loaded, rates = 100.0, 0, []
    rate = Rate(now)
    for seconds, n_bytes in steps:
        now, loaded = now + seconds, loaded + n_bytes
        rates.append(n_bytes / seconds)
        rate.add(now, loaded)
        current = rate.per_second()
        if current is not None:
            assert current > 0
            assert min(rates) * 0.999 <= current <= max(rates) * 1.001
    assert len(rate._seen) <= len(steps) + 1
