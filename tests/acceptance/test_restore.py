"""Restoration: a worker that comes back loads again what it had loaded, and nothing else."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest

import shared
from shared.synthetic import models as synthetic
from tests.acceptance.test_fencing import ALONE, LEASE_S, OTHER, Pool, jobs, kill, pool, the_pool
from tests.support.service import (
    PATIENCE_S,
    TINY,
    Running,
    Service,
    error,
    is_alive,
    meanwhile,
    tiny_quantized,
    until,
    up,
    wait_gone,
)

__all__ = ["pool", "the_pool"]  # fixtures

ABSENCE_S = 60  # a lease that does not run out while a test replaces a worker
SECOND, THIRD = f"{ALONE}:2", f"{ALONE}:3"


def restored(service: Service | Pool, before: dict[str, Any], *instance_ids: str) -> list[Any]:
    """Return the loads that restored these instances, in the order in which they began.

    Checks that each instance was restored by one new load, that there are no other new loads, and that the jobs in
    `before` have not changed.
    """

    def all_loaded() -> list[Any] | None:
        new = [job for id_, job in jobs(service).items() if id_ not in before]
        return new if {job["instance_id"] for job in new if job["status"] == "loaded"} >= {*instance_ids} else None

    new = until(all_loaded, f"{instance_ids} are loaded again")
    assert sorted(job["instance_id"] for job in new) == sorted(instance_ids)
    assert set(service.instances()) == {*instance_ids}
    now = jobs(service)
    for id_, job in before.items():
        assert (now[id_]["status"], now[id_]["completed_at"]) == (job["status"], job["completed_at"])
    return sorted(
        new, key=lambda job: datetime.fromisoformat(job["started_at"])
    )  # not as text: "39Z" is before "39.2Z"


# ---- a worker that is killed, or told to stop


def killed(pool: Pool, name: str) -> None:
    """Kill a worker process, so that its supervisor starts another one."""
    worker = pool.workers[name].worker()
    os.kill(worker.pid, signal.SIGKILL)
    until(lambda: not is_alive(worker), "gone")


def test_killed_worker_restores_the_last_loaded_first(pool: Pool) -> None:
    for _ in range(3):
        pool.loaded(ALONE, context_length=512)
    assert pool.unload(ALONE).status == 200
    pool.loaded(ALONE, context_length=1024)
    before = jobs(pool)
    killed(pool, "a")
    found = restored(pool, before, ALONE, SECOND, THIRD)
    assert [job["instance_id"] for job in found] == [ALONE, THIRD, SECOND]
    assert {(job["worker"], job["attempt"]) for job in found} == {("a", 1)}
    began = [datetime.fromisoformat(job["created_at"]) for job in found]
    assert began == sorted(began)
    lengths = {id_: one["config"]["context_length"] for id_, one in pool.instances().items()}
    assert lengths == {ALONE: 1024, SECOND: 512, THIRD: 512}, "each with its own configuration"
    pool.workers["a"].warm_runner(3)
    pool.workers["b"].warm_runner(0)
    assert pool.unload(ALONE).status == 200


def test_instance_unloaded_before_or_meanwhile_is_not_restored(pool: Pool) -> None:
    for _ in range(3):
        pool.loaded(ALONE)
    assert pool.unload(SECOND).status == 200
    before = jobs(pool)
    pool.workers["a"].stop()
    assert pool.unload(THIRD).status == 200, "it would have been restored"
    error(pool.unload(THIRD), 404, "model_not_found", param="instance_id")
    pool.start("a")
    restored(pool, before, ALONE)  # the others were used later, and would have been restored before it


def test_instance_of_a_dead_worker_can_be_unloaded(pool: Pool) -> None:
    """It is unloaded before the lease has run out, while no other process knows of the death."""
    for _ in range(2):
        pool.loaded(ALONE)
    before = jobs(pool)
    left = kill(pool.workers["a"])
    with meanwhile(pool.unload, SECOND) as reply:
        assert reply.result(PATIENCE_S).status == 200
    wait_gone(left)
    pool.start("a")
    restored(pool, before, ALONE)


def test_model_that_is_back_is_restored_by_a_later_try(pool: Pool) -> None:
    """Meanwhile it does not hold up the other instance: the tries are 30 s apart in all."""
    for key in (TINY, ALONE, ALONE):
        pool.loaded(key)
    before = jobs(pool)
    file, aside = pool.file("a", ALONE), pool.home / "aside"
    file.rename(aside)
    killed(pool, "a")

    def failures() -> list[Any]:
        new = [job for id_, job in jobs(pool).items() if id_ not in before]
        return [(job["instance_id"], job["error"]["code"]) for job in new if job["status"] == "failed"]

    until(lambda: set(pool.instances()) == {TINY} and len(failures()) >= 2, "one is restored, two are not")
    assert failures()[:2] == [(SECOND, "invalid_model_file"), (ALONE, "invalid_model_file")]
    assert pool.unload(SECOND).status == 200, "it is waiting for its next try, which is cancelled"
    assert set(pool.instances()) == {TINY}
    # The try is not held: the worker kills a frozen runner that waits longer than half a lease, and with it the try.
    aside.rename(file)
    until(lambda: set(pool.instances()) == {TINY, ALONE}, "restored")
    assert shown(pool) == {TINY: "loaded", ALONE: "loaded"}
    last = next(reversed(jobs(pool).values()))
    assert (last["instance_id"], last["status"], last["attempt"]) == (ALONE, "loaded", 1)


def in_state(pool: Pool, state: str) -> set[str]:
    """Return the instances of worker "a" that are in a state.  A failed one is in none until its next try."""
    return {id_ for id_, one in pool.held().get("a", {}).items() if one["state"] == state}


def shown(pool: Pool) -> dict[str, str]:
    """Return what `loadstone ps` shows for each instance.  The first phase is shown only after a while."""
    command = Running(pool.home / "ps", "ps", environ={"LOADSTONE_URL": pool.url})
    try:
        assert command.popen.wait(PATIENCE_S) == 0, command.stderr
    finally:
        command.kill()
    rows = [re.split(r" {2,}", line.strip()) for line in command.stdout.splitlines()[1:]]
    return {row[0]: "starting|metadata" if row[2] in ("starting", "metadata") else row[2] for row in rows}


def test_restore_off_restores_nothing_and_leaves_no_file(pool: Pool) -> None:
    """Not even what was loaded while it was on."""
    pool.loaded(ALONE)
    file = pool.data("a") / "wanted-a.json"
    until(file.exists, "it is to be restored")
    pool.workers["a"].stop()
    before = jobs(pool)
    pool.start("a", LOADSTONE_RESTORE="off")
    beat(pool, "a")
    assert (pool.held()["a"], pool.instances(), jobs(pool)) == ({}, {}, before)
    pool.loaded(ALONE)
    pool.workers["a"].stop()
    assert not file.exists()
    error(pool.unload(ALONE), 404, "model_not_found", param="instance_id")  # nor is it in Redis


def beat(service: Service | Pool, name: str) -> None:
    """Return after a whole beat of a worker: it has compared what it holds with what it should hold."""
    ages: list[float] = []

    def has_renewed_its_lease_twice() -> bool:
        workers = service.send("GET", "/api/v1/workers").json()["workers"]
        ages.extend(worker["lease_age_seconds"] for worker in workers if worker["name"] == name)
        return sum(after < before for before, after in pairwise(ages)) >= 2

    until(has_renewed_its_lease_twice, "a beat")


# ---- the list of workers


def test_workers_are_listed_with_their_instances(pool: Pool) -> None:
    pool.loaded(ALONE)
    with pool.workers["a"].frozen(loaded=1):
        loading = pool.loading(ALONE)["job_id"]
        queued = pool.accepted(ALONE)["job_id"]
        reply = pool.send("GET", "/api/v1/workers")
        assert (reply.status, set(reply.json())) == (200, {"workers"})
        a, b = sorted(reply.json()["workers"], key=lambda worker: str(worker["name"]))
        assert [(one["id"], one["state"], one["model"], len(one["devices"])) for one in a["instances"]] == [
            (ALONE, "loaded", ALONE, 1),
            (SECOND, "loading", ALONE, 1),
            (THIRD, "queued", ALONE, 0),
        ]
        for worker in (a, b):
            assert (worker["state"], worker["version"]) == ("ready", shared.__version__)
            assert 0 <= worker["lease_age_seconds"] < LEASE_S
            (device,) = worker["devices"]
            assert (device["id"], device["kind"]) == ("CPU", "cpu")
            assert 0 < device["free_bytes"] <= device["total_bytes"]
        assert b["instances"] == []
        assert set(pool.instances()) == {ALONE}
    for job_id in (loading, queued):
        assert pool.ended(job_id, 60)["status"] == "loaded"
    assert {one["state"] for one in pool.held()["a"].values()} == {"loaded"}
    pool.workers["b"].stop()
    assert set(pool.held()) == {"a"}, "a worker that is gone is not listed"


# ---- a worker that is stopped while it loads


def test_stopped_worker_hands_its_load_over(pool: Pool) -> None:
    with ExitStack() as frozen_a, ExitStack() as frozen_b:
        frozen = {"a": frozen_a, "b": frozen_b}
        for name, stack in frozen.items():
            stack.enter_context(pool.workers[name].frozen())
        with meanwhile(pool.load, TINY) as reply:
            until(lambda: pool.state(TINY) == "loading", "loading")
            ((job_id, job),) = ((id_, job) for id_, job in jobs(pool).items() if job["status"] == "loading")
            stopped, (other,) = pool.workers[job["worker"]], frozen.keys() - {job["worker"]}
            frozen[other].close()
            stopped.popen.send_signal(signal.SIGTERM)
            assert reply.result(PATIENCE_S).json()["instance_id"] == TINY
    done = pool.job(job_id)
    assert (done["status"], done["worker"], done["attempt"], done["instance_id"]) == ("loaded", other, 2, TINY)
    assert stopped.popen.wait(PATIENCE_S) == 0
    assert "Traceback" not in stopped.stderr
    pool.workers[other].warm_runner(1)


def test_successor_takes_a_handed_back_load_and_restores(pool: Pool) -> None:
    a = pool.workers["a"]
    pool.restart_api(LOADSTONE_LEASE_S=str(ABSENCE_S))  # for so long it waits for the successor
    pool.loaded(ALONE)
    before = jobs(pool)
    with a.frozen(loaded=1):
        job_id = pool.loading(ALONE)["job_id"]
        a.stop()
    waiting = pool.job(job_id)
    assert (waiting["status"], waiting["attempt"], waiting["started_at"]) == ("queued", 2, None)
    assert pool.instances() == {}
    pool.start("a")
    done = pool.ended(job_id, PATIENCE_S)
    assert (done["status"], done["worker"], done["attempt"], done["instance_id"]) == ("loaded", "a", 2, SECOND), done[
        "error"
    ]
    until(lambda: set(pool.instances()) == {ALONE, SECOND}, "the other one is restored")
    new = [job["instance_id"] for id_, job in jobs(pool).items() if id_ not in before]
    assert sorted(new) == [ALONE, SECOND]
    pool.restart_api()


def test_handed_back_load_fails_without_another_worker(pool: Pool) -> None:
    a = pool.workers["a"]
    with a.frozen(), meanwhile(pool.load, ALONE) as reply:
        until(lambda: pool.state(ALONE) == "loading", "loading")
        a.popen.send_signal(signal.SIGTERM)
        answer = reply.result(PATIENCE_S)
    assert a.popen.wait(PATIENCE_S) == 0
    found = error(answer, 503, "service_unavailable", "no_worker")
    assert ALONE in found["message"]
    assert int(answer.headers["retry-after"]) > 0
    last = next(reversed(jobs(pool).values()))
    assert (last["status"], last["attempt"], last["error"]) == ("failed", 2, found)


# ---- `loadstone up`


class Home:
    """`loadstone up` on one directory, started again and again."""

    def __init__(self, directory: Path) -> None:
        for model in (TINY, OTHER):
            synthetic.tiny_llama(directory / f"models/{model}/model-f16.gguf")
        self.directory, self.undo = directory, ExitStack()

    def start(self) -> Service:
        """Stop the last one if it still runs, and start the next one."""
        self.undo.close()
        self.service = self.undo.enter_context(up(self.directory, LOADSTONE_LEASE_S=str(ABSENCE_S)))
        return self.service


@pytest.fixture(scope="module")
def the_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("up"))
    with home.undo:
        home.start()
        yield home


@pytest.fixture
def home(the_home: Home) -> Iterator[Home]:
    """The module's home, with a service that runs and has nothing loaded, before and after."""
    yield the_home
    if the_home.service.popen.poll() is not None:
        the_home.start()
    the_home.service.unload_all()


