"""Downloads from a hub on this machine, beside curl: measured with `python -m bench downloads`.

`loadstone get` and curl take turns at the same file of the same hub, and write to the same disk.  `loadstone get`
counts from the start of the command to its end: by then the file is verified, on the disk, and in its place.  Its
transfer is counted from the start of the job: without the command, the question to the hub, and the choice.  curl does
none of that, so it is also counted with `sync`, and with `sha256sum` after that.  A last download, whose processes are
killed with SIGKILL at random moments, shows how much of the file is fetched twice.
"""

from __future__ import annotations

import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import datetime
from functools import partial
from pathlib import Path

from msgspec import Struct

from bench.processes import children, roles
from bench.report import table
from bench.subjects import Failure, Service, service, until
from shared import paths
from shared.synthetic import models as synthetic
from tests.support.hub import COMMIT, LocalHub, sha256

N_BYTES = 4 << 30
ROUNDS = 5
GOAL = 0.9  # of curl's rate
MOST_FETCHED = 1.05  # of the file, when its processes are killed
REPOSITORY, FILE, KEY = "Acme/Big-GGUF", "big-Q4_0.gguf", "acme/big"
CURL, SYNC, SHA256 = "curl", "curl, sync", "curl, sync, sha256sum"
GET, TRANSFER = "loadstone get", "its transfer"
DOWNLOAD = "process of the download"
VICTIMS = ("worker", "api", "redis", DOWNLOAD)
WITHIN_S = 600.0


class Downloads(Struct, frozen=True, kw_only=True):
    n_bytes: int
    seconds: dict[str, list[float]]  # of each way, by round
    killed: list[str]  # in the last download, with how much of the file had been sent
    fetched: float  # of the file, in the last download

    def median_s(self, way: str) -> float:
        return statistics.median(self.seconds[way])

    def of_curl(self, way: str) -> float:
        """Return the rate of a way as a share of curl's: the median of the rounds."""
        pairs = zip(self.seconds[CURL], self.seconds[way], strict=True)
        return statistics.median(curl / other for curl, other in pairs)


# ---- measuring


def measure(out: Path, say: Callable[[str], None]) -> Downloads:
    with tempfile.TemporaryDirectory(prefix="downloads-", dir=out) as home:
        return _measured(Path(home), out, say)


def _measured(home: Path, out: Path, say: Callable[[str], None]) -> Downloads:
    file, models = home / "file.gguf", home / "models"
    models.mkdir()
    _write(file)
    hub = LocalHub()
    hub.add(REPOSITORY, FILE, file)
    hub.listed_hashes[FILE] = sha256(file)
    seconds: dict[str, list[float]] = {way: [] for way in (CURL, SYNC, SHA256, GET, TRANSFER)}
    with hub.running(), service(models, out, HF_ENDPOINT=hub.endpoint, LOADSTONE_HUB_HOSTS=hub.cdn) as running:
        ways = [partial(_curl, hub, home / "curl.gguf"), partial(_get, running)]
        for i in range(ROUNDS + 1):
            say(f"downloading, round {i}")
            ways.reverse()
            for way in ways:
                os.sync()
                for name, took_s in way().items():
                    if i > 0:  # the first round has cold caches
                        seconds[name].append(took_s)
        say("downloading while processes are killed")
        killed, fetched = _killed(running, hub, models / REPOSITORY / FILE)
    return Downloads(n_bytes=N_BYTES, seconds=seconds, killed=killed, fetched=fetched)


