"""Atomic replacement of files: readers see either the old or the new content, also after a crash."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_atomically(path: Path, data: bytes, *, is_durable: bool = True) -> None:
    """Replace the content of a file with `data`.  Raises OSError and leaves the file unchanged.  See `replacing`."""
    with replacing(path, path.with_name(f"{path.name}.new"), is_durable=is_durable) as beside:
        beside.write_bytes(data)


@contextmanager
def replacing(path: Path, beside: Path, *, is_durable: bool) -> Iterator[Path]:
    """Rename `beside`, which the `with` block writes, to `path` if the block succeeds; remove it otherwise.

    Both must be in the same directory, since rename(2) is atomic only within a file system.  Concurrent writers need
    different names for `beside`.

    `is_durable`: flush the data to disk first (fsync(2)), so that the old or the new content survives a power failure.
    Without it a power failure may leave an empty file.  A flush waits for the disk, so files that can be written again
    do without it.
    """
    try:
        yield beside
        if is_durable:
            with beside.open("rb") as file:
                os.fsync(file.fileno())
        beside.replace(path)
    except BaseException:
        with suppress(OSError):  # report the first error
            beside.unlink()
        raise
