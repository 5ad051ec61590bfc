"""Connections to Redis."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

from redis.asyncio import BlockingConnectionPool, Redis
from redis.asyncio.retry import Retry
from redis.backoff import ExponentialBackoff
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import RedisError

from shared.store.steady import STEADY

UNAVAILABLE = (RedisError, OSError)  # redis-py lets a refused socket through as an OSError
Listen = Callable[[str, Callable[[bytes], None]], Awaitable[None]]  # `listen`, on a client of its own


def check_cancelled() -> None:
    """Raise CancelledError in a task that was cancelled without learning of it; for loops without end.

    `asyncio.wait_for`, through which redis-py writes, can lose a cancellation before Python 3.12 (cpython #86296).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def connect(url: str) -> Redis:
    """Return a client for a redis://, rediss:// or unix:// URL.  Nothing is sent yet.

    At most 16 connections; a caller waits up to 5 s for one, a command up to 5 s for its reply.  A command whose
    connection broke is repeated on a new one a few times within about half a second.
    """
    options: dict[str, Any] = {}
    if not url.startswith("unix:"):
        options = {"socket_keepalive": True}
    if url.startswith("rediss:"):
        options["ssl_check_hostname"] = True
    broken: tuple[Any, ...] = (RedisConnectionError, OSError)
    pool = BlockingConnectionPool.from_url(
        url,
        max_connections=16,
        timeout=5,
        socket_timeout=5,
        socket_connect_timeout=2,
        health_check_interval=15,
        retry=Retry(ExponentialBackoff(cap=0.2, base=0.01), 4, broken),
        retry_on_error=list(broken),
        **options,
    )
    pool.connection_class = STEADY[pool.connection_class]
    return Redis(connection_pool=pool)


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Redis]:
    """Yield a client, and close its connections at the end."""
    redis = connect(url)
    try:
        yield redis
    finally:
        with suppress(*UNAVAILABLE):  # what hangs never answers the end of TLS
            await redis.aclose(close_connection_pool=True)


async def listen(redis: Redis, channel: str, on_message: Callable[[bytes], None]) -> None:
    """Call `on_message` with each message on a channel, and with b"" once the subscription stands.

    Runs until Redis drops the connection (raises one of UNAVAILABLE) or the task is cancelled.  Messages sent while
    nobody listens are lost, so a listener must also look for itself from time to time.
    """
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        while True:
            message = await pubsub.get_message(timeout=5)
            check_cancelled()
            if message is not None:
                on_message(message["data"] if message["type"] == "message" else b"")