def _write(file: Path) -> None:
    """Write a model with random data after its tensors."""
    synthetic.tiny_llama(file)
    block = random.Random(1).randbytes(64 << 20)
    with file.open("ab") as out:
        for number in range((N_BYTES - out.tell()) // len(block)):
            out.write(number.to_bytes(8, "little") + block[8:])
        out.write(block[: N_BYTES - out.tell()])


def _curl(hub: LocalHub, target: Path) -> dict[str, float]:
    url = f"{hub.endpoint}/{REPOSITORY}/resolve/{COMMIT}/{FILE}"
    began = time.monotonic()
    subprocess.run(["curl", "--silent", "--location", "--output", target, url], check=True)
    fetched = time.monotonic()
    subprocess.run(["sync", target], check=True)
    synced = time.monotonic()
    subprocess.run(["sha256sum", target], check=True, stdout=subprocess.DEVNULL)
    verified = time.monotonic()
    target.unlink()
    return {CURL: fetched - began, SYNC: synced - began, SHA256: verified - began}


def _get(running: Service) -> dict[str, float]:
    began = time.monotonic()
    subprocess.run(_command(running, "get", REPOSITORY), check=True, capture_output=True)
    seconds = time.monotonic() - began
    running.reconnect()
    (job, *_) = running.get(f"{paths.DOWNLOADS}?limit=1")["jobs"]
    started, completed = (datetime.fromisoformat(job[name]) for name in ("started_at", "completed_at"))
    # The catalog lists the model a moment later.
    remove = _command(running, "rm", KEY)
    until(lambda: subprocess.run(remove, capture_output=True).returncode == 0, "the removal", WITHIN_S)
    return {GET: seconds, TRANSFER: (completed - started).total_seconds()}


def _command(running: Service, *words: str) -> list[str]:
    return [str(Path(sys.executable).with_name("loadstone")), *words, "--url", f"http://127.0.0.1:{running.port}"]


def _killed(running: Service, hub: LocalHub, target: Path) -> tuple[list[str], float]:
    """Download once more while each process is killed at a random moment; return these, and how much was sent."""
    killed: list[str] = []
    before = hub.sent[FILE]
    victims = random.sample(VICTIMS, len(VICTIMS))
    moments = sorted(random.uniform(0.05, 0.9) for _ in victims)
    running.reconnect()
    running.post(paths.DOWNLOAD, {"model": REPOSITORY})
    for victim, moment in zip(victims, moments, strict=True):
        until(partial(_has_sent, hub, before + round(moment * N_BYTES)), f"{moment:.0%} of the file", WITHIN_S)
        os.kill(until(partial(_pid, running, victim), victim, WITHIN_S), signal.SIGKILL)
        killed.append(f"{victim} at {(hub.sent[FILE] - before) / N_BYTES:.0%}")
    until(target.exists, "the file in its place", WITHIN_S)
    if sha256(target) != hub.listed_hashes[FILE]:
        raise Failure("the file is another one than that of the hub")
    return killed, (hub.sent[FILE] - before) / N_BYTES


def _has_sent(hub: LocalHub, n_bytes: int) -> bool:
    return hub.sent[FILE] >= n_bytes


def _pid(running: Service, victim: str) -> int | None:
    """Return the process with a role; None while it is not there."""
    try:
        pids = roles(running.pid)
        if victim != DOWNLOAD:
            return pids.get(victim)
        words = {pid: Path(f"/proc/{pid}/cmdline").read_text().split("\0") for pid in children(pids["worker"])}
    except (OSError, KeyError):  # one ends, or has not begun
        return None
    return next((pid for pid, argv in words.items() if "worker.hub.process" in argv), None)


# ---- the report


def markdown(measured: Downloads) -> str:
    transfer, whole, fetched = measured.of_curl(TRANSFER), measured.of_curl(GET), measured.fetched
    rows = [
        [
            way,
            f"{measured.median_s(way):.2f}",
            f"{min(seconds):.2f} to {max(seconds):.2f}",
            f"{measured.n_bytes / measured.median_s(way) / 1e6:.0f}",
            f"{measured.of_curl(way):.2f}",
        ]
        for way, seconds in measured.seconds.items()
    ]
    return "\n".join(
        [
            f"## Downloading {measured.n_bytes / 1e9:.1f} GB from a hub on this machine",
            "",
            f"- rate of the transfer / curl's = {transfer:.2f}, goal {GOAL}, {_verdict(transfer >= GOAL)}; with "
            f"all that `loadstone get` does around it {whole:.2f}",
            f"- bytes sent / bytes of the file, with processes killed = {fetched:.3f}, limit {MOST_FETCHED}, "
            f"{_verdict(fetched <= MOST_FETCHED)}: {', '.join(measured.killed)}",
            "",
            *table(["", "s", "from, to", "MB/s", "of curl's rate"], rows),
            "",
            f"Medians of {ROUNDS} rounds, in which the ways take turns; shares are medians of the rounds' shares.",
        ]
    )


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"
