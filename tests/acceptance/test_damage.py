"""Files that lie, that change under the service, or that break the engine: their load says why, and nothing else
suffers."""

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
# One for each test that spoils its own; those of LONG take a while to make a context of.
SPOILT = (
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
# Where everything may be read by root, root does without that.
WITHOUT_PRIVILEGE = "setpriv --inh-caps=-dac_override,-dac_read_search --bounding-set=-dac_override,-dac_read_search"


@contextmanager
def an_ordinary_user(home: Path) -> Iterator[None]:
    """A file that nobody may read is not read, whoever runs these tests."""
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
    for model in (TINY, HEALTHY, *(f"acme/{name}" for name in SPOILT)):
        synthetic.tiny_llama(models / model / "m.gguf")
    for name in LONG:
        synthetic.tiny_llama(models / f"acme/{name}/m.gguf", metadata={"llama.context_length": LONG_TOKENS})
    damaged.not_finite(models / NAN / "m.gguf")
    damaged.write_all(models)
    synthetic.tiny_llama(models / "z/last/m.gguf")
    with an_ordinary_user(home), up(home) as service:
        until(lambda: service.models()["z/last"]["quantization"]["bits_per_weight"], "every header is read whole")
        yield service
        assert str(home) not in service.stderr
    (models / damaged.key_of("unreadable-folder")).chmod(0o700)  # or nobody could remove it


class Bystander(NamedTuple):
    """Who must not be touched by what happens to a file: the worker, and the runner of a healthy model."""

    worker: Process
    runner: Process


@pytest.fixture(scope="module")
def bystander(running: Service) -> Bystander:
    runner = running.warm_runner(0)
    assert running.loaded(TINY)["instance_id"] == TINY
    return Bystander(running.worker(), runner)


@pytest.fixture
def service(running: Service, bystander: Bystander) -> Iterator[Service]:
    """The module's service; whatever a test does to it, the bystander lives on as it was."""
    yield running
    assert is_alive(bystander.worker)
    assert is_alive(bystander.runner)
    assert running.state(TINY) == "loaded"
    for instance_id in running.instances().keys() - {TINY}:
        assert running.unload(instance_id).status == 200


def failure(reply: Reply, model: str, code: str) -> str:
    """Why a load failed, in words; it must be with this code."""
    message = error(reply, 500, "model_load_failed", code)["message"]
    start = f"Failed to load LLM '{model}': Error: "
    assert message.startswith(start)
    return str(message.removeprefix(start))


# ---- files that are not what they seem


@pytest.mark.parametrize("name", damaged.DAMAGES)
def test_a_file_that_lies_is_refused_with_what_is_wrong_with_it(service: Service, name: str) -> None:
    _, code, says = damaged.DAMAGES[name]
    reply = service.load(damaged.key_of(name))
    if code == damaged.NOT_FOUND:
        reason = error(reply, 404, "model_not_found", param="model")["message"]
    else:
        reason = failure(reply, damaged.key_of(name), code)
    assert re.search(says, reason), reason


def test_what_is_seen_to_be_no_model_is_not_listed(service: Service) -> None:
    listed = {key for key in service.models() if key.startswith("damaged/")}
    assert listed == {*map(damaged.key_of, damaged.SEEN_BY_THE_ENGINE)}


def test_a_file_is_loaded_as_soon_as_it_may_be_read(service: Service) -> None:
    """Nothing but its permissions change: neither its time nor its size."""
    key = damaged.key_of("unreadable")
    assert "Permission denied" in failure(service.load(key), key, "invalid_model_file")
    path = service.models_dir / key / "unreadable.gguf"
    path.chmod(0o600)
    until(lambda: service.load(key).status == 200, "it is loaded")
    path.chmod(0)


def test_after_all_of_them_a_healthy_model_is_loaded(service: Service, bystander: Bystander) -> None:
    assert service.loaded(HEALTHY)["instance_id"] == HEALTHY
    assert {*service.instances()} == {TINY, HEALTHY}
    assert service.worker() == bystander.worker


# ---- files that change while their model is loaded


def replace(path: Path) -> None:
    synthetic.tiny_llama(path, name="Another Llama")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def ended(service: Service, job_id: str) -> Instance | None:
    """The record of a load whose instance has ended."""
    with service.redis() as redis:
        doc: Any = redis.hget(f"inst:{job_id}", "doc")
    found = msgspec.msgpack.decode(doc, type=Instance)
    return found if found.completed_at is not None else None


@pytest.mark.parametrize(("name", "change"), [("replaced", replace), ("cut", cut)])
def test_a_file_that_changes_under_its_instance_ends_it(
    service: Service, name: str, change: Callable[[Path], None]
) -> None:
    """What is loaded is not what its key names any more, or not all there any more.  The load itself had succeeded."""
    model = f"acme/{name}"
    runner = service.warm_runner(1)
    job_id = service.accepted(model)["job_id"]
    job = service.job(job_id, wait_s=10)
    assert job["status"] == "loaded"
    change(file_of(service, model))
    found = until(lambda: ended(service, job_id), "the instance has ended")
    assert (found.state, found.error and found.error.code) == (State.FAILED, "invalid_model_file")
    assert found.error is not None
    assert "a file of the model changed while it was loaded" in found.error.message
    assert not is_alive(runner)
    assert {*service.instances()} == {TINY}
    assert service.job(job_id) == job, "what became of the load does not change"
    if name == "replaced":
        until(lambda: service.load(model).status == 200, "what its key names now is loaded")
    else:
        failure(service.load(model), model, "invalid_model_file")


# ---- files that change while their model is being loaded


@contextmanager
def loading(service: Service, model: str) -> Iterator[tuple[Process, Future[Reply]]]:
    """A load whose runner has not begun, and its reply to come: the runner goes on at the end of the block."""
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
def test_a_file_that_changes_before_the_engine_reads_it_is_refused(
    service: Service, name: str, change: Callable[[Path], object], says: str
) -> None:
    """Else it would be loaded as what it was, and called so: here a language model, which is now an encoder."""
    model = f"acme/{name}"
    with loading(service, model) as (runner, reply):
        change(file_of(service, model))
    assert says in failure(reply.result(10), model, "invalid_model_file")
    assert not is_alive(runner)


def has_read(job: Any) -> bool:
    return job["phase"] in ("context", "warmup") or job["status"] == "loaded"


def caught(service: Service, model: str) -> tuple[str, Process] | None:
    """A load whose runner has read all files, and stands still: the id of its job; None where it was quicker."""
    runner = service.warm_runner(1)
    job_id = service.accepted(model, context_length=LONG_TOKENS)["job_id"]
    until(lambda: has_read(service.job(job_id)), "its files are read")
    os.kill(runner.pid, signal.SIGSTOP)
    if service.job(job_id)["phase"] == "context":
        return job_id, runner
    os.kill(runner.pid, signal.SIGCONT)
    assert service.job(job_id, wait_s=10)["status"] == "loaded"
    assert service.unload(model).status == 200
    return None


@contextmanager
def making_a_context(service: Service, model: str) -> Iterator[str]:
    """The same during the block."""
    job_id, runner = until(lambda: caught(service, model), "a load is caught", 30)
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
def test_a_file_that_changes_behind_the_engine_fails_its_load(
    service: Service, name: str, change: Callable[[Path], None], says: str
) -> None:
    """What was cut off is missed when the first token is decoded: the engine dies of it, and is not to blame."""
    model = f"acme/{name}"
    with making_a_context(service, model) as job_id:
        change(file_of(service, model))
    job = service.job(job_id, wait_s=10)
    assert (job["status"], job["error"]["code"]) == ("failed", "invalid_model_file")
    assert says in job["error"]["message"]


# ---- weights that are no numbers


def test_weights_are_not_looked_at_unless_it_is_asked_for(service: Service) -> None:
    assert service.loaded(NAN)["instance_id"] == NAN


def test_weights_that_are_no_finite_numbers_are_refused_where_they_are_looked_at(tmp_path: Path) -> None:
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
    """A load in which the engine dies of a signal."""
    with loading(service, model) as (runner, reply):
        os.kill(runner.pid, signum)
    assert signum.name in failure(reply.result(10), model, "engine_crashed")
    assert not is_alive(runner)


def check_told(found: Any) -> None:
    """The error says why it is not tried, for how long, and how to have it tried all the same."""
    assert found["code"] == "engine_crashed"
    assert "crashed the engine lately" in found["message"]
    assert '"force": true' in found["message"]
    assert found["detail"].keys() == {"retry_after_s"}
    assert 0 < found["detail"]["retry_after_s"] <= CRASH_MEMORY_S


def check_refused(service: Service, model: str) -> None:
    """It is not even tried: no job is made, and no runner used."""
    service.warm_runner(1)
    jobs, runners = service.send("GET", STATUS).json()["jobs"], service.runners()
    check_told(error(service.load(model), 500, "model_load_failed", "engine_crashed"))
    assert service.send("GET", STATUS).json()["jobs"] == jobs
    assert service.runners() == runners


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGABRT])
def test_a_model_that_crashed_the_engine_is_not_tried_again_unless_forced(
    service: Service, signum: signal.Signals
) -> None:
    model = f"acme/crash-{signum.value}"
    crash(service, model, signum)
    check_refused(service, model)
    assert service.loaded(HEALTHY)["instance_id"] == HEALTHY, "another model has nothing to do with it"
    assert service.unload(HEALTHY).status == 200
    check_refused(service, model)
    assert service.loaded(model, force=True)["instance_id"] == model
    assert service.loaded(model)["instance_id"] == f"{model}:2", "it did not crash, so that is forgotten"


