"""A thousand loads and unloads, and a thousand failing loads, leak nothing."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import TINY, Process, Service, error, until, up

CYCLES = int(os.environ.get("CYCLES", "1000"))
SETTLED = 300  # cycles after which pools, allocators and the list of logs have reached their size
DAMAGED = "acme/damaged"
MORE_KIB = 6 * 1024  # limit of the growth of resident memory from then on, including noise
RECORD_BYTES = 12 << 10  # kept by Redis for each load for a day


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    # The header is valid, so that only a runner finds the damage.
    synthetic.tiny_llama(tmp_path / f"models/{DAMAGED}/damaged-f16.gguf", drop=["llama.attention.head_count"])
    with up(tmp_path) as running:
        yield running


def parts(service: Service) -> dict[str, Process]:
    tree = service.tree()
    modules = {p.words[3]: p for p in tree if p.words[2:3] == ("-m",) and p.words[3] in ("api", "worker")}
    (redis,) = (p for p in tree if "valkey-server" in p.words[0] or "redis-server" in p.words[0])
    return {**modules, "redis": redis}


def measured(service: Service) -> dict[str, int]:
    """Return resident KiB, threads and descriptors of each process, and the size and the keys of Redis."""
    figures = {}
    for name, process in parts(service).items():
        status = Path(f"/proc/{process.pid}/status").read_text()
        for what, field in (("KiB", "VmRSS"), ("threads", "Threads")):
            match = re.search(rf"^{field}:\s+(\d+)", status, re.M)
            assert match is not None
            figures[f"{name} {what}"] = int(match[1])
        figures[f"{name} descriptors"] = len(list(Path(f"/proc/{process.pid}/fd").iterdir()))
    with service.redis() as redis:
        figures["keys"] = sum(not key.startswith((b"inst:", b"arq:job", b"arq:result")) for key in redis.scan_iter())
        figures["keys of loads"] = sum(key.startswith(b"inst:") for key in redis.scan_iter())
        figures["redis bytes"] = int(redis.info("memory")["used_memory"])  # type: ignore[index]
    return figures


def load_and_unload(service: Service) -> None:
    service.loaded(TINY)
    assert service.unload(TINY).status == 200


def fail(service: Service) -> None:
    error(service.load(DAMAGED), 500, "model_load_failed", "invalid_model_file")


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("cycle", [load_and_unload, fail])
def test_memory_descriptors_threads_and_keys_do_not_grow(service: Service, cycle: Callable[[Service], None]) -> None:
    for _ in range(SETTLED):
        cycle(service)
    service.warm_runner(0)
    before = measured(service)
    for _ in range(CYCLES):
        cycle(service)
    service.warm_runner(0)
    after = measured(service)
    print(f"\n{cycle.__name__}: {CYCLES} cycles after the first {SETTLED}, before and after:")
    for name in before:
        print(f"  {name:20} {before[name]:>12} {after[name]:>12}")
    for name in ("api", "worker"):
        assert after[f"{name} KiB"] - before[f"{name} KiB"] < MORE_KIB
    for name in ("api", "worker", "redis"):
        assert after[f"{name} threads"] <= before[f"{name} threads"] + 1
        assert after[f"{name} descriptors"] <= before[f"{name} descriptors"] + 4  # the connections of a pool vary
    assert after["keys"] <= before["keys"] + 1
    assert after["keys of loads"] - before["keys of loads"] == 2 * CYCLES, "a record and its log, for a day"
    assert after["redis bytes"] - before["redis bytes"] < CYCLES * RECORD_BYTES
    until(lambda: not service.instances(), "nothing is loaded")
