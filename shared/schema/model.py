"""The GGUF models on the disk of a worker."""

from __future__ import annotations

import hashlib
import os
from typing import Annotated, Literal, NamedTuple

import msgspec
from msgspec import Meta, Struct

ModelType = Literal["llm", "embedding"]
MOST = 2**31 - 1  # of an int of llama.cpp


# The architectures of llama.cpp with bidirectional attention, as embedding models use it.
ENCODERS = frozenset(
    {
        "bert",
        "modern-bert",
        "nomic-bert",
        "nomic-bert-moe",
        "neo-bert",
        "jina-bert-v2",
        "jina-bert-v3",
        "eurobert",
        "gemma-embedding",
        "llama-embed",
        "t5encoder",
    }
)
# Those with recurrent layers, some beside attention: llm_arch_is_recurrent and llm_arch_is_hybrid of llama-arch.cpp at
# commit 0c1e57098.
RECURRENT = frozenset(
    {
        "mamba",
        "mamba2",
        "rwkv6",
        "rwkv6qwen2",
        "rwkv7",
        "arwkv7",
        "bailingmoe3",
        "deepseek4",
        "falcon-h1",
        "glm5-next",
        "granitehybrid",
        "jamba",
        "kimi-k3",
        "kimi-linear",
        "lfm2",
        "lfm2moe",
        "minimax-01",
        "nemotron_h",
        "nemotron_h_moe",
        "plamo2",
        "qwen35",
        "qwen35moe",
        "qwen3next",
        "qwen4exp",
    }
)


class Problem(Struct, frozen=True, kw_only=True):
    """The reason why a file that has a key cannot be loaded."""

    code: Literal["invalid_model_file", "unsupported_model"]
    message: str


class FileStat(NamedTuple):
    """Identifies a version of a file: the file is considered unchanged while all of these are equal."""

    size: int  # bytes
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, stat: os.stat_result) -> FileStat:
        return cls(stat.st_size, stat.st_mtime_ns, stat.st_ino)


class SamplingSettings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Defaults of the requests to a model: how tokens are chosen, under llama.cpp's names.  None: not set."""

    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_k: Annotated[int, Meta(ge=0, le=MOST)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    typical_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repeat_penalty: Annotated[float, Meta(gt=0, le=1e6)] | None = None
    repeat_last_n: Annotated[int, Meta(ge=-1, le=MOST)] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None


class ModelSettings(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the operator set for a model.  None: not set."""

    aliases: list[Annotated[str, Meta(min_length=1)]] = []  # further names of the model
    is_default: bool = False  # answers requests that name no model
    context_length: Annotated[int, Meta(ge=1, le=MOST)] | None = None
    parallel: Annotated[int, Meta(ge=1, le=64)] | None = None
    kv_cache_type: Literal["f16", "q8_0", "q4_0"] | None = None
    ttl_seconds: Annotated[float, Meta(gt=0, le=10 * 366 * 24 * 3600)] | None = None
    sampling: SamplingSettings = SamplingSettings()
    system_prompt: str | None = None
    preload: bool = False  # loaded by its worker at its start
    pin: bool = False  # no TTL, and never evicted


PerBlock = int | list[int]  # one value for all blocks, or one for each block


def each(value: PerBlock, block_count: int) -> list[int]:
    """Return one value for each block."""
    return value if isinstance(value, list) else [value] * block_count


class Dimensions(Struct, frozen=True, kw_only=True):
    """The header fields that determine the memory of a load, under their GGUF names; 0 if the header lacks a field.

    Lengths are numbers of elements.  There is at least one block, and a list has one value per block.
    """

    block_count: int
    embedding_length: int
    head_count: PerBlock
    head_count_kv: PerBlock
    key_length: int  # of one head
    value_length: int
    feed_forward_length: PerBlock = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    sliding_window: int = 0
    vocabulary: int | None = None  # tokens; None: not known yet


class Weights(Struct, frozen=True, kw_only=True):
    """Sizes of the tensors, grouped as llama.cpp places them."""

    input_bytes: int  # embeddings of tokens, positions and token types
    repeating_bytes: int  # the blocks
    output_bytes: int  # the output matrix and other tensors outside blocks
    has_output: bool  # False: the token embeddings are also the output matrix
    block_bytes: list[int] = []  # of each block; for a whole model, [] if all blocks have the same size


class Model(Struct, frozen=True, kw_only=True, gc=False):
    """A GGUF model on a worker's disk, as its file header describes it.

    `problem` is set if the header cannot be read or does not describe a model.  Such an entry keeps its key, so that a
    load can report the reason, and is not listed.  `bits_per_weight`, `params_string` and `weights` are None until the
    whole header was read, because they follow the vocabulary, which may be large.
    """

    key: str  # the name that clients use: "publisher/name", "publisher/name@q4_k_m" or the stem of a bare file
    base: str  # the key without its variant
    variant: str  # such as "q4_k_m", from the file name; "" if the name has none
    shards: list[str]  # paths under the models directory, first shard first
    root: int = 0  # index of this directory among those of the worker
    size_bytes: int = 0  # of all shards
    problem: Problem | None = None
    type: ModelType = "llm"
    publisher: str = ""
    display_name: str = ""
    description: str | None = None
    architecture: str = ""
    quantization: str | None = None  # "Q4_K_M"
    bits_per_weight: float | None = None
    params_string: str | None = None  # "7B", "8x7B"
    max_context_length: int = 0  # tokens
    expert_count: int = 0
    causal: bool = True  # False: an encoder, which processes its whole input in one batch
    pooling: int = -1  # pooling type of llama.cpp: -1 unspecified, 0 none, 1 mean, 2 cls, 3 last, 4 rank
    vision: bool = False
    trained_for_tool_use: bool = False
    reasoning: list[str] = []  # its settings: "off", "on", "low", "medium", "high"
    files: list[FileStat] = []  # of each shard
    can_map: bool = True  # the tensors are aligned as the engine needs them in a mapping of the file
    dimensions: Dimensions | None = None  # None: the header lacks a required one
    weights: Weights | None = None  # of all shards
    settings: ModelSettings = ModelSettings()

    @property
    def full_key(self) -> str:
        """The key with the variant, whatever lies beside the files; the plain key if their names tell no variant."""
        return f"{self.base}@{self.variant}" if self.variant else self.base

    @property
    def source(self) -> Model:
        """This model as the record of an instance keeps it, without what only a load needs, and without settings, which
        the catalog has as they are now."""
        return msgspec.structs.replace(self, description=None, dimensions=None, weights=None, settings=ModelSettings())

    @property
    def fingerprint(self) -> str:
        """A digest of the paths, sizes and modification times of the files, equal for copies that keep these.

        "" if they are unknown, as in a catalog that an older version published.
        """
        if not self.files:
            return ""
        facts = [(path, stat.size, stat.mtime_ns) for path, stat in zip(self.shards, self.files, strict=True)]
        return hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]
