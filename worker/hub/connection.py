"""Connections to the hub and to the hosts that it redirects to.

http.client reads a body from the socket into the bytes that it returns.  httpcore copies it three times on the way
through h11, with the interpreter's lock held, which six threads wait for: 0.55 s of CPU time for a GiB, against 0.12.
"""

from __future__ import annotations

import http.client
import ipaddress
import select
import socket
import ssl
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from http.client import HTTPConnection, HTTPException, HTTPResponse
from itertools import zip_longest
from typing import NamedTuple
from urllib.parse import urlsplit

from shared.errors import DownloadFailed

CONNECT_S = 10.0  # to one of the addresses of a host
READ_BYTES = 1 << 20  # at most, of one read(2)
PORTS = {"https": http.client.HTTPS_PORT, "http": http.client.HTTP_PORT}


class Unavailable(Exception):
    """The request may succeed later, `after_s` seconds from now at the earliest.  The message is a sentence."""

    def __init__(self, message: str, after_s: float = 0.0) -> None:
        super().__init__(message)
        self.after_s = after_s


class Unreachable(Unavailable):
    """No connection to the host came about."""


class Origin(NamedTuple):
    scheme: str
    host: str
    port: int

    @classmethod
    def of(cls, url: str) -> Origin:
        """Raises ValueError if the URL is malformed."""
        parts = urlsplit(url)
        return cls(parts.scheme, parts.hostname or "", parts.port or PORTS.get(parts.scheme, 0))


class Connections:
    """Connections that are kept for the next request.  The methods may be called by several threads."""

    def __init__(self, is_named: Callable[[str, int], bool], stall_s: float) -> None:
        """`is_named`: whether a host and port may have any address.  `stall_s`: time without a byte before it fails."""
        self._addresses = _Addresses(is_named)
        self._stall_s = stall_s
        self._context = ssl.create_default_context()
        self._idle: defaultdict[Origin, list[_Connection]] = defaultdict(list)
        self._lock = threading.Lock()

    @contextmanager
    def get(self, url: str, headers: Mapping[str, str]) -> Iterator[HTTPResponse]:
        """Send a request.  Raises Unavailable, and DownloadFailed for a certificate that is not valid.

        Read the body with `chunks`.  The connection is closed if that was not done to the end.
        """
        origin, parts = Origin.of(url), urlsplit(url)
        target = f"{parts.path or '/'}?{parts.query}" if parts.query else parts.path or "/"
        connection, is_at_end = self._taken(origin), False
        try:
            with _translated(origin.host, self._stall_s):
                connection.request("GET", target, headers=headers)
                answer = connection.getresponse()
            yield answer
            is_at_end = answer.isclosed() or answer.length == 0
            answer.close()
        finally:
            if is_at_end:
                with self._lock:
                    self._idle[origin].append(connection)
            else:
                connection.close()

    def chunks(self, answer: HTTPResponse, host: str) -> Iterator[bytes]:
        """Yield the body as it comes.  Raises Unavailable."""
        while True:
            with _translated(host, self._stall_s):
                chunk = answer.read1(READ_BYTES)
            if not chunk:
                break
            yield chunk
        if answer.length:
            raise _broken(host)

    def close(self) -> None:
        """Close the connections that are not in use."""
        with self._lock:
            for connections in self._idle.values():
                for connection in connections:
                    connection.close()
            self._idle.clear()

    def _taken(self, origin: Origin) -> _Connection:
        while True:
            with self._lock:
                idle = self._idle[origin]
                connection = idle.pop() if idle else None
            if connection is None:
                return _Connection(origin, self._addresses, self._context, self._stall_s)
            if connection.is_open():
                return connection
            connection.close()


