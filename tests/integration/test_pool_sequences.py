"""Random sequences of loads and unloads in a simulated pool; `tests.simulation` has the assertions."""

from __future__ import annotations

from hypothesis import given, settings

from tests.simulation.poolmodel import Play, play, plays


@settings(max_examples=200, derandomize=True)  # the same sequences each time; `make soak` has others
@given(plays)
def test_no_sequence_overbooks_or_refuses_a_load_that_fits(sequence: Play) -> None:
    play(sequence)
