"""The scanner: a process of its own that watches the models directory and tells the worker what is in it.

Reading headers keeps a Python interpreter busy, which a worker that talks to runners and Redis cannot have in its
own.  `python -m worker.catalog.scanner MODELS_DIR CACHE_FILE` writes each catalog, a `list[Model]`, to its stdout in a
frame of `worker.framing`.  Its stdin carries no data; the scanner ends when its stdin does.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import signal
import sys
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from shared.backoff import Backoff
from shared.schema.model import Model, Problem
from shared.telemetry import log
from worker import framing
from worker.catalog.catalog import Catalog

POLL_S = 1.0  # a stat of 200 files takes a millisecond or two
SLICE_S = 0.5  # of reading whole headers between two looks at the directory
NICENESS = 10
FIRST_PAUSE_S = 0.5  # before a scanner that died is started again; doubles up to LAST_PAUSE_S
LAST_PAUSE_S = 30.0
STABLE_S = 60.0  # a scanner that lived this long gets the first pause again
LAST_WORDS_S = 1.0  # between the end of a scanner's stream and its exit

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

_log = log.get(__name__)
_decode = msgspec.msgpack.Decoder(list[Model]).decode


# ---- in the worker


async def catalogs(
    models_dir: Path, cache_file: Path, *, log_level: LogLevel = "info", log_format: LogFormat = "console"
) -> AsyncGenerator[list[Model], None]:
    """The catalog, at once and whenever it changes, for as long as it is iterated; a dead scanner is started again.

    Equal catalogs may follow each other.  Ends only by being closed or cancelled, and then the scanner is gone and
    reaped when it returns: use it within `contextlib.aclosing`, since a loop that is left does not close it.
    """
    command = [sys.executable, "-m", __name__, str(models_dir), str(cache_file), "--log-level", log_level]
    backoff = Backoff(FIRST_PAUSE_S, LAST_PAUSE_S, STABLE_S)
    while True:
        started = time.monotonic()
        try:
            child = await asyncio.create_subprocess_exec(
                *command, "--log-format", log_format, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
            )
        except OSError as e:
            why = f"it could not be started: {e.strerror}"
        else:
            try:
                while (models := await _next(child)) is not None:
                    yield models
                with suppress(TimeoutError):  # let it end with a status of its own
                    await asyncio.wait_for(child.wait(), LAST_WORDS_S)
            finally:
                await _end(child)
            why = f"exit status {child.returncode}"
        pause_s = backoff.after(time.monotonic() - started)
        _log.error("the scanner ended", action="scanner_ended", reason=why, again_in_s=pause_s)
        await asyncio.sleep(pause_s)


async def _next(child: asyncio.subprocess.Process) -> list[Model] | None:
    """Read the next catalog from a scanner; None when its stream ends or cannot be decoded."""
    assert child.stdout is not None
    data = await framing.read(child.stdout)
    try:
        return None if data is None else _decode(data)
    except msgspec.MsgspecError:
        return None


async def _end(child: asyncio.subprocess.Process) -> None:
    """Kill and reap; the scanner keeps nothing that SIGKILL could damage.

    What it wrote is read to the end, because asyncio closes a pipe only there.
    """
    assert child.stdin is not None
    with suppress(ProcessLookupError):
        child.kill()
    child.stdin.close()
    await child.communicate()


# ---- in the scanner


def main() -> None:
    """Look, publish, read on, until nobody listens any more."""
    arguments = _arguments()
    log.configure(arguments.log_level, arguments.log_format, process="scanner")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C is for the worker, which ends us
    os.nice(NICENESS)
    with suppress(BrokenPipeError):
        _scan(Catalog(arguments.models_dir, arguments.cache_file), Publisher(), Reporter())


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m worker.catalog.scanner", description="Watch a directory of GGUF models."
    )
    parser.add_argument("models_dir", type=Path)
    parser.add_argument("cache_file", type=Path)
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="console")
    return parser.parse_args()


def _scan(catalog: Catalog, publisher: Publisher, reporter: Reporter) -> None:
    while True:
        try:
            changed = catalog.look()
        except OSError as e:
            changed = True
            reporter.directory(e.strerror)
        else:
            reporter.directory(None)
        if changed or not publisher.has_published:
            _tell(catalog, publisher, reporter)
        if _worker_is_gone(0 if catalog.is_shallow else POLL_S):
            return
        if catalog.is_shallow:
            catalog.deepen(SLICE_S)
            _tell(catalog, publisher, reporter)


def _tell(catalog: Catalog, publisher: Publisher, reporter: Reporter) -> None:
    """Save first: what was told once, the next scanner knows at once."""
    try:
        catalog.save()
    except OSError as e:
        reporter.cache(e.strerror)
    else:
        reporter.cache(None)
    models = catalog.models()
    publisher.publish(models)
    reporter.models(models)


def _worker_is_gone(wait_s: float) -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


class Publisher:
    """Writes catalogs that differ from the one before."""

    def __init__(self) -> None:
        self._last: list[Model] | None = None

    @property
    def has_published(self) -> bool:
        return self._last is not None

    def publish(self, models: list[Model]) -> None:
        if models == self._last:
            return
        self._last = models
        rest = memoryview(framing.frame(models))
        while rest:  # without a buffer that the interpreter would flush once more when nobody listens
            rest = rest[os.write(sys.stdout.fileno(), rest) :]


class Reporter:
    """Logs what cannot be read: once, and again when the reason changes."""

    def __init__(self) -> None:
        self._problems: dict[str, Problem] = {}
        self._directory: str | None = None
        self._cache: str | None = None

    def models(self, models: list[Model]) -> None:
        problems: dict[str, Problem] = {}
        for model in models:
            if (problem := model.problem) is None:
                continue
            problems[model.shards[0]] = problem
            if self._problems.get(model.shards[0]) != problem:
                write = _log.warning if problem.code == "invalid_model_file" else _log.info
                facts = {"model": model.key, "file": model.shards[0], "reason": problem.message}
                write("a file is no usable model", action="unreadable_model", **facts)
        self._problems = problems

    def directory(self, reason: str | None) -> None:
        if reason and reason != self._directory:
            _log.warning("the models directory cannot be listed", action="unreadable_models_dir", reason=reason)
        self._directory = reason

    def cache(self, reason: str | None) -> None:
        if reason and reason != self._cache:
            _log.warning("the catalog's cache cannot be written", action="unwritable_catalog_cache", reason=reason)
        self._cache = reason


if __name__ == "__main__":
    main()
