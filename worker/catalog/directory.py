"""Lists the GGUF files of a models directory.  Always terminates, opens no model, and stays inside the directory."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from shared.schema.model import FileStat
from worker.catalog.keys import GGUF, REPOSITORY, snapshot

OUTSIDE = "is a symbolic link to a path outside the models directory"
NOT_UTF8 = "has a name that is not UTF-8"
MAX_DEPTH = 32  # nested folders
TOO_DEEP = f"is more than {MAX_DEPTH} folders deep, and is not searched"
INTERNAL = frozenset({"blobs", "refs"})  # folders of a repository in Hugging Face's cache; its snapshots link to blobs
REVISION_N = 7  # hexadecimal digits that name a revision, as git shortens them
COMMIT_N = 64  # digits of the longest commit


File = tuple[int, str]  # index of a models directory, and path in it


class Candidate(NamedTuple):
    """A file named `*.gguf` or, if `is_folder`, a folder that cannot be listed or lies outside the models directory.

    `refusal` says why the file must not be opened, "" if it may be opened.  It continues a sentence that begins with
    the file's name.
    """

    path: str  # relative to its models directory, with slashes
    stat: FileStat = FileStat(0, 0, 0)
    refusal: str = ""
    is_folder: bool = False
    revision: str = ""  # of a repository in Hugging Face's cache, unless it is the current one
    root: int = 0  # index of its models directory
    named: str = ""  # in a store of Ollama: the name of its model, "publisher/name/tag" or "name/tag"

    @property
    def name(self) -> str:
        """What a sentence about it begins with."""
        return ":".join(self.named.split("/")[-2:]) or PurePosixPath(self.path).name

    @property
    def file(self) -> File:
        return self.root, self.path


def walk(models_dir: Path) -> list[Candidate]:
    """Return all GGUF files under `models_dir`, sorted by path.  Hidden files and folders are skipped.

    A link to a file is treated like the file.  A link to a folder is followed unless the folder contains the link.
    Below a followed link, further links to folders are not followed, which rules out cycles.  A link to a path outside
    the directory is returned with a refusal.  Raises OSError if `models_dir` itself cannot be listed.
    """
    root = os.path.realpath(models_dir)
    with os.scandir(root) as entries:
        candidates = [_printable(candidate) for entry in entries for candidate in _entry(entry, root, "", linked=False)]
    return _with_revisions(sorted(candidates, key=lambda candidate: candidate.path), Path(root))


def _folder(folder: str, root: str, path: str, *, linked: bool) -> Iterator[Candidate]:
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                yield from _entry(entry, root, path + "/", linked=linked)
    except OSError as e:
        yield Candidate(path, refusal=f"cannot be read: {e.strerror}", is_folder=True)


def _entry(entry: os.DirEntry[str], root: str, prefix: str, *, linked: bool) -> Iterator[Candidate]:
    path = prefix + entry.name
    if entry.name.startswith(".") or (entry.name in INTERNAL and REPOSITORY.fullmatch(PurePosixPath(prefix).name)):
        return
    is_gguf = entry.name.lower().endswith(GGUF)
    try:
        is_folder = entry.is_dir()
        target = os.path.realpath(entry.path) if entry.is_symlink() else ""
        info = entry.stat() if is_gguf and not is_folder else None
    except OSError as e:  # a dangling link, a link to itself, or no permission
        if is_gguf:
            yield Candidate(path, refusal=f"cannot be read: {e.strerror}")
        return
    if target and not holds(root, target) and (is_folder or is_gguf):
        yield Candidate(path, refusal=OUTSIDE, is_folder=is_folder)
    elif is_folder and target:
        if not linked and not holds(target, str(Path(entry.path).parent)):
            yield from _folder(target, root, path, linked=True)
    elif is_folder and path.count("/") >= MAX_DEPTH:
        yield Candidate(path, refusal=TOO_DEEP, is_folder=True)
    elif is_folder:
        yield from _folder(entry.path, root, path, linked=linked)
    elif info is not None:
        yield Candidate(path, FileStat.of(info))


def holds(folder: str, path: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _with_revisions(candidates: Sequence[Candidate], root: Path) -> list[Candidate]:
    """Name the revision of each file in Hugging Face's cache that is not of its repository's current revision."""
    found: list[Candidate] = []
    for repository, group in groupby(candidates, lambda candidate: _revision(candidate)[0]):
        files = [*group]
        revisions = sorted({_revision(file)[1] for file in files})
        current = _current(root / repository / "refs", revisions) if len(revisions) > 1 else revisions[0]
        for file in files:
            revision = _revision(file)[1]
            found.append(file if revision == current else file._replace(revision=revision[:REVISION_N]))
    return found


def _revision(candidate: Candidate) -> tuple[str, str]:
    """Return the folder of a repository in Hugging Face's cache, and a revision; "" twice for other files."""
    folders = PurePosixPath(candidate.path).parts[:-1]
    i = snapshot(folders)
    return ("", "") if i is None else ("/".join(folders[: i - 1]), folders[i])


def _current(refs: Path, revisions: Sequence[str]) -> str:
    """Return the revision that `main` names, else the first one of another reference, else the first one."""
    with suppress(OSError):
        for reference in sorted(refs.iterdir(), key=lambda path: (path.name != "main", path)):
            with suppress(OSError):
                if (commit := read_start(reference, COMMIT_N).decode("ascii", "replace").strip()) in revisions:
                    return commit
    return revisions[0]


def read_start(path: Path, most_bytes: int) -> bytes:
    """Read the start of a regular file, nothing of another one.  Never blocks on a FIFO, and follows no link."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        return os.read(fd, most_bytes) if stat.S_ISREG(os.fstat(fd).st_mode) else b""
    finally:
        os.close(fd)


def _printable(candidate: Candidate) -> Candidate:
    try:
        candidate.path.encode()
    except UnicodeEncodeError:
        return candidate._replace(path=os.fsencode(candidate.path).decode("utf-8", "replace"), refusal=NOT_UTF8)
    return candidate
