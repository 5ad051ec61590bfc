"""Cancelling a load: it takes effect at once, frees the memory, and never happens by accident."""

from __future__ import annotations

import json
import time
from contextlib import ExitStack

import httpx
import pytest

from tests.support.service import JSON, LOAD, STATUS, TINY, Service, error, is_alive, meanwhile, until

ATTEMPTS = 24


def loading_job_id(service: Service) -> str:
    """Return the id of the only job in the state `loading`, once there is one."""
    (job,) = until(
        lambda: service.send("GET", STATUS, params={"status": "loading"}).json()["jobs"], "a load has started"
    )
    return str(job["job_id"])


def test_a_queued_load_is_cancelled_at_once(service: Service) -> None:
    with service.frozen():
        first, second = service.accepted(TINY)["job_id"], service.accepted(TINY)["job_id"]
        until(lambda: service.job(first)["status"] == "loading", "the first load has started")
        reply = service.cancel(second)
        assert service.job(first)["status"] == "loading", "the cancel did not wait for the first load"
        assert (reply.status, reply.json()["job_id"], reply.json()["status"]) == (200, second, "cancelled")
    assert service.job(first, wait_s=20)["status"] == "loaded"
    assert list(service.instances()) == [TINY]
    job = service.job(second)
    assert job == reply.json()
    assert (job["result"], job["error"]["code"], job["started_at"]) == (None, "load_cancelled", None)


def test_cancel_replies_after_memory_is_free_and_informs_waiters(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as waiter:
        job_id = loading_job_id(service)
        with meanwhile(lambda: [*service.events(job_id)]) as events:
            reply = service.cancel(job_id)
            assert not is_alive(runner)
    assert (reply.status, reply.json()["status"], reply.json()["result"]) == (200, "cancelled", None)
    failure = error(waiter.result(), 409, "model_load_failed", "load_cancelled")
    assert failure["message"] == f"Failed to load LLM '{TINY}': Error: the load was cancelled"
    assert reply.json()["error"] == failure
    assert events.result()[-1].data == {"type": "error", "error": failure}
    assert set(reply.json()["timing"]) == {"queue", "spawn", "metadata", "total"}
    assert service.instances() == {}
    assert service.loaded(TINY)["instance_id"] == TINY


def test_a_finished_load_cannot_be_cancelled(service: Service) -> None:
    job_id = service.accepted(TINY)["job_id"]
    assert service.job(job_id, wait_s=20)["status"] == "loaded"
    error(service.cancel(job_id), 409, "invalid_request", "job_already_finished", "job_id")
    assert list(service.instances()) == [TINY]
    with service.frozen(1):
        cancelled = service.accepted(TINY)["job_id"]
        assert service.cancel(cancelled).status == 200
    error(service.cancel(cancelled), 409, "invalid_request", "job_already_finished", "job_id")


def test_unloading_a_loading_instance_cancels_its_load(service: Service) -> None:
    with service.frozen() as runner, meanwhile(service.load, TINY) as waiter:
        job_id = loading_job_id(service)
        reply = service.unload(TINY)
        assert (reply.status, reply.json()) == (200, {"instance_id": TINY})
        assert not is_alive(runner)
    error(waiter.result(), 409, "model_load_failed", "load_cancelled")
    assert service.job(job_id)["status"] == "cancelled"


def test_a_load_survives_when_one_of_its_waiters_disconnects(service: Service) -> None:
    headers = {**JSON, "Idempotency-Key": "several"}
    body = json.dumps({"model": TINY}).encode()
    with ExitStack() as stack, service.frozen():
        staying = stack.enter_context(meanwhile(service.send, "POST", LOAD, content=body, headers=headers))
        loading_job_id(service)
        with pytest.raises(httpx.ReadTimeout):
            service.send("POST", LOAD, content=body, headers=headers, timeout=0.5)
        job_id = loading_job_id(service)
        events = service.events(job_id)
        next(events)
        events.close()  # type: ignore[attr-defined]
    assert staying.result().status == 200
    assert service.job(job_id, wait_s=20)["status"] == "loaded"


def test_a_cancel_racing_the_end_of_a_load_has_one_outcome(service: Service) -> None:
    """The load is either cancelled and absent from the list, or loaded and the cancel refused."""
    outcomes: list[str] = []
    for attempt in range(ATTEMPTS):  # each cancels a little later: the first before the load, the last after it
        with ExitStack() as frozen:
            frozen.enter_context(service.frozen())
            job_id = service.accepted(TINY)["job_id"]
            if attempt:
                frozen.close()
                time.sleep(attempt / 500)
            if attempt == ATTEMPTS - 1:
                service.job(job_id, wait_s=20)
            reply = service.cancel(job_id)
        status = service.job(job_id, wait_s=20)["status"]
        assert (reply.status, status) in ((200, "cancelled"), (409, "loaded"))
        assert list(service.instances()) == ([TINY] if status == "loaded" else [])
        outcomes.append(status)
        service.unload_all()
    assert (outcomes[0], outcomes[-1]) == ("cancelled", "loaded")
