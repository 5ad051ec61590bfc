"""Calls of the C library: their effects, and their failures as OSError."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared import libc

SIZE = 3 * mmap.PAGESIZE
needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="mallopt(3) and malloc_trim(3) are glibc's")

HEAP = """
import os
from pathlib import Path
from shared import libc

def resident_mb():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20

before = resident_mb()
kept = libc.keep_heap(32 << 20)
libc.touch_heap(16 << 20)
touched = resident_mb()
libc.trim_heap()
print(kept, touched - before, resident_mb() - before)
"""


def output(code: str) -> str:
    """Run code in another process, which it may change, and return its output."""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def fd(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "mapped-file"
    path.write_bytes(b"x" * SIZE)
    fd = os.open(path, os.O_RDWR)
    yield fd
    os.close(fd)


def is_mapped() -> bool:
    return "mapped-file" in Path("/proc/self/maps").read_text()


def test_prctl_sets_an_attribute_of_the_process() -> None:
    code = "from shared import libc; libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1); print(open('/proc/self/status').read())"
    assert "NoNewPrivs:\t1\n" in output(code)


def test_prctl_raises_the_error_of_the_kernel() -> None:
    with pytest.raises(OSError, match=os.strerror(errno.EINVAL)) as caught:
        libc.prctl(libc.PR_SET_PDEATHSIG, 1000)
    assert caught.value.errno == errno.EINVAL


def test_a_file_is_mapped_until_it_is_unmapped(fd: int) -> None:
    address = libc.map_file(fd, SIZE)
    libc.populate(address, SIZE)
    assert is_mapped()
    assert ctypes.string_at(address, SIZE) == b"x" * SIZE
    libc.unmap(address, SIZE)
    assert not is_mapped()


def test_a_descriptor_that_cannot_be_mapped_is_an_error() -> None:
    reading, writing = os.pipe()
    with pytest.raises(OSError, match=os.strerror(errno.ENODEV)) as caught:
        libc.map_file(reading, SIZE)
    os.close(reading)
    os.close(writing)
    assert caught.value.errno == errno.ENODEV


def test_a_truncated_mapping_is_an_error_and_not_a_signal(fd: int) -> None:
    address = libc.map_file(fd, SIZE)
    try:
        os.truncate(fd, mmap.PAGESIZE)
        with pytest.raises(OSError, match=os.strerror(errno.EFAULT)) as caught:
            libc.populate(address, SIZE)
        assert caught.value.errno == errno.EFAULT
    finally:
        libc.unmap(address, SIZE)


def test_an_address_within_a_page_is_an_error(fd: int) -> None:
    address = libc.map_file(fd, SIZE)
    try:
        for call in (libc.populate, libc.unmap):
            with pytest.raises(OSError, match=os.strerror(errno.EINVAL)):
                call(address + 1, mmap.PAGESIZE)
    finally:
        libc.unmap(address, SIZE)


@needs_glibc
def test_the_heap_keeps_touched_pages_until_it_is_trimmed() -> None:
    kept, touched, trimmed = output(HEAP).split()
    assert kept == "True"
    assert int(touched) >= 15
    assert int(trimmed) <= 2


def test_a_missing_function_fails_at_its_call(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_prctl", "_mallopt", "_malloc_trim"):
        monkeypatch.setattr(libc, name, libc._declared("no_such_function", ctypes.c_int))
    with pytest.raises(OSError, match=os.strerror(errno.ENOSYS)):
        libc.prctl(libc.PR_SET_PDEATHSIG, 0)
    assert not libc.keep_heap(1 << 20)
    libc.trim_heap()


def test_start_writing(tmp_path: Path) -> None:
    with (tmp_path / "file").open("wb") as file:
        file.write(bytes(SIZE))
        file.flush()
        libc.start_writing(file.fileno(), 0, SIZE)
    with pytest.raises(OSError) as caught:
        libc.start_writing(-1, 0, SIZE)
    assert caught.value.errno == errno.EBADF
