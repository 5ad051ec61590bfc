"""`python -m bench.gpu`: the speed of loading a model onto a GPU, by Loadstone and by llama.cpp in each of its modes to
read a file, compared with the speed of the disk and of copies to the GPU.

It measures in one run, on an idle machine, on the GPU with the most free memory:

- disk: the file read from start to end, cold, through the page cache and past it (O_DIRECT);
- memory: the same, warm;
- host to device: copies from ordinary memory, and from memory that is locked for the GPU;
- the start of CUDA in a process, by a tiny model;
- a model of 8 GB, cold and warm, in processes of `bench.gpu_bare`: in each of llama.cpp's modes, and by the product's
  own load (`locked`), which locks llama.cpp's mapping of the file while it is copied
  (docs/decisions/0020-copy-to-gpus-from-page-locked-mappings.md);
- the same by the service, over HTTP;
- with several GPUs: the model split over all of them, and loaded onto each at once.

The report and every single figure, gpu.md and gpu.json, are written after each step, so that a run that is ended early
leaves what it has measured.  A step that fails is reported, and the others go on; the exit status is then 1.

A load is mainly a copy of the file.  The column "share of the possible" is the speed of the load divided by that of the
slowest part of the bytes' path: 1 is the optimum.  If the service is slower than `locked`, the cause is in the service.
"""

from __future__ import annotations

import argparse
import datetime
import mmap
import os
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, TypeVar

import llama_cpp  # noqa: F401  # before numpy: see bench/__init__.py
import msgspec
import pynvml
from msgspec import Struct

from bench import pagecache
from bench.__main__ import commit, drop_from_cache, machine, say
from bench.cuda import Rates
from bench.gpu_bare import Done, Started
from bench.gpu_report import CACHES, MODES, Bandwidth, By, Cache, Measured, Mode, Run, Start, lock_of, markdown
from bench.subjects import Failure, running, service
from cli import devredis
from shared import __version__
from shared.synthetic import models as synthetic
from worker.memory.nvml import Driver

ROOT = Path(__file__).parents[1]
OUT = ROOT / "bench/out"
TINY = "loadstone/bench-gpu-tiny"
GB, ROUNDS = 8.0, 3
SPARE_BYTES = 2 << 30  # of the GPU, beyond the weights
BLOCK_BYTES = 8 << 20  # of a read
PROCESS_S = 150.0  # for an answer of a process: one that hangs leaves time for the other steps of a stage
REST_S = 5.0  # between loads of the service, for the next runner to warm up

Answer = TypeVar("Answer")


class Plan(Struct, frozen=True, kw_only=True):
    """What to measure, and where to write it."""

    gb: float
    rounds: int
    out: Path
    models: Path

    @property
    def key(self) -> str:
        return f"loadstone/bench-gpu-{self.gb:g}gb"

    @property
    def model(self) -> Path:
        return self.models / self.key / f"bench-gpu-{self.gb:g}gb-Q8_0.gguf"

    @property
    def tiny(self) -> Path:
        return self.models / TINY / "bench-gpu-tiny-f16.gguf"


class Bare:
    """A process of `bench.gpu_bare`, which has started the engine."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process
        self.backends_s = answer(process, Started).backends_s

    def begin(self) -> None:
        """Have it load the model."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()

    def end(self) -> Done:
        """Wait for the end of the load.  Raises Failure."""
        return answer(self._process, Done)

    def load(self) -> Done:
        self.begin()
        return self.end()


def answer(process: subprocess.Popen[str], kind: type[Answer]) -> Answer:
    """Return the next line of a process, or end it after PROCESS_S.  Raises Failure."""
    assert process.stdout
    limit = threading.Timer(PROCESS_S, process.kill)
    limit.start()
    try:
        line = process.stdout.readline()
    finally:
        limit.cancel()
        limit.join()
    if not line:
        words = [str(word) for word in process.args]  # type: ignore[union-attr]  # as `running` was given them
        raise Failure(f"`{shlex.join(words[1:])}` ended with status {process.wait()}; see gpu.log")
    return msgspec.json.decode(line, type=kind)


