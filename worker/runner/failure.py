"""Why a load failed, for machines and for people: pure functions over the engine's words."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable, Mapping

from shared.errors import LoadFailure
from shared.schema.memory import Device
from shared.units import size

MEMORY = re.compile(
    r"insufficient memory|out of memory|cannot allocate memory|failed to allocate|unable to allocate|bad_alloc"
    r"|MemoryError|can't start new thread",
    re.I,
)
ASKED = re.compile(r"(?:of size|allocate|allocating)\s+(?P<number>[\d.]+)(?: ?(?P<unit>Mi?B))?")
UNSUPPORTED = re.compile(
    r"unknown model architecture|unknown tokenizer|unknown pre-tokenizer|cannot be used as main model"
    r"|model type is not supported|does not support",
    re.I,
)
PATH = re.compile(r"/(?<![\w.]/)(?:[^\s'\"(),:;/]+/)*([^\s'\"(),:;/]+)")
PREFIX = re.compile(r"^(?:[a-z_0-9:~]+: )+(?:error loading model: )?")
SAYS_WHY = re.compile(r"GGML_ASSERT|ggml_abort|terminate called|what\(\):|error|fatal", re.I)


def scrub(text: str) -> str:
    """Lines of the engine's without the directories of this machine."""
    return PATH.sub(r"\1", text)


def from_reason(reason: str) -> tuple[LoadFailure, str]:
    """Code and sentence for what llama.cpp said when it refused a file."""
    sentence = PREFIX.sub("", scrub(reason)).strip() or scrub(reason)
    if MEMORY.search(reason):
        return "insufficient_memory", sentence
    if UNSUPPORTED.search(reason):
        return "unsupported_model", sentence
    return "invalid_model_file", sentence


def from_exit(status: int, tail: Iterable[str], *, oom_killed: bool = False) -> tuple[LoadFailure, str]:
    """Code and sentence for a runner that died without saying so; `status` as Popen has it: -n is signal n.

    `oom_killed`: meanwhile the kernel killed some process for want of memory.
    """
    lines = [scrub(line) for line in tail if line.strip()]
    memory = next((line for line in reversed(lines) if MEMORY.search(line)), None)
    if memory is not None:
        return "insufficient_memory", memory
    said = next((line for line in reversed(lines) if SAYS_WHY.search(line)), lines[-1] if lines else "it said nothing")
    if status == -signal.SIGKILL:
        if oom_killed:
            return "insufficient_memory", "the kernel killed the engine, since memory had run out"
        return "engine_crashed", "the engine was killed by SIGKILL"
    if status == -signal.SIGBUS:  # a page of a mapped file that is not there: mmap(2)
        return "invalid_model_file", "a file of the model was cut short, or its device fails: the engine died of SIGBUS"
    how = f"of {_signal_name(-status)}" if status < 0 else f"with status {status}"
    return "engine_crashed", f"the engine died {how}: {said}"


def needed_bytes(tail: Iterable[str]) -> int | None:
    """The most that the engine asked for at once and did not get, by what it said."""
    found = []
    for line in tail:
        if MEMORY.search(line) and (match := ASKED.search(line)):
            number, unit = match["number"], match["unit"]
            found.append(round(float(number) * (1 << 20)) if unit else int(float(number)))
    return max(found, default=None)


def shortage(
    reason: str, needed: int, devices: list[Device], holders: Mapping[str, list[str]], by_others: Mapping[str, int]
) -> tuple[str, dict[str, object]]:
    """The sentence and the numbers for machines of a load that memory was too short for.

    `needed` bytes were asked for; `holders` are the instances on each device, and `by_others` what other processes have
    there, as far as the driver tells.
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
