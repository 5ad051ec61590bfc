"""`python -m bench.gpu`: how fast a model gets onto a GPU, by the ways in which llama.cpp can read a file, against what
the disk and the way to the GPU can do; written to docs/benchmarks/gpu.md, with every figure in bench/out/gpu.json.

Measured in one run, on an idle machine, on the GPU with the most free memory:

- disk: the file read from its start to its end, cold, through the page cache and past it (O_DIRECT);
- memory: the same, warm;
- host to device: copies from ordinary memory, and from memory that is locked for the GPU;
- a 4 GB model loaded by `worker.engine.llama` in a fresh process, cold and warm, in each of MODES;
- the same by the service, over HTTP.

How to decide by its table which mode `worker.engine.llama` is to use for GPUs (`Loaded._load_model`):

A load is first of all a copy of the file.  The column "of what is possible" has how fast that was, over the slowest
part of the bytes' way: 1 is as fast as can be.  The cold rows count for more: a model that is loaded for the first time
is cold, and takes longest.  It uses `none` now, since with `mmap` nothing is reported until the whole file is read.

- Another mode is worth a change where its total is less than that of `none` by more than a tenth, cold, and not more by
  more than a tenth, warm.
- `direct` does not find what is in the page cache, and leaves nothing there for the next load: it must be as fast as
  `none` is warm.
- For `mmap` it must be weighed what is lost.  Read ahead by `worker.engine.prefetch`, as on the CPU, its progress can
  be told.
- Where the service is slower than its mode, the fault is the service's and not the mode's.

`python -m bench.gpu bandwidth GPU` and `python -m bench.gpu load MODE GPU KEY` are the processes that it starts.
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

import msgspec
import pynvml
from msgspec import Struct

from bench import pagecache
from bench.__main__ import keep, machine, made_cold, say
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
REST_S = 5.0  # between loads of the service: the next runner gets warm


class Bandwidth(Struct, frozen=True, kw_only=True):
    """Bytes per second, medians."""

    disk: float
    disk_direct: float | None  # None: this file system has no O_DIRECT
    memory: float
    pageable: float
    pinned: float

    def possible(self, mode: Mode | None, cache: Cache) -> float:
        """What a file's bytes cannot pass faster: the slowest part of their way."""
        disk = max(self.disk, self.disk_direct or 0)
        return min(self.pinned, disk if cache == "cold" or mode == "direct" else self.memory)


class Run(Struct, frozen=True, kw_only=True):
    """One load.  `mode` None: by the service, which has its own."""

    mode: Mode | None
    cache: Cache
    residency: float  # the share of the file that was in the page cache just before
    total_s: float  # of the load; of the service until the reply
    phases_s: dict[str, float]

    @property
    def model_s(self) -> float:
        """Metadata and weights together, for with `mmap` the file is read before the first tensor is reported."""
        return self.phases_s["metadata"] + self.phases_s["weights"]


class Measured(Struct, frozen=True, kw_only=True):
    """`start_s` is what the phases of `Run.model_s` take of a tiny model: the CUDA context, mostly."""

    about: dict[str, str]
    model_bytes: int
    bandwidth: Bandwidth
    start_s: float
    runs: list[Run]


# ---- what is measured


def measure() -> Measured:
    driver = Driver()
    ids = [id_ for id_ in driver.by_index if id_]
    if not ids:
        raise Failure("NVML knows no GPU here that CUDA can use as a whole")
    gpu = max(driver.read(ids), key=lambda one: one.free_bytes)
    if gpu.free_bytes < NEEDED_BYTES:
        raise Failure(f"this needs {NEEDED_BYTES:,} bytes of a GPU, and {gpu.free_bytes:,} are free")
    if not is_complete():
        say(f"a model of {GB} GB")
        synthetic.big(MODEL, GB)
    synthetic.tiny_llama(TINY_MODEL)
    about = {**machine(), **about_gpu(gpu.id, gpu.name)}
    say("the disk, and the way to the GPU")
    found = bandwidth(gpu.id)
    say("a tiny model")
    start_s = tiny_s(gpu.id)
    runs = mode_runs(gpu.id) + service_runs(gpu.id)
    return Measured(about=about, model_bytes=MODEL.stat().st_size, bandwidth=found, start_s=start_s, runs=runs)


def is_complete() -> bool:
    """Whether an earlier run left it: a model is written beside its place and renamed, so the size tells."""
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
        direct = rate(made_cold, os.O_DIRECT)
    except OSError:
        direct = None
    disk = rate(made_cold)
    return Bandwidth(  # the file is in the page cache now
        disk=disk,
        disk_direct=direct,
        memory=rate(pagecache.residency),
        pageable=statistics.median(copied["pageable"]),
        pinned=statistics.median(copied["pinned"]),
    )


