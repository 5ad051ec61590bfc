"""Real runner processes: their answers, their ends, and the stop ladder."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import worker.runner.warm
from shared.framing import LENGTH
from shared.schema.http import LoadConfig, LoadRequest, Phase
from shared.schema.model import Model
from shared.settings import Settings
from shared.synthetic.architectures import TINY, TINY_MOE
from shared.synthetic.models import sharded, tiny_llama, tiny_moe
from shared.telemetry.trace import root
from tests.support import trimmed, waiting
from tests.support.damaged import misaligned
from tests.support.runners import freeze, has_variable, is_gone
from tests.support.service import Process, below, tiny_quantized, until, wait_gone
from worker.engine.child import ORPHANED
from worker.engine.prefetch import Ahead, Unreadable
from worker.listener.protocol import pair
from worker.runner.failure import from_exit, from_reason
from worker.runner.parameters import plan
from worker.runner.process import Received, Runner, RunnerDied
from worker.runner.protocol import NO_GPU, Failed, Load, Progress, Ready, Warm
from worker.runner.warm import Runners, run_child
from worker.timing import Timing

pytestmark = pytest.mark.usefixtures("forkserver")

DEADLINE_S = 60.0
HEAP_BYTES = 16 << 20  # touched by a runner when it prewarms
SHORT_S = 0.3  # grace of a rung of the stop ladder for frozen runners
PHASES: list[Phase] = ["metadata", "weights", "context", "warmup"]


@pytest.fixture
async def runners() -> AsyncIterator[Runners]:
    created = Runners(10.0, visible=NO_GPU)
    yield created
    await created.close()


@pytest.fixture
async def impatient() -> AsyncIterator[Runners]:
    created = Runners(10.0, visible=NO_GPU, timing=Timing(grace_s=SHORT_S))
    yield created
    await created.close()


@asynccontextmanager
async def taken(runners: Runners) -> AsyncIterator[Runner]:
    """Take a runner that does not outlive the block."""
    async with asyncio.timeout(DEADLINE_S):
        runner = await runners.take()
    try:
        yield runner
    finally:
        runner.kill()
        await runner.reaped()


@pytest.fixture
async def runner(runners: Runners) -> AsyncIterator[Runner]:
    async with taken(runners) as one:
        yield one


def given(*shards: Path, **changes: Any) -> Load:
    """Return a load of files that are not in a catalog."""
    fields: dict[str, Any] = {
        "shards": [str(shard) for shard in shards],
        "total_bytes": sum(shard.stat().st_size for shard in shards if shard.is_file()),
        "embedding": False,
        "n_ctx": 256,
        "n_batch": 256,
        "n_ubatch": 256,
        "parallel": 1,
        "n_seq_max": 1,
        "n_outputs_max": 256,
        "flash_attn": None,
        "offload_kqv": True,
        "expert_override": None,
        "moe": False,
        "check_tensors": False,
        "devices": [],
        "layers": [],
    }
    return Load(**{**fields, **changes})


async def answers(runner: Runner, load: Load) -> tuple[list[Progress], Received]:
    """Send a load; return its progress and the final message, None if the stream ended."""
    await runner.send(load)
    steps = []
    async with asyncio.timeout(DEADLINE_S):
        while isinstance(message := await runner.receive(), Progress):
            steps.append(message)
    return steps, message


async def ready(runner: Runner, load: Load) -> Ready:
    _, message = await answers(runner, load)
    assert isinstance(message, Ready), (message, list(runner.output))
    return message


def maps(process: Process) -> str:
    """Return what a process has mapped into its memory."""
    return Path(f"/proc/{process.pid}/maps").read_text()


async def ending(runner: Runner) -> int:
    """Wait until a runner ends by itself; return its exit status."""
    async with asyncio.timeout(DEADLINE_S):
        await runner.reaped()
    assert is_gone(runner.pid)
    return runner.status


# ---- a load


@pytest.mark.parametrize(
    ("request_", "config"),
    [
        pytest.param(
            LoadRequest(model="p/llama"),
            LoadConfig(
                context_length=512,
                eval_batch_size=512,
                physical_batch_size=512,
                parallel=4,
                flash_attention=True,
                offload_kv_cache_to_gpu=True,
            ),
            id="llm",
        ),
        pytest.param(
            LoadRequest(
                model="p/llama",
                context_length=300,
                eval_batch_size=70,
                physical_batch_size=70,
                flash_attention=False,
                offload_kv_cache_to_gpu=False,
                parallel=3,
            ),
            LoadConfig(
                context_length=300,
                eval_batch_size=70,
                physical_batch_size=70,
                flash_attention=False,
                offload_kv_cache_to_gpu=False,
                parallel=3,
            ),
            id="llm with everything",
        ),
        pytest.param(
            LoadRequest(model="p/llama", parallel=64, kv_cache_type="q4_0"),
            LoadConfig(
                context_length=512,
                eval_batch_size=512,
                physical_batch_size=512,
                parallel=64,
                flash_attention=True,
                offload_kv_cache_to_gpu=True,
                kv_cache_type="q4_0",
            ),
            id="llm with a quantized cache",
        ),
        pytest.param(
            LoadRequest(model="p/moe", context_length=256, flash_attention=True, num_experts=3),
            LoadConfig(
                context_length=256,
                eval_batch_size=256,
                physical_batch_size=256,
                parallel=4,
                flash_attention=True,
                offload_kv_cache_to_gpu=True,
                num_experts=3,
            ),
            id="moe",
        ),
        pytest.param(
            LoadRequest(model="p/embedding", context_length=100), LoadConfig(context_length=100), id="embedding"
        ),
        pytest.param(LoadRequest(model="p/bert"), LoadConfig(context_length=512), id="encoder"),
    ],
)
async def test_a_load_reports_its_config_and_can_be_stopped(
    runner: Runner, models: dict[str, Model], models_dir: Path, request_: LoadRequest, config: LoadConfig
) -> None:
    settings = Settings(models_dir=models_dir, context_length=512)
    message = await ready(runner, plan(request_, models[request_.model], settings, [], []))
    assert message.config == config
    assert list(message.timing) == PHASES
    assert all(seconds >= 0 for seconds in message.timing.values())
    assert sum(message.timing.values()) < DEADLINE_S
    assert not is_gone(runner.pid)
    async with asyncio.timeout(DEADLINE_S):
        await runner.stop()
    assert runner.status == 0
    assert is_gone(runner.pid)


async def test_the_config_is_what_the_engine_made_of_the_load(runner: Runner, models_dir: Path) -> None:
    """llama.cpp reduces a batch to the context."""
    load = given(models_dir / "p/llama/llama-f16.gguf", n_ctx=256, n_batch=1000)
    assert (await ready(runner, load)).config.eval_batch_size == 256


async def test_stop_may_be_repeated(runner: Runner, models_dir: Path) -> None:
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    async with asyncio.timeout(DEADLINE_S):
        await asyncio.gather(runner.stop(), runner.stop())
        await runner.stop()
    runner.kill()
    assert is_gone(runner.pid)


async def test_a_warm_runner_without_a_load_stops_at_once(runner: Runner) -> None:
    async with asyncio.timeout(DEADLINE_S):
        await runner.stop()
    assert runner.status == 0
    assert is_gone(runner.pid)


async def test_a_waiting_runner_prewarms_without_output(runner: Runner, models_dir: Path) -> None:
    def resident_bytes() -> int:
        return int(Path(f"/proc/{runner.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before = resident_bytes()
    await asyncio.to_thread(until, lambda: resident_bytes() > before + HEAP_BYTES, "the heap is touched")
    message = await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    assert message.config.context_length == 256
    output = "\n".join(runner.output)
    assert "llama-f16.gguf" in output
    assert "prewarm" not in output.lower()


async def test_progress_and_phases_never_go_back(runner: Runner, tmp_path: Path) -> None:
    """The file is larger than one step of reading."""
    shape = replace(TINY, embedding_length=512, feed_forward_length=2048, block_count=6)
    load = given(tiny_llama(tmp_path / "m.gguf", shape=shape))
    assert load.total_bytes > 40e6
    steps, message = await answers(runner, load)
    assert isinstance(message, Ready)
    assert list(dict.fromkeys(step.phase for step in steps)) == PHASES
    assert [PHASES.index(step.phase) for step in steps] == sorted(PHASES.index(step.phase) for step in steps)
    loaded = [step.loaded_bytes for step in steps]
    assert loaded == sorted(loaded)
    assert loaded[0] == 0
    assert loaded[-1] == load.total_bytes
    assert any(0 < n < load.total_bytes for n in loaded)
    assert all(step.loaded_bytes == load.total_bytes for step in steps if step.phase in ("context", "warmup"))


async def test_all_shards_of_a_model_are_loaded(runner: Runner, tmp_path: Path) -> None:
    load = given(*sharded(tmp_path / "m.gguf", 3))
    steps, message = await answers(runner, load)
    assert isinstance(message, Ready)
    assert steps[-1].loaded_bytes == load.total_bytes


@pytest.mark.parametrize("other", [".GGUF", ".Gguf"])
async def test_shards_load_whatever_the_case_of_their_suffix(runner: Runner, tmp_path: Path, other: str) -> None:
    shards = [shard.rename(shard.with_suffix(other)) for shard in sharded(tmp_path / "m.gguf", 3)]
    await ready(runner, given(*shards))


@pytest.mark.parametrize("alignment", [8, 16])
async def test_a_file_that_cannot_be_mapped_is_read(runner: Runner, tmp_path: Path, alignment: int) -> None:
    """The engine aborts if it maps a file whose tensors begin at such an offset."""
    load = given(misaligned(tmp_path / "m.gguf", alignment), can_map=False)
    steps, message = await answers(runner, load)
    assert isinstance(message, Ready), (message, list(runner.output))
    assert next(step.phase for step in steps if step.loaded_bytes == load.total_bytes) == "weights"


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% for %}", "the chat template is not valid: "),
        ("{{ raise_exception('not today') }}", "not today"),
        ("{{ " + "(" * 50_000 + ")" * 50_000 + " }}", "the chat template cannot be used: its process was ended by SIG"),
    ],
    ids=["syntax", "rejection", "crash"],
)
async def test_a_broken_chat_template_fails_the_load(
    runner: Runner, tmp_path: Path, template: str, reason: str
) -> None:
    file = tiny_llama(tmp_path / "m.gguf", metadata={"tokenizer.chat_template": template})
    _, message = await answers(runner, given(file))
    assert isinstance(message, Failed)
    code, sentence = from_reason(message.reason)
    assert code == "invalid_model_file"
    assert reason in sentence
    assert await ending(runner) == 0


async def test_a_model_without_a_chat_template_loads(runner: Runner, tmp_path: Path) -> None:
    file = tiny_llama(tmp_path / "m.gguf", drop={"tokenizer.chat_template"})
    await ready(runner, given(file))
    until(lambda: not below(runner.pid), "its helper has ended")


async def test_the_helper_of_a_runner_holds_no_model(runner: Runner, tmp_path: Path) -> None:
    file = tiny_llama(tmp_path / "m.gguf")
    await ready(runner, given(file))
    processes = below(runner.pid)
    assert len(processes) == 2, "the zygote and the helper"
    for process in processes:
        assert "m.gguf" not in maps(process)
    await runner.stop()
    wait_gone(processes)


async def test_a_template_that_was_tried_before_is_not_tried_again(runners: Runners, tmp_path: Path) -> None:
    """The worker knows by size and time that the files are the same; here they are not, so that it can be seen."""
    good = tiny_llama(tmp_path / "good.gguf", metadata={"tokenizer.chat_template": "{{ messages[0].content }}"})
    bad = tiny_llama(tmp_path / "bad.gguf", metadata={"tokenizer.chat_template": "{% for %}"})
    async with taken(runners) as runner:
        capabilities = (await ready(runner, given(good))).capabilities
    assert capabilities is not None
    async with taken(runners) as runner:
        load = given(bad, capabilities=capabilities)
        assert (await ready(runner, load)).capabilities == capabilities


async def test_repacking_rearranges_weights_for_the_cpu(runners: Runners, tmp_path: Path) -> None:
    file = tiny_quantized(tmp_path / "m.gguf", "Q4_0")
    weights: list[int] = []
    for repack in (False, True):
        async with taken(runners) as runner:
            (cpu,) = (await ready(runner, given(file, repack=repack))).usage
            weights.append(cpu.weights_bytes)
    assert weights[1] > 1.3 * weights[0], "the weights exist twice: repacked and in the mapping of the file"


async def test_waiting_for_an_unreadable_file_raises_unreadable(tmp_path: Path) -> None:
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(Unreadable):
        Ahead([fd], lambda n_bytes: None).wait()
    with pytest.raises(OSError, match="Bad file descriptor"):  # closed by the thread that read it
        os.fstat(fd)


def test_a_thread_that_never_runs_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It ran out of memory before its first line, and nobody was told."""
    monkeypatch.setattr("worker.engine.prefetch.START_S", 0.01)
    monkeypatch.setattr("_thread.start_new_thread", lambda *_: 0)
    fd = os.open(tmp_path, os.O_RDONLY)
    with pytest.raises(OSError, match="Cannot allocate memory"):
        Ahead([fd], lambda n_bytes: None)
    os.close(fd)  # still its opener's


