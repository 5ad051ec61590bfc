"""`python -m bench.gpu`: the speed of loading a model onto a GPU in each of llama.cpp's modes to read a file, compared
with the speed of the disk and of copies to the GPU.  The report is docs/benchmarks/gpu.md; all figures are in
bench/out/gpu.json.

It measures in one run, on an idle machine, on the GPU with the most free memory:

- disk: the file read from start to end, cold, through the page cache and past it (O_DIRECT);
- memory: the same, warm;
- host to device: copies from ordinary memory, and from memory that is locked for the GPU;
- a 4 GB model loaded by `worker.engine.llama` in a fresh process, cold and warm, in each of MODES;
- the same by the service, over HTTP.

The service locks llama.cpp's mapping of the file while it is copied, where it can
(docs/decisions/0020-copy-to-gpus-from-page-locked-mappings.md).  The other processes do what llama.cpp does alone.

How to decide from the table which mode `worker.engine.llama` should use for GPUs elsewhere (`Loaded._load_model`):

A load is mainly a copy of the file.  The column "share of the possible" is the speed of the load divided by that of the
slowest part of the bytes' path: 1 is the optimum.  The cold rows matter more: the first load of a model is cold, and
takes longest.  The mode is `none` now, since `mmap` reports no progress until the whole file is read.

- Change to another mode if its cold total is more than a tenth less than that of `none`, and its warm total is not more
  than a tenth larger.
- `direct` does not use the page cache and leaves nothing in it for the next load: it must be as fast as a warm `none`.
- For `mmap`, consider what is lost.  If `worker.engine.prefetch` reads ahead, as on the CPU, it can report progress.
- If the service is slower than its mode, the cause is in the service, not in the mode.

It starts the processes `python -m bench.gpu bandwidth GPU` and `python -m bench.gpu load MODE GPU KEY`.
"""

from __future__ import annotations

import datetime
import json
import mmap
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import llama_cpp  # noqa: F401  # before numpy: see bench/__init__.py
import msgspec
import pynvml
from msgspec import Struct

from bench import pagecache
from bench.__main__ import drop_from_cache, keep, machine, say
from bench.report import PHASES, table
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, Failure, service
from cli import devredis
from shared import __version__
from shared.schema.http import LoadRequest
from shared.settings import Settings
from shared.synthetic import models as synthetic
from worker.catalog.catalog import Catalog
from worker.memory.nvml import Driver
from worker.runner.parameters import plan
from worker.runner.protocol import Load

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench/out"
MODELS = OUT / "gpu-models"
REPORT = ROOT / "docs/benchmarks/gpu.md"
BIG, TINY = "loadstone/bench-gpu", "loadstone/bench-gpu-tiny"
MODEL, TINY_MODEL = MODELS / BIG / "bench-gpu-Q8_0.gguf", MODELS / TINY / "bench-gpu-tiny-f16.gguf"
GB = 4
NEEDED_BYTES = 6 << 30

Mode = Literal["none", "mmap", "direct"]
MODES: dict[Mode, str] = {"none": "NONE", "mmap": "MMAP", "direct": "DIRECT_IO"}  # llama.cpp's LLAMA_LOAD_MODE_*
Cache = Literal["cold", "warm"]
CACHES: tuple[Cache, ...] = ("cold", "warm")
ROUNDS = 3
BLOCK_BYTES = 8 << 20  # of a read
COPIED_BYTES, COPIES = 1 << 30, 5
PROCESS_S = 600.0
REST_S = 5.0  # between loads of the service, for the next runner to warm up


class Bandwidth(Struct, frozen=True, kw_only=True):
    """Bytes per second, medians."""

    disk: float
    disk_direct: float | None  # None: the file system does not support O_DIRECT
    memory: float
    pageable: float
    pinned: float

    def possible(self, mode: Mode | None, cache: Cache) -> float:
        """Return the highest possible rate of a load: that of the slowest part of the bytes' path."""
        disk = max(self.disk, self.disk_direct or 0)
        return min(self.pinned, disk if cache == "cold" or mode == "direct" else self.memory)


