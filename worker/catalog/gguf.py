"""Reads the header of a GGUF file: metadata, and the position of the tensors.

Does not use llama.cpp, which aborts the whole process on some files, nor the `gguf` package, which takes seconds for a
large vocabulary.  The layout is that of the GGUF specification (ggml, docs/gguf.md); the limits are those of
llama.cpp's own reader (ggml/src/gguf.cpp).

Files are untrusted input: a count in a file never sizes an allocation, every length is compared with the file's size
before data is read, and every defect raises the same error, InvalidGGUF.
"""

from __future__ import annotations

import os
import stat
import struct
from collections.abc import Callable, Sequence
from itertools import repeat
from math import prod
from pathlib import Path
from typing import NamedTuple, NoReturn, assert_never

from msgspec import Struct, structs

from shared.quantization import BLOCKS

Scalar = str | int | float | bool
Value = Scalar | list[Scalar]

ALIGNMENT = "general.alignment"
TOKENS, SPLIT_NO = "tokenizer.ggml.tokens", "split.no"
KEPT_ITEMS = 1024  # a longer array is a vocabulary, of which only the length is used
MAX_HEAD_BYTES = 256 << 20  # the largest known vocabularies take 16 MiB
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 18
MAX_DIMS = 4  # GGML_MAX_DIMS
QUICK_STEPS = (1 << 16, 8 << 20, MAX_HEAD_BYTES)  # bytes to read; each further step parses from the start, and is rare
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
UINT16_TYPE, STRING_TYPE, ARRAY_TYPE = 2, 8, 9


class InvalidGGUF(Exception):
    """The file is not a readable GGUF model.  `reason` continues a sentence that begins with the file's name.

    `lasting` is False if the system and not the file's content is the cause (permissions, an I/O error): the same bytes
    may be readable the next time.
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
        """The bytes of the tensor's data; None if its type is not in BLOCKS."""
        if self.type not in BLOCKS:
            return None
        items, size = BLOCKS[self.type]
        return self.elements // items * size


class Header(Struct, frozen=True, kw_only=True):
    """The header of one file.

    `metadata` holds every value except arrays of more than KEPT_ITEMS items; `array_lengths` holds the length of every
    array.  `tensors` and `data_offset` (bytes from the start of the file) are None unless the whole header was read.
    """

    version: int
    metadata: dict[str, Value]
    array_lengths: dict[str, int]
    n_tensors: int
    file_size: int
    tensors: tuple[Tensor, ...] | None = None
    data_offset: int | None = None


