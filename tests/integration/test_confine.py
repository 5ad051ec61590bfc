"""What a runner has given up, as the kernel tells it of its process."""

from __future__ import annotations

import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from shared.synthetic import models as synthetic
from tests.support.service import TINY, Process, Service, is_alive, until, up, wait_gone
from worker.engine.confine import OPEN_FILES

SECRETS = {"AWS_SECRET_ACCESS_KEY": "hush", "DATABASE_URL": "postgres://u:hush@h", "LOADSTONE_API_TOKENS": "hush"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """One that was started with secrets in its environment, and holds a model."""
    home = tmp_path_factory.mktemp("service")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home, token="hush", models=None, **SECRETS, CUDA_VISIBLE_DEVICES="") as running:
        running.loaded(TINY)
        running.warm_runner(1)
        yield running


def proc(process: Process, name: str) -> str:
    return Path(f"/proc/{process.pid}/{name}").read_text(errors="replace")


def test_a_runner_can_gain_no_privileges_and_leaves_no_core(service: Service) -> None:
    for runner in service.runners():
        assert re.search(r"^NoNewPrivs:\s+1$", proc(runner, "status"), re.M)
        assert re.search(r"^Max core file size\s+0\s+0 ", proc(runner, "limits"), re.M)
        assert re.search(rf"^Max open files\s+{OPEN_FILES}\s+{OPEN_FILES} ", proc(runner, "limits"), re.M)


def test_a_runner_has_its_channel_and_its_output_and_nothing_of_its_workers(service: Service) -> None:
    for runner in service.runners():
        found = sorted(str(entry.readlink()) for entry in Path(f"/proc/{runner.pid}/fd").iterdir())
        kinds = [name.partition(":")[0] for name in found]
        assert kinds == ["/dev/null", "socket", "socket", "socket"], found  # its output is both stdout and stderr


def test_no_secret_is_in_the_environment_of_what_reads_model_files(service: Service) -> None:
    below_the_worker = [p for p in service.tree() if any("multiprocessing" in w or "scanner" in w for w in p.words)]
    assert len(below_the_worker) >= 4
    for process in below_the_worker:
        names = {line.partition("=")[0] for line in proc(process, "environ").split("\0")}
        assert "hush" not in proc(process, "environ")
        assert {"PATH", "CUDA_VISIBLE_DEVICES"} <= names
        assert not any(name.startswith("LOADSTONE_") for name in names)


def test_a_stopped_runner_goes_with_its_worker(tmp_path: Path) -> None:
    """It cannot read that its channel has ended."""
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path, LOADSTONE_RESTORE="off") as service:
        service.loaded(TINY)
        held = service.warm_runner(1) and service.runners()
        for runner in held:
            os.kill(runner.pid, signal.SIGSTOP)
        os.kill(service.worker().pid, signal.SIGKILL)
        wait_gone(held, 3)
        until(lambda: service.send("GET", "/readyz").status == 200, "another worker is ready")


def test_what_a_killed_worker_left_among_the_temporary_files_is_removed_by_the_next(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # short: the paths of sockets end at 107 bytes

    def made() -> set[str]:
        return {path.name for path in temporary.iterdir() if path.name.startswith("loadstone-worker-")}

    with up(tmp_path, TMPDIR=str(temporary)) as service:
        (first,) = made()
        worker = service.worker()
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: len(made()) == 1 and first not in made(), "the next one's, and only that")
        assert not is_alive(worker)
        until(lambda: service.send("GET", "/readyz").status == 200, "another worker is ready")
    assert made() == set()
    temporary.rmdir()
