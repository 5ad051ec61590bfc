"""Sandboxes on kernels that have less than they use, and the filters of system calls, in processes of their own."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from shared import libc
from worker.sandbox import landlock, seccomp

ROOT = Path(__file__).parents[2]
REFUSE = """
import errno, os, sys
from shared import libc
from worker.sandbox import landlock, seccomp
from worker.engine.confine import ModelFiles, confine, restrict, seal

libc.prctl(libc.PR_SET_NO_NEW_PRIVS, 1)
"""
OLD = """
def old(number, *arguments, real=libc.syscall):
    if number in MISSING:
        raise OSError(errno.ENOSYS, "no such system call")
    if number == landlock.CREATE_RULESET and arguments[2] == landlock.GET_VERSION:
        return min(real(number, *arguments), VERSION)
    return real(number, *arguments)
libc.syscall = old
restrict(on_gpu=False)
files = ModelFiles(on_gpu=False)
files.choose([sys.argv[1]])
files.restrict_last_thread()
open(sys.argv[1]).close()
"""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", REFUSE + code, *arguments]
    environ = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel has no seccomp")
def test_no_file_is_changed_without_landlock_either(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("x")
    code = """
refusals = []
for change in (
    lambda: open(sys.argv[1], "w"),
    lambda: open(sys.argv[1], "a"),
    lambda: open(sys.argv[1], "r+"),
    lambda: os.open(sys.argv[1], os.O_RDONLY | os.O_TRUNC),
    lambda: os.truncate(sys.argv[1], 0),
    lambda: os.unlink(sys.argv[1]),
    lambda: os.mkdir(sys.argv[1] + "x"),
    lambda: libc.syscall(seccomp.OPENAT2, 0, 0, 0, 0),
):
    try:
        change()
    except PermissionError:
        refusals.append(change)
print(len(refusals))
"""
    done = run(f"MISSING, VERSION = {{444, 445, 446}}, 0\n{OLD}{code}", str(path))
    assert (done.returncode, done.stdout) == (0, "8\n"), done.stderr
    assert path.read_text() == "x"


@pytest.mark.parametrize(
    ("missing", "version"),
    [
        pytest.param("{444, 445, 446, 317}", 0, id="neither"),
        pytest.param("{444, 445, 446}", 0, id="no Landlock"),
        *(pytest.param("{}", version, id=f"Landlock {version}") for version in range(1, 7)),
    ],
)
def test_an_older_kernel_gives_less_protection(missing: str, version: int, tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.write_text("x")
    other = tmp_path / "other"
    other.write_text("y")
    code = f"MISSING, VERSION = {missing}, {version}\n{OLD}"
    code += "\ntry:\n    open(sys.argv[2])\nexcept PermissionError:\n    print('refused')\nelse:\n    print('read')"
    done = run(code, str(model), str(other))
    is_refused = bool(version and landlock.version())
    assert (done.returncode, done.stdout) == (0, "refused\n" if is_refused else "read\n"), done.stderr


def test_a_landlock_that_is_turned_off_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    def off(*_: int) -> int:
        raise OSError(errno.EOPNOTSUPP, "turned off")

    monkeypatch.setattr(libc, "syscall", off)
    assert landlock.version() == 0
    landlock.restrict_thread([("/usr", landlock.READ)])


def test_another_machine_has_no_filters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "uname", lambda: os.uname_result(("Linux", "host", "6.18", "1", "aarch64")))
    assert not seccomp.is_available()


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel has no seccomp")
def test_all_threads_lose_their_files() -> None:
    code = """
import threading
go, results = threading.Event(), []
def read():
    go.wait()
    try:
        open("/etc/passwd")
    except PermissionError:
        results.append("refused")
thread = threading.Thread(target=read)
thread.start()
seccomp.outside()
seal()
go.set()
thread.join()
another = threading.Thread(target=results.append, args=("started",))
another.start()
another.join()
print(results, flush=True)
os.kill(os.getpid(), 0)
os.abort()
"""
    done = run(code)
    assert done.stdout == "['refused', 'started']\n", done.stderr
    assert done.returncode == -signal.SIGABRT


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel has no seccomp")
def test_a_filter_tells_conditions_apart() -> None:
    code = """
import socket
seccomp.apply(seccomp.compiled([], [
    (seccomp.SOCKETPAIR, seccomp.If(0, [1])),
    (seccomp.SOCKETPAIR, seccomp.If(1, [1, 5], 0xF)),
    (seccomp.FCNTL, seccomp.If(1, [8, 10], are_allowed=False)),
]))
def refused(call):
    try:
        call()
    except PermissionError:
        return True
    return False
import fcntl
print([refused(lambda: socket.socketpair(type=kind)) for kind in (1, 5, 2, 1 | socket.SOCK_CLOEXEC)])
print([refused(lambda: fcntl.fcntl(2, command, 0)) for command in (8, 10, 3)])
"""
    done = run(code)
    assert done.stdout == "[False, False, True, False]\n[True, True, False]\n", done.stderr


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel has no seccomp")
def test_a_program_of_32_bits_is_not_run_on() -> None:
    """Its system calls have other numbers, which would pass the lists."""
    code = """
import ctypes, mmap
area = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
area.write(bytes.fromhex("b814000000cd80c3"))  # mov eax, 20 (getpid); int 0x80; ret
call = ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(area)))
assert call() in (os.getpid(), -errno.ENOSYS)
seccomp.outside()
call()
"""
    assert run(code).returncode in (-signal.SIGSYS, -signal.SIGSEGV)  # the latter where the kernel has no such calls
