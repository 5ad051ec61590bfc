"""Real runner processes on a host with GPUs that are none: where a model goes, what it takes there, and what a runner
says that it would take."""

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
from worker.runner.failure import from_reason
from worker.runner.process import Runner
from worker.runner.protocol import NO_GPU, Failed, Load, Measure, Measured
from worker.runner.warm import Runners

GIB, MIB = 1 << 30, 1 << 20
A, B, C = "GPU-fake-0", "GPU-fake-1", "GPU-fake-2"


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FakeHost]:
    """The host of every runner here: what they are forked from has its environment."""
    host = FakeHost.made(tmp_path_factory.mktemp("host") / "h", GIB, GIB, GIB)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in host.environ().items():
            patched.setenv(name, value)
        yield host


@pytest.fixture
def host(machine: FakeHost, forkserver: None) -> Iterator[FakeHost]:
    """That host, with nothing on its GPUs before and after."""
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
    """A warm runner that does not outlive the block."""
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
    return message.taken


async def refused(runner: Runner, message: Load | Measure) -> str:
    """The reason; the runner is gone after it."""
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
    """Where the engine says that it put each layer; the last is the output."""
    lines = [line for line in runner.output if line.startswith("load_tensors: layer")]
    return [line.partition("assigned to device ")[2].partition(",")[0] for line in lines]


# ---- where a model goes


async def test_a_load_on_one_of_two_gpus_takes_memory_there_alone_until_its_runner_ends(
    host: FakeHost, files: dict[str, Path]
) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=[B], layers=[5]))
        on_b, on_host = message.taken
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
async def test_each_gpu_takes_the_layers_that_it_was_given_and_the_cpu_the_first_others(
    host: FakeHost, files: dict[str, Path], devices: list[str], layers: list[int], where: str
) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=devices, layers=layers))
        await runner.stop()
        assert layers_of(runner) == ["CPU" if on == "-" else f"CUDA{on}" for on in where.split()]
    held = {taken.id: taken for taken in message.taken}
    assert [*held] == [*devices, "CPU"]
    for device, n_layers in zip(devices, layers, strict=True):
        assert (held[device].weights_bytes > 0) == (n_layers > 0)


async def test_what_the_engine_says_it_took_is_what_the_gpus_lost(host: FakeHost, files: dict[str, Path]) -> None:
    async with started() as runner:
        message = await ready(runner, given(files["llama"], devices=[C, A, B], layers=[1, 2, 1]))
        assert used(host) == {taken.id: taken.total_bytes for taken in message.taken if taken.id != "CPU"}


@pytest.mark.parametrize("visible", [None, NO_GPU, A])
async def test_a_load_on_the_cpu_touches_no_gpu(host: FakeHost, files: dict[str, Path], visible: str | None) -> None:
    """Also where the engine sees one."""
    host.driver(lag_s=0.0, context_bytes=MIB)
    async with started(visible) as runner:
        load = given(files["llama"], n_ctx=1024)
        assert (taken := await measured(runner, load)) == (await ready(runner, load)).taken
        assert [one.id for one in taken] == ["CPU"]
        assert taken[0].weights_bytes == pytest.approx(files["llama"].stat().st_size, rel=0.1)
        assert used(host) == {A: 0, B: 0, C: 0}


async def test_a_warm_runner_holds_nothing_of_its_gpu_and_one_that_used_it_what_the_driver_takes(
    host: FakeHost, files: dict[str, Path]
) -> None:
    host.driver(lag_s=0.0, context_bytes=MIB)
    load = given(files["llama"], devices=[B], layers=[5])
    async with started(B) as runner:
        assert used(host) == {A: 0, B: 0, C: 0}
        (would_take, _) = await measured(runner, load)
        assert used(host) == {A: 0, B: MIB, C: 0}
        await ready(runner, load)
        assert used(host) == {A: 0, B: MIB + would_take.total_bytes, C: 0}


async def test_a_runner_that_was_warmed_for_its_gpu_loads_there(host: FakeHost, files: dict[str, Path]) -> None:
    async with started(B) as runner:
        message = await ready(runner, given(files["llama"], devices=[B], layers=[5]))
        assert used(host) == {A: 0, B: message.taken[0].total_bytes, C: 0}


async def test_where_the_kv_cache_is_not_offloaded_it_is_on_the_host_and_told_so(
    host: FakeHost, files: dict[str, Path]
) -> None:
    found = {}
    for offload in (True, False):
        async with started() as runner:
            load = given(files["llama"], devices=[A, B], layers=[2, 2], offload_kqv=offload)
            message = await ready(runner, load)
            assert message.config.offload_kv_cache_to_gpu is offload
            found[offload] = {taken.id: taken.context_bytes for taken in message.taken}
    assert found[False][A] == found[False][B] == 0
    assert min(found[True].values()) > 0
    assert found[False]["CPU"] == sum(found[True].values())


# ---- what is not there


@pytest.mark.parametrize("asks", [Load, Measure])
@pytest.mark.parametrize("visible", [None, A])
async def test_a_gpu_that_the_engine_does_not_see_is_no_load_on_the_cpu(
    host: FakeHost, files: dict[str, Path], asks: type, visible: str | None
) -> None:
    """One that was lost, and one that the runner was not given."""
    host.fail(B, "GpuIsLost")
    load = given(files["llama"], devices=[B], layers=[5])
    async with started(visible) as runner:
        assert B in await refused(runner, load if asks is Load else Measure(load))


