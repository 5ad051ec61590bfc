"""Loadstone as users run it: real processes on a free port, used over HTTP, stopped by a signal."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import httpx
import msgspec
from prometheus_client.parser import text_string_to_metric_families
from redis import Redis

from cli import devredis
from shared.instance import Instance
from shared.synthetic import architectures, tokenizers
from shared.synthetic import models as synthetic

LOADSTONE = Path(sys.executable).with_name("loadstone")
START_S, STOP_S = 60.0, 60.0
PATIENCE_S = 60.0  # ends a hang; far above what anything takes on a busy machine
POLL_S = 0.02
WITHOUT_EXPIRY = {b"insts", b"names", b"workers", b"counters", b"tallies", b"queued"}
NO_INDEX = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""}  # --demo does without the model that it would download
NO_HUB = "http://127.0.0.1:9"  # nobody listens there
JSON = {"Content-Type": "application/json"}
LOAD, STATUS = "/api/v1/models/load", "/api/v1/models/load/status"
TINY = "acme/tiny"  # the model of a service that needs only one
DIRECTORY = re.compile(r"(?<![\w.:/])/[\w.+-]+/[\w.+-]+")  # the start of an absolute path of two parts or more
# Of the server that forks runners, in multiprocessing, if its worker is killed while it asks for a fork.
KILLED_WHILE_FORKING = re.compile(
    r"Traceback \(most recent call last\):\n(?:  .*\n)*  .*multiprocessing/forkserver\.py.*\n(?:  .*\n)*EOFError.*\n"
)

T = TypeVar("T")


def until(condition: Callable[[], T | None], what: str, within_s: float = PATIENCE_S) -> T:
    """Call `condition` until it returns a true value, and return that; fail if there is none in time."""
    deadline = time.monotonic() + within_s
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < deadline, f"not within {within_s:g} s: {what}"
        time.sleep(POLL_S)


# ---- processes


class Process(NamedTuple):
    pid: int
    started: int  # clock ticks since boot: together with the pid it identifies a process
    parent: int
    words: tuple[str, ...]


def stat_fields(pid: int | str) -> list[str] | None:
    """Return the fields of /proc/PID/stat after the name: state, parent, ..."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def all_stopped(pid: int) -> bool:
    """Return whether SIGSTOP has reached every thread: a running thread could still answer."""
    states = [stat_fields(f"{pid}/task/{thread.name}") for thread in Path(f"/proc/{pid}/task").iterdir()]
    return all(stat is not None and stat[0] == "T" for stat in states)


def processes() -> list[Process]:
    running = []
    for entry in Path("/proc").iterdir():
        stat = stat_fields(entry.name) if entry.name.isdigit() else None
        if stat is None or stat[0] in "ZX":
            continue
        try:
            words = tuple((entry / "cmdline").read_bytes().decode(errors="replace").split("\0"))
        except (FileNotFoundError, ProcessLookupError):
            continue
        running.append(Process(int(entry.name), int(stat[19]), int(stat[1]), words))
    return running


def below(pid: int) -> list[Process]:
    """Return all descendants of a process."""
    everything = processes()
    descendants: list[Process] = []
    parents = {pid}
    while parents:
        layer = [process for process in everything if process.parent in parents]
        descendants += layer
        parents = {process.pid for process in layer}
    return descendants


def is_alive(process: Process) -> bool:
    stat = stat_fields(process.pid)
    return stat is not None and int(stat[19]) == process.started and stat[0] not in "ZX"


