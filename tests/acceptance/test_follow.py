"""Following a load by waiting, polling and streaming: each way shows the same load and the same outcome."""

from __future__ import annotations

import json
import os
import signal
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from datetime import UTC, datetime
from itertools import pairwise
from typing import Any

import httpx
import pytest

from tests.support.service import JSON, LOAD, STATUS, TINY, Reply, SentEvent, Service, error, is_alive, meanwhile, until

PHASES = ["metadata", "weights", "context", "warmup"]
FIELDS = [
    *("job_id", "status", "instance_state", "model", "instance_id", "model_instance_id", "worker", "devices"),
    *("attempt", "progress"),
    *("phase", "total_size_bytes", "loaded_bytes", "bytes_per_second", "estimated_completion", "created_at"),
    *("started_at", "completed_at", "timing", "evicted", "result", "error"),
]


def post_load(service: Service, prefer: str = "", **fields: object) -> Reply:
    headers = {**JSON, **({"Prefer": prefer} if prefer else {})}
    return service.send("POST", LOAD, content=json.dumps({"model": TINY, **fields}).encode(), headers=headers)


def stream_load(service: Service, **fields: object) -> list[SentEvent]:
    headers = {**JSON, "Accept": "text/event-stream"}
    return list(service.stream("POST", LOAD, content=json.dumps({"model": TINY, **fields}).encode(), headers=headers))


def all_events(service: Service, job_id: str) -> list[SentEvent]:
    return list(service.events(job_id))


def moment(text: str) -> float:
    return datetime.fromisoformat(text).timestamp()


# ---- jobs


def test_an_async_load_is_answered_with_its_job_at_once(service: Service) -> None:
    with service.frozen():
        reply = post_load(service, "respond-async")
        assert reply.status == 202
        job = reply.json()
        assert reply.headers["location"] == f"{STATUS}/{job['job_id']}"
        assert (reply.headers["retry-after"], reply.headers["preference-applied"]) == ("1", "respond-async")
        assert list(job) == FIELDS
        assert (job["status"], job["model"], job["instance_id"], job["model_instance_id"]) == ("queued", *[TINY] * 3)
        assert (job["progress"], job["result"], job["error"], job["completed_at"]) == (0, None, None, None)
        until(lambda: service.job(job["job_id"])["status"] == "loading", "the job is loading")
    job = service.job(job["job_id"], wait_s=20)
    assert list(job) == FIELDS
    assert (job["status"], job["progress"], job["phase"], job["error"]) == ("loaded", 1, None, None)
    assert job["loaded_bytes"] == job["total_size_bytes"] > 0
    assert job["result"] == {
        "type": "llm",
        "model_instance_id": TINY,
        "instance_id": TINY,
        "load_time_seconds": pytest.approx(sum(job["timing"][phase] for phase in PHASES), abs=1e-4),
        "status": "loaded",
    }
    assert job["devices"] == ["CPU"]
    assert job["bytes_per_second"] > 0
    assert moment(job["created_at"]) <= moment(job["started_at"]) <= moment(job["completed_at"])
    assert abs(datetime.now(UTC).timestamp() - moment(job["completed_at"])) < 60


def test_the_phases_add_up_to_the_total(service: Service) -> None:
    timing = service.job(service.accepted(TINY)["job_id"], wait_s=20)["timing"]
    assert list(timing) == ["queue", "spawn", *PHASES, "total"]
    assert timing["total"] == pytest.approx(sum(timing[name] for name in ["queue", "spawn", *PHASES]), abs=1e-5)


def test_a_waiting_poll_ends_at_its_limit_or_with_the_load(service: Service) -> None:
    with ExitStack() as polling, service.frozen():
        job_id = service.accepted(TINY)["job_id"]
        began = time.monotonic()
        assert service.job(job_id, wait_s=1)["status"] == "loading"
        assert time.monotonic() - began > 0.9
        polled = polling.enter_context(meanwhile(service.job, job_id, wait_s=20))
        assert service.job(job_id)["status"] == "loading"
        assert not polled.done()
    assert polled.result()["status"] == "loaded"


def test_a_load_that_exceeds_the_preferred_wait_returns_the_job(service: Service) -> None:
    with service.frozen():
        for prefer, applied in (("wait=1", "wait=1"), ("respond-async, wait=1", "respond-async, wait=1")):
            began = time.monotonic()
            reply = post_load(service, prefer)
            assert time.monotonic() - began > 0.9
            assert (reply.status, reply.headers["preference-applied"]) == (202, applied)
            assert reply.headers["location"] == f"{STATUS}/{reply.json()['job_id']}"
    assert service.job(reply.json()["job_id"], wait_s=20)["status"] == "loaded"


