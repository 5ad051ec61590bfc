"""The supervisor with real children, including children that crash or ignore signals."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace

import pytest

import cli.supervisor
from cli.supervisor import Command, StartFailed, Stopped, Supervisor

SLEEP = "import time; time.sleep(60)"
GRACE_S = 60.0  # that nobody has to wait for
STUBBORN = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
WITH_A_GRANDCHILD = (
    "import subprocess, sys; print(subprocess.Popen(['sleep', '60']).pid, file=open(sys.argv[1] + '.grand', 'w')); "
)
SUPERVISE = """
import asyncio, sys
from tests.integration.test_supervisor import command, started, SLEEP
from pathlib import Path
from cli.supervisor import Stopped, Supervisor

async def main(file):
    async with Supervisor() as supervisor:
        supervisor.start(command(file, SLEEP))
        await supervisor.until(started(file, 1), "The child")
        await supervisor.forever()

try:
    asyncio.run(main(Path(sys.argv[1])))
except Stopped:
    pass
"""


def command(file: Path, code: str, *, name: str = "child", grace_s: float = 5.0, fds: tuple[int, ...] = ()) -> Command:
    """Return a child that appends its PID to `file`, then runs `code`."""
    setup = code if code.startswith("import signal") else ""
    note = f"{setup}import os, sys; print(os.getpid(), file=open(sys.argv[1], 'a'), flush=True); "
    rest = "import time; time.sleep(60)" if setup else code
    argv = (sys.executable, "-S", "-c", note + rest, str(file))
    return Command(name=name, argv=argv, environ=dict(os.environ), pass_fds=fds, grace_s=grace_s)


def pids(file: Path) -> list[int]:
    return [int(line) for line in file.read_text().splitlines()] if file.exists() else []


def started(file: Path, times: int) -> Callable[[], Awaitable[str | None]]:
    async def missing() -> str | None:
        return None if len(pids(file)) >= times else f"it was started {len(pids(file))} times"

    return missing


def is_gone(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_gone(pid: int, within_s: float) -> bool:
    until = time.monotonic() + within_s
    while not is_gone(pid) and time.monotonic() < until:
        time.sleep(0.02)
    return is_gone(pid)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "pids"


async def test_children_are_stopped_and_reaped_in_reverse_order(tmp_path: Path) -> None:
    order = tmp_path / "order"
    leave = (
        "import os, signal, sys, time; "
        "signal.signal(signal.SIGTERM, lambda *_: (print(sys.argv[2], file=open(sys.argv[3], 'a')), sys.exit(0))); "
        "print(os.getpid(), file=open(sys.argv[1], 'w'), flush=True); time.sleep(60)"
    )
    async with Supervisor() as supervisor:
        for name in ("redis", "worker", "api"):
            argv = (sys.executable, "-S", "-c", leave, str(tmp_path / name), name, str(order))
            supervisor.start(Command(name=name, argv=argv, environ={}))

        async def missing() -> str | None:
            return None if all(pids(tmp_path / name) for name in ("redis", "worker", "api")) else "one"

        await supervisor.until(missing, "All")
    assert order.read_text().split() == ["api", "worker", "redis"]
    assert all(is_gone(pids(tmp_path / name)[0]) for name in ("redis", "worker", "api"))


async def test_a_crashed_child_is_restarted(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(command(file, SLEEP))
        await supervisor.until(started(file, 1), "The child")
        os.kill(pids(file)[0], signal.SIGSEGV)
        await supervisor.until(started(file, 2), "The child again")
        first, second = pids(file)
        assert is_gone(first)
        assert not is_gone(second)
    assert is_gone(second)


async def test_restarts_of_a_child_that_never_starts_back_off(monkeypatch: pytest.MonkeyPatch) -> None:
    pauses_s, tried_enough = list[float](), asyncio.Event()

    def warning(sentence: str, *, restart_in_s: float, **facts: object) -> None:
        pauses_s.append(restart_in_s)
        if len(pauses_s) == 4:
            tried_enough.set()

    monkeypatch.setattr(cli.supervisor, "FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr(cli.supervisor, "LAST_BACKOFF_S", 0.04)
    monkeypatch.setattr(cli.supervisor, "time", SimpleNamespace(monotonic=lambda: 0.0))  # each run ends at once
    monkeypatch.setattr(cli.supervisor, "_log", SimpleNamespace(warning=warning))
    async with Supervisor() as supervisor, asyncio.timeout(60):
        supervisor.start(Command(name="child", argv=("/nowhere/child",), environ={}))
        await tried_enough.wait()
    assert pauses_s == [0.01, 0.02, 0.04, 0.04]


async def test_a_ready_child_is_restarted_after_any_status(file: Path) -> None:
    twice = "\nimport time\nwhile not os.path.exists(sys.argv[1] + '.ready'): time.sleep(0.01)\nsys.exit(2)"
    async with Supervisor() as supervisor:
        supervisor.start(command(file, twice))
        await supervisor.until(started(file, 1), "The child")
        file.with_suffix(".ready").touch()
        await supervisor.until(started(file, 2), "The child again")


async def test_a_child_that_ignores_sigterm_is_killed_after_grace(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(command(file, STUBBORN, grace_s=0.3))
        await supervisor.until(started(file, 1), "The child")
        began = time.monotonic()
    assert time.monotonic() - began >= 0.3
    assert is_gone(pids(file)[0])


async def test_a_second_signal_kills_at_once(file: Path) -> None:
    async def be_signalled_twice() -> None:
        async with Supervisor() as supervisor:
            supervisor.start(command(file, STUBBORN, grace_s=GRACE_S))
            await supervisor.until(started(file, 1), "The child")
            loop = asyncio.get_running_loop()
            loop.call_later(0.1, os.kill, os.getpid(), signal.SIGTERM)
            loop.call_later(0.3, os.kill, os.getpid(), signal.SIGINT)
            await supervisor.forever()

    began = time.monotonic()
    with pytest.raises(Stopped):
        await be_signalled_twice()
    assert time.monotonic() - began < GRACE_S
    assert is_gone(pids(file)[0])


async def test_the_process_group_of_a_child_ends_with_it(file: Path) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(command(file, WITH_A_GRANDCHILD + SLEEP))
        grand = file.with_suffix(".grand")

        async def missing() -> str | None:
            return None if grand.exists() and grand.read_text().strip() else "the grandchild"

        await supervisor.until(missing, "The child")
        os.kill(pids(file)[0], signal.SIGKILL)
        pid = int(grand.read_text())
        assert await asyncio.to_thread(wait_gone, pid, 60)


async def never_ready(command: Command, deadline_s: float) -> None:
    async def missing() -> str:
        return "nothing came"

    async with Supervisor(start_deadline_s=deadline_s) as supervisor:
        supervisor.start(command)
        await supervisor.until(missing, "Loadstone")


async def test_a_configuration_error_ends_the_start_at_once(file: Path) -> None:
    began = time.monotonic()
    with pytest.raises(StartFailed, match="The worker process refused its settings") as failed:
        await never_ready(command(file, "sys.exit(2)", name="worker"), deadline_s=GRACE_S)
    assert failed.value.status == 2
    assert time.monotonic() - began < GRACE_S


async def test_a_child_that_keeps_exiting_fails_the_start() -> None:
    with pytest.raises(StartFailed) as failed:
        await never_ready(Command(name="worker", argv=("/bin/sh", "-c", "exit 7"), environ={}), deadline_s=1)
    assert failed.value.status == 1
    sentence = "Loadstone was not ready within 1 s: nothing came; the worker process exited with status 7"
    assert str(failed.value).startswith(sentence)


async def test_a_missing_program_is_reported_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(StartFailed, match=r"the redis process cannot be started \(No such file or directory\)"):
        await never_ready(Command(name="redis", argv=(str(tmp_path / "absent"),), environ={}), deadline_s=0.3)


async def test_only_named_descriptors_are_inherited(file: Path) -> None:
    ours, theirs = os.pipe()
    other = os.open(os.devnull, os.O_RDONLY)
    code = "os.write(int(sys.argv[2]), ' '.join(os.listdir('/proc/self/fd')).encode()); " + SLEEP
    base = command(file, code, fds=(theirs,))
    async with Supervisor() as supervisor:
        supervisor.start(Command(name="x", argv=(*base.argv, str(theirs)), environ={}, pass_fds=(theirs,)))
        await supervisor.until(started(file, 1), "The child")
        inherited = (await asyncio.to_thread(os.read, ours, 4096)).decode().split()
    for descriptor in (ours, theirs, other):
        os.close(descriptor)
    assert str(theirs) in inherited
    assert str(other) not in inherited


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_no_child_outlives_its_supervisor(file: Path, signum: signal.Signals) -> None:
    with subprocess.Popen([sys.executable, "-c", SUPERVISE, str(file)]) as supervisor:
        try:
            until = time.monotonic() + 60
            while not pids(file) and time.monotonic() < until:
                time.sleep(0.02)
            supervisor.send_signal(signum)
            status = supervisor.wait(60)
        finally:
            supervisor.kill()
    assert status == (-9 if signum == signal.SIGKILL else 0)
    assert wait_gone(pids(file)[0], within_s=60)
