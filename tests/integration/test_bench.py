"""Benchmarks that need a machine that is rarely there, tried with a tiny model on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec

from bench import samplers
from shared.synthetic.models import tiny_llama

ROOT = Path(__file__).parents[2]


def test_samplers_are_measured_in_each_way(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "m.gguf")
    task = samplers.Task(model=str(model), on_gpu=False, at_once=[1, 3], prompt=8, steps=3)
    argv = [sys.executable, "-m", "bench.samplers", msgspec.json.encode(task).decode()]
    reply = subprocess.run(argv, stdout=subprocess.PIPE, cwd=ROOT, check=True).stdout
    rows = [msgspec.json.decode(line, type=samplers.Row) for line in reply.splitlines()]
    assert [(row.at_once, row.way) for row in rows] == [(n, way) for n in (1, 3) for way in get_args(samplers.Way)]
    assert all(row.decode_ms > 0 and row.sample_ms > 0 for row in rows)
    assert [row.threads for row in rows if row.way in {"serial", "service"}] == [1, 1, 1, 1]
