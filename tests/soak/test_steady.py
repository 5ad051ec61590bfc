"""An hour of moderate load with concurrent requests of all kinds: no process grows."""

from __future__ import annotations

import os
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import STATUS, TINY, Client, Process, Service, up

SECONDS = float(os.environ.get("STEADY_SECONDS", "3600"))
SETTLED = 1 / 6  # of SECONDS: until then pools, caches and allocators reach their size
N_MODELS = 200
TICK_S = 0.2  # interval between the requests of a client
LOAD_EVERY = 5  # ticks
SAMPLES = 60  # of resident memory
MORE_KIB = 4 * 1024  # noise: between the medians of the first and the last third of the samples


def resident_kib(process: Process) -> int:
    match = re.search(r"^VmRSS:\s+(\d+)", Path(f"/proc/{process.pid}/status").read_text(), re.MULTILINE)
    assert match
    return int(match[1])


def send_requests(service: Service, paths: list[str], until: float) -> int:
    """Request these paths in turn, one per tick; return the number of requests."""
    client, n = Client(service.url), 0
    while (now := time.monotonic()) < until:
        reply = client.send("GET", paths[n % len(paths)])
        assert reply.status == 200, reply.text
        n += 1
        time.sleep(max(0.0, TICK_S - (time.monotonic() - now)))
    client.close()
    return n


def load(service: Service, until: float) -> int:
    """Load asynchronously, follow the events, unload, again and again; return the number of loads."""
    client, n = Client(service.url), 0
    while (now := time.monotonic()) < until:
        job = client.accepted(TINY)["job_id"]
        *_, end = client.events(job)
        assert end.name == "model_load.end", end
        assert client.unload(client.job(job)["result"]["instance_id"]).status == 200
        n += 1
        time.sleep(max(0.0, LOAD_EVERY * TICK_S - (time.monotonic() - now)))
    client.close()
    return n


@pytest.mark.timeout(SECONDS + 300)
def test_an_hour_of_moderate_load_leaves_resident_memory_flat(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    for i in range(N_MODELS - 1):
        synthetic.tiny_llama(tmp_path / f"models/many/model-{i:03}/model-f16.gguf")
    with up(tmp_path) as service:
        tree = service.tree()
        parts = {p.words[3]: p for p in tree if p.words[2:3] == ("-m",) and p.words[3] in ("api", "worker")}
        assert parts.keys() == {"api", "worker"}
        first = service.accepted(TINY)
        service.job(first["job_id"], 60)
        service.unload(first["instance_id"])
        started = time.monotonic()
        until = started + SECONDS
        samples: dict[str, list[int]] = {name: [] for name in parts}
        with ThreadPoolExecutor(5) as pool:
            asked = [
                pool.submit(send_requests, service, ["/api/v1/models"], until),
                pool.submit(send_requests, service, [f"{STATUS}/{first['job_id']}", STATUS], until),
                pool.submit(send_requests, service, ["/api/v1/workers", "/metrics", "/readyz"], until),
                pool.submit(load, service, until),
            ]
            for i in range(1, SAMPLES + 1):
                time.sleep(max(0.0, started + SECONDS * i / SAMPLES - time.monotonic()))
                for name, process in parts.items():
                    samples[name].append(resident_kib(process))
        print(f"\n{SECONDS:.0f} s, {', '.join(str(one.result()) for one in asked)} requests and loads")
    for name, kib in samples.items():
        settled = kib[int(SAMPLES * SETTLED) :]
        third = len(settled) // 3
        before, after = statistics.median(settled[:third]), statistics.median(settled[-third:])
        print(f"{name}: resident {before / 1024:.1f} MiB, then {after / 1024:.1f} MiB; all: {kib}")
        assert after - before < MORE_KIB, f"{name} grows"
