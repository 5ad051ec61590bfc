"""The benchmark of tokens: its options, what both servers get, and its report."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import msgspec
import pytest

from bench import samplers, tokens
from bench.answers import LLAMA_SERVER, Setup, Who, gpus, look_at
from bench.samplers import Way
from bench.subjects import Failure
from bench.tokens_report import Answered, Kind, Measured, Part, Prompted, Row, Sampled, goal, markdown, medians, ratios

SMALL = Kind(name="s", vocabulary=32_000, tokenizer="spm", quantization="Q8_0")
LARGE = Kind(name="l", vocabulary=151_936, tokenizer="bpe", quantization="Q4_0")
SETUP = Setup(n_ctx=4096, n_batch=2048, n_ubatch=512, parallel=8, n_threads=4)


def measured(part: Part, *rows: Row) -> Measured:
    return Measured(part=part, about={"machine": "m"}, on_gpu=True, kinds=[SMALL, LARGE], rows=[*rows])


def answered(who: Who, tokens_per_s: float, n: int = 1, kind: str = "l") -> Answered:
    return Answered(
        kind=kind,
        who=who,
        at_once=64,
        round=n,
        tokens=9,
        tokens_per_s=tokens_per_s,
        step_ms=2.5,
        first_ms=30.0,
        added_ms=2.0,
    )


def step(way: Way, decode_ms: float, sample_ms: float, threads: int = 1) -> samplers.Row:
    return samplers.Row(way=way, at_once=8, threads=threads, decode_ms=decode_ms, sample_ms=sample_ms)


def options(tmp_path: Path, *words: str) -> tokens.Options:
    return tokens.options_of([*words, "--out", str(tmp_path)])


def test_the_defaults_are_all_parts_on_the_cpu(tmp_path: Path) -> None:
    given = options(tmp_path)
    assert given.parts == [*get_args(Part)]
    assert not given.on_gpu
    assert given.at_once == [1, 8, 32, 64]
    assert given.program == LLAMA_SERVER
    assert given.seconds < 500


def test_options_of_a_gpu_are_taken(tmp_path: Path) -> None:
    argv = ["samplers", "answers", "--gpu", "--llama-server", "/x", "--at-once", "8", "1", "--rounds", "2"]
    given = options(tmp_path, *argv)
    assert given.parts == ["answers", "samplers"]
    assert given.on_gpu
    assert given.program == Path("/x")
    assert given.at_once == [1, 8]
    assert given.rounds == 2


def test_an_unknown_part_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        options(tmp_path, "answer")
    assert "no such part: answer" in capsys.readouterr().err


def test_a_part_alone_has_all_the_time() -> None:
    assert tokens.seconds_of("samplers", ["samplers"], 450) == 450
    parts: list[Part] = ["answers", "samplers", "prompts"]
    assert tokens.seconds_of("answers", parts, 450) == 225
    assert tokens.seconds_of("prompts", parts, 200) == 200


@pytest.mark.parametrize("error", [Failure("the client has exited"), ZeroDivisionError("division by zero")])
def test_a_part_that_fails_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def rows(*_: object) -> Iterator[Row]:
        yield Sampled(kind="32k", row=step("serial", 5, 4))
        raise error

    monkeypatch.setattr(tokens, "rows_of", rows)
    assert not tokens.measure("samplers", options(tmp_path), {"machine": "m"}, 1.0)
    report = (tmp_path / "samplers.md").read_text()
    assert "5.00 + 4.00 = 9.00 (1)" in report
    assert f"ended early: {type(error).__name__}: {error}" in report
    kept = msgspec.json.decode((tmp_path / "samplers.json").read_bytes(), type=Measured)
    assert len(kept.rows) == 1


def test_both_servers_are_set_alike() -> None:
    setup = Setup(
        n_ctx=4096,
        n_batch=2048,
        n_ubatch=512,
        parallel=8,
        n_threads=4,
        on_gpu=True,
        flash_attention=False,
        kv_type="q8_0",
    )
    argv = setup.argv(Path("/server"), Path("/m"), 1)
    given = dict(zip(argv[2::2], argv[3::2], strict=True))
    load = setup.load("k")
    assert int(given["--ctx-size"]) == load["context_length"]
    assert int(given["--batch-size"]) == load["eval_batch_size"]
    assert int(given["--ubatch-size"]) == load["physical_batch_size"]
    assert int(given["--parallel"]) == load["parallel"]
    assert given["--cache-type-k"] == given["--cache-type-v"] == load["kv_cache_type"]
    assert (given["--flash-attn"], load["flash_attention"]) == ("off", False)
    assert (given["--gpu-layers"], load["gpu"]) == ("99", {"offload": "max"})


def test_without_a_gpu_both_servers_use_the_cpu() -> None:
    argv = SETUP.argv(Path("/server"), Path("/m"), 1)
    assert argv[argv.index("--gpu-layers") + 1] == "0"
    assert gpus(on_gpu=False)["CUDA_VISIBLE_DEVICES"] == ""
    assert "gpu" not in SETUP.load("k")
    assert SETUP.service_variables == {"LOADSTONE_DEVICES": "cpu"}


@pytest.mark.parametrize(
    ("lines", "on_gpu", "about"),
    [
        ("echo '  CUDA0: NVIDIA H200 (1 MiB, 1 MiB free)'", True, "0.5.0, CUDA0: NVIDIA H200 (1 MiB, 1 MiB free)"),
        ("echo '  (none)'", False, "0.5.0"),
        ("echo '  (none)'", True, "it sees no GPU"),
        ("echo 'libcuda.so.1: no such file'; exit 127", True, "libcuda.so.1: no such file"),
    ],
)
def test_a_llama_server_is_looked_at_first(tmp_path: Path, lines: str, on_gpu: bool, about: str) -> None:
    program = tmp_path / "llama-server"
    program.write_text(f"#!/bin/sh\necho 'version: 0.5.0'\necho 'Available devices:'\n{lines}\n")
    program.chmod(0o755)
    try:
        said = look_at(program, on_gpu=on_gpu)
    except Failure as e:
        said = str(e)
    assert about in said


def test_a_llama_server_that_is_not_there_is_a_failure(tmp_path: Path) -> None:
    with pytest.raises(Failure, match="cannot be used"):
        look_at(tmp_path / "gone", on_gpu=False)


def test_an_applied_config_that_differs_is_a_failure() -> None:
    applied = {name: value for name, value in SETUP.load("").items() if name not in {"model", "echo_load_config"}}
    SETUP.check({"load_config": applied})
    with pytest.raises(Failure, match="parallel"):
        SETUP.check({"load_config": applied | {"parallel": 4}})


def test_goals_depend_on_the_requests_and_the_vocabulary() -> None:
    assert [goal(LARGE, n) for n in (1, 8, 32, 64)] == [0.95, 0.95, 1.5, 1.5]
    assert [goal(SMALL, n) for n in (1, 8, 32, 64)] == [0.95, 0.95, None, None]


def test_ratios_are_of_rounds_that_have_both_servers() -> None:
    rows = [answered("Loadstone", 30), answered("llama-server", 20), answered("Loadstone", 50, 2)]
    assert ratios(rows, 64) == [1.5]
    assert ratios(rows, 8) == []


def test_a_report_of_answers_has_the_ratio_and_the_goal() -> None:
    report = markdown(measured("answers", answered("Loadstone", 30), answered("llama-server", 20)))
    assert "| 64 | 30 | 20 | 1.50 (1.50 to 1.50) | 1.50 | 2.50 | 2.50 | 30 | 30 | 2.0 |" in report
    assert report.count("not measured") == 1  # the other vocabulary


def test_a_report_without_llama_server_says_so() -> None:
    assert "| 64 | 30 | not measured | not measured |" in markdown(measured("answers", answered("Loadstone", 30)))


def test_a_report_of_samplers_judges_the_choice() -> None:
    steps = [step("serial", 5, 4), step("threads", 5, 1, 4), step("service", 5, 1.6, 3)]
    report = markdown(measured("samplers", *(Sampled(kind="l", row=row) for row in steps)))
    assert "5.00 + 1.00 = 6.00 (4)" in report
    assert "1.10 of threads, the quickest other way" in report
    assert "| 8 | 5.00 + 4.00 = 9.00 (1) |" in report


def test_rounds_of_a_way_become_medians() -> None:
    row = medians([step("serial", 5, 1), step("serial", 7, 2), step("serial", 6, 9)])
    assert row is not None
    assert (row.decode_ms, row.sample_ms) == (6, 2)
    assert row.tokens_per_s == 1000


def test_a_report_of_prompts_has_refused_configurations() -> None:
    done = Prompted(
        kind="l",
        n_ubatch=512,
        flash_attention=True,
        kv_type="f16",
        prompt_tokens=4096,
        prompt_tokens_per_s=9000.0,
        tokens_per_s={"1": 300.0, "32": 2000.0},
        gap_ms=35.0,
    )
    refused = Prompted(kind="l", n_ubatch=2048, flash_attention=False, kv_type="f16", failure="no\nmemory")
    report = markdown(measured("prompts", done, refused))
    assert "| 512 | on | f16 | 9000 | 300 | 2000 | 35 |" in report
    assert "| 2048 | off | f16 | failed: no memory |" in report
    assert "gap, ms (goal 40)" in report


def test_a_report_says_why_it_ended_early() -> None:
    one = measured("answers")
    one.failure = "the client has exited"
    assert "ended early: the client has exited" in markdown(one)


def test_time_is_shared_out_among_what_is_left() -> None:
    clock = iter([0.0, 10.0, 90.0]).__next__
    assert [end for _, end in tokens.shared_out("abc", 100.0, clock)] == [pytest.approx(100 / 3), 55.0, 100.0]


def test_no_two_prompts_begin_alike() -> None:
    prompts = [tokens.prompt_of(64, number) for number in (*range(64), *range(1000, 1064), *range(2000, 2064))]
    assert len({prompt[0] for prompt in prompts}) == len(prompts)
    assert all(0 <= token < 32_000 for prompt in prompts for token in prompt)
