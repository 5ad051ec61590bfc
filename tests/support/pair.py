"""Two API processes and a worker on one Redis."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.support.service import Client, RedisServer, Running, check_keys, until


class Pair:
    """Two API processes and a worker on one Redis, with the models below `home`."""

    def __init__(self, home: Path, **variables: str) -> None:
        self.home = home
        self.redis = RedisServer(home / "redis")
        # A frozen runner does not answer, but these loads stay where they are, however busy the machine is.
        self.environ = environ = {
            "LOADSTONE_REDIS_URL": self.redis.url,
            "LOADSTONE_LEASE_S": "300",
            "LOADSTONE_DRAIN_S": "0",
            **variables,
        }
        flags = ["--models-dir", str(home / "models"), "--data-dir", str(home / "data")]
        self.worker = Running(home / "worker", "worker", *flags, environ=environ)
        self.running = [Running(home / name, "api", "--port", "0", environ=environ) for name in ("one", "other")]
        self.apis = [Client(api.first_line().removeprefix("listening: ")) for api in self.running]
        for api in self.apis:
            until(api.models, "the models are listed", 30)

    def close(self) -> None:
        for api in self.apis:
            api.close()
        for running in (*self.running, self.worker):
            running.kill()
        self.redis.kill()


@contextmanager
def paired(home: Path, **variables: str) -> Iterator[Pair]:
    """Run a pair for the block; then stop it and check that nothing is left."""
    pair = Pair(home, **variables)
    try:
        yield pair
        with pair.redis.client() as redis:
            check_keys(redis)
        for running in (*pair.running, pair.worker):
            running.stop()
    finally:
        pair.close()
