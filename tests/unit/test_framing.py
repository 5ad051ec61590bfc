"""Framing of messages on a stream, and the end of a stream."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from io import BytesIO

import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import msgpack

from shared.framing import LENGTH, Splitter, TooLong, frame, read, read_blocking

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


@given(st.lists(st.binary(max_size=40), max_size=8), st.integers(1, 30))
def test_a_splitter_cuts_whatever_the_chunks_are(values: list[bytes], chunk: int) -> None:
    data = b"".join(frame(value) for value in values)
    splitter = Splitter(64)
    cut = [one for i in range(0, len(data), chunk) for one in splitter.feed(data[i : i + chunk])]
    assert [msgpack.decode(one) for one in cut] == values


def test_a_splitter_refuses_a_long_message_at_its_head() -> None:
    splitter = Splitter(64)
    assert len(splitter.feed(frame(b"x" * 62))) == 1  # two bytes are msgpack's own
    with pytest.raises(TooLong, match="65 bytes"):
        splitter.feed(LENGTH.pack(65))


async def test_a_long_message_is_refused_at_its_head() -> None:
    stream = asyncio.StreamReader()
    stream.feed_data(frame(b"x" * 9) + frame(b"x" * 1000)[:10])
    assert await read(stream, 16) is not None
    with pytest.raises(TooLong):
        await read(stream, 16)
