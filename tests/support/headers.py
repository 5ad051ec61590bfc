"""GGUF files that consist of a header only, written byte by byte, so that a test can also write a wrong one."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

STRING, ARRAY = 8, 9
Item = str | bool | int | float
Value = Item | Sequence[Item]

LLAMA: dict[str, Value] = {
    "general.architecture": "llama",
    "llama.context_length": 4096,
    "llama.block_count": 2,
}
WEIGHTS = (("token_embd.weight", (64, 32), 0),)  # name, elements, type: 2048 weights, F32


def header(
    metadata: Mapping[str, Value] = LLAMA,
    tensors: Sequence[tuple[str, Sequence[int], int]] = WEIGHTS,
    *,
    version: int = 3,
    offsets: Sequence[int] | None = None,
) -> bytes:
    """Return a header with its padding; tensors are at `offsets`, by default 2**16 bytes apart."""
    head = struct.pack("<4sIQQ", b"GGUF", version, len(tensors), len(metadata))
    for key, value in metadata.items():
        kind, data = _value(value)
        head += _string(key) + struct.pack("<I", kind) + data
    for i, (name, dims, kind) in enumerate(tensors):
        offset = offsets[i] if offsets is not None else i << 16
        head += _string(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)
    return head + bytes(-len(head) % 32)


def write(
    path: Path,
    metadata: Mapping[str, Value] | None = None,
    tensors: Sequence[tuple[str, Sequence[int], int]] = WEIGHTS,
) -> Path:
    """Write a model with this metadata added to LLAMA's and room for the tensor data, atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = header({**LLAMA, **(metadata or {})}, tensors)
    beside = path.with_name(f".{path.name}")
    with beside.open("wb") as file:
        file.write(head)
        file.truncate(len(head) + (len(tensors) << 16))
    return beside.replace(path)


def vocabulary(n: int) -> dict[str, Value]:
    """Return the metadata of a tokenizer with n tokens, which a scan may skip."""
    return {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": [f"token{i}" for i in range(n)]}


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Value) -> tuple[int, bytes]:
    match value:
        case bool():
            return 7, struct.pack("<?", value)
        case int():
            return 4, struct.pack("<I", value)
        case float():
            return 6, struct.pack("<f", value)
        case str():
            return STRING, _string(value)
        case _:
            items = [_value(item) for item in value]
            kind = items[0][0] if items else 4
            return ARRAY, struct.pack("<IQ", kind, len(items)) + b"".join(data for _, data in items)
