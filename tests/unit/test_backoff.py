"""The pauses between retries."""

from __future__ import annotations

from shared.backoff import Backoff


def pauses(backoff: Backoff, *runs_s: float) -> list[float]:
    return [backoff.after(ran_s) for ran_s in runs_s]


def test_a_pause_doubles_up_to_the_maximum() -> None:
    assert pauses(Backoff(0.5, 5.0, 60.0), *[0.1] * 6) == [0.5, 1.0, 2.0, 4.0, 5.0, 5.0]


def test_a_stable_run_resets_the_pause() -> None:
    assert pauses(Backoff(0.5, 5.0, 60.0), 1.0, 1.0, 60.0, 60.1, 1.0) == [0.5, 1.0, 2.0, 0.5, 1.0]


def test_two_backoffs_do_not_share_state() -> None:
    one, other = Backoff(1.0, 8.0, 60.0), Backoff(1.0, 8.0, 60.0)
    assert (pauses(one, 0.0, 0.0), pauses(other, 0.0)) == ([1.0, 2.0], [1.0])
