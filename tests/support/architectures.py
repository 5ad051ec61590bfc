"""Tiny models of the architectures of llama.cpp, with zeros as weights.

architectures.json has the metadata and the tensors that llama.cpp 0c1e57098 demands of each, as its errors name them.
Metadata has no prefix, and differs from USUAL: null for a key that the architecture does not have.  A tensor is
"256x512 F16", the contiguous dimension first, and `blk.0,2.` or `blk.*.` stands for several blocks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shared.synthetic import models, tokenizers
from shared.synthetic.architectures import Model, Tensor

N_TOKENS = 1024
USUAL: dict[str, Any] = {
    "context_length": 8192,
    "embedding_length": 256,
    "block_count": 4,
    "feed_forward_length": 512,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "rope.dimension_count": 64,
    "attention.layer_norm_rms_epsilon": 1e-5,
}
DESCRIBED: dict[str, Any] = json.loads(Path(__file__).with_suffix(".json").read_text())


def write(path: Path, architecture: str, **metadata: object) -> Path:
    """Write a model of an architecture, with zeros as weights.  `metadata` replaces values; its names have `__` instead
    of a dot."""
    return models.sparse(path, _described(architecture, metadata))


def write_random(path: Path, architecture: str) -> Path:
    """Write a model of an architecture, with random weights."""
    return models.dense(path, _described(architecture, {}))


def _described(architecture: str, metadata: dict[str, object]) -> Model:
    described = DESCRIBED[architecture]
    given = {name.replace("__", "."): value for name, value in metadata.items()}
    merged = {**USUAL, **described["metadata"], **given}
    keys = {
        name if name.startswith("tokenizer.") else f"{architecture}.{name}": value
        for name, value in merged.items()
        if value is not None
    }
    general = {"general.architecture": architecture, "general.type": "model", "general.name": "Tiny"}
    tensors = [
        tensor for name, size in described["tensors"].items() for tensor in _tensors(name, size, merged["block_count"])
    ]
    return Model({**general, **keys, **tokenizers.spm(N_TOKENS)}, tensors)


def _tensors(name: str, size: str, block_count: int) -> Iterator[Tensor]:
    shape, type_ = size.split()
    dimensions = tuple(map(int, shape.split("x")))
    match = re.fullmatch(r"(.*\bblk)\.([\d,]+|\*)\.(.*)", name)
    if match is None:
        yield Tensor(name, dimensions, type_)
        return
    blocks = range(block_count) if match[2] == "*" else [n for n in map(int, match[2].split(",")) if n < block_count]
    for block in blocks:
        yield Tensor(f"{match[1]}.{block}.{match[3]}", dimensions, type_)
