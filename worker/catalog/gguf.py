"""What the head of a GGUF file says: metadata, and where the tensors lie.

Read without llama.cpp, which aborts the whole process on some files, and without the `gguf` package, which takes
seconds for a large vocabulary.  The layout is that of the GGUF specification (ggml, docs/gguf.md); the limits are
those of llama.cpp's own reader (ggml/src/gguf.cpp).

A file is somebody else's bytes: nothing is allocated by a count that it names, every length is compared with the
file's size before anything is read, and whatever is wrong with it is one error, InvalidGGUF.
"""

from __future__ import annotations

import os
import stat
import struct
from itertools import repeat
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn

from msgspec import Struct, structs

from shared.quantization import BLOCKS

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

KEPT_ITEMS = 1024  # a longer array is a vocabulary: only its length is of interest
MAX_HEAD_BYTES = 256 << 20  # the largest known vocabularies take 16 MiB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_DIMS = 4  # GGML_MAX_DIMS
QUICK_STEPS = (1 << 16, 8 << 20, MAX_HEAD_BYTES)  # bytes to try with: reading on is parsing anew, and rare
WHOLE_STEPS = (8 << 20, MAX_HEAD_BYTES)

U32 = struct.Struct("<I")
U64 = struct.Struct("<Q")
ARRAY = struct.Struct("<IQ")  # type of the items, their number
TENSOR_END = struct.Struct("<IQ")  # type, offset in the data section
START = struct.Struct("<4sIQQ")  # magic, version, tensors, keys
NUMBERS = {
    0: struct.Struct("<B"),
    1: struct.Struct("<b"),
    2: struct.Struct("<H"),
    3: struct.Struct("<h"),
    4: struct.Struct("<I"),
    5: struct.Struct("<i"),
    6: struct.Struct("<f"),
    7: struct.Struct("<?"),
    10: struct.Struct("<Q"),
    11: struct.Struct("<q"),
    12: struct.Struct("<d"),
}
STRING_TYPE, ARRAY_TYPE = 8, 9


class InvalidGGUF(Exception):
    """A file that is no readable GGUF model; `reason` continues "this file ..." and names no path.

    `lasting` is False where the system and not the file's content refused (permissions, a disk's error): the same
    bytes may be readable the next time.
    """

    def __init__(self, reason: str, *, lasting: bool = True) -> None:
        super().__init__(reason)
        self.reason = reason
        self.lasting = lasting


class Tensor(NamedTuple):
    name: str
    dims: tuple[int, ...]  # elements, innermost first
    type: int
    offset: int  # bytes from the start of the data section

    @property
    def elements(self) -> int:
        return prod(self.dims)

    @property
    def size(self) -> int | None:
        """Bytes of the tensor's data, None for a type that is not in BLOCKS."""
        if self.type not in BLOCKS:
            return None
        items, size = BLOCKS[self.type]
        return self.elements // items * size


class Header(Struct, frozen=True, kw_only=True):
    """The head of one file.

    `metadata` holds every value but arrays of over KEPT_ITEMS items, of which `array_lengths` (of all arrays) knows
    the length.  `tensors` and `data_offset` (bytes from the start of the file) are None unless the whole was read.
    """

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    n_tensors: int
    file_size: int
    tensors: tuple[Tensor, ...] | None = None
    data_offset: int | None = None


