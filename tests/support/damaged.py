"""Damaged model files: the defect of each, and the error that a user must get.

Each file is a healthy tiny model with a single change, so the load can be refused only for that defect.
"""

from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable, Collection
from pathlib import Path
from typing import NamedTuple

import gguf
import numpy as np

from shared.synthetic import architectures, tokenizers
from shared.synthetic import models as synthetic
from shared.synthetic.architectures import Model, Tensor
from shared.synthetic.tokenizers import Metadata

INVALID, UNSUPPORTED = "invalid_model_file", "unsupported_model"
NOT_FOUND = "model_not_found"  # for files that are not in the catalog
VERSION, N_TENSORS, N_KEYS, FIRST_KEY = 4, 8, 16, 24  # offsets in the header of a GGUF file (ggml, docs/gguf.md)
KIND, VALUE, LENGTH, ITEM_KIND, N_ITEMS = 0, 4, 4, 4, 8  # offsets in a metadata value: a number, a string, an array
N_DIMS, DIM, TYPE, OFFSET, TENSOR_BYTES = 0, 4, 20, 24, 32  # offsets in the entry of a tensor of two dimensions
U16, U32, U64 = "<H", "<I", "<Q"
QUERY, TOKENS, SCORES = "blk.0.attn_q.weight", "tokenizer.ggml.tokens", "tokenizer.ggml.scores"
SHARDS = 3
MIB = 1 << 20

Make = Callable[[Path], object]


class Damage(NamedTuple):
    """`make` writes the file at a path in its own folder; `says` is a pattern for the error message."""

    make: Make
    code: str
    says: str


# ---- changes to the bytes of a healthy model


def after(data: bytes, name: str) -> int:
    """Return the offset behind the name of a key or a tensor."""
    entry = _named(name)
    return data.index(entry) + len(entry)


def data_at(data: bytes) -> int:
    """Return the offset of the tensor data: behind the entry of the last tensor."""
    end = after(data, "output.weight") + TENSOR_BYTES
    return end + -end % gguf.GGUF_DEFAULT_ALIGNMENT


def _named(name: str) -> bytes:
    return struct.pack(U64, len(name)) + name.encode()


def at(offset: int) -> Callable[[bytes], int]:
    return lambda _: offset


def within(name: str, offset: int) -> Callable[[bytes], int]:
    """Return a function that finds the place `offset` bytes behind the name of a key or a tensor."""
    return lambda data: after(data, name) + offset


def with_number(form: str, place: Callable[[bytes], int], value: int) -> Make:
    """Make a model with another number at a place."""

    def make(path: Path) -> None:
        synthetic.tiny_llama(path)
        write_number(path, form, place, value)

    return make


def write_number(path: Path, form: str, place: Callable[[bytes], int], value: float) -> None:
    data = path.read_bytes()
    changed = bytearray(data)
    struct.pack_into(form, changed, place(data), value)
    path.write_bytes(changed)


def renamed(old: str, new: str) -> Make:
    """Make a model in which a key or a tensor has another name of the same length."""

    def make(path: Path) -> None:
        data = synthetic.tiny_llama(path).read_bytes()
        assert (data.count(_named(old)), len(new)) == (1, len(old))
        path.write_bytes(data.replace(_named(old), _named(new)))

    return make


def cut(length: Callable[[bytes], int]) -> Make:
    """Make a model that is cut off after its first bytes."""

    def make(path: Path) -> None:
        data = synthetic.tiny_llama(path).read_bytes()
        path.write_bytes(data[: length(data)])

    return make


def of(data: bytes) -> Make:
    return lambda path: path.write_bytes(data)


# ---- models with wrong metadata or tensors


def llama(metadata: Metadata | None = None, drop: Collection[str] = ()) -> Make:
    return lambda path: synthetic.tiny_llama(path, metadata=metadata, drop=drop)


def moe(**numbers: int) -> Make:
    return lambda path: synthetic.tiny_moe(path, metadata={f"qwen3moe.{name}": n for name, n in numbers.items()})


def with_tensors(change: Callable[[list[Tensor]], list[Tensor]]) -> Make:
    def make(path: Path) -> None:
        metadata, tensors = architectures.decoder(architectures.TINY, tokenizers.spm())
        synthetic._write_one(path, synthetic._model(Model(metadata, change(tensors)), "Tiny Llama", "F16"))

    return make


