"""How much memory a load takes, by device, from what the file's header says: pure functions.

The numbers are those of llama.cpp 0c1e57098.  Its weights and its KV cache are sums that can be done exactly.  Its
compute buffer is planned by an allocator that reuses memory from one step of the graph to the next, so its size is
that of the widest step and of what lies beside it: which tensors these are was concluded from dry runs of the engine
(`no_alloc`), with which tests compare.  In total it is within 3 % of them.  Not in it are the vocabulary, a process's
own needs (some 50 MB on a host) and what a driver takes for itself.

Layers are the blocks, and after the last of them the output.  GPUs take the last ones; those before, and what is before
the first block, stay with the CPU.

`exact` is False where this was not compared with the engine: for architectures that are not in CHECKED, for a header
that was not read to the end yet, where the KV cache is kept beside a GPU, and where several GPUs take all layers, for
it may have them work at the same time then, which takes more (pipeline parallelism, src/llama-context.cpp).  There the
engine itself says what it takes, in a dry run.
"""

from __future__ import annotations

from msgspec import Struct

from shared.memory.plan import Plan
from shared.schema.memory import CPU, Usage
from shared.schema.model import ENCODERS, Dimensions, Model, each

CELLS = 256  # a context is padded to a multiple of this many tokens
F16, F32 = 2, 4  # bytes: of what the KV cache holds, and of what is computed
CHECKED_DECODERS = frozenset({"llama", "qwen2", "qwen3", "qwen3moe", "gemma3"})
CHECKED_ENCODERS = frozenset({"bert"})
CHECKED_POOLINGS = range(-1, 4)  # not ranking, which has an output of its own
UNKNOWN_VOCABULARY = 262_144  # tokens: there are none much larger
MOST_BYTES = 2**53  # more than there is anywhere, and the last number that every JSON reader can hold


class Requirements(Struct, frozen=True, kw_only=True):
    """What a load takes.  `weights` and `context` have the bytes of each layer."""

    weights: list[int]
    context: list[int]
    tied_bytes: int  # a GPU that has the output has a copy of the embeddings
    input_bytes: int  # the embeddings
    compute_bytes: int  # of a GPU that has the output
    inner_compute_bytes: int  # of one that has not
    cpu_compute_bytes: int  # where the CPU has the output
    cpu_inner_compute_bytes: int  # where the CPU has layers, and not the output
    host_compute_bytes: int  # where it has no layer
    offload_kqv: bool
    exact: bool  # of one device; a KV cache beside a GPU is another one
    is_repacked: bool = False  # the CPU has its layers' weights twice: rearranged, and in the file's mapping

    @property
    def n_layers(self) -> int:
        return len(self.weights)

    def of_layer(self, i: int) -> int:
        """Bytes of a layer on a GPU."""
        tied = self.tied_bytes if i == self.n_layers - 1 else 0
        return self.weights[i] + tied + (self.context[i] if self.offload_kqv else 0)

    def single(self, first: int) -> int:
        """Bytes of one GPU that takes all layers from `first` on."""
        return self.on_gpu("", first, self.n_layers).total_bytes

    def is_exact(self, n_gpus: int, on_cpu: int) -> bool:
        """Whether this was compared with the engine, where so many GPUs take all layers but the first `on_cpu`."""
        return self.exact and (n_gpus == 0 or (self.offload_kqv and (n_gpus == 1 or on_cpu > 0)))

    def on_cpu(self) -> Usage:
        return Usage(
            id=CPU,
            weights_bytes=min(self.input_bytes + sum(self.weights) * (2 if self.is_repacked else 1), MOST_BYTES),
            context_bytes=min(sum(self.context), MOST_BYTES),
            compute_bytes=min(self.cpu_compute_bytes, MOST_BYTES),
        )

    def on_gpu(self, device: str, first: int, last: int) -> Usage:
        """What the layers from `first` up to, without it, `last` take of a GPU."""
        has_output = last == self.n_layers
        return Usage(
            id=device,
            weights_bytes=min(sum(self.weights[first:last]) + (self.tied_bytes if has_output else 0), MOST_BYTES),
            context_bytes=min(sum(self.context[first:last]), MOST_BYTES) if self.offload_kqv else 0,
            compute_bytes=min(self.compute_bytes if has_output else self.inner_compute_bytes, MOST_BYTES),
        )

    def beside_gpus(self, first: int) -> Usage:
        """What is left with the CPU where GPUs take the layers from `first` on."""
        return Usage(
            id=CPU,
            weights_bytes=min(self.input_bytes + sum(self.weights[:first]), MOST_BYTES),
            context_bytes=min(sum(self.context[:first] if self.offload_kqv else self.context), MOST_BYTES),
            compute_bytes=min(self.cpu_inner_compute_bytes if first else self.host_compute_bytes, MOST_BYTES),
        )


