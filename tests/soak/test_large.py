"""A cold load of 4 GB at a terminal: the progress bar moves evenly, and Ctrl-C works at any time."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest

from bench.pagecache import drop
from shared.synthetic import models as synthetic
from tests.support.service import LOADSTONE, STATUS, Process, Running, Service, until, up

BIG = "acme/big"
MIB = 1 << 20


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    home = tmp_path_factory.mktemp("large")
    (home / f"models/{BIG}").mkdir(parents=True)
    synthetic.big(home / f"models/{BIG}/big-Q8_0.gguf", 4)
    with up(home) as running:
        until(lambda: BIG in running.models(), "the model is listed", 30)
        yield running


def cold(service: Service) -> None:
    drop(service.models_dir / BIG / "big-Q8_0.gguf")


def pss_bytes(processes: list[Process]) -> int:
    """Return the proportional set size of these processes (proc(5): smaps_rollup)."""
    total = 0
    for process in processes:
        match = re.search(r"^Pss:\s+(\d+) kB", Path(f"/proc/{process.pid}/smaps_rollup").read_text(), re.MULTILINE)
        assert match
        total += int(match[1]) * 1024
    return total


def test_the_bar_of_a_cold_load_moves_evenly(service: Service) -> None:
    cold(service)
    master, slave = pty.openpty()
    began = time.monotonic()
    shown: list[tuple[float, int]] = []
    drawn = ""
    with subprocess.Popen(
        [str(LOADSTONE), "load", BIG, "--url", service.url],
        env={"PATH": os.environ["PATH"], "TERM": "xterm", "COLUMNS": "120"},
        stdin=slave,
        stdout=subprocess.DEVNULL,
        stderr=slave,
    ) as command:
        os.close(slave)
        try:
            while text := os.read(master, 1 << 16):
                shares = [int(share) for share in re.findall(r"(\d+)%", text.decode(errors="replace"))]
                shown += [(time.monotonic() - began, share) for share in shares]
                drawn += text.decode(errors="replace")
        except OSError:  # the other end is closed
            pass
        os.close(master)
    assert command.returncode == 0, drawn
    shares = [share for _, share in shown]
    assert shares == sorted(shares)
    assert len(set(shares)) > 15  # ten frames a second for about two seconds
    assert max(after - before for before, after in pairwise(shares)) <= 15
    moving = [(at, share) for at, share in shown if 0 < share < 99]
    middle = next(at for at, share in moving if share >= 50)
    assert 0.25 < (middle - moving[0][0]) / (moving[-1][0] - moving[0][0]) < 0.75
    assert re.search(r"weights, [\d.]+ GiB of [\d.]+ GiB, [\d.]+ [GM]iB/s, 0:0\d:\d\d left", drawn), drawn[:2000]
    assert service.unload(BIG).status == 200


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("attempt", range(10))
def test_ctrl_c_ends_a_load_and_frees_its_memory_within_2_s(service: Service, share: float, attempt: int) -> None:
    cold(service)
    service.warm_runner(0)
    before = pss_bytes(service.tree())
    command = Running(service.directory / "command", "load", BIG, environ={"LOADSTONE_URL": service.url})
    try:
        job = until(lambda: job_under_way(service), "the load is under way")
        for event in service.events(job):
            if event.name == "model_load.progress" and event.data["progress"] >= share:
                break
        asked = time.monotonic()
        command.popen.send_signal(signal.SIGINT)
        status = command.popen.wait(10)
        took_s = time.monotonic() - asked
    finally:
        command.kill()
    held = pss_bytes(service.tree())
    assert status == 130, command.stderr
    assert took_s < 2
    assert held - before < 32 * MIB
    assert service.job(job)["status"] == "cancelled"
    assert service.instances() == {}


def job_under_way(service: Service) -> str:
    (newest,) = service.send("GET", STATUS, params={"limit": 1}).json()["jobs"]
    return str(newest["job_id"]) if newest["status"] in ("queued", "loading") else ""