def read_rate(flags: int = 0) -> float:
    """Bytes per second of the file, from its start to its end."""
    fd = os.open(MODEL, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # O_DIRECT wants an address at a page's start: open(2)
            left = size = os.fstat(fd).st_size
            started = time.perf_counter()
            while left > 0:
                left -= os.readv(fd, [block])
            return size / (time.perf_counter() - started)
    finally:
        os.close(fd)


def tiny_s(gpu: str) -> float:
    """The first load, which reads the engine's libraries from the disk, is not counted."""
    loads: list[dict[str, float]] = [in_process("load", "none", gpu, TINY) for _ in range(1 + ROUNDS)]
    return statistics.median(load["metadata"] + load["weights"] for load in loads[1:])


def mode_runs(gpu: str) -> list[Run]:
    """Each mode in turn, in a fresh process each, so that what slows the machine for a while slows all of them."""
    runs = []
    for cache in CACHES:
        for n in range(ROUNDS):
            for mode in [*MODES][n % len(MODES) :] + [*MODES][: n % len(MODES)]:
                say(f"{cache}, {mode}")
                residency = prepared(cache)
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
                residency = prepared(cache)
                running.reconnect()
                load = running.load(BIG)
                runs.append(
                    Run(mode=None, cache=cache, residency=residency, total_s=load.total_s, phases_s=load.phases_s)
                )
    return runs


def prepared(cache: Cache) -> float:
    """The share of the model's file that is in the page cache now."""
    if cache == "cold":
        return made_cold(MODEL)
    read_rate()
    return pagecache.residency(MODEL)


def in_process(*words: str) -> Any:
    """What a process of this module's answers.  Raises Failure."""
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
    handle = pynvml.nvmlDeviceGetHandleByUUID(id_)  # NVML is initialised: Driver does that
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        link = f"PCIe {generation} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)} at most"
    except pynvml.NVMLError as e:  # one that is part of the processor has no link
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
    """The version of the toolkit on PATH, with which the engine is most likely built."""
    if shutil.which("nvcc") is None:
        return "is not on PATH"
    said = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    found = re.search(r"release ([\d.]+)", said)
    return found[1] if found else "of an unknown version"


# ---- in processes of their own


def copy(gpu: str) -> dict[str, list[float]]:
    """Bytes per second of copies to the GPU, from memory of each kind."""
    from bench.cuda import GPU, pageable  # only here: elsewhere the engine is the first to use CUDA

    there = GPU(gpu)
    found = {}
    with there.allocated(COPIED_BYTES) as device:
        for name, memory in (("pageable", pageable), ("pinned", there.pinned)):
            with memory(COPIED_BYTES) as host:
                there.copy_s(device, host, COPIED_BYTES)  # the first one finds the GPU asleep
                found[name] = [COPIED_BYTES / there.copy_s(device, host, COPIED_BYTES) for _ in range(COPIES)]
    return found


def load(mode: Mode, gpu: str, key: str) -> dict[str, float]:
    """The seconds of each phase of a load whose layers all go to the GPU."""
    from worker.engine import llama  # only here: the engine may be in this process only

    load_mode = getattr(llama.lib, f"LLAMA_LOAD_MODE_{MODES[mode]}")
    as_it_is = llama._load_model

    def in_mode(load: Load, params: Any, log: llama.Log) -> Any:
        params.load_mode = load_mode
        return as_it_is(load, params, log)

    llama._load_model = in_mode
    wanted = load_of(key, gpu)
    loaded = llama.Loaded(wanted, llama.initialise(gpu), lambda _phase, _bytes: None)
    (on_gpu, *_) = loaded.ready(wanted).taken
    if on_gpu.id != gpu or on_gpu.weights_bytes < wanted.total_bytes / 2:
        raise Failure(f"the model did not go to the GPU: {on_gpu}")
    return {str(phase): seconds for phase, seconds in loaded.timing.items()}


def load_of(key: str, gpu: str) -> Load:
    """What a worker would tell a runner, with the service's own request."""
    with tempfile.TemporaryDirectory() as directory:
        catalog = Catalog(MODELS, Path(directory, "cache"))
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
    direct = "none here" if speeds.disk_direct is None else f"{speeds.disk_direct / 1e9:.2f}"
    lines = [
        "# Loading onto a GPU",
        "",
        "Written by `make bench-gpu`; [bench/gpu.py](../../bench/gpu.py) says how to read it.",
        "",
        *(f"- {name}: {value}" for name, value in measured.about.items()),
        "",
        "## What the machine can do",
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
        f"Medians of {ROUNDS}; a context of {CONTEXT_LENGTH:,} tokens. Model is metadata and weights, which of a tiny "
        f"model take {measured.start_s:.2f} s (the CUDA context, mostly); the speed is the file's bytes over the rest. "
        "The service's total is the HTTP request; the others are processes of their own, once the engine has started.",
        "",
        *table(
            ["cache", "by", "total, s", "model, s", "GB/s", "possible, GB/s", "of what is possible"],
            [_row(measured, cache, mode) for cache in CACHES for mode in (*MODES, None)],
        ),
        "",
        "Every load, in the order in which they were run:",
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
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: what runs is then stopped
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
