"""The benchmark of loads onto GPUs, on a host with fake GPUs and models of half a megabyte."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from bench.gpu_report import CACHES, LOCKING, MODES, Measured
from shared.synthetic.models import tiny_llama
from tests.support.fakehosts import FakeHost

ROOT = Path(__file__).parents[2]
GIB = 1 << 30


@pytest.mark.timeout(600)
def test_the_benchmark_measures_every_kind_of_load(tmp_path: Path) -> None:
    host = FakeHost.made(tmp_path / "host", 4 * GIB, 4 * GIB)
    host.driver(locked_from=0)
    tiny_llama(tmp_path / "models/loadstone/bench-gpu-0.001gb/bench-gpu-0.001gb-Q8_0.gguf")
    words = ["--gb", "0.001", "--rounds", "1", "--out", str(tmp_path / "out"), "--models", str(tmp_path / "models")]
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", *words],
        cwd=ROOT,
        env={**os.environ, **host.environ()},
        capture_output=True,
        text=True,
        check=False,
    )
    measured = msgspec.json.decode((tmp_path / "out/gpu.json").read_bytes(), type=Measured)
    assert [*measured.failed] == ["copies to the GPU"], done.stderr  # no fake host has NVIDIA's driver
    assert done.returncode == 1
    assert done.stdout == (tmp_path / "out/gpu.md").read_text() + "\n"
    expected = sorted((by, cache) for by in (*MODES, "the service") for cache in CACHES)
    assert sorted((run.by, run.cache) for run in measured.runs) == expected
    assert {run.by: run.lock.n_bytes >= measured.model_bytes for run in measured.runs} == {
        by: by in LOCKING for by in (*MODES, "the service")
    }
    assert measured.start
    assert len(measured.several.split_s) == len(measured.several.at_once_s) == 1
