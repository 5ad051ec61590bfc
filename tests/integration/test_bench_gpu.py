"""The benchmark of loads onto GPUs, on a host with fake GPUs and models of half a megabyte."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import product
from pathlib import Path

import msgspec
import pytest

from bench.gpu_report import CACHES, LOCKING, MODES, By, Measured
from shared.synthetic.models import tiny_llama
from tests.support.fakehosts import FakeHost

ROOT = Path(__file__).parents[2]
GIB = 1 << 30
# The functions of NVIDIA's driver that bench.cuda calls: nothing is copied.
DRIVER = """
#include <stdlib.h>
int cuInit(unsigned flags) { return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = context; return 0; }
int cuCtxSetCurrent(void *context) { return 0; }
int cuCtxSynchronize(void) { return 0; }
int cuMemAlloc_v2(unsigned long long *address, size_t size) { *address = 1; return 0; }
int cuMemFree_v2(unsigned long long address) { return address != 1; }
int cuMemHostAlloc(void **address, size_t size, unsigned flags) { *address = malloc(size); return *address == 0; }
int cuMemFreeHost(void *address) { free(address); return 0; }
int cuMemcpyHtoD_v2(unsigned long long device, const void *host, size_t size) { return device != 1; }
"""


@pytest.fixture
def driver(tmp_path: Path) -> Path:
    """A directory with a library that stands in for NVIDIA's driver."""
    source = tmp_path / "driver/cuda.c"
    source.parent.mkdir()
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", source.with_name("libcuda.so.1"), source], check=True)
    return source.parent


MODEL = "models/loadstone/bench-gpu-0.001gb/bench-gpu-0.001gb-Q8_0.gguf"  # of the name for its size


def run(host: FakeHost, directory: Path, **environ: str) -> tuple[subprocess.CompletedProcess[str], Measured]:
    """Run the benchmark with the models in a directory; return what it measured, too."""
    words = ["--gb", "0.001", "--rounds", "1", "--out", str(directory / "out"), "--models", str(directory / "models")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=ROOT,
        env={**os.environ, **host.environ(), **environ},
        capture_output=True,
        text=True,
        check=False,
    )
    return done, msgspec.json.decode((directory / "out/gpu.json").read_bytes(), type=Measured)


@pytest.mark.timeout(600)
def test_the_benchmark_measures_every_kind_of_load(tmp_path: Path, driver: Path) -> None:
    host = FakeHost.made(tmp_path / "host", 4 * GIB, 4 * GIB)
    host.driver(locked_from=0)
    tiny_llama(tmp_path / MODEL)
    done, measured = run(host, tmp_path, LD_LIBRARY_PATH=str(driver))
    assert measured.failed == {}, done.stderr
    assert done.returncode == 0
    assert done.stdout == (tmp_path / "out/gpu.md").read_text() + "\n"
    everyone: list[By] = [*MODES, "the service"]
    assert sorted((run.by, run.cache) for run in measured.runs) == sorted(product(everyone, CACHES))
    locks = {run.by: run.lock.n_bytes >= measured.model_bytes for run in measured.runs}
    assert locks == {by: by in LOCKING for by in everyone}
    assert measured.bandwidth
    assert measured.bandwidth.pinned
    assert measured.start
    assert len(measured.several.split_s) == len(measured.several.at_once_s) == 1


@pytest.mark.timeout(600)
def test_what_fails_is_reported_and_the_rest_measured(tmp_path: Path) -> None:
    host = FakeHost.made(tmp_path / "host", 4 * GIB)
    tiny_llama(tmp_path / MODEL, drop=["token_embd.weight"])
    done, measured = run(host, tmp_path)
    assert done.returncode == 1
    assert measured.runs == []
    assert {"copies to the GPU", "warm, locked, 1", "the service"} < measured.failed.keys()
    assert measured.bandwidth
    assert measured.start
    assert "not measured" in done.stdout
