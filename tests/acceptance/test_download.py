"""Downloads over HTTP, with real processes and a hub on this machine."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from shared.synthetic import models as synthetic
from tests.support.hub import LocalHub, sha256
from tests.support.service import JSON, PATIENCE_S, Process, Running, Service, until, up, wait_gone
from worker.hub.transfer import GOT

DOWNLOAD, STATUS = "/api/v1/models/download", "/api/v1/models/download/status"
REPOSITORY, KEY = "Acme/Fetched-GGUF", "acme/fetched"
LARGE = "Acme/Large-GGUF"
MIB = 1 << 20


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalHub]:
    home = tmp_path_factory.mktemp("hub")
    synthetic.tiny_llama(home / "small.gguf", name="fetched")
    large = home / "large.gguf"
    large.write_bytes(random.Random(1).randbytes(8 * MIB))
    with LocalHub().running() as hub:
        hub.add(REPOSITORY, "fetched-Q8_0.gguf", home / "small.gguf")
        hub.add(REPOSITORY, "mmproj-F16.gguf", home / "small.gguf")
        hub.add(LARGE, "large-Q4_0.gguf", large)
        hub.add("Acme/Several-GGUF", "a-Q4_0.gguf", home / "small.gguf")
        hub.add("Acme/Several-GGUF", "b-Q4_0.gguf", home / "small.gguf")
        yield hub


def started(
    directory: Path, hub: LocalHub, hub_token: str = "", downloads: str = "on"
) -> AbstractContextManager[Service]:
    return up(
        directory,
        HF_ENDPOINT=hub.endpoint,
        HF_TOKEN=hub_token,
        LOADSTONE_HUB_HOSTS=hub.cdn,
        LOADSTONE_DOWNLOADS=downloads,
    )


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory, hub: LocalHub) -> Iterator[Service]:
    with started(tmp_path_factory.mktemp("download"), hub) as service:
        yield service


def ended(service: Service, job_id: str, status: str = "completed") -> Any:
    def job() -> Any:
        job = service.send("GET", f"{STATUS}/{job_id}").json()
        assert job["status"] in ("downloading", "paused", status), job
        return job if job["status"] == status else None

    return until(job, status)


def test_open_webuis_four_calls(service: Service) -> None:
    """Download, status, load and unload, in the order in which Open WebUI makes them."""
    begun = service.post(DOWNLOAD, {"model": f"https://huggingface.co/{REPOSITORY}", "quantization": "Q8_0"})
    assert begun.status == 200
    reply = begun.json()
    assert {*reply} == {"status", "job_id", "total_size_bytes", "started_at"} | (
        {"completed_at"} if reply["status"] == "completed" else set()
    )
    job = ended(service, reply["job_id"])
    assert job["downloaded_bytes"] == job["total_size_bytes"] == reply["total_size_bytes"]
    until(lambda: KEY in service.models(), "the model is listed")
    assert service.loaded(KEY)["instance_id"] == KEY
    again = service.post(DOWNLOAD, {"model": REPOSITORY})
    assert again.json() == {"status": "already_downloaded"}
    removal = service.send("DELETE", f"/api/v1/models/{KEY}")
    assert (removal.status, removal.json()["error"]["code"]) == (409, "model_in_use")
    assert service.unload(KEY).status == 200
    removed = service.send("DELETE", f"/api/v1/models/{KEY}")
    assert (removed.status, removed.json()["model"]) == (200, KEY)
    until(lambda: KEY not in service.models(), "the model is gone")
    assert service.send("DELETE", f"/api/v1/models/{KEY}").status == 404


def test_pause_resume_and_cancel(service: Service, hub: LocalHub) -> None:
    hub.bytes_s, hub.holds_at = MIB, hub.sent.total() + MIB
    job_id = service.post(DOWNLOAD, {"model": LARGE}).json()["job_id"]
    try:
        assert service.post(DOWNLOAD, {"model": LARGE}).json()["job_id"] == job_id
        paused = service.send("POST", f"{STATUS}/{job_id}/pause")
        assert (paused.status, paused.json()["status"]) == (200, "paused")
        resumed = service.send("POST", f"{STATUS}/{job_id}/resume")
        assert (resumed.status, resumed.json()["status"]) == (200, "downloading")
        cancelled = service.send("DELETE", f"{STATUS}/{job_id}")
        assert (cancelled.status, cancelled.json()["status"]) == (200, "cancelled")
    finally:
        hub.bytes_s, hub.holds_at = 0, None
    again = service.send("POST", f"{STATUS}/{job_id}/pause")
    assert (again.status, again.json()["error"]["code"]) == (409, "job_already_finished")
    listed = service.send("GET", STATUS).json()["jobs"]
    assert [job["status"] for job in listed if job["job_id"] == job_id] == ["cancelled"]


def test_events_lead_to_the_end(service: Service, hub: LocalHub) -> None:
    hub.bytes_s = MIB
    job_id = service.post(DOWNLOAD, {"model": LARGE}).json()["job_id"]
    events = [*service.stream("GET", f"{STATUS}/{job_id}/events")]
    hub.bytes_s = 0
    assert [event.name for event in events][-1] == "download.end"
    assert {event.name for event in events[:-1]} <= {"download.progress"}
    assert events[-1].data["job"]["status"] == "completed"
    over = service.send("GET", f"{STATUS}/{job_id}/events", headers={"Last-Event-ID": events[-1].id})
    assert over.status == 204
    until(lambda: service.send("DELETE", "/api/v1/models/acme/large").status == 200, "it is listed, and removed")


def test_an_idempotency_key(service: Service) -> None:
    headers = {**JSON, "Idempotency-Key": "fetch-1"}
    body = '{"model": "acme/fetched-GGUF"}'.replace("acme", "Acme").replace("fetched", "Fetched")
    first = service.send("POST", DOWNLOAD, content=body, headers=headers).json()
    ended(service, first["job_id"])
    assert service.send("POST", DOWNLOAD, content=body, headers=headers).json()["job_id"] == first["job_id"]
    other = service.send("POST", DOWNLOAD, content='{"model": "a/b"}', headers=headers)
    assert (other.status, other.json()["error"]["code"]) == (422, "idempotency_key_reused")


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"model": "Acme/Nothing"}, 404, None),
        ({"model": "no-slash"}, 400, "invalid_value"),
        ({"model": "http://169.254.169.254/a/b"}, 400, "invalid_value"),
        ({"model": "../etc/passwd"}, 400, "invalid_value"),
        ({"model": REPOSITORY, "quantization": "Q9_9"}, 400, "invalid_value"),
        ({"model": "Acme/Several-GGUF"}, 400, "invalid_value"),
        ({"model": REPOSITORY, "revision": "../x"}, 400, "invalid_value"),
        ({"model": REPOSITORY, "worker": "nobody"}, 400, "invalid_value"),
        ({}, 400, "missing_required_parameter"),
    ],
)
def test_a_request_that_is_refused(service: Service, body: dict[str, str], status: int, code: str | None) -> None:
    reply = service.post(DOWNLOAD, body)
    assert (reply.status, reply.json()["error"].get("code")) == (status, code), reply.text


def test_an_unknown_job(service: Service) -> None:
    for id_ in ("job_0123456789", "load_1", "job_*"):
        reply = service.send("GET", f"{STATUS}/{id_}")
        assert (reply.status, reply.json()["error"]["type"]) == (404, "job_not_found")


def test_a_token_of_the_hub_reaches_no_log(tmp_path: Path, hub: LocalHub) -> None:
    hub.gated, hub.token = True, "hf_verysecret"
    try:
        with started(tmp_path, hub, hub_token=hub.token) as service:
            job = service.post(DOWNLOAD, {"model": REPOSITORY}).json()
            ended(service, job["job_id"])
            everything = service.stdout + service.stderr + service.send("GET", STATUS).text
            with service.redis() as redis:
                redis.config_set("rdbcompression", "no")
                everything += repr([redis.dump(key) for key in redis.scan_iter()])
            assert hub.token not in everything
    finally:
        hub.gated, hub.token = False, ""


def test_downloads_turned_off(tmp_path: Path, hub: LocalHub) -> None:
    with started(tmp_path, hub, downloads="off") as service:
        reply = service.post(DOWNLOAD, {"model": REPOSITORY})
        assert (reply.status, reply.json()["error"]["code"]) == (501, "downloads_off")


def test_a_download_survives_all_processes(tmp_path: Path, hub: LocalHub) -> None:
    before = hub.sent["large-Q4_0.gguf"]
    hub.bytes_s, hub.holds_at = MIB, hub.sent.total() + 3 * MIB
    with started(tmp_path, hub) as service:
        job_id = service.post(DOWNLOAD, {"model": LARGE}).json()["job_id"]
        until(lambda: hub.sent["large-Q4_0.gguf"] - before > 2 * MIB, "some bytes")
        service.kill()
    hub.bytes_s, hub.holds_at = 0, None
    with started(tmp_path, hub) as service:
        ended(service, job_id)
        target = service.models_dir / LARGE / "large-Q4_0.gguf"
        assert sha256(target) == sha256(hub.repositories[LARGE]["large-Q4_0.gguf"])
    assert hub.sent["large-Q4_0.gguf"] - before <= 8 * MIB + 6 * MIB  # and what was in the buffers of sockets


def test_kills_fetch_hardly_anything_twice(tmp_path: Path, hub: LocalHub) -> None:
    """Each process is killed once; the hub sends slowly up to then, so that little is on its way."""
    path, total, chance = "large-Q4_0.gguf", 8 * MIB, random.Random(5)
    before = hub.sent[path]
    victims = ["worker", "api", "redis", "worker.hub.process"]
    chance.shuffle(victims)
    hub.bytes_s, hub.holds_at = MIB / 2, hub.sent.total()
    slack = 2 * round(hub.bytes_s) // 20  # a connection whose reader died takes a step of the hub with it
    with started(tmp_path, hub) as service:
        job_id = service.post(DOWNLOAD, {"model": LARGE}).json()["job_id"]
        for at, victim in zip(sorted(chance.sample(range(1, total // 2), len(victims))), victims, strict=True):
            missing = at - n_come(service)  # what was on its way to the last victim is sent once more
            hub.holds_at = hub.sent.total() + missing + slack
            until(partial(has_come, service, at), f"{at:,} bytes")
            process = until(partial(running_as, service, victim), victim)
            os.kill(process.pid, signal.SIGKILL)
            wait_gone([process])
        hub.bytes_s, hub.holds_at = 0, None
        target = service.models_dir / LARGE / path
        until(target.exists, "the file in its place")
        assert sha256(target) == sha256(hub.repositories[LARGE][path])
        until(partial(answers, service), "the API is back")
        ended(service, job_id)
    assert total <= hub.sent[path] - before <= 1.05 * total


def has_come(service: Service, n: int) -> bool:
    return n_come(service) >= n


def n_come(service: Service) -> int:
    """Return how many bytes the only partial file has, by the table beside it."""
    tables = [*service.models_dir.glob(".loadstone-downloads/*/*.pieces")]
    return sum(got for table in tables for (got,) in GOT.iter_unpack(table.read_bytes()))


def running_as(service: Service, name: str) -> Process | None:
    """Return the process of a module, or that of Redis."""
    for process in service.tree():
        if process.words[2:4] == ("-m", name) or (name == "redis" and "redis.sock" in " ".join(process.words)):
            return process
    return None


def answers(service: Service) -> bool:
    try:
        return service.send("GET", "/readyz").status == 200
    except httpx.TransportError:  # the next process has not begun
        return False


def command(service: Service, *words: str) -> Running:
    return Running(service.directory / "command", *words, environ={"LOADSTONE_URL": service.url})


def test_get_and_rm(service: Service) -> None:
    got = command(service, "get", f"{REPOSITORY}@q8_0")
    assert got.popen.wait(PATIENCE_S) == 0, got.stderr
    assert got.stdout in (f"{KEY}@q8_0\n", "")  # "" if an earlier test has left it
    until(lambda: KEY in service.models(), "the model is listed")
    again = command(service, "get", REPOSITORY)
    assert again.popen.wait(PATIENCE_S) == 0
    assert "is there already" in again.stderr
    removed = command(service, "rm", KEY)
    assert removed.popen.wait(PATIENCE_S) == 0, removed.stderr
    until(lambda: KEY not in service.models(), "the model is gone")
    missing = command(service, "rm", KEY)
    assert missing.popen.wait(PATIENCE_S) == 1
    assert "not found" in missing.stderr


def test_ctrl_c_pauses_and_the_same_command_resumes(service: Service, hub: LocalHub) -> None:
    hub.bytes_s, hub.holds_at = MIB, hub.sent.total() + MIB
    got = command(service, "get", LARGE)
    until(lambda: f"{LARGE}: " in got.stderr, "a line of progress")
    got.popen.send_signal(signal.SIGINT)
    assert got.popen.wait(PATIENCE_S) == 130, got.stderr
    assert "The same command resumes it" in got.stderr
    hub.bytes_s, hub.holds_at = 0, None
    again = command(service, "get", LARGE)
    assert again.popen.wait(PATIENCE_S) == 0, again.stderr
    assert again.stdout == "acme/large\n"
    assert ": 100% 0.0078 GiB downloaded" in again.stderr


def test_get_says_what_there_is_to_choose(service: Service) -> None:
    got = command(service, "get", "Acme/Several-GGUF")
    assert got.popen.wait(PATIENCE_S) == 1
    assert "Name one of: a-Q4_0, b-Q4_0." in got.stderr
