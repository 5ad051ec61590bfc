"""Describes a model of which only the headers of its files are read, as the catalog describes one on a disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

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


class Found(NamedTuple):
    """A model, with the reason if it cannot be loaded.  `heads`: the start of each file, up to the data of its tensors;
    none if a header cannot be read."""

    model: Model
    heads: list[bytes]


def found(repository: str, files: Sequence[RemoteFile], read: Read) -> Found:
    """Return the model that consists of these files of a repository.  Raises what `read` raises."""
    left = MOST_BYTES
    headers: dict[tuple[int, str], ModelFile] = {}
    candidates, heads = [], []
    for file in files:
        candidate = Candidate(f"{repository}/{file.path}", FileStat(file.size, 0, 0))
        start = _Start(file, read, left)
        try:
            header = gguf.read_by(start, file.size, STEPS, whole=True)
            headers[candidate.file] = modelfile.describe(header)
            heads.append(start.bytes[: header.data_offset])
        except InvalidGGUF as e:
            headers[candidate.file] = modelfile.unreadable(e)
        left -= len(start.bytes)
        candidates.append(candidate)
    (model,), _ = assemble(candidates, headers)
    return Found(model, heads if len(heads) == len(files) else [])


class _Start:
    """The bytes of a file that were read so far, at most `limit`."""

    def __init__(self, file: RemoteFile, read: Read, limit: int) -> None:
        self.bytes = b""
        self._file, self._read, self._limit = file, read, limit

    def __call__(self, size: int) -> bytes:
        if size > self._limit:
            raise InvalidGGUF("has a header that is too long for an estimate")
        if size > len(self.bytes):
            self.bytes += self._read(self._file, len(self.bytes), size)
        return self.bytes[:size]
