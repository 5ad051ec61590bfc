"""The files of a models directory: a walk that always ends, opens nothing and does not leave the directory."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from shared.schema.model import FileStat
from worker.catalog.keys import GGUF

OUTSIDE = "is a symbolic link out of the models directory"
NOT_UTF8 = "has a name that is not UTF-8"
MAX_DEPTH = 32  # folders below each other


class Found(NamedTuple):
    """A GGUF file by its name, or, with `is_folder`, a folder whose files cannot be had.

    `refusal`: why it must not be opened, "" if it may be; it continues a sentence that begins with the name.
    """

    path: str  # under the models directory, with slashes
    stat: FileStat = FileStat(0, 0, 0)
    refusal: str = ""
    is_folder: bool = False


def walk(models_dir: Path) -> list[Found]:
    """All GGUF files under `models_dir`, in the order of their paths; hidden files and folders are passed over.

    A link to a file is as good as the file.  A link to a folder is followed unless that folder holds the link,
    and no further link to a folder behind it is, so that there is no way round in circles.  What leads out of the
    directory is found, but refused.  Raises OSError where `models_dir` itself cannot be listed.
    """
    root = os.path.realpath(models_dir)
    with os.scandir(root) as entries:
        found = [one for entry in entries for one in _entry(entry, root, "", linked=False)]
    return sorted((_printable(one) for one in found), key=lambda one: one.path)


def _folder(folder: str, root: str, path: str, *, linked: bool) -> Iterator[Found]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield from _entry(entry, root, path + "/", linked=linked)
    except OSError as e:
        yield Found(path, refusal=f"cannot be read: {e.strerror}", is_folder=True)


def _entry(entry: os.DirEntry[str], root: str, prefix: str, *, linked: bool) -> Iterator[Found]:
    path = prefix + entry.name
    if entry.name.startswith("."):
        return
    is_gguf = entry.name.lower().endswith(GGUF)
    try:
        is_folder = entry.is_dir()
        target = os.path.realpath(entry.path) if entry.is_symlink() else ""
        info = entry.stat() if is_gguf and not is_folder else None
    except OSError as e:  # a link to nothing or to itself, or nobody may look
        if is_gguf:
            yield Found(path, refusal=f"cannot be read: {e.strerror}")
        return
    if target and not _holds(root, target) and (is_folder or is_gguf):
        yield Found(path, refusal=OUTSIDE, is_folder=is_folder)
    elif is_folder and target:
        if not linked and not _holds(target, str(Path(entry.path).parent)):
            yield from _folder(target, root, path, linked=True)
    elif is_folder:
        if path.count("/") < MAX_DEPTH:
            yield from _folder(entry.path, root, path, linked=linked)
    elif info is not None:
        yield Found(path, FileStat.of(info))


def _holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _printable(found: Found) -> Found:
    try:
        found.path.encode()
    except UnicodeEncodeError:
        return found._replace(path=os.fsencode(found.path).decode("utf-8", "replace"), refusal=NOT_UTF8)
    return found
