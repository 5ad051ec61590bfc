"""A load as a client sees it: its job, its outcome, its events.  Pure: from the record, and nothing else."""

from __future__ import annotations

from datetime import UTC, datetime

from shared.errors import ErrorBody, LoadFailed
from shared.instance import Instance
from shared.lifecycle import TERMINAL, State
from shared.schema.http import Job, JobStatus, LoadEvent, LoadStart


def is_over(instance: Instance) -> bool:
    """Whether the load has its outcome; the instance may live on."""
    return instance.loaded_at is not None or instance.state in TERMINAL


def status(instance: Instance) -> JobStatus:
    """The load's outcome, or how far it is; what became of the instance afterwards does not change it."""
    if instance.loaded_at is not None:
        return "loaded"
    match instance.state:
        case State.QUEUED:
            return "queued"
        case State.CANCELLED:
            return "cancelled"
        case State.FAILED | State.LOST:
            return "failed"
    return "loading"


def outcome(instance: Instance) -> ErrorBody | None:
    """Why a load ended without a model in memory, if it did."""
    if instance.loaded_at is not None:
        return None
    if instance.error is not None:
        return instance.error
    if instance.state is State.CANCELLED:
        return LoadFailed("load_cancelled", instance.type, instance.model, "the load was cancelled").body()
    if instance.state is State.LOST:
        reason = f"the worker '{instance.worker}' is gone"
        return LoadFailed("worker_lost", instance.type, instance.model, reason).body()
    return None


def job(instance: Instance) -> Job:
    is_loaded = instance.loaded_at is not None
    timing = {name: round(seconds, 6) for name, seconds in instance.timing.items()}
    if is_over(instance):
        timing["total"] = round(sum(timing.values()), 6)
    return Job(
        job_id=instance.id,
        status=status(instance),
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
    """The event that a revision of the record is; None for those after the terminal one."""
    if instance.loaded_at is not None and instance.state is not State.LOADED:
        return None
    if instance.rev == 1:
        return LoadStart(model_instance_id=instance.instance_id, job_id=instance.id)
    return job(instance).event()


def _moment(at: float | None) -> datetime | None:
    return None if at is None else _time(at)


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(round(at, 3), UTC)
