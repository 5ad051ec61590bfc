"""Benchmarks that need a machine that is rarely there, tried with a tiny model on the CPU."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import get_args

import msgspec

from bench import samplers
from bench.tokens_report import Measured
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


def tried(tmp_path: Path, part: str, *options: str) -> str:
    """Run a part of the benchmark of tokens with tiny models; return its report."""
    argv = [sys.executable, "-m", "bench.tokens", part, "--tiny", "--at-once", "2", "--llama-server", "/gone"]
    argv += ["--out", str(tmp_path / "out"), "--models", str(tmp_path / "models"), *options]
    subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    assert msgspec.json.decode((tmp_path / f"out/{part}.json").read_bytes(), type=Measured).part == part
    return (tmp_path / f"out/{part}.md").read_text()


def test_answers_are_measured_without_llama_server(tmp_path: Path) -> None:
    report = tried(tmp_path, "answers")
    rows = [line for line in report.splitlines() if line.startswith("| 2 |")]
    assert len(rows) == 2  # of two vocabularies
    assert all(row.split(" | ")[2:4] == ["not measured"] * 2 for row in rows)


def test_a_part_that_is_cut_keeps_what_it_has(tmp_path: Path) -> None:
    report = tried(tmp_path, "prompts", "--seconds", "0")
    assert report.count("| 512 | on | f16 |") == 2
    assert "| 1024 |" not in report
