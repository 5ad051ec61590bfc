"""What a runner for the CPU does while it waits: a load of its own, so that the one it waits for is not its first.

A fresh process pays for what it touches first: the engine's code and tables, and each page that the kernel has to give
it.  That is half of a tiny model's load (10.4 ms, prewarmed 4.8 ms), and nothing that a large one would notice.
With GPUs it is left out: what is first touched there is the driver's, and takes memory that nobody has reserved.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shared import libc
from worker.engine import llama
from worker.runner.protocol import Load

MODEL = Path(__file__).with_name("prewarm.gguf")  # by shared.synthetic.models.prewarm
HEAP_BYTES = 16 << 20  # a tiny model's context, or a large one's vocabulary
MOST_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: what is larger is a mapping of its own in any case


def prewarm(log: llama.Log) -> None:
    """Load and free a tiny model, and touch the heap that the next load takes."""
    load = Load(
        shards=[str(MODEL)],
        total_bytes=MODEL.stat().st_size,
        check_tensors=False,
        devices=[],
        layers=[],
        embedding=False,
        n_ctx=256,
        n_batch=32,
        n_ubatch=32,
        n_seq_max=1,
        flash_attn=None,
        offload_kqv=True,
        expert_override=None,
        moe=False,
        parallel_asked=False,
    )
    log.is_muted = True
    try:
        with suppress(llama.LoadError):  # the load itself will say what is wrong with the engine
            loaded = llama.Loaded(load, log, lambda phase, n_bytes: None)
            loaded.ready(load)
            loaded.close()
    finally:
        log.forget()
        log.is_muted = False
    if libc.keep_heap(MOST_BYTES):
        libc.touch_heap(HEAP_BYTES)
