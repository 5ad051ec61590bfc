"""The compose file, started without containers.

Every service of docker-compose.yml runs as a local process with the command, environment and health check of the file.
Only what containers would provide is translated:

  an image's program        the embedded Redis's binary; `loadstone` of this environment
  host names of services    127.0.0.1, with a free port in place of 6379, 1234 and 1235
  /models, /data, /locks    directories of the test; /run/secrets/NAME is the secret's file
  NVIDIA's GPUs             a host of `tests.support.fakehosts` that has two
  valkey-cli ping           PING over the same TCP port
  depends_on, health        a service starts once its dependencies are healthy

Not covered without containers: the images, networks and ports, users and modes of mounts, and GPU access from within a
container.
"""

from __future__ import annotations

import http.client
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from cli import devredis, up
from shared.settings import Settings
from shared.synthetic import models as synthetic
from tests.support.fakehosts import FakeHost

ROOT = Path(__file__).parents[2]
FILE = ROOT / "docker-compose.yml"
DEADLINE_S = 60


class Stack:
    """The services of the file as processes: those without a profile, and those of the given profile."""

    def __init__(self, directory: Path, profile: str = "") -> None:
        self.file: dict[str, Any] = yaml.safe_load(FILE.read_text())
        self.services = {
            name: s for name, s in self.file["services"].items() if profile in s.get("profiles", [profile])
        }
        self.directory = directory
        self.token = secrets.token_hex(16)
        self.ports = {"6379": free_port(), "1234": free_port()}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.host: FakeHost | None = None
        for name in ("models", "redis", "secrets"):
            (directory / name).mkdir()
        (directory / "secrets/api_tokens").write_text(f"{self.token}\n")
        synthetic.write_demo(directory / "models")

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.ports['1234']}"

    def translate(self, text: str) -> str:
        for old, new in {
            "redis:6379": f"127.0.0.1:{self.ports['6379']}",
            "127.0.0.1:1234": f"127.0.0.1:{self.ports['1234']}",
            "0.0.0.0:1235": "127.0.0.1:0",
            "/run/secrets": str(self.directory / "secrets"),
            "/models": str(self.directory / "models"),
            "/locks": str(self.directory / "locks"),
        }.items():
            text = text.replace(old, new)
        return text

    def start(self, name: str, instance: str) -> None:
        """Start a service; `instance` stands for the host name of its container."""
        service = self.services[name]
        for dependency in service.get("depends_on", {}):
            self.wait_until_healthy(dependency)
        command = [self.translate(word) for word in service["command"]]
        if "build" in service:
            argv = [str(Path(sys.executable).parent / "loadstone"), *command]
        else:
            assert command[0] == "valkey-server"
            private = ["--port", self.ports["6379"], "--bind", "127.0.0.1", "--dir", str(self.directory / "redis")]
            argv = [str(devredis.binary()), *command[1:], *private]
        variables = {key: self.translate(value) for key, value in service.get("environment", {}).items()}
        if name == "api":
            variables["LOADSTONE_PORT"] = self.ports["1234"]
        if name.startswith("worker"):
            variables["LOADSTONE_WORKER_NAME"] = instance
            variables["LOADSTONE_DATA_DIR"] = str(self.directory / instance)
        environ = {key: value for key, value in os.environ.items() if not key.startswith("LOADSTONE_")} | variables
        if service.get("deploy"):
            assert self.host is not None
            environ |= self.host.environ()
        self.processes[instance] = subprocess.Popen(argv, env=environ, cwd=self.directory, stdout=2)

    def is_healthy(self, name: str) -> bool:
        test = self.services[name]["healthcheck"]["test"]
        if test == ["CMD-SHELL", "valkey-cli ping | grep -q PONG"]:
            return answers_pong(int(self.ports["6379"]))
        assert test[:2] == ["CMD", "python3"]
        argv = [sys.executable, *(self.translate(word) for word in test[2:])]
        return subprocess.run(argv, stderr=subprocess.DEVNULL, timeout=DEADLINE_S, check=False).returncode == 0

    def wait_until_healthy(self, name: str) -> None:
        until = time.monotonic() + DEADLINE_S
        while not self.is_healthy(name):
            assert time.monotonic() < until, f"{name} is not healthy"
            assert all(process.poll() is None for process in self.processes.values()), "a service has exited"
            time.sleep(0.1)

    def stop(self, instance: str) -> int:
        """Stop a service as `docker compose stop` does; return the exit status."""
        process = self.processes.pop(instance)
        process.send_signal(signal.SIGTERM)
        name = next(name for name in (instance, instance.rpartition("-")[0]) if name in self.services)
        grace = self.services[name].get("stop_grace_period", "10s")
        return process.wait(float(grace.rstrip("s")))

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait()

    def ask(self, path: str, body: object = None) -> Any:
        """Return the reply to a GET, or to a POST of `body`."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, {"Authorization": f"Bearer {self.token}"})
        request.add_header("Content-Type", "application/json")
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def get(self, path: str, token: str = "") -> int:
        """Return the status of the reply to a GET."""
        request = urllib.request.Request(f"{self.url}{path}")
        if token:
            request.add_header("Authorization", f"Bearer {token}")
        try:
            with urllib.request.urlopen(request, timeout=5) as answer:
                return int(answer.status)
        except urllib.error.HTTPError as e:
            e.close()
            return e.code

    @contextmanager
    def requesting(self) -> Iterator[None]:
        """Have a request in progress: its body does not come."""
        address = urllib.parse.urlsplit(self.url)
        with closing(
            http.client.HTTPConnection(address.hostname or "", address.port, timeout=DEADLINE_S)
        ) as connection:
            connection.putrequest("POST", "/api/v1/models/load")
            connection.putheader("Authorization", f"Bearer {self.token}")
            connection.putheader("Content-Type", "application/json")
            connection.putheader("Content-Length", "2")
            connection.putheader("Expect", "100-continue")
            connection.endheaders()
            assert connection.sock.recv(100).startswith(b"HTTP/1.1 100 ")
            yield


def free_port() -> str:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return str(server.getsockname()[1])


def answers_pong(port: int) -> bool:
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith(b"+PONG")
    except OSError:
        return False


@pytest.fixture
def stack(tmp_path: Path) -> Iterator[Stack]:
    made = Stack(tmp_path)
    yield made
    made.close()


def test_compose_services_become_healthy_and_stop_cleanly(stack: Stack) -> None:
    assert set(stack.services) == {"redis", "api", "worker"}
    stack.start("redis", "redis")
    stack.start("worker", "worker-1")
    stack.start("worker", "worker-2")
    stack.start("api", "api")
    stack.wait_until_healthy("redis")
    stack.wait_until_healthy("api")
    assert stack.get("/readyz") == 200
    assert stack.get("/api/v1/models") == 401
    assert stack.get("/api/v1/models", stack.token) == 200
    assert [stack.stop(name) for name in ("api", "worker-2", "worker-1", "redis")] == [0, 0, 0, 0]


def test_the_api_reaches_workers_without_a_shared_directory(stack: Stack) -> None:
    for name, instance in (("redis", "redis"), ("worker", "worker-1"), ("api", "api")):
        stack.start(name, instance)
    stack.wait_until_healthy("api")
    for path in (stack.directory / "worker-1").glob("worker-*.sock"):
        path.unlink()
    model = "loadstone/demo-llm"
    stack.ask("/api/v1/models/load", {"model": model})
    request = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 4}
    assert stack.ask("/v1/chat/completions", request)["usage"]["completion_tokens"] > 0
    assert [stack.stop(name) for name in ("api", "worker-1", "redis")] == [0, 0, 0]


def test_a_stopping_api_is_unhealthy_first_and_has_time_to_drain(stack: Stack) -> None:
    grace_s = float(stack.services["api"]["stop_grace_period"].rstrip("s"))
    assert grace_s > Settings().drain_s + up.API_GRACE_S
    for name, instance in (("redis", "redis"), ("worker", "worker-1"), ("api", "api")):
        stack.start(name, instance)
    stack.wait_until_healthy("api")
    api = stack.processes["api"]
    with stack.requesting():
        api.send_signal(signal.SIGTERM)
        assert not stack.is_healthy("api")
        assert stack.get("/healthz") == 200
        assert stack.get("/api/v1/models", stack.token) == 200
    assert api.wait(DEADLINE_S) == 0


def test_without_a_worker_the_api_is_alive_but_not_healthy(stack: Stack) -> None:
    stack.start("redis", "redis")
    stack.start("api", "api")
    until = time.monotonic() + DEADLINE_S
    while not is_listening(int(stack.ports["1234"])) and time.monotonic() < until:
        time.sleep(0.05)
    assert stack.get("/healthz") == 200
    assert stack.get("/readyz") == 503
    assert not stack.is_healthy("api")


def is_listening(port: int) -> bool:
    try:
        socket.create_connection(("127.0.0.1", port), timeout=2).close()
    except OSError:
        return False
    return True


def test_with_two_gpus_each_worker_owns_one_and_both_are_used(tmp_path: Path) -> None:
    stack = Stack(tmp_path, "two-gpus")
    stack.host = FakeHost.made(tmp_path / "host", 1 << 30, 1 << 30)
    try:
        assert set(stack.services) == {"redis", "api", "worker", "worker-gpu-0", "worker-gpu-1"}
        for name in ("redis", "worker-gpu-0", "worker-gpu-1", "api"):  # what --scale worker=0 leaves
            stack.start(name, name)
        stack.wait_until_healthy("api")
        until = time.monotonic() + DEADLINE_S
        while len(workers := stack.ask("/api/v1/workers")["workers"]) < 2:
            assert time.monotonic() < until
            time.sleep(0.05)
        owned = {worker["name"]: [device["id"] for device in worker["devices"]] for worker in workers}
        assert owned == {"worker-gpu-0": ["GPU-fake-0"], "worker-gpu-1": ["GPU-fake-1"]}
        for _ in range(2):
            stack.ask("/api/v1/models/load", {"model": "loadstone/demo-llm"})
        models = {model["key"]: model for model in stack.ask("/api/v1/models")["models"]}
        loaded = models["loadstone/demo-llm"]["loaded_instances"]
        assert {(one["worker"], *one["devices"]) for one in loaded} == {
            ("worker-gpu-0", "GPU-fake-0"),
            ("worker-gpu-1", "GPU-fake-1"),
        }
        assert min(stack.host.used_bytes(device.uuid) for device in stack.host.devices()) > 0
        assert [stack.stop(name) for name in ("api", "worker-gpu-1", "worker-gpu-0", "redis")] == [0, 0, 0, 0]
        assert not any(stack.host.used_bytes(device.uuid) for device in stack.host.devices())
    finally:
        stack.close()


@pytest.mark.skipif(not shutil.which("docker"), reason="docker is not installed")
def test_docker_accepts_the_compose_file() -> None:
    compose = subprocess.run(["docker", "compose", "version"], capture_output=True, timeout=30, check=False)
    if compose.returncode:
        pytest.skip("this docker has no compose")
    argv = ["docker", "compose", "--file", str(FILE), "--profile", "*", "config", "--quiet"]
    assert subprocess.run(argv, timeout=30, check=False).returncode == 0
