"""Starts the servers as child processes: the API, the worker and the embedded Redis."""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import NoReturn

import click
import msgspec

from cli import devredis, listener
from cli.demo import write_demo
from cli.devredis import RedisUnavailable, Server
from cli.supervisor import Command, StartFailed, Stopped, Supervisor, stoppable
from shared import filelock, paths
from shared.settings import (
    PREFIX,
    Settings,
    SettingsError,
    from_environ,
    redis_url,
    to_environ,
    variable,
)
from shared.telemetry import log
from shared.tokens import check_exposure, read_tokens

# `up` takes at most the sum of these to stop: 10 s, after which container runtimes send SIGKILL.
UP_DRAIN_S = 1.0  # that requests in progress get to end
API_GRACE_S = 3.0  # after its drain; longer than GRACE_S of the API
WORKER_GRACE_S = 5.0  # without a drain: the API has ended before, and with it all requests
REDIS_GRACE_S = 1.0

LONE_WORKER_GRACE_S = 15.0  # after its drain, for a worker of a pool, whose loads are requeued at other workers
WATCHDOG_S = 30.0  # a beat may take about 15 s if Redis hangs


def run_up(flags: Mapping[str, str | None], *, demo: bool) -> None:
    """Run `loadstone up` until a stop signal arrives."""
    with _sentences(), stoppable(), ExitStack() as undo:
        settings = _settings(flags)
        check_exposure(settings)
        is_named = bool(flags.get("models_dir") or os.environ.get(variable("models_dir")))
        make_directories(settings, has_models=is_named and not demo)
        undo.enter_context(only_one(settings.data_dir))
        listening = undo.enter_context(listener.bind(settings))
        first = write_demo(settings.roots[0]) if demo else None
        redis = None if settings.redis_url else undo.enter_context(devredis.prepared(settings.data_dir))
        asyncio.run(_supervise_all(settings, listening, redis, first))


def run_api(flags: Mapping[str, str | None]) -> None:
    """Run `loadstone api` until a stop signal arrives."""
    with _sentences(), stoppable():
        settings = _settings(flags)
        redis_url(settings)
        check_exposure(settings)
        with listener.bind(settings) as listening:
            asyncio.run(_supervise_api(settings, listening))


def run_worker(flags: Mapping[str, str | None]) -> None:
    """Run `loadstone worker` until a stop signal arrives."""
    with _sentences(), stoppable():
        settings = _settings(flags)
        redis_url(settings)
        asyncio.run(_supervise_worker(settings))


@contextmanager
def _sentences() -> Iterator[None]:
    """Print errors that users can correct without a traceback, and exit.  A stop signal is not an error."""
    try:
        yield
    except (SettingsError, RedisUnavailable) as e:
        _refuse(str(e), 2)
    except StartFailed as e:
        _refuse(str(e), e.status)
    except (Stopped, KeyboardInterrupt):  # asyncio leaves Python's own handler behind when it closes its loop
        pass


def _refuse(sentence: str, status: int) -> NoReturn:
    click.echo(f"loadstone: {sentence}", err=True)
    sys.exit(status)


def _settings(flags: Mapping[str, str | None]) -> Settings:
    settings = from_environ(os.environ, flags)
    log.configure(settings.log_level, settings.log_format, service="supervisor")
    return settings


async def _supervise_all(settings: Settings, listening: socket.socket, redis: Server | None, demo: str | None) -> None:
    """Run until a signal arrives.  `demo`: the key of a model for which commands are printed."""
    async with Supervisor() as supervisor:
        if redis:
            settings = msgspec.structs.replace(settings, redis_url=redis.url)
            command = Command(
                name="redis", argv=redis.argv, environ=_inherited(), pass_fds=redis.pass_fds, grace_s=REDIS_GRACE_S
            )
            supervisor.start(command)
            await supervisor.until(partial(devredis.missing, redis.socket), "The embedded Redis")
            await devredis.forget_lease(redis.socket, settings.name)
        supervisor.start(worker_command(msgspec.structs.replace(settings, drain_s=0.0), WORKER_GRACE_S))
        supervisor.start(*[api_command(settings, listening, UP_DRAIN_S)] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, paths.READYZ), "Loadstone")
        url = listener.url(settings.host, listening)
        click.echo(f"ready: {url}")
        if demo:
            load = {"model": demo, "echo_load_config": True}
            chat = {"model": demo, "messages": [{"role": "user", "content": "Name three colours."}]}
            click.echo(f"load a demo model: {_curl(settings, url + paths.LOAD, load)}", err=True)
            click.echo(f"talk to it: {_curl(settings, url + paths.CHAT_COMPLETIONS, chat)}", err=True)
        await supervisor.forever()


