"""Writes GGUF files with random weights for --demo, tests and benchmarks.

The same arguments produce the same bytes.  Files are replaced atomically, so that a file that is mapped into memory
never changes.

`metadata` adds or replaces metadata by key; `drop` leaves out metadata and tensors by their full names.  Nothing else
changes, so that one call can write a file with a specific defect.
"""

from __future__ import annotations

import math
import os
import shutil
import zlib
from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal, assert_never

import gguf
import numpy as np
from gguf import GGMLQuantizationType as TensorType
from gguf import GGUFValueType as Kind
from numpy.typing import NDArray

from shared.files import replacing
from shared.synthetic import architectures, tokenizers
from shared.synthetic.architectures import LLAMA2_7B, SHAPES, TINY, Model, Shape, Tensor, decoder
from shared.synthetic.tokenizers import Metadata, Value

TILE_ELEMENTS = 1 << 22  # maximum number of random values per file and tensor type; larger tensors repeat them
DECAY = -0.01  # of the state of recurrent layers
WEIGHT_DEVIATION = 0.05  # standard deviation of the normally distributed weights
SPLIT_KINDS = {"split.no": Kind.UINT16, "split.count": Kind.UINT16, "split.tensors.count": Kind.INT32}

Bytes = NDArray[np.uint8]