def test_what_waits_behind_a_load_that_crashes_is_refused_in_the_same_words_unless_forced(service: Service) -> None:
    model = "acme/behind"
    with loading(service, model) as (runner, reply):
        behind, forced = service.accepted(model), service.accepted(model, force=True)
        os.kill(runner.pid, signal.SIGSEGV)
    failure(reply.result(10), model, "engine_crashed")
    check_told(service.job(behind["job_id"], wait_s=10)["error"])
    assert service.job(forced["job_id"], wait_s=10)["status"] == "loaded"


def test_the_command_forces_it_too(service: Service) -> None:
    model = "acme/force"
    crash(service, model, signal.SIGSEGV)

    def command(*words: str) -> tuple[int, str, str]:
        begun = Running(service.directory / "command", "load", model, *words, environ={"LOADSTONE_URL": service.url})
        try:
            return begun.popen.wait(15), begun.stdout, begun.stderr
        finally:
            begun.kill()

    status, out, err = command()
    assert (status, out) == (1, "")
    assert "force" in err
    status, out, err = command("--force")
    assert (status, out) == (0, f"{model}\n")
    assert service.loaded(model)["instance_id"] == f"{model}:2"


def test_an_engine_that_somebody_killed_says_nothing_of_its_model(service: Service) -> None:
    model = "acme/killed"
    crash(service, model, signal.SIGKILL)
    assert service.loaded(model)["instance_id"] == model


def test_a_file_with_another_time_is_another_file(service: Service) -> None:
    """As one that was mended, or downloaded again."""
    model = "acme/touched"
    crash(service, model, signal.SIGSEGV)
    check_refused(service, model)
    os.utime(file_of(service, model))
    until(lambda: service.load(model).status == 200, "it is tried again")
