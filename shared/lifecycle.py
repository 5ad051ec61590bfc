"""The lifecycle of an instance, as a table of all permitted transitions."""

from __future__ import annotations

from enum import StrEnum


class State(StrEnum):
    QUEUED = "queued"
    LOADING = "loading"
    LOADED = "loaded"
    UNLOADING = "unloading"
    UNLOADED = "unloaded"
    CANCELLED = "cancelled"
    FAILED = "failed"
    LOST = "lost"


class Event(StrEnum):
    CLAIM = "claim"  # the worker took the load from the queue
    LOAD = "load"  # the weights are in memory and a first token was decoded
    STOP = "stop"  # an unload or a cancel was requested
    EXIT = "exit"  # the runner was reaped after a stop
    FAIL = "fail"  # the load failed, or the runner died
    REQUEUE = "requeue"  # before it was loaded, the worker died or refused the load
    EXPIRE = "expire"  # the worker's lease expired


S, E = State, Event

NEXT: dict[State, dict[Event, State]] = {  # a state without a row is terminal
    S.QUEUED: {E.CLAIM: S.LOADING, E.STOP: S.CANCELLED, E.FAIL: S.FAILED, E.REQUEUE: S.QUEUED, E.EXPIRE: S.LOST},
    S.LOADING: {E.LOAD: S.LOADED, E.STOP: S.UNLOADING, E.FAIL: S.FAILED, E.REQUEUE: S.QUEUED, E.EXPIRE: S.LOST},
    S.LOADED: {E.STOP: S.UNLOADING, E.FAIL: S.FAILED, E.EXPIRE: S.LOST},
    S.UNLOADING: {E.EXIT: S.UNLOADED, E.EXPIRE: S.LOST},  # EXIT leads to CANCELLED if never loaded
}

TERMINAL = frozenset(State) - frozenset(NEXT)
HOLDS_MEMORY = frozenset({S.LOADING, S.LOADED, S.UNLOADING})


class IllegalTransition(Exception):
    """The event is not permitted in this state.  Nothing was changed."""


def step(state: State, event: Event, *, was_loaded: bool) -> State:
    """Return the state after `event`.  Raises IllegalTransition if the table has no such transition."""
    following = NEXT.get(state, {}).get(event)
    if following is None:
        raise IllegalTransition(f"{event} while {state}")
    if following is S.UNLOADED and not was_loaded:
        return S.CANCELLED
    return following
