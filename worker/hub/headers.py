"""Describes a model of which only the headers of its files are read, as the catalog describes one on a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shared.schema.model import FileStat, Model
from worker.catalog import gguf, modelfile
from worker.catalog.catalog import assemble
from worker.catalog.directory import Candidate
from worker.catalog.gguf import InvalidGGUF
from worker.catalog.modelfile import ModelFile
from worker.hub.choice import RemoteFile

STEPS = (256 << 10, 2 << 20, 8 << 20, 32 << 20, 128 << 20)  # bytes; the largest known vocabularies take 16 MiB
MOST_BYTES = 256 << 20  # of the headers of all shards

Read = Callable[[RemoteFile, int, int], bytes]  # the bytes of a file from a position to another


def described(repository: str, files: Sequence[RemoteFile], read: Read) -> Model:
    """Return the model that consists of these files of a repository, with the reason if it cannot be loaded.

    Raises what `read` raises.
    """
    left = MOST_BYTES
    headers: dict[tuple[int, str], ModelFile] = {}
    candidates = []
    for file in files:
        candidate = Candidate(f"{repository}/{file.path}", FileStat(file.size, 0, 0))
        start = _Start(file, read, left)
        headers[candidate.file] = _described(start)
        left -= len(start.bytes)
        candidates.append(candidate)
    (model,), _ = assemble(candidates, headers)
    return model


class _Start:
    """The bytes of a file that were read so far, at most `limit`."""

    def __init__(self, file: RemoteFile, read: Read, limit: int) -> None:
        self.bytes = b""
        self.file = file
        self._read, self._limit = read, limit

    def __call__(self, size: int) -> bytes:
        if size > self._limit:
            raise InvalidGGUF("has a header that is too long for an estimate")
        if size > len(self.bytes):
            self.bytes += self._read(self.file, len(self.bytes), size)
        return self.bytes[:size]


def _described(start: _Start) -> ModelFile:
    try:
        return modelfile.describe(gguf.read_by(start, start.file.size, STEPS, whole=True))
    except InvalidGGUF as e:
        return modelfile.unreadable(e)