def stopped(service: Service) -> None:
    until(lambda: len(service.wanted()) == len(service.instances()), "the worker's file has all of them")
    service.stop()


def killed_with_all(service: Service) -> None:
    until(lambda: len(service.wanted()) == len(service.instances()), "the worker's file has all of them")
    tree = service.tree()
    service.popen.kill()
    service.popen.wait()
    wait_gone(tree)


def without_redis(service: Service) -> None:
    stopped(service)
    shutil.rmtree(service.data_dir / "redis")


def without_file(service: Service) -> None:
    stopped(service)
    (file,) = service.data_dir.glob("wanted-*.json")
    file.unlink()


@pytest.mark.parametrize("end", [stopped, killed_with_all, without_redis, without_file])
def test_loaded_instances_are_there_after_a_restart(home: Home, end: Callable[[Service], None]) -> None:
    """The worker's file is enough, and so is Redis."""
    service = home.service
    for key in (TINY, OTHER, TINY):
        service.loaded(key)
    before = jobs(service)
    end(service)
    service = home.start()
    found = restored(service, {} if end is without_redis else before, TINY, OTHER, f"{TINY}:2")
    assert [job["instance_id"] for job in found] == [f"{TINY}:2", OTHER, TINY]
    until(lambda: len(service.wanted()) == 3, "the worker's file has them again")
    assert service.unload(OTHER).status == 200
    until(lambda: sorted(service.wanted()) == [TINY, f"{TINY}:2"], "an unloaded instance is not in the file")


