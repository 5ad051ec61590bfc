"""The scanner as a real process: published catalogs, restarts, and its end with the worker."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import worker.catalog.scanner
from shared import framing
from shared.schema.model import Model
from tests.support.headers import vocabulary, write
from tests.support.service import processes
from worker.catalog.catalog import Listed
from worker.catalog.scanner import FIRST_PAUSE_S, LAST_PAUSE_S, STABLE_S, catalogs

DEADLINE_S = 60.0


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def children() -> list[int]:
    """Return the PIDs of the scanners that this process started."""
    return [one.pid for one in processes() if one.parent == os.getpid() and "worker.catalog.scanner" in one.words]


def watch(root: Path) -> AsyncGenerator[Listed, None]:
    return catalogs([root], root.parent / "data" / "cache")


async def until(stream: AsyncGenerator[Listed, None], is_expected: Callable[[list[Model]], object]) -> list[Model]:
    """Return the first catalog that meets the condition."""
    async with asyncio.timeout(DEADLINE_S):
        async for listed in stream:
            if is_expected(listed.models):
                return listed.models
    raise AssertionError("the stream ended")


def keys(models: list[Model]) -> list[str]:
    return [model.key for model in models]


async def test_a_quick_catalog_comes_first_and_a_complete_one_later(root: Path) -> None:
    write(root / "p/m/m-Q8_0.gguf", vocabulary(5000))
    async with aclosing(watch(root)) as stream:
        first = await until(stream, lambda models: True)
        assert keys(first) == ["p/m"]
        assert (first[0].max_context_length, first[0].bits_per_weight) == (4096, None)
        whole = await until(stream, lambda models: models[0].bits_per_weight)
        assert (whole[0].bits_per_weight, whole[0].params_string) == (32.0, "2K")
    async with aclosing(watch(root)) as stream:
        assert await until(stream, lambda models: True) == whole, "the cache has the complete catalog"


async def test_new_changed_and_removed_files_are_noticed(root: Path) -> None:
    async with aclosing(watch(root)) as stream:
        assert await until(stream, lambda models: True) == []
        path = write(root / "p/m/m.gguf")
        await until(stream, lambda models: keys(models) == ["p/m"])
        write(path, {"llama.context_length": 1})
        await until(stream, lambda models: models[0].max_context_length == 1)
        path.unlink()
        await until(stream, lambda models: models == [])


async def test_a_models_directory_may_be_created_later(root: Path) -> None:
    async with aclosing(watch(root / "later")) as stream:
        assert await until(stream, lambda models: True) == []
        write(root / "later/m.gguf")
        await until(stream, lambda models: keys(models) == ["m"])


async def test_many_large_models_are_listed_before_they_are_read(root: Path) -> None:
    """Reading them takes seven seconds, too long for the start of a worker."""
    one = write(root.parent / "one", vocabulary(150_000))
    for i in range(200):
        (root / f"p{i}").mkdir()
        os.link(one, root / f"p{i}" / "m-Q4_0.gguf")
    async with aclosing(watch(root)) as stream:
        models = await until(stream, lambda models: True)
    assert len(models) == 200
    assert all(model.max_context_length == 4096 and model.problem is None for model in models)
    assert {model.bits_per_weight for model in models} == {None}


async def test_a_killed_scanner_is_restarted(root: Path) -> None:
    async with aclosing(watch(root)) as stream:
        await until(stream, lambda models: True)
        (pid,) = children()
        os.kill(pid, signal.SIGKILL)
        write(root / "m.gguf")
        await until(stream, lambda models: keys(models) == ["m"])
        assert children() != [pid]


async def test_restarts_of_a_failing_scanner_back_off(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight runs end at once, one is stable, and two more end at once."""
    runs_s, pauses_s = iter([*[0.0] * 8, STABLE_S + 1, 0.0, 0.0]), list[float]()
    now = 1000.0

    async def start(*words: str, **options: object) -> None:
        nonlocal now
        now += next(runs_s)
        raise OSError(errno.EAGAIN, "no process can be started")

    async def sleep(seconds: float) -> None:
        pauses_s.append(seconds)
        if len(pauses_s) == 11:
            raise asyncio.CancelledError

    monkeypatch.setattr(worker.catalog.scanner, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(asyncio, "create_subprocess_exec", start)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    with pytest.raises(asyncio.CancelledError):
        await anext(watch(root))
    assert pauses_s == [0.5, 1, 2, 4, 8, 16, LAST_PAUSE_S, LAST_PAUSE_S, FIRST_PAUSE_S, 1, 2]


async def test_a_cancelled_worker_ends_its_scanner(root: Path) -> None:
    seen = asyncio.Event()

    async def work() -> None:
        async with aclosing(watch(root)) as stream:
            async for _ in stream:
                seen.set()

    task = asyncio.create_task(work())
    await asyncio.wait_for(seen.wait(), DEADLINE_S)
    assert len(children()) == 1
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await asyncio.wait_for(task, DEADLINE_S)
    assert children() == []


async def test_a_scanner_blocked_in_a_write_ends_with_its_worker(root: Path) -> None:
    """The catalog is larger than a pipe and the buffer of asyncio, so that the scanner blocks in a write."""
    one = write(root.parent / "one", {"general.description": "x" * 2000})
    for i in range(300):
        (root / f"p{i}").mkdir()
        os.link(one, root / f"p{i}" / "m.gguf")
    stream = watch(root)
    async with aclosing(stream):
        await until(stream, lambda models: True)


# ---- the scanner process alone


@pytest.fixture
def scanner(root: Path) -> Iterator[subprocess.Popen[bytes]]:
    (root.parent / "second").mkdir()
    command = [
        sys.executable,
        "-m",
        "worker.catalog.scanner",
        str(root.parent / "cache"),
        str(root),
        str(root.parent / "second"),
        "--log-format",
        "json",
    ]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        yield process
        process.kill()


def frame(scanner: subprocess.Popen[bytes]) -> list[Model]:
    assert scanner.stdout is not None
    data = framing.read_blocking(scanner.stdout)
    assert data is not None
    return msgspec.msgpack.decode(data, type=Listed).models


def test_a_scanner_has_low_priority_and_ignores_interrupts(scanner: subprocess.Popen[bytes], root: Path) -> None:
    frame(scanner)
    assert os.getpriority(os.PRIO_PROCESS, scanner.pid) >= 10
    scanner.send_signal(signal.SIGINT)
    write(root / "m.gguf")
    assert keys(frame(scanner)) == ["m"]


def test_a_scanner_exits_when_its_worker_has_died(scanner: subprocess.Popen[bytes]) -> None:
    frame(scanner)
    assert scanner.stdin is not None
    scanner.stdin.close()
    assert scanner.wait(DEADLINE_S) == 0


def test_a_scanner_exits_silently_when_its_output_is_closed(scanner: subprocess.Popen[bytes], root: Path) -> None:
    frame(scanner)
    assert scanner.stdout is not None
    assert scanner.stderr is not None
    scanner.stdout.close()
    write(root / "m.gguf")
    assert scanner.wait(DEADLINE_S) == 0
    assert scanner.stderr.read() == b""


def test_an_unreadable_file_is_logged_once_for_each_reason(scanner: subprocess.Popen[bytes], root: Path) -> None:
    frame(scanner)
    (root / "bad.gguf").write_bytes(b"")
    assert frame(scanner)[0].problem is not None
    write(root / "good.gguf")
    while [model.bits_per_weight for model in frame(scanner)] != [None, 32.0]:
        pass
    (root / "bad.gguf").write_bytes(b"GGUF")
    frame(scanner)
    assert scanner.stdin is not None
    assert scanner.stderr is not None
    scanner.stdin.close()
    lines = [json.loads(line) for line in scanner.stderr]
    assert [(line["action"], line["file"], line["reason"]) for line in lines] == [
        ("unreadable_model", "bad.gguf", "bad.gguf is empty"),
        (
            "unreadable_model",
            "bad.gguf",
            "bad.gguf ends within its header: it is damaged, or its download is incomplete",
        ),
    ]


def test_hidden_models_and_absent_directories_are_logged(scanner: subprocess.Popen[bytes], root: Path) -> None:
    write(root / "p/m/m-Q4_0.gguf")
    write(root.parent / "second/p/m/m-Q4_0.gguf")
    write(root.parent / "second/p/m/m-Q8_0.gguf")
    while keys(frame(scanner)) != ["p/m@q4_0", "p/m@q8_0"]:
        pass
    (root.parent / "second").rename(root.parent / "away")
    while keys(frame(scanner)) != ["p/m"]:
        pass
    assert scanner.stdin is not None
    assert scanner.stderr is not None
    scanner.stdin.close()
    lines = [json.loads(line) for line in scanner.stderr]
    assert [line["file"] for line in lines if line["action"] == "hidden_model"] == ["p/m/m-Q4_0.gguf"]
    (directory,) = [line["directory"] for line in lines if line["action"] == "unreadable_models_dir"]
    assert directory == str(root.parent / "second")
