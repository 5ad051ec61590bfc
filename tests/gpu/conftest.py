"""What needs a real NVIDIA GPU: `make test-gpu`, which has llama.cpp built with CUDA.

Nobody else may use the GPU meanwhile, and it must have NEEDED_BYTES free.  With `--fake-gpus` the tests run on a host
of `tests.support.fakehosts`: that tries them, and says nothing of a GPU.
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
LONG_TOKENS = 16_384
NEEDED_BYTES = 6 << 30
TIMEOUT_S = 600  # of a test, with the fixtures that are made for it
FAKE = "--fake-gpus"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(FAKE, action="store_true", help="try tests/gpu on a host whose GPUs are none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if item.path.is_relative_to(here):
            item.add_marker(pytest.mark.timeout(TIMEOUT_S))


@pytest.fixture(scope="session")
def gpus(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> GPUs:
    if request.config.getoption(FAKE, default=False):
        return FakeGPUs(tmp_path_factory.mktemp("fake") / "host")
    found = NvidiaGPUs()
    assert found.ids, "NVML knows no GPU here that CUDA can use as a whole"
    return found


@pytest.fixture(scope="session")
def gpu(gpus: GPUs) -> str:
    """The one with the most free memory."""
    free = {id_: gpus.total_bytes(id_) - gpus.used_bytes(id_) for id_ in gpus.ids}
    best = max(free, key=lambda id_: free[id_])
    assert free[best] >= NEEDED_BYTES, f"these tests need {NEEDED_BYTES:,} bytes of a GPU, and {free[best]:,} are free"
    return best


def context_of(gpus: GPUs, id_: str) -> int:
    """The bytes that a process takes of a GPU that has done nothing there."""
    before = steady_bytes(gpus, id_)
    with gpus.occupied(id_, 0):
        return max(0, steady_bytes(gpus, id_) - before)


@pytest.fixture(scope="session")
def context_bytes(gpus: GPUs, gpu: str) -> int:
    return context_of(gpus, gpu)


@pytest.fixture(scope="session")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """2 GB as they mostly are, and 1 GB with room for a KV cache as large."""
    root = tmp_path_factory.mktemp("models")
    synthetic.tiny_llama(root / TINY / "tiny-f16.gguf")
    synthetic.big(root / BIG / "big-Q8_0.gguf", 2)
    synthetic.big(root / LONG / "long-Q8_0.gguf", 1, head_count_kv=32, context_length=LONG_TOKENS)
    return root


@pytest.fixture(scope="session")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return catalog(models_dir, tmp_path_factory.mktemp("catalog"))


@contextmanager
def watched_on(home: Path, models_dir: Path, gpus: GPUs, ids: list[str]) -> Iterator[Watched]:
    """A service whose worker owns these GPUs and the CPU, with one load behind it: drivers keep something of the first
    use."""
    with up(home, models=models_dir, **gpus.environ(), LOADSTONE_DEVICES=",".join([*ids, "cpu"])) as service:
        watched = Watched(service, gpus, ids)
        until(lambda: {TINY, BIG, LONG} <= service.models().keys(), "the models are listed", 60)
        first = watched.load(TINY)
        assert first["status"] == "loaded", first["error"]
        assert set(first["devices"]) <= {*ids}, f"it went to {first['devices']}: is llama.cpp built with CUDA?"
        assert service.unload(first["instance_id"]).status == 200
        yield watched


@pytest.fixture(scope="session")
def one_gpu(
    tmp_path_factory: pytest.TempPathFactory, models_dir: Path, gpus: GPUs, gpu: str, context_bytes: int
) -> Iterator[Watched]:
    """Weighed first: the context of a process that is none of ours."""
    with watched_on(tmp_path_factory.mktemp("one"), models_dir, gpus, [gpu]) as watched:
        yield watched


@pytest.fixture
def watched(one_gpu: Watched) -> Iterator[Watched]:
    """A service on one GPU, with nothing loaded before and after; its worker knows."""
    one_gpu.seen()
    yield one_gpu
    one_gpu.service.unload_all()