def listed(service: Service) -> dict[str, list[str]]:
    """Return the keys of the models and the ids of their instances."""
    return {key: [one["id"] for one in model["loaded_instances"]] for key, model in service.models().items()}


def variants(service: Service) -> dict[str, str]:
    """Return the keys of all variants, and those of the loaded instances by their ids."""
    names = {name: "" for model in service.models().values() for name in model.get("variants", [])}
    return names | {id_: instance["variant"] for id_, instance in service.instances().items()}


def test_instance_belongs_to_its_file_whatever_lies_beside_it(home: Home) -> None:
    """Its key depends on the other files of the folder, and changes with them."""
    service, folder = home.service, home.directory / "models" / TINY
    service.loaded(TINY, context_length=512)
    entry = service.models()[TINY]
    f16, beside = f"{TINY}@f16", tiny_quantized(folder / "model-q4_0.gguf", "Q4_0")
    both = {f16: "", f"{TINY}@q4_0": "", **dict.fromkeys(service.models()[OTHER].get("variants", []), "")}
    try:
        until(lambda: variants(service) == {**both, TINY: f16}, "listed as a variant")
        assert (listed(service), service.models()[TINY]["selected_variant"]) == (
            {TINY: [TINY], OTHER: []},
            f"{TINY}@q4_0",
        )
        assert service.unload(TINY).status == 200
        service.loaded(f16, context_length=512)
        beside.unlink()
        until(lambda: service.models()[TINY]["variants"] == [f16], "the other file is gone")
        assert listed(service) == {TINY: [f16], OTHER: []}
        assert service.models()[TINY]["size_bytes"] == entry["size_bytes"]
        stopped(service)
        tiny_quantized(beside, "Q4_0")
        service = home.start()
        until(lambda: set(service.instances()) == {f16}, "restored from the same file")
        assert (listed(service), variants(service)) == ({TINY: [f16], OTHER: []}, {**both, f16: f16})
        assert service.instances()[f16]["config"]["context_length"] == 512
    finally:
        beside.unlink(missing_ok=True)
    until(lambda: service.models()[TINY]["variants"] == [f16], "the other file is gone")


