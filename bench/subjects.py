"""The two subjects, each with a method `load`: the service over HTTP, and llama-cpp-python alone."""

from __future__ import annotations

import http.client
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal, TypeVar
from urllib.parse import urlsplit

from msgspec import Struct

from shared import paths
from shared.settings import PREFIX

CONTEXT_LENGTH = 4096
EVAL_BATCH_SIZE = 512
REPLY_S = 600.0
STOP_S = 20.0  # `loadstone up` takes 10 at most

T = TypeVar("T")


class Failure(Exception):
    """A measurement failed; the message says why."""


class Load(Struct, frozen=True, kw_only=True):
    """`total_s` counts from the request to the end of the reply; `load_s` is the load time by the subject's clock."""

    total_s: float
    load_s: float
    phases_s: dict[str, float]  # "model" is metadata and weights together

    @property
    def overhead_s(self) -> float:
        return self.total_s - self.load_s


class Service:
    """A running Loadstone, used over one kept connection."""

    def __init__(self, url: str, pid: int) -> None:
        host = urlsplit(url)
        self.port, self.pid = host.port or 80, pid
        self._connection = http.client.HTTPConnection(host.hostname or "", host.port, timeout=REPLY_S)

    def reconnect(self) -> None:
        """Reconnect after a pause, since the server closes a connection that is idle for some seconds."""
        self._connection.close()
        self._connection.connect()

    def load(self, key: str) -> Load:
        """Load and unload a model; unloading is not measured."""
        body = {
            "model": key,
            "context_length": CONTEXT_LENGTH,
            "eval_batch_size": EVAL_BATCH_SIZE,
            "echo_load_config": True,
        }
        seconds, reply, timing = self.post("/api/v1/models/load", body)
        applied = reply["load_config"]
        if (applied["context_length"], applied["eval_batch_size"]) != (CONTEXT_LENGTH, EVAL_BATCH_SIZE):
            raise Failure(f"the service applied another config than the requested one: {applied}")
        self.post("/api/v1/models/unload", {"instance_id": reply["instance_id"]})
        phases = {name: float(ms) / 1000 for name, ms in re.findall(r"(\w+);dur=([\d.]+)", timing)}
        phases["model"] = phases["metadata"] + phases["weights"]
        return Load(total_s=seconds, load_s=reply["load_time_seconds"], phases_s=phases)

    def close(self) -> None:
        self._connection.close()

    def post(self, path: str, body: dict[str, object]) -> tuple[float, dict[str, Any], str]:
        """Return the duration in seconds, the reply, and its Server-Timing."""
        content = json.dumps(body).encode()
        started = time.monotonic()
        answer, headers = self._send("POST", path, content)
        return time.monotonic() - started, json.loads(answer), headers.get("Server-Timing", "")

    def get(self, path: str) -> Any:
        """Return the reply."""
        return json.loads(self._send("GET", path)[0])

    def engine_log(self) -> str:
        """Return what the engine said in the newest load."""
        (job,) = self.get(f"{paths.JOBS}?limit=1")["jobs"]
        return self._send("GET", paths.JOB_LOGS.format(job_id=job["job_id"]))[0].decode("utf-8", "replace")

    def _send(self, method: str, path: str, content: bytes | None = None) -> tuple[bytes, http.client.HTTPMessage]:
        """Return the body of the reply, and its headers.  Raises Failure."""
        try:
            self._connection.request(method, path, content, {"Content-Type": "application/json"} if content else {})
            response = self._connection.getresponse()
            answer = response.read()
        except (OSError, http.client.HTTPException) as e:
            raise Failure(f"{path}: no reply: {e!r}") from e
        if response.status != 200:
            raise Failure(f"{path}: reply with status {response.status}: {answer.decode('utf-8', 'replace')}")
        return answer, response.headers


class Bare:
    """A process with llama-cpp-python imported that loads one model on request: see bench.bare."""

    def __init__(self, process: subprocess.Popen[str], log: Path) -> None:
        self._process, self._log = process, log
        self.use_extra_bufts: bool = self._answer()["use_extra_bufts"]

    def load(self) -> Load:
        """Load and free the model.  The process measures the time, so the pipe to it is not included."""
        assert self._process.stdin
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        phases = self._answer()
        load_s = phases["model"] + phases["context"] + phases["warmup"]
        return Load(total_s=phases.pop("total", load_s), load_s=load_s, phases_s=phases)

    def _answer(self) -> Any:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise Failure(f"the bare process has exited; see {self._log}")
        return json.loads(line)


def until(condition: Callable[[], T | None], what: str, within_s: float) -> T:
    """Return the result of a condition once it is true.  Raises Failure."""
    deadline = time.monotonic() + within_s
    while not (found := condition()):
        if time.monotonic() > deadline:
            raise Failure(f"not within {within_s:g} s: {what}")
        time.sleep(0.02)
    return found


def free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port: int = listening.getsockname()[1]
        return port


@contextmanager
def service(models_dir: Path, out: Path, **variables: str) -> Iterator[Service]:
    """Run `loadstone up` with an embedded Redis, a free port, and a data directory that is removed afterwards."""
    log = out / "service.log"
    with tempfile.TemporaryDirectory(prefix="data-", dir=out) as data_dir, log.open("w") as stderr:
        program = Path(sys.executable).with_name("loadstone")
        argv = [str(program), "up", "--port", "0", "--models-dir", str(models_dir), "--data-dir", data_dir]
        with running(argv, stderr, variables) as process:
            assert process.stdout
            ready = re.fullmatch(r"ready: (\S+)\n", process.stdout.readline())
            if not ready:
                raise Failure(f"`loadstone up` did not become ready; see {log}")
            client = Service(ready[1], process.pid)
            try:
                yield client
            finally:
                client.close()


@contextmanager
def bare(how: Literal["warm", "fork"], model: Path, out: Path) -> Iterator[Bare]:
    log = out / "bare.log"
    argv = [sys.executable, "-m", "bench.bare", how, str(model), str(CONTEXT_LENGTH), str(EVAL_BATCH_SIZE)]
    with log.open("a") as stderr, running(argv, stderr) as process:
        yield Bare(process, log)


@contextmanager
def running(
    argv: list[str], stderr: IO[str], variables: Mapping[str, str] = {}, pass_fds: Collection[int] = ()
) -> Iterator[subprocess.Popen[str]]:
    """Run a child process; stop and reap it afterwards.  It has its own session: Ctrl-C does not reach it directly."""
    environ = {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}
    with subprocess.Popen(
        argv,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**environ, **variables},
        pass_fds=pass_fds,
        cwd=Path(__file__).parents[1],
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