class Benchmark:
    """A run of the benchmark; `measured` grows with each step."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        driver = Driver()
        ids = [id_ for id_ in driver.by_index if id_]
        if not ids:
            raise Failure("NVML lists no GPU that CUDA can use as a whole")
        gpu = max(driver.read(ids), key=lambda one: one.free_bytes)
        needed_bytes = int(plan.gb * 1e9) + SPARE_BYTES
        if gpu.free_bytes < needed_bytes:
            raise Failure(f"this needs {needed_bytes:,} free bytes of a GPU; {gpu.free_bytes:,} are free")
        self._gpu, self._gpus = gpu.id, ids
        about = {**machine(), **about_gpu(gpu.id, gpu.name, plan.out)}  # first, since it records the load average
        if not plan.model.exists():  # writing is atomic
            say(f"a model of {plan.gb:g} GB")
            synthetic.big(plan.model, plan.gb)
        synthetic.tiny_llama(plan.tiny)
        self.measured = Measured(about=about, model_bytes=plan.model.stat().st_size, n_gpus=len(ids))

    def run(self) -> None:
        """Measure everything, the most important first."""
        self._step("bandwidth of the disk and of copies to the GPU", self._bandwidth)
        self._step("the start of CUDA", self._start)
        self._modes("warm")
        self._step("the service", self._service)
        if len(self._gpus) > 1:
            for n in range(self._plan.rounds):
                self._step(f"split over {len(self._gpus)} GPUs, {n + 1}", self._split)
                self._step(f"onto each of {len(self._gpus)} GPUs at once, {n + 1}", self._at_once)
        self._modes("cold")

    def _step(self, what: str, measure: Callable[[], None]) -> None:
        say(what)
        try:
            measure()
        except (Failure, devredis.RedisUnavailable) as e:
            say(f"failed: {e}")
            self.measured.failed[what] = str(e)
        self._write()

    def _write(self) -> None:
        report, figures = self._plan.out / "gpu.md", self._plan.out / "gpu.json"
        report.write_text(markdown(self.measured))
        figures.write_bytes(msgspec.json.format(msgspec.json.encode(self.measured)))

    def _bandwidth(self) -> None:
        model = self._plan.model

        def rate(prepare: Callable[[Path], object], flags: int = 0) -> float:
            rates = []
            for _ in range(self._plan.rounds):
                prepare(model)
                rates.append(read_rate(model, flags))
            return statistics.median(rates)

        try:
            direct = rate(drop_from_cache, os.O_DIRECT)
        except OSError:
            direct = None
        disk = rate(drop_from_cache)
        memory = rate(pagecache.residency)  # the file is in the page cache now
        copies: Rates | None = None
        try:
            copies = self._copies()
        except Failure as e:
            self.measured.failed["copies to the GPU"] = str(e)
        self.measured.bandwidth = Bandwidth(
            disk=disk,
            disk_direct=direct,
            memory=memory,
            pageable=None if copies is None else statistics.median(copies.pageable),
            pinned=None if copies is None else statistics.median(copies.pinned),
        )

    def _copies(self) -> Rates:
        with self._log() as log, running([sys.executable, "-m", "bench.cuda", self._gpu], log) as process:
            return answer(process, Rates)

    def _start(self) -> None:
        """Load a tiny model.  The first process reads libraries from the disk and is not counted."""
        starts = []
        for _ in range(1 + self._plan.rounds):
            with self._bare("none", [self._gpu], TINY) as bare:
                starts.append((bare.backends_s, model_s(bare.load()), model_s(bare.load())))
        backends_s, first_s, second_s = (statistics.median(column) for column in zip(*starts[1:], strict=True))
        self.measured.start = Start(backends_s=backends_s, first_s=first_s, second_s=second_s)

    def _modes(self, cache: Cache) -> None:
        """Load in each mode in turn, each in a fresh process; a temporary slowdown of the machine affects all modes."""
        for n in range(self._plan.rounds):
            for mode in MODES[n % len(MODES) :] + MODES[: n % len(MODES)]:
                self._step(f"{cache}, {mode}, {n + 1}", lambda mode=mode: self._mode(mode, cache))  # type: ignore[misc]

    def _mode(self, mode: Mode, cache: Cache) -> None:
        with self._bare(mode, [self._gpu], self._plan.key) as bare:
            residency, dirty_bytes = self._prepare(cache)
            done = bare.load()
            self._add(mode, cache, residency, done, dirty_bytes)

    def _service(self) -> None:
        out = self._plan.out
        with service(self._plan.models, out, LOADSTONE_DEVICES=f"{self._gpu},cpu") as running_:
            running_.reconnect()
            running_.load(self._plan.key)
            for cache in reversed(CACHES):
                for n in range(self._plan.rounds):
                    say(f"{cache}, the service, {n + 1}")
                    time.sleep(REST_S)
                    residency, dirty_bytes = self._prepare(cache)
                    running_.reconnect()
                    load = running_.load(self._plan.key)
                    done = Done(total_s=load.total_s, phases_s=load.phases_s, log=running_.engine_log())
                    self._add("the service", cache, residency, done, dirty_bytes)
                    self._write()

    def _split(self) -> None:
        with self._bare("locked", self._gpus, self._plan.key) as bare:
            self._prepare("warm")
            self.measured.several.split_s.append(bare.load().total_s)

    def _at_once(self) -> None:
        with ExitStack() as stack:
            all_ = [stack.enter_context(self._bare("locked", [gpu], self._plan.key)) for gpu in self._gpus]
            self._prepare("warm")
            for bare in all_:
                bare.begin()
            self.measured.several.at_once_s.append(max([bare.end().total_s for bare in all_]))

    def _add(self, by: By, cache: Cache, residency: float, done: Done, dirty_before: int) -> None:
        self.measured.runs.append(
            Run(
                by=by,
                cache=cache,
                residency=residency,
                total_s=done.total_s,
                phases_s=done.phases_s,
                lock=lock_of(done.log),
                dirty_bytes=dirty_bytes() - dirty_before,
            )
        )

    def _prepare(self, cache: Cache) -> tuple[float, int]:
        """Drop or read the model's file; return the share of it in the page cache, and the bytes to be written."""
        model = self._plan.model
        if cache == "cold":
            return drop_from_cache(model), dirty_bytes()
        read_rate(model)
        return pagecache.residency(model), dirty_bytes()

    @contextmanager
    def _bare(self, mode: Mode, gpus: list[str], key: str) -> Iterator[Bare]:
        words = [sys.executable, "-m", "bench.gpu_bare", mode, str(self._plan.models), key, *gpus]
        with self._log() as log, running(words, log) as process:
            yield Bare(process)

    def _log(self) -> IO[str]:
        return (self._plan.out / "gpu.log").open("a")


