"""Takes TLS off a connection, so that a runner needs no keys: its bytes go through a socketpair, in both directions."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
from contextlib import suppress
from pathlib import Path
from typing import cast

from shared.channel import tls

MOST_BUFFERED = 1 << 16  # bytes in each direction, beside what TLS and the kernel hold
CLOSE_S = 5.0  # for what was sent before the end to reach the client


class Pump:
    """A TLS connection and the socketpair that carries its bytes.  The end of either ends the other at once.

    `plain` is the other end of the socketpair; `ended` is done once the connection is closed.
    """

    def __init__(self) -> None:
        ours, self.plain = socket.socketpair()
        for end in (ours, self.plain):
            end.setblocking(False)
        self._ours = ours
        self._inner, self._outer = _End(), _End()
        self._inner.other, self._outer.other = self._outer, self._inner
        self.ended = self._outer.lost

    async def begin(self, connection: socket.socket, context: ssl.SSLContext) -> None:
        """Do the handshake.  The pump owns the connection from here on.  Raises OSError."""
        loop = asyncio.get_running_loop()
        try:
            tls.notice_silence(connection)
            await loop.connect_accepted_socket(lambda: self._inner, self._ours)
            await loop.connect_accepted_socket(
                lambda: self._outer, connection, ssl=context, ssl_shutdown_timeout=CLOSE_S
            )
        except BaseException:
            with suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)  # its transport closes it
            self.abort()
            raise

    def abort(self) -> None:
        """Drop the connection."""
        self._outer.abort()
        self._inner.abort()
        if self._inner.transport is None:
            self._ours.close()


class _End(asyncio.Protocol):
    """One end of a pump."""

    other: _End

    def __init__(self) -> None:
        self.transport: asyncio.Transport | None = None
        self.lost: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)
        self.transport.set_write_buffer_limits(MOST_BUFFERED)

    def data_received(self, data: bytes) -> None:
        assert self.other.transport is not None
        if not self.other.transport.is_closing():
            self.other.transport.write(data)

    def pause_writing(self) -> None:
        assert self.other.transport is not None
        self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        assert self.other.transport is not None
        self.other.transport.resume_reading()

    def eof_received(self) -> None:
        self.abort()  # nobody reads what is still to be written here

    def connection_lost(self, _: Exception | None) -> None:
        if not self.lost.done():
            self.lost.set_result(None)
        if self.other.transport is not None:
            self.other.transport.close()  # what the other end is still to be sent may have the reason of the end


def context(pem: bytes) -> ssl.SSLContext:
    """Return the context of a listener with this private key and certificate."""
    made = tls.context(ssl.PROTOCOL_TLS_SERVER)
    made.num_tickets = 0  # no client resumes a session
    file = os.memfd_create("identity")  # OpenSSL's loader takes files only; this one is in no directory
    try:
        path = Path(f"/proc/self/fd/{file}")
        path.write_bytes(pem)
        made.load_cert_chain(path)
    finally:
        os.close(file)
    return made
