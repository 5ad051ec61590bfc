"""Damaged files, files that change while in use, and files that crash the engine.

Their load fails with the reason, and no other model is affected.
"""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest

import tests.support.service
from shared.instance import Instance
from shared.lifecycle import State
from shared.store.keys import CRASH_MEMORY_S
from shared.synthetic import models as synthetic
from tests.support import damaged
from tests.support.service import (
    LOADSTONE,
    STATUS,
    TINY,
    Process,
    Reply,
    Running,
    Service,
    error,
    go_on,
    is_alive,
    meanwhile,
    until,
    up,
)

MIB = 1 << 20
HEALTHY = "acme/healthy"
NAN, INFINITE = "acme/nan", "acme/infinite"
# Models that one test each damages or changes. Creating a context for those in LONG takes a while.
DAMAGED = (
    "replaced",
    "cut",
    "replaced-at-first",
    "cut-at-first",
    "crash-11",
    "crash-6",
    "behind",
    "force",
    "killed",
    "touched",
)
LONG, LONG_TOKENS = ("replaced-in-load", "cut-in-load"), MIB // 4
# Drops root's privilege to read every file.
WITHOUT_PRIVILEGE = "setpriv --inh-caps=-dac_override,-dac_read_search --bounding-set=-dac_override,-dac_read_search"


@contextmanager
def without_root_privileges(home: Path) -> Iterator[None]:
    """Run the service without the privilege to read unreadable files, even if the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    program = home / "loadstone"
    program.write_text(f'#!/bin/sh\nexec {WITHOUT_PRIVILEGE} {LOADSTONE} "$@"\n')
    program.chmod(0o700)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(tests.support.service, "LOADSTONE", program)
        yield


def file_of(service: Service, model: str) -> Path:
    return service.models_dir / model / "m.gguf"


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("damage")
    models = home / "models"
    for model in (TINY, HEALTHY, *(f"acme/{name}" for name in DAMAGED)):
        synthetic.tiny_llama(models / model / "m.gguf")
    for name in LONG:
        synthetic.tiny_llama(models / f"acme/{name}/m.gguf", metadata={"llama.context_length": LONG_TOKENS})
    damaged.not_finite(models / NAN / "m.gguf")
    damaged.write_all(models)
    synthetic.tiny_llama(models / "z/last/m.gguf")
    with without_root_privileges(home), up(home) as service:
        until(lambda: service.models()["z/last"]["quantization"]["bits_per_weight"], "every header has been read")
        yield service
        assert str(home) not in service.stderr
    (models / damaged.key_of("unreadable-folder")).chmod(0o700)  # pytest must be able to remove it


class Bystander(NamedTuple):
    """The worker and the runner of a healthy model, which damaged files must not affect."""

    worker: Process
    runner: Process


@pytest.fixture(scope="module")
def bystander(running: Service) -> Bystander:
    runner = running.warm_runner(0)
    assert running.loaded(TINY)["instance_id"] == TINY
    return Bystander(running.worker(), runner)


@pytest.fixture
def service(running: Service, bystander: Bystander) -> Iterator[Service]:
    """Return the module's service; check after the test that the bystander still runs."""
    yield running
    assert is_alive(bystander.worker)
    assert is_alive(bystander.runner)
    assert running.state(TINY) == "loaded"
    for instance_id in running.instances().keys() - {TINY}:
        assert running.unload(instance_id).status == 200


def failure(reply: Reply, model: str, code: str) -> str:
    """Return the reason in the message of a failed load, which must have this code."""
    message = error(reply, 500, "model_load_failed", code)["message"]
    start = f"Failed to load LLM '{model}': Error: "
    assert message.startswith(start)
    return str(message.removeprefix(start))


# ---- damaged files


@pytest.mark.parametrize("name", damaged.DAMAGES)
def test_a_damaged_file_is_refused_with_its_defect(service: Service, name: str) -> None:
    _, code, says = damaged.DAMAGES[name]
    reply = service.load(damaged.key_of(name))
    if code == damaged.NOT_FOUND:
        reason = error(reply, 404, "model_not_found", param="model")["message"]
    else:
        reason = failure(reply, damaged.key_of(name), code)
    assert re.search(says, reason), reason


def test_files_that_are_recognizably_not_models_are_not_listed(service: Service) -> None:
    listed = {key for key in service.models() if key.startswith("damaged/")}
    assert listed == {*map(damaged.key_of, damaged.SEEN_BY_THE_ENGINE)}