def model_s(done: Done) -> float:
    return done.phases_s["metadata"] + done.phases_s["weights"]


def read_rate(model: Path, flags: int = 0) -> float:
    """Read the file from start to end; return the bytes per second."""
    fd = os.open(model, os.O_RDONLY | flags)
    try:
        with mmap.mmap(-1, BLOCK_BYTES) as block:  # O_DIRECT requires page-aligned memory: open(2)
            left = size = os.fstat(fd).st_size
            started = time.perf_counter()
            while left > 0:
                left -= os.readv(fd, [block])
            return size / (time.perf_counter() - started)
    finally:
        os.close(fd)


def dirty_bytes() -> int:
    """Return how much memory has yet to be written to disks (proc_meminfo(5))."""
    match = re.search(r"^Dirty: +(\d+) kB$", Path("/proc/meminfo").read_text(), re.MULTILINE)
    assert match
    return int(match[1]) << 10


def about_gpu(id_: str, name: str, directory: Path) -> dict[str, str]:
    handle = pynvml.nvmlDeviceGetHandleByUUID(id_)  # Driver has initialised NVML
    cuda = pynvml.nvmlSystemGetCudaDriverVersion()
    try:
        generation = pynvml.nvmlDeviceGetMaxPcieLinkGeneration(handle)
        link = f"PCIe {generation} x{pynvml.nvmlDeviceGetMaxPcieLinkWidth(handle)} at most"
    except pynvml.NVMLError as e:  # a GPU that is part of the processor has no link
        link = f"PCIe: {e}"
    memory = pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30
    df = subprocess.run(["df", "--output=fstype,source", directory], capture_output=True, text=True, check=True).stdout
    return {
        "GPU": f"{name}, {memory:.0f} GiB, {link}; {pynvml.nvmlDeviceGetCount()} in the machine",
        "driver": f"{pynvml.nvmlSystemGetDriverVersion()}, for CUDA {cuda // 1000}.{cuda % 1000 // 10}; nvcc {nvcc()}",
        "files": " on ".join(df.splitlines()[1].split()),
        "Loadstone": f"{__version__}, commit {commit()}",
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
    }


def nvcc() -> str:
    """Return the version of the toolkit on PATH, most likely the one that the engine was built with."""
    match = re.search(r"release ([\d.]+)", output("nvcc", "--version"))
    return match[1] if match else "is not on PATH"


def output(*words: str) -> str:
    """Return what a program writes; nothing if it is missing."""
    if shutil.which(words[0]) is None:
        return ""
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def arguments() -> Plan:
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description="Measure loads onto GPUs.")
    parser.add_argument("--gb", type=float, default=GB, help=f"size of the model (default: {GB:g})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"loads of each kind (default: {ROUNDS})")
    parser.add_argument("--out", type=Path, default=OUT / "gpu", help="directory for the report, figures and logs")
    parser.add_argument("--models", type=Path, default=OUT / "gpu-models", help="directory for the models, which stay")
    given = parser.parse_args()
    return Plan(gb=given.gb, rounds=given.rounds, out=given.out.absolute(), models=given.models.absolute())


def main() -> int:
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))  # an exception: running processes are stopped
    plan = arguments()
    plan.out.mkdir(parents=True, exist_ok=True)
    try:
        benchmark = Benchmark(plan)
        benchmark.run()
    except (Failure, devredis.RedisUnavailable) as e:
        print(f"bench: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    print(markdown(benchmark.measured))
    return 1 if benchmark.measured.failed else 0


if __name__ == "__main__":
    sys.exit(main())
