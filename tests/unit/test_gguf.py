"""The header reader: a good file gives its metadata, anything else one declared error and never a hang."""

from __future__ import annotations

import os
import socket
import struct
import time
from pathlib import Path

import gguf as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.quantization import BLOCKS
from tests.support.headers import LLAMA, WEIGHTS, Value, header, vocabulary, write
from worker.catalog.gguf import Header, InvalidGGUF, parse, read

FULL: dict[str, Value] = {**LLAMA, "general.tags": ["a", "b"], "llama.rope.freq_base": 0.5, **vocabulary(40)}


def reason(path: Path, *, whole: bool = True) -> str:
    with pytest.raises(InvalidGGUF) as caught:
        read(path, whole=whole)
    assert str(path.parent) not in caught.value.reason
    return caught.value.reason


@pytest.fixture
def put(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_whole_header_tells_metadata_and_tensors(put: Path) -> None:
    write(put, FULL, [("a", (64, 2), 8), ("b", (3,), 0)])
    found = read(put, whole=True)
    assert found.metadata["general.architecture"] == "llama"
    assert found.metadata["general.tags"] == ["a", "b"]
    assert found.metadata["llama.rope.freq_base"] == 0.5
    assert found.tensors is not None
    assert [(t.name, t.dims, t.type, t.offset, t.size) for t in found.tensors] == [
        ("a", (64, 2), 8, 0, 4 * 34),
        ("b", (3,), 0, 1 << 16, 12),
    ]
    assert found.file_size == put.stat().st_size
    assert found.data_offset == len(header(FULL, [("a", (64, 2), 8), ("b", (3,), 0)]))


def test_a_quick_look_stops_before_the_vocabulary_even_if_what_follows_is_missing(put: Path) -> None:
    head = header(FULL)
    put.write_bytes(head[: head.index(b"tokenizer.ggml.tokens") + 40])
    found = read(put, whole=False)
    assert found.metadata["llama.context_length"] == 4096
    assert not any(key.startswith("tokenizer.") for key in found.metadata)
    assert found.tensors is None
    assert "ends within its header" in reason(put, whole=True)


def test_version_2_is_read_like_version_3(put: Path) -> None:
    put.write_bytes(header(tensors=[], version=2))
    assert read(put, whole=True).version == 2


def test_of_a_vocabulary_only_the_length_is_kept(put: Path) -> None:
    write(put, vocabulary(5000))
    found = read(put, whole=True)
    assert found.array_lengths["tokenizer.ggml.tokens"] == 5000
    assert "tokenizer.ggml.tokens" not in found.metadata


def test_a_large_vocabulary_takes_a_fraction_of_a_second(put: Path) -> None:
    """The gguf package takes 14 s for this; a catalog of 200 such models has to be complete in 15 s."""
    write(put, vocabulary(300_000))
    start = time.perf_counter()
    read(put, whole=True)
    assert time.perf_counter() - start < 0.5


def test_a_header_longer_than_the_first_bytes_read_is_read_on(put: Path) -> None:
    """64 KiB are tried first, then 8 MiB: the metadata here takes more than that before any vocabulary."""
    write(put, {"general.description": "x" * (9 << 20), "llama.embedding_length": 7})
    assert read(put, whole=False).metadata["llama.embedding_length"] == 7
    assert read(put, whole=True).metadata["llama.embedding_length"] == 7


def test_block_sizes_are_those_of_the_reference() -> None:
    known = {int(kind): sizes for kind, sizes in reference.GGML_QUANT_SIZES.items()}
    assert known == BLOCKS


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "is empty"),
        (b"GG", "does not start with 'GGUF'"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><title>401</title>", "web page"),
        (b"GGUF" + struct.pack("<I", 3), "ends within its header"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
        (b"GGUF" + struct.pack("<IIIQ", 1, 0, 0, 0), "version 1"),
        (b"GGUF" + struct.pack("<IQQ", 99, 0, 0), "version 99"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**62, 0), "tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 2**64 - 1), "metadata keys"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 2**63), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 13), "unknown type 13"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 12, 2**61), "ends within its header"),
        (header({"general.alignment": 3}), "power of two"),
        (header({"general.alignment": 0}), "power of two"),
        (header({"general.alignment": "x" * 500}), "power of two"),
        (header(tensors=[("t", (1, 1, 1, 1, 1), 0)]), "5 dimensions"),
        (header(tensors=[("t", (2**40, 2**40), 0)]), "impossible shape"),
        (header(tensors=[("t", (33,), 8)]), "needs a multiple of 32"),
        (header(tensors=[("t", (32,), 0)]), "its download is incomplete"),
        (header(tensors=[("t", (1,), 0)], offsets=[2**63]) + bytes(64), "its download is incomplete"),
        (header(tensors=[("t", (1,), 200)], offsets=[2**40]), "its download is incomplete"),
    ],
)
def test_what_is_wrong_with_a_file_is_said_in_words(put: Path, content: bytes, expected: str) -> None:
    put.write_bytes(content)
    assert expected in reason(put)