class _Connection(HTTPConnection):
    """Connects to an address that is allowed, with TLS if the origin has it."""

    def __init__(self, origin: Origin, addresses: _Addresses, context: ssl.SSLContext, stall_s: float) -> None:
        super().__init__(origin.host, origin.port)
        self.default_port = PORTS[origin.scheme]  # which the header Host leaves out
        self._addresses, self._stall_s = addresses, stall_s
        self._context = context if origin.scheme == "https" else None

    def connect(self) -> None:
        """Raises Unreachable, and DownloadFailed if the certificate is not valid."""
        sock = self._addresses.connected(self.host, self.port)
        try:
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            sock.settimeout(CONNECT_S)
            if self._context is not None:
                sock = self._context.wrap_socket(sock, server_hostname=self.host)
            sock.settimeout(self._stall_s)
        except ssl.SSLCertVerificationError as e:  # it would be the same the next time
            sock.close()
            why = f"The certificate of '{self.host}' cannot be verified: {e.verify_message.rstrip('.')}"
            hint = "Set SSL_CERT_FILE of the worker if it is of an authority of your own"
            raise DownloadFailed("hub_unavailable", f"{why}. {hint}.") from None
        except OSError as e:
            sock.close()
            raise Unreachable(f"'{self.host}' cannot be reached: {_why(e)}.") from None
        self.sock = sock

    def is_open(self) -> bool:
        """Return whether the other side has neither closed the connection nor sent what nobody asked for."""
        if self.sock is None:
            return False
        poll = select.poll()
        poll.register(self.sock, select.POLLIN)
        return not poll.poll(0)


class _Addresses:
    """Connects to addresses of the internet, and to hosts that are configured, wherever they are.

    The address that is checked is the one that is connected to: a name may resolve to another one the next time.
    """

    def __init__(self, is_named: Callable[[str, int], bool]) -> None:
        self._is_named = is_named
        self._silent: set[str] = set()  # that did not answer, and are tried last

    def connected(self, host: str, port: int) -> socket.socket:
        """Connect to one of the addresses of a host, which share the time.  Raises Unreachable."""
        addresses = sorted(_alternating(self._allowed(host, port)), key=lambda one: one in self._silent)
        deadline, why = time.monotonic() + CONNECT_S, ""
        for n_left, address in zip(range(len(addresses), 0, -1), addresses, strict=True):
            share_s = max(0.001, deadline - time.monotonic()) / n_left
            try:
                sock = socket.create_connection((address, port), share_s)
            except OSError as e:
                self._silent.add(address)
                why = _why(e)
            else:
                self._silent.discard(address)
                return sock
        raise Unreachable(f"'{host}' cannot be reached: {why}.")

    def _allowed(self, host: str, port: int) -> list[str]:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as e:
            why = f"its name cannot be resolved ({getattr(e, 'strerror', e)})"
            raise Unreachable(f"'{host}' cannot be reached: {why}.") from None
        addresses = list(dict.fromkeys(str(one[4][0]) for one in found))
        if not self._is_named(host, port):
            addresses = [one for one in addresses if ipaddress.ip_address(one.partition("%")[0]).is_global]
            if not addresses:
                raise Unreachable(f"'{host}' cannot be reached: its address is not one of the internet.")
        return addresses


def _alternating(addresses: Iterable[str]) -> list[str]:
    """Alternate between IPv6 and IPv4, of which one may lead nowhere."""
    families: dict[bool, list[str]] = {}
    for address in addresses:
        families.setdefault(":" in address, []).append(address)
    return [one for pair in zip_longest(*families.values()) for one in pair if one is not None]


def _why(error: OSError) -> str:
    if isinstance(error, TimeoutError):
        return f"no answer within {CONNECT_S:g} s"
    return str(error.strerror or error)


def _broken(host: str) -> Unavailable:
    return Unavailable(f"The connection to '{host}' broke.")


@contextmanager
def _translated(host: str, stall_s: float) -> Iterator[None]:
    """Translate faults of a connection.  The text of some contains what was sent, so it is not shown."""
    try:
        yield
    except TimeoutError:
        raise Unavailable(f"'{host}' sent nothing for {stall_s:g} s.") from None
    except (OSError, HTTPException):
        raise _broken(host) from None
