"""A pool of GPUs, seen by a client: placement, memory, eviction and refusals."""

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
TOKENS = {"context_length": 512}  # of a load of about 2.5 MiB


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
    assert not any(shared_pool.used().values()), "every byte is free when an unload is answered"


@contextmanager
def api(directory: Path, redis_url: str) -> Iterator[Client]:
    running = Running(directory, "api", "--port", "0", "--redis-url", redis_url, "--drain-s", "0")
    try:
        client = Client(running.first_line().removeprefix("listening: "))
        until(lambda: client.send("GET", "/readyz").status == 200, "the API is ready")
        yield client
        client.close()
        running.stop()
    finally:
        running.kill()


# ---- placement


def test_a_load_goes_to_the_best_fitting_gpu_only(pool: Pool) -> None:
    pool.load()
    used = pool.used()
    assert used[LITTLE] > 2 * MIB
    assert (used[BIG], used[MIDDLE]) == (0, 0)
    assert pool.where(SMALL) == [LITTLE] == pool.job(SMALL)["devices"]
    until(lambda: pool.device(LITTLE)["reserved_bytes"] == used[LITTLE], "the published usage is exact")


def test_a_further_instance_goes_to_another_device(pool: Pool) -> None:
    for _ in range(3):
        pool.load()
    assert {*map(str, (pool.where(id_)[0] for id_ in (SMALL, f"{SMALL}:2", f"{SMALL}:3")))} == {BIG, MIDDLE, LITTLE}


