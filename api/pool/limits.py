"""Checks the limits of a model."""

from __future__ import annotations

from msgspec import UNSET

from shared.errors import InvalidValue
from shared.memory.estimate import BLOCK
from shared.schema.http import GPURequest, KVCacheType, LoadRequest
from shared.schema.model import Model


def check(request: LoadRequest, model: Model) -> None:
    """Raise InvalidValue if a request exceeds the limits of the model, or would make llama.cpp abort."""
    if request.gpu is not UNSET:
        _check_split(request.gpu)
    if request.context_length is not UNSET and request.context_length > model.max_context_length:
        raise InvalidValue(
            f"'context_length': {request.context_length} exceeds the maximum of {model.max_context_length} tokens of "
            f"'{request.model}'.",
            param="context_length",
            maximum=model.max_context_length,
        )
    if model.type != "llm":
        return
    if model.expert_count and request.num_experts is not UNSET and request.num_experts > model.expert_count:
        raise InvalidValue(
            f"'num_experts': expected integer from 1 to {model.expert_count}, got {request.num_experts}.",
            param="num_experts",
            maximum=model.expert_count,
        )
    if request.kv_cache_type is not UNSET:
        _check_quantized(request, request.kv_cache_type, model)
    if request.parallel is not UNSET:
        limits = {
            "context_length": model.max_context_length if request.context_length is UNSET else request.context_length,
            "eval_batch_size": request.eval_batch_size,
            "physical_batch_size": request.physical_batch_size,
        }
        for name, limit in limits.items():
            if limit is not UNSET and limit < request.parallel:
                raise InvalidValue(
                    f"'parallel': expected integer <= {limit} (limited by '{name}'), got {request.parallel}.",
                    param="parallel",
                    maximum=limit,
                )


def _check_quantized(request: LoadRequest, kv_type: KVCacheType, model: Model) -> None:
    if kv_type == "f16":
        return
    if request.flash_attention is False:
        raise InvalidValue(
            f"'kv_cache_type': '{kv_type}' needs flash attention, but 'flash_attention' is false.",
            param="kv_cache_type",
        )
    dimensions = model.dimensions
    for length in (dimensions.key_length, dimensions.value_length) if dimensions is not None else ():
        if length % BLOCK:
            raise InvalidValue(
                f"'kv_cache_type': '{kv_type}' needs attention heads whose size is a multiple of {BLOCK}, but those of "
                f"'{request.model}' have {length}.",
                param="kv_cache_type",
            )


def _check_split(gpu: GPURequest) -> None:
    ratios = gpu.split if isinstance(gpu.split, list) else None
    if ratios is not None and not sum(ratios):
        raise InvalidValue("'gpu.split': at least one ratio must be greater than 0.", param="gpu.split")
    if ratios is not None and gpu.devices is not UNSET and len(ratios) != len(gpu.devices):
        raise InvalidValue(
            f"'gpu.split': expected {len(gpu.devices)} ratios, one for each of 'gpu.devices', got {len(ratios)}.",
            param="gpu.split",
        )
