"""The lifecycle of an instance: the transition table, and invariants for any order of events."""

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


def test_the_table_has_the_designed_transitions() -> None:
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


def test_every_state_is_reachable_and_terminal_states_final() -> None:
    reached = {S.QUEUED, S.CANCELLED} | {following for row in NEXT.values() for following in row.values()}
    assert reached == set(State)
    assert set(State) - set(NEXT) == TERMINAL == {S.UNLOADED, S.CANCELLED, S.FAILED, S.LOST}
    assert {S.LOADING, S.LOADED, S.UNLOADING} == HOLDS_MEMORY
    assert not HOLDS_MEMORY & TERMINAL


@pytest.mark.parametrize("state", sorted(TERMINAL))
@pytest.mark.parametrize("event", list(Event))
def test_a_terminal_state_accepts_no_event(state: State, event: Event) -> None:
    with pytest.raises(IllegalTransition, match=f"{event} while {state}"):
        step(state, event, was_loaded=True)


@pytest.mark.parametrize(("was_loaded", "end"), [(True, S.UNLOADED), (False, S.CANCELLED)])
def test_an_instance_that_never_loaded_ends_as_cancelled(was_loaded: bool, end: State) -> None:
    assert step(S.UNLOADING, E.EXIT, was_loaded=was_loaded) is end


@pytest.mark.parametrize("event", [event for event in Event if event is not E.FAIL])
def test_only_fail_takes_an_error(event: Event) -> None:
    state = next(state for state, row in NEXT.items() if event in row)
    with pytest.raises(ValueError, match="do not go together"):
        instance(state=state).after(event, error=ERROR)


@pytest.mark.parametrize("state", [S.QUEUED, S.LOADING, S.LOADED])
def test_fail_requires_an_error(state: State) -> None:
    with pytest.raises(ValueError, match="do not go together"):
        instance(state=state).after(E.FAIL)


class AnyOrderOfEvents(RuleBasedStateMachine):
    """Applies events as the agent and the sweep do, and keeps a ledger from the accepted transitions only."""

    @initialize()
    def begin(self) -> None:
        self.it = instance()
        self.reserved = 0  # how often the ledger of a worker holds memory for the instance
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
        released = self.it.state in TERMINAL or event is E.REQUEUE
        self.reserved += (event is E.CLAIM) - (before.state in HOLDS_MEMORY and released)
        self.was_loaded |= event is E.LOAD

    @invariant()
    def memory_is_held_exactly_in_the_states_that_hold_memory(self) -> None:
        assert self.reserved == (self.it.state in HOLDS_MEMORY)

    @invariant()
    def only_failed_has_an_error(self) -> None:
        assert (self.it.error is not None) == (self.it.state is S.FAILED)

    @invariant()
    def only_terminal_states_have_an_end_time(self) -> None:
        assert (self.it.completed_at is not None) == (self.it.state in TERMINAL)

    @invariant()
    def only_a_loaded_instance_becomes_unloaded(self) -> None:
        if self.it.state in {S.LOADED, S.UNLOADED}:
            assert self.was_loaded
        if self.it.state is S.CANCELLED:
            assert not self.was_loaded

    @invariant()
    def progress_never_decreases_and_is_1_only_once_loaded(self) -> None:
        progress = [revision.progress for revision in self.steps]
        assert progress == sorted(progress)
        assert (self.it.progress == 1) == self.was_loaded

    @invariant()
    def attempts_are_counted_and_a_queued_instance_has_no_owner(self) -> None:
        begun = sum(after.state is S.LOADING and before.state is S.QUEUED for before, after in pairwise(self.steps))
        assert max(1, begun) <= self.it.attempt <= begun + 1
        assert self.it.state is not S.QUEUED or self.it.epoch is None

    @invariant()
    def no_event_changes_an_older_revision(self) -> None:
        assert self.steps[0] == instance()


TestAnyOrderOfEvents = AnyOrderOfEvents.TestCase