def test_a_file_loads_as_soon_as_it_becomes_readable(service: Service) -> None:
    """Only the permissions of the file change, neither its time nor its size."""
    key = damaged.key_of("unreadable")
    assert "Permission denied" in failure(service.load(key), key, "invalid_model_file")
    path = service.models_dir / key / "unreadable.gguf"
    path.chmod(0o600)
    until(lambda: service.load(key).status == 200, "the file is loaded")
    path.chmod(0)


def test_a_healthy_model_still_loads_after_the_damaged_files(service: Service, bystander: Bystander) -> None:
    assert service.loaded(HEALTHY)["instance_id"] == HEALTHY
    assert {*service.instances()} == {TINY, HEALTHY}
    assert service.worker() == bystander.worker


# ---- files that change while their model is loaded


def replace(path: Path) -> None:
    synthetic.tiny_llama(path, name="Another Llama")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def ended(service: Service, job_id: str) -> Instance | None:
    """Return the record of a load if its instance has ended."""
    with service.redis() as redis:
        doc: Any = redis.hget(f"inst:{job_id}", "doc")
    instance = msgspec.msgpack.decode(doc, type=Instance)
    return instance if instance.completed_at is not None else None


@pytest.mark.parametrize(("name", "change"), [("replaced", replace), ("cut", cut)])
def test_changing_the_file_of_a_loaded_instance_ends_it(
    service: Service, name: str, change: Callable[[Path], None]
) -> None:
    """The instance no longer matches its file, or the file lacks data. The outcome of the load stays `loaded`."""
    model = f"acme/{name}"
    runner = service.warm_runner(1)
    job_id = service.accepted(model)["job_id"]
    job = service.job(job_id, wait_s=10)
    assert job["status"] == "loaded"
    change(file_of(service, model))
    instance = until(lambda: ended(service, job_id), "the instance has ended")
    assert (instance.state, instance.error and instance.error.code) == (State.FAILED, "invalid_model_file")
    assert instance.error is not None
    assert "a file of the model changed after it was loaded" in instance.error.message
    assert not is_alive(runner)
    assert {*service.instances()} == {TINY}
    assert service.job(job_id) == {**job, "instance_state": "failed"}, "the outcome of the load does not change"
    if name == "replaced":
        until(lambda: service.load(model).status == 200, "the new file is loaded")
    else:
        failure(service.load(model), model, "invalid_model_file")


# ---- files that change while their model is being loaded


@contextmanager
def loading(service: Service, model: str) -> Iterator[tuple[Process, Future[Reply]]]:
    """Start a load with a frozen runner; yield the runner and the future reply. The runner resumes after the block."""
    with service.frozen(1) as runner, meanwhile(service.load, model) as reply:
        try:
            until(lambda: service.state(model) == "loading", f"{model} is loading")
            yield runner, reply
        finally:
            go_on(runner)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("replaced-at-first", synthetic.tiny_bert, "a file of the model changed while it was loaded"),
        ("cut-at-first", cut, "is not within the file bounds"),
    ],
)
def test_a_file_changed_before_the_engine_reads_it_is_refused(
    service: Service, name: str, change: Callable[[Path], object], says: str
) -> None:
    """Without the check it would be loaded under its old description: the file is now an encoder, not an LLM."""
    model = f"acme/{name}"
    with loading(service, model) as (runner, reply):
        change(file_of(service, model))
    assert says in failure(reply.result(60), model, "invalid_model_file")
    assert not is_alive(runner)


def has_read(job: Any) -> bool:
    return job["phase"] in ("context", "warmup") or job["status"] == "loaded"


def stopped_in_context(service: Service, model: str) -> tuple[str, Process] | None:
    """Stop a runner that has read its files but is not done; return its job and it, or None if it was done first."""
    runner = service.warm_runner(1)
    job_id = service.accepted(model, context_length=LONG_TOKENS)["job_id"]
    until(lambda: has_read(service.job(job_id)), "the runner has read its files")
    os.kill(runner.pid, signal.SIGSTOP)
    if service.job(job_id)["phase"] == "context":
        return job_id, runner
    os.kill(runner.pid, signal.SIGCONT)
    assert service.job(job_id, wait_s=10)["status"] == "loaded"
    assert service.unload(model).status == 200
    return None


@contextmanager
def held_in_context(service: Service, model: str) -> Iterator[str]:
    """Hold a load in the phase `context` during the block; yield the id of its job."""
    job_id, runner = until(lambda: stopped_in_context(service, model), "a load is stopped in the phase `context`")
    try:
        yield job_id
    finally:
        os.kill(runner.pid, signal.SIGCONT)


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("replaced-in-load", replace, "a file of the model changed while it was loaded"),
        ("cut-in-load", cut, "a file of the model was truncated"),
    ],
)
def test_a_file_changed_after_the_engine_read_it_fails_the_load(
    service: Service, name: str, change: Callable[[Path], None], says: str
) -> None:
    """Decoding the first token reads the missing data, which kills the engine; the error blames the file."""
    model = f"acme/{name}"
    with held_in_context(service, model) as job_id:
        change(file_of(service, model))
    job = service.job(job_id, wait_s=10)
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_model_file")
    assert says in job["error"]["message"]


