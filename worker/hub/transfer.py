"""Transfers a file from the hub over several connections, so that a killed process loses almost nothing.

Beside the partial file lies one that says how much of each piece is there.  Both are written with pwrite(2), so that
what a process had received is still known after SIGKILL.  After a crash of the machine they may contradict each other:
the checksum shows that, and the file is fetched once more.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from shared import libc
from shared.errors import DownloadFailed
from worker.hub.choice import RemoteFile
from worker.hub.client import Gone, Hub
from worker.hub.connection import Unavailable

PIECE_BYTES = 32 << 20  # takes long against the latency of a request, on fast connections too
HASHED_BYTES = 1 << 20
# Whose writing to the disk is begun at once.  With 8 MiB, the threads that receive wait for it, spinning in the kernel:
# twice the system time for 4 GiB.
WRITTEN_BYTES = 32 << 20
GOT = struct.Struct("<I")
SLOW_BYTES_S = 4096  # a connection below this rate is replaced
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0


class Corrupt(Exception):
    """The file has another SHA-256 than the hub says.  `is_resumed`: a part of it came from an earlier process."""

    def __init__(self, sentence: str, *, is_resumed: bool) -> None:
        super().__init__(sentence)
        self.is_resumed = is_resumed


class Partial:
    """A file of which some pieces are there.  Its methods may be called by several threads."""

    def __init__(self, path: Path, size: int) -> None:
        """Open the partial file and reserve its whole size.  Raises OSError."""
        self.size = size
        self.grown = threading.Condition()  # notified when more is there without a gap from the start
        self._started = 0  # up to here, the kernel has begun to write
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
        try:
            self._table = os.open(table_of(path), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError:
            os.close(self._fd)
            raise
        try:
            if size:
                os.posix_fallocate(self._fd, 0, size)
            os.ftruncate(self._fd, size)
            raw = os.pread(self._table, GOT.size * self.n_pieces, 0).ljust(GOT.size * self.n_pieces, b"\0")
        except OSError:
            self.close()
            raise
        self.got: list[int] = [min(got, self.length(i)) for i, (got,) in enumerate(GOT.iter_unpack(raw))]
        self.bytes = sum(self.got)  # that are there
        self._first = 0  # no piece before it lacks anything

    @property
    def n_pieces(self) -> int:
        return -(-self.size // PIECE_BYTES)

    def length(self, piece: int) -> int:
        return min(PIECE_BYTES, self.size - piece * PIECE_BYTES)

    def is_complete(self, piece: int) -> bool:
        return self.got[piece] == self.length(piece)

    def write(self, position: int, data: memoryview) -> None:
        """Write data that follows what is there; ignore what is there already.  Raises OSError."""
        while data:
            piece, offset = divmod(position, PIECE_BYTES)
            now, rest = data[: PIECE_BYTES - offset], data[PIECE_BYTES - offset :]
            new = now[max(0, self.got[piece] - offset) :]
            at = position + len(now) - len(new)
            while new:
                written = os.pwrite(self._fd, new, at)
                at, new = at + written, new[written:]
            if (got := offset + len(now)) > self.got[piece]:
                # Not in the lock: whoever waits for that would wait for the interpreter, too.
                os.pwrite(self._table, GOT.pack(got), GOT.size * piece)
                with self.grown:
                    n_new = max(0, got - self.got[piece])  # another thread may have written more meanwhile
                    self.bytes += n_new
                    self.got[piece] += n_new
                    if piece == self._first:
                        self.grown.notify_all()
            position, data = position + len(now), rest

    def read(self, position: int, buffer: memoryview) -> int:
        return os.preadv(self._fd, [buffer], position)

    def frontier(self) -> int:
        """Return how many bytes are there without a gap from the start.  Call it with `grown` held."""
        while self._first < self.n_pieces and self.is_complete(self._first):
            self._first += 1
        return self.size if self._first == self.n_pieces else self._first * PIECE_BYTES + self.got[self._first]

    def forget(self) -> None:
        """Forget what is there, so that all of it is fetched again.  Raises OSError."""
        os.ftruncate(self._table, 0)
        self.got, self.bytes = [0] * self.n_pieces, 0
        self._first = self._started = 0

    def start_writing(self, end: int) -> None:
        """Have the kernel begin to write the file up to `end` to the disk, so that `sync` has less to wait for."""
        if end - self._started >= WRITTEN_BYTES or end == self.size:
            with suppress(OSError):  # `sync` will report it
                libc.start_writing(self._fd, self._started, end - self._started)
            self._started = end

    def sync(self) -> None:
        """Write the file to the disk.  Raises OSError."""
        os.fsync(self._fd)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._table)


def table_of(path: Path) -> Path:
    return path.with_name(f"{path.name}.pieces")


@contextmanager
def opened(path: Path, size: int) -> Iterator[Partial]:
    partial = Partial(path, size)
    try:
        yield partial
    finally:
        partial.close()


def discard(path: Path) -> None:
    """Remove a partial file, so that it is fetched from its start."""
    table_of(path).unlink(missing_ok=True)
    path.unlink(missing_ok=True)


class Transfer:
    """Fetches one file of a repository at a commit."""

    def __init__(
        self, hub: Hub, repository: str, commit: str, file: RemoteFile, *, connections: int, patience_s: float
    ) -> None:
        """`patience_s`: time without a byte after which the transfer fails."""
        self._hub, self._repository, self._commit, self._file = hub, repository, commit, file
        self._connections, self._patience_s = connections, patience_s
        self._url = ""
        self._locating = threading.Lock()
        self._whole = threading.Lock()
        self._ignores_ranges = False
        self._stop = threading.Event()
        self._last = time.monotonic()  # when bytes came last

    def run(self, partial: Partial) -> None:
        """Fetch what is missing, verify the whole, and write it to the disk.

        Raises Corrupt, DownloadFailed, ModelNotFound and OSError.
        """
        is_resumed = partial.bytes > 0
        missing = iter([i for i in range(partial.n_pieces) if not partial.is_complete(i)])
        taking = threading.Lock()

        def taken() -> int | None:
            with taking:
                return next(missing, None)

        def work() -> None:
            while not self._stop.is_set() and (piece := taken()) is not None:
                self._fill(partial, piece)

        with ThreadPoolExecutor(self._connections + 1) as pool:
            hashing = pool.submit(self._hashed, partial) if self._file.sha256 else None
            jobs = [pool.submit(work) for _ in range(self._connections)]
            ends: list[Future[Any]] = [*jobs, hashing] if hashing else [*jobs]
            done, _ = wait(ends, return_when=FIRST_EXCEPTION)
            self._stop.set()
            with partial.grown:
                partial.grown.notify_all()
            for job in done:
                job.result()
            digest = hashing.result() if hashing else None
        if digest != self._file.sha256:
            raise Corrupt(
                f"'{self._file.path}' has the SHA-256 {digest}, but the hub says {self._file.sha256}.",
                is_resumed=is_resumed,
            )
        partial.sync()

    def _hashed(self, partial: Partial) -> str:
        """Hash the file as it grows, while its pages are still in memory.  Ends early if the transfer stops."""
        digest, at = hashlib.sha256(), 0
        buffer = memoryview(bytearray(HASHED_BYTES))
        while at < partial.size:
            with partial.grown:
                while (frontier := partial.frontier()) == at and not self._stop.is_set():
                    partial.grown.wait()
            if frontier == at:
                break
            while at < frontier:
                n = partial.read(at, buffer[: min(HASHED_BYTES, frontier - at)])
                if not n:
                    raise OSError(f"the partial file ends at {at:,} bytes")
                digest.update(buffer[:n])
                at += n
            partial.start_writing(at)
        return digest.hexdigest()

    def _fill(self, partial: Partial, piece: int) -> None:
        """Fetch the rest of a piece.  Raises DownloadFailed, ModelNotFound and OSError."""
        pause_s = FIRST_PAUSE_S
        while not partial.is_complete(piece) and not self._stop.is_set():
            before = partial.got[piece]
            try:
                if self._ignores_ranges:
                    with self._whole:
                        if not partial.is_complete(piece):
                            self._read(partial, 0, partial.size)
                else:
                    start = piece * PIECE_BYTES
                    self._read(partial, start + partial.got[piece], start + partial.length(piece))
                why = Unavailable("The hub sent nothing.")
            except Gone:
                with self._locating:
                    self._url = ""
                why = Unavailable("The hub's link to the file is not valid.")
            except Unavailable as e:
                why = e
            has_come = partial.got[piece] > before
            if has_come:
                pause_s = FIRST_PAUSE_S
            if partial.is_complete(piece) or (has_come and not why.after_s):
                continue
            if time.monotonic() - self._last > self._patience_s:
                raise DownloadFailed("hub_unavailable", f"No progress for {self._patience_s:g} s. {why}")
            self._stop.wait(max(pause_s, min(why.after_s, self._patience_s)))
            pause_s = min(2 * pause_s, LAST_PAUSE_S)

    def _read(self, partial: Partial, start: int, end: int) -> None:
        """Read a range once, as far as it comes.  Raises Gone, Unavailable, DownloadFailed and OSError."""
        with self._hub.read(self._located(), start, end) as answer:
            if answer.size is not None and answer.size != partial.size:
                raise _wrong(self._file, f"{answer.size:,}", partial.size)
            if not answer.is_range and end - start < partial.size and not self._ignores_ranges:
                self._ignores_ranges = True  # from now on, one connection reads it all
                return
            position, since, came = answer.start, time.monotonic(), 0
            for chunk in answer.chunks:
                if position + len(chunk) > (end if answer.is_range else partial.size):
                    raise _wrong(self._file, f"more than {position:,}", partial.size)
                partial.write(position, memoryview(chunk))
                position, came = position + len(chunk), came + len(chunk)
                self._last = time.monotonic()
                if self._stop.is_set():
                    return
                if (took_s := time.monotonic() - since) > self._hub.stall_s:
                    if came < SLOW_BYTES_S * took_s:
                        raise Unavailable(f"The hub sent only {came:,} bytes in {took_s:.0f} s.")
                    since, came = time.monotonic(), 0

    def _located(self) -> str:
        with self._locating:
            if not self._url:
                self._url = self._hub.locate(self._repository, self._commit, self._file.path)
            return self._url


def _wrong(file: RemoteFile, size: str, expected: int) -> DownloadFailed:
    sentence = f"The hub sends {size} bytes of '{file.path}', but lists it with {expected:,}."
    return DownloadFailed("invalid_hub_reply", sentence)
