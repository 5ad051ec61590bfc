"""Translates a load request into parameters of llama.cpp: a pure function, for loads and for estimates."""

from __future__ import annotations

from msgspec import UNSET, Struct

from shared.schema.http import LoadRequest
from shared.schema.model import Model
from shared.settings import Settings

UBATCH = 512  # llama.cpp's default physical batch, in tokens
MEAN = 1  # llama.cpp's LLAMA_POOLING_TYPE_MEAN
ENCODED = 8192  # tokens: the largest default context of an encoder, whose memory grows with its square


class Plan(Struct, frozen=True, kw_only=True):
    """The parameters of a load under their llama.cpp names.  Values that make llama.cpp abort were refused before."""

    embedding: bool
    n_ctx: int
    n_batch: int
    n_ubatch: int
    n_seq_max: int
    flash_attn: bool | None  # None: the engine decides
    offload_kqv: bool
    repack: bool = False  # rearrange the weights on the CPU for faster decoding (use_extra_bufts)
    expert_override: tuple[str, int] | None  # metadata key and value: the number of experts per token
    moe: bool


def plan(request: LoadRequest, model: Model, settings: Settings) -> Plan:
    """Return the engine's parameters for a request that respects the limits of `model`.

    Encoders and models with mean pooling must process their whole input in one physical batch; otherwise llama.cpp
    aborts.  The memory of that batch grows with its square, so the default context of an encoder is limited: 128k
    tokens take 36 GB even in a tiny model.  Causal embedding models with last-token pooling do not need that, and at
    32k tokens it would take a compute buffer of 21 GiB (measured with llama.cpp 0c1e57098 on the shape of
    Qwen3-Embedding-0.6B).
    """
    asked = request.context_length
    if model.type == "embedding":
        whole = not model.causal
        default = min(ENCODED if whole else settings.context_length, model.max_context_length)
        n_ctx = default if asked is UNSET else asked
        n_batch = n_ctx
        n_ubatch = n_ctx if whole or model.pooling == MEAN else min(UBATCH, n_ctx)
        parallel, moe = 1, False
    else:
        parallel = 1 if request.parallel is UNSET else request.parallel
        moe = model.expert_count > 0
        n_ctx = max(min(settings.context_length, model.max_context_length), parallel) if asked is UNSET else asked
        batch = request.eval_batch_size
        n_batch = min(max(settings.eval_batch_size, parallel) if batch is UNSET else batch, n_ctx)
        n_ubatch = min(UBATCH if request.physical_batch_size is UNSET else request.physical_batch_size, n_batch)
    experts = request.num_experts if moe else UNSET
    llm = model.type == "llm"
    return Plan(
        embedding=not llm,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_seq_max=parallel,
        flash_attn=_flash_attn(request, settings) if llm else None,
        offload_kqv=request.offload_kv_cache_to_gpu
        if llm and request.offload_kv_cache_to_gpu is not UNSET
        else settings.offload_kv_cache_to_gpu,
        repack=settings.repack == "on",
        expert_override=None if experts is UNSET else (f"{model.architecture}.expert_used_count", experts),
        moe=moe,
    )


def _flash_attn(request: LoadRequest, settings: Settings) -> bool | None:
    if request.flash_attention is not UNSET:
        return request.flash_attention
    return {"auto": None, "on": True, "off": False}[settings.flash_attention]