async def _supervise_api(settings: Settings, listening: socket.socket) -> None:
    async with Supervisor() as supervisor:
        command = api_command(settings, listening, settings.drain_s)
        supervisor.start(*[command] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, paths.HEALTHZ), "The API")
        click.echo(f"listening: {listener.url(settings.host, listening)}")
        await supervisor.forever()


async def _supervise_worker(settings: Settings) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(worker_command(settings, settings.drain_s + LONE_WORKER_GRACE_S))
        await supervisor.forever()


def api_command(settings: Settings, listening: socket.socket, drain_s: float) -> Command:
    """Return the command of an API process.  `drain_s`: the longest time that requests in progress get to end."""
    fd = listening.fileno()
    return Command(
        name="api",
        argv=(*_module("api"), "--fd", str(fd), "--drain", str(drain_s)),
        environ=_environ(settings),
        pass_fds=(fd,),
        grace_s=drain_s + API_GRACE_S,
        watchdog_s=WATCHDOG_S,
    )


def worker_command(settings: Settings, grace_s: float) -> Command:
    # A crafted file that exploits the engine must not give access to the API tokens.
    settings = msgspec.structs.replace(settings, api_tokens="", api_tokens_file=None)
    return Command(
        name="worker",
        argv=_module("worker"),
        environ=_environ(settings),
        grace_s=grace_s,
        watchdog_s=WATCHDOG_S,
    )


def _module(name: str) -> tuple[str, ...]:
    """Return the command line of a module.  -P: do not import from the current directory."""
    return (sys.executable, "-P", "-m", name)


def _inherited() -> dict[str, str]:
    """Return the environment without the variables of Loadstone."""
    return {name: value for name, value in os.environ.items() if not name.startswith(PREFIX)}


def _environ(settings: Settings) -> dict[str, str]:
    """Return the environment of a Python process.  Names of files are UTF-8, whatever the locale (PEP 540)."""
    return _inherited() | {"PYTHONUTF8": "1"} | to_environ(settings)


def make_directories(settings: Settings, *, has_models: bool) -> None:
    """Create the directories of data and models.  With `has_models`, those of models must exist: they would be empty.

    Raises SettingsError.
    """
    missing = [path for path in settings.roots if not path.exists()]
    if has_models and missing:
        raise SettingsError(f"{variable('models_dir')} is '{missing[0]}': this directory does not exist.")
    of_models = [("models_dir", path, 0o755) for path in settings.roots]
    for field, path, mode in [("data_dir", settings.data_dir, 0o700), *of_models]:
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as e:
            raise SettingsError(f"{variable(field)} is '{path}': it must be a directory ({e.strerror}).") from None


@contextmanager
def only_one(data_dir: Path) -> Iterator[None]:
    """Hold the lock of `loadstone up` on a data directory.  Child processes do not inherit it.

    Raises SettingsError if another `loadstone up` holds it, or if the directory is not writable.
    """
    where = f"{variable('data_dir')} is '{data_dir}'"
    with ExitStack() as held:
        try:
            held.enter_context(filelock.lock(data_dir / "up.lock"))
        except OSError as e:
            raise SettingsError(f"{where}: it must be a writable directory ({e.strerror}).") from None
        except filelock.Held:
            raise SettingsError(f"{where}, which another `loadstone up` is using: each needs its own.") from None
        yield


def _curl(settings: Settings, url: str, body: Mapping[str, object]) -> str:
    token = ' -H "Authorization: Bearer $TOKEN"' if read_tokens(settings) else ""
    return f"curl {url}{token} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