def big_endian(path: Path) -> None:
    """Write a model as a converter for a big-endian machine does."""
    writer = gguf.GGUFWriter(path, "llama", endianess=gguf.GGUFEndian.BIG)
    writer.add_context_length(4096)
    writer.add_tensor("token_embd.weight", np.ones((8, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def not_finite(path: Path, value: float = float("nan")) -> Path:
    """Write a valid model with one weight that is not finite."""

    def first_weight(data: bytes) -> int:
        (offset,) = struct.unpack_from(U64, data, after(data, QUERY) + OFFSET)
        return data_at(data) + int(offset)

    write_number(synthetic.tiny_llama(path), "<e", first_weight, value)
    return path


def misaligned(path: Path, alignment: int) -> Path:
    """Write a valid model whose tensors begin at a multiple of `alignment` (8 or 16), but not of 32."""
    for n in range(gguf.GGUF_DEFAULT_ALIGNMENT):
        names: Metadata = {"general.alignment": alignment, "general.name": "x" * (n + 1)}
        data = synthetic.tiny_llama(path, metadata=names).read_bytes()
        end = after(data, "output.weight") + TENSOR_BYTES
        padded = end + -end % alignment
        if padded % gguf.GGUF_DEFAULT_ALIGNMENT == alignment:
            path.write_bytes(data[:padded] + data[data_at(data) :])
            return path
    raise AssertionError("some name moves the tensors there")


# ---- models of several files


def sharded(change: Callable[[list[Path]], object]) -> Make:
    return lambda path: change(synthetic.sharded(path, SHARDS))


def one_too_few(shards: list[Path]) -> None:
    """Let the first file declare more files than there are."""
    write_number(shards[0], U16, within("split.count", VALUE), SHARDS + 1)


def same_number_twice(shards: list[Path]) -> None:
    """Let the last file declare that it is the second."""
    write_number(shards[2], U16, within("split.no", VALUE), 1)


def numbered_with_another_type(shards: list[Path]) -> None:
    """Give the number of the second file the type int16, of the same size."""
    write_number(shards[1], U32, within("split.no", KIND), 3)


def same_tensors_twice(shards: list[Path]) -> None:
    """Give the last file the tensors of the second, with its own number."""
    shutil.copyfile(shards[1], shards[2])
    write_number(shards[2], U16, within("split.no", VALUE), 2)


def swapped(shards: list[Path]) -> None:
    """Swap the names of the first two files."""
    aside = shards[0].with_suffix(".aside")
    shards[0].replace(aside)
    shards[1].replace(shards[0])
    aside.replace(shards[1])


def alone(shards: list[Path]) -> None:
    """Keep only the first file, under a name without a number."""
    for shard in shards[1:]:
        shard.unlink()
    shards[0].replace(shards[0].with_name("alone.gguf"))


# ---- paths that are not regular or not readable files


def linked(target: str) -> Make:
    return lambda path: path.symlink_to(target)


def linked_to_itself(path: Path) -> None:
    other = path.with_suffix(".other")
    path.symlink_to(other)
    other.symlink_to(path)


def unreadable(path: Path) -> None:
    synthetic.tiny_llama(path).chmod(0)


def unreadable_folder(path: Path) -> None:
    synthetic.tiny_llama(path).parent.chmod(0)


CUT = r"damaged, or its download is incomplete"
HEADER_ENDS = rf"ends within its header: it is {CUT}"
NO_GGUF = r"does not start with 'GGUF': it is not a GGUF file, or it is damaged"
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"4d7a" * 16 + b"\nsize 4368439584\n"
PAGE = b"<!DOCTYPE html><html><head><title>401 Unauthorized</title></head></html>"

# Defects found without the engine: such a file keeps its key, and is not listed.
SEEN_AT_ONCE: dict[str, Damage] = {
    # not GGUF
    "empty": Damage(of(b""), INVALID, r"empty\.gguf is empty"),
    "one-byte": Damage(of(b"G"), INVALID, NO_GGUF),
    "garbage": Damage(of(bytes(range(256)) * 64), INVALID, NO_GGUF),
    "zeros": Damage(of(bytes(MIB)), INVALID, NO_GGUF),
    "text": Damage(of(b"# A model card\n\nIt writes poems.\n"), INVALID, NO_GGUF),
    "web-page": Damage(of(PAGE), INVALID, r"is a web page, probably an error page saved as a download"),
    "lfs-pointer": Damage(of(LFS), INVALID, r"is a Git LFS pointer: the model itself was not downloaded"),
    "bad-magic": Damage(with_number(">I", at(0), int.from_bytes(b"GGUf")), INVALID, NO_GGUF),
    # an impossible or incomplete header
    **{
        f"version-{n}": Damage(
            with_number(U32, at(VERSION), n), INVALID, rf"is GGUF version {n}; only versions 2 and 3"
        )
        for n in (0, 1, 99)
    },
    "big-endian": Damage(big_endian, INVALID, r"is a big-endian GGUF"),
    "truncated-header": Damage(cut(lambda _: N_KEYS + 4), INVALID, HEADER_ENDS),
    "truncated-key": Damage(cut(lambda data: after(data, "llama.block_count") - 3), INVALID, HEADER_ENDS),
    "truncated-vocabulary": Damage(cut(lambda data: after(data, TOKENS) + 999), INVALID, HEADER_ENDS),
    "truncated-tensor-info": Damage(cut(lambda data: after(data, QUERY) + 6), INVALID, HEADER_ENDS),
    **{
        f"n-tensors-{n}": Damage(with_number(U64, at(N_TENSORS), n), INVALID, rf"claims {n} tensors; at most \d+ are")
        for n in (10**9, 1 << 62, 2**64 - 1)
    },
    **{
        f"n-keys-{n}": Damage(with_number(U64, at(N_KEYS), n), INVALID, rf"claims {n} metadata keys; at most \d+ are")
        for n in (10**9, 1 << 62, 2**64 - 1)
    },
    **{
        f"key-of-{n}-bytes": Damage(with_number(U64, at(FIRST_KEY), n), INVALID, HEADER_ENDS)
        for n in ((1 << 30) - 1, 1 << 63, 2**64 - 1)
    },
    **{
        f"string-of-{n}-bytes": Damage(with_number(U64, within("general.name", LENGTH), n), INVALID, HEADER_ENDS)
        for n in ((1 << 30) - 1, 1 << 63, 2**64 - 1)
    },
    **{
        f"{n}-strings": Damage(with_number(U64, within(TOKENS, N_ITEMS), n), INVALID, HEADER_ENDS)
        for n in (10**9, 1 << 61, 2**64 - 1)
    },
    **{
        f"{n}-numbers": Damage(with_number(U64, within(SCORES, N_ITEMS), n), INVALID, HEADER_ENDS)
        for n in (10**9, 1 << 61, 2**64 - 1)
    },
    "type-of-a-value": Damage(
        with_number(U32, within("llama.block_count", KIND), 77), INVALID, r"has a metadata value of unknown type 77"
    ),
    "type-of-items": Damage(
        with_number(U32, within(SCORES, ITEM_KIND), 77), INVALID, r"has a metadata value of unknown type 77"
    ),
    "duplicate-key": Damage(
        renamed("llama.attention.key_length", "llama.attention.head_count"),
        INVALID,
        r"has the metadata key 'llama\.attention\.head_count' twice",
    ),
    **{
        f"alignment-{n}": Damage(
            llama({"general.alignment": n}), INVALID, rf"has general\.alignment = {n}; it must be a power"
        )
        for n in (0, 3)
    },
    "alignment-2147483648": Damage(
        llama({"general.alignment": 1 << 31}), INVALID, rf"is shorter than the 2148\d{{6}} bytes .*{CUT}"
    ),
    # impossible or missing tensors
    "dims-overflow": Damage(
        with_number(U64, within(QUERY, DIM), 1 << 60), INVALID, r"the impossible shape \[1152921504606846976, 128\]"
    ),
    "dims-negative": Damage(
        with_number("<q", within(QUERY, DIM), -64), INVALID, r"the impossible shape \[18446744073709551552, 128\]"
    ),
    "dims-2-40": Damage(
        with_number(U64, within(QUERY, DIM), 1 << 40), INVALID, rf"is shorter than the \d{{15}} bytes .*{CUT}"
    ),
    "dims-9": Damage(with_number(U32, within(QUERY, N_DIMS), 9), INVALID, r"has a tensor of 9 dimensions"),
    "offset-beyond-the-end": Damage(
        with_number(U64, within(QUERY, OFFSET), 1 << 62), INVALID, rf"is shorter than the \d{{19}} bytes .*{CUT}"
    ),
    "truncated-before-data": Damage(cut(data_at), INVALID, rf"is shorter than the \d+ bytes .*{CUT}"),
    "truncated-half": Damage(
        cut(lambda data: (data_at(data) + len(data)) // 2), INVALID, rf"is shorter than the \d+ bytes .*{CUT}"
    ),
    "truncated-by-a-byte": Damage(
        cut(lambda data: len(data) - 1), INVALID, rf"is shorter than the \d+ bytes that its tensors need: .*{CUT}"
    ),
    # GGUF, but not a model, or a model on which the engine would abort
    "no-architecture": Damage(llama(drop=["general.architecture"]), INVALID, r"has no general\.architecture"),
    "no-context-length": Damage(llama(drop=["llama.context_length"]), INVALID, r"has no llama\.context_length"),
    "context-length-0": Damage(llama({"llama.context_length": 0}), INVALID, r"llama\.context_length = 0; it must be"),
    "vocabulary-only": Damage(synthetic.vocab_only, INVALID, r"has no tensors: it is a vocabulary, not a model"),
    "adapter": Damage(synthetic.lora, UNSUPPORTED, r"is a LoRA adapter, not a model"),
    "projector": Damage(synthetic.mmproj, NOT_FOUND, r"not found"),  # a companion of models: it has no key
    **{
        f"blocks-{n}": Damage(
            llama({"llama.block_count": n}), INVALID, rf"llama\.block_count = {n}; it must be from 1 to 512"
        )
        for n in (0, 513)
    },
    "experts-1025": Damage(moe(expert_count=1025), INVALID, r"expert_count = 1025; it must be at most 1024"),
    **{
        f"experts-used-{n}": Damage(
            moe(expert_used_count=n), INVALID, rf"expert_used_count = {n}; it must be from 1 to .*\(8\)"
        )
        for n in (0, 9)
    },
    "experts-used-of-none": Damage(
        llama({"llama.expert_used_count": 2}), INVALID, r"expert_used_count = 2; it must be 0 in a model without"
    ),
    "rope-scaling": Damage(
        llama({"llama.rope.scaling.type": "spiral"}), INVALID, r"rope\.scaling\.type = 'spiral'; it must be one of"
    ),
    "rope-scaling-of-another-type": Damage(
        llama({"llama.rope.scaling.type": 2}), INVALID, r"rope\.scaling\.type = 2; it must be one of"
    ),
    "more-predictions-than-blocks": Damage(
        llama({"llama.nextn_predict_layers": 5}),
        INVALID,
        r"nextn_predict_layers = 5; it must be less than llama\.block_count \(4\)",
    ),
    "a-block-without-attention": Damage(
        llama({"llama.attention.head_count_kv": [2, 0, 2, 2]}),
        INVALID,
        r"head_count_kv = 0; each block of the architecture llama has attention heads",
    ),
    "heads-that-do-not-divide": Damage(
        llama({"llama.attention.head_count_kv": 3}), INVALID, r"head_count_kv = 3; it must divide .*head_count \(4\)"
    ),
    "part-of-a-rotation": Damage(
        moe(**{"rope.dimension_count": 16}), INVALID, r"dimension_count = 16; it must be the length of a head \(32\)"
    ),
    "negative-epsilon": Damage(
        llama({"llama.attention.layer_norm_rms_epsilon": -1e-6}), INVALID, r"_epsilon = -\S+; it must be at least 0"
    ),
    "repeated-token": Damage(
        lambda path: synthetic.tiny_llama(path, metadata={TOKENS: ["<unk>", "<s>", "<s>"]}),
        INVALID,
        r"has the token '<s>' twice in its vocabulary",
    ),
    "image-generator": Damage(
        llama({"general.architecture": "flux"}), UNSUPPORTED, r"is a model of the architecture 'flux', which llama\.cpp"
    ),
    # models of several files
    "missing-shard": Damage(
        sharded(lambda shards: shards[1].unlink()), INVALID, r"; missing: missing-shard-00002-of-00003\.gguf"
    ),
    "missing-first-shard": Damage(
        sharded(lambda shards: shards[0].unlink()), INVALID, r"; missing: missing-first-shard-00001-of-00003\.gguf"
    ),
    "garbage-shard": Damage(
        sharded(lambda shards: shards[1].write_bytes(b"garbage")),
        INVALID,
        rf"garbage-shard-00002-of-00003\.gguf {NO_GGUF}",
    ),
    "truncated-shard": Damage(
        sharded(lambda shards: os.truncate(shards[2], shards[2].stat().st_size - 1)),
        INVALID,
        r"truncated-shard-00003-of-00003\.gguf is shorter than",
    ),
    "number-of-another-type": Damage(
        sharded(numbered_with_another_type),
        INVALID,
        r"-00002-of-00003\.gguf has split\.no with a type other than uint16",
    ),
    "swapped-shards": Damage(
        sharded(swapped), INVALID, r"swapped-shards-00001-of-00003\.gguf has no general\.architecture"
    ),
    "renamed-shard": Damage(
        sharded(alone), INVALID, r"is one of the 3 files of a split model, but lacks a suffix like"
    ),
    # not a regular file, or not readable
    "fifo": Damage(lambda path: os.mkfifo(path), INVALID, r"fifo\.gguf is not a regular file"),
    "directory": Damage(lambda path: path.mkdir(), NOT_FOUND, r"not found"),
    "link-to-a-device": Damage(
        linked("/dev/zero"), INVALID, r"is a symbolic link to a path outside the models directory"
    ),
    "link-to-passwd": Damage(
        linked("/etc/passwd"), INVALID, r"is a symbolic link to a path outside the models directory"
    ),
    "link-loop": Damage(linked_to_itself, INVALID, r"cannot be read: Too many levels of symbolic links"),
    "dangling-link": Damage(linked("nothing.gguf"), INVALID, r"cannot be read: No such file"),
    "unreadable": Damage(unreadable, INVALID, r"unreadable\.gguf cannot be read: Permission denied"),
    "unreadable-folder": Damage(unreadable_folder, INVALID, r"unreadable-folder cannot be read: Permission denied"),
}

# Defects found only by the engine: such a file is listed as a model.
SEEN_BY_THE_ENGINE: dict[str, Damage] = {
    "type-of-a-tensor": Damage(
        with_number(U32, within(QUERY, TYPE), 200), INVALID, rf"'{QUERY}' has invalid ggml type 200"
    ),
    **{
        f"offset-{n}": Damage(
            with_number(U64, within(QUERY, OFFSET), n), INVALID, rf"'{QUERY}' has offset {n}, expected \d+"
        )
        for n in (64, 66_049)
    },
    "duplicate-tensor": Damage(
        renamed("blk.1.ffn_up.weight", "blk.0.ffn_up.weight"),
        INVALID,
        r"duplicate tensor name 'blk\.0\.ffn_up\.weight'",
    ),
    "unknown-architecture": Damage(
        llama({"general.architecture": "llamx", "llamx.context_length": 4096, "llamx.block_count": 4}),
        UNSUPPORTED,
        r"unknown model architecture: 'llamx'",
    ),
    "missing-tensor": Damage(llama(drop=["blk.1.ffn_up.weight"]), INVALID, r"'blk\.1\.ffn_up\.weight' not found"),
    "another-tensor": Damage(
        with_tensors(lambda tensors: [*tensors, Tensor("blk.9.attn_q.weight", (64, 64), "F16")]),
        INVALID,
        r"wrong number of tensors; expected 40, got 39",
    ),
    "wrong-shape": Damage(
        with_tensors(lambda tensors: [t._replace(shape=(64, 96)) if t.name == QUERY else t for t in tensors]),
        INVALID,
        rf"'{QUERY}' has wrong shape; expected +64, +128, got +64, +96",
    ),
    "missing-hyperparameter": Damage(
        llama(drop=["llama.attention.layer_norm_rms_epsilon"]),
        INVALID,
        r"key not found in model: llama\.attention\.layer_norm_rms_epsilon",
    ),
    "no-block-count": Damage(llama(drop=["llama.block_count"]), INVALID, r"key not found in model: llama\.block_count"),
    "wrong-key-type": Damage(
        llama({"llama.block_count": "four"}), INVALID, r"llama\.block_count has wrong type str but expected type u32"
    ),
    "unknown-tokenizer": Damage(llama({"tokenizer.ggml.model": "runes"}), UNSUPPORTED, r"unknown tokenizer: 'runes'"),
    "unknown-pre-tokenizer": Damage(
        lambda path: synthetic.tiny_llama(path, tokenizer="bpe", metadata={"tokenizer.ggml.pre": "runic"}),
        UNSUPPORTED,
        r"unknown pre-tokenizer type: 'runic'",
    ),
    "no-tokenizer": Damage(llama(drop=[*tokenizers.spm()]), INVALID, r"key not found in model: tokenizer\.ggml\.model"),
    "wrong-count": Damage(sharded(one_too_few), INVALID, r"invalid split count, given: 3 splits, but expected 4"),
    "same-number-twice": Damage(
        sharded(same_number_twice),
        INVALID,
        r"invalid split file idx: 1 \(file: \S+/same-number-twice-00003-of-00003\.gguf\), expected 2",
    ),
    "same-tensors-twice": Damage(sharded(same_tensors_twice), INVALID, r"tensor 'blk\.\d\.\w+\.weight' is duplicated"),
}

DAMAGES = SEEN_AT_ONCE | SEEN_BY_THE_ENGINE


def key_of(name: str) -> str:
    return f"damaged/{name}"


def write_all(models_dir: Path) -> None:
    """Write each damaged file into its own folder."""
    for name, damage in DAMAGES.items():
        folder = models_dir / key_of(name)
        folder.mkdir(parents=True)
        damage.make(folder / f"{name}.gguf")
