"""How a channel begins: an API process proves to a worker's listener that it may use it, and names a runner.

The listener sends a Challenge, the API a Hello.  Then either the runner has the connection and sends Welcome, or the
listener sends Rejected and closes it.  The secret itself is never sent.

Over TCP, all of that is in TLS 1.3.  The API compares the certificate with the digest that the worker published before
it sends anything, so nobody between the two can read or relay the proof.  The digest is a part of the proof as well: a
proof for one connection is none for a listener with another certificate.
"""

from __future__ import annotations

import hmac
import os
import secrets
import socket
import struct
from typing import Literal

from msgspec import Struct

NONCE_BYTES = 32
MOST_BYTES = 4096  # of a message before Welcome
CREDENTIALS = struct.Struct("3i")  # pid, uid and gid: struct ucred of unix(7)

RejectedCode = Literal[
    "wrong_proof",
    "unknown_instance",  # the worker has no runner of this load, or no longer
    "runner_silent",  # the runner did not take the connection in time
    "no_requests",  # the runner serves no requests: its model generates no text
]


class Challenge(Struct, frozen=True, tag="challenge"):
    """Prove that you know the secret.  The nonce is random and used once."""

    nonce: bytes


class Hello(Struct, frozen=True, tag="hello"):
    """Connect me with the runner of a load."""

    load_id: str
    proof: bytes


class Welcome(Struct, frozen=True, tag="welcome"):
    """The runner has the connection.  Requests may be sent."""


class Rejected(Struct, frozen=True, tag="rejected"):
    """The connection is closed."""

    code: RejectedCode


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)


def proof(secret: bytes, nonce: bytes, load_id: str, certificate: bytes = b"") -> bytes:
    """Return the proof that a Hello has to contain.

    `certificate`: the SHA-256 of the listener's certificate, empty for a Unix socket.
    """
    return hmac.digest(secret, nonce + certificate + load_id.encode(), "sha256")


def is_proven(hello: Hello, secret: bytes, nonce: bytes, certificate: bytes = b"") -> bool:
    return hmac.compare_digest(hello.proof, proof(secret, nonce, hello.load_id, certificate))


def has_our_user(connection: socket.socket) -> bool:
    """Return whether the peer of a Unix socket runs as the user of this process (SO_PEERCRED)."""
    data = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size)
    uid: int = CREDENTIALS.unpack(data)[1]
    return uid == os.geteuid()
