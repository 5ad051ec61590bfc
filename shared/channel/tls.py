"""TLS for channels over TCP: both ends know each other from Redis, not from certificates."""

from __future__ import annotations

import hashlib
import socket
import ssl
from typing import Protocol

_SILENCE = {  # 4 s without data, then three probes; or 10 s without an acknowledgement of data: tcp(7)
    socket.TCP_KEEPIDLE: 4,
    socket.TCP_KEEPINTVL: 2,
    socket.TCP_KEEPCNT: 3,
    socket.TCP_USER_TIMEOUT: 10_000,
}


class Options(Protocol):
    """A socket, or what a loop offers of it."""

    def setsockopt(self, level: int, option: int, value: int, /) -> None: ...


def context(side: ssl._SSLMethod) -> ssl.SSLContext:
    """Return a context of TLS 1.3 for a side, PROTOCOL_TLS_CLIENT or PROTOCOL_TLS_SERVER.

    It verifies no certificate: a client compares the digest, and a listener knows its clients by their proof.
    """
    made = ssl.SSLContext(side)
    made.minimum_version = ssl.TLSVersion.TLSv1_3
    made.check_hostname = False
    made.verify_mode = ssl.CERT_NONE
    return made


def has_certificate(peer: ssl.SSLObject, digest: bytes) -> bool:
    """Return whether the peer of a connection has the certificate with this SHA-256.

    TLS has verified by then that the peer has its private key.
    """
    certificate = peer.getpeercert(binary_form=True)
    return certificate is not None and hashlib.sha256(certificate).digest() == digest


def notice_silence(connection: Options) -> None:
    """End a TCP connection within about 10 s if its peer has vanished without a word, as with its host."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in _SILENCE.items():
        connection.setsockopt(socket.IPPROTO_TCP, option, value)