def test_a_load_within_the_preferred_wait_gets_the_usual_reply(service: Service) -> None:
    reply = post_load(service, "wait=20", echo_load_config=True)
    assert (reply.status, reply.headers["preference-applied"]) == (200, "wait=20")
    assert reply.json()["load_config"]["context_length"] == 4096
    assert "server-timing" in reply.headers
    ignored = post_load(service, "wait=soon, handling=lenient")
    assert (ignored.status, ignored.headers.get("preference-applied")) == (200, None)


def test_a_jobs_outcome_survives_the_end_of_its_instance(service: Service) -> None:
    job = service.job(service.accepted(TINY, echo_load_config=True)["job_id"], wait_s=20)
    assert job["result"]["load_config"]["context_length"] == 4096
    assert service.unload(TINY).status == 200
    assert service.job(job["job_id"]) == {**job, "instance_state": "unloaded"}
    job = service.job(service.accepted(TINY)["job_id"], wait_s=20)
    until(lambda: len(service.runners()) == 2, "one runner holds the model, and one waits")
    os.kill(service.runners()[0].pid, signal.SIGKILL)
    until(lambda: not service.instances(), "the instance is gone")
    assert service.job(job["job_id"]) == {**job, "instance_state": "failed"}


def test_all_followers_of_a_failed_load_get_the_same_error(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as waiting, meanwhile(stream_load, service) as other:
        until(
            lambda: len(service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]) == 1,
            "one job is loading",
        )
        (job,) = service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"]
        with meanwhile(all_events, service, job["job_id"]) as events:
            os.kill(runner.pid, signal.SIGKILL)
            failed = service.job(job["job_id"], wait_s=20)
    assert (failed["status"], failed["result"], failed["error"]["code"]) == ("failed", None, "engine_crashed")
    assert moment(failed["completed_at"]) >= moment(failed["started_at"])
    assert failed["progress"] < 1
    last = events.result()[-1]
    assert (last.name, last.data) == ("error", {"type": "error", "error": failed["error"]})
    # Either of the two may have come first; the other one was loaded after it.
    outcomes = [waiting.result().status == 200, other.result()[-1].name == "model_load.end"]
    assert sorted(outcomes) == [False, True]
    if not outcomes[0]:
        assert waiting.result().json() == {"error": failed["error"]}


def test_jobs_are_listed_newest_first(service: Service) -> None:
    created = [service.job(service.accepted(TINY)["job_id"], wait_s=20)["job_id"] for _ in range(3)]

    def listed(**query: object) -> list[Any]:
        reply = service.send("GET", STATUS, params=query)
        assert reply.status == 200
        return list(reply.json()["jobs"])

    assert [job["job_id"] for job in listed(limit=3)] == created[::-1]
    assert listed(limit=1) == [service.job(created[2])]
    assert {job["status"] for job in listed(status="loaded")} == {"loaded"}
    assert listed(status="queued") == []
    jobs = listed()
    assert jobs == sorted(jobs, key=lambda job: datetime.fromisoformat(job["created_at"]), reverse=True)


@pytest.mark.parametrize(
    ("query", "code"),
    [("limit=0", "invalid_value"), ("limit=x", "invalid_type"), ("status=lost", "invalid_value")],
)
def test_an_invalid_list_query_is_refused(service: Service, query: str, code: str) -> None:
    error(service.send("GET", f"{STATUS}?{query}"), 400, "invalid_request", code, query.partition("=")[0])


def test_an_unknown_job_is_not_found_on_any_path(service: Service) -> None:
    for job_id in ("load_0", f"load_{'0' * 32}", f"{service.accepted(TINY)['job_id']}:log"):
        for method, path in (("GET", ""), ("DELETE", ""), ("GET", "/events"), ("GET", "/logs")):
            error(service.send(method, f"{STATUS}/{job_id}{path}"), 404, "job_not_found", param="job_id")
    job_id = service.accepted(TINY)["job_id"]
    error(service.send("GET", f"{STATUS}/{job_id}?wait=-1"), 400, "invalid_request", "invalid_value", "wait")
    service.job(job_id, wait_s=20)


def test_the_engines_log_of_a_load_can_be_read(service: Service) -> None:
    job_id = service.accepted(TINY)["job_id"]

    def read() -> str:
        reply = service.send("GET", f"{STATUS}/{job_id}/logs")
        assert (reply.status, reply.headers["content-type"]) == (200, "text/plain; charset=utf-8")
        return reply.text

    until(lambda: "compute buffer size" in read(), "the engine has logged the context")
    assert "llama_model_loader" in read()
    assert str(service.models_dir) not in read()
    assert service.unload(TINY).status == 200
    assert "llama_model_loader" in read()


# ---- events


