"""Atomic replacement of files."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from shared.files import replace_atomically, replacing

OLD, NEW = b"old content", b"new"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "a.json"
    path.write_bytes(OLD)
    return path


@pytest.fixture
def flushed(path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """For each flush: the bytes that were flushed, and the content of the file at that time."""
    flushes: list[tuple[bytes, bytes]] = []

    def fsync(fd: int) -> None:
        flushes.append((Path(f"/proc/self/fd/{fd}").read_bytes(), path.read_bytes()))

    monkeypatch.setattr(os, "fsync", fsync)
    return flushes


def names(path: Path) -> list[str]:
    return [entry.name for entry in path.parent.iterdir()]


@pytest.mark.parametrize("is_durable", [True, False])
def test_a_replaced_file_leaves_no_other_file(path: Path, is_durable: bool) -> None:
    opened = path.open("rb")
    replace_atomically(path, NEW, is_durable=is_durable)
    assert path.read_bytes() == NEW
    assert names(path) == [path.name]
    with opened:
        assert opened.read() == OLD, "a reader that has it open still reads the old content"


def test_a_missing_file_is_created(path: Path) -> None:
    path.unlink()
    replace_atomically(path, NEW)
    assert path.read_bytes() == NEW


def test_a_file_left_by_a_crash_is_overwritten(path: Path) -> None:
    path.with_name("a.json.new").write_bytes(b"the first half of a longer text")
    replace_atomically(path, NEW)
    assert path.read_bytes() == NEW


def test_data_is_flushed_before_the_rename(path: Path, flushed: list[tuple[bytes, bytes]]) -> None:
    replace_atomically(path, NEW)
    assert flushed == [(NEW, OLD)]


def test_a_file_that_need_not_be_durable_is_not_flushed(path: Path, flushed: list[tuple[bytes, bytes]]) -> None:
    replace_atomically(path, NEW, is_durable=False)
    assert flushed == []


def test_a_disk_that_fails_leaves_the_old_content(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fsync(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(OSError, match=os.strerror(errno.ENOSPC)):
        replace_atomically(path, NEW)
    assert path.read_bytes() == OLD
    assert names(path) == [path.name]


def test_an_exception_while_writing_leaves_the_old_content(path: Path) -> None:
    def write() -> None:
        with replacing(path, path.with_name("beside"), is_durable=False) as beside:
            beside.write_bytes(NEW)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write()
    assert path.read_bytes() == OLD
    assert names(path) == [path.name]


def test_the_error_of_a_write_is_raised(path: Path) -> None:
    path.with_name("a.json.new").mkdir()
    with pytest.raises(IsADirectoryError):
        replace_atomically(path, NEW)
    assert path.read_bytes() == OLD
