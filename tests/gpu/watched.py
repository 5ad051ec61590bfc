"""A service whose loads are weighed: what it says of a load, and what NVML says meanwhile."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from tests.gpu.gpus import STEADY_BYTES, GPUs, steady_bytes
from tests.support.service import STATUS, Service, until

LOAD_S = 300.0  # of a load: the first one reads CUDA's libraries from the disk
BOUND = 0.03  # of what a load takes, either way


class Loaded(NamedTuple):
    """A load that came to loaded, and what it took of each GPU, with all that its process has there."""

    job: Any
    used_bytes: dict[str, int]

    @property
    def config(self) -> Any:
        return self.job["result"]["load_config"]


class Watched(NamedTuple):
    """A running service, whose worker owns the CPU and these GPUs."""

    service: Service
    gpus: GPUs
    ids: list[str]

    def load(self, model: str, **fields: object) -> Any:
        """The job of a load, once it has ended."""
        job_id = self.service.accepted(model, echo_load_config=True, **fields)["job_id"]

        def ended() -> Any:
            job = self.service.job(job_id, wait_s=10)
            return job if job["completed_at"] else None

        return until(ended, "the load ends", LOAD_S)

    @contextmanager
    def loaded(self, model: str, **fields: object) -> Iterator[Loaded]:
        """A load that must succeed, for the block; nothing else is loaded."""
        before = self.at_rest(0)
        job = self.load(model, **fields)
        assert job["status"] == "loaded", job["error"]
        after = self.at_rest(1)
        yield Loaded(job, {id_: after[id_] - before[id_] for id_ in self.ids})
        assert self.service.unload(job["instance_id"]).status == 200

    def at_rest(self, loaded: int) -> dict[str, int]:
        """What is used of each GPU once all is done.  It is with the context of the runner that waits warm, if that has
        made one, before a load and after it."""
        self.service.warm_runner(loaded)
        return {id_: steady_bytes(self.gpus, id_) for id_ in self.ids}

    def estimate(self, model: str, **fields: object) -> Any:
        reply = self.service.post("/api/v1/models/estimate", {"model": model, **fields})
        assert reply.status == 200, reply.text
        return reply.json()

    def estimated(self, model: str, **fields: object) -> dict[str, Any]:
        """What an estimate says of each device; it must be one that the load fits, and no guess."""
        found = self.estimate(model, **fields)
        assert (found["fits"], found["exact"]) == (True, True), found
        return {device["id"]: device for device in found["devices"]}

    def devices(self) -> dict[str, Any]:
        """What the worker says of its devices."""
        (worker,) = self.service.send("GET", "/api/v1/workers").json()["workers"]
        return {device["id"]: device for device in worker["devices"]}

    def seen(self) -> dict[str, Any]:
        """What the worker says of its devices with nothing of ours on them, once it has looked since that is so."""
        used = self.at_rest(0)

        def found() -> Any:
            devices = self.devices()
            gpus = [devices[id_] for id_ in self.ids]
            told = {gpu["id"]: gpu["total_bytes"] - gpu["free_bytes"] for gpu in gpus}
            is_so = all(abs(told[id_] - used[id_]) <= STEADY_BYTES for id_ in self.ids)
            return devices if is_so and not any(gpu["reserved_bytes"] for gpu in gpus) else None

        return until(found, f"the worker has seen what is used: {used}")

    def engine_log(self, job: Any) -> str:
        reply = self.service.send("GET", f"{STATUS}/{job['job_id']}/logs")
        assert reply.status == 200, reply.text
        return reply.text


def check_use(used_bytes: int, told_bytes: int, context_bytes: int) -> None:
    """What NVML says of a load is what we said, and the process's CUDA context.

    Beside the engine's buffers such a process has the kernels that it has used, cuBLAS's workspace and a pool of the
    engine's for intermediate results, and all that may take no more than one context again.
    """
    beyond = used_bytes - context_bytes
    words = f"{told_bytes:,} bytes told, {beyond:,} found beside a context of {context_bytes:,}"
    assert told_bytes * (1 - BOUND) <= beyond <= told_bytes * (1 + BOUND) + context_bytes, words
