"""Finds the metadata that llama.cpp does not report but asserts, which would abort its process.

The rules are those of llama.cpp 0c1e57098: src/llama-model.cpp (load_hparams), src/llama-graph.cpp, src/models, and
ggml's operations.  The message of a defect continues a sentence that begins with the file's name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from worker.catalog.architectures import (
    ATTENTION_ONLY,
    BY_INTERVAL,
    EQUAL_LENGTHS,
    EXPERTS_ONLY,
    HYBRIDS,
    NO_ROTATION,
    SECTIONS,
    WHOLE_ROTATION,
    WINDOWS,
)
from worker.catalog.fields import Fields

MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS; measured: 1024 passes, 1025 aborts
MAX_GATING = 4  # llama_expert_gating_func_type
MAX_POOLING, NO_POOLING_TYPE = 4, 2**32 - 1  # llama_pooling_type; the second is its -1
MAX_INT = 2**31 - 1
ROPE_SCALING_TYPES = frozenset({"none", "linear", "yarn", "longrope"})
ONE_IS_NONE = frozenset({"hunyuan-dense", "hunyuan_vl"})  # one expert means a model without experts
EPSILONS = ("layer_norm_epsilon", "layer_norm_rms_epsilon", "group_norm_epsilon")

Key = Callable[[str], str]  # adds the architecture


def defect(fields: Fields) -> str | None:
    """Return the first required value that is missing, or that would make llama.cpp abort; None if there is none."""
    name = "general.architecture"
    if not (architecture := fields.text(name)):
        return f"has {name} = {fields.shown(name)}; it must be a name" if fields.has(name) else f"has no {name}"
    key: Key = f"{architecture}.".__add__
    for find in (_in_size, _in_experts, _in_heads, _in_kinds, _in_rotation, _in_numbers, _in_architecture):
        for message in find(fields, key, architecture):
            return message
    return None


def _outside(fields: Fields, key: str, lowest: int, highest: int, of: str = "") -> Iterator[str]:
    """Yield the integers at `key` that are out of range.  `of` names the key that has the upper limit."""
    for value in fields.integers(key):
        if not lowest <= value <= highest:
            yield f"has {key} = {value}; it must be from {lowest} to " + (f"{of} ({highest})" if of else str(highest))


def _in_size(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    length, blocks = key("context_length"), key("block_count")
    if not fields.has(length):
        yield f"has no {length}"
    yield from _no_integer(fields, length)
    yield from _outside(fields, length, 1, MAX_INT)
    yield from _outside(fields, blocks, 1, MAX_BLOCKS)
    predictions, n_blocks = fields.number(key("nextn_predict_layers"), 0), fields.number(blocks, MAX_BLOCKS)
    if predictions >= n_blocks:  # with as many, no block is left to compute anything
        yield f"has {key('nextn_predict_layers')} = {predictions}; it must be less than {blocks} ({n_blocks})"
    yield from _outside(fields, key("decoder_block_count"), 0, MAX_BLOCKS)


def _has(fields: Fields, key: str, value: int) -> str:
    """Begin the sentence about a number, which llama.cpp also takes if the key is missing."""
    return f"has {key} = {value}" if fields.has(key) else f"has no {key}"


def _no_integer(fields: Fields, key: str) -> Iterator[str]:
    if fields.has(key) and not fields.is_integer(key):
        yield f"has {key} = {fields.shown(key)}; it must be an integer"


def _in_experts(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    total = key("expert_count")
    for name in ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count"):
        yield from _no_integer(fields, key(name))
    experts = fields.number(total, 0)
    if architecture in ONE_IS_NONE and experts <= 1:
        return
    if not 0 <= experts <= MAX_EXPERTS:
        yield f"has {total} = {experts}; it must be at most {MAX_EXPERTS}"
    if architecture in EXPERTS_ONLY and not experts:
        yield f"{_has(fields, total, 0)}; a model of the architecture {architecture} has experts"
    name = key("expert_used_count")
    used = fields.number(name, 0)
    if not (1 <= used <= experts if experts else used == 0):
        allowed = f"from 1 to {total} ({experts})" if experts else "0 in a model without experts"
        yield f"{_has(fields, name, used)}; it must be {allowed}"
    has_dense_blocks = architecture not in ATTENTION_ONLY or fields.has(key("leading_dense_block_count"))
    by_block = fields.integers(name)
    computed = by_block[: len(by_block) - max(0, fields.number(key("nextn_predict_layers"), 0))]
    if computed and max(computed) > computed[0]:
        yield f"has {name} = {max(computed)}; no block uses more experts than the first ({computed[0]})"
    if experts and 0 in by_block and not has_dense_blocks:
        yield f"has {key('expert_used_count')} = 0; each block of a model with {experts} experts uses some"
    groups = fields.number(key("expert_group_count"), 0)
    groups_used = fields.number(key("expert_group_used_count"), 0)
    if groups and groups >= experts:
        yield f"has {key('expert_group_count')} = {groups}; it must be less than {total} ({experts})"
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        yield f"has {key('expert_group_count')} = {groups}: it must divide the experts, and some groups must be used"
    if experts:
        yield from _outside(fields, key("expert_gating_func"), 0, MAX_GATING)


def _in_heads(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    """Groups of query heads share a head of keys and values.  0 heads mean a block without attention."""
    q, kv = key("attention.head_count"), key("attention.head_count_kv")
    queries, shared = fields.integers(q), fields.integers(kv)
    n_blocks = max(len(queries), len(shared))
    for n, n_shared in zip(_each(queries, n_blocks), _each(shared, n_blocks), strict=False):
        if n > 0 and n_shared > 0 and n % n_shared:
            yield f"has {kv} = {n_shared}; it must divide {q} ({n})"
    width = fields.number(key("embedding_length"), 0)
    if architecture in ATTENTION_ONLY and not fields.has(key("attention.key_length")):
        for n in queries:
            if n > 0 and width % n:
                yield f"has {q} = {n}; it must divide {key('embedding_length')} ({width})"
    for name, counts in ((q, queries), (kv, shared)):
        if architecture in ATTENTION_ONLY and 0 in counts:
            yield f"has {name} = 0; each block of the architecture {architecture} has attention heads"


def _in_kinds(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    """In a hybrid model, some blocks have attention and some are recurrent."""
    n_blocks = fields.number(key("block_count"), 0)
    if architecture not in HYBRIDS or not 1 <= n_blocks <= MAX_BLOCKS:
        return
    if architecture in BY_INTERVAL:
        n_blocks -= max(0, fields.number(key("nextn_predict_layers"), 0))
        every, recurrent = fields.number(key("full_attention_interval"), 4), key("attention.recurrent_layers")
        if fields.has(recurrent):
            kinds = [not n for n in _each(fields.integers(recurrent), n_blocks)][:n_blocks]
        elif every > 0:
            kinds = [(i + 1) % every == 0 for i in range(n_blocks)]
        else:
            return
    else:
        shared = fields.integers(key("attention.head_count_kv")) or fields.integers(key("attention.head_count"))
        inner = fields.integers(key("feed_forward_length")) if architecture.startswith("nemotron") else [0]
        both = zip(_each(shared, n_blocks), _each(inner, n_blocks), strict=False)
        kinds = [n > 0 for n, n_inner in both if not n_inner]
    for kind, name in ((True, "with attention"), (False, "that is recurrent")):
        if kind not in kinds:
            yield f"has no block {name}; a model of the architecture {architecture} has some"


def _each(values: list[int], blocks: int) -> list[int]:
    return values * blocks if len(values) == 1 else values


def _in_rotation(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    scaling = key("rope.scaling.type")
    if fields.has(scaling) and fields.text(scaling) not in ROPE_SCALING_TYPES:
        yield f"has {scaling} = {fields.shown(scaling)}; it must be one of {', '.join(sorted(ROPE_SCALING_TYPES))}"
    heads, width = fields.integers(key("attention.head_count"))[:1], fields.number(key("embedding_length"), 0)
    computed = width // heads[0] if heads and heads[0] > 0 else 0
    keys, values = fields.number(key("attention.key_length"), computed), fields.number(key("attention.value_length"), 0)
    rotation = key("rope.dimension_count")
    has_window = fields.has(key("attention.key_length_swa")) or fields.has(key("rope.dimension_count_swa"))
    if architecture in EQUAL_LENGTHS and heads != [0] and not has_window:
        values = values if fields.has(key("attention.value_length")) else computed
        for name in ("key_length", "value_length"):
            yield from _outside(fields, key(f"attention.{name}"), 1, MAX_INT)
        if keys and values and keys != values:
            yield (
                f"has keys of length {keys} and values of length {values} ({key('attention.key_length')}, "
                f"{key('attention.value_length')}); in the architecture {architecture} they are equal"
            )
        rotated = fields.number(rotation, keys)
        if architecture in WHOLE_ROTATION and keys and rotated != keys:
            yield f"has {rotation} = {rotated}; it must be the length of a head ({keys})"
    if architecture in NO_ROTATION or not keys:
        return
    in_windows, window_rotation = key("attention.key_length_swa"), key("rope.dimension_count_swa")
    for name, length in ((rotation, keys), (window_rotation, fields.number(in_windows, keys))):
        yield from _outside(fields, name, 1, length, of="the length of a head")
        if any(n % 2 for n in fields.integers(name)):
            yield f"has {name} = {fields.shown(name)}; it must be even"
    rotated = fields.number(window_rotation, fields.number(rotation, keys))
    if fields.number(in_windows, rotated) < rotated:
        yield f"has {in_windows} = {fields.shown(in_windows)}; it must be at least {window_rotation} ({rotated})"
    name = key("rope.dimension_sections")
    sections = fields.integers(name)
    if architecture in SECTIONS and not any(n > 0 for n in sections[:3]):
        what = f"has {name} = {fields.shown(name)}" if fields.has(name) else f"has no {name}"
        yield f"{what}; one of the first three must be greater than 0"
    if sum(sections) > keys:
        yield f"has {name} = {fields.shown(name)}; their sum must be at most the length of a head ({keys})"


def _in_numbers(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    for name in EPSILONS:
        epsilon = fields.real(key(f"attention.{name}"))
        if epsilon is not None and not 0 <= epsilon <= math.inf:
            yield f"has {key(f'attention.{name}')} = {epsilon}; it must be at least 0"
    if fields.number(key("pooling_type"), 0) != NO_POOLING_TYPE:
        yield from _outside(fields, key("pooling_type"), 0, MAX_POOLING)
    yield from _outside(fields, key("attention.sliding_window"), 0, MAX_INT)
    pattern = key("attention.sliding_window_pattern")
    if architecture in WINDOWS and fields.has(pattern):
        every = fields.integers(pattern)
        if every == [1] or (len(every) > 1 and not any(every)):  # of every n blocks, the last has no window
            yield f"has {pattern} = {fields.shown(pattern)}; some blocks must have a sliding window"
    yield from _outside(fields, key("full_attention_interval"), 1, MAX_INT)
    yield from _outside(fields, key("n_deepstack_layers"), 0, MAX_BLOCKS)


def _in_architecture(fields: Fields, key: Key, architecture: str) -> Iterator[str]:
    """Yield what only some architectures require."""

    def differs(name: str, expected: int, meaning: str, absent: int = 0) -> Iterator[str]:
        if (value := fields.number(key(name), absent)) != expected:
            yield f"{_has(fields, key(name), value)}; it must be {meaning} ({expected})"

    width, inner = fields.number(key("embedding_length"), 0), "ssm.inner_size"
    rank, groups = fields.number(key("ssm.time_step_rank"), 0), fields.number(key("ssm.group_count"), 0)
    match architecture:
        case "jamba" | "granitehybrid":
            yield from differs(inner, 2 * width, f"twice {key('embedding_length')}")
        case "qwen3next" | "qwen35" | "qwen35moe":
            state = fields.number(key("ssm.state_size"), 0)
            yield from differs(inner, state * rank, f"{key('ssm.state_size')} times {key('ssm.time_step_rank')}")
            if fields.has(key("ssm.group_count")) and (not groups or rank % groups):
                yield f"has {key('ssm.group_count')} = {groups}; it must divide {key('ssm.time_step_rank')} ({rank})"
        case "rwkv6" | "rwkv7" | "rwkv6qwen2" | "arwkv7":
            shifts = 2 if architecture in ("rwkv6", "rwkv7") else 1
            yield from differs("token_shift_count", shifts, f"that of {architecture}", absent=2)
            yield from _in_head_size(fields, key, width)
            if architecture in ("rwkv6", "rwkv6qwen2"):
                yield from _in_shared_heads(fields, key, width)
        case "lfm2moe" | "minimax-m2":
            yield from _outside(fields, key("expert_gating_func"), 1, MAX_GATING)
        case "llama4":
            yield from _outside(fields, key("attention.sliding_window"), 1, MAX_INT)
        case "ernie4_5-moe":
            yield from _outside(fields, key("interleave_moe_layer_step"), 1, MAX_INT)
        case "gemma4":
            for end in ("", "_swa"):
                value_length = key(f"attention.value_length{end}")
                keys = fields.number(key(f"attention.key_length{end}"), 0)
                if keys and fields.number(value_length, keys) != keys:
                    yield f"has {value_length} = {fields.shown(value_length)}; it must be the length of a key ({keys})"
            n_blocks = fields.number(key("block_count"), MAX_BLOCKS)
            yield from _outside(fields, key("attention.shared_kv_layers"), 0, n_blocks - 2)
            yield from _in_sharing_blocks(fields, key, n_blocks)
        case "gemma-embedding":
            for name in ("dense_2_feat_in", "dense_3_feat_out"):
                if fields.number(key(name), 0):
                    yield from differs(name, width, key("embedding_length"))
        case "deepseek2" | "mistral4":
            yield from _in_latent_attention(fields, key)
        case "wavtokenizer-dec":
            for name in ("posnet.block_count", "convnext.block_count"):
                blocks = key("block_count")
                yield from _outside(fields, key(name), 0, fields.number(blocks, MAX_BLOCKS), of=blocks)
            lengths = key("convnext.embedding_length")
            yield from differs("posnet.embedding_length", fields.number(lengths, 0), lengths)


def _in_latent_attention(fields: Fields, key: Key) -> Iterator[str]:
    """With MLA, all heads share the compressed keys, to which the rotated part is added."""
    rotation, length = key("rope.dimension_count"), key("attention.key_length")
    whole, compressed = key("attention.key_length_mla"), key("attention.kv_lora_rank")
    n_length = fields.number(length, 0)
    n_rotated, n_whole = fields.number(rotation, n_length), fields.number(whole, n_length)
    if n_whole and n_rotated >= n_whole:
        yield f"{_has(fields, rotation, n_rotated)}; it must be less than the length of a head ({n_whole})"
    if fields.has(whole):
        shared = key("attention.head_count_kv")
        n_shared = fields.number(shared, fields.number(key("attention.head_count"), 0))
        for n in fields.integers(shared) or [n_shared]:
            if n != 1:
                yield f"{_has(fields, shared, n)}; it must be 1 with {whole}"
        expected = fields.number(compressed, 0) + n_rotated
        if fields.has(compressed) and n_length != expected:
            yield f"{_has(fields, length, n_length)}; it must be {compressed} and {rotation} together ({expected})"
    scale = key("attention.temperature_scale")
    if fields.real(scale) and not fields.number(key("attention.temperature_length"), 0):
        yield f"has {scale}, but no {key('attention.temperature_length')}"


def _in_head_size(fields: Fields, key: Key, width: int) -> Iterator[str]:
    for size in fields.integers(key("wkv.head_size")):
        if size == 0 or width % size:
            yield f"has {key('wkv.head_size')} = {size}; it must divide {key('embedding_length')} ({width})"


def _in_shared_heads(fields: Fields, key: Key, width: int) -> Iterator[str]:
    """The number of heads follows from their size; those of keys and values are counted, 0 if they are as many."""
    shared = (
        key("attention.head_count_kv") if fields.has(key("attention.head_count_kv")) else key("attention.head_count")
    )
    heads = width // max(1, fields.number(key("wkv.head_size"), 1))
    for n in fields.integers(shared):
        if n and heads % n:
            yield f"has {shared} = {n}; it must divide the number of heads ({heads})"


def _in_sharing_blocks(fields: Fields, key: Key, n_blocks: int) -> Iterator[str]:
    """The last blocks share the keys of the last two others: the first for blocks with a window, the second without."""
    name, has_window = key("attention.shared_kv_layers"), fields.integers(key("attention.sliding_window_pattern"))
    n = fields.number(name, 0)
    if len(has_window) != n_blocks or not 1 <= n <= n_blocks - 2:
        return
    first, second = has_window[-n - 2], has_window[-n - 1]
    sharing = has_window[-n:]
    if (any(sharing) and not first) or (not all(sharing) and second):
        yield f"has {name} = {n}; the two blocks before must be one with a sliding window and one without"
