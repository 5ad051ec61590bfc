"""Classifies a failed load: a code for machines and a sentence for people.  Pure functions over the engine's output."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping

from shared.errors import LoadFailure
from shared.schema.memory import Device
from shared.units import size

MEMORY = re.compile(
    r"insufficient memory|out of memory|cannot allocate memory|failed to allocate|unable to allocate|bad_alloc"
    r"|MemoryError|can't start new thread"
    r"|resource allocation failed|CUBLAS_STATUS_ALLOC_FAILED",  # cuBLAS without memory for its workspace
    re.I,
)
REQUESTED = re.compile(r"(?:of size|allocate|allocating)\s+(?P<number>[\d.]+)(?: ?(?P<unit>Mi?B))?")
UNSUPPORTED = re.compile(
    r"(?:unknown|unsupported) model architecture|unknown tokenizer|unknown pre-tokenizer|cannot be used as main model"
    r"|model type is not supported|does not support|type \d+ \([^)]*(?:REMOVED|DEPRECATED)|requires ctx_other"
    r"|cache type \w+ with block size|quantized V cache",
    re.I,
)
PATH = re.compile(r"/(?<![\w.]/)(?:[^\s'\"(),:;/]+/)*([^\s'\"(),:;/]+)")
PREFIX = re.compile(r"^(?:[a-z_0-9:~]+: )+(?:error loading model: )?")
SAYS_WHY = re.compile(r"GGML_ASSERT|ggml_abort|terminate called|what\(\):|error|fatal", re.I)


def scrub(text: str) -> str:
    """Remove directories from the paths in the engine's output."""
    return PATH.sub(r"\1", text)


def from_reason(reason: str) -> tuple[LoadFailure, str]:
    """Return code and sentence for the reason with which llama.cpp rejected a file."""
    sentence = PREFIX.sub("", scrub(reason)).strip() or scrub(reason)
    if MEMORY.search(reason):
        return "insufficient_memory", sentence
    if UNSUPPORTED.search(reason):
        return "unsupported_model", sentence
    return "invalid_model_file", sentence


def from_exit(status: int, output: Iterable[str], *, oom_killed: bool = False) -> tuple[LoadFailure, str]:
    """Return code and sentence for a runner that exited without a message.

    `status` is as in `subprocess.Popen`: -n is signal n.  `output` is what the runner wrote last.  `oom_killed`: the
    kernel's OOM killer terminated a process on this host during the load.
    """
    lines = [scrub(line) for line in output if line.strip()]
    memory = next((line for line in reversed(lines) if MEMORY.search(line)), None)
    if memory is not None:
        return "insufficient_memory", memory
    cause = next((line for line in reversed(lines) if SAYS_WHY.search(line)), lines[-1] if lines else "no output")
    if status == -signal.SIGKILL:
        if oom_killed:
            return "insufficient_memory", "the kernel's OOM killer terminated the engine"
        return "engine_crashed", "the engine was killed by SIGKILL"
    if status == -signal.SIGBUS:  # a page of a mapped file that is not there: mmap(2)
        return "invalid_model_file", "a file of the model was truncated, or its storage failed (SIGBUS)"
    end = f"was terminated by {_signal_name(-status)}" if status < 0 else f"exited with status {status}"
    return "engine_crashed", f"the engine {end}: {cause}"


def needed_bytes(output: Iterable[str]) -> int | None:
    """Return the size of the largest allocation that failed, from the engine's output; None if it names none."""
    sizes = []
    for line in output:
        if MEMORY.search(line) and (match := REQUESTED.search(line)):
            number, unit = match["number"], match["unit"]
            sizes.append(round(float(number) * (1 << 20)) if unit else int(float(number)))
    return max(sizes, default=None)


def shortage(
    reason: str, needed: int, devices: list[Device], holders: Mapping[str, list[str]], by_others: Mapping[str, int]
) -> tuple[str, dict[str, object]]:
    """Return the sentence, and the detail for machines, of a load that did not fit in memory.

    `needed` is in bytes.  `holders` are the instances on each device; `by_others` the bytes that other processes use
    there, as far as the driver reports them.
    """
    free = ", ".join(f"{size(max(0, d.available_bytes))} of {size(d.total_bytes)} available on {d.id}" for d in devices)
    detail: dict[str, object] = {
        "needed_bytes": needed,
        "devices": [
            {
                "id": d.id,
                "total_bytes": d.total_bytes,
                "free_bytes": d.free_bytes,
                "available_bytes": max(0, d.available_bytes),
                "used_by_others_bytes": by_others.get(d.id, 0),
                "instances": holders.get(d.id, []),
            }
            for d in devices
        ],
    }
    return f"{reason}: {size(needed)} needed, {free}", detail


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