def test_a_key_that_comes_twice_is_refused(put: Path) -> None:
    once = header({"a": 1}, [])
    entry = once[24 : 24 + 8 + 1 + 4 + 4]
    put.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry * 2)
    assert "'a' twice" in reason(put)


def test_a_tensor_type_of_the_future_is_let_through(put: Path) -> None:
    """The engine knows better, and says so when it does not."""
    write(put, tensors=[("t", (5,), 200)])
    tensors = read(put, whole=True).tensors
    assert tensors is not None
    assert tensors[0].size is None


def test_the_reason_stays_the_same_while_a_download_goes_on(put: Path) -> None:
    """Else every look at a growing file would be news."""
    head = header(tensors=[("t", (1024,), 0)])
    put.write_bytes(head)
    at_first = reason(put)
    put.write_bytes(head + bytes(1000))
    assert reason(put) == at_first


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "null", "zero", "link loop", "missing", "forbidden"])
def test_what_is_no_file_is_refused_at_once(tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Opening a FIFO that nobody writes to would hang a scan for ever."""
    monkeypatch.chdir(tmp_path)
    path = Path("odd.gguf")
    match kind:
        case "fifo":
            os.mkfifo(path)
        case "socket":
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(path))
        case "folder":
            path.mkdir()
        case "null" | "zero":
            path = Path("/dev") / kind
        case "link loop":
            path.symlink_to(path)
        case "forbidden":
            if os.getuid() == 0:
                pytest.skip("root may read everything")
            write(path).chmod(0)
    with pytest.raises(InvalidGGUF) as caught:
        read(path, whole=False)
    assert "/" not in caught.value.reason


def parsed(data: bytes, *, whole: bool) -> Header | None:
    try:
        return parse(data, len(data), whole=whole)
    except InvalidGGUF:
        return None


@given(data=st.binary(max_size=400), valid_start=st.booleans(), whole=st.booleans())
def test_any_bytes_are_a_header_or_invalid(data: bytes, valid_start: bool, whole: bool) -> None:
    start = b"GGUF" + struct.pack("<IQQ", 3, len(data) % 3, len(data) % 5) if valid_start else b""
    parsed(start + data, whole=whole)


VALID = header(FULL, [*WEIGHTS, ("b", (32, 2, 2), 8)]) + bytes(1 << 17)
HEAD_BYTES = len(VALID) - (1 << 17)


@given(
    changes=st.lists(
        st.tuples(
            st.integers(0, HEAD_BYTES - 1),
            st.sampled_from([b"\xff", b"\0", b"\xff" * 8, b"\0" * 8, b"\x09", b"\x08\0\0\0", b"\x7f" * 4]),
        ),
        max_size=4,
    ),
    end=st.one_of(st.none(), st.integers(0, HEAD_BYTES)),
    whole=st.booleans(),
)
def test_a_damaged_file_is_a_header_or_invalid(changes: list[tuple[int, bytes]], end: int | None, whole: bool) -> None:
    damaged = bytearray(VALID)
    for at, value in changes:
        damaged[at : at + len(value)] = value
    found = parsed(bytes(damaged[:end]), whole=whole)
    if found is not None and found.tensors is not None and found.data_offset is not None:
        assert all(found.data_offset + t.offset + (t.size or 0) <= found.file_size for t in found.tensors)


@given(cut=st.integers(0, HEAD_BYTES - 1))
def test_a_file_cut_within_its_header_is_never_whole(cut: int) -> None:
    assert parsed(VALID[:cut], whole=True) is None
