"""Python runs this at the start of every process on a fake host; it gives the engine the host's GPUs."""

from __future__ import annotations

import os
import sys
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from pathlib import Path
from types import ModuleType
from typing import Any


class Loader(SourceFileLoader):
    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        give_gpus(module)


class Finder(MetaPathFinder):
    def find_spec(self, fullname: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:
        spec = PathFinder.find_spec(fullname, path, target) if fullname == "worker.engine.llama" else None
        if spec is not None:
            spec.loader = Loader(spec.name, str(spec.origin))
        return spec


def give_gpus(llama: Any) -> None:
    """Let `worker.engine.llama` find the GPUs that CUDA would find, once it initialises the engine."""
    initialise = llama.initialise

    def with_gpus(visible: str) -> Any:
        from tests.support import fakegpu  # imported here: not every process may import it
        from tests.support.fakecuda import FakeCuda
        from tests.support.fakehosts import FakeHost, Shared
        from worker.engine import pagelock

        log = initialise(visible)
        host = FakeHost.here()
        assert host is not None
        gpus = host.visible(os.environ.get("CUDA_VISIBLE_DEVICES"))
        cuda = FakeCuda(host) if gpus else None  # a runner without GPUs may write no file
        if cuda is not None:
            cuda.install(llama.lib._lib)
        pagelock.DRIVER = host.version_path
        if (locked_from := host.of_driver("locked_from")) is not None:
            pagelock.LEAST_BYTES = locked_from
        for i, gpu in enumerate(gpus):
            fakegpu.add(f"CUDA{i}", gpu.total_bytes, Shared(host, gpu.uuid), cuda)
        return log

    from worker.engine import confine
    from worker.sandbox.landlock import READ, TREE

    # What this driver reads and writes.
    confine.DRIVERS += ((Path(__file__).parents[2], READ), (os.environ["CUDA_FAKE_HOST"], TREE))
    llama.initialise = with_gpus
    llama.backends = lambda: ["CUDA", "CPU"]


if "CUDA_FAKE_HOST" in os.environ:
    sys.meta_path.insert(0, Finder())
