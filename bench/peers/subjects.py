"""The compared subjects: each loads a model on request, generates one token, and unloads the model."""

from __future__ import annotations

import http.client
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any, Protocol

import msgspec
from msgspec import Struct

from bench.peers.bare import Done, Mode, Task
from bench.peers.models import Model
from bench.subjects import CONTEXT_LENGTH, EVAL_BATCH_SIZE, REPLY_S, Failure, Service, free_port, running, service
from worker.engine.llama import MANY_BYTES, n_threads

POLL_S = 0.002  # for subjects that report ready only to a poll
START_S = 60.0
THREADS = str(n_threads(MANY_BYTES))
PROMPT = "the"  # one token in every vocabulary used here


class Times(Struct, frozen=True, kw_only=True):
    """Seconds from the request, or from the start of the process, to "ready to run" and to the first generated token.

    `warmup_s` is the part of `ready_s` for decoding a token, if the subject reports it."""

    ready_s: float
    token_s: float
    warmup_s: float | None = None
    phases_s: dict[str, float] = {}


class Subject(Protocol):
    name: str

    def load(self, model: Model) -> Times: ...

    def roots(self) -> list[int]:
        """Return the subject's processes, without their descendants."""
        ...


class Loadstone:
    """Loadstone over HTTP.  It decodes a token before it reports a model as loaded, so both moments are the same."""

    name = "Loadstone"

    def __init__(self, running: Service) -> None:
        self._service = running

    def load(self, model: Model) -> Times:
        self._service.reconnect()
        load = self._service.load(model.key)
        warmup_s = load.phases_s["warmup"]
        return Times(ready_s=load.total_s, token_s=load.total_s, warmup_s=warmup_s, phases_s=load.phases_s)

    def roots(self) -> list[int]:
        return [self._service.pid]


