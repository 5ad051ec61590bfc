"""The socket that the API processes share, and what it answers.

Whoever starts the API binds the socket and hands it down: so a busy port is found before anything else is started,
port 0 has one meaning for all processes, and clients wait in the backlog while a crashed process is started again.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Literal, assert_never

import msgspec

from shared.settings import Settings, SettingsError, check_exposure, variable

BACKLOG = 2048
ANSWER_S = 2.0
UNTAKEN_MS = 30_000
BODY_BYTES = 1024
ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}  # as for ::1 on a machine without IPv6


def bind(settings: Settings) -> socket.socket:
    """A listening socket on the settings' host and port, not inherited unless it is passed on.

    Raises SettingsError for a name or port that cannot be used, and where a name that should mean this machine
    resolves to an address that others can reach.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise _refused(settings, "host", _reason(e)) from None
    reason = "it has no address"
    for family, _, _, _, address in found:
        check_exposure(msgspec.structs.replace(settings, host=str(address[0])))
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: means IPv4 too
        try:
            listening = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
        except OSError as e:
            if e.errno not in ABSENT:
                raise _refused(settings, "port", _reason(e)) from None
            reason = _reason(e)
            continue
        # Its connections inherit this: one whose client takes nothing, or is gone without a word, ends (tcp(7)).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, UNTAKEN_MS)
        return listening
    raise _refused(settings, "host", reason)


def _refused(settings: Settings, field: Literal["host", "port"], reason: str) -> SettingsError:
    match field:
        case "host":
            allowed = "an address of this machine"
        case "port":
            allowed = f"free on {settings.host}, or 0 to pick a free one"
        case _:
            assert_never(field)
    return SettingsError(f"{variable(field)} is {getattr(settings, field)!r}: it must be {allowed} ({reason}).")


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "it is no host name"
    if error.errno and error.errno in errno.errorcode:
        return os.strerror(error.errno)  # create_server adds the address to it, which we have said
    return error.strerror or "it has no address"


def url(host: str, listener: socket.socket) -> str:
    """Where clients find it: under the name that was asked for, with the port that was bound."""
    name = host.strip("[]")
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


async def missing(listener: socket.socket, path: str) -> str | None:
    """What keeps `GET path` from answering 200, None when it does; within ANSWER_S."""
    address, port = listener.getsockname()[:2]
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(address, address)  # noqa: S104 - asked, not bound
    request = f"GET {path} HTTP/1.1\r\nHost: {f'[{address}]' if ':' in address else address}:{port}\r\n"
    try:
        async with asyncio.timeout(ANSWER_S):
            reader, writer = await asyncio.open_connection(address, port)
            try:
                writer.write(f"{request}Connection: close\r\n\r\n".encode())
                status = (await reader.readline()).decode("latin-1").split(" ")[1:2]
                while (await reader.readline()).strip():
                    pass
                body = (await reader.read(BODY_BYTES)).decode("utf-8", "replace").strip()
            finally:
                writer.close()
    except (OSError, TimeoutError) as e:
        return f"{path} does not answer ({type(e).__name__})"
    return None if status == ["200"] else f"{path} answers {' '.join([*status, body]) or 'nothing'}"