def test_a_stream_shows_a_load_from_start_to_end(service: Service) -> None:
    events = stream_load(service, echo_load_config=True)
    assert [event.name for event in events] == [
        "model_load.start",
        *["model_load.progress"] * (len(events) - 2),
        "model_load.end",
    ]
    assert all(event.data["type"] == event.name for event in events)
    assert all(event.data["model_instance_id"] == TINY for event in events)
    ids = [tuple(map(int, event.id.split("-"))) for event in events]
    assert all(one < next_ for one, next_ in pairwise(ids))
    progress = [event.data for event in events[1:-1]]
    assert [phase for phase in dict.fromkeys(data["phase"] for data in progress) if phase] == PHASES
    for name in ("progress", "loaded_bytes"):
        assert all(one[name] <= next_[name] for one, next_ in pairwise(progress))
    assert progress[-1]["progress"] < 1
    assert progress[-1]["loaded_bytes"] == progress[-1]["total_size_bytes"]
    end = events[-1].data
    assert end["result"] == service.job(end["job_id"])["result"]
    assert end["load_time_seconds"] == end["result"]["load_time_seconds"] > 0
    assert end["result"]["load_config"] == service.instances()[TINY]["config"]


def test_a_refused_stream_request_gets_a_plain_error(service: Service) -> None:
    headers = {**JSON, "Accept": "text/event-stream"}
    for body, status in ((b'{"model": "no/such"}', 404), (b"{", 400), (b'{"model": "x", "ttl": 1}', 400)):
        reply = service.send("POST", LOAD, content=body, headers=headers)
        assert (reply.status, reply.headers["content-type"]) == (status, "application/json")


def test_a_late_or_resumed_follower_misses_no_event(service: Service) -> None:
    events = stream_load(service)
    job_id = events[0].data["job_id"]
    assert all_events(service, job_id) == events
    for i, event in enumerate(events[:-1]):
        assert list(service.events(job_id, event.id)) == events[i + 1 :]
    reply = service.send("GET", f"{STATUS}/{job_id}/events", headers={"Last-Event-ID": events[-1].id})
    assert (reply.status, reply.text) == (204, "")
    for nonsense in ("x", "1-2-3", f"{1 << 64}-0", "99999999999999-0"):
        assert list(service.events(job_id, nonsense)) == events
    assert service.unload(TINY).status == 200
    assert all_events(service, job_id) == events
    assert service.send("GET", f"{STATUS}/{job_id}/events", headers={"Last-Event-ID": events[-1].id}).status == 204


def test_a_stream_has_an_event_each_second_without_progress(service: Service) -> None:
    with service.frozen():
        events = service.events(service.accepted(TINY)["job_id"])
        received_at = []
        for _ in range(8):
            next(events)
            received_at.append(time.monotonic())
        gaps = [after - before for before, after in pairwise(received_at[3:])]
        assert statistics.median(gaps) < 1, "a busy machine may delay one event, and the next comes sooner"
    assert list(events)[-1].name == "model_load.end"


def test_64_followers_see_the_same_events_in_the_same_order(service: Service) -> None:
    with ThreadPoolExecutor(64) as pool:
        with service.frozen():
            job_id = service.accepted(TINY)["job_id"]
            first = [service.events(job_id) for _ in range(64)]
            seen = list(pool.map(lambda events: [next(events)], first))
        rest = list(pool.map(lambda events: [*events], first))
    followed = [one + others for one, others in zip(seen, rest, strict=True)]
    assert followed[0][-1].name == "model_load.end"
    assert all(events == followed[0] for events in followed)


def test_a_follower_misses_no_event_when_the_api_is_killed(service: Service) -> None:
    """The supervisor restarts the API; the load in the worker is not affected."""
    with service.frozen():
        job_id = service.accepted(TINY)["job_id"]
        seen: list[SentEvent] = []
        events = service.events(job_id)
        seen += [next(events) for _ in range(4)]
        (api,) = (process for process in service.tree() if "api" in process.words)
        os.kill(api.pid, signal.SIGKILL)
        with suppress(httpx.TransportError):
            seen += list(events)
        until(lambda: not is_alive(api), "the API is gone")
        until(lambda: answers(service), "another API answers")
        events = service.events(job_id, seen[-1].id)
        seen.append(next(events))
    seen += list(events)
    assert seen[-1].name == "model_load.end"
    assert seen == all_events(service, job_id)


def answers(service: Service) -> bool:
    with suppress(httpx.TransportError):
        return service.send("GET", "/readyz").status == 200
    return False


def test_a_disconnected_follower_leaves_nothing_behind(service: Service) -> None:
    with service.frozen():
        job_id = service.accepted(TINY)["job_id"]
        followers = [service.events(job_id) for _ in range(8)]
        for events in followers:
            next(events)
        (api,) = (process for process in service.tree() if "api" in process.words)
        held = len(os.listdir(f"/proc/{api.pid}/fd"))
        for events in followers:
            events.close()  # type: ignore[attr-defined]
        until(lambda: len(os.listdir(f"/proc/{api.pid}/fd")) <= held - 8, "their connections are closed")
    assert service.job(job_id, wait_s=20)["status"] == "loaded"
