"""Describes a model of the hub for an estimate, without its weights.

What it reads, it writes into files of the real size that take no more space than the headers: an engine does dry runs
with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from shared.errors import ServiceUnavailable
from shared.schema.snapshot import Described, Quantized
from worker.hub import choice
from worker.hub.choice import RemoteFile
from worker.hub.client import Gone, Hub, Repository
from worker.hub.connection import Unavailable, Unreachable
from worker.hub.headers import found
from worker.hub.protocol import Describe, Description


def description(ask: Describe) -> Description:
    """Describe a model of the hub.  Raises ServiceError."""
    hub = Hub(ask.access)
    try:
        return _described(hub, ask)
    except (Unavailable, Gone) as e:
        error = ServiceUnavailable(str(e) or "The hub no longer has the file.").body()
        return Description(Described(error=error), is_unreachable=isinstance(e, Unreachable))
    finally:
        hub.close()


def _described(hub: Hub, ask: Describe) -> Description:
    repository = hub.repository(ask.request.repository, ask.request.revision)
    files = choice.choose(repository.files, ask.request.quantization)
    offered = [Quantized(one.name, one.size_bytes) for one in choice.quantizations(repository.files)]
    model, heads = found(repository.name, files, _Reader(hub, repository))
    described = Described(model=model, quantizations=offered)
    try:
        return Description(described, _written(heads, files, Path(ask.directory)))
    except OSError:  # no space, or no files with holes
        return Description(described)


def _written(heads: Sequence[bytes], files: Sequence[RemoteFile], directory: Path) -> list[str]:
    """Write the headers into files of the size of the model's.  Returns their names."""
    names = [f"{i:05}.gguf" for i in range(1, len(heads) + 1)]
    for name, head, file in zip(names, heads, files, strict=False):
        with (directory / name).open("wb") as written:
            written.write(head)
            written.truncate(file.size)
    return names


class _Reader:
    """Reads parts of the files of a repository."""

    def __init__(self, hub: Hub, repository: Repository) -> None:
        self._hub, self._repository = hub, repository
        self._urls: dict[str, str] = {}

    def __call__(self, file: RemoteFile, start: int, end: int) -> bytes:
        if file.path not in self._urls:
            self._urls[file.path] = self._hub.locate(self._repository.name, self._repository.commit, file.path)
        data = bytearray()
        with self._hub.read(self._urls[file.path], start, end) as answer:
            if answer.size != file.size:
                raise Unavailable(f"The size of '{file.path}' is not the one that the hub lists.")
            for chunk in answer.chunks:
                data += chunk
                if answer.start + len(data) >= end:
                    break
        if answer.start + len(data) < end:
            raise Unavailable(f"The hub ended '{file.path}' too early.")
        return bytes(data[start - answer.start : end - answer.start])
