"""The listening socket that the API processes share.

The supervisor binds the socket and passes it to the processes.  A busy port is therefore detected before anything else
starts, port 0 is the same port for all processes, and clients wait in the backlog while a crashed process restarts.
"""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from typing import Literal, assert_never

import msgspec

from shared.settings import Settings, SettingsError, variable
from shared.tokens import check_exposure

BACKLOG = 2048
ANSWER_S = 2.0
USER_TIMEOUT_MS = 30_000
BODY_BYTES = 1024
ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT, errno.EPROTONOSUPPORT}  # such as ::1 on a machine without IPv6


def bind(settings: Settings) -> socket.socket:
    """Return a socket that listens on the host and port of the settings.  It is not inheritable by default.

    Raises SettingsError for a host or port that cannot be used, and, if no tokens are set, for a loopback name that
    resolves to an address that other machines can reach.
    """
    host, port = settings.host.strip("[]"), settings.port
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except (OSError, UnicodeError) as e:
        raise _refused(settings, "host", _reason(e)) from None
    reason = "no address found"
    for family, _, _, _, address in addresses:
        check_exposure(msgspec.structs.replace(settings, host=str(address[0])))
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: includes IPv4
        try:
            listening = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
        except OSError as e:
            if e.errno not in ABSENT:
                raise _refused(settings, "port", _reason(e)) from None
            reason = _reason(e)
            continue
        # Connections inherit this: they end if the client does not read or has disappeared (tcp(7)).
        listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, USER_TIMEOUT_MS)
        return listening
    raise _refused(settings, "host", reason)


def _refused(settings: Settings, field: Literal["host", "port"], reason: str) -> SettingsError:
    match field:
        case "host":
            allowed = "an address of this machine"
        case "port":
            allowed = f"a free port on {settings.host}, or 0 to select one"
        case _:
            assert_never(field)
    return SettingsError(f"{variable(field)} is {getattr(settings, field)!r}: it must be {allowed} ({reason}).")


def _reason(error: OSError | UnicodeError) -> str:
    if isinstance(error, UnicodeError):
        return "invalid host name"
    if error.errno and error.errno in errno.errorcode:
        return os.strerror(error.errno)  # without the address, which create_server adds to the message
    return error.strerror or "no address found"


def url(host: str, listener: socket.socket) -> str:
    """Return the URL for clients, with the requested host name and the bound port."""
    name = host.strip("[]")
    return f"http://{f'[{name}]' if ':' in name else name}:{listener.getsockname()[1]}"


async def missing(listener: socket.socket, path: str) -> str | None:
    """Return why `GET path` does not return 200, None if it does.  Takes at most ANSWER_S seconds."""
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
