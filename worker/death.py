"""Why a load failed, for machines and for people: pure functions over the engine's words."""

from __future__ import annotations

import re
import signal
from collections.abc import Iterable

from shared.errors import LoadFailure

MEMORY = re.compile(
    r"insufficient memory|out of memory|cannot allocate memory|failed to allocate|unable to allocate|bad_alloc", re.I
)
UNSUPPORTED = re.compile(
    r"unknown model architecture|unknown tokenizer|unknown pre-tokenizer|cannot be used as main model"
    r"|model type is not supported|does not support",
    re.I,
)
PATH = re.compile(r"(?<![\w.])/(?:[^\s'\"(),:;/]+/)*([^\s'\"(),:;/]+)")
PREFIX = re.compile(r"^(?:[a-z_0-9:~]+: )+(?:error loading model: )?")
SAYS_WHY = re.compile(r"GGML_ASSERT|ggml_abort|terminate called|what\(\):|error|fatal", re.I)


def scrub(text: str) -> str:
    """A line of the engine's without the directories of this machine."""
    return PATH.sub(r"\1", text)


def from_reason(reason: str) -> tuple[LoadFailure, str]:
    """Code and sentence for what llama.cpp said when it refused a file."""
    sentence = PREFIX.sub("", scrub(reason)).strip() or scrub(reason)
    if MEMORY.search(reason):
        return "insufficient_memory", sentence
    if UNSUPPORTED.search(reason):
        return "unsupported_model", sentence
    return "invalid_model_file", sentence


def from_exit(status: int, tail: Iterable[str]) -> tuple[LoadFailure, str]:
    """Code and sentence for a runner that died without saying so; `status` as Popen has it: -n is signal n."""
    lines = [scrub(line) for line in tail if line.strip()]
    memory = next((line for line in reversed(lines) if MEMORY.search(line)), None)
    if memory is not None:
        return "insufficient_memory", memory
    said = next((line for line in reversed(lines) if SAYS_WHY.search(line)), lines[-1] if lines else "it said nothing")
    if status == -signal.SIGKILL:
        return "engine_crashed", "the engine was killed by SIGKILL; the kernel does this when memory runs out"
    if status == -signal.SIGBUS:
        return "engine_crashed", "the engine died of SIGBUS: the model's file changed or could not be read"
    how = f"of {_signal_name(-status)}" if status < 0 else f"with status {status}"
    return "engine_crashed", f"the engine died {how}: {said}"


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:  # a real-time signal
        return f"signal {number}"
