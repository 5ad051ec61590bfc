"""The TCP port of a worker, for API processes that cannot open its Unix socket."""

from __future__ import annotations

import ipaddress
import os
import re
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from shared.channel.address import Tcp
from shared.settings import Settings, SettingsError, variable
from shared.telemetry import log
from worker.listener.protocol import BACKLOG, Identity

_log = log.get("worker")


class Port:
    """A listening TCP socket, and where clients reach it."""

    def __init__(
        self, listening: socket.socket, identity: Identity, host: str, port: int | None, local_host: Callable[[], str]
    ) -> None:
        """`host` and `port`: what to advertise instead of the bound address; empty and None if nothing.

        `local_host` returns the address of this host on the network of Redis, empty if there is no connection.
        """
        self.listening = listening
        self.identity = identity
        bound_host, self._bound_port = listening.getsockname()[:2]
        self._host = host or ("" if ipaddress.ip_address(bound_host).is_unspecified else bound_host)
        self._port = port
        self._local_host = local_host
        self._last_local = "127.0.0.1"  # all that is known with a Redis on a Unix socket

    @property
    def address(self) -> Tcp:
        """Where clients reach the port now: the address of this host may change."""
        self._last_local = self._local_host() or self._last_local
        return Tcp(
            host=self._host or self._last_local, port=self._port or self._bound_port, certificate=self.identity.digest
        )


@contextmanager
def opened(settings: Settings, local_host: Callable[[], str]) -> Iterator[Port | None]:
    """Open the port of the settings, None if they have none; close it in the end.  Raises SettingsError."""
    if not settings.worker_listen:
        yield None
        return
    from worker.listener.certificate import self_signed  # cryptography takes 50 ms, which only this port needs

    host, number = _split(settings.worker_listen)
    with _listening(settings, host, number or 0) as listening:
        bound = listening.getsockname()
        _log.info("listening for channels", action="port_opened", host=bound[0], port=bound[1])
        yield Port(listening, self_signed(), *_split(settings.worker_advertise), local_host)


def _split(text: str) -> tuple[str, int | None]:
    """Return the host, without brackets, and the port, None if there is none."""
    match = re.fullmatch(r"(?:\[(.*)\]|([^:]*))(?::(\d+))?", text)
    assert match is not None, "the settings allow no other text"
    return match[1] or match[2] or "", int(match[3]) if match[3] else None


def _listening(settings: Settings, host: str, port: int) -> socket.socket:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, address = infos[0]
        both = family == socket.AF_INET6 and socket.has_dualstack_ipv6()  # :: includes IPv4
        listening = socket.create_server(address, family=family, backlog=BACKLOG, dualstack_ipv6=both)
    except (OSError, UnicodeError) as e:
        number = e.errno if isinstance(e, OSError) else None
        reason = os.strerror(number) if number and number > 0 else "no address found"  # negative: of getaddrinfo
        raise SettingsError(
            f"{variable('worker_listen')} is '{settings.worker_listen}': it must be an address of this machine with a "
            f"free port ({reason})."
        ) from None
    listening.setblocking(False)
    return listening
