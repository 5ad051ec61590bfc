"""The record of an instance: one load of one model with one configuration.

New fields have defaults, so that processes of two versions can share one Redis.
"""

from __future__ import annotations

import time
from typing import Any, assert_never

import msgspec
from msgspec import UNSET, Struct

from shared.errors import ErrorBody, LoadFailed
from shared.lifecycle import TERMINAL, Event, State, step
from shared.schema.http import LoadConfig, LoadRequest, LoadResult, Phase
from shared.schema.model import Model, ModelType

RESET_ON_REQUEUE: dict[str, Any] = {  # fields that are reset when a load is requeued; the progress is kept
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
    """One load of one model with one configuration.

    `id` identifies the load (the job); clients use the loaded model by its `instance_id`.  Times are in seconds since
    the epoch; `timing` is in seconds by phase.  The store keeps the last four fields beside the document (`doc`).
    """

    id: str
    model: str  # the name by which the client loaded the model, as the list has it: its key or `key@variant`
    key: str  # the key of that model in the worker's catalog then; it depends on the files beside it
    source: Model | None = None  # that model (`Model.source`); None in a record of an older version
    type: ModelType
    worker: str
    request: LoadRequest
    traceparent: str = ""  # the span of the request: the parent of all spans that work on the load
    state: State = State.QUEUED
    epoch: str | None = None  # of the worker process that claimed the load
    attempt: int = 1  # number of this attempt, from 1
    on_demand: bool = False  # a request for the model caused the load
    restoring: int = 0  # number of this attempt to restore the instance; 0: a client requested the load
    not_before: float = 0.0  # the worker does not start the load before this time
    phase: Phase | None = None
    progress: float = 0.0  # 0..1, never decreases, 1 only when loaded
    total_size_bytes: int = 0
    loaded_bytes: int = 0
    bytes_per_second: float | None = None  # over the last seconds; once loaded, over all weights
    estimated_completion: float | None = None
    devices: list[str] = []
    evicted: list[str] = []  # ids of the instances that were unloaded to make room
    refused: list[str] = []  # workers that had no room for the load
    refusal: ErrorBody | None = None  # the error of the last of these workers
    started_at: float | None = None
    loaded_at: float | None = None
    # When it was loaded, or the last use before it was restored; `keys.used` has the later ones.
    used_at: float | None = None
    completed_at: float | None = None
    timing: dict[str, float] = {}
    load_time_seconds: float | None = None
    load_config: LoadConfig | None = None
    error: ErrorBody | None = None

    instance_id: str = ""
    created_at: float = 0.0  # by the clock of Redis, as is the queue time, which starts here
    rev: int = 0  # the fence: a writer with an older revision is refused
    stop_requested: bool = False

    def after(self, event: Event, **changes: Any) -> Instance:
        """Return this record after `event`.

        Raises IllegalTransition if the lifecycle has no such transition, and ValueError if the new state is `failed`
        without an error, or another state with an error.
        """
        state = step(self.state, event, was_loaded=self.loaded_at is not None)
        if (state is State.FAILED) != (changes.get("error") is not None):
            raise ValueError(f"{state} and its error do not go together: {changes}")
        if state in TERMINAL:
            changes["completed_at"] = time.time()
        if event is Event.REQUEUE:
            changes = {**RESET_ON_REQUEUE, "attempt": self.attempt + (self.state is not State.QUEUED), **changes}
        return msgspec.structs.replace(self, state=state, **changes)

    def abandoned(self, attempts: int, **changes: Any) -> Instance:
        """Return this record after its worker became unavailable.

        A load is requeued, with `changes`; it fails after `attempts` attempts.  An instance that was loaded or being
        unloaded is lost.  Raises IllegalTransition for a terminal record.
        """
        match self.state:
            case State.QUEUED:
                return self.after(Event.REQUEUE, **changes)
            case State.LOADING if self.attempt < attempts:
                return self.after(Event.REQUEUE, **changes)
            case State.LOADING:
                reason = (
                    f"worker '{self.worker}' became unavailable during the load (attempt {self.attempt} of {attempts})"
                )
                return self.after(Event.FAIL, error=LoadFailed("worker_lost", self.type, self.model, reason).body())
            case State.LOADED | State.UNLOADING | State.UNLOADED | State.CANCELLED | State.FAILED | State.LOST:
                return self.after(Event.EXPIRE)
            case _:
                assert_never(self.state)

    @property
    def full_key(self) -> str:
        """The full key of its model, as the catalog had it."""
        return self.key if self.source is None else self.source.full_key

    @property
    def ids(self) -> dict[str, str]:
        """The ids that log lines about this instance carry."""
        return {"job": self.id, "instance": self.instance_id, "worker": self.worker}

    @property
    def idle_at(self) -> float | None:
        """When the instance is unloaded if it stays idle; None: it has no TTL, or is not loaded yet."""
        ttl_s = self.request.ttl_seconds
        return None if ttl_s is UNSET or self.used_at is None else self.used_at + ttl_s

    def result(self) -> LoadResult:
        """Return the reply to a successful load."""
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
