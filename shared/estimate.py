"""How much memory a load takes on one device, from what the file's header says: pure functions.

The numbers are those of llama.cpp 0c1e57098.  Its weights and its KV cache are sums that can be done exactly.  Its
compute buffer is planned by an allocator that reuses memory from one step of the graph to the next, so its size is
that of the widest step and of what lies beside it: which tensors these are was concluded from dry runs of the engine
(`no_alloc`), with which tests compare.  In total it is within 3 % of them.  Not in it are the vocabulary, a process's
own needs (some 50 MB on a host) and what a driver takes for itself.

`exact` is False where this was not compared with the engine: for architectures that are not in CHECKED, for a header
that was not read to the end yet, and where the KV cache is kept beside a GPU.  What is missing for these is a dry run
by the engine itself, in a runner.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import Struct, structs

from shared.modelfile import ENCODERS
from shared.plan import Plan, plan
from shared.schema import Device, Dimensions, LoadRequest, Model, each
from shared.settings import Settings

CELLS = 256  # a context is padded to a multiple of this many tokens
F16, F32 = 2, 4  # bytes: of what the KV cache holds, and of what is computed
CHECKED_DECODERS = frozenset({"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"})
CHECKED_ENCODERS = frozenset({"bert"})
CHECKED_POOLINGS = range(-1, 4)  # not ranking, which has an output of its own
UNKNOWN_VOCABULARY = 262_144  # tokens: there are none much larger
MOST_BYTES = 2**53  # more than there is anywhere, and the last number that every JSON reader can hold


class Estimate(Struct, frozen=True, kw_only=True):
    """Bytes on the device that a model is loaded onto."""

    weights_bytes: int
    context_bytes: int  # the KV cache
    compute_bytes: int
    exact: bool

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.compute_bytes


def estimate(model: Model, load: Plan, kind: Literal["gpu", "cpu"]) -> Estimate:
    """What a load takes of one device of this kind; of the host's memory beside a GPU it says nothing."""
    dimensions, on_gpu = model.dimensions, kind == "gpu"
    if dimensions is None:
        return Estimate(weights_bytes=model.size_bytes, context_bytes=0, compute_bytes=0, exact=False)
    beside = on_gpu and not load.offload_kqv
    cache = 0 if beside else _cells(load) * sum(_cache_of_a_token(model, dimensions))
    return Estimate(
        weights_bytes=min(_weights(model, dimensions, on_gpu=on_gpu), MOST_BYTES),
        context_bytes=min(cache, MOST_BYTES),
        compute_bytes=min(_compute(model, dimensions, load, on_gpu=on_gpu), MOST_BYTES),
        exact=_is_checked(model, dimensions) and (not beside or not _has_cache(model)),
    )


def fits(needed: Estimate, devices: Sequence[Device]) -> bool:
    """Whether that is free on these devices; each has a compute buffer of its own, and a part of the rest."""
    parts = needed.weights_bytes + needed.context_bytes
    return parts + len(devices) * needed.compute_bytes <= sum(device.free_bytes for device in devices)


def largest_context_length(
    request: LoadRequest, model: Model, settings: Settings, devices: Sequence[Device]
) -> int | None:
    """The largest context length with which this request fits on these devices: a multiple of 256, or the model's
    maximum; None where no context is small enough.  More context never takes less memory."""

    def fit(context_length: int) -> bool:
        load = plan(structs.replace(request, context_length=context_length), model, settings)
        return fits(estimate(model, load, devices[0].kind), devices)

    if fit(model.max_context_length):
        return model.max_context_length
    low, high = 0, -(-model.max_context_length // CELLS)  # in multiples: `low` fits, or is none; `high` does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle * CELLS) else (low, middle)
    return low * CELLS or None


def _is_checked(model: Model, dimensions: Dimensions) -> bool:
    is_known = model.weights is not None and (dimensions.vocabulary is not None or not _has_cache(model))
    checked = CHECKED_DECODERS if model.causal else CHECKED_ENCODERS
    return is_known and model.architecture in checked and model.pooling in CHECKED_POOLINGS


def _has_cache(model: Model) -> bool:
    return model.architecture not in ENCODERS


def _cells(load: Plan) -> int:
    return -(-load.n_ctx // CELLS) * CELLS


def _cache_of_a_token(model: Model, dimensions: Dimensions) -> list[int]:
    """Bytes by block.  A sliding window does not shorten the cache: llama.cpp's `swa_full` is on by default."""
    if not _has_cache(model):
        return []
    heads = each(dimensions.head_count_kv, dimensions.block_count)
    return [F16 * n * (dimensions.key_length + dimensions.value_length) for n in heads]


def _weights(model: Model, dimensions: Dimensions, *, on_gpu: bool) -> int:
    """Beside a GPU the embeddings stay in the host's memory; where they are the output matrix too, it gets a copy."""
    weights = model.weights
    if weights is None:
        return model.size_bytes
    in_all = weights.input_bytes + weights.repeating_bytes + weights.output_bytes
    is_tied = _has_cache(model) and not weights.has_output
    return in_all - weights.input_bytes if on_gpu and not is_tied else in_all


def _compute(model: Model, dimensions: Dimensions, load: Plan, *, on_gpu: bool) -> int:
    """A physical batch's widest step, by token: attention, feed-forward, or output.

    On a GPU the embeddings of the batch are not beside them.
    """
    batch = min(load.n_ubatch, load.n_batch)
    n_embd = dimensions.embedding_length
    queries = max(each(dimensions.head_count, dimensions.block_count)) * dimensions.key_length
    heads_kv = max(each(dimensions.head_count_kv, dimensions.block_count))
    keys, values = heads_kv * dimensions.key_length, heads_kv * dimensions.value_length
    n_ff = max(each(dimensions.feed_forward_length, dimensions.block_count))
    inputs = 0 if on_gpu else F32 * n_embd

    if not _has_cache(model):  # attention is among the tokens of the batch, with keys and values as F16
        mask = F16 * batch
        attention = F32 * (queries + keys + values) + F16 * (keys + values) + F16 * n_embd
        feed_forward = F32 * (n_ff + 2 * n_embd)
        return batch * (max(attention, feed_forward) + mask + inputs)

    cells, is_flash = _cells(load), load.flash_attn is not False
    masks = (2 if dimensions.sliding_window else 1) * cells * (F16 if is_flash else F32)
    attention = F32 * (2 * n_embd + 2 * queries + keys + values) + masks + inputs
    if not is_flash:  # every token's weight of every cell, by head
        attention += F32 * max(each(dimensions.head_count, dimensions.block_count)) * cells
    used = load.expert_override[1] if load.expert_override else dimensions.expert_used_count
    if not model.expert_count:
        feed_forward = F32 * (3 * n_ff + 3 * n_embd)
    else:
        n_ff = dimensions.expert_feed_forward_length or n_ff
        # The experts' results take the place of two of the three that are inside, unless they are larger.
        feed_forward = F32 * (3 * used * n_ff + (3 if n_embd <= 2 * n_ff else used + 4) * n_embd)
    vocabulary = UNKNOWN_VOCABULARY if dimensions.vocabulary is None else dimensions.vocabulary
    output = F32 * (vocabulary + n_embd) + (masks if load.embedding else inputs)
    copies = max(_cache_of_a_token(model, dimensions)) * cells if on_gpu and not load.offload_kqv else 0
    return copies + batch * max(attention, feed_forward + masks + inputs, output)
