"""Replacing a file so that a reader, and a crash, finds either the old content or the new one."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_atomically(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Replace a file's content with `data`, or leave it as it was and raise OSError.  See `replacing`."""
    with replacing(path, path.with_name(f"{path.name}.new"), is_durable=is_durable) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path, beside: Path, *, is_durable: bool) -> Iterator[Path]:
    """Move `beside`, which the body of the `with` writes, over `path` when the body ends without an exception.

    Otherwise removes `beside`.  Both are in the same directory: rename(2) is atomic within a file system only.  Two
    writers at the same time need different names.

    `is_durable`: flush the data to the disk first (fsync(2)), so that also a power cut leaves the old or the new
    content.  Without it an empty file may be left; that is for files whose loss costs no more than the time to write
    them again, because a flush waits for the disk.
    """
    try:
        yield beside
        if is_durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):  # the first error counts
            beside.unlink()
        raise
