"""Starting the servers: the API, the workers and the embedded Redis as child processes."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

import click
import msgspec

from cli import devredis, listener
from cli.devredis import Server
from cli.supervisor import Command, StartFailed, Supervisor
from shared import filelock, paths
from shared.settings import (
    PREFIX,
    Settings,
    SettingsError,
    read_tokens,
    to_environ,
    variable,
)

DEMO_MODEL = "loadstone/demo-llm"  # the first of what shared.synthetic.models writes

# What `up` takes to stop is the sum of these: 10 s, as long as container runtimes wait before they kill.
UP_DRAIN_S = 1.0  # nothing balances here: the API ends as soon as no request is under way, and at the latest then
API_GRACE_S = 3.0  # after its drain; above what the API gives replies that are being written
WORKER_GRACE_S = 5.0
REDIS_GRACE_S = 1.0

LONE_WORKER_GRACE_S = 25.0  # a worker of a pool hands its loads over to others
WATCHDOG_S = 30.0  # a beat waits some 15 s for a Redis that hangs


async def run_all(settings: Settings, listening: socket.socket, redis: Server | None, demo: bool) -> None:
    async with Supervisor() as supervisor:
        if redis:
            settings = msgspec.structs.replace(settings, redis_url=redis.url)
            command = Command(
                name="redis", argv=redis.argv, environ=_foreign(), pass_fds=redis.pass_fds, grace_s=REDIS_GRACE_S
            )
            supervisor.start(command)
            await supervisor.until(partial(devredis.missing, redis.socket), "The embedded Redis")
            await devredis.forget_lease(redis.socket, settings.name)
        supervisor.start(worker_command(settings, WORKER_GRACE_S))
        supervisor.start(*[api_command(settings, listening, (0.0, UP_DRAIN_S))] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, paths.READYZ), "Loadstone")
        url = listener.url(settings.host, listening)
        click.echo(f"ready: {url}")
        if demo and (settings.models_dir / DEMO_MODEL).is_dir():
            click.echo(f"load the demo model: {_demo_line(settings, url)}", err=True)
        await supervisor.forever()


async def run_api(settings: Settings, listening: socket.socket) -> None:
    async with Supervisor() as supervisor:
        command = api_command(settings, listening, (settings.drain_s, settings.drain_s))
        supervisor.start(*[command] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, paths.HEALTHZ), "The API")
        click.echo(f"listening: {listener.url(settings.host, listening)}")
        await supervisor.forever()


async def run_worker(settings: Settings) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(worker_command(settings, LONE_WORKER_GRACE_S))
        await supervisor.forever()


def api_command(settings: Settings, listening: socket.socket, drain_s: tuple[float, float]) -> Command:
    """`drain_s`: how long it drains at least, and at most while requests are under way."""
    fd = listening.fileno()
    return Command(
        name="api",
        argv=(*_module("api"), "--fd", str(fd), "--drain", *map(str, drain_s)),
        environ=_foreign() | to_environ(settings),
        pass_fds=(fd,),
        grace_s=drain_s[1] + API_GRACE_S,
        watchdog_s=WATCHDOG_S,
    )


def worker_command(settings: Settings, grace_s: float) -> Command:
    # Whoever breaks the engine with a crafted file shall not find the clients' tokens beside it.
    settings = msgspec.structs.replace(settings, api_tokens="", api_tokens_file=None)
    return Command(
        name="worker",
        argv=_module("worker"),
        environ=_foreign() | to_environ(settings),
        grace_s=grace_s,
        watchdog_s=WATCHDOG_S,
    )


def _module(name: str) -> tuple[str, ...]:
    """-P: a directory of that name below the one we were called in is not ours."""
    return (sys.executable, "-P", "-m", name)


def _foreign() -> dict[str, str]:
    """The environment without our own variables."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def make_directories(settings: Settings) -> None:
    for field, mode in (("data_dir", 0o700), ("models_dir", 0o755)):
        path: Path = getattr(settings, field)
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as e:
            raise SettingsError(f"{variable(field)} is '{path}': it must be a directory ({e.strerror}).") from None


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the right to run on a data directory; child processes do not inherit it.

    Raises SettingsError when another `loadstone up` has it, or when the directory cannot be written to.
    """
    where = f"{variable('data_dir')} is '{data_dir}'"
    with ExitStack() as held:
        try:
            held.enter_context(filelock.lock(data_dir / "up.lock"))
        except OSError as e:
            raise SettingsError(f"{where}: it must be a directory that can be written to ({e.strerror}).") from None
        except filelock.Held:
            raise SettingsError(f"{where}, where another `loadstone up` runs: each must have its own.") from None
        yield


def write_demo(models_dir: Path) -> None:
    try:
        from shared.synthetic import models as synthetic
    except ModuleNotFoundError as e:
        raise StartFailed(f"--demo needs the module {e.name}: install Loadstone with its extra `demo`.", 2) from None
    try:
        synthetic.write_demo(models_dir)
    except OSError as e:
        where = f"{variable('models_dir')} is '{models_dir}'"
        raise SettingsError(f"{where}: with --demo it must be one that can be written to ({e.strerror}).") from None


def _demo_line(settings: Settings, url: str) -> str:
    token = ' -H "Authorization: Bearer $TOKEN"' if read_tokens(settings) else ""
    return (
        f"curl {url}{paths.LOAD}{token} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{DEMO_MODEL}", "echo_load_config": true}}'"""
    )