async def test_memory_that_another_runner_holds_is_out_of_memory_until_that_ends(
    host: FakeHost, files: dict[str, Path]
) -> None:
    load = given(files["llama"], devices=[A], layers=[5])
    async with started() as first:
        (held, _) = (await ready(first, load)).taken
        host.has(Device(A, "Fake GPU", held.total_bytes * 3 // 2), *host.devices()[1:])
        async with started() as second:
            code, _ = from_reason(await refused(second, load))
            assert code == "insufficient_memory"
        assert used(host) == {A: held.total_bytes, B: 0, C: 0}
    async with started() as third:
        await ready(third, load)


@pytest.mark.parametrize("short", ["weights_bytes", "context_bytes", "compute_bytes"])
async def test_memory_that_somebody_else_holds_is_out_of_memory_whatever_was_to_go_there(
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


# ---- what a load would take

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "dense": {"file": "llama"},
    "long": {"file": "llama", "n_ctx": 3000, "n_batch": 2048, "n_ubatch": 512},
    "no flash attention": {"file": "llama", "n_ctx": 1024, "flash_attn": False},
    "parallel": {"file": "llama", "n_ctx": 1024, "n_seq_max": 4},
    "kv on the host": {"file": "llama", "n_ctx": 1024, "offload_kqv": False},
    "moe": {"file": "moe", "moe": True, "expert_override": ("qwen3moe.expert_used_count", 3)},
    "sliding window": {"file": "gemma3", "n_ctx": 4096, "n_batch": 512, "n_ubatch": 512},
    "embedding": {"file": "embedding", "embedding": True},
    "encoder": {"file": "bert", "embedding": True},
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
async def test_what_a_load_would_take_is_what_it_takes(
    host: FakeHost, files: dict[str, Path], words: str, place: str
) -> None:
    """To the byte, but for what `worker.engine.llama.measure` says of several GPUs; and saying so needs no room, and
    leaves the engine fit to load."""
    configuration = dict(CONFIGURATIONS[words])
    name = configuration.pop("file")
    devices, layers = PLACES[place]
    if place.startswith("gpu"):
        layers = [*layers[:-1], BLOCKS[name] + 1 - sum(layers)]  # all of them
    load = given(files[name], devices=devices, layers=layers, **configuration)
    for uuid in devices:
        host.take(uuid, GIB)
    async with started() as runner:
        would_take = await measured(runner, load)
        assert await measured(runner, load) == would_take
        for uuid in devices:
            assert [holder.pid for holder in host.holders(uuid)] == [1]
            host.release(uuid)
        taken = (await ready(runner, load)).taken
        assert used(host) == {A: 0, B: 0, C: 0} | {t.id: t.total_bytes for t in taken if t.id != "CPU"}
    if place == "gpus":
        of_a_batch = load.n_ubatch * 64 * 4  # bytes of its activations, 64 numbers for each token
        for one, other in zip(taken, would_take, strict=True):
            assert abs(one.compute_bytes - other.compute_bytes) <= 2 * of_a_batch
        taken = [structs.replace(one, compute_bytes=0) for one in taken]
        would_take = [structs.replace(one, compute_bytes=0) for one in would_take]
    assert taken == would_take


async def test_loads_that_differ_are_measured_one_after_another(host: FakeHost, files: dict[str, Path]) -> None:
    async with started() as runner:
        found = [
            (await measured(runner, given(files["llama"], devices=[A, B], layers=layers, n_ctx=n_ctx)))[0]
            for layers, n_ctx in (([1, 4], 256), ([3, 2], 256), ([3, 2], 1024))
        ]
    assert found[0].weights_bytes < found[1].weights_bytes == found[2].weights_bytes
    assert found[1].context_bytes * 4 == found[2].context_bytes


async def test_the_engines_log_of_a_load_says_nothing_of_what_was_measured_before(
    host: FakeHost, tmp_path: Path
) -> None:
    """A dry run names buffers of no size.  This one takes longer than a bunch of lines is held back."""
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
        said = "".join(runner.output)
        assert [said.count(words) for words in ("loaded meta data", "no_alloc", "KV buffer size")] == [1, 1, 1]


@pytest.mark.parametrize("made", ["fifo", "garbage", "missing"])
async def test_what_cannot_be_loaded_cannot_be_measured_and_says_why(host: FakeHost, tmp_path: Path, made: str) -> None:
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


async def test_a_warm_runner_says_whether_its_engine_has_cuda(host: FakeHost) -> None:
    runners = Runners(10.0, visible=None)
    try:
        await runners.warmed()
        assert runners.has_cuda
    finally:
        await runners.close()


# ---- the host that they share

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
    """What NVML says of each GPU to a process there."""
    done = subprocess.run([sys.executable, "-c", ASK], env=os.environ | host.environ(), capture_output=True, text=True)
    return done.stdout.splitlines() if done.returncode == 0 else done.stderr.splitlines()[-1:]


async def test_nvml_sees_what_runners_and_others_hold(host: FakeHost, files: dict[str, Path]) -> None:
    host.take(A, MIB, pid=4242)
    host.fail(C, "GpuIsLost")
    async with started() as runner:
        (on_b, _) = (await ready(runner, given(files["llama"], devices=[B], layers=[5]))).taken
        assert await asyncio.to_thread(nvml, host) == [
            f"{A} {GIB} {GIB - MIB} {MIB} 4242",
            f"{B} {GIB} {GIB - on_b.total_bytes} {on_b.total_bytes} {runner.pid}",
            "NVMLError_GpuIsLost",
        ]
        await freeze(runner)  # a process that does nothing is asked nothing
        assert used(host)[B] == on_b.total_bytes
    host.fail("host", "DriverNotLoaded")
    assert await asyncio.to_thread(nvml, host) == ["pynvml.NVMLError_DriverNotLoaded"]
    host.fail("host", None)


def test_memory_of_a_process_that_died_stays_used_for_as_long_as_the_driver_takes(tmp_path: Path) -> None:
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
