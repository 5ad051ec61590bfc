"""A GGUF model on a disk, as its file header describes it."""

from __future__ import annotations

import hashlib
import os
from typing import Literal, NamedTuple

import msgspec
from msgspec import Struct

ModelType = Literal["llm", "embedding"]


# llama.cpp's architectures whose attention looks at the whole input, which is what an embedder does.
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


class Problem(Struct, frozen=True, kw_only=True):
    """Why a file that has a key cannot be loaded."""

    code: Literal["invalid_model_file", "unsupported_model"]
    message: str


class FileStat(NamedTuple):
    """While all of this stays the same, a file is taken to be unchanged."""

    size: int  # bytes
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStat:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


PerBlock = int | list[int]  # the same in every block, or one for each


def each(value: PerBlock, block_count: int) -> list[int]:
    """A value for each block."""
    return value if isinstance(value, list) else [value] * block_count


class Dimensions(Struct, frozen=True, kw_only=True):
    """What of a header tells how much memory a load takes, by its names there; counts of elements.  0: it names none.

    There is at least one block, and a list has a value for each.
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
    vocabulary: int | None = None  # tokens; None: it is not known yet


class Weights(Struct, frozen=True, kw_only=True):
    """Bytes of the tensors, by the place that llama.cpp has for them."""

    input_bytes: int  # embeddings: of tokens, their positions and their types
    repeating_bytes: int  # the blocks
    output_bytes: int  # the output matrix, and what belongs to no block
    has_output: bool  # False: the tokens' embeddings are the output matrix too
    block_bytes: list[int] = []  # of each block; of a whole model [] where they are equal


class Model(Struct, frozen=True, kw_only=True, gc=False):
    """A GGUF model on a worker's disk, as its file header describes it.

    `problem` is set where the header cannot be read or names something that is no model: such an entry keeps its
    key, so that loading it can say why, and is not listed.  Fields that lie behind a large vocabulary in the file
    are None until the whole header was read: `bits_per_weight`, `params_string`, `weights`.
    """

    key: str  # what clients load by: "publisher/name", "publisher/name@q4_k_m" or a bare file's stem
    base: str  # the key without its variant
    variant: str  # "q4_k_m": from the file's name; "" where the name tells none
    shards: list[str]  # paths under the models directory, first shard first
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
    causal: bool = True  # False: an encoder, whose whole input is one batch
    pooling: int = -1  # llama.cpp's pooling type, -1: the file names none (0 none, 1 mean, 2 cls, 3 last, 4 rank)
    vision: bool = False
    trained_for_tool_use: bool = False
    files: list[FileStat] = []  # of each shard
    dimensions: Dimensions | None = None  # None: the header lacks some
    weights: Weights | None = None  # of all shards

    @property
    def fingerprint(self) -> str:
        """A digest of its files' paths, sizes and times: the same wherever the same files were copied to.  "" where
        they are not known, as in what an older version published."""
        if not self.files:
            return ""
        facts = [(path, stat.size, stat.mtime_ns) for path, stat in zip(self.shards, self.files, strict=True)]
        return hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]