def read(path: Path, *, whole: bool) -> Header:
    """The header of the file at `path`; with `whole=False` only what stands before the first `tokenizer.` key.

    With `whole=True` every tensor of a known type was found to lie within the file.  A tensor of an unknown type is
    let through, since a newer engine may know it; only its offset is checked.  Never blocks on a FIFO or a device.
    Raises InvalidGGUF and nothing else.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InvalidGGUF("is not a regular file")
            return _read(fd, info.st_size, whole)
        finally:
            os.close(fd)
    except OSError as e:
        raise InvalidGGUF(f"cannot be read: {e.strerror}", lasting=False) from None


def _read(fd: int, file_size: int, whole: bool) -> Header:
    for step in WHOLE_STEPS if whole else QUICK_STEPS:
        head = os.pread(fd, min(step, file_size), 0)
        if len(head) < min(step, file_size):
            raise InvalidGGUF("became shorter while it was read", lasting=False)
        try:
            return parse(head, file_size, whole=whole)
        except _MoreNeeded:
            continue
    raise InvalidGGUF(f"has a header of over {MAX_HEAD_BYTES >> 20} MiB")


class _MoreNeeded(Exception):
    """The header goes on behind the bytes at hand, within the file."""


def parse(head: bytes, file_size: int, *, whole: bool) -> Header:
    """The header that `head`, the first bytes of a file of `file_size` bytes, holds.

    Raises InvalidGGUF, or, only where `head` is not the whole file, a private error that asks for more bytes.
    """
    _check_magic(head)
    cursor = _Cursor(head, file_size)
    _, version, n_tensors, n_keys = cursor.numbers(START)
    if version & 0xFFFF == 0 and version:
        raise InvalidGGUF("is a big-endian GGUF; only little-endian ones can be loaded")
    if version not in (2, 3):
        raise InvalidGGUF(f"is GGUF version {version}; only versions 2 and 3 can be loaded")
    if n_keys > MAX_KEYS:
        raise InvalidGGUF(f"claims {n_keys} metadata keys; at most {MAX_KEYS} are read")
    if n_tensors > MAX_TENSORS:
        raise InvalidGGUF(f"claims {n_tensors} tensors; at most {MAX_TENSORS} are read")
    header = Header(version=version, metadata={}, array_lengths={}, n_tensors=n_tensors, file_size=file_size)
    for _ in range(n_keys):
        key = cursor.string()
        if key.startswith("tokenizer.") and not whole:
            return header
        if key in header.metadata or key in header.array_lengths:
            raise InvalidGGUF(f"has the metadata key {key!r} twice")
        (kind,) = cursor.numbers(U32)
        if kind == ARRAY_TYPE:
            items, header.array_lengths[key] = cursor.array()
            if items is not None:
                header.metadata[key] = items
        else:
            header.metadata[key] = cursor.scalar(kind)
    if not whole:
        return header
    tensors = tuple(cursor.tensor() for _ in range(n_tensors))
    data_offset = _aligned(cursor.at, _alignment(header.metadata))
    _check_data(tensors, data_offset, file_size)
    return structs.replace(header, tensors=tensors, data_offset=data_offset)


def _check_magic(head: bytes) -> None:
    if head.startswith(b"GGUF"):
        return
    if not head:
        raise InvalidGGUF("is empty")
    if head.startswith(b"version https://git-lfs"):
        raise InvalidGGUF("is a Git LFS pointer: the model itself was not downloaded (git lfs pull does)")
    if head[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InvalidGGUF("is a web page, probably an error saved by a download")
    raise InvalidGGUF("does not start with 'GGUF': it is no GGUF file, or a damaged one")


class _Cursor:
    """Walks along a header.  Every step raises InvalidGGUF beyond the file and _MoreNeeded beyond the bytes at hand."""

    def __init__(self, head: bytes, file_size: int) -> None:
        self.head, self.file_size, self.at = head, file_size, 0

    def _beyond(self, end: int) -> NoReturn:
        if end > self.file_size:
            raise InvalidGGUF("ends within its header: it is damaged, or its download is incomplete")
        raise _MoreNeeded

    def _take(self, size: int) -> int:
        start, end = self.at, self.at + size
        if end > len(self.head):
            self._beyond(end)
        self.at = end
        return start

    def numbers(self, form: struct.Struct) -> tuple[int, ...]:
        return form.unpack_from(self.head, self._take(form.size))

    def string(self) -> str:
        (size,) = self.numbers(U64)
        start = self._take(size)
        return self.head[start : start + size].decode("utf-8", "replace")

    def scalar(self, kind: int) -> Scalar:
        if kind == STRING_TYPE:
            return self.string()
        if kind not in NUMBERS:
            raise InvalidGGUF(f"has a metadata value of the unknown type {kind}")
        (value,) = self.numbers(NUMBERS[kind])
        return value

    def array(self) -> tuple[list[Scalar] | None, int]:
        """The items of an array, or None for a long one, and their number."""
        kind, n = self.numbers(ARRAY)
        if n <= KEPT_ITEMS:
            return [self.scalar(kind) for _ in range(n)], n
        if kind == STRING_TYPE:
            self._skip_strings(n)
        elif kind in NUMBERS:
            self._take(n * NUMBERS[kind].size)
        else:
            raise InvalidGGUF(f"has a metadata array of the unknown type {kind}")
        return None, n

    def _skip_strings(self, n: int) -> None:
        """The time of a scan goes here: 150,000 tokens and as many merges are 16 ms."""
        head, at, length = self.head, self.at, U64.unpack_from
        if at + 8 * n > self.file_size:
            self._beyond(at + 8 * n)
        try:
            for _ in repeat(None, n):
                (size,) = length(head, at)
                at += 8 + size
        except (struct.error, OverflowError):  # the latter: an offset of 2**63 and more
            self._beyond(at + 8)
        if at > len(head):
            self._beyond(at)
        self.at = at

    def tensor(self) -> Tensor:
        name = self.string()
        (n_dims,) = self.numbers(U32)
        if n_dims > MAX_DIMS:
            raise InvalidGGUF(f"has a tensor of {n_dims} dimensions; there are at most {MAX_DIMS}")
        dims = tuple(self.numbers(U64)[0] for _ in range(n_dims))
        kind, offset = self.numbers(TENSOR_END)
        if prod(dims) >= 1 << 63:
            raise InvalidGGUF(f"has a tensor of the impossible shape {list(dims)}")
        return Tensor(name, dims, kind, offset)


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get("general.alignment", 32)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise InvalidGGUF(f"has the alignment {str(alignment)[:20]}, which is no power of two")
    return alignment


def _aligned(offset: int, alignment: int) -> int:
    return offset + -offset % alignment


def _check_data(tensors: tuple[Tensor, ...], data_offset: int, file_size: int) -> None:
    """Every tensor must lie within the file.  The reason stays the same while a download goes on."""
    for tensor in tensors:
        if tensor.type in BLOCKS and tensor.dims and tensor.dims[0] % BLOCKS[tensor.type][0]:
            raise InvalidGGUF(f"has a tensor whose rows of {tensor.dims[0]} elements are no whole blocks of its type")
    end = max((data_offset + tensor.offset + (tensor.size or 0) for tensor in tensors), default=0)
    if end > file_size:
        raise InvalidGGUF(
            f"is shorter than the {end} bytes that its tensors need: it is damaged, or its download is incomplete"
        )
