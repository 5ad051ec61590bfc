"""Clients that stop reading an event stream: the kernel cuts them off, and other clients are not affected."""

from __future__ import annotations

import socket
from pathlib import Path

from shared.synthetic import models as synthetic
from tests.support.service import STATUS, TINY, until, up

READERS = 5


def test_readers_that_stop_reading_are_cut_off(tmp_path: Path) -> None:
    synthetic.tiny_llama(tmp_path / f"models/{TINY}/tiny-f16.gguf")
    with up(tmp_path, LOADSTONE_WAITING_LIMIT=str(READERS)) as service, service.frozen():
        job = service.accepted(TINY)["job_id"]
        until(lambda: service.job(job)["status"] == "loading", "the job is loading")
        with service.redis() as redis:  # a log larger than the buffers of the sockets
            fields = {"rev": "1", "doc": redis.hget(f"inst:{job}", "doc")}
            pipe = redis.pipeline()
            for _ in range(30_000):
                pipe.xadd(f"inst:{job}:log", fields)  # type: ignore[arg-type]
            pipe.execute()
        path = f"{STATUS}/{job}/events"
        readers = []
        for _ in range(READERS):
            readers.append(socket.socket())
            readers[-1].setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            readers[-1].connect(("127.0.0.1", service.port))
            readers[-1].sendall(f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        poll = {"params": {"wait": 1}}
        until(lambda: service.send("GET", f"{STATUS}/{job}", **poll).status == 429, "all slots are taken")
        assert service.job(job)["status"] == "loading"
        until(lambda: service.send("GET", f"{STATUS}/{job}", **poll).status == 200, "the readers are cut off", 60)
        for reader in readers:
            reader.close()
        assert "Traceback" not in service.stderr
        assert service.cancel(job).status == 200