class Router:
    """llama.cpp's server without a model, which starts a server for each model.

    Its event stream reports at once that a model is loaded; polling `/models` is never faster.
    """

    def __init__(self, name: str, port: int, pid: int) -> None:
        self.name = name
        self._port, self._pid = port, pid
        self._events = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_S)
        self._events.request("GET", "/models/sse")
        self._stream = self._events.getresponse()

    def load(self, model: Model) -> Times:
        name = model.key.rpartition("/")[2]
        started = time.monotonic()
        self._post("/models/load", {"model": name})
        self._wait(name, "loaded")
        ready_s = time.monotonic() - started
        prompt = {"model": name, "prompt": PROMPT, "n_predict": 1, "temperature": 0}
        answer = self._post("/completion", prompt)
        token_s = time.monotonic() - started
        if answer["tokens_predicted"] != 1:
            raise Failure(f"{self.name} generated {answer['tokens_predicted']} tokens")
        self._post("/models/unload", {"model": name})
        self._wait(name, "unloaded")
        return Times(ready_s=ready_s, token_s=token_s)

    def roots(self) -> list[int]:
        return [self._pid]

    def close(self) -> None:
        self._events.close()

    def _post(self, path: str, body: dict[str, object]) -> Any:
        """Send a request over a new connection: the router closes one that is idle for 5 s, as during a load."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=REPLY_S)
        try:
            return _post(connection, path, body)
        finally:
            connection.close()

    def _wait(self, model: str, status: str) -> None:
        """Wait for an event `{"model": ..., "event": ..., "data": {"status": ...}}` with this status.

        The event's name is `status_change` in the source (update_status of server-models.cpp) and `model_status` in the
        README, so it is not checked.
        """
        while line := self._stream.readline():
            if not line.startswith(b"data:"):
                continue
            event = json.loads(line[5:])
            seen = (event["data"] or {}).get("status") if event["model"] == model else None
            if seen == status:
                return
            if seen == "unloaded":
                raise Failure(f"{self.name} could not load {model}: {event}")
        raise Failure(f"{self.name} ended its event stream")


class PythonServer:
    """`python -m llama_cpp.server`: it serves a single model, so each load starts a process.  It does not warm up,
    repacks by default, and answers once it has loaded."""

    name = "llama_cpp.server"

    def __init__(self, python: Path, log: IO[str]) -> None:
        self._python, self._log = python, log
        self._pids: list[int] = []

    def load(self, model: Model) -> Times:
        port = free_port()
        argv = [str(self._python), "-m", "llama_cpp.server", "--model", str(model.shards[0]), "--port", str(port)]
        argv += ["--n_ctx", str(CONTEXT_LENGTH), "--n_batch", str(EVAL_BATCH_SIZE)]
        argv += ["--n_threads", THREADS, "--n_threads_batch", THREADS]
        started = time.monotonic()
        with running(argv, self._log) as process:
            self._pids = [process.pid]
            try:
                connection = _answering(port, "/v1/models", process, POLL_S, REPLY_S)
                ready_s = time.monotonic() - started
                answer = _post(connection, "/v1/completions", {"prompt": PROMPT, "max_tokens": 1, "temperature": 0})
                token_s = time.monotonic() - started
                connection.close()
            finally:
                self._pids = []
        if answer["usage"]["completion_tokens"] != 1:
            raise Failure(f"{self.name} generated {answer['usage']['completion_tokens']} tokens")
        return Times(ready_s=ready_s, token_s=token_s)

    def roots(self) -> list[int]:
        return self._pids


class FreshProcess:
    """llama-cpp-python in a process that is started for the load."""

    def __init__(self, name: str, log: IO[str]) -> None:
        self.name = name
        self._log = log
        self._pids: list[int] = []

    def load(self, model: Model) -> Times:
        task = msgspec.json.encode(_task(model, "MMAP", repack=False)).decode()
        started = time.monotonic()
        with running([sys.executable, "-m", "bench.peers.bare", task], self._log) as process:
            self._pids = [process.pid]
            try:
                return _times(_line(process), started)
            finally:
                self._pids = []

    def roots(self) -> list[int]:
        return self._pids


class WarmProcess:
    """llama-cpp-python in a process that has imported it, started the backends, and loaded before."""

    def __init__(self, name: str, process: subprocess.Popen[str], mode: Mode, *, repack: bool = False) -> None:
        self.name = name
        self._process, self._mode, self._repack = process, mode, repack

    def load(self, model: Model) -> Times:
        assert self._process.stdin
        started = time.monotonic()
        self._process.stdin.write(msgspec.json.encode(_task(model, self._mode, repack=self._repack)).decode() + "\n")
        self._process.stdin.flush()
        return _times(_line(self._process), started)

    def roots(self) -> list[int]:
        return [self._process.pid]


def _task(model: Model, mode: Mode, *, repack: bool) -> Task:
    path = str(model.shards[0])
    return Task(path=path, n_ctx=CONTEXT_LENGTH, n_batch=EVAL_BATCH_SIZE, mode=mode, repack=repack)


def _times(line: str, started: float) -> Times:
    done = msgspec.json.decode(line, type=Done)
    return Times(ready_s=done.ready_at - started, token_s=done.token_at - started, phases_s=done.phases_s)


def _line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    line = process.stdout.readline()
    if not line:
        raise Failure("a bare process has exited; see bench/out/peers/bare.log")
    return line


def _answering(
    port: int, path: str, process: subprocess.Popen[str], every_s: float, within_s: float
) -> http.client.HTTPConnection:
    """Poll a path until the reply has status 200; return that connection.  Raises Failure."""
    deadline = time.monotonic() + within_s
    while process.poll() is None and time.monotonic() < deadline:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=REPLY_S)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            response.read()
            if response.status == 200:
                return connection
        except (OSError, http.client.HTTPException):
            pass  # the server does not listen yet
        connection.close()
        time.sleep(every_s)
    raise Failure(f"{path} of {process.args!r} was not answered with 200")


def _post(connection: http.client.HTTPConnection, path: str, body: dict[str, object]) -> Any:
    try:
        connection.request("POST", path, json.dumps(body).encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        answer = response.read()
    except (OSError, http.client.HTTPException) as e:
        raise Failure(f"{path}: no reply: {e!r}") from e
    if response.status != 200:
        raise Failure(f"{path}: reply with status {response.status}: {answer.decode('utf-8', 'replace')}")
    return json.loads(answer)


# The settings of the router that make the comparison fair: Loadstone has one sequence, decodes its warm-up token with
# so many threads (one for a tiny model), does not repack, and does not change requested values.  Warm-up, mmap and
# flash attention (auto) are defaults of both.
SAME_SETTINGS = [
    "--batch-size",
    str(EVAL_BATCH_SIZE),
    "--threads",
    THREADS,
    "--threads-batch",
    THREADS,
    "--parallel",
    "1",
]
SAME_SETTINGS += ["--no-repack", "--fit", "off"]
ROUTER, ROUTER_DEFAULTS = "llama-server router", "llama-server router, its defaults"
FRESH, WARM = "bare, fresh process", "bare, warm process"
READ, DIRECT, REPACKED = f"{WARM}, read", f"{WARM}, direct I/O", f"{WARM}, repacked"


@contextmanager
def router(name: str, binary: Path, models: list[Model], out: Path, flags: list[str]) -> Iterator[Router]:
    presets = out / "presets.ini"
    sections = [f"[{model.key.rpartition('/')[2]}]\nmodel = {model.shards[0]}\n" for model in models]
    presets.write_text("version = 1\n\n" + "\n".join(sections))
    port = free_port()
    argv = ["sh", "-c", 'exec "$@" >&2', "sh"]  # its servers write their logs to its stdout, which would fill a pipe
    argv += [str(binary), "--host", "127.0.0.1", "--port", str(port), "--models-preset", str(presets)]
    argv += ["--no-models-autoload", "--ctx-size", str(CONTEXT_LENGTH), *flags]
    cache = out / "cache"
    cache.mkdir(exist_ok=True)
    with (out / f"{name.replace(' ', '-').replace(',', '')}.log").open("w") as log:  # noqa: SIM117
        with running(argv, log, {"LLAMA_CACHE": str(cache)}) as process:
            _answering(port, "/health", process, 0.05, START_S).close()
            client = Router(name, port, process.pid)
            try:
                yield client
            finally:
                client.close()


@contextmanager
def subjects(models: list[Model], models_dir: Path, out: Path, binary: Path, python: Path) -> Iterator[list[Subject]]:
    """Start all subjects; yield them idle."""
    with ExitStack() as started:
        log = started.enter_context((out / "bare.log").open("w"))
        server_log = started.enter_context((out / "llama_cpp.server.log").open("w"))

        def warm() -> subprocess.Popen[str]:
            process = started.enter_context(running([sys.executable, "-m", "bench.peers.bare"], log))
            _line(process)
            return process

        yield [
            Loadstone(started.enter_context(service(models_dir, out))),
            started.enter_context(router(ROUTER, binary, models, out, SAME_SETTINGS)),
            started.enter_context(router(ROUTER_DEFAULTS, binary, models, out, [])),
            PythonServer(python, server_log),
            FreshProcess(FRESH, log),
            WarmProcess(WARM, warm(), "MMAP"),
            WarmProcess(READ, warm(), "NONE"),
            WarmProcess(DIRECT, warm(), "DIRECT_IO"),
            WarmProcess(REPACKED, warm(), "MMAP", repack=True),
        ]
