"""A process that loads a model onto GPUs at each line on stdin, without the service.

`python -m bench.gpu_bare MODE MODELS_DIR KEY GPU...` starts the engine for these GPUs and writes a `Started`; then it
answers each line with a `Done`, in JSON.  All layers go to the GPUs, and as many to each.  MODE is one of llama.cpp's
to read a file (none, mmap, direct), or `locked`: the product's own load.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import llama_cpp  # noqa: F401  # before numpy: see bench/__init__.py
import msgspec
from msgspec import Struct

from bench.gpu_report import MODES, PLAIN, Mode
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE
from shared.schema.http import LoadRequest
from shared.settings import Settings
from worker.catalog.catalog import Catalog
from worker.engine import llama
from worker.runner.parameters import plan
from worker.runner.protocol import Load

NAMES: dict[Mode, str] = {"none": "NONE", "mmap": "MMAP", "direct": "DIRECT_IO"}  # llama.cpp's LLAMA_LOAD_MODE_*


class Started(Struct, frozen=True, kw_only=True):
    backends_s: float


class Done(Struct, frozen=True, kw_only=True):
    """One load: its seconds in all and by phase, and the engine's log."""

    total_s: float
    phases_s: dict[str, float]
    log: str


def load_of(models_dir: Path, key: str, gpus: list[str]) -> Load:
    """Return the load that a worker would send to a runner for the request that the service gets."""
    with tempfile.TemporaryDirectory() as directory:
        catalog = Catalog([models_dir], Path(directory, "cache"))
        catalog.look()
        while catalog.is_shallow:
            catalog.deepen(1.0)
        model = next((model for model in catalog.models() if model.key == key), None)
    if model is None or model.dimensions is None:
        raise SystemExit(f"{models_dir} has no model {key}")
    request = LoadRequest(model=key, context_length=CONTEXT_LENGTH, eval_batch_size=EVAL_BATCH_SIZE)
    layers = model.dimensions.block_count + 1
    shares = [layers * (i + 1) // len(gpus) - layers * i // len(gpus) for i in range(len(gpus))]
    return plan(request, model, Settings(models_dir=models_dir), gpus, shares)


def use(mode: Mode) -> None:
    """Have the loads of this process read files as llama.cpp does in this mode, with nothing read ahead of it."""
    load_mode = getattr(llama.lib, f"LLAMA_LOAD_MODE_{NAMES[mode]}")
    load_model = llama._load_model

    def in_mode(load: Load, params: Any, log: llama.Log) -> Any:
        params.load_mode = load_mode
        return load_model(load, params, log)

    llama._load_model = in_mode
    vars(llama)["lockable_bytes"] = lambda: 0


def loaded(load: Load, log: llama.Log) -> Done:
    """Load and free a model.  Raises LoadError, and SystemExit if it is not on the GPUs."""
    started = time.monotonic()
    model = llama.Loaded(load, log, lambda _phase, _bytes: None)
    total_s = time.monotonic() - started
    on_gpus = [one for one in model.ready(load).usage if one.id in load.devices]
    if sum(one.weights_bytes for one in on_gpus) < load.total_bytes / 2 or not all(on.weights_bytes for on in on_gpus):
        raise SystemExit(f"the model was not loaded onto the GPUs: {on_gpus}")
    done = Done(
        total_s=total_s,
        phases_s={str(phase): seconds for phase, seconds in model.timing.items()},
        log="".join(line for _, line in log.lines),
    )
    model.close()
    return done


def main(mode: Mode, models_dir: Path, key: str, gpus: list[str]) -> None:
    load = load_of(models_dir, key, gpus)
    if mode in PLAIN:
        use(mode)
        load = msgspec.structs.replace(load, is_whole=False)  # and nothing is locked
    started = time.monotonic()
    log = llama.initialise(",".join(gpus))
    _write(Started(backends_s=time.monotonic() - started))
    for _ in sys.stdin:
        _write(loaded(load, log))


def _write(message: Started | Done) -> None:
    print(msgspec.json.encode(message).decode(), flush=True)


if __name__ == "__main__":
    (mode,) = (mode for mode in MODES if mode == sys.argv[1])
    main(mode, Path(sys.argv[2]), sys.argv[3], sys.argv[4:])
