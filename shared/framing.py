"""Frames messages on a byte stream: four bytes of length, little endian, then one msgpack value.

The readers return None at the end of the stream, also if it ends within a message or the peer resets it (ECONNRESET,
which a unix socket returns if its peer closed with unread data: unix(7)).
"""

from __future__ import annotations

import struct
from typing import IO, TYPE_CHECKING

from msgspec import msgpack

if TYPE_CHECKING:  # a process that does not use it need not import it
    import asyncio

LENGTH = struct.Struct("<I")


def frame(message: object) -> bytes:
    """Encode a message, preceded by its length."""
    data = msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


async def read(stream: asyncio.StreamReader, most_bytes: int | None = None) -> bytes | None:
    """Read the msgpack value of the next message.  Raises TooLong if it has more than `most_bytes`."""
    try:
        (size,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
        if most_bytes is not None and size > most_bytes:
            raise TooLong
        return await stream.readexactly(size)
    except (EOFError, ConnectionError):  # the former is asyncio's IncompleteReadError
        return None


def read_blocking(stream: IO[bytes]) -> bytes | None:
    """Read the msgpack value of the next message from a buffered stream.  Blocks until the message is complete."""
    try:
        head = stream.read(LENGTH.size)
        if len(head) < LENGTH.size:
            return None
        (size,) = LENGTH.unpack(head)
        data = stream.read(size)
    except ConnectionError:
        return None
    return data if len(data) == size else None


class TooLong(Exception):
    """A message is longer than its receiver accepts."""


class Splitter:
    """Cuts what a protocol of asyncio receives into the msgpack values of its messages."""

    def __init__(self, most_bytes: int) -> None:
        self._most_bytes = most_bytes
        self._rest = bytearray()  # of a message that is not complete yet

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that `data` completes.  Raises TooLong."""
        rest = self._rest
        rest += data
        messages = []
        at = 0
        while len(rest) - at >= LENGTH.size:
            (size,) = LENGTH.unpack_from(rest, at)
            if size > self._most_bytes:
                raise TooLong(f"a message of {size:,} bytes (limit: {self._most_bytes:,})")
            end = at + LENGTH.size + size
            if end > len(rest):
                break
            messages.append(bytes(rest[at + LENGTH.size : end]))
            at = end
        del rest[:at]
        return messages
