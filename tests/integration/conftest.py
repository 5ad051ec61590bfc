"""Fixtures for a real Redis, stores, the fork server of runners, and models."""

from __future__ import annotations

import asyncio
import multiprocessing.forkserver
import multiprocessing.resource_tracker
import subprocess
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis
from msgspec import msgpack

from cli import devredis
from shared.schema.model import Model
from shared.settings import Settings
from shared.store.connection import connected
from shared.store.store import Store
from shared.synthetic.models import tiny_bert, tiny_embedding, tiny_llama, tiny_moe
from tests.support.agents import EPOCH, Begin, ended
from worker.agent import Agent
from worker.catalog.catalog import Catalog
from worker.timing import Timing

DEADLINE_S = 60.0


@pytest.fixture(scope="module")
def redis_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """URL of a Redis server for one test module."""
    with (
        devredis.prepared(tmp_path_factory.mktemp("redis")) as server,
        subprocess.Popen(server.argv, pass_fds=server.pass_fds, stderr=subprocess.DEVNULL, stdout=2) as process,
    ):
        try:
            until = time.monotonic() + DEADLINE_S
            while reason := asyncio.run(devredis.missing(server.socket)):
                assert time.monotonic() < until, reason
                time.sleep(0.01)
            yield server.url
        finally:
            process.terminate()


@pytest.fixture
def raw(redis_server: str) -> Iterator[redis.Redis]:
    """A plain Redis client on an emptied server."""
    with redis.Redis.from_url(redis_server) as client:
        client.flushall()
        yield client


def hold(raw: redis.Redis, *workers: str) -> None:
    """Make these workers alive: each with a lease of epoch "e" and an empty catalog."""
    for name in workers:
        raw.set(f"lease:{name}", "e", ex=60)
        raw.set(f"catalog:{name}", msgpack.encode([]), ex=60)


@pytest.fixture
async def store(redis_server: str, raw: redis.Redis) -> AsyncIterator[Store]:
    """A store with live workers "w" and "another"."""
    hold(raw, "w", "another")
    async with connected(redis_server) as client:
        yield Store(client, 10.0)


@pytest.fixture(scope="module")
def forkserver() -> Iterator[None]:
    """Stop the fork server of runners and its resource tracker at the end of the module."""
    yield
    servers: tuple[Any, Any] = (
        multiprocessing.forkserver._forkserver,
        multiprocessing.resource_tracker._resource_tracker,
    )
    for server in servers:
        server._stop()


@pytest.fixture(scope="module")
def models_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with one tiny model of each kind."""
    root = tmp_path_factory.mktemp("models")
    tiny_llama(root / "p/llama/llama-f16.gguf")
    tiny_moe(root / "p/moe/moe-f16.gguf")
    tiny_embedding(root / "p/embedding/embedding-f16.gguf")
    tiny_bert(root / "p/bert/bert-f32.gguf")
    return root


@pytest.fixture(scope="module")
def models(models_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Model]:
    return catalog(models_dir, tmp_path_factory.mktemp("catalog"))


@pytest.fixture
async def begin(store: Store, models: dict[str, Model], models_dir: Path, tmp_path: Path) -> AsyncIterator[Begin]:
    """Create worker "w" with one model of each kind; it acts only when a test calls it."""
    agents: list[Agent] = []

    async def create(timing: Timing | None = None, **settings: Any) -> Agent:
        given = {"worker_name": "w", "models_dir": models_dir, "data_dir": tmp_path, **settings}
        agents.append(Agent(Settings(**given), store, EPOCH, timing=timing))
        await agents[0].publish([*models.values()])
        return agents[0]

    yield create
    for agent in agents:
        await ended(agent)


@pytest.fixture
async def agent(begin: Begin) -> Agent:
    return await begin()


def catalog(models_dir: Path, cache: Path) -> dict[str, Model]:
    """Return the models that a scanner would publish, by key."""
    contents = Catalog([models_dir], cache / "cache")
    contents.look()
    while contents.is_shallow:
        contents.deepen(1.0)
    return {model.key: model for model in contents.models()}