def read(path: Path, *, whole: bool) -> Header:
    """Read the header of the file at `path`; with `whole=False` only the keys before the first `tokenizer.` key.

    With `whole=True`, checks that every tensor lies within the file.  Of a tensor of an unknown type, which a newer
    engine may support, only the offset is checked.  Never blocks on a FIFO or a device.  Raises only InvalidGGUF.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            info = os.fstat(fd)
            if not stat.S_ISREG(info.st_mode):
                raise InvalidGGUF("is not a regular file")
            steps = WHOLE_STEPS if whole else QUICK_STEPS
            return read_by(lambda size: os.pread(fd, size, 0), info.st_size, steps, whole=whole)
        finally:
            os.close(fd)
    except OSError as e:
        raise InvalidGGUF(f"cannot be read: {e.strerror}", lasting=False) from None


def read_by(start: Callable[[int], bytes], file_size: int, steps: Sequence[int], *, whole: bool) -> Header:
    """Read the header of a file of which `start` returns that many first bytes, in `steps` of bytes as it is needed.

    Raises InvalidGGUF, and what `start` raises.
    """
    for step in steps:
        head = start(min(step, file_size))
        if len(head) < min(step, file_size):
            raise InvalidGGUF("was truncated while it was read", lasting=False)
        try:
            return parse(head, file_size, whole=whole)
        except _MoreNeeded:
            continue
    raise InvalidGGUF(f"has a header of more than {steps[-1] >> 20} MiB")


class _MoreNeeded(Exception):
    """The header continues after the bytes read so far, within the file."""


def parse(head: bytes, file_size: int, *, whole: bool) -> Header:
    """Parse the header in `head`, the first bytes of a file of `file_size` bytes.

    Raises InvalidGGUF; also _MoreNeeded, but only if `head` is not the whole file.
    """
    _check_magic(head)
    cursor = _Cursor(head, file_size)
    _, version, n_tensors, n_keys = cursor.numbers(START)
    if version & 0xFFFF == 0 and version:
        raise InvalidGGUF("is a big-endian GGUF file; only little-endian files are supported")
    if version not in (2, 3):
        raise InvalidGGUF(f"is GGUF version {version}; only versions 2 and 3 are supported")
    if n_keys > MAX_KEYS:
        raise InvalidGGUF(f"claims {n_keys} metadata keys; at most {MAX_KEYS} are supported")
    if n_tensors > MAX_TENSORS:
        raise InvalidGGUF(f"claims {n_tensors} tensors; at most {MAX_TENSORS} are supported")
    header = Header(version=version, metadata={}, array_lengths={}, n_tensors=n_tensors, file_size=file_size)
    for _ in range(n_keys):
        key = cursor.string()
        if key.startswith("tokenizer.") and not whole:
            return header
        if key in header.metadata or key in header.array_lengths:
            raise InvalidGGUF(f"has the metadata key {key!r} twice")
        (kind,) = cursor.numbers(U32)
        if key == SPLIT_NO and kind != UINT16_TYPE:  # llama.cpp asserts it of every shard but the first
            raise InvalidGGUF(f"has {SPLIT_NO} with a type other than uint16")
        if kind == ARRAY_TYPE:
            start = cursor.at
            items, header.array_lengths[key] = cursor.array()
            if items is not None:
                header.metadata[key] = items
            if key == TOKENS and (token := _Cursor(head, file_size, start).repeated()) is not None:
                raise InvalidGGUF(f"has the token {token!r} twice in its vocabulary ({TOKENS})")
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
        raise InvalidGGUF("is a Git LFS pointer: the model itself was not downloaded; run `git lfs pull`")
    if head[:64].lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise InvalidGGUF("is a web page, probably an error page saved as a download")
    raise InvalidGGUF("does not start with 'GGUF': it is not a GGUF file, or it is damaged")


class _Cursor:
    """Reads a header value by value.

    Every method raises InvalidGGUF at the end of the file, and _MoreNeeded at the end of the bytes read so far.
    """

    def __init__(self, head: bytes, file_size: int, at: int = 0) -> None:
        self.head, self.file_size, self.at = head, file_size, at

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
            raise InvalidGGUF(f"has a metadata value of unknown type {kind}")
        (value,) = self.numbers(NUMBERS[kind])
        return value

    def array(self) -> tuple[list[Scalar] | None, int]:
        """Read an array.  Returns its items, None if there are more than KEPT_ITEMS, and their number."""
        kind, n = self.numbers(ARRAY)
        if kind == ARRAY_TYPE:
            raise InvalidGGUF("has a metadata array of arrays, which llama.cpp does not support")
        if n <= KEPT_ITEMS:
            return [self.scalar(kind) for _ in range(n)], n
        if kind == STRING_TYPE:
            self._skip_strings(n)
        elif kind in NUMBERS:
            self._take(n * NUMBERS[kind].size)
        else:
            raise InvalidGGUF(f"has a metadata array of unknown type {kind}")
        return None, n

    def _skip_strings(self, n: int) -> None:
        """Skip `n` strings.  A scan spends most of its time here: 150,000 tokens and as many merges take 16 ms."""
        head, at, length = self.head, self.at, U64.unpack_from
        if at + 8 * n > self.file_size:
            self._beyond(at + 8 * n)
        try:
            for _ in repeat(None, n):
                (size,) = length(head, at)
                at += 8 + size
        except (struct.error, OverflowError):  # OverflowError: an offset of 2**63 or more
            self._beyond(at + 8)
        if at > len(head):
            self._beyond(at)
        self.at = at

    def repeated(self) -> str | None:
        """Return a string that an array has twice, as C's strings; None if there is none, or no array of strings.

        Empty strings do not count: llama.cpp names them by their positions.
        """
        kind, n = self.numbers(ARRAY)
        head, at, strings = self.head, self.at, set[bytes]()
        for _ in range(n if kind == STRING_TYPE else 0):
            (size,) = U64.unpack_from(head, at)
            string = head[at + 8 : at + 8 + size].partition(b"\0")[0]
            if string in strings:
                return string.decode("utf-8", "replace")
            if string:
                strings.add(string)
            at += 8 + size
        return None

    def tensor(self) -> Tensor:
        name = self.string()
        (n_dims,) = self.numbers(U32)
        if n_dims > MAX_DIMS:
            raise InvalidGGUF(f"has a tensor of {n_dims} dimensions; at most {MAX_DIMS} are supported")
        dims = tuple(self.numbers(U64)[0] for _ in range(n_dims))
        kind, offset = self.numbers(TENSOR_END)
        if prod(dims) >= 1 << 63:
            raise InvalidGGUF(f"has a tensor with the impossible shape {list(dims)}")
        return Tensor(name, dims, kind, offset)


def kind_of(value: Value) -> str:
    """Name the type of a metadata value in a sentence."""
    match value:
        case bool():
            return "a boolean"
        case int():
            return "an integer"
        case float():
            return "a float"
        case str():
            return "a string"
        case list():
            return "an array"
        case _:
            assert_never(value)


def _alignment(metadata: dict[str, Value]) -> int:
    alignment = metadata.get(ALIGNMENT, 32)
    if not isinstance(alignment, int):
        raise InvalidGGUF(f"has {ALIGNMENT} as {kind_of(alignment)}; it must be an integer")
    if alignment <= 0 or alignment & (alignment - 1):
        raise InvalidGGUF(f"has {ALIGNMENT} = {alignment}; it must be a power of two")
    return alignment


def _aligned(offset: int, alignment: int) -> int:
    return offset + -offset % alignment


def _check_data(tensors: tuple[Tensor, ...], data_offset: int, file_size: int) -> None:
    """Check that every tensor lies within the file.  The message does not name the file's size, so that it stays the
    same while a download makes the file grow."""
    for tensor in tensors:
        if tensor.type in BLOCKS and tensor.dims and tensor.dims[0] % BLOCKS[tensor.type][0]:
            block = BLOCKS[tensor.type][0]
            raise InvalidGGUF(
                f"has a tensor with rows of {tensor.dims[0]} elements; its type needs a multiple of {block}"
            )
    end = max((data_offset + tensor.offset + (tensor.size or 0) for tensor in tensors), default=0)
    if end > file_size:
        raise InvalidGGUF(
            f"is shorter than the {end} bytes that its tensors need: it is damaged, or its download is incomplete"
        )