async def test_the_owner_of_a_runner_gets_the_engine_output(runner: Runner, models_dir: Path) -> None:
    """Output is passed on at the end of a phase; the lines about the context come late in a load."""
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    await runner.stop()
    assert any("n_ctx" in line for line in runner.output), list(runner.output)


async def test_a_runner_has_the_traceparent_of_its_load(runner: Runner, models_dir: Path) -> None:
    span = str(root())
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf", traceparent=span))
    assert has_variable(runner.pid, f"TRACEPARENT={span}")


# ---- invalid files


def _fifo(path: Path) -> list[Path]:
    os.mkfifo(path)
    return [path]


def _directory(path: Path) -> list[Path]:
    path.mkdir()
    return [path]


def _missing(path: Path) -> list[Path]:
    return [path]


def _empty(path: Path) -> list[Path]:
    path.touch()
    return [path]


def _garbage(path: Path) -> list[Path]:
    path.write_bytes(bytes(range(256)) * 64)
    return [path]


def _truncated(path: Path) -> list[Path]:
    tiny_llama(path)
    os.truncate(path, path.stat().st_size // 2)
    return [path]


def _dangling(path: Path) -> list[Path]:
    path.symlink_to(path.with_name("nothing"))
    return [path]


def _missing_shard(path: Path) -> list[Path]:
    shards = sharded(path, 3)
    shards[1].unlink()
    return shards


@pytest.mark.parametrize("made", [_fifo, _directory, _missing, _empty, _garbage, _truncated, _dangling, _missing_shard])
async def test_an_invalid_file_is_refused_and_the_runner_exits(
    runner: Runner, tmp_path: Path, made: Callable[[Path], list[Path]]
) -> None:
    _, message = await answers(runner, given(*made(tmp_path / "m.gguf")))
    assert isinstance(message, Failed)
    code, sentence = from_reason(message.reason)
    assert code == "invalid_model_file"
    assert sentence
    assert "/" not in sentence
    assert await ending(runner) == 0
    while isinstance(last := await runner.receive(), Progress):  # of the thread that reads ahead
        pass
    assert last is None


# ---- other ends


@pytest.fixture
async def ours() -> AsyncIterator[tuple[Runner, asyncio.StreamWriter]]:
    """A runner and the parent's end of its channel."""
    (control, control_child), (output, output_child) = socket.socketpair(), socket.socketpair()
    hand_over, hand_over_child = pair()
    with control_child, output_child, hand_over_child:
        arguments = (control_child, hand_over_child, output_child, NO_GPU)
        process = multiprocessing.get_context("forkserver").Process(target=run_child, args=arguments, daemon=True)
        await asyncio.to_thread(process.start)
    reader, writer = await asyncio.open_connection(sock=control)
    runner = Runner(process, reader, writer, hand_over, Timing())
    runner.collect(output)
    assert isinstance(await runner.receive(), Warm)
    yield runner, writer
    runner.kill()
    await runner.reaped()


async def test_a_warm_runner_ends_with_its_channel(ours: tuple[Runner, asyncio.StreamWriter]) -> None:
    runner, writer = ours
    writer.close()
    assert await ending(runner) == ORPHANED == 3


async def test_a_runner_exits_on_noise_in_its_channel(ours: tuple[Runner, asyncio.StreamWriter]) -> None:
    """The runner could not receive any further message, not even a stop."""
    runner, writer = ours
    writer.write(LENGTH.pack(3) + b"\xc1\xc1\xc1")
    assert await ending(runner) == ORPHANED


async def test_a_loaded_runner_ends_with_its_channel(
    ours: tuple[Runner, asyncio.StreamWriter], models_dir: Path
) -> None:
    runner, writer = ours
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    writer.close()
    assert await ending(runner) == ORPHANED


@pytest.mark.parametrize("signum", [signal.SIGSEGV, signal.SIGKILL, signal.SIGTERM])
async def test_the_status_is_the_signal_that_ended_the_runner(
    runner: Runner, models_dir: Path, signum: signal.Signals
) -> None:
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    os.kill(runner.pid, signum)
    assert await ending(runner) == -signum
    assert await runner.receive() is None
    code, sentence = from_exit(runner.status, runner.output)
    assert code == "engine_crashed"
    assert signum.name in sentence


async def test_a_runner_ignores_an_interrupt_from_a_terminal(runner: Runner, models_dir: Path) -> None:
    os.kill(runner.pid, signal.SIGINT)
    await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))