def tiny_llama(
    path: Path,
    *,
    tokenizer: Literal["spm", "bpe"] = "spm",
    name: str = "Tiny Llama",
    shape: Shape = TINY,
    metadata: Metadata | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Write a language model of half a megabyte.  Only the chat template of the BPE variant supports tools."""
    made = decoder(shape, tokenizers.spm() if tokenizer == "spm" else tokenizers.bpe())
    return _write_one(path, _model(made, name, "F16"), metadata, drop)


def tiny_moe(
    path: Path, *, name: str = "Tiny MoE", metadata: Metadata | None = None, drop: Collection[str] = ()
) -> Path:
    """Write a mixture of eight experts, two of which are used per token."""
    made = decoder(architectures.TINY_MOE, tokenizers.bpe())
    return _write_one(path, _model(made, name, "F16"), metadata, drop)


def tiny_embedding(
    path: Path, *, name: str = "Tiny Embedding", metadata: Metadata | None = None, drop: Collection[str] = ()
) -> Path:
    """Write an embedding model that only its pooling type distinguishes from a decoder, like Qwen3-Embedding."""
    made = decoder(architectures.TINY_EMBEDDING, tokenizers.bpe())
    made.metadata["tokenizer.ggml.add_eos_token"] = True
    return _write_one(path, _model(made, name, "F16"), metadata, {"tokenizer.chat_template", *drop})


def tiny_bert(
    path: Path, *, name: str = "Tiny BERT", metadata: Metadata | None = None, drop: Collection[str] = ()
) -> Path:
    """Write an encoder, which has no KV cache and generates no text."""
    made = architectures.encoder(tokenizers.wordpiece())
    return _write_one(path, _model(made, name, "F32"), metadata, drop)


def tiny_reranker(
    path: Path, *, name: str = "Tiny Reranker", metadata: Metadata | None = None, drop: Collection[str] = ()
) -> Path:
    """Write an encoder that scores a query and a document."""
    made = architectures.encoder(tokenizers.wordpiece(), ranks=True)
    return _write_one(path, _model(made, name, "F32"), metadata, drop)


def tiny_gemma3(
    path: Path, *, name: str = "Tiny Gemma 3", metadata: Metadata | None = None, drop: Collection[str] = ()
) -> Path:
    """Write a model with sliding-window attention, 512 tokens wide, in ten of twelve layers."""
    made = decoder(architectures.TINY_GEMMA3, tokenizers.spm())
    return _write_one(path, _model(made, name, "F16"), metadata, drop)


def sharded(path: Path, shards: int = 4, *, name: str = "Tiny Sharded Llama") -> list[Path]:
    """Write `tiny_llama` as files `<stem>-0000N-of-0000M.gguf` beside `path`; `path` itself is not written."""
    return _write(path, _model(decoder(TINY, tokenizers.spm()), name, "F16"), shards=shards)


def mmproj(path: Path) -> Path:
    """Write a vision projector, which is not a model by itself."""
    return _write_one(path, _model(architectures.vision_projector(), "Tiny Projector", "F32", "mmproj"))


def lora(path: Path) -> Path:
    """Write an adapter for `tiny_llama`, which is not a model by itself."""
    return _write_one(path, _model(architectures.lora_adapter(TINY), "Tiny LoRA", "F32", "adapter"))


def vocab_only(path: Path) -> Path:
    """Write a tokenizer and hyperparameters without any tensor."""
    metadata, _ = decoder(TINY, tokenizers.spm())
    return _write_one(path, _model(Model(metadata, []), "Tiny Vocabulary", "F32"))


def large_vocabulary(path: Path, *copies: Path, tokens: int = 151_936) -> list[Path]:
    """Write tiny tensors with a header as large as that of a real model: `tokens` BPE tokens and nearly as many merges.

    Generating the header is expensive; `copies` are further paths to copy the file to.
    """
    shape = replace(TINY, block_count=1, embedding_length=16, head_count=1, head_count_kv=1, has_output=False)
    _write_one(path, _model(decoder(shape, tokenizers.bpe(tokens)), "Tiny Llama with a large vocabulary", "F16"))
    for copy in copies:
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, copy)
    return [path, *copies]


def big(
    path: Path,
    gb: float,
    quantization: Literal["Q8_0", "Q4_0", "F16"] = "Q8_0",
    *,
    vocabulary: int = 32_000,
    head_count_kv: int = 8,
    context_length: int = 4096,
    tokenizer: Literal["spm", "bpe"] = "spm",
    shards: int = 0,
) -> list[Path]:
    """Write a llama with the layers of the 7B model, in the number that makes up `gb` times 10^9 bytes.

    With 8 KV heads each layer takes 16 MiB of F16 KV cache at 4096 tokens; with 32, as Llama 2 7B has, 64 MiB.
    """
    words = tokenizers.spm(vocabulary) if tokenizer == "spm" else tokenizers.bpe(vocabulary)

    def with_layers(n: int) -> Model:
        shape = replace(LLAMA2_7B, block_count=n, head_count_kv=head_count_kv, context_length=context_length)
        return decoder(shape, words, quantization)

    none, one = (sum(map(_n_bytes, with_layers(n).tensors)) for n in (0, 1))
    made = with_layers(max(1, round((gb * 1e9 - none) / (one - none))))
    return _write(path, _model(made, f"Big {gb:g} GB", quantization), shards=shards)


def prewarm(path: Path) -> Path:
    """Write worker/engine/prewarm.gguf, the smallest of the language models."""
    shape = replace(
        TINY,
        block_count=1,
        embedding_length=32,
        feed_forward_length=32,
        head_count=1,
        head_count_kv=1,
        context_length=256,
        has_output=False,
    )
    return tiny_llama(path, name="Prewarm", shape=shape)


def sparse_shape(
    path: Path, preset: str, quantization: str = "Q4_0", *, shards: int = 0, vocabulary: int = 0
) -> list[Path]:
    """Write a model of SHAPES with real sizes, whose weights are zeros in a sparse file that uses no disk space.

    `quantization` is a name of llama.cpp, but every matrix gets its main type, such as Q4_K for `Q4_K_M`.  A smaller
    `vocabulary` (in tokens) than that of the model makes the file faster to write and to read.
    """
    shape, n_tokens = SHAPES[preset]
    main_type = quantization.removesuffix("_S").removesuffix("_M").removesuffix("_L")
    if shape.architecture == "bert":
        made = architectures.encoder(tokenizers.wordpiece(vocabulary or n_tokens), shape, main_type)
    else:
        made = decoder(shape, tokenizers.spm(vocabulary or n_tokens), main_type)
    return _write(path, _model(made, preset, quantization), shards=shards, is_sparse=True)


def sparse(path: Path, model: Model) -> Path:
    """Write a model that the caller describes, with zeros as weights."""
    _write_file(path, model, is_sparse=True)
    return path


def dense(path: Path, model: Model) -> Path:
    """Write a model that the caller describes, with random weights."""
    _write_file(path, model, is_sparse=False)
    return path


def write_demo(directory: Path) -> list[str]:
    """Write the models of --demo below `directory`: an LLM, a MoE and an embedding model.  Returns their model keys."""

    def place(key: str) -> Path:
        return directory / key / f"{key.rpartition('/')[2]}-f16.gguf"

    def described(noun: str, what_it_does: str) -> Metadata:
        return {
            "general.name": f"Loadstone Demo {noun} (random weights)",
            "general.description": f"A tiny demo model with random weights: {what_it_does}.",
        }

    keys = ["loadstone/demo-llm", "loadstone/demo-moe", "loadstone/demo-embedding"]
    llm, moe, embedding = map(place, keys)
    tiny_llama(llm, tokenizer="bpe", metadata=described("LLM", "it loads like a real one and speaks nonsense"))
    tiny_moe(moe, metadata=described("MoE", "it loads like a real mixture of experts and speaks nonsense"))
    tiny_embedding(embedding, metadata=described("Embedding", "it loads like a real one, its vectors are nonsense"))
    return keys


def _model(made: Model, name: str, quantization: str, kind: str = "model") -> Model:
    """Add the general metadata that describes the file to users and to the catalog."""
    file_type = gguf.LlamaFileType[f"{'ALL' if quantization == 'F32' else 'MOSTLY'}_{quantization}"]
    general: dict[str, Value] = {
        "general.type": kind,
        "general.name": name,
        "general.file_type": int(file_type),
    }
    if kind == "model" and made.tensors:
        n_parameters = sum(math.prod(tensor.shape) for tensor in made.tensors)
        general["general.size_label"] = gguf.size_label(n_parameters, n_parameters, 0, 0)
    return Model(general | made.metadata, made.tensors)


def _write_one(path: Path, model: Model, metadata: Metadata | None = None, drop: Collection[str] = ()) -> Path:
    merged = model.metadata | dict(metadata or {})
    kept = {key: value for key, value in merged.items() if key not in drop}
    _write(path, Model(kept, [tensor for tensor in model.tensors if tensor.name not in drop]))
    return path


def _write(path: Path, model: Model, *, shards: int = 0, is_sparse: bool = False) -> list[Path]:
    """Write one file, or `shards` files: the first has all metadata, and the tensors are divided evenly."""
    if not shards:
        _write_file(path, model, is_sparse)
        return [path]
    n = len(model.tensors)
    paths = [path.with_name(f"{path.stem}-{number:05d}-of-{shards:05d}.gguf") for number in range(1, shards + 1)]
    for i, shard in enumerate(paths):
        split: dict[str, Value] = {"split.no": i, "split.count": shards, "split.tensors.count": n}
        tensors = model.tensors[n * i // shards : n * (i + 1) // shards]
        _write_file(shard, Model(split if i else model.metadata | split, tensors), is_sparse)
    return paths


def _write_file(path: Path, model: Model, is_sparse: bool) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several processes may write the same model
    with replacing(path, partial, is_durable=False):  # flushing a model of gigabytes would take long
        _write_header(partial, model)
        with partial.open("ab") as file:
            file.write(bytes(_padding(file.tell())))
            if is_sparse:
                n_bytes = map(_n_bytes, model.tensors)
                file.truncate(file.tell() + sum(n + _padding(n) for n in n_bytes))
            else:
                for chunk in _weights(model.tensors):
                    file.write(chunk.data)


def _write_header(path: Path, model: Model) -> None:
    """Write the header with the reference implementation."""
    writer = gguf.GGUFWriter(None, "")
    writer.kv_data[0].clear()  # remove the initial architecture, which shards and defective files may lack
    for key, value in model.metadata.items():
        writer.add_key_value(key, value, *_kind(key, value))
    for tensor in model.tensors:
        shape = tensor.shape[::-1]  # numpy's order, the contiguous dimension last
        writer.add_tensor_info(
            tensor.name, shape, np.dtype(np.float32), _n_bytes(tensor), raw_dtype=TensorType[tensor.type]
        )
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()


def _kind(key: str, value: Value) -> tuple[Kind, Kind | None]:
    """Return the GGUF types of a value and of its items.  Counts are unsigned, as llama.cpp's converter writes them."""
    if key in SPLIT_KINDS:
        return SPLIT_KINDS[key], None
    match value:
        case bool() | float() | str():
            return Kind.get_type(value), None
        case int():
            return Kind.INT32 if value < 0 else Kind.UINT32, None
        case Sequence():
            return Kind.ARRAY, Kind.get_type(value[0])
        case _:
            assert_never(value)


def _weights(tensors: list[Tensor]) -> Iterator[Bytes]:
    """Yield the data of all tensors in order, each padded to the alignment, in chunks of some megabytes.

    Norms are ones, and recurrent layers forget slowly.  All other tensors repeat a tile of random values, one
    per tensor type, each from a different position.
    """
    tiles: dict[str, Bytes] = {}
    n_elements = min(TILE_ELEMENTS, max((math.prod(tensor.shape) for tensor in tensors), default=0))
    for tensor in tensors:
        left = _n_bytes(tensor)
        padding = np.zeros(_padding(left), np.uint8)
        if tensor.name.endswith("norm.weight"):
            yield np.ones(tensor.shape, np.float32).view(np.uint8)
        elif tensor.name.endswith(".ssm_a"):
            yield np.full(math.prod(tensor.shape), DECAY, np.float32).view(np.uint8)
        else:
            tensor_type = TensorType[tensor.type]
            if tensor.type not in tiles:
                tiles[tensor.type] = _tile(tensor_type, n_elements)
            tile, (_, block_bytes) = tiles[tensor.type], gguf.GGML_QUANT_SIZES[tensor_type]
            start = zlib.crc32(tensor.name.encode()) % (len(tile) // block_bytes) * block_bytes
            while left:
                chunk = tile[start : start + left]
                yield chunk
                left -= len(chunk)
                start = 0
        yield padding


def _tile(kind: TensorType, n_elements: int) -> Bytes:
    numbers = np.random.Generator(np.random.PCG64(1)).standard_normal(n_elements, dtype=np.float32)
    return gguf.quants.quantize(numbers * np.float32(WEIGHT_DEVIATION), kind).view(np.uint8)


def _n_bytes(tensor: Tensor) -> int:
    block_elements, block_bytes = gguf.GGML_QUANT_SIZES[TensorType[tensor.type]]
    return math.prod(tensor.shape) // block_elements * block_bytes


def _padding(n_bytes: int) -> int:
    return -n_bytes % gguf.GGUF_DEFAULT_ALIGNMENT
