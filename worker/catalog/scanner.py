"""The scanner: a separate process that watches the models directories and sends the catalog to the worker.

Reading headers keeps a Python interpreter busy and would delay a worker's traffic with runners and Redis.
`python -m worker.catalog.scanner CACHE_FILE MODELS_DIR...` writes each catalog, a `Listed`, to its stdout in a frame of
`shared.framing`.  Its stdin carries no data; the scanner exits at the end of its stdin.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import select
import signal
import sys
import time
from collections.abc import AsyncGenerator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Literal

import msgspec

from shared import framing, libc
from shared.backoff import Backoff
from shared.schema.model import Model, Problem
from shared.telemetry import log
from worker.catalog.catalog import Catalog, Listed
from worker.sandbox import landlock, seccomp

POLL_S = 1.0  # a stat of 200 files takes a millisecond or two
SLICE_S = 0.5  # for reading whole headers between two scans of the directory
NICENESS = 10
FIRST_PAUSE_S = 0.5  # before a scanner that died is started again; doubles up to LAST_PAUSE_S
LAST_PAUSE_S = 30.0
STABLE_S = 60.0  # a scanner that ran this long resets the pause
LAST_WORDS_S = 1.0  # between the end of a scanner's stream and its exit

LogLevel = Literal["debug", "info", "warning", "error"]
LogFormat = Literal["console", "json"]

_log = log.get(__name__)
_decode = msgspec.msgpack.Decoder(Listed).decode


# ---- in the worker


async def catalogs(
    roots: Sequence[Path], cache_file: Path, *, log_level: LogLevel = "info", log_format: LogFormat = "console"
) -> AsyncGenerator[Listed, None]:
    """Yield the catalog at once and whenever it changes.  Restarts the scanner if it exits.

    May yield the same catalog twice in a row.  Ends only when closed or cancelled; the scanner is reaped by then.  Use
    it within `contextlib.aclosing`, since leaving an `async for` loop does not close it.
    """
    command = [sys.executable, "-m", __name__, "--log-level", log_level, str(cache_file), *map(str, roots)]
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
                while (listed := await _next(child)) is not None:
                    yield listed
                with suppress(TimeoutError):  # an exit status of its own explains more than SIGKILL
                    await asyncio.wait_for(child.wait(), LAST_WORDS_S)
            finally:
                await _end(child)
            why = f"exit status {child.returncode}"
        pause_s = backoff.after(time.monotonic() - started)
        _log.error("scanner exited", action="scanner_ended", reason=why, again_in_s=pause_s)
        await asyncio.sleep(pause_s)


async def _next(child: asyncio.subprocess.Process) -> Listed | None:
    """Read the next catalog from a scanner.  Returns None if its stream ends or cannot be decoded."""
    assert child.stdout is not None
    data = await framing.read(child.stdout)
    try:
        return None if data is None else _decode(data)
    except msgspec.MsgspecError:
        return None


async def _end(child: asyncio.subprocess.Process) -> None:
    """Kill and reap a scanner, which has no state that SIGKILL could damage.

    Reads its output to the end, because asyncio closes a pipe only there.
    """
    assert child.stdin is not None
    with suppress(ProcessLookupError):
        child.kill()
    child.stdin.close()
    await child.communicate()


# ---- in the scanner


def main() -> None:
    """Scan and publish until the worker is gone."""
    arguments = _arguments()
    log.configure(arguments.log_level, arguments.log_format, process="scanner")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's Ctrl-C goes to the worker, which stops the scanner
    os.nice(NICENESS)
    _restrict(arguments.cache_file.parent)
    with suppress(BrokenPipeError):
        _scan(Catalog(arguments.roots, arguments.cache_file), Publisher(), Reporter())


def _restrict(cache: Path) -> None:
    """Keep this process from the network, other processes, and all writes but those to the directory of the cache."""
    with suppress(OSError):  # reported when the cache is written
        cache.mkdir(parents=True, exist_ok=True)
    libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
    landlock.restrict_thread([("/", landlock.READ), (cache, landlock.WRITE)])
    seccomp.outside()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m worker.catalog.scanner", description="Watch directories of GGUF models."
    )
    parser.add_argument("cache_file", type=Path)
    parser.add_argument("roots", type=Path, nargs="+")
    parser.add_argument("--log-level", default="info")
    parser.add_argument("--log-format", default="console")
    return parser.parse_args()


def _scan(catalog: Catalog, publisher: Publisher, reporter: Reporter) -> None:
    while True:
        changed = catalog.look()
        reporter.directories(catalog.unlistable)
        if changed or not publisher.has_published:
            _publish(catalog, publisher, reporter)
        if _worker_is_gone(0 if catalog.is_shallow else POLL_S):
            return
        if catalog.is_shallow:
            catalog.deepen(SLICE_S)
            _publish(catalog, publisher, reporter)


def _publish(catalog: Catalog, publisher: Publisher, reporter: Reporter) -> None:
    """Save the cache, then publish: the next scanner starts with everything that was published."""
    try:
        catalog.save()
    except OSError as e:
        reporter.cache(e.strerror)
    else:
        reporter.cache(None)
    listed = catalog.listed()
    publisher.publish(listed)
    reporter.models(listed.models)
    reporter.hidden(listed.hidden)
    reporter.settings(listed.problems)


def _worker_is_gone(wait_s: float) -> bool:
    readable, _, _ = select.select([sys.stdin], [], [], wait_s)
    return bool(readable) and not os.read(sys.stdin.fileno(), 1)


class Publisher:
    """Writes a catalog to stdout if it differs from the last one."""

    def __init__(self) -> None:
        self._last: Listed | None = None

    @property
    def has_published(self) -> bool:
        return self._last is not None

    def publish(self, listed: Listed) -> None:
        if listed == self._last:
            return
        self._last = listed
        rest = memoryview(framing.frame(listed))
        while rest:  # unbuffered: at exit the interpreter would flush a buffer into a closed pipe
            rest = rest[os.write(sys.stdout.fileno(), rest) :]


class Reporter:
    """Logs each read error once, and again when its reason changes."""

    def __init__(self) -> None:
        self._problems = set[tuple[int, str, Problem]]()
        self._settings: list[str] = []
        self._directories: dict[Path, str] = {}
        self._hidden = set[tuple[int, str]]()
        self._cache: str | None = None

    def models(self, models: list[Model]) -> None:
        problems = set[tuple[int, str, Problem]]()
        for model in models:
            if (problem := model.problem) is None:
                continue
            problems.add((model.root, model.shards[0], problem))
            if (model.root, model.shards[0], problem) not in self._problems:
                write = _log.warning if problem.code == "invalid_model_file" else _log.info
                facts = {"model": model.key, "file": model.shards[0], "reason": problem.message}
                write("file is not a usable model", action="unreadable_model", **facts)
        self._problems = problems

    def settings(self, problems: list[str]) -> None:
        for problem in problems:
            if problem not in self._settings:
                _log.error("settings of models are wrong", action="wrong_model_settings", reason=problem)
        self._settings = problems

    def hidden(self, models: list[Model]) -> None:
        for model in models:
            if (model.root, model.shards[0]) not in self._hidden:
                facts = {"model": model.key, "file": model.shards[0]}
                _log.info("an earlier models directory has the same model", action="hidden_model", **facts)
        self._hidden = {(model.root, model.shards[0]) for model in models}

    def directories(self, reasons: Mapping[Path, str]) -> None:
        for path, reason in reasons.items():
            if reason != self._directories.get(path):
                facts = {"directory": str(path), "reason": reason}
                _log.warning("models directory cannot be listed", action="unreadable_models_dir", **facts)
        self._directories = {**reasons}

    def cache(self, reason: str | None) -> None:
        if reason and reason != self._cache:
            _log.warning("catalog cache cannot be written", action="unwritable_catalog_cache", reason=reason)
        self._cache = reason


if __name__ == "__main__":
    main()
