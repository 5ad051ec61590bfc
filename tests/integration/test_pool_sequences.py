"""Whatever is loaded, unloaded and filled in whatever order: the pool model says what is asserted, and how."""

from __future__ import annotations

from hypothesis import given, settings

from tests.simulation.poolmodel import Play, play, plays


@settings(max_examples=200, deadline=None, derandomize=True)  # the same ones each time; `make soak` has others
@given(plays)
def test_no_sequence_overbooks_a_gpu_evicts_in_vain_or_refuses_what_fits(found: Play) -> None:
    play(found)