@pytest.mark.parametrize("loaded", [False, True])
async def test_a_runner_that_does_not_answer_is_killed(impatient: Runners, models_dir: Path, loaded: bool) -> None:
    runner = await impatient.take()
    if loaded:
        await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))
    await freeze(runner)
    async with asyncio.timeout(DEADLINE_S):
        await runner.stop()
    assert runner.status == -signal.SIGKILL
    assert is_gone(runner.pid)


@pytest.mark.parametrize("experts", [0, 9])
async def test_an_abort_of_the_engine_leaves_its_message(runner: Runner, tmp_path: Path, experts: int) -> None:
    """The file has eight experts; `plan` never makes such a load."""
    override = (f"{TINY_MOE.architecture}.expert_used_count", experts)
    _, message = await answers(runner, given(tiny_moe(tmp_path / "m.gguf"), moe=True, expert_override=override))
    assert message is None
    assert await ending(runner) == -signal.SIGABRT
    assert any("GGML_ASSERT" in line for line in runner.output), list(runner.output)
    code, sentence = from_exit(runner.status, runner.output)
    assert code == "engine_crashed"
    assert "GGML_ASSERT" in sentence
    assert "SIGABRT" in sentence
    assert str(tmp_path) not in sentence
    assert not any(word.startswith("/") for word in sentence.split())