def test_instance_is_listed_until_it_is_unloaded(home: Home) -> None:
    """Whether its file is moved or deleted: it holds memory, and nobody could find it otherwise."""
    service, models = home.service, home.directory / "models"
    file, aside, moved = models / TINY / "model-f16.gguf", home.directory / "aside", models / "acme/moved/m.gguf"
    service.loaded(TINY)
    entry = service.models()[TINY]
    moved.parent.mkdir()
    file.rename(moved)
    try:
        until(lambda: listed(service) == {"acme/moved": [TINY], OTHER: []}, "its file is moved")
        moved.rename(aside)
        until(lambda: listed(service).get(TINY) == [TINY], "its file is gone")
        del entry["variants"], entry["selected_variant"], entry["loaded_instances"][0]["variant"]
        assert {**entry, "description": None} == {**service.models()[TINY], "description": None}
        error(service.load(TINY), 404, "model_not_found", param="model")
        synthetic.tiny_moe(models / TINY / "model-q4_0.gguf")
        until(lambda: listed(service).get(TINY) == [], "the key belongs to another file")
        assert listed(service)[f"{TINY}@f16"] == [TINY]
        assert service.unload(TINY).status == 200
        assert listed(service) == {TINY: [], OTHER: []}
    finally:
        (models / TINY / "model-q4_0.gguf").unlink(missing_ok=True)
        (aside if aside.exists() else moved).rename(file)
        moved.parent.rmdir()
    until(lambda: listed(service) == {TINY: [], OTHER: []}, "its file is back")
    until(lambda: service.models()[TINY]["architecture"] == "llama", "and the other one is gone")