class Run(Struct, frozen=True, kw_only=True):
    """One load; `mode` is None for the service, which has its own mode."""

    mode: Mode | None
    cache: Cache
    residency: float  # the share of the file that was in the page cache just before
    total_s: float  # of the load; for the service from the request to the reply
    phases_s: dict[str, float]

    @property
    def model_s(self) -> float:
        """Return metadata and weights together, since `mmap` reads the file before the first tensor is reported."""
        return self.phases_s["metadata"] + self.phases_s["weights"]


class Measured(Struct, frozen=True, kw_only=True):
    """`start_s` is `Run.model_s` of a tiny model: mostly the time to create the CUDA context."""

    about: dict[str, str]
    model_bytes: int
    bandwidth: Bandwidth
    start_s: float
    runs: list[Run]


# ---- the measurements


def measure() -> Measured:
    driver = Driver()
    ids = [id_ for id_ in driver.by_index if id_]
    if not ids:
        raise Failure("NVML lists no GPU that CUDA can use as a whole")
    gpu = max(driver.read(ids), key=lambda one: one.free_bytes)
    if gpu.free_bytes < NEEDED_BYTES:
        raise Failure(f"this needs {NEEDED_BYTES:,} free bytes of a GPU; {gpu.free_bytes:,} are free")
    if not is_complete():
        say(f"a model of {GB} GB")
        synthetic.big(MODEL, GB)
    synthetic.tiny_llama(TINY_MODEL)
    about = {**machine(), **about_gpu(gpu.id, gpu.name)}
    say("bandwidth of the disk and of copies to the GPU")
    rates = bandwidth(gpu.id)
    say("a tiny model")
    start_s = tiny_s(gpu.id)
    runs = mode_runs(gpu.id) + service_runs(gpu.id)
    return Measured(about=about, model_bytes=MODEL.stat().st_size, bandwidth=rates, start_s=start_s, runs=runs)


def is_complete() -> bool:
    """Return whether an earlier run has written the model: writing is atomic, so its size shows that it is complete."""
    return MODEL.is_file() and abs(MODEL.stat().st_size / (GB * 1e9) - 1) < 0.1


def bandwidth(gpu: str) -> Bandwidth:
    copied = in_process("bandwidth", gpu)

    def rate(prepare: Callable[[Path], object], flags: int = 0) -> float:
        rates = []
        for _ in range(ROUNDS):
            prepare(MODEL)
            rates.append(read_rate(flags))
        return statistics.median(rates)

    try:
        direct = rate(drop_from_cache, os.O_DIRECT)
    except OSError:
        direct = None
    disk = rate(drop_from_cache)
    return Bandwidth(  # the file is in the page cache now
        disk=disk,
        disk_direct=direct,
        memory=rate(pagecache.residency),
        pageable=statistics.median(copied["pageable"]),
        pinned=statistics.median(copied["pinned"]),
    )


