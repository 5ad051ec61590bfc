"""The metadata and tensors that llama.cpp expects in a model of each architecture, without the tensor data.

Names of keys: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; names and shapes of tensors:
llama.cpp's src/llama-arch.cpp and the files in src/models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

from shared.synthetic import tokenizers
from shared.synthetic.tokenizers import Metadata, Value

POOL_BY_MEAN, POOL_LAST_TOKEN, POOL_TO_SCORE = 1, 3, 4  # `{arch}.pooling_type`


class Tensor(NamedTuple):
    name: str
    shape: tuple[int, ...]  # elements per dimension, the contiguous dimension first
    type: str  # as ggml names it: F32, F16, Q8_0


class Model(NamedTuple):
    """The content of a model file, without the tensor data."""

    metadata: dict[str, Value]
    tensors: list[Tensor]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """The parameters that determine the tensors of a decoder, under their metadata names.  The defaults are tiny."""

    architecture: str = "llama"
    block_count: int = 4
    embedding_length: int = 64
    feed_forward_length: int = 128
    head_count: int = 4
    head_count_kv: int = 2
    key_length: int = 32  # per head, equal to the value length; multiples of 32 permit a quantized KV cache
    context_length: int = 4096
    expert_count: int = 0  # 0: dense
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0  # 0: feed_forward_length
    sliding_window: int = 0  # tokens; 0: full attention in every layer
    pooling_type: int = 0  # 0: none, a generative model
    has_qkv_bias: bool = False
    has_qk_norm: bool = False
    has_post_norm: bool = False
    has_output: bool = True  # False: the embedding matrix is also the output matrix


QWEN2 = Shape(architecture="qwen2", has_qkv_bias=True)
QWEN3 = Shape(architecture="qwen3", has_qk_norm=True)
QWEN3_MOE = replace(QWEN3, architecture="qwen3moe")
GEMMA3 = Shape(architecture="gemma3", has_qk_norm=True, has_post_norm=True, has_output=False)
BERT = Shape(architecture="bert", block_count=2, head_count_kv=4, key_length=16, context_length=512)

TINY = Shape()
TINY_MOE = replace(QWEN3_MOE, expert_count=8, expert_used_count=2, expert_feed_forward_length=64)
TINY_EMBEDDING = replace(QWEN3, block_count=2, pooling_type=POOL_LAST_TOKEN)
TINY_GEMMA3 = replace(GEMMA3, block_count=12, head_count_kv=1, context_length=8192, sliding_window=512)

# fmt: off
LLAMA2_7B = Shape(block_count=32, embedding_length=4096, feed_forward_length=11_008, head_count=32, head_count_kv=32,
                  key_length=128)
LLAMA3_8B = replace(LLAMA2_7B, feed_forward_length=14_336, head_count_kv=8, context_length=131_072)
LLAMA3_70B = replace(LLAMA3_8B, block_count=80, embedding_length=8192, feed_forward_length=28_672, head_count=64)
MIXTRAL_8X7B = replace(LLAMA3_8B, context_length=32_768, expert_count=8, expert_used_count=2)
QWEN3_06B = replace(QWEN3, block_count=28, embedding_length=1024, feed_forward_length=3072, head_count=16,
                    head_count_kv=8, key_length=128, context_length=40_960, has_output=False)
QWEN3_EMBEDDING_06B = replace(QWEN3_06B, context_length=32_768, pooling_type=POOL_LAST_TOKEN)
QWEN3_30B = replace(QWEN3_MOE, block_count=48, embedding_length=2048, feed_forward_length=6144, head_count=32,
                    head_count_kv=4, key_length=128, context_length=40_960, expert_count=128, expert_used_count=8,
                    expert_feed_forward_length=768)
QWEN2_7B = replace(QWEN2, block_count=28, embedding_length=3584, feed_forward_length=18_944, head_count=28,
                   head_count_kv=4, key_length=128, context_length=32_768)
GEMMA3_1B = replace(GEMMA3, block_count=26, embedding_length=1152, feed_forward_length=6912, head_count=4,
                    head_count_kv=1, key_length=256, context_length=32_768, sliding_window=512)
GEMMA3_27B = replace(GEMMA3, block_count=62, embedding_length=5376, feed_forward_length=21_504, head_count=32,
                     head_count_kv=16, key_length=128, context_length=131_072, sliding_window=1024)
BERT_LARGE = replace(BERT, block_count=24, embedding_length=1024, feed_forward_length=4096, head_count=16,
                     head_count_kv=16, key_length=64)
# fmt: on

SHAPES: dict[str, tuple[Shape, int]] = {  # well-known models: shape, tokens in the vocabulary
    "qwen3-0.6b": (QWEN3_06B, 151_936),
    "qwen3-embedding-0.6b": (QWEN3_EMBEDDING_06B, 151_669),
    "bert-large": (BERT_LARGE, 30_522),
    "gemma3-1b": (GEMMA3_1B, 262_144),
    "llama2-7b": (LLAMA2_7B, 32_000),
    "qwen2-7b": (QWEN2_7B, 152_064),
    "llama3-8b": (LLAMA3_8B, 128_256),
    "gemma3-27b": (GEMMA3_27B, 262_144),
    "qwen3-30b-a3b": (QWEN3_30B, 151_936),
    "mixtral-8x7b": (MIXTRAL_8X7B, 32_000),
    "llama3-70b": (LLAMA3_70B, 128_256),
}


def decoder(shape: Shape, tokenizer: Metadata, matrix_type: str = "F16") -> Model:
    """Describe a causal language model.  Its norms and the router of its experts are F32."""
    arch, n_embd, n_tokens = shape.architecture, shape.embedding_length, tokenizers.n_tokens(tokenizer)
    n_q, n_kv = shape.head_count * shape.key_length, shape.head_count_kv * shape.key_length
    metadata: dict[str, Value] = {
        "general.architecture": arch,
        f"{arch}.context_length": shape.context_length,
        f"{arch}.embedding_length": n_embd,
        f"{arch}.block_count": shape.block_count,
        f"{arch}.feed_forward_length": shape.feed_forward_length,
        f"{arch}.attention.head_count": shape.head_count,
        f"{arch}.attention.head_count_kv": shape.head_count_kv,
        f"{arch}.attention.key_length": shape.key_length,
        f"{arch}.attention.value_length": shape.key_length,
        f"{arch}.attention.layer_norm_rms_epsilon": 1e-5,
        f"{arch}.rope.freq_base": 10_000.0,
        f"{arch}.rope.dimension_count": shape.key_length,
        f"{arch}.vocab_size": n_tokens,
    }
    optional = {
        f"{arch}.expert_count": shape.expert_count,
        f"{arch}.expert_used_count": shape.expert_used_count,
        f"{arch}.expert_feed_forward_length": shape.expert_feed_forward_length,
        f"{arch}.attention.sliding_window": shape.sliding_window,
        f"{arch}.pooling_type": shape.pooling_type,
    }
    metadata |= {key: value for key, value in optional.items() if value}

    vectors: dict[str, tuple[int, ...]] = {"attn_norm": (n_embd,), "ffn_norm": (n_embd,)}
    if shape.has_qk_norm:
        vectors |= {"attn_q_norm": (shape.key_length,), "attn_k_norm": (shape.key_length,)}
    if shape.has_post_norm:
        vectors |= {"post_attention_norm": (n_embd,), "post_ffw_norm": (n_embd,)}
    matrices: dict[str, tuple[int, ...]] = {
        "attn_q": (n_embd, n_q),
        "attn_k": (n_embd, n_kv),
        "attn_v": (n_embd, n_kv),
        "attn_output": (n_q, n_embd),
    }
    n_ff, suffix = shape.feed_forward_length, ""
    experts: tuple[int, ...] = ()
    if shape.expert_count:
        n_ff, suffix, experts = shape.expert_feed_forward_length or n_ff, "_exps", (shape.expert_count,)
        vectors["ffn_gate_inp"] = (n_embd, shape.expert_count)
    matrices |= {
        f"ffn_gate{suffix}": (n_embd, n_ff, *experts),
        f"ffn_up{suffix}": (n_embd, n_ff, *experts),
        f"ffn_down{suffix}": (n_ff, n_embd, *experts),
    }

    biases = {name: matrices[name][1:] for name in ("attn_q", "attn_k", "attn_v") if shape.has_qkv_bias}

    tensors = [Tensor("token_embd.weight", (n_embd, n_tokens), matrix_type)]
    for block in range(shape.block_count):
        for parts, kind in ((vectors, "F32"), (matrices, matrix_type)):
            tensors += [Tensor(f"blk.{block}.{part}.weight", size, kind) for part, size in parts.items()]
        tensors += [Tensor(f"blk.{block}.{part}.bias", size, "F32") for part, size in biases.items()]
    tensors.append(Tensor("output_norm.weight", (n_embd,), "F32"))
    if shape.has_output:
        tensors.append(Tensor("output.weight", (n_embd, n_tokens), matrix_type))
    return Model(metadata | dict(tokenizer), tensors)


def encoder(tokenizer: Metadata, shape: Shape = BERT, matrix_type: str = "F32", *, ranks: bool = False) -> Model:
    """Describe a BERT model: with mean pooling, or with a head that scores a query and a document."""
    n_embd, n_ff, n_context, n_tokens = (
        shape.embedding_length,
        shape.feed_forward_length,
        shape.context_length,
        tokenizers.n_tokens(tokenizer),
    )
    metadata: dict[str, Value] = {
        "general.architecture": "bert",
        "bert.context_length": n_context,
        "bert.embedding_length": n_embd,
        "bert.block_count": shape.block_count,
        "bert.feed_forward_length": n_ff,
        "bert.attention.head_count": shape.head_count,
        "bert.attention.layer_norm_epsilon": 1e-12,
        "bert.attention.causal": False,
        "bert.pooling_type": POOL_TO_SCORE if ranks else POOL_BY_MEAN,
        "bert.vocab_size": n_tokens,
    }
    linear = dict.fromkeys(("attn_q", "attn_k", "attn_v", "attn_output"), (n_embd, n_embd))
    linear |= {"ffn_up": (n_embd, n_ff), "ffn_down": (n_ff, n_embd)}
    sizes: dict[str, tuple[int, ...]] = {
        "token_embd.weight": (n_embd, n_tokens),
        "token_types.weight": (n_embd, 2),
        "position_embd.weight": (n_embd, n_context),
        "token_embd_norm.weight": (n_embd,),
        "token_embd_norm.bias": (n_embd,),
    }
    if ranks:
        sizes |= {"cls.weight": (n_embd, n_embd), "cls.bias": (n_embd,)}
        sizes |= {"cls.output.weight": (n_embd, 1), "cls.output.bias": (1,)}
    for block in (f"blk.{number}." for number in range(shape.block_count)):
        for part, size in linear.items():
            sizes |= {f"{block}{part}.weight": size, f"{block}{part}.bias": size[1:]}
        for norm in ("attn_output_norm", "layer_output_norm"):
            sizes |= {f"{block}{norm}.weight": (n_embd,), f"{block}{norm}.bias": (n_embd,)}
    matrices = {"token_embd.weight", *(f"blk.{n}.{part}.weight" for n in range(shape.block_count) for part in linear)}
    kinds = {name: matrix_type if name in matrices else "F32" for name in sizes}
    return Model(metadata | dict(tokenizer), [Tensor(name, size, kinds[name]) for name, size in sizes.items()])


def vision_projector() -> Model:
    """Describe the vision projector of a multimodal model: the minimum that identifies it as one."""
    metadata: dict[str, Value] = {
        "general.architecture": "clip",
        "clip.has_vision_encoder": True,
        "clip.projector_type": "mlp",
        "clip.vision.image_size": 28,
        "clip.vision.patch_size": 14,
        "clip.vision.embedding_length": 64,
        "clip.vision.feed_forward_length": 128,
        "clip.vision.projection_dim": 64,
        "clip.vision.block_count": 1,
        "clip.vision.attention.head_count": 4,
        "clip.vision.attention.layer_norm_epsilon": 1e-5,
    }
    return Model(
        metadata, [Tensor("v.patch_embd.weight", (14, 14, 3, 64), "F32"), Tensor("mm.0.weight", (64, 64), "F32")]
    )


def lora_adapter(shape: Shape, rank: int = 4) -> Model:
    """Describe a LoRA adapter for the query matrices of a decoder."""
    metadata: dict[str, Value] = {
        "general.architecture": shape.architecture,
        "adapter.type": "lora",
        "adapter.lora.alpha": 8.0,
    }
    sides = {"a": (shape.embedding_length, rank), "b": (rank, shape.head_count * shape.key_length)}
    tensors = [
        Tensor(f"blk.{block}.attn_q.weight.lora_{side}", size, "F32")
        for block in range(shape.block_count)
        for side, size in sides.items()
    ]
    return Model(metadata, tensors)