# ---- the warm runner


async def test_the_warm_runner_is_taken_once(runners: Runners) -> None:
    await runners.warmed()
    pid = warm(runners).pid
    await runners.warmed()
    assert warm(runners).pid == pid
    async with taken(runners) as first, taken(runners) as second:
        assert first.pid == pid
        assert second.pid != pid


async def test_a_dead_warm_runner_is_replaced(runners: Runners, models_dir: Path) -> None:
    await runners.warmed()
    dead = warm(runners)
    dead.kill()
    async with asyncio.timeout(DEADLINE_S):
        await dead.exited.wait()
    async with taken(runners) as runner:
        assert runner.pid != dead.pid
        await ready(runner, given(models_dir / "p/llama/llama-f16.gguf"))


async def test_close_ends_only_the_warm_runner(runners: Runners) -> None:
    async with taken(runners) as runner:
        await runners.warmed()
        pid = warm(runners).pid
        async with asyncio.timeout(DEADLINE_S):
            await runners.close()
            await runners.close()
        assert is_gone(pid)
        assert not is_gone(runner.pid)


async def test_loaded_runner_trims_its_heap(
    runners: Runners, models: dict[str, Model], models_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large vocabulary leaves megabytes that malloc would keep (what it gives back: tests/unit/test_libc.py)."""
    monkeypatch.setattr(worker.runner.warm, "run_child", trimmed.run_child)
    async with taken(runners) as runner:
        await ready(runner, given(models_dir / models["p/llama"].shards[0]))
        await waiting.until(lambda: trimmed.SAID in runner.output, "the heap is trimmed")


async def test_close_ends_a_frozen_warm_runner(impatient: Runners) -> None:
    """Otherwise the process could not exit, since multiprocessing waits for every child at exit."""
    await impatient.warmed()
    frozen = warm(impatient)
    await freeze(frozen)
    try:
        await impatient.close()
        with suppress(TimeoutError):
            async with asyncio.timeout(DEADLINE_S):
                await frozen.exited.wait()
        assert frozen.exited.is_set()
    finally:
        frozen.kill()
        await frozen.reaped()


async def test_a_runner_that_ends_before_it_is_warm_raises(runners: Runners, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(worker.runner.warm, "run_child", slice)  # anything that returns at once
        with pytest.raises(RunnerDied, match="it exited without output"):
            await runners.take()
    async with taken(runners):  # the next call starts another runner
        pass


async def test_close_during_a_start_leaves_no_process(runners: Runners) -> None:
    """At any moment: before the fork, during it, or before the runner is warm."""
    await runners.warmed()
    await runners.close()
    for delay in (0, 0.002, 0.01, 0.02, 0.04):
        runners.prepare()
        await asyncio.sleep(delay)
        async with asyncio.timeout(DEADLINE_S):
            await runners.close()
    async with asyncio.timeout(DEADLINE_S):
        while any(process.parent != os.getpid() for process in below(os.getpid())):  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def warm(runners: Runners) -> Runner:
    """Return the warm runner without taking it."""
    assert runners.next_runner is not None
    return runners.next_runner.result()
