"""Prewarms an idle runner for the CPU: loads and frees a tiny model and touches the heap.

A fresh process faults in the engine's code and tables, and each new page of its heap, at first use.  That is nearly
half the load time of a tiny model, and negligible for a large one: 14.8 ms without prewarming, 11.2 with the heap only,
8.1 with heap and model (medians of 60 loads each, two cores).  A runner for GPUs does not prewarm, since it would use
device memory that no worker has reserved.
"""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

from shared import libc
from worker.engine import llama
from worker.runner.protocol import Load

MODEL = Path(__file__).with_name("prewarm.gguf")  # written by shared.synthetic.models.prewarm
HEAP_BYTES = 16 << 20  # enough for the context of a tiny model, or the vocabulary of a large one
MOST_BYTES = 32 << 20  # glibc's DEFAULT_MMAP_THRESHOLD_MAX: a larger block is always a separate mapping


def prewarm(log: llama.Log) -> None:
    """Load and free the tiny model without output, and touch the heap that the next load will use."""
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
        parallel=1,
        n_seq_max=1,
        n_outputs_max=1,
        flash_attn=None,
        offload_kqv=True,
        expert_override=None,
        moe=False,
    )
    log.is_muted = True
    try:
        with suppress(llama.LoadError):  # the next load reports what is wrong with the engine
            loaded = llama.Loaded(load, log, lambda phase, n_bytes: None)
            loaded.ready(load)
            loaded.close()
    finally:
        log.forget()
        log.is_muted = False
    if libc.keep_heap(MOST_BYTES):
        libc.touch_heap(HEAP_BYTES)
