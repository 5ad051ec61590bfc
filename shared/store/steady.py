"""Connections for redis-py that raise its own ConnectionError if a connection is broken.

A worker also learns its address from them.  They work around two faults, checked with redis-py 5.3.1 and uvloop 0.23.0:

- Writing to a closed connection raises an OSError on asyncio's loop, but a RuntimeError on uvloop ("the handler is
  closed", uvloop/handles/handle.pyx), which would look like a fault in Loadstone.
- If a connection is dropped while it is being established, redis-py reconnects recursively, with all retries at each
  level: 16 commands to a server that accepts connections and drops them had not returned after 12 s.
"""

from __future__ import annotations

import time
from typing import Any

from redis.asyncio import Connection, Redis, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.connection import AbstractConnection
from redis.exceptions import ConnectionError as RedisConnectionError

CHECKED_VERSION = "5.3.1"  # of redis-py


class Steady(AbstractConnection):
    """Raises redis-py's ConnectionError if a connection is broken, or breaks while it is being established."""

    is_connecting = False
    connected_at = 0.0  # by the monotonic clock
    local_host = ""  # address of this host on the connection; empty for a Unix socket

    async def connect(self) -> None:
        if self.is_connected:
            return
        if self.is_connecting:
            raise RedisConnectionError("Connection dropped while it was being established.")
        self.is_connecting = True
        try:
            await super().connect()  # type: ignore[no-untyped-call]
        finally:
            self.is_connecting = False
        writer = self._writer  # uvloop has forgotten the socket of one that was closed meanwhile
        name = None if writer is None or writer.is_closing() else writer.get_extra_info("sockname")
        self.local_host = str(name[0]) if isinstance(name, tuple) else ""
        self.connected_at = time.monotonic()

    async def send_packed_command(self, *args: Any, **options: Any) -> None:
        try:
            await super().send_packed_command(*args, **options)
        except RuntimeError as e:
            raise RedisConnectionError(str(e)) from e


class SteadyConnection(Steady, Connection):
    """For redis:// URLs."""


class SteadySSLConnection(Steady, SSLConnection):
    """For rediss:// URLs."""


class SteadyUnixDomainSocketConnection(Steady, UnixDomainSocketConnection):
    """For unix:// URLs."""


STEADY: dict[type[AbstractConnection], type[Steady]] = {
    Connection: SteadyConnection,
    SSLConnection: SteadySSLConnection,
    UnixDomainSocketConnection: SteadyUnixDomainSocketConnection,
}


def local_host(redis: Redis) -> str:
    """Return the address of this host on its newest connection to Redis; empty if none is over TCP."""
    pool = redis.connection_pool
    every = (*pool._available_connections, *pool._in_use_connections)
    ours = [one for one in every if isinstance(one, Steady) and one.is_connected and one.local_host]
    return max(ours, key=lambda one: one.connected_at).local_host if ours else ""
