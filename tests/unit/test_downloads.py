"""What a worker does with a download, by its record and the request of a client."""

from __future__ import annotations

import itertools
from typing import get_args

import pytest

from shared.download import Download, Event, Plan, State, Wanted
from shared.store.downloads import Held
from worker.downloads import Move, Start, decide

S, E = State, Event
EXPECTED: dict[tuple[State, Wanted | None], Start | Move] = {  # nothing in all other cases
    (S.DOWNLOADING, None): Start(),
    (S.DOWNLOADING, "run"): Start(),
    (S.DOWNLOADING, "pause"): Move(E.PAUSE, "pause"),
    (S.DOWNLOADING, "cancel"): Move(E.CANCEL, "cancel"),
    (S.PAUSED, "run"): Move(E.RESUME, "run"),
    (S.PAUSED, "cancel"): Move(E.CANCEL, "cancel"),
    (S.FAILED, "run"): Move(E.RESUME, "run"),
    (S.FAILED, "cancel"): Move(E.CANCEL, "cancel"),
}


@pytest.mark.parametrize(("state", "wanted"), [*itertools.product(State, (None, *get_args(Wanted)))])
def test_what_is_done(state: State, wanted: Wanted | None) -> None:
    plan = Plan(repository="a/b", commit="a" * 40, files=[])
    download = Download(id="job_1", model="a/b", worker="w", store="s", plan=plan, state=state)
    done = decide(Held(download, wanted))
    assert done == EXPECTED.get((state, wanted))
    if isinstance(done, Move):
        download.after(done.event, 1.0)  # it is possible
