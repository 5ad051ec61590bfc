"""Counts of loads, and their conversion to the metrics of Prometheus."""

from __future__ import annotations

import math
import re
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.pool.metrics import cumulative, rendered
from shared.channel.messages import Usage
from shared.errors import ErrorBody, LoadFailed, LoadFailure, NoWorker
from shared.instance import Instance
from shared.lifecycle import Event
from shared.schema.http import LoadRequest
from shared.store.counters import Readings
from shared.telemetry.tally import (
    BOUNDS_S,
    FAMILIES,
    GIB,
    OUTCOMES,
    PHASES,
    Family,
    accepted,
    answered,
    bucket,
    died,
    moved,
    named,
    observed,
    size_class,
)

TIMING = {"queue": 0.25, "spawn": 0.0005, "metadata": 0.002, "weights": 3.0, "context": 0.01, "warmup": 0.02}


def queued(**fields: Any) -> Instance:
    return Instance(
        id="load_1", model="p/m", key="p/m", type="llm", worker="w", request=LoadRequest(model="p/m"), **fields
    )


def loading() -> Instance:
    return queued(total_size_bytes=2 * GIB).after(Event.CLAIM, epoch="e")


def loaded(timing: dict[str, float] = TIMING) -> Instance:
    return loading().after(Event.LOAD, loaded_at=1.0, timing=timing)


@pytest.mark.parametrize(
    ("size_bytes", "name"),
    [
        (0, "under_1GiB"),
        (GIB - 1, "under_1GiB"),
        (GIB, "1_8GiB"),
        (8 * GIB - 1, "1_8GiB"),
        (8 * GIB, "8_32GiB"),
        (32 * GIB - 1, "8_32GiB"),
        (32 * GIB, "over_32GiB"),
        (2**50, "over_32GiB"),
    ],
)
def test_every_size_has_one_class(size_bytes: int, name: str) -> None:
    assert size_class(size_bytes) == name


@pytest.mark.parametrize(
    ("seconds", "name"),
    [(0.0, "0.001"), (0.001, "0.001"), (0.0011, "0.0025"), (1.0, "1.0"), (1800.0, "1800.0"), (1800.1, "+Inf")],
)
def test_a_bucket_includes_its_bound(seconds: float, name: str) -> None:
    assert bucket(seconds) == name


@given(st.lists(st.floats(0, 1e5)))
def test_buckets_are_cumulative_for_prometheus(seconds: list[float]) -> None:
    counts: dict[str, int] = {}
    total_us = 0
    for one in seconds:
        added = observed("f", one)
        total_us += added.pop("f|sum")
        for name, n in added.items():
            part = name.removeprefix("f|")
            counts[part] = counts.get(part, 0) + n
    buckets = cumulative(counts)
    assert [(name, float(sum(one <= float(name) for one in seconds))) for name, _ in buckets] == buckets
    assert buckets[-1] == ("+Inf", float(len(seconds)))
    assert total_us / 1e6 == pytest.approx(sum(seconds), abs=1e-6 * (len(seconds) + 1), rel=1e-9)


def test_bounds_of_another_version_are_kept() -> None:
    buckets = dict(cumulative({"0.003": 2, "0.001": 1, "+Inf": 1}))
    assert (buckets["0.001"], buckets["0.0025"], buckets["0.003"], buckets["0.005"], buckets["+Inf"]) == (1, 1, 3, 3, 4)
    assert all(a < b for a, b in pairwise(map(float, buckets)))


def test_bounds_are_sorted_and_unique() -> None:
    bounds: list[float] = [*BOUNDS_S, math.inf]
    assert bounds == sorted(set(bounds))


def test_a_loaded_model_adds_its_bytes_and_phases() -> None:
    counts = moved(loading(), loaded())
    assert counts.pop("loads|loaded|") == 1
    assert counts.pop("loaded_bytes") == 2 * GIB
    assert {name: counts.pop(f"load_phase_seconds|{name}|1_8GiB|sum") for name in PHASES} == {
        name: round(seconds * 1e6) for name, seconds in TIMING.items()
    }
    for name, seconds in TIMING.items():
        assert counts.pop(f"load_phase_seconds|{name}|1_8GiB|{bucket(seconds)}") == 1
    assert counts.pop("load_seconds|1_8GiB|sum") == round(sum(TIMING.values()) * 1e6)
    assert counts.pop("load_seconds|1_8GiB|5.0") == 1
    assert counts == {}


def test_an_unknown_phase_makes_no_label() -> None:
    assert moved(loading(), loaded({**TIMING, "p/m": 1.0})) == moved(loading(), loaded())


def test_an_unsuccessful_load_adds_only_its_outcome() -> None:
    for code in get_args(LoadFailure):
        error = LoadFailed(code, "llm", "p/m", "why").body()
        assert moved(loading(), loading().after(Event.FAIL, error=error)) == {f"loads|failed|{code}": 1}
    gone = NoWorker("gone").body()
    assert moved(queued(), queued().after(Event.FAIL, error=gone)) == {"loads|failed|no_worker": 1}
    bare = ErrorBody(type="internal_error", message="why")
    assert moved(queued(), queued().after(Event.FAIL, error=bare)) == {"loads|failed|internal_error": 1}
    assert moved(queued(), queued().after(Event.STOP)) == {"loads|cancelled|": 1}
    assert moved(queued(), queued().after(Event.EXPIRE)) == {"loads|lost|": 1}
    stopping = loading().after(Event.STOP)
    assert moved(loading(), stopping) == {}
    assert moved(stopping, stopping.after(Event.EXIT)) == {"loads|cancelled|": 1}


