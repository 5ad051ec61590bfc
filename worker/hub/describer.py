"""Describes models of the hub: a process for each question, which lists a repository and reads headers.

It alone has the network and the token, and what a stranger wrote is parsed there.  It gets the question on stdin and
writes the answer to stdout, both as msgpack.  What it read, it writes into files of the real size that take no more
space than the headers: an engine does dry runs with them.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

import msgspec
from msgspec import Struct, structs

from shared.download import InspectRequest
from shared.errors import ErrorBody, ServiceError, ServiceUnavailable
from shared.schema.model import Model
from shared.schema.snapshot import Described, Quantized
from shared.telemetry import log
from worker.hub import choice, confinement
from worker.hub.choice import RemoteFile
from worker.hub.client import Access, Gone, Hub, Repository
from worker.hub.connection import Unavailable, Unreachable
from worker.hub.headers import found
from worker.sandbox import landlock

AT_ONCE = 2  # processes
WITHIN_S = 50.0
UNREACHABLE_S = 30.0  # a hub that could not be reached is not tried again for an estimate
KEPT_N = 4  # models whose headers are kept
NICENESS = 10

_log = log.get("worker")


class Asked(Struct, frozen=True):
    """What the process is told."""

    access: Access
    request: InspectRequest
    directory: str  # for the headers; the process creates it


class Answer(Struct, frozen=True):
    """What the process answers.  `files`: those with the headers, one for each shard; none if they are not there."""

    described: Described
    files: list[str] = []
    is_unreachable: bool = False  # the hub


# ---- in the worker


class Describer:
    """Answers questions about models of the hub."""

    def __init__(self, access: Access | None, directory: Path) -> None:
        """`access`: None if there is no hub.  `directory`: for headers; what a predecessor left there is removed."""
        shutil.rmtree(directory, ignore_errors=True)
        self._access = access
        self._directory = directory
        self._numbers = count()
        self._known: dict[tuple[object, ...], Model] = {}  # by its source; the latest last
        self._places = asyncio.Semaphore(AT_ONCE)
        self._unreachable: tuple[float, Answer | None] = (0.0, None)  # until when that is the answer

    @property
    def is_on(self) -> bool:
        return self._access is not None

    async def answer(self, question: bytes) -> bytes:
        """Answer an `InspectRequest` with a `Described`, both as msgpack."""
        if self._access is None:
            return _failed(ServiceUnavailable("The worker has no hub.").body())
        request = msgspec.msgpack.decode(question, type=InspectRequest)
        directory = self._directory / str(next(self._numbers))
        answer: Answer | None = None
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                answer = await self._asked(Asked(self._access, request, str(directory)))
        except (OSError, TimeoutError) as e:
            _log.warning("hub not asked", action="hub_not_asked", repository=request.repository, error=str(e))
        if answer is None or not answer.files:
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
        if answer is None:
            return _failed(ServiceUnavailable("The hub did not answer in time.").body())
        if answer.described.model is not None and answer.files:
            await self._keep(answer.described.model, answer.files)
        return msgspec.msgpack.encode(answer.described)

    def of(self, source: Model | None) -> Model | None:
        """Return a model that was described lately, with the files of its headers; None if it is none of these."""
        return None if source is None else self._known.get(_identity(source))

    async def _asked(self, asked: Asked) -> Answer | None:
        """Run the process for a question, unless the hub could not be reached a moment ago.  Raises OSError."""
        until, known = self._unreachable
        if time.monotonic() < until:
            return known
        answer = await _run(asked)
        if answer is not None and answer.is_unreachable:
            self._unreachable = time.monotonic() + UNREACHABLE_S, answer
        return answer

    async def _keep(self, model: Model, files: list[str]) -> None:
        before = self._known.pop(_identity(model), None)
        self._known[_identity(model)] = structs.replace(model, shards=files)
        old = [before] if before is not None else []
        while len(self._known) > KEPT_N:
            old.append(self._known.pop(next(iter(self._known))))
        for one in old:
            await asyncio.to_thread(shutil.rmtree, Path(one.shards[0]).parent, ignore_errors=True)


def _identity(model: Model) -> tuple[object, ...]:
    return (*model.shards, *model.files)


async def _run(asked: Asked) -> Answer | None:
    """Run the process for a question.  Returns None if it fails.  Raises OSError; it is killed and reaped then."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        answer, _ = await child.communicate(msgspec.msgpack.encode(asked))
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    return msgspec.msgpack.decode(answer, type=Answer) if child.returncode == 0 else None


def _failed(error: ErrorBody) -> bytes:
    return msgspec.msgpack.encode(Described(error=error))


# ---- in the process


def main() -> None:
    """Answer one question."""
    os.nice(NICENESS)
    asked = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Asked)
    directory = Path(asked.directory)
    with suppress(OSError):  # without it, there are no dry runs
        directory.mkdir(parents=True, exist_ok=True)
    confinement.restrict(directory, landlock.WRITE)
    hub = Hub(asked.access)
    try:
        answer = answered(hub, asked.request, directory)
    except ServiceError as e:
        answer = Answer(Described(error=e.body()))
    except (Unavailable, Gone) as e:
        error = ServiceUnavailable(str(e) or "The hub no longer has the file.").body()
        answer = Answer(Described(error=error), is_unreachable=isinstance(e, Unreachable))
    finally:
        hub.close()
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


def answered(hub: Hub, request: InspectRequest, directory: Path) -> Answer:
    """Describe a model of the hub.  Raises ServiceError, Unavailable and Gone."""
    repository = hub.repository(request.repository, request.revision)
    files = choice.choose(repository.files, request.quantization)
    offered = [Quantized(one.name, one.size_bytes) for one in choice.quantizations(repository.files)]
    model, heads = found(repository.name, files, _Reader(hub, repository))
    described = Described(model=model, quantizations=offered)
    try:
        return Answer(described, _written(heads, files, directory))
    except OSError:  # no space, or no files with holes
        return Answer(described)


def _written(heads: Sequence[bytes], files: Sequence[RemoteFile], directory: Path) -> list[str]:
    """Write the headers into files of the size of the model's.  Returns their paths."""
    paths = [directory / f"{i:05}.gguf" for i in range(1, len(heads) + 1)]
    for path, head, file in zip(paths, heads, files, strict=False):
        with path.open("wb") as written:
            written.write(head)
            written.truncate(file.size)
    return [*map(str, paths)]


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


if __name__ == "__main__":
    main()
