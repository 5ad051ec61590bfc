"""A process that talks to the hub for a worker: `python -m worker.hub.process`.

It reads one request from its stdin and writes replies to its stdout, in frames of `shared.framing`.  It exits at the
end of its stdin, so ending it is how a download is paused.  Only this process has the hub's token in use.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import assert_never

from shared import filelock, framing
from shared.download import File, Offer, Plan, Refusal
from shared.errors import DownloadFailed, ServiceError
from worker.hub import confinement, partials
from worker.hub.choice import RemoteFile, choose
from worker.hub.client import Hub
from worker.hub.connection import Unavailable
from worker.hub.partials import free_bytes, pending_bytes, place, reserved_bytes, targets
from worker.hub.protocol import Busy, Describe, Fetch, Finished, Inspect, Progressed, Told, decode_ask
from worker.hub.transfer import Corrupt, Partial, Transfer, discard, opened, table_of
from worker.sandbox import landlock

CONNECTIONS = 4  # more get less from a hub nearby: they write to one file, one after the other
REPORT_S = 0.5
NICENESS = 5

Tell = Callable[[Told], None]


def main() -> None:
    """Answer one request."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the worker, which ends this process
    os.nice(NICENESS)
    data = framing.read_blocking(sys.stdin.buffer)
    if data is None:
        return
    ask = decode_ask(data)
    try:
        match ask:
            case Inspect():
                _begin(ask.root, landlock.READ)
                _tell(inspected(ask))
            case Fetch():
                _begin(ask.root, landlock.TREE)
                _tell(fetched(ask, _tell))
            case Describe():
                with suppress(OSError):  # without it, there are no dry runs
                    Path(ask.directory).mkdir(parents=True, exist_ok=True)
                _begin(ask.directory, landlock.WRITE)
                from worker.hub.description import description  # a third of all imports

                _tell(description(ask))
            case _:
                assert_never(ask)
    except ServiceError as e:
        _tell(Refusal(e.body()))
    except Unavailable as e:
        _tell(Refusal(DownloadFailed("hub_unavailable", str(e)).body()))
    except OSError as e:
        _tell(Refusal(partials.unwritable(e).body()))


def _begin(root: str, rights: int) -> None:
    """Keep the rights to one directory only, and watch for the end."""
    confinement.restrict(root, rights)
    threading.Thread(target=_watch, daemon=True).start()


def _watch() -> None:
    """Exit once the worker is gone, or ends this process."""
    os.read(sys.stdin.fileno(), 1)  # not of its buffer, whose lock would be held when the interpreter ends
    os._exit(0)


_telling = threading.Lock()


def _tell(told: Told) -> None:
    with _telling:
        rest = memoryview(framing.frame(told))
        while rest:
            rest = rest[os.write(sys.stdout.fileno(), rest) :]


# ---- looking


def inspected(ask: Inspect) -> Offer:
    """Find what a download would fetch.  Raises ServiceError, Unavailable and OSError."""
    root, hub = Path(ask.root), Hub(ask.access)
    try:
        found = hub.repository(ask.request.repository, ask.request.revision)
    finally:
        hub.close()
    files = [File(file.path, file.size, file.sha256) for file in choose(found.files, ask.request.quantization)]
    plan = Plan(repository=found.name, commit=found.commit, files=files)
    targets(root, plan)
    is_here = partials.is_here(root, plan)
    free = free_bytes(root)
    if not is_here:
        need, others = plan.total_bytes - reserved_bytes(root, plan), pending_bytes(root, plan)
        if need > free - others:
            raise no_room(need, free, others)
    return Offer(plan=plan, store=ask.store, is_here=is_here, free_bytes=free)


def no_room(need: int, free: int, others: int) -> DownloadFailed:
    beside = f", of which other downloads will take {others:,}" if others else ""
    return DownloadFailed(
        "insufficient_disk",
        f"The download needs {need:,} bytes on the disk of the models directory, which has {max(0, free):,} bytes to "
        f"give{beside}.",
        needed_bytes=need,
        free_bytes=max(0, free),
        other_downloads_bytes=others,
    )


# ---- fetching


def fetched(ask: Fetch, tell: Tell) -> Finished | Busy:
    """Fetch a plan.  Raises ServiceError, Unavailable and OSError."""
    root, plan = Path(ask.root), ask.plan
    paths = targets(root, plan)
    if partials.is_here(root, plan):
        partials.remove(root, plan)
        return Finished()
    folder = partials.folder(root, plan)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with filelock.lock(folder / partials.LOCK):
            _transfer(ask, root, paths, tell)
            place(root, plan)
    except filelock.Held:
        return Busy()
    return Finished()


def _transfer(ask: Fetch, root: Path, paths: list[Path], tell: Tell) -> None:
    plan, hub = ask.plan, Hub(ask.access)
    with ExitStack() as stack:
        stack.callback(hub.close)
        here = sum(file.size for path, file in zip(paths, plan.files, strict=True) if _is_placed(path, file.size))
        parts: list[tuple[int, File, Partial]] = []
        need, free = plan.total_bytes - here - reserved_bytes(root, plan), free_bytes(root)
        if need > free:
            raise no_room(need, free, 0)
        stack.callback(_give_back, root, plan)
        for i, (path, file) in enumerate(zip(paths, plan.files, strict=True)):
            if not _is_placed(path, file.size):
                parts.append((i, file, stack.enter_context(opened(partials.partial(root, plan, i), file.size))))
        ended = threading.Event()
        reporting = stack.enter_context(ThreadPoolExecutor(1))
        stack.callback(ended.set)
        reporting.submit(_report, parts, here, ended, tell)
        for i, file, part in parts:
            remote = RemoteFile(file.path, file.size, file.sha256)
            _fetch(ask, hub, remote, part, partials.partial(root, plan, i))


def _give_back(root: Path, plan: Plan) -> None:
    """Remove the partial files into which nothing came, such as those that a full disk could not hold."""
    for i, file in enumerate(plan.files):
        path = partials.partial(root, plan, i)
        if file.size and not (table_of(path).exists() and table_of(path).stat().st_size):
            discard(path)


def _is_placed(path: Path, size: int) -> bool:
    try:
        return path.stat().st_size == size
    except OSError:
        return False


def _fetch(ask: Fetch, hub: Hub, file: RemoteFile, part: Partial, path: Path) -> None:
    """Fetch one file; once more if a part that came earlier was wrong.  Raises ServiceError and OSError."""

    def transfer(into: Partial) -> None:
        job = Transfer(
            hub, ask.plan.repository, ask.plan.commit, file, connections=CONNECTIONS, patience_s=ask.patience_s
        )
        job.run(into)

    try:
        try:
            transfer(part)
        except Corrupt as e:
            if not e.is_resumed:
                raise
            part.forget()
            transfer(part)
    except Corrupt as e:
        discard(path)
        raise DownloadFailed("checksum_mismatch", str(e)) from None


def _report(parts: list[tuple[int, File, Partial]], here: int, ended: threading.Event, tell: Tell) -> None:
    while not ended.wait(REPORT_S):
        tell(Progressed(here + sum(part.bytes for _, _, part in parts)))


if __name__ == "__main__":
    main()
