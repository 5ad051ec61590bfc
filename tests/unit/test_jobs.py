"""The job that a client sees for each state of an instance, during the load and after it."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import UNSET

from api.loads.jobs import event, is_over, job, log, outcome, status
from shared.errors import ErrorBody
from shared.instance import Instance
from shared.lifecycle import TERMINAL, Event, IllegalTransition, State
from shared.schema.http import LoadConfig, LoadEnd, LoadError, LoadEvent, LoadProgress, LoadRequest, LoadStart, Phase

E, S = Event, State
ERROR = ErrorBody(type="model_load_failed", code="engine_crashed", message="why")
CONFIG = LoadConfig(context_length=256)
QUEUED = Instance(
    id="load_1",
    model="p/m@q8_0",
    key="p/m",
    type="llm",
    worker="w",
    request=LoadRequest(model="p/m@q8_0"),
    total_size_bytes=1000,
    instance_id="p/m@q8_0:2",
    created_at=1_700_000_000.0004,
    rev=1,
)


def happened(instance: Instance, *events: Event) -> Instance:
    """Return the record after these events, with the fields that a worker writes."""
    for one in events:
        changes: dict[str, Any] = {}
        match one:
            case E.CLAIM:
                changes = {"epoch": "e", "devices": ["GPU-1"], "started_at": 1_700_000_001.5}
                changes |= {"timing": {"queue": 1.5}}
            case E.LOAD:
                changes = {"phase": None, "progress": 1.0, "loaded_bytes": instance.total_size_bytes}
                changes |= {"loaded_at": 1_700_000_009.0, "load_time_seconds": 0.75, "load_config": CONFIG}
                changes |= {"timing": {**instance.timing, "weights": 0.5, "warmup": 0.25}}
                changes |= {"bytes_per_second": 2000.0, "estimated_completion": None}
            case E.FAIL:
                changes = {"error": ERROR}
        instance = instance.after(one, rev=instance.rev + 1, **changes)
    return instance


def under_way(instance: Instance, progress: float, phase: Phase = "weights") -> Instance:
    """Return the record of a load after some progress."""
    return msgspec.structs.replace(
        instance,
        rev=instance.rev + 1,
        phase=phase,
        progress=progress,
        loaded_bytes=int(progress * 1000),
        bytes_per_second=123.4,
        estimated_completion=1_700_000_010.0,
    )


# ---- each state


@pytest.mark.parametrize(
    ("events", "state", "job_status", "kind"),
    [
        pytest.param([], S.QUEUED, "queued", LoadStart, id="queued"),
        pytest.param([E.CLAIM], S.LOADING, "loading", LoadProgress, id="loading"),
        pytest.param([E.CLAIM, E.LOAD], S.LOADED, "loaded", LoadEnd, id="loaded"),
        pytest.param([E.CLAIM, E.STOP], S.UNLOADING, "loading", LoadProgress, id="being cancelled"),
        pytest.param([E.STOP], S.CANCELLED, "cancelled", LoadError, id="cancelled in the queue"),
        pytest.param([E.CLAIM, E.STOP, E.EXIT], S.CANCELLED, "cancelled", LoadError, id="cancelled in its load"),
        pytest.param([E.FAIL], S.FAILED, "failed", LoadError, id="failed in the queue"),
        pytest.param([E.CLAIM, E.FAIL], S.FAILED, "failed", LoadError, id="failed in its load"),
        pytest.param([E.EXPIRE], S.LOST, "failed", LoadError, id="lost in the queue"),
        pytest.param([E.CLAIM, E.EXPIRE], S.LOST, "failed", LoadError, id="lost in its load"),
        pytest.param([E.CLAIM, E.STOP, E.EXPIRE], S.LOST, "failed", LoadError, id="lost in its cancel"),
        pytest.param([E.CLAIM, E.LOAD, E.STOP], S.UNLOADING, "loaded", None, id="unloading"),
        pytest.param([E.CLAIM, E.LOAD, E.STOP, E.EXIT], S.UNLOADED, "loaded", None, id="unloaded"),
        pytest.param([E.CLAIM, E.LOAD, E.FAIL], S.FAILED, "loaded", None, id="died loaded"),
        pytest.param([E.CLAIM, E.LOAD, E.EXPIRE], S.LOST, "loaded", None, id="lost loaded"),
        pytest.param([E.CLAIM, E.LOAD, E.STOP, E.EXPIRE], S.LOST, "loaded", None, id="lost unloading"),
    ],
)
def test_each_state_has_a_job_status_and_an_event(
    events: list[Event], state: State, job_status: str, kind: type[LoadEvent] | None
) -> None:
    instance = happened(QUEUED, *events)
    assert instance.state is state
    seen, over = job(instance), job_status in ("loaded", "failed", "cancelled")
    assert seen.status == status(instance) == job_status
    assert seen.instance_state is state
    assert type(event(instance)) is (type(None) if kind is None else kind)
    assert is_over(instance) == over == (seen.completed_at is not None) == ("total" in seen.timing)
    assert (seen.result is not None) == (job_status == "loaded") == (seen.progress == 1)
    assert (seen.error is not None) == (job_status in ("failed", "cancelled"))
    assert seen.error == outcome(instance)
    if over:
        assert (seen.phase, seen.estimated_completion) == (None, None)


def test_the_table_covers_every_state() -> None:
    table = next(mark for mark in test_each_state_has_a_job_status_and_an_event.pytestmark)  # type: ignore[attr-defined]
    assert {row.values[1] for row in table.args[1]} == set(State)


# ---- the fields of a job


def test_a_queued_job_has_only_names_and_size() -> None:
    seen = job(QUEUED)
    assert (seen.job_id, seen.model, seen.worker, seen.attempt) == ("load_1", "p/m@q8_0", "w", 1)
    assert seen.instance_id == seen.model_instance_id == "p/m@q8_0:2"
    assert (seen.progress, seen.phase, seen.total_size_bytes, seen.loaded_bytes) == (0, None, 1000, 0)
    assert (seen.devices, seen.timing, seen.result, seen.error) == ([], {}, None, None)
    assert (seen.bytes_per_second, seen.estimated_completion) == (None, None)
    assert (seen.started_at, seen.completed_at) == (None, None)


def test_a_load_in_progress_shows_progress_and_expected_end() -> None:
    instance = under_way(happened(QUEUED, E.CLAIM), 0.42)
    for seen in (job(instance), event(instance)):
        assert not isinstance(seen, LoadStart | LoadEnd | LoadError | None)
        assert (seen.status, seen.progress, seen.phase) == ("loading", 0.42, "weights")
        assert (seen.total_size_bytes, seen.loaded_bytes, seen.bytes_per_second) == (1000, 420, 123)
        assert seen.estimated_completion == datetime(2023, 11, 14, 22, 13, 30, tzinfo=UTC)
    assert job(instance).devices == ["GPU-1"]
    assert job(instance).timing == {"queue": 1.5}


def test_an_unsuccessful_load_keeps_its_progress() -> None:
    for end in ([E.STOP, E.EXIT], [E.FAIL], [E.EXPIRE]):
        seen = job(happened(under_way(happened(QUEUED, E.CLAIM), 0.42), *end))
        assert (seen.progress, seen.loaded_bytes) == (0.42, 420)
        assert (seen.phase, seen.estimated_completion) == (None, None)


def test_the_log_ends_with_the_reason_of_a_failure() -> None:
    loading = happened(QUEUED, E.CLAIM)
    for healthy in (QUEUED, loading, happened(loading, E.LOAD), happened(loading, E.LOAD, E.STOP, E.EXIT)):
        assert log(b"llama\n", healthy) == b"llama\n"
    refused, died = happened(QUEUED, E.FAIL), happened(loading, E.LOAD, E.FAIL)
    assert log(b"", refused) == b"loadstone: why\n"
    assert log(b"llama\n", died) == b"llama\nloadstone: why\n"
    assert b"the load was cancelled" in log(b"", happened(QUEUED, E.STOP))
    assert b"worker 'w' is no longer available" in log(b"", happened(loading, E.EXPIRE))


def test_times_are_in_utc_with_milliseconds() -> None:
    seen = job(happened(QUEUED, E.CLAIM, E.LOAD))
    assert seen.created_at == datetime(2023, 11, 14, 22, 13, 20, tzinfo=UTC)
    assert seen.started_at == datetime(2023, 11, 14, 22, 13, 21, 500_000, tzinfo=UTC)
    assert seen.completed_at == datetime(2023, 11, 14, 22, 13, 29, tzinfo=UTC)
    assert b'"started_at":"2023-11-14T22:13:21.500000Z"' in msgspec.json.encode(seen)


@pytest.mark.parametrize("events", [[E.STOP, E.EXIT], [E.FAIL], [E.EXPIRE], [E.LOAD]])
def test_the_total_time_appears_at_the_end_as_the_sum(events: list[Event]) -> None:
    loading = happened(QUEUED, E.CLAIM)
    loading = msgspec.structs.replace(loading, timing={"queue": 0.1, "spawn": 0.2, "metadata": 1 / 3})
    assert "total" not in job(loading).timing
    timing = job(happened(loading, *events)).timing
    total = timing.pop("total")
    assert total == round(sum(timing.values()), 6)
    assert timing["metadata"] == 0.333333


def test_the_result_has_the_config_only_on_request() -> None:
    loaded = happened(QUEUED, E.CLAIM, E.LOAD)
    result = job(loaded).result
    assert result is not None
    assert (result.type, result.status, result.load_time_seconds, result.load_config) == ("llm", "loaded", 0.75, UNSET)
    assert result.instance_id == result.model_instance_id == "p/m@q8_0:2"
    end = event(loaded)
    assert isinstance(end, LoadEnd)
    assert (end.result, end.load_time_seconds, end.model_instance_id) == (result, 0.75, "p/m@q8_0:2")

    echoing = msgspec.structs.replace(loaded, request=LoadRequest(model="p/m", echo_load_config=True))
    with_config = job(echoing).result
    assert with_config is not None
    assert with_config.load_config == CONFIG


@pytest.mark.parametrize(
    ("events", "code", "words"),
    [
        ([E.CLAIM, E.FAIL], "engine_crashed", "why"),
        ([E.STOP], "load_cancelled", "Failed to load LLM 'p/m@q8_0': Error: the load was cancelled"),
        ([E.CLAIM, E.EXPIRE], "worker_lost", "Failed to load LLM 'p/m@q8_0': Error: worker 'w' is no longer available"),
    ],
)
def test_an_unsuccessful_load_has_an_error_in_job_and_event(events: list[Event], code: str, words: str) -> None:
    instance = happened(QUEUED, *events)
    error = job(instance).error
    assert error is not None
    assert (error.type, error.code) == ("model_load_failed", code)
    assert words in error.message
    assert event(instance) == LoadError(error=error)


# ---- any order of events


@given(steps=st.lists(st.sampled_from(list(Event)) | st.floats(0, 0.999), max_size=12))
def test_the_outcome_is_the_last_event_and_never_changes(steps: list[Event | float]) -> None:
    """A number means progress, which a worker records while it loads; illegal transitions are skipped."""
    revisions = [QUEUED]
    for step in steps:
        last = revisions[-1]
        if isinstance(step, Event):
            try:
                revisions.append(happened(last, step))
            except IllegalTransition:
                continue
        elif last.state is S.LOADING:
            revisions.append(under_way(last, max(last.progress, step)))

    over = [
        msgspec.structs.replace(job(revision), instance_state=S.LOADED) for revision in revisions if is_over(revision)
    ]
    assert all(one == over[0] for one in over)
    assert all(job(revision).status in ("queued", "loading") for revision in revisions if not is_over(revision))
    progress = [job(revision).progress for revision in revisions]
    assert progress == sorted(progress)
    assert all((one.progress == 1) == (one.status == "loaded") for one in map(job, revisions))

    events = [event(revision) for revision in revisions]
    terminal = [n for n, one in enumerate(events) if isinstance(one, LoadEnd | LoadError)]
    assert len(terminal) == bool(over)
    assert all(is_over(revision) == (n in terminal or events[n] is None) for n, revision in enumerate(revisions))
    if terminal:
        assert {*events[terminal[0] + 1 :]} <= {None}
        assert None not in events[: terminal[0]]
    if revisions[-1].state in TERMINAL:
        assert over


def test_events_have_the_names_of_lm_studio_on_the_wire() -> None:
    names = []
    for events in ([], [E.CLAIM], [E.CLAIM, E.LOAD], [E.STOP]):
        wire = msgspec.to_builtins(event(happened(QUEUED, *events)))
        names.append(wire["type"])
        if wire["type"] != "error":
            assert wire["model_instance_id"] == "p/m@q8_0:2"
            assert wire["job_id"] == "load_1"
    assert names == ["model_load.start", "model_load.progress", "model_load.end", "error"]
