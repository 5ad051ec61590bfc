"""The GGUF header reader: a valid file gives its metadata, any other file gives InvalidGGUF and never a hang."""

from __future__ import annotations

import os
import socket
import struct
import time
from collections.abc import Callable
from pathlib import Path

import gguf as reference
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support.headers import LLAMA, WEIGHTS, Value, header, vocabulary, write
from worker.catalog.gguf import Header, InvalidGGUF, parse, read

FULL: dict[str, Value] = {**LLAMA, "general.tags": ["a", "b"], "llama.rope.freq_base": 0.5, **vocabulary(40)}


def reason(path: Path, *, whole: bool = True) -> str:
    with pytest.raises(InvalidGGUF) as caught:
        read(path, whole=whole)
    assert str(path.parent) not in caught.value.reason
    return caught.value.reason


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_whole_header_has_metadata_and_tensors(path: Path) -> None:
    write(path, FULL, [("a", (64, 2), 8), ("b", (3,), 0)])
    whole = read(path, whole=True)
    assert whole.metadata["general.architecture"] == "llama"
    assert whole.metadata["general.tags"] == ["a", "b"]
    assert whole.metadata["llama.rope.freq_base"] == 0.5
    assert whole.tensors is not None
    assert [(t.name, t.dims, t.type, t.offset, t.size) for t in whole.tensors] == [
        ("a", (64, 2), 8, 0, 4 * 34),
        ("b", (3,), 0, 1 << 16, 12),
    ]
    assert whole.file_size == path.stat().st_size
    assert whole.data_offset == len(header(FULL, [("a", (64, 2), 8), ("b", (3,), 0)]))


def test_a_quick_look_stops_before_the_vocabulary(path: Path) -> None:
    head = header(FULL)
    path.write_bytes(head[: head.index(b"tokenizer.ggml.tokens") + 40])
    quick = read(path, whole=False)
    assert quick.metadata["llama.context_length"] == 4096
    assert not any(key.startswith("tokenizer.") for key in quick.metadata)
    assert quick.tensors is None
    assert "ends within its header" in reason(path, whole=True)


def test_version_2_is_read_like_version_3(path: Path) -> None:
    path.write_bytes(header(tensors=[], version=2))
    assert read(path, whole=True).version == 2


def test_a_vocabulary_is_reduced_to_its_length(path: Path) -> None:
    write(path, vocabulary(5000))
    whole = read(path, whole=True)
    assert whole.array_lengths["tokenizer.ggml.tokens"] == 5000
    assert "tokenizer.ggml.tokens" not in whole.metadata


def cpu_seconds(action: Callable[[], object]) -> float:
    began = time.process_time()
    action()
    return time.process_time() - began


def test_a_large_vocabulary_is_read_quickly(path: Path) -> None:
    """The gguf package takes 14 s for 300,000 tokens; a catalog of 200 such models has to be complete in 15 s."""
    write(path, vocabulary(30_000))
    package_s = cpu_seconds(lambda: reference.GGUFReader(path))
    assert 10 * cpu_seconds(lambda: read(path, whole=True)) < package_s


def test_a_long_header_is_read_in_further_steps(path: Path) -> None:
    """The reader tries 64 KiB, then 8 MiB: this metadata is longer than both."""
    write(path, {"general.description": "x" * (9 << 20), "llama.embedding_length": 7})
    assert read(path, whole=False).metadata["llama.embedding_length"] == 7
    assert read(path, whole=True).metadata["llama.embedding_length"] == 7


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
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1), "has a metadata array of arrays"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61), "ends within its header"),
        (b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 12, 2**61), "ends within its header"),
        (header({"split.no": 1}), "has split.no with a type other than uint16"),
        (header({"general.alignment": 3}), "power of two"),
        (header({"general.alignment": 0}), "power of two"),
        (header({"general.alignment": "32"}), "has general.alignment as a string; it must be an integer"),
        (header({"general.alignment": 32.0}), "has general.alignment as a float; it must be an integer"),
        (header({"general.alignment": [32]}), "has general.alignment as an array; it must be an integer"),
        (header(tensors=[("t", (1, 1, 1, 1, 1), 0)]), "5 dimensions"),
        (header(tensors=[("t", (2**40, 2**40), 0)]), "impossible shape"),
        (header(tensors=[("t", (33,), 8)]), "needs a multiple of 32"),
        (header(tensors=[("t", (32,), 0)]), "its download is incomplete"),
        (header(tensors=[("t", (1,), 0)], offsets=[2**63]) + bytes(64), "its download is incomplete"),
        (header(tensors=[("t", (1,), 200)], offsets=[2**40]), "its download is incomplete"),
    ],
)
def test_the_reason_describes_the_defect_of_a_file(path: Path, content: bytes, expected: str) -> None:
    path.write_bytes(content)
    assert expected in reason(path)


def test_a_duplicate_key_is_refused(path: Path) -> None:
    once = header({"a": 1}, [])
    entry = once[24 : 24 + 8 + 1 + 4 + 4]
    path.write_bytes(b"GGUF" + struct.pack("<IQQ", 3, 0, 2) + entry * 2)
    assert "'a' twice" in reason(path)


def test_an_unknown_tensor_type_is_accepted(path: Path) -> None:
    """The engine may know the type; if not, the load fails with its message."""
    write(path, tensors=[("t", (5,), 200)])
    tensors = read(path, whole=True).tensors
    assert tensors is not None
    assert tensors[0].size is None


def test_a_download_in_progress_keeps_the_same_reason(path: Path) -> None:
    """Otherwise each scan of a growing file would publish a new catalog."""
    head = header(tensors=[("t", (1024,), 0)])
    path.write_bytes(head)
    at_first = reason(path)
    path.write_bytes(head + bytes(1000))
    assert reason(path) == at_first


@pytest.mark.parametrize("kind", ["fifo", "socket", "folder", "null", "zero", "link loop", "missing", "forbidden"])
def test_a_path_that_is_not_a_file_is_refused_at_once(
    tmp_path: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Opening a FIFO without a writer would block a scan for ever."""
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
def test_any_bytes_give_a_header_or_invalid_gguf(data: bytes, valid_start: bool, whole: bool) -> None:
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
def test_a_damaged_file_gives_a_header_or_invalid_gguf(
    changes: list[tuple[int, bytes]], end: int | None, whole: bool
) -> None:
    damaged = bytearray(VALID)
    for at, value in changes:
        damaged[at : at + len(value)] = value
    parsed_header = parsed(bytes(damaged[:end]), whole=whole)
    if parsed_header is not None and parsed_header.tensors is not None and parsed_header.data_offset is not None:
        assert all(
            parsed_header.data_offset + t.offset + (t.size or 0) <= parsed_header.file_size
            for t in parsed_header.tensors
        )


@given(cut=st.integers(0, HEAD_BYTES - 1))
def test_a_file_cut_within_its_header_is_invalid(cut: int) -> None:
    assert parsed(VALID[:cut], whole=True) is None
