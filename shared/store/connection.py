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

UNAVAILABLE = (RedisError, OSError)  # redis-py does not wrap the OSError of a refused connection
Listen = Callable[[str, Callable[[bytes], None]], Awaitable[None]]  # `listen`, bound to a client


def check_cancelled() -> None:
    """Raise CancelledError if the current task has missed a cancellation.  Endless loops must call this.

    Before Python 3.12, `asyncio.wait_for`, which redis-py uses to write, can lose a cancellation (cpython #86296).
    """
    task = asyncio.current_task()
    if task is not None and task.cancelling():
        raise asyncio.CancelledError


def connect(url: str) -> Redis:
    """Return a client for a redis://, rediss:// or unix:// URL.  Does not connect yet.

    The client uses up to 16 connections.  A caller waits up to 5 s for a free one, and a command up to 5 s for its
    reply.  A command whose connection breaks is retried on a new one up to four times, within about half a second.
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
        with suppress(*UNAVAILABLE):  # a hanging server does not answer the TLS shutdown
            await redis.aclose(close_connection_pool=True)


async def listen(redis: Redis, channel: str, on_message: Callable[[bytes], None]) -> None:
    """Call `on_message` with each message on a channel, and with b"" once the subscription is established.

    Runs until the connection to Redis breaks (raises one of UNAVAILABLE) or the task is cancelled.  Messages that are
    sent without a subscription are lost, so a listener must also poll from time to time.
    """
    async with redis.pubsub() as pubsub:
        await pubsub.subscribe(channel)
        while True:
            message = await pubsub.get_message(timeout=5)
            check_cancelled()
            if message is not None:
                on_message(message["data"] if message["type"] == "message" else b"")
