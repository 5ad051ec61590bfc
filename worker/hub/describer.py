"""Describes models of the hub: a process for each question, which lists a repository and reads headers.

It alone has the network and the token, and what a stranger wrote is parsed there.  It gets the question on stdin and
writes a `Described` to stdout; both are msgpack.
"""

from __future__ import annotations

import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
from msgspec import Struct

from shared import libc
from shared.errors import ErrorBody, ServiceError, ServiceUnavailable
from shared.schema.snapshot import Described, Describing, Offer
from shared.settings import Settings
from shared.telemetry import log
from worker.hub import choice
from worker.hub.choice import RemoteFile
from worker.hub.client import Access, Gone, Hub, Repository, Unavailable
from worker.hub.headers import described
from worker.sandbox import landlock

AT_ONCE = 2  # processes
WITHIN_S = 50.0
NICENESS = 10
SYSTEM = ("/usr", "/lib", "/lib64", "/proc", "/etc", "/run")  # libraries, and how names are resolved
MAIN = "main"  # the revision

_log = log.get("worker")


class Asked(Struct, frozen=True):
    """What the process is told."""

    access: Access
    describing: Describing


# ---- in the worker


class Describer:
    """Answers questions about models of the hub."""

    def __init__(self, access: Access | None) -> None:
        """`access`: None if there is no hub."""
        self._access = access
        self._places = asyncio.Semaphore(AT_ONCE)

    @property
    def is_on(self) -> bool:
        return self._access is not None

    async def answer(self, question: bytes) -> bytes:
        """Answer a `Describing` with a `Described`, both as msgpack."""
        if self._access is None:
            return _failed(ServiceUnavailable("The worker has no hub.").body())
        asked = Asked(self._access, msgspec.msgpack.decode(question, type=Describing))
        try:
            async with asyncio.timeout(WITHIN_S), self._places:
                answer = await _run(msgspec.msgpack.encode(asked))
        except (OSError, TimeoutError):
            answer = b""
        if not answer:
            _log.warning("the hub was not asked", action="hub_not_asked", repository=asked.describing.repository)
            return _failed(ServiceUnavailable("The hub did not answer in time.").body())
        return answer


async def _run(asked: bytes) -> bytes:
    """Run the process for a question.  Returns nothing if it fails.  Raises OSError; it is killed and reaped then."""
    child = await asyncio.create_subprocess_exec(
        sys.executable, "-m", __name__, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    try:
        answer, _ = await child.communicate(asked)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        await child.wait()
    return answer if child.returncode == 0 else b""


def _failed(error: ErrorBody) -> bytes:
    return msgspec.msgpack.encode(Described(error=error))


def access(settings: Settings) -> Access | None:
    """Return how to reach the hub; None if there is none."""
    if settings.hub == "off":
        return None
    hosts = tuple(host for host in settings.hub_hosts.split(",") if host)
    return Access(endpoint=settings.hub, token=settings.hub_token, hosts=hosts)


# ---- in the process


def main() -> None:
    """Answer one question."""
    os.nice(NICENESS)
    asked = msgspec.msgpack.decode(sys.stdin.buffer.read(), type=Asked)
    hub = Hub(asked.access)  # reads the certificates
    _restrict()
    try:
        answer = answered(hub, asked.describing)
    except ServiceError as e:
        answer = Described(error=e.body())
    except (Unavailable, Gone) as e:
        answer = Described(error=ServiceUnavailable(str(e) or "The hub no longer has the file.").body())
    finally:
        hub.close()
    sys.stdout.buffer.write(msgspec.msgpack.encode(answer))


def _restrict() -> None:
    """Keep this process from files of anybody, and from other processes.  It may reach the network."""
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    code = Path(__file__).parents[1]
    readable = (*SYSTEM, sys.prefix, sys.base_prefix, code, code.with_name("shared"))
    landlock.restrict_thread([(path, landlock.READ) for path in readable], with_network=True)


def answered(hub: Hub, describing: Describing) -> Described:
    """Describe a model of the hub.  Raises ServiceError and Unavailable."""
    repository = hub.repository(describing.repository, MAIN)
    files = choice.choose(repository.files, describing.quantization)
    offers = [Offer(one.name, one.size_bytes) for one in choice.quantizations(repository.files)]
    return Described(model=described(repository.name, files, _Reader(hub, repository)), offers=offers)


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
