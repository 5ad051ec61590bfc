"""Real runner processes on a host with fake GPUs: the devices and the memory of a load, and dry runs."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from msgspec import structs

from shared.schema.memory import Usage
from shared.synthetic.models import large_vocabulary, tiny_gemma3
from tests.integration.test_runner import DEADLINE_S, answers, given, ready, taken
from tests.support.fakehosts import Device, FakeHost
from tests.support.runners import freeze
from worker.runner.failure import from_exit, from_reason
from worker.runner.process import Runner
from worker.runner.protocol import NO_GPU, Failed, Load, Measure, Measured
from worker.runner.warm import Runners

GIB, MIB = 1 << 30, 1 << 20
A, B, C = "GPU-fake-0", "GPU-fake-1", "GPU-fake-2"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    """The fake host of every runner of this module: the fork server has its environment."""
    host = FakeHost.made(tmp_path_factory.mktemp("host") / "h", GIB, GIB, GIB)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in host.environ().items():
            patched.setenv(name, value)
        yield host


@pytest.fixture
def host(machine: FakeHost, forkserver: None) -> Iterator[FakeHost]:
    """The fake host, with its GPUs empty before and after a test."""
    yield machine
    for uuid in (A, B, C):
        machine.release(uuid)
        machine.fail(uuid, None)
    machine.driver(lag_s=0.0, context_bytes=0)
    machine.has(*(Device(uuid, "Fake GPU", GIB) for uuid in (A, B, C)))
    assert used(machine) == {A: 0, B: 0, C: 0}


@pytest.fixture(scope="module")
def files(models_dir: Path) -> dict[str, Path]:
    tiny_gemma3(models_dir / "p/gemma3/gemma3-f16.gguf")
    return {path.parent.name: path for path in models_dir.rglob("*.gguf")}


@asynccontextmanager
async def started(visible: str | None = None) -> AsyncIterator[Runner]:
    """Yield a warm runner that does not outlive the block."""
    runners = Runners(10.0, visible=visible)
    try:
        async with taken(runners) as runner:
            yield runner
    finally:
        await runners.close()


async def measured(runner: Runner, load: Load) -> list[Usage]:
    await runner.send(Measure(load))
    async with asyncio.timeout(DEADLINE_S):
        message = await runner.receive()
    assert isinstance(message, Measured), (message, list(runner.output))
    return message.usage


async def refused(runner: Runner, message: Load | Measure) -> str:
    """Return the reason of a refusal, after which the runner has exited."""
    if isinstance(message, Load):
        _, answer = await answers(runner, message)
    else:
        await runner.send(message)
        async with asyncio.timeout(DEADLINE_S):
            answer = await runner.receive()
    assert isinstance(answer, Failed), answer
    async with asyncio.timeout(DEADLINE_S):
        await runner.reaped()
    return answer.reason


def used(host: FakeHost) -> dict[str, int]:
    return {device.uuid: host.used_bytes(device.uuid) for device in host.devices()}


def layers_of(runner: Runner) -> list[str]:
    """Return the device of each layer by the log of the engine; the last layer is the output."""
    lines = [line for line in runner.output if line.startswith("load_tensors: layer")]
    return [line.partition("assigned to device ")[2].partition(",")[0] for line in lines]


# ---- devices of a load


async def test_a_load_uses_memory_of_its_gpu_until_its_runner_ends(host: FakeHost, files: dict[str, Path]) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=[B], layers=[5]))
        on_b, on_host = message.usage
        assert (on_b.id, on_host.id) == (B, "CPU")
        assert used(host) == {A: 0, B: on_b.total_bytes, C: 0}
        assert on_b.weights_bytes > files["llama"].stat().st_size / 2
        await runner.stop()
        assert used(host) == {A: 0, B: 0, C: 0}


@pytest.mark.parametrize(
    ("devices", "layers", "where"),
    [
        ([A, B, C], [1, 3, 1], "0 1 1 1 2"),
        ([C, A], [2, 3], "0 0 1 1 1"),
        ([B, A, C], [1, 1, 1], "- - 0 1 2"),
        ([C, B, A], [2, 0, 2], "- 0 0 2 2"),
        ([A], [2], "- - - 0 0"),
        ([A, B], [0, 5], "1 1 1 1 1"),
    ],
)
async def test_gpus_hold_their_layers_and_the_cpu_the_first_ones(
    host: FakeHost, files: dict[str, Path], devices: list[str], layers: list[int], where: str
) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=devices, layers=layers))
        await runner.stop()
        assert layers_of(runner) == ["CPU" if on == "-" else f"CUDA{on}" for on in where.split()]
    held = {one.id: one for one in message.usage}
    assert [*held] == [*devices, "CPU"]
    for device, n_layers in zip(devices, layers, strict=True):
        assert (held[device].weights_bytes > 0) == (n_layers > 0)


async def test_the_reported_usage_equals_the_usage_of_the_gpus(host: FakeHost, files: dict[str, Path]) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=[C, A, B], layers=[1, 2, 1]))
        assert used(host) == {one.id: one.total_bytes for one in message.usage if one.id != "CPU"}


@pytest.mark.parametrize("visible", [None, NO_GPU, A])
async def test_a_load_on_the_cpu_uses_no_gpu_memory(
    host: FakeHost, files: dict[str, Path], visible: str | None
) -> None:
    """Also if a GPU is visible to the engine."""
    host.driver(lag_s=0.0, context_bytes=MIB)
    async with started(visible) as runner:
        load = given(files["llama"], n_ctx=1024)
        assert (usage := await measured(runner, load)) == (await ready(runner, load)).usage
        assert [one.id for one in usage] == ["CPU"]
        assert usage[0].weights_bytes == pytest.approx(files["llama"].stat().st_size, rel=0.1)
        assert used(host) == {A: 0, B: 0, C: 0}


async def test_a_warm_runner_uses_gpu_memory_only_after_a_dry_run(host: FakeHost, files: dict[str, Path]) -> None:
    host.driver(lag_s=0.0, context_bytes=MIB)
    load = given(files["llama"], devices=[B], layers=[5])
    async with started(B) as runner:
        assert used(host) == {A: 0, B: 0, C: 0}
        (would_take, _) = await measured(runner, load)
        assert used(host) == {A: 0, B: MIB, C: 0}
        await ready(runner, load)
        assert used(host) == {A: 0, B: MIB + would_take.total_bytes, C: 0}


async def test_a_runner_warmed_for_a_gpu_loads_there(host: FakeHost, files: dict[str, Path]) -> None:
    async with started(B) as runner:
        message = await ready(runner, given(files["llama"], devices=[B], layers=[5]))
        assert used(host) == {A: 0, B: message.usage[0].total_bytes, C: 0}


async def test_a_kv_cache_without_offload_is_on_the_host(host: FakeHost, files: dict[str, Path]) -> None:
    context_bytes = {}
    for offload in (True, False):
        async with started() as runner:
            load = given(files["llama"], devices=[A, B], layers=[2, 2], offload_kqv=offload)
            message = await ready(runner, load)
            assert message.config.offload_kv_cache_to_gpu is offload
            context_bytes[offload] = {one.id: one.context_bytes for one in message.usage}
    assert context_bytes[False][A] == context_bytes[False][B] == 0
    assert min(context_bytes[True].values()) > 0
    assert context_bytes[False]["CPU"] == sum(context_bytes[True].values())


# ---- missing GPUs and memory


@pytest.mark.parametrize("asks", [Load, Measure])
@pytest.mark.parametrize("visible", [None, A])
async def test_an_invisible_gpu_does_not_become_a_load_on_the_cpu(
    host: FakeHost, files: dict[str, Path], asks: type, visible: str | None
) -> None:
    """The GPU is lost, or the runner was started for another one."""
    host.fail(B, "GpuIsLost")
    load = given(files["llama"], devices=[B], layers=[5])
    async with started(visible) as runner:
        assert B in await refused(runner, load if asks is Load else Measure(load))


async def test_memory_of_another_runner_is_free_after_its_end(host: FakeHost, files: dict[str, Path]) -> None:
    load = given(files["llama"], devices=[A], layers=[5])
    async with started() as first:
        (held, _) = (await ready(first, load)).usage
        host.has(Device(A, "Fake GPU", held.total_bytes * 3 // 2), *host.devices()[1:])
        async with started() as second:
            code, _ = from_reason(await refused(second, load))
            assert code == "insufficient_memory"
        assert used(host) == {A: held.total_bytes, B: 0, C: 0}
    async with started() as third:
        await ready(third, load)


@pytest.mark.parametrize("short", ["weights_bytes", "context_bytes", "compute_bytes"])
async def test_any_allocation_without_room_is_insufficient_memory(
    host: FakeHost, files: dict[str, Path], short: str
) -> None:
    load = given(files["llama"], devices=[B, C], layers=[2, 3], n_ctx=1024)
    async with started() as runner:
        (_, on_c, _) = await measured(runner, load)
        last = {"weights_bytes": 0, "context_bytes": on_c.weights_bytes}
        last["compute_bytes"] = on_c.weights_bytes + on_c.context_bytes
        host.take(C, GIB - last[short] - getattr(on_c, short) + 1)
        code, sentence = from_reason(await refused(runner, load))
    assert code == "insufficient_memory", sentence
    assert used(host)[B] == 0


async def test_no_room_to_compute_a_token_is_insufficient_memory(host: FakeHost, files: dict[str, Path]) -> None:
    """What CUDA takes while a batch is computed is not in the engine's buffers, and llama.cpp aborts without it."""
    host.driver(row_bytes=MIB)
    load = given(files["llama"], devices=[A], layers=[5])
    async with started() as runner:
        (on_a, _) = await measured(runner, load)
        host.take(A, GIB - on_a.total_bytes - MIB + 1)
        _, answer = await answers(runner, load)
        assert answer is None
        async with asyncio.timeout(DEADLINE_S):
            await runner.reaped()
        code, sentence = from_exit(runner.status, runner.output)
    assert (code, sentence) == ("insufficient_memory", "CUDA error: out of memory")
    host.release(A)
    assert used(host)[A] == 0