def test_the_end_of_a_loaded_instance_adds_nothing() -> None:
    stopping = loaded().after(Event.STOP)
    error = LoadFailed("engine_crashed", "llm", "p/m", "why").body()
    for old, new in [
        (loaded(), stopping),
        (stopping, stopping.after(Event.EXIT)),
        (loaded(), loaded().after(Event.EXPIRE)),
        (loaded(), loaded().after(Event.FAIL, error=error)),
    ]:
        assert moved(old, new) == {}


def test_progress_and_requeueing_add_nothing() -> None:
    assert moved(loading(), msgspec.structs.replace(loading(), loaded_bytes=1)) == {}
    assert moved(loading(), loading().after(Event.REQUEUE)) == {}


def test_a_restoring_load_adds_a_restoration() -> None:
    assert accepted(queued()) == {}
    assert accepted(queued(restoring=2)) == {"restorations": 1}


def test_every_possible_outcome_starts_at_zero() -> None:
    codes = {*get_args(LoadFailure)} - {"load_cancelled"} | {"no_worker"}
    assert {reason for outcome, reason in OUTCOMES if outcome == "failed"} == codes
    assert {outcome for outcome, reason in OUTCOMES if not reason} == {"loaded", "cancelled", "lost"}


def test_families_are_unique_and_known_rows_match_labels() -> None:
    assert len({family.name for family in FAMILIES}) == len(FAMILIES)
    assert all(len(row) == len(family.labels) for family in FAMILIES for row in family.known)
    assert not any(family.known for family in FAMILIES if family.kind == "histogram")


def test_each_count_of_a_load_has_a_declared_family() -> None:
    """A count of another family would be added in Redis and never exported."""
    n_labels = {family.name: len(family.labels) + (family.kind == "histogram") for family in FAMILIES}
    counts = accepted(queued(restoring=1)) | moved(loading(), loaded()) | died("warm")
    for key in counts | moved(queued(), queued().after(Event.STOP)):
        name, *labels = key.split("|")
        assert len(labels) == n_labels[name], key


NOTHING = Readings(workers=[], counters={}, tallies={}, queued=0, queued_at={}, live={})


DOCUMENT = (Path(__file__).parents[2] / "docs/metrics.md").read_text("utf-8")


def test_the_documents_have_every_family_and_no_other() -> None:
    described = dict(re.findall(r"^\| `(loadstone_\w+)` \| [^|]*\| (.*) \|$", DOCUMENT, re.MULTILINE))
    served = dict(re.findall(r"^# HELP (\w+) (.*)$", rendered(NOTHING).decode(), re.MULTILINE))
    assert sorted(described) == sorted(served)
    assert [name for name, text in served.items() if not described[name].startswith(text)] == []


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_the_documents_have_the_labels_of_a_family(family: Family) -> None:
    name = f"loadstone_{family.name}{'_total' if family.kind == 'counter' else ''}"
    labels = ", ".join(f"`{label}`" for label in family.labels)
    assert re.search(rf"^\| `{name}` \| {labels} ?\| ", DOCUMENT, re.MULTILINE)


def test_unknown_counts_of_another_version_are_left_out() -> None:
    counters = {"requeued": 1, "outlived": 3}
    tallies = {"outlived|a|b": 3, "loads|failed|later": 2, "loads|loaded||outlived": 3, "load_seconds|outlived|a|1": 3}
    text = rendered(msgspec.structs.replace(NOTHING, counters=counters, tallies=tallies)).decode()
    assert 'loadstone_loads_total{outcome="failed",reason="later"} 2.0' in text
    assert "outlived" not in text


def test_a_completed_request_adds_its_tokens_and_times() -> None:
    usage = Usage(
        prompt_tokens=70,
        cached_tokens=50,
        generated_tokens=22,
        reasoning_tokens=0,
        wait_s=0.5,
        prompt_s=0.25,
        generation_s=0.2,
    )
    assert answered("/r", "completed", 1.0, token="alice", first_token_s=0.8, usage=usage, choices=2) == {
        "requests|/r|completed|alice": 1,
        "prompt_tokens|alice": 70,
        "cached_tokens|alice": 50,
        "generated_tokens|alice": 22,
        "request_seconds|/r|1.0": 1,
        "request_seconds|/r|sum": 1_000_000,
        "time_to_first_token_seconds|/r|1.0": 1,
        "time_to_first_token_seconds|/r|sum": 800_000,
        "time_per_output_token_seconds|/r|0.025": 1,  # ten tokens of each answer after its first
        "time_per_output_token_seconds|/r|sum": 20_000,
    }


def test_a_request_without_an_answer_adds_its_outcome_only() -> None:
    counts = answered("/r", "cancelled", 1.0, token="", first_token_s=0.8, usage=None, choices=1)
    assert counts == {"requests|/r|cancelled|": 1}


def test_the_tokens_of_a_name_are_counted_from_0_on() -> None:
    text = rendered(msgspec.structs.replace(NOTHING, tallies=named("alice"))).decode()
    for family in ("prompt_tokens", "cached_tokens", "generated_tokens"):
        assert f'loadstone_{family}_total{{token="alice"}} 0.0' in text
        assert f'loadstone_{family}_total{{token=""}} 0.0' in text