def test_a_model_too_large_for_one_gpu_uses_as_few_as_possible(pool: Pool) -> None:
    fields = {"context_length": 18_000, "eval_batch_size": 32}
    estimate = pool.service.post("/api/v1/models/estimate", {"model": LONG, **fields}).json()
    assert (estimate["fits"], estimate["exact"]) == (True, True), "the engine did a dry run"
    on_gpus = {device["id"]: device for device in estimate["devices"] if device["id"] != "CPU"}
    pool.load(LONG, **fields)
    used = pool.used()
    assert sorted(pool.where(LONG)) == sorted(on_gpus) == [BIG, MIDDLE]
    for id_, device in on_gpus.items():
        assert used[id_] == pytest.approx(device["total_bytes"], abs=MIB // 8)


def test_a_client_can_choose_the_devices(pool: Pool) -> None:
    pool.load(gpu={"devices": [BIG]})
    assert pool.where(SMALL) == [BIG]
    pool.load(gpu={"devices": [MIDDLE, LITTLE], "split": "even"})
    assert pool.where(f"{SMALL}:2") == [MIDDLE, LITTLE]
    pool.service.unload_all()
    assert pool.load(gpu={"offload": "off"}, echo_load_config=True)["load_config"]["context_length"] == 512
    assert pool.where(SMALL) == ["CPU"]
    assert not any(pool.used().values())


def test_a_client_can_offload_a_part_of_the_layers(pool: Pool) -> None:
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
def test_an_unknown_or_invalid_placement_is_refused(pool: Pool, gpu: Any, param: str) -> None:
    reply = pool.service.load(SMALL, gpu=gpu)
    error(reply, 400, "invalid_request", "invalid_value", param)


# ---- refusals


def test_a_load_without_room_is_refused_with_what_would_fit(pool: Pool) -> None:
    pool.load()
    fields = {"context_length": 60000}
    with pool.service.frozen(loaded=1):  # the runner is frozen: the worker refuses alone
        reply = pool.service.load(LONG, **fields)
    failure = error(reply, 500, "model_load_failed", "insufficient_memory")
    detail = failure["detail"]
    assert {device["id"] for device in detail["devices"]} == {BIG, MIDDLE, LITTLE}
    assert [device["instances"] for device in detail["devices"] if device["id"] == LITTLE] == [[SMALL]]
    assert detail["needed_bytes"] > sum(SIZES)
    assert pool.load(LONG, context_length=detail["largest_context_length"])
    assert pool.service.load(LONG, context_length=60000).status == 500


def test_memory_of_other_programs_is_not_given_away(pool: Pool) -> None:
    for device in pool.host.devices():
        pool.host.take(device.uuid, device.total_bytes - 2 * MIB)
    reply = pool.service.load(SMALL, **TOKENS)
    detail = error(reply, 500, "model_load_failed", "insufficient_memory")["detail"]
    by_others = {device["id"]: device["used_by_others_bytes"] for device in detail["devices"]}
    assert by_others == {device.uuid: device.total_bytes - 2 * MIB for device in pool.host.devices()}
    pool.host.release(MIDDLE)
    pool.load()
    assert pool.where(SMALL) == [MIDDLE]


def test_a_gpu_lost_by_the_driver_gets_no_loads(pool: Pool) -> None:
    pool.host.fail(LITTLE, "GpuIsLost")
    try:
        pool.load()
        assert pool.where(SMALL) == [MIDDLE]
        assert until(lambda: pool.device(LITTLE)["free_bytes"] == 0, "the worker publishes the loss")
    finally:
        pool.host.fail(LITTLE, None)
    pool.load()
    assert pool.where(f"{SMALL}:2") == [LITTLE]


def test_concurrent_loads_through_two_apis_never_overcommit(pool: Pool, tmp_path: Path) -> None:
    """A load that does not fit is refused by the worker; the engine never runs out of memory."""
    redis_url = f"unix://{pool.service.data_dir}/redis/redis.sock"
    with api(tmp_path, redis_url) as other, ThreadPoolExecutor(24) as threads:
        futures = [threads.submit(one.load, SMALL, **TOKENS) for one in (pool.service, other) * 12]
        replies = [one.result() for one in futures]
        loaded = [reply for reply in replies if reply.status == 200]
        for reply in replies:
            if reply.status != 200:
                failure = error(reply, 500, "model_load_failed", "insufficient_memory")
                assert "there is not enough memory" in failure["message"], "refused by the worker, not by the engine"
        used = pool.used()
    assert len(loaded) >= 11, "5 fit into 15 MiB, 4 into 11, 2 into 7, and perhaps one over the rest of several"
    assert all(used[device.uuid] <= device.total_bytes - MIB for device in pool.host.devices())


# ---- eviction


def test_only_the_longest_idle_instance_with_a_ttl_is_evicted(pool: Pool) -> None:
    pool.host.take(BIG, SIZES[0])
    pool.host.take(MIDDLE, SIZES[1])
    pool.load()  # without a TTL
    pool.load(ttl_seconds=1000)
    assert [pool.where(id_) for id_ in (SMALL, f"{SMALL}:2")] == [[LITTLE], [LITTLE]]

    def estimated() -> Any:
        return pool.service.post("/api/v1/models/estimate", {"model": SMALL, **TOKENS}).json()

    until(
        lambda: (estimated()["fits"], estimated()["evicts"]) == (True, [f"{SMALL}:2"]), "the estimate names the victim"
    )
    before = pool.service.metric("evictions_total")
    reply = pool.service.load(SMALL, ttl_seconds=1000, **TOKENS)
    assert reply.status == 200, reply.text
    assert reply.headers["loadstone-evicted"] == f"{SMALL}:2"
    instance_id = reply.json()["instance_id"]
    assert pool.job(instance_id)["evicted"] == [f"{SMALL}:2"]
    assert set(pool.service.instances()) == {SMALL, instance_id}
    until(lambda: pool.service.metric("evictions_total") == before + 1, "the worker publishes its counts")


def test_instances_without_a_ttl_are_not_evicted(pool: Pool) -> None:
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


def test_copies_go_to_different_devices_as_separate_jobs(pool: Pool) -> None:
    done = loadstone(pool, "load", SMALL, "--context-length", "512", "--copies", "3")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [SMALL, f"{SMALL}:2", f"{SMALL}:3"]
    assert len({pool.job(id_)["job_id"] for id_ in done.stdout.split()}) == 3
    assert {pool.where(id_)[0] for id_ in done.stdout.split()} == {BIG, MIDDLE, LITTLE}
    shown = loadstone(pool, "workers")
    assert [line.split()[2] for line in shown.stdout.splitlines()[1:]] == [BIG, MIDDLE, LITTLE, "CPU"]


def test_copies_without_room_fail_and_the_others_stay(pool: Pool) -> None:
    words = ("--context-length", "512", "--gpu-device", LITTLE, "--copies", "4", "--json")
    done = loadstone(pool, "load", SMALL, *words)
    result = json.loads(done.stdout)
    assert done.returncode == 1
    assert [one["instance_id"] for one in result["loaded"]] == [SMALL, f"{SMALL}:2"]
    assert [one["code"] for one in result["errors"]] == ["insufficient_memory"] * 2
    assert set(pool.service.instances()) == {SMALL, f"{SMALL}:2"}


def test_the_command_line_can_choose_the_devices(pool: Pool) -> None:
    name = pool.service.send("GET", "/api/v1/workers").json()["workers"][0]["name"]
    words = ("--gpu-worker", name, "--gpu-device", LITTLE, "--gpu-device", BIG, "--gpu-split", "1,2")
    done = loadstone(pool, "load", SMALL, "--context-length", "512", *words)
    assert done.returncode == 0, done.stderr
    assert pool.where(SMALL) == [LITTLE, BIG]
    assert loadstone(pool, "load", SMALL, "--context-length", "512", "--gpu-offload", "off").returncode == 0
    assert pool.where(f"{SMALL}:2") == ["CPU"]
    for wrong in (["--gpu-offload", "2"], ["--gpu-split", "1,x"], ["--gpu-offload", "nan"]):
        assert loadstone(pool, "load", SMALL, *wrong).returncode == 2
