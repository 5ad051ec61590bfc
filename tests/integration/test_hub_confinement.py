"""What a process that talks to the hub may do on its host."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from worker.sandbox import landlock

pytestmark = pytest.mark.skipif(not landlock.version(), reason="this kernel has no Landlock")

ROOT = Path(__file__).parents[2]
TRIES = """
import os, socket, ssl, subprocess, sys
from pathlib import Path
from worker.hub import confinement
from worker.sandbox import landlock

home, port = Path(sys.argv[1]), int(sys.argv[2])
confinement.restrict(home / "own", getattr(landlock, sys.argv[3]))

def can(call):
    try:
        call()
    except PermissionError:
        return False
    return True

socket.create_connection(("localhost", port)).close()
ssl.create_default_context()
print(*[name for name, call in {
    "read own": (home / "own/file").read_bytes,
    "write own": lambda: (home / "own/new").write_text("x"),
    "move own": lambda: ((home / "own/folder").mkdir(), (home / "own/new").replace(home / "own/folder/moved")),
    "read certificates": (home / "certificates/one").read_bytes,
    "read": (home / "secret").read_bytes,
    "list": lambda: os.listdir(home),
    "write": lambda: (home / "secret").write_text("x"),
    "execute": lambda: subprocess.run([sys.executable, "-c", ""], close_fds=False),
    "environment of the parent": Path(f"/proc/{os.getppid()}/environ").read_bytes,
    "signal the parent": lambda: os.kill(os.getppid(), 0),
}.items() if can(call)], sep=", ")
"""
OLD = """
from shared import libc
from worker.sandbox import landlock
def old(number, *arguments, real=libc.syscall):
    known = number == landlock.CREATE_RULESET and arguments[2] == landlock.GET_VERSION
    return min(real(number, *arguments), 1) if known else real(number, *arguments)
libc.syscall = old
"""


def tried(code: str, home: Path, rights: str) -> list[str]:
    """Return what a restricted process can do."""
    for name in ("own", "certificates"):
        (home / name).mkdir()
    for name in ("own/file", "certificates/one", "secret"):
        (home / name).write_text("secret")
    environ = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "SSL_CERT_DIR": str(home / "certificates"),
    }
    with socket.create_server(("127.0.0.1", 0)) as server:
        command = [sys.executable, "-c", code, str(home), str(server.getsockname()[1]), rights]
        done = subprocess.run(command, env=environ, capture_output=True, text=True, timeout=60, check=False)
    assert done.stderr == ""
    return done.stdout.strip().split(", ")


@pytest.mark.parametrize(
    ("rights", "allowed"),
    [
        ("READ", ["read own"]),
        ("WRITE", ["read own", "write own"]),
        ("TREE", ["read own", "write own", "move own"]),
    ],
)
def test_it_reads_no_files_of_anybody(rights: str, allowed: list[str], tmp_path: Path) -> None:
    """What it needs beside one directory is the network, certificates, and the files by which names are resolved."""
    seen = set(tried(TRIES, tmp_path, rights))
    if landlock.version() < 6:  # signals
        seen -= {"signal the parent"}
    assert seen == {*allowed, "read certificates"}


def test_the_first_landlock_moves_files_all_the_same(tmp_path: Path) -> None:
    """It would refuse every move to another folder, and so the end of every download."""
    assert "move own" in tried(OLD + TRIES, tmp_path, "TREE")