def read_rate(flags: int = 0) -> float:
    """Read the file from start to end; return the bytes per second."""
    fd = os.open(MODEL, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # O_DIRECT requires page-aligned memory: open(2)
            left = size = os.fstat(fd).st_size
            started = time.perf_counter()
            while left > 0:
                left -= os.readv(fd, [block])
            return size / (time.perf_counter() - started)
    finally:
        os.close(fd)


def tiny_s(gpu: str) -> float:
    """Measure `Run.model_s` of a tiny model.  The first load reads libraries from the disk and is not counted."""
    loads: list[dict[str, float]] = [in_process("load", "none", gpu, TINY) for _ in range(1 + ROUNDS)]
    return statistics.median(load["metadata"] + load["weights"] for load in loads[1:])


def mode_runs(gpu: str) -> list[Run]:
    """Load by each mode in turn, each in a fresh process; a temporary slowdown of the machine affects all modes."""
    runs = []
    for cache in CACHES:
        for n in range(ROUNDS):
            for mode in [*MODES][n % len(MODES) :] + [*MODES][: n % len(MODES)]:
                say(f"{cache}, {mode}")
                residency = prepare_cache(cache)
                phases = in_process("load", mode, gpu, BIG)
                total_s = sum(phases.values())
                runs.append(Run(mode=mode, cache=cache, residency=residency, total_s=total_s, phases_s=phases))
    return runs


def service_runs(gpu: str) -> list[Run]:
    runs = []
    with service(MODELS, OUT, LOADSTONE_DEVICES=f"{gpu},cpu") as running:
        running.reconnect()
        running.load(BIG)
        for cache in CACHES:
            for _ in range(ROUNDS):
                say(f"{cache}, service")
                time.sleep(REST_S)
                residency = prepare_cache(cache)
                running.reconnect()
                load = running.load(BIG)
                runs.append(
                    Run(mode=None, cache=cache, residency=residency, total_s=load.total_s, phases_s=load.phases_s)
                )
    return runs


def prepare_cache(cache: Cache) -> float:
    """Drop or read the model's file; return the share of it in the page cache."""
    if cache == "cold":
        return drop_from_cache(MODEL)
    read_rate()
    return pagecache.residency(MODEL)


def in_process(*words: str) -> Any:
    """Run this module in a process with these arguments; return its reply.  Raises Failure."""
    log = OUT / "gpu.log"
    with log.open("ab") as stderr:
        done = subprocess.run(
            [sys.executable, "-m", "bench.gpu", *words],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=stderr,
            timeout=PROCESS_S,
            check=False,
        )
    if done.returncode != 0:
        raise Failure(f"`python -m bench.gpu {' '.join(words)}` failed; see {log}")
    return json.loads(done.stdout)


def about_gpu(id_: str, name: str) -> dict[str, str]:
    handle = pynvml.nvmlDeviceGetHandleByUUID(id_)  # Driver has initialised NVML
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        link = f"PCIe {generation} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)} at most"
    except pynvml.NVMLError as e:  # a GPU that is part of the processor has no link
        link = f"PCIe: {e}"
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
    df = subprocess.run(["df", "--output=fstype,source", MODELS], capture_output=True, text=True, check=True).stdout
    return {
        "GPU": f"{name}, {memory:.0f} GiB, {link}",
        "driver": f"{pynvml.nvmlSystemGetDriverVersion()}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}; nvcc {nvcc()}",
        "files": " on ".join(df.splitlines()[1].split()),
        "Loadstone": __version__,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def nvcc() -> str:
    """Return the version of the toolkit on PATH, most likely the one that the engine was built with."""
    if shutil.which("nvcc") is None:
        return "is not on PATH"
    version = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    match = re.search(r"release ([\d.]+)", version)
    return match[1] if match else "of an unknown version"


# ---- in separate processes


def copy(gpu: str) -> dict[str, list[float]]:
    """Return the bytes per second of copies to the GPU, from each kind of memory."""
    from bench.cuda import GPU, pageable  # imported here: in other processes the engine must use CUDA first

    cuda = GPU(gpu)
    rates = {}
    with cuda.allocated(COPIED_BYTES) as device:
        for name, memory in (("pageable", pageable), ("pinned", cuda.pinned)):
            with memory(COPIED_BYTES) as host:
                cuda.copy_s(device, host, COPIED_BYTES)  # the first copy wakes the GPU
                rates[name] = [COPIED_BYTES / cuda.copy_s(device, host, COPIED_BYTES) for _ in range(COPIES)]
    return rates


def load(mode: Mode, gpu: str, key: str) -> dict[str, float]:
    """Load a model with all layers on the GPU; return the seconds of each phase."""
    from worker.engine import llama  # imported here: only this process loads a model

    load_mode = getattr(llama.lib, f"LLAMA_LOAD_MODE_{MODES[mode]}")
    load_model = llama._load_model

    def in_mode(load: Load, params: Any, log: llama.Log) -> Any:
        params.load_mode = load_mode
        return load_model(load, params, log)

    llama._load_model = in_mode
    vars(llama)["lockable_bytes"] = lambda: 0  # nothing is read ahead of llama.cpp
    to_load = msgspec.structs.replace(load_of(key, gpu), is_whole=False)  # and nothing is locked for it
    loaded = llama.Loaded(to_load, llama.initialise(gpu), lambda _phase, _bytes: None)
    (on_gpu, *_) = loaded.ready(to_load).usage
    if on_gpu.id != gpu or on_gpu.weights_bytes < to_load.total_bytes / 2:
        raise Failure(f"the model was not loaded onto the GPU: {on_gpu}")
    return {str(phase): seconds for phase, seconds in loaded.timing.items()}


def load_of(key: str, gpu: str) -> Load:
    """Return the load that a worker would send to a runner for the request that the service gets."""
    with tempfile.TemporaryDirectory() as directory:
        catalog = Catalog([MODELS], Path(directory, "cache"))
        catalog.look()
        while catalog.is_shallow:
            catalog.deepen(1.0)
        model = next(model for model in catalog.models() if model.key == key)
    assert model.dimensions
    request = LoadRequest(model=key, context_length=CONTEXT_LENGTH, eval_batch_size=EVAL_BATCH_SIZE)
    return plan(request, model, Settings(models_dir=MODELS), [gpu], [model.dimensions.block_count + 1])


# ---- the report


def markdown(measured: Measured) -> str:
    speeds = measured.bandwidth
    direct = "not supported" if speeds.disk_direct is None else f"{speeds.disk_direct / 1e9:.2f}"
    lines = [
        "# Loading onto a GPU",
        "",
        "Written by `make bench-gpu`; [bench/gpu.py](../../bench/gpu.py) explains how to read it.",
        "",
        *(f"- {name}: {value}" for name, value in measured.about.items()),
        "",
        "## Speed of the machine",
        "",
        *table(
            ["GB/s, medians", ""],
            [
                [f"disk, the file read in blocks of {BLOCK_BYTES >> 20} MiB, cold", f"{speeds.disk / 1e9:.2f}"],
                ["the same past the page cache (O_DIRECT)", direct],
                ["the same from the page cache", f"{speeds.memory / 1e9:.2f}"],
                ["host to device, ordinary memory", f"{speeds.pageable / 1e9:.2f}"],
                ["host to device, locked memory", f"{speeds.pinned / 1e9:.2f}"],
            ],
        ),
        "",
        f"## A model of {measured.model_bytes / 1e9:.2f} GB, Q8_0, all layers on the GPU",
        "",
        f"Medians of {ROUNDS}; a context of {CONTEXT_LENGTH:,} tokens. Model is metadata and weights; for a tiny model "
        f"they take {measured.start_s:.2f} s (mostly the CUDA context), and the speed is the file's bytes divided by "
        "the rest. The service's total is the HTTP request; the others are separate processes, timed once the engine "
        "has started.",
        "",
        *table(
            ["cache", "by", "total, s", "model, s", "GB/s", "possible, GB/s", "share of the possible"],
            [_row(measured, cache, mode) for cache in CACHES for mode in (*MODES, None)],
        ),
        "",
        "All loads, in the order of the runs:",
        "",
        *table(["s", "by", "in cache before", "total", *PHASES], [_each(run) for run in measured.runs]),
    ]
    return "\n".join(lines) + "\n"


def _row(measured: Measured, cache: Cache, mode: Mode | None) -> list[str]:
    runs = [run for run in measured.runs if (run.cache, run.mode) == (cache, mode)]
    model_s = statistics.median(run.model_s for run in runs)
    possible = measured.bandwidth.possible(mode, cache)
    cells = [cache, mode or "the service", f"{statistics.median(run.total_s for run in runs):.2f}", f"{model_s:.2f}"]
    if model_s <= measured.start_s:
        return [*cells, "", f"{possible / 1e9:.2f}", ""]
    speed = measured.model_bytes / (model_s - measured.start_s)
    return [*cells, f"{speed / 1e9:.2f}", f"{possible / 1e9:.2f}", f"{speed / possible:.2f}"]


def _each(run: Run) -> list[str]:
    known = run.phases_s | {"model": run.model_s}
    phases = [f"{known[phase]:.3f}" if phase in known else "" for phase in PHASES]
    return [run.cache, run.mode or "the service", f"{run.residency:.1%}", f"{run.total_s:.3f}", *phases]


# ---- the program


def main() -> int:
    match sys.argv[1:]:
        case []:
            pass
        case ["bandwidth", gpu]:
            print(json.dumps(copy(gpu)))
            return 0
        case ["load", ("none" | "mmap" | "direct") as mode, gpu, key]:
            print(json.dumps(load(mode, gpu, key)))
            return 0
        case _:
            print("usage: python -m bench.gpu", file=sys.stderr)
            return 2
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    try:
        measured = measure()
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    keep("gpu", msgspec.to_builtins(measured))
    REPORT.parent.mkdir(parents=True, exist_ok=True)
    REPORT.write_text(report := markdown(measured))
    print(report)
    return 0


if __name__ == "__main__":
    sys.exit(main())
