"""A relay in the place of a worker's socket, which breaks the connections of API processes to runners."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


class Relay:
    """Forwards connections from `path`, in a thread of its own, and cuts all of them every `every_s` seconds."""

    def __init__(self, path: Path, behind: Path, every_s: float) -> None:
        self.n_cut = 0
        self._path, self._behind, self._every_s = path, behind, every_s
        self._loop = asyncio.new_event_loop()
        self._cutting = True
        self._writers: set[asyncio.StreamWriter] = set()
        self._is_open = threading.Event()
        self._over = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_until_complete, args=(self._run(),))

    def start(self) -> None:
        self._thread.start()
        self._is_open.wait()

    def spare(self) -> None:
        """Cut no more."""
        self._cutting = False

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._over.set)
        self._thread.join()
        self._loop.close()

    async def _run(self) -> None:
        server = await asyncio.start_unix_server(self._connected, self._path)
        self._is_open.set()
        while not self._over.is_set():
            with suppress(TimeoutError):
                await asyncio.wait_for(self._over.wait(), self._every_s)
            if self._cutting or self._over.is_set():
                self._cut()
        server.close()
        await asyncio.wait([one for one in asyncio.all_tasks() if one is not asyncio.current_task()] or [_nothing()])

    def _cut(self) -> None:
        for writer in self._writers:
            self.n_cut += 1
            writer.transport.abort()
        self._writers.clear()

    async def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inward, outward = await asyncio.open_unix_connection(self._behind)
        self._writers |= {writer, outward}
        await asyncio.gather(_pump(reader, outward), _pump(inward, writer))


def _nothing() -> asyncio.Task[None]:
    return asyncio.ensure_future(asyncio.sleep(0))


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
    writer.transport.abort()


@contextmanager
def cutting(path: Path, every_s: float) -> Iterator[Relay]:
    """Put a relay in the place of a Unix socket for the block.  Connections that are open stay as they are."""
    behind = path.with_suffix(".behind")
    path.rename(behind)
    relay = Relay(path, behind, every_s)
    relay.start()
    try:
        yield relay
    finally:
        relay.stop()
        behind.rename(path)


def with_a_small_buffer(port: int) -> socket.socket:
    """Connect as a client whose kernel takes little that it has not read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
    connection.connect(("127.0.0.1", port))
    return connection
