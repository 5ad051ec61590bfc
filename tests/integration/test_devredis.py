"""The embedded Redis: the real server with the command line of `loadstone up`."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

from cli import devredis
from cli.devredis import RedisUnavailable, Server
from tests.support.service import open_files


@contextmanager
def running(server: Server) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(server.argv, pass_fds=server.pass_fds, stderr=subprocess.DEVNULL, stdout=2) as process:
        try:
            wait_for_answer(server)
            yield process
        finally:
            process.terminate()


def wait_for_answer(server: Server) -> None:
    until = time.monotonic() + 60
    while reason := asyncio.run(devredis.missing(server.socket)):
        assert time.monotonic() < until, reason
        time.sleep(0.01)


def write_server(directory: Path, name: str, printed: str) -> Path:
    path = directory / name
    path.write_text(f"#!/bin/sh\necho '{printed}'\n")
    path.chmod(0o755)
    return path


def test_the_server_has_a_private_socket_and_keeps_its_data(tmp_path: Path) -> None:
    data = tmp_path / "data dir %20?"  # the URL has to quote these characters
    data.mkdir()
    with devredis.prepared(data) as server, running(server) as process:
        mode = stat.S_IMODE(server.socket.stat().st_mode)
        parent = stat.S_IMODE(server.socket.parent.stat().st_mode)
        assert (mode, parent) == (0o700, 0o700)
        with redis.Redis.from_url(server.url) as client:
            client.set("kept", "yes")
            config = client.config_get("*")
            assert config["maxmemory-policy"] == "noeviction"
            assert config["port"] == "0"
        assert listens_on_no_port(process.pid)
    with devredis.prepared(data) as server, running(server), redis.Redis.from_url(server.url) as client:
        assert client.get("kept") == b"yes"


def listens_on_no_port(pid: int) -> bool:
    tables = (Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:] for name in ("tcp", "tcp6"))
    listening = {line.split()[9] for table in tables for line in table if line.split()[3] == "0A"}
    held = {file.removeprefix("socket:[").rstrip("]") for file in open_files(pid)}
    return not listening & held


def test_a_long_data_directory_gets_a_short_socket_path(tmp_path: Path) -> None:
    data = tmp_path / ("d" * 120)
    data.mkdir()
    with devredis.prepared(data) as server, running(server):
        assert len(os.fsencode(server.socket)) <= 107
        assert stat.S_IMODE(server.socket.parent.stat().st_mode) == 0o700
    assert not server.socket.parent.exists()


def test_a_directory_whose_name_is_not_utf_8_is_refused(tmp_path: Path) -> None:
    data = tmp_path / os.fsdecode(b"\xff")
    data.mkdir()
    with pytest.raises(RedisUnavailable, match=r"\\udcff.* is not UTF-8"), devredis.prepared(data):
        pass


def test_a_second_server_never_joins_an_orphaned_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devredis, "HANDOVER_S", 0.2)
    with devredis.prepared(tmp_path) as server:
        orphan = subprocess.Popen(server.argv, pass_fds=server.pass_fds, stderr=subprocess.DEVNULL, stdout=2)
    try:
        with pytest.raises(RedisUnavailable, match="Another embedded Redis"), devredis.prepared(tmp_path):
            pass
    finally:
        orphan.send_signal(signal.SIGKILL)
        orphan.wait()
    with devredis.prepared(tmp_path) as server, running(server):
        pass


def test_a_server_waits_for_an_older_one_to_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with devredis.prepared(tmp_path) as server:
        leave = ["sh", "-c", f"sleep 0.3; touch {tmp_path}/left"]
        leaving = subprocess.Popen(leave, pass_fds=server.pass_fds)
    monkeypatch.setattr(devredis, "HANDOVER_S", 60.0)
    with leaving, devredis.prepared(tmp_path):
        assert (tmp_path / "left").exists()


def test_a_directory_of_another_owner_is_refused(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "redis").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(RedisUnavailable, match="not a directory of this user"), devredis.prepared(tmp_path):
        pass


@pytest.mark.parametrize(
    ("name", "printed", "is_used"),
    [
        ("redis-server", "Redis server v=7.0.15 sha=00000000:0 malloc=jemalloc-5.3.0 bits=64 build=2b8", True),
        ("redis-server", "Redis server v=6.2.0 sha=00000000:0 malloc=libc bits=64 build=1", True),
        ("redis-server", "Redis server v=6.0.16 sha=00000000:0 malloc=jemalloc-5.2.1 bits=64 build=a3f", False),
        ("valkey-server", "Valkey server v=8.1.8 sha=00000000:1 malloc=libc bits=64 build=1536", True),
        ("redis-server", "not a Redis version", False),
    ],
)
def test_the_server_of_the_host_is_used_if_new_enough(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, printed: str, is_used: bool
) -> None:
    server = write_server(tmp_path, name, printed)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert (devredis.binary() == server) is is_used
    assert os.access(devredis.binary(), os.X_OK)


@pytest.mark.parametrize(
    ("reply", "missing"),
    [(b"+PONG\r\n", None), (b"-LOADING reading\r\n", "it answers '-LOADING reading'"), (b"", "it answers ''")],
)
async def test_only_pong_means_ready(tmp_path: Path, reply: bytes, missing: str | None) -> None:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readline()
        writer.write(reply)
        writer.close()

    path = tmp_path / "s"
    async with await asyncio.start_unix_server(serve, path):
        assert await devredis.missing(path) == missing


async def test_a_silent_or_absent_server_counts_as_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devredis, "ANSWER_S", 0.1)
    assert await devredis.missing(tmp_path / "absent")
    with socket.socket(socket.AF_UNIX) as silent:
        silent.bind(str(tmp_path / "silent"))
        silent.listen()
        assert await devredis.missing(tmp_path / "silent") == "its socket does not answer (TimeoutError)"
