"""Messages keep their bounds on a stream, and a reader ends where the stream ends."""

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
    found: list[object] = []
    with BytesIO(data) as stream:
        while (one := read_blocking(stream)) is not None:
            found.append(msgpack.decode(one))
    return found


def on_a_loop(data: bytes) -> list[object]:
    async def messages() -> list[object]:
        stream = asyncio.StreamReader()
        stream.feed_data(data)
        stream.feed_eof()
        found: list[object] = []
        while (one := await read(stream)) is not None:
            found.append(msgpack.decode(one))
        return found

    return asyncio.run(messages())


@pytest.fixture(params=[blocking, on_a_loop])
def reader(request: pytest.FixtureRequest) -> Reader:
    found: Reader = request.param
    return found


def test_a_frame_is_a_length_and_a_msgpack_value() -> None:
    assert frame("ab") == b"\x03\x00\x00\x00\xa2ab"


def test_messages_come_out_as_they_went_in(reader: Reader) -> None:
    assert reader(b"".join(map(frame, MESSAGES))) == MESSAGES


@pytest.mark.parametrize("n_bytes", range(7))
def test_a_stream_that_ends_within_a_message_has_ended(reader: Reader, n_bytes: int) -> None:
    assert reader(frame("first") + frame("ab")[:n_bytes]) == ["first"]


def reset() -> socket.socket:
    """A socket whose peer closed before it had read everything."""
    ours, theirs = socket.socketpair()
    ours.send(b"unread")
    theirs.close()
    return ours


def test_a_stream_that_is_reset_has_ended() -> None:
    with reset() as ours, ours.makefile("rb") as stream:
        assert read_blocking(stream) is None


async def test_a_stream_that_is_reset_has_ended_on_a_loop() -> None:
    stream, writer = await asyncio.open_connection(sock=reset())
    assert await read(stream) is None
    writer.close()
