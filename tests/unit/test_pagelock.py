"""Mappings of files in this process, and the driver that page-locks them."""

from __future__ import annotations

import mmap
import os
from contextlib import ExitStack
from pathlib import Path

import pytest

from worker.engine import pagelock
from worker.engine.pagelock import driver_version, mappings

PAGE = os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("name", ["m.gguf", "two words.gguf", "a\nline.gguf", "gr\u00f6\u00dfer.gguf"])
def test_the_mapping_of_a_file_is_found_by_its_name(tmp_path: Path, name: str) -> None:
    path, link = tmp_path / name, tmp_path / "link"
    path.write_bytes(b"G" * (PAGE + 1))
    link.symlink_to(path)
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ):
        (by_name, by_link) = mappings([str(path), str(link)], [PAGE + 1, PAGE + 1])
    assert by_name == by_link
    address, size = by_name
    assert (address % PAGE, size) == (0, 2 * PAGE)


def test_a_mapping_of_a_part_is_none_of_the_file(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("head", "tail", "gone", "other")]
    with ExitStack() as open_files:
        for path, (length, offset) in zip(files, [(PAGE, 0), (PAGE, PAGE), (2 * PAGE, 0)], strict=False):
            path.write_bytes(bytes(2 * PAGE))
            file = open_files.enter_context(path.open("rb"))
            open_files.enter_context(mmap.mmap(file.fileno(), length, access=mmap.ACCESS_READ, offset=offset))
        files[2].unlink()
        assert mappings([str(path) for path in files], [2 * PAGE] * 4) == [(0, 0)] * 4


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.159.04  Release Build  (dvs-builder)\n", 580),
        ("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.54  Tue Jun  6 22:20:39 UTC 2023\n", 535),
        ("GCC version:  gcc version 12.3.0\n", None),
    ],
)
def test_the_branch_of_the_driver(
    text: str, version: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pagelock, "DRIVER", tmp_path / "version")
    assert driver_version() is None
    (tmp_path / "version").write_text(text)
    assert driver_version() == version
