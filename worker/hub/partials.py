"""The partial files of downloads in a models directory, and how they get into their place."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import msgspec

from shared.download import Download, Plan, is_path, is_repository
from shared.errors import DownloadFailed
from shared.files import replace_atomically

FOLDER = ".loadstone-downloads"  # hidden from the catalog
RECORD = "record"
LOCK = "lock"
MOST_KEPT_FREE_BYTES, KEPT_FREE_PART = 1 << 30, 20
MOST_RECORD_BYTES = 1 << 20

_decode = msgspec.msgpack.Decoder(Download).decode


def folder(root: Path, plan: Plan) -> Path:
    """Return the folder of a download.  The names in the plan are no part of its path."""
    return root / FOLDER / plan.digest


def partial(root: Path, plan: Plan, number: int) -> Path:
    return folder(root, plan) / str(number)


def targets(root: Path, plan: Plan) -> list[Path]:
    """Return the place of each file.  Raises DownloadFailed for names that could be something else than a path."""
    if not is_repository(plan.repository):
        raise DownloadFailed("invalid_hub_reply", "The name of the repository cannot be that of a folder.")
    for file in plan.files:
        if not is_path(file.path):
            raise DownloadFailed("invalid_hub_reply", f"{file.path[:200]!r} cannot be the path of a model file.")
    return [root / plan.repository / file.path for file in plan.files]


def is_here(root: Path, plan: Plan) -> bool:
    """Return whether all files are in their place."""
    return all(_size(path) == file.size for path, file in zip(targets(root, plan), plan.files, strict=True))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1


def free_bytes(root: Path) -> int:
    """Return how much may be written: without what is kept free and what other downloads still need."""
    stat = os.statvfs(root)
    kept = min(MOST_KEPT_FREE_BYTES, stat.f_blocks * stat.f_frsize // KEPT_FREE_PART)
    return stat.f_bavail * stat.f_frsize - kept


def reserved_bytes(root: Path, plan: Plan) -> int:
    """Return how much of the disk the partial files of a plan have."""
    total = 0
    for i in range(len(plan.files)):
        with suppress(OSError):
            total += partial(root, plan, i).stat().st_blocks * 512
    return total


def pending_bytes(root: Path, beside: Plan) -> int:
    """Return how much the other downloads into a directory will still take."""
    others = [one for one in records(root) if one.plan.digest != beside.digest]
    return sum(max(0, one.plan.total_bytes - reserved_bytes(root, one.plan)) for one in others)


def write(root: Path, record: Download) -> None:
    """Keep the record of a download beside its partial files.  Raises OSError."""
    path = folder(root, record.plan)
    path.mkdir(parents=True, exist_ok=True)
    replace_atomically(path / RECORD, msgspec.msgpack.encode(record))


def records(root: Path) -> Iterator[Download]:
    """Yield the records that are kept in a models directory."""
    for path in (root / FOLDER).glob(f"*/{RECORD}"):
        with suppress(OSError, msgspec.MsgspecError):
            if path.stat().st_size <= MOST_RECORD_BYTES:
                yield _decode(path.read_bytes())


def place(root: Path, plan: Plan) -> None:
    """Move the complete files into their place.  Raises OSError and DownloadFailed.

    The first of several shards comes last: until then the model lacks a file and is not listed.
    """
    paths = targets(root, plan)
    real = Path(os.path.realpath(root))
    for number, path in reversed([*enumerate(paths)]):
        if not partial(root, plan, number).exists():
            continue  # it is in its place already
        if not Path(os.path.realpath(path.parent)).is_relative_to(real):
            raise DownloadFailed("store_error", "A folder of the model is a link to a path outside the directory.")
        path.parent.mkdir(parents=True, exist_ok=True)
        partial(root, plan, number).replace(path)
        _sync(path.parent)
    remove(root, plan)


def unwritable(error: OSError) -> DownloadFailed:
    """Return what it means for a download that its directory cannot be written."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DownloadFailed("insufficient_disk", "The disk of the models directory is full.")
    return DownloadFailed("store_error", f"The models directory cannot be written: {error.strerror or error}.")


def remove(root: Path, plan: Plan) -> None:
    """Remove the partial files of a plan."""
    shutil.rmtree(folder(root, plan), ignore_errors=True)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
