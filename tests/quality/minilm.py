"""Converts all-MiniLM-L6-v2 from the layout of sentence-transformers to GGUF, with numpy and gguf only.

llama.cpp's own converter needs PyTorch.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

NAME = "all-MiniLM-L6-v2"
UNUSED = {"embeddings.position_ids", "pooler.dense.weight", "pooler.dense.bias"}
FULL_PRECISION = ("position_embd", "token_types")  # as llama.cpp's converter keeps them, beside all vectors
SPECIAL = {"unk": "[UNK]", "sep": "[SEP]", "pad": "[PAD]", "bos": "[CLS]", "mask": "[MASK]"}


def convert(archive: Path, path: Path) -> None:
    """Write the model in a zip archive to `path`, with F16 matrices."""
    with zipfile.ZipFile(archive) as files:
        config, tokenizer = (json.loads(files.read(name)) for name in ("config.json", "tokenizer.json"))
        tensors = read_tensors(files.read("model.safetensors"))
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name(NAME)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    add_shape(writer, config)
    add_tokenizer(writer, tokenizer)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.BERT, config["num_hidden_layers"])
    for name, tensor in tensors.items():
        renamed = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if renamed is None:
            raise ValueError(f"a tensor without a name in GGUF: {name}")
        is_matrix = tensor.ndim == 2 and not renamed.startswith(FULL_PRECISION)
        writer.add_tensor(renamed, tensor.astype(np.float16) if is_matrix else tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_tensors(data: bytes) -> dict[str, NDArray[np.float32]]:
    """Read the used tensors of a safetensors file, which are F32.

    The file is the size of a JSON header (8 bytes), the header, and the bytes of the tensors.
    """
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    tensors = {}
    for name, about in header.items():
        if name == "__metadata__" or name in UNUSED:
            continue
        if about["dtype"] != "F32":
            raise ValueError(f"{name} is {about['dtype']}")
        begin, end = about["data_offsets"]
        tensors[name] = np.frombuffer(data[start + begin : start + end], np.float32).reshape(about["shape"])
    return tensors


def add_shape(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType.MEAN)
    writer.add_token_type_count(config["type_vocab_size"])


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: dict[str, Any]) -> None:
    """Add a WordPiece vocabulary.  In GGUF, the beginning of a word is marked, and not its continuation."""
    ids: dict[str, int] = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(ids, key=lambda token: ids[token])
    assert [ids[token] for token in tokens] == list(range(len(tokens)))
    writer.add_tokenizer_model("bert")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([token if token in special else marked(token) for token in tokens])
    writer.add_token_types([gguf.TokenType.CONTROL if t in special else gguf.TokenType.NORMAL for t in tokens])
    for name, token in SPECIAL.items():
        getattr(writer, f"add_{name}_token_id")(ids[token])
    writer.add_add_bos_token(True)


def marked(token: str) -> str:
    return token[2:] if token.startswith("##") else f"\N{LOWER ONE EIGHTH BLOCK}{token}"
