"""File locks exclude other processes as long as any process holds the lock."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from shared.filelock import Held, lock

HOLDER = """
import sys
from pathlib import Path
from shared.filelock import lock
with lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "a.lock"


def test_a_second_holder_is_refused_until_the_first_ends(path: Path) -> None:
    with lock(path), pytest.raises(Held), lock(path):
        pass
    with lock(path):
        pass


def test_the_file_keeps_its_text_and_can_be_rewritten(path: Path) -> None:
    path.write_text("before")
    with lock(path) as file:
        file.seek(0)
        assert file.read() == "before"
        file.truncate(0)
        file.write("after")
    assert path.read_text() == "after"


def test_a_killed_process_leaves_the_lock_free(path: Path) -> None:
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(Held), lock(path):
            pass
        holder.kill()
    with lock(path):
        pass


@pytest.mark.parametrize("is_given", [True, False])
def test_only_a_child_that_inherits_the_file_keeps_the_lock(path: Path, is_given: bool) -> None:
    with lock(path) as file:
        fds = (file.fileno(),) if is_given else ()
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=fds)
    with child:
        if is_given:
            with pytest.raises(Held), lock(path):
                pass
        else:
            with lock(path):
                pass
        child.kill()
    with lock(path):
        pass


def test_a_wait_ends_when_the_lock_is_released(path: Path) -> None:
    is_held, may_end = threading.Event(), threading.Event()

    def hold() -> None:
        with lock(path):
            is_held.set()
            may_end.wait(60)

    holder = threading.Thread(target=hold)
    holder.start()
    assert is_held.wait(60)
    threading.Timer(0.2, may_end.set).start()
    began = time.monotonic()
    with lock(path, wait_s=60):
        assert may_end.is_set()
        assert time.monotonic() - began < 60, "it does not wait for the end of its time"
    holder.join()


def test_a_lock_still_held_after_the_wait_is_refused(path: Path) -> None:
    began = time.monotonic()
    with lock(path), pytest.raises(Held), lock(path, wait_s=0.1):
        pass
    assert time.monotonic() - began >= 0.1


def test_a_file_that_cannot_be_opened_is_an_error(path: Path) -> None:
    path.mkdir()
    with pytest.raises(IsADirectoryError), lock(path):
        pass