def open_files(pid: int, above: int = -1) -> list[str]:
    """Return what the descriptors of a process refer to, without those that it closes meanwhile."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):
            if int(entry.name) > above:
                found.append(str(entry.readlink()))
    return found


def go_on(process: Process) -> None:
    """Resume a stopped process if it still exists."""
    if is_alive(process):
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGCONT)


def wait_gone(group: list[Process], within_s: float = PATIENCE_S) -> None:
    deadline = time.monotonic() + within_s
    while left := [" ".join(process.words)[:200] for process in group if is_alive(process)]:
        assert time.monotonic() < deadline, f"not gone within {within_s:g} s: {left}"
        time.sleep(POLL_S)


class Running:
    """A `loadstone` command in the background, with its output in files."""

    def __init__(
        self, directory: Path, *words: str, environ: Mapping[str, str] = {}, prefix: Sequence[str] = ()
    ) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)
        self._out, self._err = directory / "stdout", directory / "stderr"
        ours = {"HOME": str(directory), "HF_ENDPOINT": NO_HUB, **NO_INDEX, **environ}
        with self._out.open("w") as out, self._err.open("w") as err:
            self.popen = subprocess.Popen(
                [*prefix, str(LOADSTONE), *words],
                env={name: value for name, value in os.environ.items() if not name.startswith("LOADSTONE_")} | ours,
                cwd=directory,
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
            )

    @property
    def stdout(self) -> str:
        return self._out.read_text()

    @property
    def stderr(self) -> str:
        return self._err.read_text()

    def first_line(self) -> str:
        until(lambda: "\n" in self.stdout or self.popen.poll() is not None, "a line on stdout", START_S)
        assert "\n" in self.stdout, self.stderr
        return self.stdout.splitlines()[0]

    def tree(self) -> list[Process]:
        return below(self.popen.pid)

    def worker(self) -> Process:
        return until(lambda: next((p for p in self.tree() if p.words[2:4] == ("-m", "worker")), None), "a worker")

    def runners(self) -> list[Process]:
        """Return the processes that hold models and the warm one, oldest first."""
        tree = [process for process in self.tree() if any("multiprocessing.forkserver" in w for w in process.words)]
        pids = {process.pid for process in tree}
        servers = {process.pid for process in tree if process.parent not in pids}  # a runner has children of its own
        return sorted((process for process in tree if process.parent in servers), key=lambda p: (p.started, p.pid))

    def warm_runner(self, loaded: int) -> Process:
        """Wait until the runner of the next load is idle, beside `loaded` that hold models; return it."""
        last: list[tuple[int, tuple[str, ...]]] = []

        def idle() -> Process | None:
            runners = self.runners()
            if len(runners) != loaded + 1:
                return None
            stat = stat_fields(runners[-1].pid)
            now = (runners[-1].pid, tuple(stat[11:13])) if stat and stat[0] == "S" else (0, ())
            last.append(now)
            return runners[-1] if now[0] and last[-10:] == [now] * 10 else None

        return until(idle, f"{loaded + 1} runners, the last one warm")

    @contextmanager
    def frozen(self, loaded: int = 0) -> Iterator[Process]:
        """Stop the runner of the next load: that load stays `loading` until the end of the block."""
        runner = self.warm_runner(loaded)
        os.kill(runner.pid, signal.SIGSTOP)
        until(lambda: all_stopped(runner.pid), "every thread of the runner stopped")
        try:
            yield runner
        finally:
            with suppress(ProcessLookupError):  # its pid is not reused until the worker has reaped it
                os.kill(runner.pid, signal.SIGCONT)

    def stop(self, signum: signal.Signals = signal.SIGTERM) -> None:
        """Stop the command as an operator does; check its exit status, and that no process is left."""
        tree = self.tree()
        self.popen.send_signal(signum)
        status = self.popen.wait(STOP_S)
        assert status == 0, self.stderr
        wait_gone(tree)
        stderr = KILLED_WHILE_FORKING.sub("", self.stderr)
        assert "Traceback" not in stderr, stderr[stderr.index("Traceback") :][:4000]

    def kill(self) -> None:
        """Kill the command and its descendants, for the end of a failed test."""
        tree = self.tree()
        if self.popen.poll() is None:
            self.popen.kill()
        self.popen.wait(STOP_S)
        for process in tree:
            with suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
        wait_gone(tree)


# ---- HTTP


class Reply(NamedTuple):
    status: int
    headers: httpx.Headers
    text: str

    def json(self) -> Any:
        return json.loads(self.text)


class SentEvent(NamedTuple):
    id: str
    name: str
    data: Any


class Client:
    """A client of one service; keeps no connection between requests."""

    def __init__(self, url: str, token: str = "") -> None:
        self.url = url
        self.token = token
        authorization = {"Authorization": f"Bearer {token}"} if token else {}
        self._http = httpx.Client(
            base_url=url,
            headers=authorization,
            timeout=PATIENCE_S,
            trust_env=False,
            verify=False,
            limits=httpx.Limits(max_keepalive_connections=0),
        )

    @property
    def port(self) -> int:
        return httpx.URL(self.url).port or 80

    def send(self, method: str, path: str, **options: Any) -> Reply:
        answer = self._http.request(method, path, **options)
        return Reply(answer.status_code, answer.headers, answer.text)

    def post(self, path: str, body: object) -> Reply:
        """Send `body` as JSON, or unchanged if it is bytes."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.send("POST", path, content=content, headers=JSON)

    def load(self, model: str, **fields: object) -> Reply:
        return self.post(LOAD, {"model": model, **fields})

    def loaded(self, model: str, **fields: object) -> Any:
        """Return the reply to a load that must succeed."""
        reply = self.load(model, **fields)
        assert reply.status == 200, reply.text
        return reply.json()

    def accepted(self, model: str, **fields: object) -> Any:
        """Send a load without waiting for it; return its job."""
        body = json.dumps({"model": model, **fields}).encode()
        reply = self.send("POST", LOAD, content=body, headers={**JSON, "Prefer": "respond-async"})
        assert reply.status == 202, reply.text
        return reply.json()

    def job(self, job_id: str, wait_s: int = 0) -> Any:
        reply = self.send("GET", f"{STATUS}/{job_id}", params={"wait": wait_s} if wait_s else None)
        assert reply.status == 200, reply.text
        return reply.json()

    def cancel(self, job_id: str) -> Reply:
        return self.send("DELETE", f"{STATUS}/{job_id}")

    def events(self, job_id: str, after: str = "") -> Iterator[SentEvent]:
        """Yield the events of a job as they arrive."""
        return self.stream("GET", f"{STATUS}/{job_id}/events", headers={"Last-Event-ID": after} if after else {})

    def stream(self, method: str, path: str, **options: Any) -> Iterator[SentEvent]:
        """Yield the events of a reply, which must be an event stream, up to its end, without comments."""
        with self._http.stream(method, path, **options) as answer:
            assert answer.status_code == 200, answer.read()
            assert answer.headers["content-type"].startswith("text/event-stream")
            fields: dict[str, str] = {}
            for line in answer.iter_lines():
                name, _, value = line.partition(": ")
                if name:
                    fields[name] = value
                elif "data" in fields:
                    yield SentEvent(fields.get("id", ""), fields["event"], json.loads(fields["data"]))
                    fields = {}

    def unload(self, instance_id: str) -> Reply:
        return self.post("/api/v1/models/unload", {"instance_id": instance_id})

    def models(self) -> dict[str, Any]:
        """Return the listed models by key."""
        reply = self.send("GET", "/api/v1/models")
        assert reply.status == 200, reply.text
        assert set(reply.json()) == {"models"}
        return {model["key"]: model for model in reply.json()["models"]}

    def instances(self) -> dict[str, Any]:
        """Return the instances that are loaded and usable, by id."""
        return {instance["id"]: instance for model in self.models().values() for instance in model["loaded_instances"]}

    def metric(self, name: str, **labels: str) -> float:
        """Read the sample of /metrics with this name and at least these labels; fail if there is not exactly one."""
        families = text_string_to_metric_families(self.send("GET", "/metrics").text)
        samples = [sample for family in families for sample in family.samples if sample.name == f"loadstone_{name}"]
        (value,) = (sample.value for sample in samples if labels.items() <= sample.labels.items())
        return float(value)

    def unload_all(self) -> None:
        for instance_id in self.instances():
            reply = self.unload(instance_id)
            assert reply.status == 200, reply.text

    def shell(self, command: str) -> Reply:
        """Run a `curl` command of the documentation verbatim; only its connection goes to this service."""
        options = f"--silent --show-error --include --noproxy '*' --connect-to localhost:1234:127.0.0.1:{self.port}"
        done = subprocess.run(
            ["bash", "-c", f'curl() {{ command curl {options} "$@"; }}\n{command}'],
            env={**os.environ, "LM_API_TOKEN": self.token},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        head, _, body = done.stdout.partition("\n\n")
        status, *headers = head.splitlines()
        fields = [line.partition(": ") for line in headers]
        return Reply(int(status.split()[1]), httpx.Headers([(name, value) for name, _, value in fields]), body)

    def raw(self, request: bytes) -> bytes:
        """Send these bytes; return everything received until the server closes the connection."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=PATIENCE_S) as connection:
            connection.sendall(request)
            chunks = []
            while chunk := connection.recv(1 << 16):
                chunks.append(chunk)
            return b"".join(chunks)

    def close(self) -> None:
        self._http.close()


def error(reply: Reply, status: int, kind: str, code: str | None = None, param: str | None = None) -> Any:
    """Check that a reply is this error, in the common format and without a path of a directory; return the error."""
    assert reply.status == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    assert set(reply.json()) == {"error"}
    fields = reply.json()["error"]
    assert set(fields) <= {"type", "message", "code", "param", "detail"}
    assert (fields["type"], fields.get("code"), fields.get("param")) == (kind, code, param), reply.text
    assert fields["message"]
    assert kind in ("not_found", "method_not_allowed") or not DIRECTORY.search(reply.text), reply.text
    assert "Traceback" not in reply.text
    return fields


def openai_error(reply: Reply, status: int, kind: str, code: str | None, param: str | None = None) -> str:
    """Check that a reply is this error in the form of OpenAI's API, which has all fields; return its message."""
    assert reply.status == status, reply.text
    assert reply.headers["content-type"] == "application/json"
    (fields,) = reply.json().values()
    assert fields == {"message": fields["message"], "type": kind, "param": param, "code": code}
    return str(fields["message"])


@contextmanager
def meanwhile(function: Callable[..., T], *args: object, **fields: object) -> Iterator[Future[T]]:
    """Call a function in a thread during the block; yield its future."""
    with ThreadPoolExecutor(1) as pool:
        yield pool.submit(function, *args, **fields)


# ---- `loadstone up`


class Service(Running, Client):
    """`loadstone up` with its own directories."""

    def __init__(
        self, directory: Path, *words: str, models: Path | None = None, token: str = "", **variables: str
    ) -> None:
        self.models_dir = models or directory / "models"
        self.models_dir.mkdir(parents=True, exist_ok=True)
        self.data_dir = directory / "data"
        flags = ("--port", "0", "--models-dir", str(self.models_dir), "--data-dir", str(self.data_dir))
        Running.__init__(self, directory, "up", *flags, *words, environ=variables)
        try:
            line = self.first_line()
            assert re.fullmatch(r"ready: http://\S+:\d+", line), line
            Client.__init__(self, line.removeprefix("ready: "), token)
        except BaseException:
            self.kill()
            raise

    def state(self, instance_id: str) -> str | None:
        """Return the state of a live instance in Redis, or None."""
        with self.redis() as redis:
            return state(redis, instance_id)

    def wanted(self) -> list[str]:
        """Return the ids of the instances that the worker's file lists to be restored."""
        files = self.data_dir.glob("wanted-*.json")
        return [
            one.instance_id for file in files for one in msgspec.json.decode(file.read_bytes(), type=list[Instance])
        ]

    @contextmanager
    def redis(self) -> Iterator[Redis]:
        with Redis(unix_socket_path=str(self.data_dir / "redis/redis.sock")) as redis:
            yield redis


def state(redis: Redis, instance_id: str) -> str | None:
    id_: Any = redis.hget("names", instance_id)
    doc: Any = id_ and redis.hget(f"inst:{id_.decode()}", "doc")
    return msgspec.msgpack.decode(doc, type=Instance).state.value if doc else None


def check_keys(redis: Redis) -> None:
    """Check that every key of Redis expires, except those that `shared.store` keeps."""
    live = {b"inst:" + id_ for id_ in redis.sscan_iter("insts")}
    known = WITHOUT_EXPIRY | live | {key + b":log" for key in live}
    forever = [key for key in redis.scan_iter() if redis.ttl(key) == -1]
    queues = (b"arq:queue:", b"queued:", b"insts:", b"copies:")
    unknown = [key for key in forever if key not in known and not key.startswith(queues)]
    assert not unknown


@contextmanager
def up(
    directory: Path, *words: str, models: Path | None = None, token: str = "", **variables: str
) -> Iterator[Service]:
    """Run `loadstone up` for the block; then stop it, unless it was stopped, and check that nothing is left."""
    service = Service(directory, *words, models=models, token=token, **variables)
    try:
        yield service
        if service.popen.poll() is None:
            with service.redis() as redis:
                check_keys(redis)
            service.stop()
        assert len(service.stdout.splitlines()) == 1, service.stdout
    finally:
        service.close()
        service.kill()


# ---- an external Redis


class RedisServer:
    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True)
        self.directory, self.socket = directory, directory / "s"
        self.start()

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    def start(self) -> None:
        options = {
            "port": "0",
            "unixsocket": str(self.socket),
            "dir": str(self.directory),
            "save": "",
            "loglevel": "warning",
        }
        words = [word for name, value in {**options, "appendonly": "yes"}.items() for word in (f"--{name}", value)]
        with (self.directory / "log").open("a") as log:
            self.popen = subprocess.Popen([str(devredis.binary()), *words], stdout=log, stderr=log)
        until(self._answers, "PONG")

    def _answers(self) -> bool:
        with suppress(Exception), self.client() as redis:
            return bool(redis.ping())
        return False

    @contextmanager
    def client(self) -> Iterator[Redis]:
        with Redis(unix_socket_path=str(self.socket)) as redis:
            yield redis

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait()


# ---- models that shared.synthetic.models does not have


def tiny_quantized(path: Path, quantization: str, context_length: int = 4096) -> Path:
    """Write a tiny llama with weights of this quantization."""
    model = architectures.decoder(architectures.TINY, tokenizers.spm(), quantization)
    model.metadata["llama.context_length"] = context_length
    return synthetic._write_one(path, synthetic._model(model, "Tiny Llama", quantization))
