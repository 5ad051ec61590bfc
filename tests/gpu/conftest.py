"""Tests that need a real NVIDIA GPU: `make test-gpu`, with a llama.cpp built with CUDA.

No other program may use the GPU meanwhile, and NEEDED_BYTES of it must be free.  With `--fake-gpus` the tests run on a
host of `tests.support.fakehosts`: that checks the tests themselves, not the behaviour of a GPU.

`-m cycles` selects the test that repeats a load `--cycles` times, and `-m "not cycles"` all others.  What the tests
measure is printed at their end.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from shared.schema.model import Model
from shared.synthetic import models as synthetic
from tests.gpu.gpus import FakeGPUs, GPUs, NvidiaGPUs, steady_bytes
from tests.gpu.watched import Watched
from tests.integration.conftest import catalog
from tests.integration.conftest import forkserver as forkserver
from tests.support.service import until, up

BIG, LONG, TINY = "gpu/big", "gpu/long", "gpu/tiny"
MIDDLE, SHARDED, HUGE = "gpu/middle", "gpu/sharded", "gpu/huge"
LONG_TOKENS = 16_384
VOCABULARY = 2_000
NEEDED_BYTES = 6 << 30
FAKE, CYCLES = "--fake-gpus", "--cycles"
FIGURES = pytest.StashKey[list[str]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FAKE, action="store_true", help="run tests/gpu on a host with fake GPUs")
    parser.addoption(CYCLES, type=int, default=200, help="how often the test `cycles` loads a model (default: 200)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "cycles: loads, answers and unloads again and again, for minutes")
    config.stash[FIGURES] = []


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if figures := config.stash[FIGURES]:
        terminalreporter.section("measured")
        for line in figures:
            terminalreporter.write_line(line)


@pytest.fixture
def figures(request: pytest.FixtureRequest) -> list[str]:
    """The lines of what is measured; a test adds its own."""
    return request.config.stash[FIGURES]


@pytest.fixture
def cycles(request: pytest.FixtureRequest) -> int:
    number: int = request.config.getoption(CYCLES)
    return number


@pytest.fixture(scope="session")
def gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GPUs:
    if request.config.getoption(FAKE, default=False):
        return FakeGPUs(tmp_path_factory.mktemp("fake") / "host")
    nvidia = NvidiaGPUs()
    assert nvidia.ids, "NVML lists no GPU that CUDA can use as a whole"
    return nvidia


@pytest.fixture(scope="session")
def gpu(gpus: GPUs) -> str:
    """Return the GPU with the most free memory."""
    free = {id_: gpus.total_bytes(id_) - gpus.used_bytes(id_) for id_ in gpus.ids}
    best = max(free, key=lambda id_: free[id_])
    assert free[best] >= NEEDED_BYTES, f"these tests need {NEEDED_BYTES:,} free bytes of a GPU; {free[best]:,} are free"
    return best


def context_of(gpus: GPUs, id_: str) -> int:
    """Measure the bytes of a GPU that an idle process with a CUDA context uses."""
    before = steady_bytes(gpus, id_)
    with gpus.occupied(id_, 0):
        return max(0, steady_bytes(gpus, id_) - before)


@pytest.fixture(scope="session")
def context_bytes(gpus: GPUs, gpu: str) -> int:
    return context_of(gpus, gpu)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory, gpus: GPUs, gpu: str) -> Path:
    """Write a tiny model, one of 2 GB, one of 1 GB with a KV cache of the same size, one of 0.4 GB as one file and as
    three, and the largest one that can be locked, whose weights are zeros that use no disk space."""
    root = tmp_path_factory.mktemp("models")
    synthetic.tiny_llama(root / TINY / "tiny-f16.gguf")
    synthetic.big(root / BIG / "big-Q8_0.gguf", 2)
    synthetic.big(root / LONG / "long-Q8_0.gguf", 1, head_count_kv=32, context_length=LONG_TOKENS)
    synthetic.big(root / MIDDLE / "middle-Q8_0.gguf", 0.4, vocabulary=VOCABULARY)
    synthetic.big(root / SHARDED / "middle-Q8_0.gguf", 0.4, vocabulary=VOCABULARY, shards=3)
    synthetic.sparse_shape(root / HUGE / "huge-Q4_0.gguf", gpus.huge(gpu), "Q4_0", vocabulary=VOCABULARY)
    return root


@pytest.fixture(scope="session")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return catalog(models_dir, tmp_path_factory.mktemp("catalog"))


@contextmanager
def watched_on(home: Path, models_dir: Path, gpus: GPUs, ids: list[str]) -> Iterator[Watched]:
    """Run a service whose worker owns these GPUs and the CPU.  One load is done first, since a driver keeps some memory
    of the first use."""
    with up(home, models=models_dir, **gpus.environ(), LOADSTONE_DEVICES=",".join([*ids, "cpu"])) as service:
        watched = Watched(service, gpus, ids)
        until(lambda: {TINY, BIG, LONG, MIDDLE, SHARDED, HUGE} <= service.models().keys(), "the models are listed", 60)
        first = watched.load(TINY)
        assert first["status"] == "loaded", first["error"]
        assert set(first["devices"]) <= {*ids}, f"the load used {first['devices']}: is llama.cpp built with CUDA?"
        assert service.unload(first["instance_id"]).status == 200
        yield watched


@pytest.fixture(scope="session")
def one_gpu(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, gpus: GPUs, gpu: str, context_bytes: int
) -> Iterator[Watched]:
    """Run a service on one GPU.  The fixture context_bytes must be measured before it."""
    with watched_on(tmp_path_factory.mktemp("one"), models_dir, gpus, [gpu]) as watched:
        yield watched


@pytest.fixture
def watched(one_gpu: Watched) -> Iterator[Watched]:
    """Return a service on one GPU once its worker has seen that nothing is loaded; unload everything after the test."""
    one_gpu.seen()
    yield one_gpu
    one_gpu.service.unload_all()
