"""The life of an instance: the table itself, and what holds whatever happens to one in whatever order."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from shared.errors import ErrorBody
from shared.instance import Instance
from shared.lifecycle import HOLDS_MEMORY, NEXT, TERMINAL, Event, IllegalTransition, State, step
from shared.schema.http import LoadRequest

E, S = Event, State
ERROR = ErrorBody(type="model_load_failed", message="why", code="engine_crashed")


def instance(**fields: Any) -> Instance:
    return Instance(
        id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"), **fields
    )


def test_the_table_is_the_designs() -> None:
    assert {(state, event, step(state, event, was_loaded=True)) for state, row in NEXT.items() for event in row} == {
        (S.QUEUED, E.CLAIM, S.LOADING),
        (S.QUEUED, E.STOP, S.CANCELLED),
        (S.QUEUED, E.FAIL, S.FAILED),
        (S.QUEUED, E.REQUEUE, S.QUEUED),
        (S.QUEUED, E.EXPIRE, S.LOST),
        (S.LOADING, E.LOAD, S.LOADED),
        (S.LOADING, E.STOP, S.UNLOADING),
        (S.LOADING, E.FAIL, S.FAILED),
        (S.LOADING, E.REQUEUE, S.QUEUED),
        (S.LOADING, E.EXPIRE, S.LOST),
        (S.LOADED, E.STOP, S.UNLOADING),
        (S.LOADED, E.FAIL, S.FAILED),
        (S.LOADED, E.EXPIRE, S.LOST),
        (S.UNLOADING, E.EXIT, S.UNLOADED),
        (S.UNLOADING, E.EXPIRE, S.LOST),
    }


def test_every_state_can_be_reached_and_left_unless_it_is_an_end() -> None:
    reached = {S.QUEUED, S.CANCELLED} | {following for row in NEXT.values() for following in row.values()}
    assert reached == set(State)
    assert set(State) - set(NEXT) == TERMINAL == {S.UNLOADED, S.CANCELLED, S.FAILED, S.LOST}
    assert {S.LOADING, S.LOADED, S.UNLOADING} == HOLDS_MEMORY
    assert not HOLDS_MEMORY & TERMINAL


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("event", list(Event))
def test_nothing_happens_after_the_end(state: State, event: Event) -> None:
    with pytest.raises(IllegalTransition, match=f"{event} while {state}"):
        step(state, event, was_loaded=True)


@pytest.mark.parametrize(("was_loaded", "end"), [(True, S.UNLOADED), (False, S.CANCELLED)])
def test_what_was_never_loaded_is_cancelled_and_not_unloaded(was_loaded: bool, end: State) -> None:
    assert step(S.UNLOADING, E.EXIT, was_loaded=was_loaded) is end


@pytest.mark.parametrize("event", [event for event in Event if event is not E.FAIL])
def test_an_error_goes_with_failed_only(event: Event) -> None:
    state = next(state for state, row in NEXT.items() if event in row)
    with pytest.raises(ValueError, match="do not go together"):
        instance(state=state).after(event, error=ERROR)


@pytest.mark.parametrize("state", [S.QUEUED, S.LOADING, S.LOADED])
def test_failed_needs_an_error(state: State) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        instance(state=state).after(E.FAIL)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Applies events as the agent and the sweep do, and keeps a ledger that only goes by what it sees happen."""

    @initialize()
    def begin(self) -> None:
        self.it = instance()
        self.reserved = 0  # what a worker's ledger would hold for it
        self.was_loaded = False
        self.steps = [self.it]

    @rule(event=st.sampled_from(list(Event)), with_error=st.booleans(), progress=st.floats(0, 1))
    def any_event(self, event: Event, with_error: bool, progress: float) -> None:
        before = self.it
        changes: dict[str, Any] = {}
        if with_error:
            changes["error"] = ERROR
        if event is E.LOAD:
            changes |= {"loaded_at": 1.0, "progress": 1.0}
        elif event is E.CLAIM:
            changes |= {"epoch": "e", "progress": max(before.progress, 0.9 * progress)}
        try:
            self.it = before.after(event, **changes)
        except IllegalTransition:
            assert event not in NEXT.get(before.state, {})
            return
        except ValueError:
            assert with_error is not (event is E.FAIL)
            return
        self.steps.append(self.it)
        gave_back = self.it.state in TERMINAL or event is E.REQUEUE
        self.reserved += (event is E.CLAIM) - (before.state in HOLDS_MEMORY and gave_back)
        self.was_loaded |= event is E.LOAD

    @invariant()
    def memory_is_held_exactly_where_the_state_says_so(self) -> None:
        assert self.reserved == (self.it.state in HOLDS_MEMORY)

    @invariant()
    def failed_has_an_error_and_nothing_else_has(self) -> None:
        assert (self.it.error is not None) == (self.it.state is S.FAILED)

    @invariant()
    def it_has_an_end_exactly_in_a_terminal_state(self) -> None:
        assert (self.it.completed_at is not None) == (self.it.state in TERMINAL)

    @invariant()
    def it_is_unloaded_only_if_it_was_loaded_and_cancelled_only_if_it_was_not(self) -> None:
        if self.it.state in {S.LOADED, S.UNLOADED}:
            assert self.was_loaded
        if self.it.state is S.CANCELLED:
            assert not self.was_loaded

    @invariant()
    def progress_never_decreases_and_is_whole_only_once_loaded(self) -> None:
        progress = [revision.progress for revision in self.steps]
        assert progress == sorted(progress)
        assert (self.it.progress == 1) == self.was_loaded

    @invariant()
    def it_counts_how_often_it_was_begun_and_belongs_to_whoever_began_it(self) -> None:
        begun = sum(after.state is S.LOADING and before.state is S.QUEUED for before, after in pairwise(self.steps))
        assert max(1, begun) <= self.it.attempt <= begun + 1
        assert self.it.state is not S.QUEUED or self.it.epoch is None

    @invariant()
    def no_refused_or_accepted_event_changes_an_older_revision(self) -> None:
        assert self.steps[0] == instance()


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
