"""Framing of messages on a stream, and the end of a stream."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from io import BytesIO

import pytest
from msgspec import msgpack

from worker.framing import frame, read, read_blocking

MESSAGES: list[object] = [[], {"key": "value"}, "x" * 100_000, None]
Reader = Callable[[bytes], list[object]]


def blocking(data: bytes) -> list[object]:
    decoded: list[object] = []
    with BytesIO(data) as stream:
        while (one := read_blocking(stream)) is not None:
            decoded.append(msgpack.decode(one))
    return decoded


def on_a_loop(data: bytes) -> list[object]:
    async def messages() -> list[object]:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        decoded: list[object] = []
        while (one := await read(stream)) is not None:
            decoded.append(msgpack.decode(one))
        return decoded

    return asyncio.run(messages())


@pytest.fixture(params=[blocking, on_a_loop])
def reader(request: pytest.FixtureRequest) -> Reader:
    chosen: Reader = request.param
    return chosen


def test_a_frame_is_a_length_and_a_msgpack_value() -> None:
    assert frame("ab") == b"\x03\x00\x00\x00\xa2ab"


def test_messages_are_read_as_they_were_written(reader: Reader) -> None:
    assert reader(b"".join(map(frame, MESSAGES))) == MESSAGES


@pytest.mark.parametrize("n_bytes", range(7))
def test_a_stream_cut_within_a_message_ends_before_it(reader: Reader, n_bytes: int) -> None:
    assert reader(frame("first") + frame("ab")[:n_bytes]) == ["first"]


def reset() -> socket.socket:
    """Return a socket whose peer closed with unread data."""
    ours, theirs = socket.socketpair()
    ours.send(b"unread")
    theirs.close()
    return ours


def test_a_reset_ends_a_blocking_stream() -> None:
    with reset() as ours, ours.makefile("rb") as stream:
        assert read_blocking(stream) is None


async def test_a_reset_ends_a_stream_on_a_loop() -> None:
    stream, writer = await asyncio.open_connection(sock=reset())
    assert await read(stream) is None
    writer.close()
