"""Translates a load request into parameters of llama.cpp: a pure function, for loads and for estimates."""

from __future__ import annotations

from typing import Any

from msgspec import UNSET, Struct, structs

from shared.schema.http import KVCacheType, LoadRequest
from shared.schema.model import RECURRENT, Model
from shared.settings import Settings

UBATCH = 512  # llama.cpp's default physical batch, in tokens
MEAN = 1  # llama.cpp's LLAMA_POOLING_TYPE_MEAN
ENCODED = 8192  # tokens: the largest default context of an encoder, whose memory grows with its square
PARALLEL = 4  # default number of sequences that run at once
IDLE = (4, 16)  # sequences that keep the tokens of a finished request: at least, at most
OUTPUTS = 32  # tokens of a batch whose logits may be asked for
OUTPUT_BYTES = 32 << 20  # of logits; fewer idle sequences and outputs if a large vocabulary takes more
MOST_SEQUENCES = 256  # LLAMA_MAX_SEQ
TEXT = 8  # tokens: few texts to embed are shorter
UNKNOWN_VOCABULARY = 262_144  # tokens; few vocabularies are larger


class Plan(Struct, frozen=True, kw_only=True):
    """The parameters of a load under their llama.cpp names.  Values that make llama.cpp abort were refused before."""

    embedding: bool
    pooling: int | None = None  # of an embedding model whose file names none; None: what the file says
    n_ctx: int
    n_batch: int
    n_ubatch: int
    parallel: int  # sequences that run at once
    n_seq_max: int  # with those that are idle
    n_outputs_max: int  # tokens of a batch with logits or embeddings; more make llama.cpp abort
    kv_type: KVCacheType = "f16"
    flash_attn: bool | None  # None: the engine decides
    offload_kqv: bool
    repack: bool = False  # rearrange the weights on the CPU for faster decoding (use_extra_bufts)
    expert_override: tuple[str, int] | None  # metadata key and value: the number of experts per token
    moe: bool


def with_settings(request: LoadRequest, model: Model) -> LoadRequest:
    """Return a request with the settings of its model for what it leaves out, as far as the rest of it allows."""
    own = model.settings
    ours: dict[str, Any] = {
        "context_length": own.context_length,
        "ttl_seconds": None if own.pin else own.ttl_seconds,
    }
    if model.type == "llm":
        context_length = own.context_length if request.context_length is UNSET else request.context_length
        limits = (own.parallel, context_length, request.eval_batch_size, request.physical_batch_size)
        if own.parallel is not None:
            ours["parallel"] = min(limit for limit in limits if limit is not None and limit is not UNSET)
        if request.flash_attention is not False:
            ours["kv_cache_type"] = own.kv_cache_type
    missing = {name: value for name, value in ours.items() if value is not None and getattr(request, name) is UNSET}
    return structs.replace(request, **missing)


def plan(request: LoadRequest, model: Model, settings: Settings) -> Plan:
    """Return the engine's parameters for a request that respects the limits of `model`.

    Encoders and models with mean pooling must process their whole input in one physical batch; otherwise llama.cpp
    aborts.  The memory of that batch grows with its square, so the default context of an encoder is limited: 128k
    tokens take 36 GB even in a tiny model.  Causal embedding models with last-token pooling do not need that, and at
    32k tokens it would take a compute buffer of 21 GiB (measured with llama.cpp 0c1e57098 on the shape of
    Qwen3-Embedding-0.6B).

    llama.cpp keeps the logits of max(n_outputs, n_seq_max) tokens, and its compute buffer has those of n_outputs_max.
    An embedding model outputs every token; with mean pooling, llama.cpp aborts if the physical batch is not a multiple
    of n_seq_max.  A recurrent model has a state for each sequence, which may be as large as the cache of thousands of
    tokens: it gets no more sequences than may run.
    """
    asked = request.context_length
    n_rows = _rows(model)
    if model.type == "embedding":
        whole = not model.causal
        default = min(ENCODED if whole else settings.context_length, model.max_context_length)
        n_ctx = default if asked is UNSET else asked
        parallel = n_seq_max = _power_of_two(max(1, min(MOST_SEQUENCES, n_rows, n_ctx // TEXT)))
        n_batch = n_outputs_max = -(-n_ctx // n_seq_max) * n_seq_max
        n_ubatch = n_batch if whole or model.pooling == MEAN else min(UBATCH, n_batch)
        moe = False
    else:
        least = 1 if request.parallel is UNSET else request.parallel
        n_ctx = max(min(settings.context_length, model.max_context_length), least) if asked is UNSET else asked
        batch = request.eval_batch_size
        n_batch = min(max(settings.eval_batch_size, least) if batch is UNSET else batch, n_ctx)
        n_ubatch = min(UBATCH if request.physical_batch_size is UNSET else request.physical_batch_size, n_batch)
        parallel = min(PARALLEL, n_ubatch) if request.parallel is UNSET else request.parallel
        n_seq_max = min(parallel + _idle(parallel, model, n_rows), n_ubatch)
        n_outputs_max = min(max(n_seq_max, min(OUTPUTS, n_rows)), n_batch)
        moe = model.expert_count > 0
    experts = request.num_experts if moe else UNSET
    llm = model.type == "llm"
    return Plan(
        embedding=not llm,
        pooling=MEAN if not llm and model.pooling <= 0 else None,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        parallel=parallel,
        n_seq_max=n_seq_max,
        n_outputs_max=n_outputs_max,
        kv_type=request.kv_cache_type if llm and request.kv_cache_type is not UNSET else "f16",
        flash_attn=_flash_attn(request, settings) if llm else None,
        offload_kqv=request.offload_kv_cache_to_gpu
        if llm and request.offload_kv_cache_to_gpu is not UNSET
        else settings.offload_kv_cache_to_gpu,
        repack=settings.repack == "on",
        expert_override=None if experts is UNSET else (f"{model.architecture}.expert_used_count", experts),
        moe=moe,
    )


def _rows(model: Model) -> int:
    """Return the number of tokens whose logits take OUTPUT_BYTES; at least 1."""
    vocabulary = model.dimensions.vocabulary if model.dimensions is not None else None
    return max(1, OUTPUT_BYTES // (4 * (vocabulary or UNKNOWN_VOCABULARY)))


def _idle(parallel: int, model: Model, n_rows: int) -> int:
    if model.architecture in RECURRENT:
        return 0
    least, most = IDLE
    return max(least, _power_of_two(min(parallel + most, n_rows)) - parallel)


def _power_of_two(most: int) -> int:
    """Return the largest power of two up to `most`.

    llama.cpp reserves memory for a multiple of n_seq_max tokens: with a power of two, a physical batch of 512 stays
    one.  The number must not depend on the batch, so that a larger one never takes less memory.
    """
    return 1 << (most.bit_length() - 1)


def _flash_attn(request: LoadRequest, settings: Settings) -> bool | None:
    """Return whether to use flash attention.  A quantized cache needs it, whatever the operator's default."""
    if request.flash_attention is not UNSET:
        return request.flash_attention
    if request.kv_cache_type is not UNSET and request.kv_cache_type != "f16":
        return True
    return {"auto": None, "on": True, "off": False}[settings.flash_attention]