# ---- weights that are not finite


def test_weights_are_not_checked_by_default(service: Service) -> None:
    assert service.loaded(NAN)["instance_id"] == NAN


def test_non_finite_weights_are_refused_when_checking_is_on(tmp_path: Path) -> None:
    for model, value in ((NAN, float("nan")), (INFINITE, float("-inf"))):
        damaged.not_finite(tmp_path / f"models/{model}/m.gguf", value)
    synthetic.tiny_llama(tmp_path / f"models/{HEALTHY}/m.gguf")
    with up(tmp_path, LOADSTONE_CHECK_TENSORS="on") as checking:
        for model in (NAN, INFINITE):
            reason = failure(checking.load(model), model, "invalid_model_file")
            assert f"tensor '{damaged.QUERY}' has invalid data" in reason
        assert checking.loaded(HEALTHY)["instance_id"] == HEALTHY


# ---- models that crash the engine


def crash(service: Service, model: str, signum: signal.Signals) -> None:
    """Run a load in which a signal kills the engine."""
    with loading(service, model) as (runner, reply):
        os.kill(runner.pid, signum)
    assert signum.name in failure(reply.result(60), model, "engine_crashed")
    assert not is_alive(runner)


def check_crash_error(found: Any) -> None:
    """Check that the error says why the load is refused, for how long, and how to force it."""
    assert found["code"] == "engine_crashed"
    assert "crashed the engine recently" in found["message"]
    assert '"force": true' in found["message"]
    assert found["detail"].keys() == {"retry_after_s"}
    assert 0 < found["detail"]["retry_after_s"] <= CRASH_MEMORY_S


def check_refused(service: Service, model: str) -> None:
    """Check that a load is refused without a job and without using a runner."""
    service.warm_runner(1)
    jobs, runners = service.send("GET", STATUS).json()["jobs"], service.runners()
    check_crash_error(error(service.load(model), 500, "model_load_failed", "engine_crashed"))
    assert service.send("GET", STATUS).json()["jobs"] == jobs
    assert service.runners() == runners


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT])
def test_a_model_that_crashed_the_engine_needs_force_to_load(service: Service, signum: signal.Signals) -> None:
    model = f"acme/crash-{signum.value}"
    crash(service, model, signum)
    check_refused(service, model)
    assert service.loaded(HEALTHY)["instance_id"] == HEALTHY, "other models are not affected"
    assert service.unload(HEALTHY).status == 200
    check_refused(service, model)
    assert service.loaded(model, force=True)["instance_id"] == model
    assert service.loaded(model)["instance_id"] == f"{model}:2", "a load that succeeds clears the record of the crash"


def test_loads_queued_behind_a_crash_are_refused_unless_forced(service: Service) -> None:
    model = "acme/behind"
    with loading(service, model) as (runner, reply):
        behind, forced = service.accepted(model), service.accepted(model, force=True)
        os.kill(runner.pid, signal.SIGSEGV)
    failure(reply.result(60), model, "engine_crashed")
    check_crash_error(service.job(behind["job_id"], wait_s=10)["error"])
    assert service.job(forced["job_id"], wait_s=10)["status"] == "loaded"


def test_the_command_line_can_force_a_load(service: Service) -> None:
    model = "acme/force"
    crash(service, model, signal.SIGSEGV)

    def command(*words: str) -> tuple[int, str, str]:
        forced = Running(service.directory / "command", "load", model, *words, environ={"LOADSTONE_URL": service.url})
        try:
            return forced.popen.wait(60), forced.stdout, forced.stderr
        finally:
            forced.kill()

    status, out, err = command()
    assert (status, out) == (1, "")
    assert "force" in err
    status, out, err = command("--force")
    assert (status, out) == (0, f"{model}\n")
    assert service.loaded(model)["instance_id"] == f"{model}:2"


def test_a_killed_engine_does_not_count_as_a_crash(service: Service) -> None:
    model = "acme/killed"
    crash(service, model, signal.SIGKILL)
    assert service.loaded(model)["instance_id"] == model


def test_a_touched_file_is_tried_again(service: Service) -> None:
    """A repaired or newly downloaded file has another time."""
    model = "acme/touched"
    crash(service, model, signal.SIGSEGV)
    check_refused(service, model)
    os.utime(file_of(service, model))
    until(lambda: service.load(model).status == 200, "the load is tried again and succeeds")
