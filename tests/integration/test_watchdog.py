"""The watchdog replaces processes that stop beating: small children, and the real worker and API."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import pytest

from cli import listener, up
from cli.supervisor import PIPE_BYTES, Command, Supervisor
from shared.heartbeat import heartbeat
from shared.settings import Settings
from tests.integration.test_supervisor import SLEEP, command, is_gone, pids, started, wait_gone
from tests.support.service import Process, RedisServer, below, open_files, until
from tests.support.service import wait_gone as wait_all_gone

SILENCE_S = 1.0  # twenty beats
BEAT = """
import time
fd = int(sys.argv[sys.argv.index('--beat-fd') + 1])
beat = lambda: (os.write(fd, b'.'), time.sleep(0.05))"""
BEATING = f"{BEAT}\nwhile True: beat()"
BEATING_ONCE = f"{BEAT}\nbeat(); time.sleep(60)"
LEAVING_SLOWLY = f"""
import signal
signal.signal(signal.SIGTERM, lambda *_: (time.sleep({3 * SILENCE_S}), open(sys.argv[1] + '.left', 'w'), sys.exit(0)))
{BEATING}"""


def watched(base: Command, silence_s: float = SILENCE_S) -> Command:
    return msgspec.structs.replace(base, watchdog_s=silence_s)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pids"


async def test_a_silent_child_is_killed_and_restarted(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(watched(command(file, BEATING_ONCE)))
        await supervisor.until(started(file, 1), "The child")
        began = time.monotonic()
        await supervisor.until(started(file, 2), "The child again")
        assert time.monotonic() - began > SILENCE_S
        assert is_gone(pids(file)[0])


async def test_the_process_group_of_a_silent_child_is_killed(file: Path) -> None:
    grandchild = (
        "\nimport subprocess; print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1] + '.grand', 'a'))"
    )
    async with Supervisor() as supervisor:
        supervisor.start(watched(command(file, grandchild + BEATING_ONCE)))
        await supervisor.until(started(file, 2), "The child again")
        first = pids(file.with_suffix(".grand"))[0]
        assert await asyncio.to_thread(wait_gone, first, 60)


@pytest.mark.parametrize("code", [BEATING, SLEEP], ids=["beating", "not yet beating"])
async def test_a_child_is_not_replaced_without_silence(file: Path, code: str) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(watched(command(file, code)))
        await supervisor.until(started(file, 1), "The child")
        await asyncio.sleep(3 * SILENCE_S)
        assert len(pids(file)) == 1
        assert not is_gone(pids(file)[0])


async def test_a_stopping_child_need_not_beat(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(watched(command(file, BEAT + LEAVING_SLOWLY)))
        await supervisor.until(started(file, 1), "The child")
        await asyncio.sleep(SILENCE_S)
    assert file.with_suffix(".left").exists()


async def test_a_pause_of_all_processes_is_not_silence(file: Path) -> None:
    """In a frozen container the supervisor stands still too."""
    async with Supervisor() as supervisor:
        supervisor.start(watched(command(file, BEATING)))
        await supervisor.until(started(file, 1), "The child")
        await asyncio.sleep(SILENCE_S)
        (pid,) = pids(file)
        os.kill(pid, signal.SIGSTOP)
        time.sleep(3 * SILENCE_S)  # noqa: ASYNC251
        os.kill(pid, signal.SIGCONT)
        await asyncio.sleep(3 * SILENCE_S)
        assert pids(file) == [pid]
        assert not is_gone(pid)


async def test_a_child_without_a_watchdog_gets_no_beat_fd(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(command(file, "print(*sys.argv, file=open(sys.argv[1] + '.argv', 'w'), flush=True); " + SLEEP))
        await supervisor.until(started(file, 1), "The child")
        argv_file = file.with_suffix(".argv")
        await asyncio.to_thread(
            until, lambda: argv_file.exists() and argv_file.read_text().strip(), "the arguments of the child"
        )
    assert "--beat-fd" not in argv_file.read_text()


def test_a_beat_never_blocks_and_never_fails() -> None:
    ours, theirs = os.pipe()
    try:
        os.set_inheritable(theirs, True)
        beat = heartbeat(theirs)
        assert not os.get_inheritable(theirs)
        for _ in range(PIPE_BYTES + 1):
            beat()
        assert len(os.read(ours, 2 * PIPE_BYTES)) == PIPE_BYTES
    finally:
        os.close(ours)
    beat()
    os.close(theirs)
    heartbeat(None)()


# ---- the real processes

REAL_SILENCE_S = 3.0  # the processes beat once a second


@pytest.fixture
def redis(tmp_path: Path) -> Iterator[RedisServer]:
    server = RedisServer(tmp_path / "redis")
    yield server
    server.kill()


@pytest.fixture
def settings(tmp_path: Path, redis: RedisServer) -> Settings:
    return Settings(
        redis_url=redis.url, models_dir=tmp_path, data_dir=tmp_path / "data", worker_name="w", port=0, lease_s=3.0
    )


def child(name: str) -> Process:
    """Return the child of this process that runs `python -m NAME`."""
    return until(lambda: next((p for p in below(os.getpid()) if p.words[2:4] == ("-m", name)), None), name)


def holders(pipe: str) -> list[Process]:
    """Return the descendants of this process that have this pipe open."""
    descendants = []
    for process in below(os.getpid()):
        with suppress(FileNotFoundError, ProcessLookupError):
            if pipe in open_files(process.pid):
                descendants.append(process)
    return descendants


async def check_replaced(command: Command, missing: Callable[[], Awaitable[str | None]]) -> None:
    """Stop the process after its first beats; check that another one replaces it, that nothing is left of the first,
    and that no other process could have beaten in its place."""
    async with Supervisor() as supervisor:
        supervisor.start(watched(command, REAL_SILENCE_S))
        await supervisor.until(missing, command.name)
        await asyncio.sleep(1.5)
        first = child(command.name)
        pipe = os.readlink(f"/proc/{first.pid}/fd/{first.words[first.words.index('--beat-fd') + 1]}")
        assert [process.pid for process in holders(pipe)] == [first.pid]
        all_of_it = [first, *below(first.pid)]
        os.kill(first.pid, signal.SIGSTOP)
        await asyncio.to_thread(wait_all_gone, all_of_it)
        await supervisor.until(missing, f"another {command.name}")
        assert child(command.name).pid != first.pid


async def test_a_stopped_worker_is_replaced(settings: Settings, redis: RedisServer) -> None:
    epochs: list[bytes] = []

    async def missing() -> str | None:
        with redis.client() as client:
            epoch: Any = client.get("lease:w")
        if epoch in [None, *epochs]:
            return "a lease"
        epochs.append(epoch)
        return None

    await check_replaced(up.worker_command(settings, 5.0), missing)


async def test_a_stopped_api_is_replaced(settings: Settings) -> None:
    with listener.bind(settings) as listening:
        command = up.api_command(settings, listening, 0.0)
        await check_replaced(command, partial(listener.missing, listening, "/healthz"))
