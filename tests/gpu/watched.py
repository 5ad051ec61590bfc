"""A service with measured loads: its own figures of a load, and those of NVML."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.gpu.gpus import STEADY_BYTES, GPUs, steady_bytes
from tests.support.service import STATUS, Service, until

LOAD_S = 300.0  # of a load: the first load reads CUDA's libraries from the disk
PAGE = os.sysconf("SC_PAGE_SIZE")
LOCKED = re.compile(r"page_lock: (\d+) bytes locked in ([\d.]+) s")
UNLOCKED = re.compile(r"page_lock: unlocked in ([\d.]+) s")
CANNOT = re.compile(r"page_lock: .*(?:the driver is|a GPU does not support).*")
BOUND = 0.03  # relative error of an estimate, in either direction


class Loaded(NamedTuple):
    """A loaded instance and its usage of each GPU, with everything that its process has there."""

    job: Any
    used_bytes: dict[str, int]

    @property
    def config(self) -> Any:
        return self.job["result"]["load_config"]


class Watched(NamedTuple):
    """A running service whose worker owns the CPU and these GPUs."""

    service: Service
    gpus: GPUs
    ids: list[str]

    def load(self, model: str, **fields: object) -> Any:
        """Load a model; return the job once it has ended."""
        job_id = self.service.accepted(model, echo_load_config=True, **fields)["job_id"]

        def ended() -> Any:
            job = self.service.job(job_id, wait_s=10)
            return job if job["completed_at"] else None

        return until(ended, "the load ends", LOAD_S)

    @contextmanager
    def loaded(self, model: str, **fields: object) -> Iterator[Loaded]:
        """Load a model for the block; the load must succeed, and nothing else may be loaded."""
        before = self.at_rest(0)
        job = self.load(model, **fields)
        assert job["status"] == "loaded", job["error"]
        after = self.at_rest(1)
        yield Loaded(job, {id_: after[id_] - before[id_] for id_ in self.ids})
        assert self.service.unload(job["instance_id"]).status == 200

    def at_rest(self, loaded: int) -> dict[str, int]:
        """Return the used bytes of each GPU once all processes are idle.  Before and after a load they include the CUDA
        context of the warm runner, if it has created one."""
        self.service.warm_runner(loaded)
        return {id_: steady_bytes(self.gpus, id_) for id_ in self.ids}

    def estimate(self, model: str, **fields: object) -> Any:
        reply = self.service.post("/api/v1/models/estimate", {"model": model, **fields})
        assert reply.status == 200, reply.text
        return reply.json()

    def estimated(self, model: str, **fields: object) -> dict[str, Any]:
        """Return an estimate by device; the load must fit, and the estimate be exact."""
        estimate = self.estimate(model, **fields)
        assert (estimate["fits"], estimate["exact"]) == (True, True), estimate
        return {device["id"]: device for device in estimate["devices"]}

    def devices(self) -> dict[str, Any]:
        """Return the devices that the worker publishes, by id."""
        (worker,) = self.service.send("GET", "/api/v1/workers").json()["workers"]
        return {device["id"]: device for device in worker["devices"]}

    def seen(self) -> dict[str, Any]:
        """Return the published devices once the worker has seen them with nothing loaded."""
        used = self.at_rest(0)

        def current_devices() -> Any:
            devices = self.devices()
            gpus = [devices[id_] for id_ in self.ids]
            published_used = {gpu["id"]: gpu["total_bytes"] - gpu["free_bytes"] for gpu in gpus}
            is_current = all(abs(published_used[id_] - used[id_]) <= STEADY_BYTES for id_ in self.ids)
            return devices if is_current and not any(gpu["reserved_bytes"] for gpu in gpus) else None

        return until(current_devices, f"the worker has seen the usage {used}")

    def engine_log(self, job: Any) -> str:
        reply = self.service.send("GET", f"{STATUS}/{job['job_id']}/logs")
        assert reply.status == 200, reply.text
        return reply.text

    def locked_bytes(self, job: Any) -> int:
        """Return the bytes that a load locked, by its log, once they are unlocked; skip the test if the driver or a GPU
        cannot."""

        def complete() -> str | None:
            log = self.engine_log(job)
            if cannot := CANNOT.search(log):
                pytest.skip(cannot[0])
            return log if UNLOCKED.search(log) else None

        log = until(complete, "the log says that the memory is unlocked")
        assert not re.search("page_lock: .*returned", log), log
        ((n_bytes, _),) = LOCKED.findall(log)
        return int(n_bytes)


def pages(files: Iterable[Path]) -> int:
    """Return the bytes that locking these files locks."""
    return sum(-(-file.stat().st_size // PAGE) * PAGE for file in files)


def check_use(used_bytes: int, estimated_bytes: int, context_bytes: int) -> None:
    """Check that the usage of a load by NVML is the estimate plus the CUDA context of its process.

    Beside the engine's buffers the process has the kernels that it has used, cuBLAS's workspace and the engine's pool
    for intermediate results.  Together they may use no more than the size of another context.
    """
    net_bytes = used_bytes - context_bytes
    words = f"{estimated_bytes:,} bytes estimated, {net_bytes:,} used beside a context of {context_bytes:,}"
    assert estimated_bytes * (1 - BOUND) <= net_bytes <= estimated_bytes * (1 + BOUND) + context_bytes, words
