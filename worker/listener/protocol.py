"""The messages between a worker, its listener and its runners, on Unix sockets that keep the bounds of messages.

Worker and listener send one msgpack value a message.  The hand-over socket of a runner is a pair: the worker keeps one
end and gives copies of it to its listener.  The listener sends a token with a connection, and the runner answers with
the token once it has the connection.
"""

from __future__ import annotations

import array
import os
import socket
import stat
from collections.abc import Callable

from msgspec import Struct, msgpack

BACKLOG = 128  # connections that wait while the listener is started again
MOST_BYTES = 4096  # of a message
TOKEN_BYTES = 16

# ---- to the listener


class Offer(Struct, frozen=True, tag="offer"):
    """Hand connections for this load to the runner whose hand-over socket comes with the message."""

    load_id: str


class Withdraw(Struct, frozen=True, tag="withdraw"):
    """The load has no runner any more."""

    load_id: str


class Identity(Struct, frozen=True):
    """What the listener proves to its clients over TCP."""

    pem: bytes  # the private key and the certificate
    digest: bytes  # SHA-256 of the certificate

    def __repr__(self) -> str:
        """Mask the key."""
        return f"Identity(digest={self.digest!r})"


class Listen(Struct, frozen=True, tag="listen"):
    """Accept connections from the socket that comes with the message, whose clients know the secret.

    A TCP socket has an identity, a Unix socket has none.
    """

    secret: bytes
    identity: Identity | None = None


class Ping(Struct, frozen=True, tag="ping"):
    """Answer with a Pong."""


ToListener = Offer | Withdraw | Listen | Ping

# ---- from the listener


class Pong(Struct, frozen=True, tag="pong"):
    """The listener's loop runs."""


encode: Callable[[ToListener | Pong], bytes] = msgpack.Encoder().encode
decode_to_listener: Callable[[bytes], ToListener] = msgpack.Decoder(ToListener).decode


def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a connection that keeps the bounds of messages and does not block."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setblocking(False)
    return ends


def send(to: socket.socket, message: bytes, passed: socket.socket | None = None) -> None:
    """Send a message, with a copy of a socket.  Raises OSError: BlockingIOError if the receiver is behind."""
    if passed is None:
        to.send(message)
    else:
        socket.send_fds(to, [message], [passed.fileno()])


def receive(source: socket.socket) -> tuple[bytes, socket.socket | None]:
    """Return the next message and the socket that came with it.  The message is empty at the end of the stream.

    Closes all else that came with it: a runner that an attacker controls may send any descriptors.  Raises
    BlockingIOError if there is none.
    """
    size = array.array("i").itemsize
    try:
        message, ancillary, _, _ = source.recvmsg(MOST_BYTES, socket.CMSG_SPACE(size), socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return b"", None
    passed = None
    for level, kind, data in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            # The alignment of the buffer leaves room for a second one.
            for descriptor in array.array("i", data[: len(data) // size * size]):
                if passed is None and stat.S_ISSOCK(os.fstat(descriptor).st_mode):
                    passed = socket.socket(fileno=descriptor)
                    passed.setblocking(False)
                else:
                    os.close(descriptor)
    return message, passed
