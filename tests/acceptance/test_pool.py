"""A pool of GPUs from outside: where loads go, what they take, who leaves for them, and what is refused."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from shared.synthetic.models import tiny_llama
from tests.support.fakehosts import FakeHost
from tests.support.service import LOADSTONE, Client, Running, Service, error, until, up

MIB = 1 << 20
SMALL, LONG = "p/small", "p/long"
SIZES = (16 * MIB, 12 * MIB, 8 * MIB)
BIG, MIDDLE, LITTLE = (f"GPU-fake-{i}" for i in range(3))
TOKENS = {"context_length": 512}  # of a load that takes some 2.5 MiB


class Pool(NamedTuple):
    service: Service
    host: FakeHost

    def used(self) -> dict[str, int]:
        return {device.uuid: self.host.used_bytes(device.uuid) for device in self.host.devices()}

    def where(self, instance_id: str) -> list[str]:
        devices: list[str] = self.service.instances()[instance_id]["devices"]
        return devices

    def device(self, id_: str) -> Any:
        workers = self.service.send("GET", "/api/v1/workers").json()["workers"]
        return next(device for worker in workers for device in worker["devices"] if device["id"] == id_)

    def load(self, key: str = SMALL, **fields: Any) -> Any:
        return self.service.loaded(key, **TOKENS | fields)

    def job(self, instance_id: str) -> Any:
        jobs = self.service.send("GET", "/api/v1/models/load/status").json()["jobs"]
        return next(job for job in jobs if job["instance_id"] == instance_id)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("m")
    tiny_llama(root / SMALL / "m.gguf")
    tiny_llama(root / LONG / "m.gguf", metadata={"llama.context_length": 65536})
    return root


@pytest.fixture(scope="module")
def shared_pool(models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    directory = tmp_path_factory.mktemp("p")
    host = FakeHost.made(directory / "host", *SIZES)
    with up(directory / "s", models=models, LOADSTONE_DEVICE_RESERVE="1MiB", **host.environ()) as service:
        yield Pool(service, host)


@pytest.fixture
def pool(shared_pool: Pool) -> Iterator[Pool]:
    yield shared_pool
    for device in shared_pool.host.devices():
        shared_pool.host.release(device.uuid)
    shared_pool.service.unload_all()
    assert not any(shared_pool.used().values()), "every byte is back when an unload is answered"


@contextmanager
def api(directory: Path, redis_url: str) -> Iterator[Client]:
    running = Running(directory, "api", "--port", "0", "--redis-url", redis_url, "--drain-s", "0")
    try:
        client = Client(running.first_line().removeprefix("listening: "))
        until(lambda: client.send("GET", "/readyz").status == 200, "ready")
        yield client
        client.close()
        running.stop()
    finally:
        running.kill()


# ---- where a load goes


def test_a_load_goes_to_the_gpu_that_it_fills_best_and_to_no_other(pool: Pool) -> None:
    pool.load()
    used = pool.used()
    assert used[LITTLE] > 2 * MIB
    assert (used[BIG], used[MIDDLE]) == (0, 0)
    assert pool.where(SMALL) == [LITTLE] == pool.job(SMALL)["devices"]
    until(lambda: pool.device(LITTLE)["reserved_bytes"] == used[LITTLE], "what is shown is what it takes, to the byte")


def test_a_further_instance_goes_to_another_device(pool: Pool) -> None:
    for _ in range(3):
        pool.load()
    assert {*map(str, (pool.where(id_)[0] for id_ in (SMALL, f"{SMALL}:2", f"{SMALL}:3")))} == {BIG, MIDDLE, LITTLE}


def test_what_no_gpu_has_room_for_is_split_over_the_fewest_that_have(pool: Pool) -> None:
    asked = {"context_length": 18_000, "eval_batch_size": 32}
    estimate = pool.service.post("/api/v1/models/estimate", {"model": LONG, **asked}).json()
    assert (estimate["fits"], estimate["exact"]) == (True, True), "the engine was asked"
    on_gpus = {device["id"]: device for device in estimate["devices"] if device["id"] != "CPU"}
    pool.load(LONG, **asked)
    used = pool.used()
    assert sorted(pool.where(LONG)) == sorted(on_gpus) == [BIG, MIDDLE]
    for id_, device in on_gpus.items():
        assert used[id_] == pytest.approx(device["total_bytes"], abs=MIB // 8)


def test_a_client_says_where_a_model_goes(pool: Pool) -> None:
    pool.load(gpu={"devices": [BIG]})
    assert pool.where(SMALL) == [BIG]
    pool.load(gpu={"devices": [MIDDLE, LITTLE], "split": "even"})
    assert pool.where(f"{SMALL}:2") == [MIDDLE, LITTLE]
    pool.service.unload_all()
    assert pool.load(gpu={"offload": "off"}, echo_load_config=True)["load_config"]["context_length"] == 512
    assert pool.where(SMALL) == ["CPU"]
    assert not any(pool.used().values())


def test_a_part_of_the_layers_goes_to_a_gpu(pool: Pool) -> None:
    pool.load(gpu={"devices": [BIG]})
    whole = pool.used()[BIG]
    pool.service.unload_all()
    pool.load(gpu={"offload": 0.5, "devices": [BIG]})
    assert 0 < pool.used()[BIG] < whole


@pytest.mark.parametrize(
    ("gpu", "param"),
    [
        ({"worker": "nobody"}, "gpu.worker"),
        ({"devices": ["GPU-0"]}, "gpu.devices"),
        ({"devices": [BIG, MIDDLE], "split": [1]}, "gpu.split"),
        ({"devices": [BIG, MIDDLE], "split": [0, 0]}, "gpu.split"),
        ({"offload": 1.5}, "gpu.offload"),
    ],
)
def test_a_place_that_there_is_not_is_told_at_once(pool: Pool, gpu: Any, param: str) -> None:
    reply = pool.service.load(SMALL, gpu=gpu)
    error(reply, 400, "invalid_request", "invalid_value", param)


# ---- what is refused


def test_what_has_no_room_is_refused_with_what_would_fit(pool: Pool) -> None:
    pool.load()
    asked = {"context_length": 60000}
    with pool.service.frozen(loaded=1):  # no runner takes part
        reply = pool.service.load(LONG, **asked)
    found = error(reply, 500, "model_load_failed", "insufficient_memory")
    detail = found["detail"]
    assert {device["id"] for device in detail["devices"]} == {BIG, MIDDLE, LITTLE}
    assert [device["instances"] for device in detail["devices"] if device["id"] == LITTLE] == [[SMALL]]
    assert detail["needed_bytes"] > sum(SIZES)
    assert pool.load(LONG, context_length=detail["largest_context_length"])
    assert pool.service.load(LONG, context_length=60000).status == 500


def test_other_programs_are_believed(pool: Pool) -> None:
    for device in pool.host.devices():
        pool.host.take(device.uuid, device.total_bytes - 2 * MIB)
    reply = pool.service.load(SMALL, **TOKENS)
    detail = error(reply, 500, "model_load_failed", "insufficient_memory")["detail"]
    by_others = {device["id"]: device["used_by_others_bytes"] for device in detail["devices"]}
    assert by_others == {device.uuid: device.total_bytes - 2 * MIB for device in pool.host.devices()}
    pool.host.release(MIDDLE)
    pool.load()
    assert pool.where(SMALL) == [MIDDLE]


def test_a_gpu_that_the_driver_lost_gets_nothing(pool: Pool) -> None:
    pool.host.fail(LITTLE, "GpuIsLost")
    try:
        pool.load()
        assert pool.where(SMALL) == [MIDDLE]
        assert until(lambda: pool.device(LITTLE)["free_bytes"] == 0, "a beat")
    finally:
        pool.host.fail(LITTLE, None)
    pool.load()
    assert pool.where(f"{SMALL}:2") == [LITTLE]


def test_loads_at_once_through_two_apis_never_take_more_than_there_is(pool: Pool, tmp_path: Path) -> None:
    """Whatever does not fit is refused before it is read: the engine itself never lacks memory."""
    redis_url = f"unix://{pool.service.data_dir}/redis/redis.sock"
    with api(tmp_path, redis_url) as other, ThreadPoolExecutor(24) as threads:
        asked = [threads.submit(one.load, SMALL, **TOKENS) for one in (pool.service, other) * 12]
        replies = [one.result() for one in asked]
        loaded = [reply for reply in replies if reply.status == 200]
        for reply in replies:
            if reply.status != 200:
                found = error(reply, 500, "model_load_failed", "insufficient_memory")
                assert "there is not enough memory" in found["message"], "our word, not the engine's"
        used = pool.used()
    assert len(loaded) >= 11, "5 have room in 15 MiB, 4 in 11, 2 in 7; and perhaps one over what several have left"
    assert all(used[device.uuid] <= device.total_bytes - MIB for device in pool.host.devices())


# ---- who leaves


def test_the_longest_idle_instance_with_a_ttl_leaves_and_no_more_than_needed(pool: Pool) -> None:
    pool.host.take(BIG, SIZES[0])
    pool.host.take(MIDDLE, SIZES[1])
    pool.load()  # without a TTL
    pool.load(ttl_seconds=1000)
    assert [pool.where(id_) for id_ in (SMALL, f"{SMALL}:2")] == [[LITTLE], [LITTLE]]

    def estimated() -> Any:
        return pool.service.post("/api/v1/models/estimate", {"model": SMALL, **TOKENS}).json()

    until(lambda: (estimated()["fits"], estimated()["evicts"]) == (True, [f"{SMALL}:2"]), "it would be evicted")
    before = pool.service.metric("evictions_total")
    reply = pool.service.load(SMALL, ttl_seconds=1000, **TOKENS)
    assert reply.status == 200, reply.text
    assert reply.headers["loadstone-evicted"] == f"{SMALL}:2"
    found = reply.json()["instance_id"]
    assert pool.job(found)["evicted"] == [f"{SMALL}:2"]
    assert set(pool.service.instances()) == {SMALL, found}
    until(lambda: pool.service.metric("evictions_total") == before + 1, "the worker hands over its counts")


def test_what_was_loaded_to_stay_stays(pool: Pool) -> None:
    pool.host.take(BIG, SIZES[0])
    pool.host.take(MIDDLE, SIZES[1])
    pool.load()
    pool.load()
    error(pool.service.load(SMALL, **TOKENS), 500, "model_load_failed", "insufficient_memory")
    assert set(pool.service.instances()) == {SMALL, f"{SMALL}:2"}


# ---- the command line


def loadstone(pool: Pool, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(LOADSTONE), *words, "--url", pool.service.url],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_copies_are_loaded_onto_different_devices_each_as_its_own_job(pool: Pool) -> None:
    done = loadstone(pool, "load", SMALL, "--context-length", "512", "--copies", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [SMALL, f"{SMALL}:2", f"{SMALL}:3"]
    assert len({pool.job(id_)["job_id"] for id_ in done.stdout.split()}) == 3
    assert {pool.where(id_)[0] for id_ in done.stdout.split()} == {BIG, MIDDLE, LITTLE}
    shown = loadstone(pool, "workers")
    assert [line.split()[2] for line in shown.stdout.splitlines()[1:]] == [BIG, MIDDLE, LITTLE, "CPU"]


def test_copies_that_there_is_no_room_for_fail_and_the_others_stay(pool: Pool) -> None:
    words = ("--context-length", "512", "--gpu-device", LITTLE, "--copies", "4", "--json")
    done = loadstone(pool, "load", SMALL, *words)
    found = json.loads(done.stdout)
    assert done.returncode == 1
    assert [one["instance_id"] for one in found["loaded"]] == [SMALL, f"{SMALL}:2"]
    assert [one["code"] for one in found["errors"]] == ["insufficient_memory"] * 2
    assert set(pool.service.instances()) == {SMALL, f"{SMALL}:2"}


def test_the_command_says_where_a_model_goes(pool: Pool) -> None:
    name = pool.service.send("GET", "/api/v1/workers").json()["workers"][0]["name"]
    words = ("--gpu-worker", name, "--gpu-device", LITTLE, "--gpu-device", BIG, "--gpu-split", "1,2")
    done = loadstone(pool, "load", SMALL, "--context-length", "512", *words)
    assert done.returncode == 0, done.stderr
    assert pool.where(SMALL) == [LITTLE, BIG]
    assert loadstone(pool, "load", SMALL, "--context-length", "512", "--gpu-offload", "off").returncode == 0
    assert pool.where(f"{SMALL}:2") == ["CPU"]
    for wrong in (["--gpu-offload", "2"], ["--gpu-split", "1,x"], ["--gpu-offload", "nan"]):
        assert loadstone(pool, "load", SMALL, *wrong).returncode == 2