# ---- dry runs

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {"file": "llama"},
    "long": {"file": "llama", "n_ctx": 3000, "n_batch": 2048, "n_ubatch": 512},
    "no flash attention": {"file": "llama", "n_ctx": 1024, "flash_attn": False},
    "parallel": {"file": "llama", "n_ctx": 1024, "parallel": 4, "n_seq_max": 16, "n_outputs_max": 32},
    "quantized cache": {"file": "llama", "n_ctx": 1024, "kv_type": "q8_0"},
    "kv on the host": {"file": "llama", "n_ctx": 1024, "offload_kqv": False},
    "moe": {"file": "moe", "moe": True, "expert_override": ("qwen3moe.expert_used_count", 3)},
    "sliding window": {"file": "gemma3", "n_ctx": 4096, "n_batch": 512, "n_ubatch": 512},
    "embedding": {"file": "embedding", "embedding": True},
    "encoder": {"file": "bert", "embedding": True, "n_seq_max": 32},
}
BLOCKS = {"llama": 4, "moe": 4, "gemma3": 12, "embedding": 2, "bert": 2}
PLACES: dict[str, tuple[list[str], list[int]]] = {
    "cpu": ([], []),
    "gpu": ([B], [0]),
    "gpus": ([C, A], [1, 0]),
    "partly": ([A, B], [1, 1]),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("words", CONFIGURATIONS)
async def test_a_dry_run_gives_the_memory_of_the_load(
    host: FakeHost, files: dict[str, Path], words: str, place: str
) -> None:
    """Exact to the byte, except for the difference on several GPUs that `worker.engine.llama.DryRuns` describes.  A dry
    run needs no free memory, and the engine can load after it."""
    configuration = dict(CONFIGURATIONS[words])
    name = configuration.pop("file")
    devices, layers = PLACES[place]
    if place.startswith("gpu"):
        layers = [*layers[:-1], BLOCKS[name] + 1 - sum(layers)]  # all layers
    load = given(files[name], devices=devices, layers=layers, **configuration)
    for uuid in devices:
        host.take(uuid, GIB)
    async with started() as runner:
        would_take = await measured(runner, load)
        assert await measured(runner, load) == would_take
        for uuid in devices:
            assert [holder.pid for holder in host.holders(uuid)] == [1]
            host.release(uuid)
        usage = (await ready(runner, load)).usage
        assert used(host) == {A: 0, B: 0, C: 0} | {t.id: t.total_bytes for t in usage if t.id != "CPU"}
    if place == "gpus":
        of_a_batch = load.n_ubatch * 64 * 4  # bytes of its activations, 64 numbers for each token
        for one, other in zip(usage, would_take, strict=True):
            assert abs(one.compute_bytes - other.compute_bytes) <= 2 * of_a_batch
        usage = [structs.replace(one, compute_bytes=0) for one in usage]
        would_take = [structs.replace(one, compute_bytes=0) for one in would_take]
    assert usage == would_take


async def test_different_loads_are_measured_in_sequence(host: FakeHost, files: dict[str, Path]) -> None:
    async with started() as runner:
        usages = [
            (await measured(runner, given(files["llama"], devices=[A, B], layers=layers, n_ctx=n_ctx)))[0]
            for layers, n_ctx in (([1, 4], 256), ([3, 2], 256), ([3, 2], 1024))
        ]
    assert usages[0].weights_bytes < usages[1].weights_bytes == usages[2].weights_bytes
    assert usages[1].context_bytes * 4 == usages[2].context_bytes


async def test_the_engine_log_of_a_load_excludes_dry_runs(host: FakeHost, tmp_path: Path) -> None:
    """A dry run logs buffers of size zero.  This one takes longer than lines are held back in a batch."""
    load = given(*large_vocabulary(tmp_path / "m.gguf", tokens=100_000), devices=[A], layers=[2])
    async with started() as runner:
        await measured(runner, load)
        await ready(runner, load)
        async with asyncio.timeout(DEADLINE_S):
            while (
                "reserve took" not in "".join(runner.output).partition("no_alloc              = 0")[2]
            ):  # near its end
                await runner.output.grown.wait()
                runner.output.grown.clear()
        text = "".join(runner.output)
        assert [text.count(words) for words in ("loaded meta data", "no_alloc", "KV buffer size")] == [1, 1, 1]


@pytest.mark.parametrize("made", ["fifo", "garbage", "missing"])
async def test_a_dry_run_of_an_invalid_file_fails_with_a_reason(host: FakeHost, tmp_path: Path, made: str) -> None:
    path = tmp_path / "m.gguf"
    if made == "fifo":
        os.mkfifo(path)
    elif made == "garbage":
        path.write_bytes(bytes(range(256)) * 64)
    async with started() as runner:
        code, sentence = from_reason(await refused(runner, Measure(given(path, devices=[A], layers=[1]))))
        assert code == "invalid_model_file"
        assert sentence
        assert (made != "garbage") or any("invalid magic" in line for line in runner.output)


async def test_a_warm_runner_reports_that_its_engine_has_cuda(host: FakeHost) -> None:
    runners = Runners(10.0, visible=None)
    try:
        await runners.warmed()
        assert runners.engine
        assert runners.engine.backends == ["CUDA", "CPU"]
    finally:
        await runners.close()


# ---- the fake host

ASK = """
import pynvml
pynvml.nvmlInit()
for i in range(pynvml.nvmlDeviceGetCount()):
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(i)
        memory = pynvml.nvmlDeviceGetMemoryInfo(handle)
        pids = [one.pid for one in pynvml.nvmlDeviceGetComputeRunningProcesses(handle)]
        print(pynvml.nvmlDeviceGetUUID(handle), memory.total, memory.free, memory.used, *pids)
    except pynvml.NVMLError as e:
        print(type(e).__name__)
"""


def nvml(host: FakeHost) -> list[str]:
    """Return the NVML readings of each GPU in a process on this host."""
    result = subprocess.run(
        [sys.executable, "-c", ASK], env=os.environ | host.environ(), capture_output=True, text=True
    )
    return result.stdout.splitlines() if result.returncode == 0 else result.stderr.splitlines()[-1:]


async def test_nvml_shows_memory_of_runners_and_other_programs(host: FakeHost, files: dict[str, Path]) -> None:
    host.take(A, MIB, pid=4242)
    host.fail(C, "GpuIsLost")
    async with started() as runner:
        (on_b, _) = (await ready(runner, given(files["llama"], devices=[B], layers=[5]))).usage
        assert await asyncio.to_thread(nvml, host) == [
            f"{A} {GIB} {GIB - MIB} {MIB} 4242",
            f"{B} {GIB} {GIB - on_b.total_bytes} {on_b.total_bytes} {runner.pid}",
            "NVMLError_GpuIsLost",
        ]
        await freeze(runner)  # the reading does not depend on the runner
        assert used(host)[B] == on_b.total_bytes
    host.fail("host", "DriverNotLoaded")
    assert await asyncio.to_thread(nvml, host) == ["pynvml.NVMLError_DriverNotLoaded"]
    host.fail("host", None)


def test_the_driver_frees_memory_of_a_dead_process_later(tmp_path: Path) -> None:
    host = FakeHost.made(tmp_path / "h", MIB)
    host.driver(lag_s=60.0, context_bytes=0)
    code = f"from tests.support.fakehosts import FakeHost; assert FakeHost.here().change('{A}', {MIB})"
    subprocess.run([sys.executable, "-c", code], env=os.environ | host.environ(), check=True)
    assert used(host) == {A: MIB}
    assert not host.change(A, 1)
    host.driver(lag_s=0.0, context_bytes=0)
    assert used(host) == {A: 0}
    assert host.change(A, MIB)
    assert not host.change(A, 1)