def test_a_share_that_is_mounted_late_restores_instances(home: Home) -> None:
    service, models, aside = home.service, home.directory / "models", home.directory / "unmounted"
    for key in (TINY, OTHER):
        service.loaded(key)
    stopped(service)
    models.rename(aside)
    models.mkdir()
    try:
        service = home.start()
        failed = until(lambda: [job for job in jobs(service).values() if job["status"] == "failed"], "one try")
        assert {job["error"]["code"] for job in failed} == {"invalid_model_file"}
    finally:
        models.rmdir()
        aside.rename(models)
    until(lambda: set(service.instances()) == {TINY, OTHER}, "both are restored")


def test_damaged_file_is_ignored_with_a_log_line(home: Home) -> None:
    service = home.service
    service.loaded(TINY)
    without_redis(service)
    (file,) = service.data_dir.glob("wanted-*.json")
    os.truncate(file, file.stat().st_size // 2)
    service = home.start()
    (said,) = (line for line in service.stderr.splitlines() if "action=wanted_unreadable" in line)
    assert "desired instances not read" in said
    beat(service, socket.gethostname())
    assert (service.instances(), jobs(service)) == ({}, {})
    assert service.loaded(TINY)["instance_id"] == TINY
    until(lambda: is_whole(service), "a whole file")


def is_whole(service: Service) -> bool:
    with suppress(msgspec.MsgspecError):
        return service.wanted() == [TINY]
    return False
