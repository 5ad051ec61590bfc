"""The life of an instance as a table: everything that may happen to one, and nothing else."""

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
    CLAIM = "claim"  # its worker took it from the queue
    LOAD = "load"  # its weights are in memory and one token was decoded
    STOP = "stop"  # an unload or a cancel was asked for
    EXIT = "exit"  # its runner was reaped after a stop
    FAIL = "fail"  # its load failed, or its runner died
    REQUEUE = "requeue"  # never loaded, and its worker died or hands it back: it is begun anew, there or elsewhere
    EXPIRE = "expire"  # its worker's lease is gone


S, E = State, Event

NEXT: dict[State, dict[Event, State]] = {  # a state without a row is terminal
    S.QUEUED: {E.CLAIM: S.LOADING, E.STOP: S.CANCELLED, E.FAIL: S.FAILED, E.REQUEUE: S.QUEUED, E.EXPIRE: S.LOST},
    S.LOADING: {E.LOAD: S.LOADED, E.STOP: S.UNLOADING, E.FAIL: S.FAILED, E.REQUEUE: S.QUEUED, E.EXPIRE: S.LOST},
    S.LOADED: {E.STOP: S.UNLOADING, E.FAIL: S.FAILED, E.EXPIRE: S.LOST},
    S.UNLOADING: {E.EXIT: S.UNLOADED, E.EXPIRE: S.LOST},  # CANCELLED instead, if it was never loaded
}

TERMINAL = frozenset(State) - frozenset(NEXT)
HOLDS_MEMORY = frozenset({S.LOADING, S.LOADED, S.UNLOADING})


class IllegalTransition(Exception):
    """An event that cannot happen in this state; nothing was changed."""


def step(state: State, event: Event, *, was_loaded: bool) -> State:
    """The state after `event`.  Raises IllegalTransition for what is not in the table."""
    following = NEXT.get(state, {}).get(event)
    if following is None:
        raise IllegalTransition(f"{event} while {state}")
    if following is S.UNLOADED and not was_loaded:
        return S.CANCELLED
    return following
