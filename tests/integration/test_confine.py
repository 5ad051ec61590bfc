"""The confinement of a runner as shown in /proc."""

from __future__ import annotations

import base64
import os
import re
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from shared.schema.snapshot import WorkerSnapshot
from shared.synthetic import models as synthetic
from tests.support.runners import holds
from tests.support.service import TINY, Process, Service, below, is_alive, open_files, until, up, wait_gone
from worker.engine.confine import OPEN_FILES
from worker.sandbox import landlock, seccomp

SECRETS = {"AWS_SECRET_ACCESS_KEY": "hush", "DATABASE_URL": "postgres://u:hush@h", "LOADSTONE_API_TOKENS": "hush"}


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A service with secrets in its environment and a loaded model."""
    home = tmp_path_factory.mktemp("service")
    synthetic.tiny_llama(home / f"models/{TINY}/tiny-f16.gguf")
    with up(home, token="hush", models=None, **SECRETS, CUDA_VISIBLE_DEVICES="") as running:
        running.loaded(TINY)
        running.warm_runner(1)
        yield running


def proc(process: Process, name: str) -> str:
    return Path(f"/proc/{process.pid}/{name}").read_text(errors="replace")


def test_a_runner_has_no_new_privileges_and_no_core_dump(service: Service) -> None:
    for runner in service.runners():
        assert re.search(r"^NoNewPrivs:\s+1$", proc(runner, "status"), re.M)
        assert re.search(r"^Max core file size\s+0\s+0 ", proc(runner, "limits"), re.M)
        assert re.search(rf"^Max open files\s+{OPEN_FILES}\s+{OPEN_FILES} ", proc(runner, "limits"), re.M)


@pytest.mark.skipif(not seccomp.is_available(), reason="this kernel has no seccomp")
def test_what_a_worker_starts_makes_fewer_system_calls(service: Service) -> None:
    """All but the fork server of the runners, and its resource tracker: they only run code of ours and of Python."""
    names = ("worker.listener.server", "worker.catalog.scanner")

    def are_filtered() -> bool:
        started = [one for one in service.tree() if any(name in one.words for name in names)]
        for runner in service.runners():
            started += [runner, *below(runner.pid)]  # its zygote and its helper
        filtered = [one for one in started if re.search(r"^Seccomp:\s+2$", proc(one, "status"), re.M)]
        return len(started) == len(filtered) == 2 + 2 * 3

    until(are_filtered, "all are filtered")


def test_a_worker_says_how_runners_are_confined(service: Service) -> None:
    (line,) = [line for line in service.stderr.splitlines() if "action=confined" in line]
    assert f"landlock={landlock.version()}" in line
    assert f"seccomp={seccomp.is_available()}" in line


def test_a_runner_inherits_no_descriptor_of_its_worker(service: Service) -> None:
    loaded, warm = service.runners()
    # The control channel, the output (both stdout and stderr), the hand-over, two of its own event loop, the zygote,
    # and, if it has a model, the helper.
    for runner, sockets in ((loaded, 8), (warm, 7)):
        targets = sorted(open_files(runner.pid))
        kinds = [name.partition(":")[0] for name in targets if name != "anon_inode:[landlock-ruleset]"]
        assert kinds == ["/dev/null", "anon_inode", *["socket"] * sockets], targets


def test_the_secret_of_the_channels_is_shown_nowhere(service: Service) -> None:
    with service.redis() as redis:
        (key,) = redis.scan_iter("worker:*")
        snapshot: Any = redis.get(key)
    address = msgspec.msgpack.decode(snapshot, type=WorkerSnapshot).channels
    assert address is not None
    assert Path(address.path).stat().st_mode & 0o777 == 0o600
    shown = service.send("GET", "/api/v1/workers").text + service.send("GET", "/metrics").text + service.stderr
    assert address.path not in service.send("GET", "/api/v1/workers").text
    for form in (address.secret.hex(), base64.b64encode(address.secret).decode(), repr(address.secret)):
        assert form not in shown
    for process in service.tree():
        assert address.secret not in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        assert address.secret not in Path(f"/proc/{process.pid}/environ").read_bytes()


def test_readers_of_model_files_have_no_secrets(service: Service) -> None:
    below_the_worker = [p for p in service.tree() if any("multiprocessing" in w or "scanner" in w for w in p.words)]
    assert len(below_the_worker) >= 4
    for process in below_the_worker:
        names = {line.partition("=")[0] for line in proc(process, "environ").split("\0")}
        assert "hush" not in proc(process, "environ")
        assert {"PATH", "CUDA_VISIBLE_DEVICES"} <= names
        assert not any(name.startswith("LOADSTONE_") for name in names)


def test_no_secret_is_in_the_memory_of_a_runner(service: Service) -> None:
    """A runner has a copy of the memory of the process that it was forked from."""
    redis = str(service.data_dir / "redis/redis.sock").encode()
    assert holds(service.worker().pid, redis)
    runner = service.runners()[0]
    assert not holds(runner.pid, redis)
    assert not holds(runner.pid, b"u:hush@h"), "a variable of another service"


def test_a_stopped_runner_dies_with_its_worker(tmp_path: Path) -> None:
    """A stopped runner cannot read the end of its channel."""
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path, LOADSTONE_RESTORE="off") as service:
        service.loaded(TINY)
        held = service.warm_runner(1) and service.runners()
        for runner in held:
            os.kill(runner.pid, signal.SIGSTOP)
        os.kill(service.worker().pid, signal.SIGKILL)
        wait_gone(held)
        until(lambda: service.send("GET", "/readyz").status == 200, "another worker is ready")


def test_a_worker_removes_files_of_a_killed_worker(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # short: the path of a socket has at most 107 bytes

    def directories() -> set[str]:
        return {path.name for path in temporary.iterdir() if path.name.startswith("loadstone-worker-")}

    with up(tmp_path, TMPDIR=str(temporary)) as service:
        (first,) = directories()
        worker = service.worker()
        os.kill(worker.pid, signal.SIGKILL)
        until(lambda: len(directories()) == 1 and first not in directories(), "only the directory of the next worker")
        assert not is_alive(worker)
        until(lambda: service.send("GET", "/readyz").status == 200, "another worker is ready")
    assert directories() == set()
    temporary.rmdir()
