"""A hub of models on this machine, which misbehaves as a test tells it to."""

from __future__ import annotations

import hashlib
import json
import re
import socket
import ssl
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote, urlsplit

COMMIT = "a" * 40


class LocalHub:
    """Serves repositories of files.  Set its attributes at any time.

    Files are read from a second server, the CDN, to which the hub redirects.
    """

    def __init__(self, tls: ssl.SSLContext | None = None) -> None:
        self.repositories: dict[str, dict[str, Path]] = {}
        self.commit = COMMIT
        self.listed_sizes: dict[str, int] = {}  # lies about the size of a file
        self.listed_hashes: dict[str, str] = {}  # lies about its hash
        self.sent_sizes: dict[str, int] = {}  # what Content-Range says
        self.gated = False
        self.token = ""  # needed to read a gated repository
        self.statuses: list[tuple[int, dict[str, str]]] = []  # replies to the next requests for data
        self.cut_after: list[int] = []  # the next replies with data break after so many bytes
        self.stalls = 0  # the next replies with data stop in their middle, without an end
        self.trickles = False
        self.bytes_s = 0.0  # the rate of a connection; 0: unlimited
        self.holds_at: int | None = None  # bytes after which nothing more is sent, until this is None
        self.ignores_ranges = False
        self.redirect = ""  # where data is, instead of at the CDN
        self.sent: Counter[str] = Counter()  # bytes of each file
        self.requests: list[tuple[str, str, dict[str, str]]] = []  # server, path, headers
        self.released = threading.Event()  # ends stalls
        self._lock = threading.Lock()
        self._servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(self, name)) for name in ("hub", "cdn")]
        for server in self._servers:
            server.daemon_threads = True
            if tls is not None:
                server.socket = tls.wrap_socket(server.socket, server_side=True)
        self.scheme, self.host = ("http", "127.0.0.1") if tls is None else ("https", "localhost")

    @property
    def endpoint(self) -> str:
        return f"{self.scheme}://{self.host}:{self._servers[0].server_address[1]}"

    @property
    def cdn(self) -> str:
        return f"{self.host}:{self._servers[1].server_address[1]}"

    def add(self, repository: str, path: str, file: Path) -> None:
        self.repositories.setdefault(repository, {})[path] = file

    @contextmanager
    def running(self) -> Iterator[LocalHub]:
        threads = [threading.Thread(target=server.serve_forever, args=(0.05,)) for server in self._servers]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            self.released.set()
            for server in self._servers:
                server.shutdown()
                server.server_close()
            for thread in threads:
                thread.join()

    def note(self, server: str, path: str, headers: dict[str, str]) -> None:
        with self._lock:
            self.requests.append((server, path, headers))

    def count(self, path: str, n: int) -> None:
        with self._lock:
            self.sent[path] += n

    def fault(self) -> tuple[tuple[int, dict[str, str]] | None, int | None, bool]:
        """Take the fault of the next reply with data: a status, a length to cut after, whether it stalls."""
        with self._lock:
            if self.statuses:
                return self.statuses.pop(0), None, False
            cut = self.cut_after.pop(0) if self.cut_after else None
            stalls = self.stalls > 0
            self.stalls -= stalls
            return None, cut, stalls


def sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


def _handler(hub: LocalHub, name: str) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            with suppress(ConnectionResetError):  # the client was killed
                super().handle()

        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.note(name, path, {key.lower(): value for key, value in self.headers.items()})
            try:
                self._answer(path)
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        def _answer(self, path: str) -> None:
            if found := re.fullmatch(r"/api/models/(.+)/revision/([^/]+)", path):
                self._list(found[1])
            elif found := re.fullmatch(r"/(.+?/.+?)/resolve/([0-9a-f]+)/(.+)", path):
                if self._is_refused() or found[3] not in hub.repositories.get(found[1], {}):
                    self._reply(404 if not hub.gated else 403, b"", {"X-Error-Code": "GatedRepo"} if hub.gated else {})
                elif name == "hub":
                    self._reply(302, b"", {"Location": hub.redirect or f"{hub.scheme}://{hub.cdn}{self.path}"})
                else:
                    self._send(found[3], hub.repositories[found[1]][found[3]])
            else:
                self._reply(404, b"", {})

        def _is_refused(self) -> bool:
            return name == "hub" and hub.gated and self.headers["Authorization"] != f"Bearer {hub.token}"

        def _list(self, repository: str) -> None:
            files = hub.repositories.get(repository)
            if files is None:
                self._reply(401, b"", {"X-Error-Code": "RepoNotFound"})
            elif self._is_refused():
                self._reply(403, b"", {"X-Error-Code": "GatedRepo"})
            else:
                siblings = []
                for path, file in files.items():
                    size = hub.listed_sizes.get(path, file.stat().st_size)
                    digest = hub.listed_hashes.get(path) or sha256(file)
                    lfs = {"lfs": {"sha256": digest, "size": size, "pointerSize": 134}}
                    siblings.append({"rfilename": path, "size": size} | (lfs if path.endswith(".gguf") else {}))
                data = json.dumps({"id": repository, "sha": hub.commit, "siblings": siblings}).encode()
                self._reply(200, data, {"Content-Type": "application/json"})

        def _reply(self, status: int, data: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def _send(self, path: str, file: Path) -> None:
            wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"] or "")
            size = file.stat().st_size
            is_data = wanted is None or wanted[2] != "0"
            status, cut, stalls = hub.fault() if is_data else (None, None, False)
            if status is not None:
                self._reply(status[0], b"", status[1])
                return
            start, end = (0, size) if wanted is None or hub.ignores_ranges else (int(wanted[1]), int(wanted[2]) + 1)
            end = min(end, size)
            self.send_response(200 if start == 0 and end == size and hub.ignores_ranges else 206)
            if not hub.ignores_ranges:
                self.send_header("Content-Range", f"bytes {start}-{end - 1}/{hub.sent_sizes.get(path, size)}")
            self.send_header("Content-Length", str(end - start))
            self.end_headers()
            stop = end if cut is None else min(end, start + cut)
            with file.open("rb") as data:
                self._copy(path, data, start, (start + stop) // 2 if stalls else stop, counts=is_data)
            if stalls:
                hub.released.wait()
            if stalls or stop < end:
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)

        def _copy(self, path: str, file: BinaryIO, at: int, stop: int, *, counts: bool) -> None:
            self.wfile.flush()
            while at < stop:
                while counts and hub.holds_at is not None and hub.sent.total() >= hub.holds_at:
                    if hub.released.wait(0.05):
                        return
                step = 1 if hub.trickles else min(1 << 20, int(hub.bytes_s) // 20 or 1 << 20)
                n = min(step, stop - at)
                if counts:
                    hub.count(path, n)  # before it is sent: the test may read the number as soon as it has the data
                at += self.connection.sendfile(file, at, n)
                if hub.trickles or hub.bytes_s:
                    time.sleep(0.05)
                    if hub.released.is_set():
                        return

    return Handler
