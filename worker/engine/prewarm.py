"""Prewarming: a runner for the CPU, while it waits, loads and frees a tiny model and touches the heap.

A fresh process pays for what it touches first: the engine's code and tables, and each page that the kernel gives it.
That is nearly half of the load of a tiny model, and too little to notice in that of a large one: 14.8 ms without
prewarming, 11.2 with the heap alone, 8.1 with the model as well (medians of 60 loads each, two cores).  A runner for
GPUs does not prewarm: it would take memory of the driver's that no worker has reserved.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shared import libc
from worker.engine import llama
from worker.runner.protocol import Load

MODEL = Path(__file__).with_name("prewarm.gguf")  # by shared.synthetic.models.prewarm
HEAP_BYTES = 16 << 20  # a tiny model's context, or a large one's vocabulary
MOST_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: a larger block is always a mapping of its own


def prewarm(log: llama.Log) -> None:
    """Load and free the tiny model without output, and touch the heap that the next load takes."""
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
