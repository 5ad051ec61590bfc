"""The record of an instance: one load of one model with one configuration.

Tolerant between our own processes: a new field has a default, so that two versions can share one Redis."""

from __future__ import annotations

import time
from typing import Any, assert_never

import msgspec
from msgspec import UNSET, Struct

from shared.errors import ErrorBody, LoadFailed
from shared.lifecycle import TERMINAL, Event, State, step
from shared.schema.http import LoadConfig, LoadRequest, LoadResult, Phase
from shared.schema.model import ModelType

UNBEGUN: dict[str, Any] = {  # what of a record goes back when it is requeued; its progress does not
    "epoch": None,
    "phase": None,
    "loaded_bytes": 0,
    "bytes_per_second": None,
    "estimated_completion": None,
    "devices": [],
    "evicted": [],
    "started_at": None,
    "timing": {},
}


class Instance(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One load of one model with one configuration: the only thing that has a life.

    `id` names the load (the job), `instance_id` the thing in memory that clients use.  Times are seconds since the
    epoch, `timing` is seconds by phase.  The last four fields are the store's own; they are not in `doc`.
    """

    id: str
    model: str  # the key as asked
    key: str  # the key in the worker's catalog that it means
    type: ModelType
    worker: str
    request: LoadRequest
    traceparent: str = ""  # the span that asked for it: those that work on it are its children
    state: State = State.QUEUED
    epoch: str | None = None  # of the worker process that claimed it
    attempt: int = 1  # how often it was begun, counting this time
    restoring: int = 0  # how often what a worker's end took was tried to be loaded again; 0: a client asked for it
    not_before: float = 0.0  # its worker begins it at this time, not earlier
    phase: Phase | None = None
    progress: float = 0.0  # 0..1, never decreases, 1 only when loaded
    total_size_bytes: int = 0
    loaded_bytes: int = 0
    bytes_per_second: float | None = None  # of the last seconds; once loaded, of all the weights
    estimated_completion: float | None = None
    devices: list[str] = []
    evicted: list[str] = []  # instance ids of what was unloaded to make room for it
    refused: list[str] = []  # workers that had no room for it
    refusal: ErrorBody | None = None  # what the last of these said
    started_at: float | None = None
    loaded_at: float | None = None
    used_at: float | None = None  # until there is something to use it for: when it was loaded, if not restored
    completed_at: float | None = None
    timing: dict[str, float] = {}
    load_time_seconds: float | None = None
    load_config: LoadConfig | None = None
    error: ErrorBody | None = None

    instance_id: str = ""
    created_at: float = 0.0  # by Redis' clock, like the queue time that is measured from it
    rev: int = 0  # the fence: whoever holds an older one has lost the right to write
    stop_requested: bool = False

    def after(self, event: Event, **changes: Any) -> Instance:
        """This record once `event` has happened.

        Raises IllegalTransition where the table has no such move, and ValueError where `failed` would come without
        an error or another state with one.
        """
        state = step(self.state, event, was_loaded=self.loaded_at is not None)
        if (state is State.FAILED) != (changes.get("error") is not None):
            raise ValueError(f"{state} and its error do not go together: {changes}")
        if state in TERMINAL:
            changes["completed_at"] = time.time()
        if event is Event.REQUEUE:
            changes = {**UNBEGUN, "attempt": self.attempt + (self.state is not State.QUEUED), **changes}
        return msgspec.structs.replace(self, state=state, **changes)

    def abandoned(self, attempts: int, **changes: Any) -> Instance:
        """Return this record after the end of its worker.

        A load is requeued, with `changes`, unless it was begun `attempts` times: then it has failed.  A loaded
        instance, and one that was being unloaded, is lost.  Raises IllegalTransition for a terminal record.
        """
        match self.state:
            case State.QUEUED:
                return self.after(Event.REQUEUE, **changes)
            case State.LOADING if self.attempt < attempts:
                return self.after(Event.REQUEUE, **changes)
            case State.LOADING:
                ended = f"its worker ended under it, the last time '{self.worker}'"
                reason = f"{ended}, and it was begun {self.attempt} times"
                return self.after(Event.FAIL, error=LoadFailed("worker_lost", self.type, self.model, reason).body())
            case State.LOADED | State.UNLOADING | State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                return self.after(Event.EXPIRE)
            case _:
                assert_never(self.state)

    @property
    def ids(self) -> dict[str, str]:
        """What log lines about it carry."""
        return {"job": self.id, "instance": self.instance_id, "worker": self.worker}

    @property
    def idle_at(self) -> float | None:
        """When it is unloaded if nothing uses it until then; None: never by itself, or not loaded yet."""
        ttl_s = self.request.ttl_seconds
        return None if ttl_s is UNSET or self.used_at is None else self.used_at + ttl_s

    def result(self) -> LoadResult:
        """The reply of a load that came to `loaded`."""
        assert self.load_time_seconds is not None
        assert self.load_config is not None
        return LoadResult(
            type=self.type,
            model_instance_id=self.instance_id,
            instance_id=self.instance_id,
            load_time_seconds=round(self.load_time_seconds, 6),
            status="loaded",
            load_config=self.load_config if self.request.echo_load_config else UNSET,
        )
