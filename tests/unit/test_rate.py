"""How fast a load goes: as it went in the last seconds, not since it began."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.runner.rate import WINDOW_S, Rate


def test_nothing_is_known_before_anything_was_loaded() -> None:
    pace = Rate(10.0)
    assert pace.bytes_per_second() is None
    pace.add(11.0, 0)
    assert pace.bytes_per_second() is None


def test_it_counts_from_the_beginning_at_first() -> None:
    pace = Rate(10.0)
    pace.add(10.5, 300)
    assert pace.bytes_per_second() == 600
    pace.add(11.0, 400)
    assert pace.bytes_per_second() == 400


def test_bytes_that_come_in_no_time_have_no_pace_yet() -> None:
    pace = Rate(10.0)
    pace.add(10.0, 300)
    assert pace.bytes_per_second() is None


def test_what_was_before_the_last_seconds_is_forgotten() -> None:
    """A file that was half in the page cache: the second half comes at the disk's speed, and its end is told by it."""
    pace = Rate(0.0)
    for step in range(1, 11):
        pace.add(step / 10, step * 1000)
    assert pace.bytes_per_second() == pytest.approx(10_000)
    for step in range(1, 41):
        pace.add(1 + step / 10, 10_000 + step * 10)
    assert pace.bytes_per_second() == pytest.approx(100)


def test_a_load_that_stands_still_has_no_pace_once_the_last_seconds_hold_nothing_else() -> None:
    pace = Rate(0.0)
    pace.add(1.0, 1000)
    for step in range(1, 9):
        pace.add(1.0 + step, 1000)
    assert pace.bytes_per_second() is None


def test_a_long_gap_between_two_reports_is_counted_whole() -> None:
    pace = Rate(0.0)
    pace.add(1.0, 1000)
    pace.add(1.0 + 10 * WINDOW_S, 1000 + 30_000)
    assert pace.bytes_per_second() == pytest.approx(1000, rel=0.1)


@given(steps=st.lists(st.tuples(st.floats(0.001, 10), st.integers(0, 1 << 40)), max_size=50))
def test_it_is_never_faster_than_its_fastest_step_or_slower_than_its_slowest(steps: list[tuple[float, int]]) -> None:
    now, loaded, rates = 100.0, 0, []
    pace = Rate(now)
    for seconds, n_bytes in steps:
        now, loaded = now + seconds, loaded + n_bytes
        rates.append(n_bytes / seconds)
        pace.add(now, loaded)
        found = pace.bytes_per_second()
        if found is not None:
            assert found > 0
            assert min(rates) * 0.999 <= found <= max(rates) * 1.001
    assert len(pace._seen) <= len(steps) + 1
