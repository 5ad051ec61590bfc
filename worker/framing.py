"""Frames messages on a byte stream: four bytes of length, little endian, then one msgpack value.

Both readers return None at the end of the stream, also if it ends within a message or the peer resets it (ECONNRESET,
which a unix socket returns if its peer closed with unread data: unix(7)).
"""

from __future__ import annotations

import asyncio
import struct
from typing import IO

from msgspec import msgpack

LENGTH = struct.Struct("<I")


def frame(message: object) -> bytes:
    """Encode a message, preceded by its length."""
    data = msgpack.encode(message)
    return LENGTH.pack(len(data)) + data


async def read(stream: asyncio.StreamReader) -> bytes | None:
    """Read the msgpack value of the next message."""
    try:
        (size,) = LENGTH.unpack(await stream.readexactly(LENGTH.size))
        return await stream.readexactly(size)
    except (asyncio.IncompleteReadError, ConnectionError):
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
