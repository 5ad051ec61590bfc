"""Estimates the memory of a load on each device from the header of its file: pure functions.

The formulas are those of llama.cpp 0c1e57098.  The sizes of the weights and of the KV cache are exact sums.  The
compute buffer is planned by an allocator that reuses memory between the steps of the graph, so its size is that of the
widest step and of the tensors that live at the same time.  Which tensors these are was inferred from dry runs of the
engine (`no_alloc`); tests compare the estimate with dry runs.  The total is within 3 % of a dry run.  It does not
include the vocabulary, the memory of the process itself (some 50 MB on the host) and the memory of the driver.

Layers are the blocks, followed by the output.  GPUs take the last layers; the first layers, and the tensors before the
first block, stay on the CPU.

`exact` is False for configurations that were not compared with the engine: architectures that are not in CHECKED_*,
headers that were not read to the end yet, physical batches of an LLM over 512 tokens (5 % off), a KV cache in host
memory beside a GPU, and several GPUs that take all layers, since the engine may then use pipeline parallelism, which
takes more (src/llama-context.cpp).  For these, the engine reports the sizes in a dry run.  The formula is a guess
there: it does not know recurrent layers, compressed or shared caches, or attention without a cache.  For the
architectures in NEAR it is off by at most a quarter.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from msgspec import Struct, structs

from shared.memory.plan import MEAN, UBATCH, UNKNOWN_VOCABULARY, Plan
from shared.schema.http import KVCacheType
from shared.schema.memory import CPU, Usage
from shared.schema.model import ENCODERS, Dimensions, Model, each

CELLS = 256  # a context is padded to a multiple of this many tokens
F16, F32 = 2, 4  # bytes of an element
BLOCK = 32  # elements of the KV cache that are quantized together
BLOCK_BYTES: dict[KVCacheType, int] = {"f16": F16 * BLOCK, "q8_0": 34, "q4_0": 18}
CHECKED_DECODERS = frozenset({"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"})
CHECKED_ENCODERS = frozenset({"bert"})
WINDOWED = frozenset({"gemma3"})  # of these; in others a sliding window was not compared, and llama.cpp may ignore it
NEAR = frozenset(
    {
        *CHECKED_DECODERS,
        *CHECKED_ENCODERS,
        "baichuan",
        "bitnet",
        "chatglm",
        "command-r",
        "cohere2",
        "exaone",
        "exaone4",
        "falcon",
        "gemma",
        "glm4",
        "gpt-oss",
        "granite",
        "granitemoe",
        "hunyuan-dense",
        "internlm2",
        "minicpm",
        "mistral3",
        "nemotron",
        "olmo",
        "olmo2",
        "openelm",
        "orion",
        "phi2",
        "phi3",
        "qwen",
        "qwen2vl",
        "smollm3",
        "stablelm",
        "starcoder2",
        "xverse",
    }
)
CHECKED_POOLINGS = range(-1, 4)  # without ranking, which has an output of its own
MOST_BYTES = 2**53  # a limit above any real size: the largest number that every JSON reader represents exactly


class Requirements(Struct, frozen=True, kw_only=True):
    """The memory requirements of a load, in bytes.  `weights` and `context` have one value per layer."""

    weights: list[int]
    context: list[int]
    tied_bytes: int  # copy of the embeddings on the GPU that has the output
    input_bytes: int  # the embeddings
    compute_bytes: int  # of the GPU that has the output
    inner_compute_bytes: int  # of any other GPU
    cpu_compute_bytes: int  # of the CPU if it has the output
    cpu_inner_compute_bytes: int  # of the CPU if it has layers, but not the output
    host_compute_bytes: int  # of the CPU if it has no layers
    offload_kqv: bool
    exact: bool  # for one device and a KV cache on that device; see is_exact
    near: bool = False  # the formula is off by at most a quarter; see is_near
    is_repacked: bool = False  # the CPU has its weights twice: rearranged, and in the mapping of the file
    figures: dict[int, list[Usage]] = {}  # of the engine, for one device that takes all layers from this one on

    @property
    def n_layers(self) -> int:
        return len(self.weights)

    def of_layer(self, i: int) -> int:
        """Return the bytes of a layer on a GPU."""
        tied = self.tied_bytes if i == self.n_layers - 1 else 0
        return self.weights[i] + tied + (self.context[i] if self.offload_kqv else 0)

    def single(self, first: int) -> int:
        """Return the bytes on one GPU that takes all layers from `first` on."""
        return self.on_gpu("", first, self.n_layers).total_bytes

    def is_exact(self, n_gpus: int, on_cpu: int) -> bool:
        """Return whether the estimate is verified if `n_gpus` GPUs take all layers but the first `on_cpu`."""
        if (on_cpu if n_gpus else self.n_layers) in self.figures:
            return n_gpus <= 1
        return self.exact and self._is_covered(n_gpus, on_cpu)

    def is_near(self, n_gpus: int, on_cpu: int) -> bool:
        """Return whether the formula is off by at most a quarter for this division of the layers."""
        return self.near and self._is_covered(n_gpus, on_cpu)

    def _is_covered(self, n_gpus: int, on_cpu: int) -> bool:
        return n_gpus == 0 or (self.offload_kqv and (n_gpus == 1 or on_cpu > 0))

    def measured(self, first: int, usage: Sequence[Usage]) -> Requirements:
        """Return these requirements with the engine's figures for one GPU that takes the layers from `first` on.

        `usage` is that of the GPU, if `first` is a layer, followed by the host's.  For other divisions of the layers,
        weights, context and compute buffers are in the same proportion as by the formula.

        The weights of a load for the CPU stay those of the formula: it maps the file, which a dry run does not.
        """
        *on_gpu, host = usage
        weights, context = [*self.weights], [*self.context]
        changes: dict[str, int]
        if on_gpu:
            (gpu,) = on_gpu
            weights[first:] = _scaled(weights[first:], max(0, gpu.weights_bytes - self.tied_bytes))
            if self.offload_kqv:
                context[first:] = _scaled(context[first:], gpu.context_bytes)
            inner_bytes = self.inner_compute_bytes * gpu.compute_bytes // max(1, self.compute_bytes)
            changes = {"compute_bytes": gpu.compute_bytes, "inner_compute_bytes": inner_bytes}
        else:
            host = structs.replace(host, weights_bytes=self.on_cpu().weights_bytes)
            context = _scaled(context, host.context_bytes)
            inner_bytes = self.cpu_inner_compute_bytes * host.compute_bytes // max(1, self.cpu_compute_bytes)
            changes = {"cpu_compute_bytes": host.compute_bytes, "cpu_inner_compute_bytes": inner_bytes}
        figures = {**self.figures, first: [*on_gpu, host]}
        return structs.replace(self, weights=weights, context=context, figures=figures, **changes)

    def on_cpu(self) -> Usage:
        """Return the usage of the host if the CPU takes all layers."""
        if figures := self.figures.get(self.n_layers):
            return structs.replace(figures[-1], id=CPU)
        return Usage(
            id=CPU,
            weights_bytes=min(self.input_bytes + sum(self.weights) * (2 if self.is_repacked else 1), MOST_BYTES),
            context_bytes=min(sum(self.context), MOST_BYTES),
            compute_bytes=min(self.cpu_compute_bytes, MOST_BYTES),
        )

    def on_gpu(self, device: str, first: int, last: int) -> Usage:
        """Return the usage of a GPU that takes the layers from `first` up to, but not including, `last`."""
        has_output = last == self.n_layers
        if has_output and first < last and (figures := self.figures.get(first)):
            return structs.replace(figures[0], id=device)
        return Usage(
            id=device,
            weights_bytes=min(sum(self.weights[first:last]) + (self.tied_bytes if has_output else 0), MOST_BYTES),
            context_bytes=min(sum(self.context[first:last]), MOST_BYTES) if self.offload_kqv else 0,
            compute_bytes=min(self.compute_bytes if has_output else self.inner_compute_bytes, MOST_BYTES),
        )

    def beside_gpus(self, first: int) -> Usage:
        """Return the usage of the host if GPUs take the layers from `first` on."""
        if first < self.n_layers and (figures := self.figures.get(first)):
            return structs.replace(figures[-1], id=CPU)
        return Usage(
            id=CPU,
            weights_bytes=min(self.input_bytes + sum(self.weights[:first]), MOST_BYTES),
            context_bytes=min(sum(self.context[:first] if self.offload_kqv else self.context), MOST_BYTES),
            compute_bytes=min(self.cpu_inner_compute_bytes if first else self.host_compute_bytes, MOST_BYTES),
        )


def requirements_of(model: Model, load: Plan) -> Requirements:
    """Compute the requirements of a load.  A model without known dimensions counts as a single layer."""
    dimensions = model.dimensions
    if dimensions is None:
        return Requirements(
            weights=[model.size_bytes],
            context=[0],
            tied_bytes=0,
            input_bytes=0,
            compute_bytes=0,
            inner_compute_bytes=0,
            cpu_compute_bytes=0,
            cpu_inner_compute_bytes=0,
            host_compute_bytes=0,
            offload_kqv=True,
            is_repacked=load.repack,
            exact=False,
        )
    n = dimensions.block_count
    weights = model.weights
    if weights is None:
        input_bytes, blocks, output_bytes, is_tied = 0, _scaled([1] * n, model.size_bytes), 0, False
    else:
        listed = len(weights.block_bytes) == n
        input_bytes, output_bytes = weights.input_bytes, weights.output_bytes
        blocks = weights.block_bytes if listed else _scaled([1] * n, weights.repeating_bytes)
        is_tied = _has_cache(model) and not weights.has_output
    beside = not load.offload_kqv and _has_cache(model)
    cells = _cells(load)
    logits = logits_bytes(load, _vocabulary(dimensions))
    return Requirements(
        weights=[*blocks, output_bytes],
        context=[*(cells * of_a_token for of_a_token in _cache_of_a_token(model, dimensions, load) or [0] * n), 0],
        tied_bytes=input_bytes if is_tied else 0,
        input_bytes=input_bytes,
        compute_bytes=_compute(model, dimensions, load, on_gpu=True),
        inner_compute_bytes=_compute(model, dimensions, load, on_gpu=True, has_output=False),
        cpu_compute_bytes=_compute(model, dimensions, load, on_gpu=False) + logits,
        cpu_inner_compute_bytes=_compute(model, dimensions, load, on_gpu=False, has_output=False) + logits,
        host_compute_bytes=_host_compute(model, dimensions, load) + logits,
        offload_kqv=not beside,
        is_repacked=load.repack,
        exact=_is_checked(model, dimensions, load),
        near=model.architecture in NEAR and model.pooling in CHECKED_POOLINGS,
    )


def _scaled(parts: Sequence[int], n_bytes: int) -> list[int]:
    """Change parts in proportion so that their sum is `n_bytes`; evenly, if all of them are 0."""
    sums = [*accumulate(parts if any(parts) else [1] * len(parts), initial=0)]
    ends = [n_bytes * one // max(1, sums[-1]) for one in sums]
    return [end - start for start, end in pairwise(ends)]


def _is_checked(model: Model, dimensions: Dimensions, load: Plan) -> bool:
    if model.type == "llm" and load.n_ubatch > UBATCH:
        return False
    is_known = model.weights is not None and (dimensions.vocabulary is not None or not _has_cache(model))
    checked = CHECKED_DECODERS if model.causal else CHECKED_ENCODERS
    if dimensions.sliding_window:
        checked &= WINDOWED
    return is_known and model.architecture in checked and model.pooling in CHECKED_POOLINGS


def _has_cache(model: Model) -> bool:
    return model.architecture not in ENCODERS


def _cells(load: Plan) -> int:
    return -(-load.n_ctx // CELLS) * CELLS


def _vocabulary(dimensions: Dimensions) -> int:
    return UNKNOWN_VOCABULARY if dimensions.vocabulary is None else dimensions.vocabulary


def logits_bytes(load: Plan, vocabulary: int) -> int:
    """Return the host's memory for the logits of a batch, to which the engine copies them.

    `llama_context::output_reserve` enlarges it for the batch with the most outputs; the engine's own figures leave it
    out.  Embedding models have no use for logits.
    """
    return 0 if load.embedding else F32 * load.n_outputs_max * vocabulary


def _batch(load: Plan) -> int:
    """Return the tokens of the physical batch that the engine reserves memory for: as many of each sequence."""
    return -(-min(load.n_ubatch, load.n_batch) // load.n_seq_max) * load.n_seq_max


def _cache_of_a_token(model: Model, dimensions: Dimensions, load: Plan) -> list[int]:
    """Return the KV cache bytes per token, by block.  A sliding window saves nothing: `swa_full` is on."""
    if not _has_cache(model):
        return []
    heads = each(dimensions.head_count_kv, dimensions.block_count)
    block_bytes = BLOCK_BYTES[load.kv_type]
    return [n * (dimensions.key_length + dimensions.value_length) * block_bytes // BLOCK for n in heads]


def _masks(dimensions: Dimensions, load: Plan) -> int:
    """Return the bytes per token of the attention masks over all cells: one mask, or two with a sliding window."""
    return (2 if dimensions.sliding_window else 1) * _cells(load) * (F16 if load.flash_attn is not False else F32)


def _host_compute(model: Model, dimensions: Dimensions, load: Plan) -> int:
    """Return the compute bytes of the host if GPUs have all layers: the embeddings of the batch and the masks.

    An encoder also needs position embeddings; without flash attention, the masks are also kept as F16.
    """
    batch, embeddings = _batch(load), F32 * dimensions.embedding_length
    if not _has_cache(model):
        return batch * (3 * embeddings + F16 * batch)
    masks = _masks(dimensions, load)
    return batch * (2 * embeddings + (masks * 3 // 2 if load.flash_attn is False else masks))


def _compute(model: Model, dimensions: Dimensions, load: Plan, *, on_gpu: bool, has_output: bool = True) -> int:
    """Return the bytes of the widest step of a physical batch: attention, feed-forward or output.

    On the CPU, the embeddings of the batch are in memory at the same time.
    """
    batch = _batch(load)
    n_embd = dimensions.embedding_length
    queries = max(each(dimensions.head_count, dimensions.block_count)) * dimensions.key_length
    heads_kv = max(each(dimensions.head_count_kv, dimensions.block_count))
    keys, values = heads_kv * dimensions.key_length, heads_kv * dimensions.value_length
    n_ff = max(each(dimensions.feed_forward_length, dimensions.block_count))
    inputs = 0 if on_gpu else F32 * n_embd

    if not _has_cache(model):  # attention is within the batch, with keys and values as F16
        mask = F16 * batch
        attention = F32 * (queries + keys + values) + F16 * (keys + values) + F16 * n_embd
        feed_forward = F32 * (n_ff + 2 * n_embd)
        means = F32 * load.n_seq_max if MEAN in (load.pooling, model.pooling) else 0
        return batch * (max(attention, feed_forward) + mask + inputs + means)

    cells, masks = _cells(load), _masks(dimensions, load)
    attention = F32 * (2 * n_embd + 2 * queries + keys + values) + masks + inputs
    if load.flash_attn is False:  # the attention weights: per token, cell and head
        attention += F32 * max(each(dimensions.head_count, dimensions.block_count)) * cells
    used = load.expert_override[1] if load.expert_override else dimensions.expert_used_count
    if not model.expert_count:
        feed_forward = F32 * (3 * n_ff + 3 * n_embd)
    else:
        n_ff = dimensions.expert_feed_forward_length or n_ff
        # The experts' results reuse two of the three inner buffers, unless they are larger.
        feed_forward = F32 * (3 * used * n_ff + (3 if n_embd <= 2 * n_ff else used + 4) * n_embd)
    n_outputs = min(batch, load.n_outputs_max)
    output = n_outputs * F32 * (_vocabulary(dimensions) + n_embd) + batch * (masks if load.embedding else inputs)
    copies = max(_cache_of_a_token(model, dimensions, load)) * cells if on_gpu and not load.offload_kqv else 0
    return copies + max(batch * max(attention, feed_forward + masks + inputs), output if has_output else 0)
