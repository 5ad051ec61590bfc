"""Derives the job, the outcome and the events of a load from its record: pure functions."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import assert_never

from shared.errors import ErrorBody, LoadFailed
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.http import Job, JobStatus, LoadEvent, LoadStart


def is_over(instance: Instance) -> bool:
    """Return whether the load has ended.  Its instance may still be loaded."""
    return instance.loaded_at is not None or instance.state in TERMINAL


def status(instance: Instance) -> JobStatus:
    """Return the status of the load, which does not change after the load has ended."""
    if instance.loaded_at is not None:
        return "loaded"
    match instance.state:
        case State.QUEUED:
            return "queued"
        case State.CANCELLED:
            return "cancelled"
        case State.FAILED | State.LOST:
            return "failed"
        case State.LOADING | State.LOADED | State.UNLOADING | State.UNLOADED:  # UNLOADING: being cancelled
            return "loading"
        case _:
            assert_never(instance.state)


def outcome(instance: Instance) -> ErrorBody | None:
    """Return the error of a load that failed or was cancelled, else None."""
    if instance.loaded_at is not None:
        return None
    if instance.error is not None:
        return instance.error
    match instance.state:
        case State.CANCELLED:
            return LoadFailed("load_cancelled", instance.type, instance.model, "the load was cancelled").body()
        case State.LOST:
            reason = f"worker '{instance.worker}' is no longer available"
            return LoadFailed("worker_lost", instance.type, instance.model, reason).body()
        case State.QUEUED | State.LOADING | State.LOADED | State.UNLOADING | State.UNLOADED | State.FAILED:
            return None  # `failed` has an error: see Instance.after
        case _:
            assert_never(instance.state)


def log(output: bytes, instance: Instance) -> bytes:
    """Return the log of a load: the engine's output, then why the load or its instance failed or was cancelled.

    A load that was refused has no output.
    """
    reason = instance.error or outcome(instance)
    return output if reason is None else output + f"loadstone: {reason.message}\n".encode()


def job(instance: Instance) -> Job:
    """Return the job of a load."""
    is_loaded = instance.loaded_at is not None
    timing = {name: round(seconds, 6) for name, seconds in instance.timing.items()}
    if is_over(instance):
        timing["total"] = round(sum(timing.values()), 6)
    return Job(
        job_id=instance.id,
        status=status(instance),
        instance_state=instance.state,
        model=instance.model,
        instance_id=instance.instance_id,
        model_instance_id=instance.instance_id,
        worker=instance.worker,
        devices=instance.devices,
        attempt=instance.attempt,
        progress=round(instance.progress, 4),
        phase=None if is_over(instance) else instance.phase,
        total_size_bytes=instance.total_size_bytes,
        loaded_bytes=instance.loaded_bytes,
        bytes_per_second=None if instance.bytes_per_second is None else round(instance.bytes_per_second),
        estimated_completion=_moment(instance.estimated_completion) if not is_over(instance) else None,
        created_at=_time(instance.created_at),
        started_at=_moment(instance.started_at),
        completed_at=_moment(instance.loaded_at if is_loaded else instance.completed_at),
        evicted=instance.evicted,
        timing=timing,
        result=instance.result() if is_loaded else None,
        error=outcome(instance),
    )


def event(instance: Instance) -> LoadEvent | None:
    """Return the event for a revision of the record; None for a revision after the end of the load."""
    if instance.loaded_at is not None and instance.state is not State.LOADED:
        return None
    if instance.rev == 1:
        return LoadStart(model_instance_id=instance.instance_id, job_id=instance.id)
    return job(instance).event()


def _moment(at: float | None) -> datetime | None:
    return None if at is None else _time(at)


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(round(at, 3), UTC)