def requirements_of(model: Model, load: Plan) -> Requirements:
    """What a load takes of any devices.  Without dimensions, nothing is known of layers: all of it is one."""
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
        input_bytes, blocks, output_bytes, is_tied = 0, _parts(model.size_bytes, n), 0, False
    else:
        listed = len(weights.block_bytes) == n
        input_bytes, output_bytes = weights.input_bytes, weights.output_bytes
        blocks = weights.block_bytes if listed else _parts(weights.repeating_bytes, n)
        is_tied = _has_cache(model) and not weights.has_output
    beside = not load.offload_kqv and _has_cache(model)
    cells = _cells(load)
    return Requirements(
        weights=[*blocks, output_bytes],
        context=[*(cells * of_a_token for of_a_token in _cache_of_a_token(model, dimensions) or [0] * n), 0],
        tied_bytes=input_bytes if is_tied else 0,
        input_bytes=input_bytes,
        compute_bytes=_compute(model, dimensions, load, on_gpu=True),
        inner_compute_bytes=_compute(model, dimensions, load, on_gpu=True, has_output=False),
        cpu_compute_bytes=_compute(model, dimensions, load, on_gpu=False),
        cpu_inner_compute_bytes=_compute(model, dimensions, load, on_gpu=False, has_output=False),
        host_compute_bytes=_host_compute(model, dimensions, load),
        offload_kqv=not beside,
        is_repacked=load.repack,
        exact=_is_checked(model, dimensions),
    )


def _parts(n_bytes: int, n: int) -> list[int]:
    """`n` equal parts, to a byte."""
    return [n_bytes * (i + 1) // n - n_bytes * i // n for i in range(n)]


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


def _masks(dimensions: Dimensions, load: Plan) -> int:
    """Bytes by token of a batch: of every cell, whether the token sees it; once more where there is a window."""
    return (2 if dimensions.sliding_window else 1) * _cells(load) * (F16 if load.flash_attn is not False else F32)


def _host_compute(model: Model, dimensions: Dimensions, load: Plan) -> int:
    """What is computed beside GPUs that have all layers: the batch's embeddings, and the masks that go to them; of an
    encoder also those of the positions, and without flash attention the masks once more as F16."""
    batch, embeddings = min(load.n_ubatch, load.n_batch), F32 * dimensions.embedding_length
    if not _has_cache(model):
        return batch * (3 * embeddings + F16 * batch)
    masks = _masks(dimensions, load)
    return batch * (2 * embeddings + (masks * 3 // 2 if load.flash_attn is False else masks))


def _compute(model: Model, dimensions: Dimensions, load: Plan, *, on_gpu: bool, has_output: bool = True) -> int:
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

    cells, masks = _cells(load), _masks(dimensions, load)
    attention = F32 * (2 * n_embd + 2 * queries + keys + values) + masks + inputs
    if load.flash_attn is False:  # every token's weight of every cell, by head
        attention += F32 * max(each(dimensions.head_count, dimensions.block_count)) * cells
    used = load.expert_override[1] if load.expert_override else dimensions.expert_used_count
    if not model.expert_count:
        feed_forward = F32 * (3 * n_ff + 3 * n_embd)
    else:
        n_ff = dimensions.expert_feed_forward_length or n_ff
        # The experts' results take the place of two of the three that are inside, unless they are larger.
        feed_forward = F32 * (3 * used * n_ff + (3 if n_embd <= 2 * n_ff else used + 4) * n_embd)
    vocabulary = UNKNOWN_VOCABULARY if dimensions.vocabulary is None else dimensions.vocabulary
    output = F32 * (vocabulary + n_embd) + (masks if load.embedding else inputs) if has_output else 0
    copies = max(_cache_of_a_token(model, dimensions)) * cells if on_gpu and not load.offload_kqv else 0
    return copies + batch * max(attention, feed_forward + masks + inputs, output)
