"""The command line: starts the API, the workers and the embedded Redis as child processes."""

from __future__ import annotations

import asyncio
import fcntl
import os
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
import msgspec

import shared
from shared import devredis, listener, log
from shared.devredis import RedisUnavailable, Server
from shared.settings import (
    PREFIX,
    Settings,
    SettingsError,
    check_exposure,
    entry,
    from_environ,
    read_tokens,
    redis_url,
    to_environ,
    variable,
)
from shared.supervisor import Command, StartFailed, Stopped, Supervisor

DEMO_MODEL = "loadstone/demo-llm"  # the first of what shared.synthetic writes
CLIENT_COMMANDS = ("ls", "ps", "load", "unload", "jobs", "cancel", "logs", "workers")  # of shared.commands

# What `up` takes to stop is the sum of these: 10 s, as long as container runtimes wait before they kill.
UP_DRAIN_S = 1.0  # nothing balances here: the API ends as soon as no request is under way, and at the latest then
API_GRACE_S = 3.0  # after its drain; above what the API gives replies that are being written
WORKER_GRACE_S = 5.0
REDIS_GRACE_S = 1.0

LONE_WORKER_GRACE_S = 25.0  # a worker of a pool hands its loads over to others
WATCHDOG_S = 30.0  # a beat waits some 15 s for a Redis that hangs


@contextmanager
def sentences() -> Iterator[None]:
    """Failures that a user can do something about, without a traceback; to be asked to stop is none."""
    try:
        yield
    except (SettingsError, RedisUnavailable) as e:
        _refuse(str(e), 2)
    except StartFailed as e:
        _refuse(str(e), e.status)
    except Stopped:
        pass


def _refuse(sentence: str, status: int) -> NoReturn:
    click.echo(f"loadstone: {sentence}", err=True)
    sys.exit(status)


def options(command: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """The flags of a command: the settings that name it.  Values stay text, for one place to judge them."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        for field, default in reversed(msgspec.to_builtins(Settings(), enc_hook=str).items()):
            about = entry(field)
            if command not in about.flags:
                continue
            kind: dict[str, Any] = {"metavar": _metavar(about.kind.__origin__)}
            if about.kind.__origin__ is bool:
                kind = {"is_flag": True, "flag_value": "true", "type": str, "default": None}
            note = (
                f"[{variable(field)}]" if default in (None, "", False) else f"[{variable(field)}; default: {default}]"
            )
            function = click.option(
                about.flag, field, help=f"{about.meaning[0].upper()}{about.meaning[1:]}. {note}", **kind
            )(function)
        return function

    return add


def _metavar(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    return {int: "N", Path: "PATH", Path | None: "PATH"}.get(kind, "TEXT")


class Program(click.Group):
    """Besides its own commands those of a client, imported only where one is wanted: servers need no HTTP client."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *CLIENT_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in CLIENT_COMMANDS:
            return super().get_command(ctx, cmd_name)
        from shared import commands

        return commands.client.get_command(ctx, cmd_name)


@click.group(cls=Program)
@click.version_option(shared.__version__, prog_name="loadstone", message="%(prog)s %(version)s")
def main() -> None:
    """Loads GGUF models into memory on request: an LM Studio compatible model API for a pool of GPUs."""


@main.command()
@options("up")
@click.option("--demo", is_flag=True, help="Write tiny demo models first if the models directory holds none.")
def up(demo: bool, **flags: str | None) -> None:
    """Run everything on this machine: an API, a worker and, unless a Redis is given, an embedded one."""
    with sentences(), ExitStack() as undo:
        settings = _settings(flags)
        check_exposure(settings)
        _make_directories(settings)
        undo.enter_context(_only_one(settings.data_dir))
        listening = undo.enter_context(listener.bind(settings))
        if demo and not any(path.is_file() for path in settings.models_dir.rglob("*")):
            _write_demo(settings.models_dir)
        redis = None if settings.redis_url else undo.enter_context(devredis.prepared(settings.data_dir))
        asyncio.run(_up(settings, listening, redis, demo))


@main.command()
@options("api")
def api(**flags: str | None) -> None:
    """Run the HTTP API of a pool whose workers use the same Redis."""
    with sentences():
        settings = _settings(flags)
        redis_url(settings)
        check_exposure(settings)
        with listener.bind(settings) as listening:
            asyncio.run(_api(settings, listening))


@main.command()
@options("worker")
def worker(**flags: str | None) -> None:
    """Run a worker of a pool: it loads models on this machine's devices."""
    with sentences():
        settings = _settings(flags)
        redis_url(settings)
        asyncio.run(_worker(settings))


async def _up(settings: Settings, listening: socket.socket, redis: Server | None, demo: bool) -> None:
    async with Supervisor() as supervisor:
        if redis:
            settings = msgspec.structs.replace(settings, redis_url=redis.url)
            command = Command(
                name="redis", argv=redis.argv, environ=_foreign(), pass_fds=redis.pass_fds, grace_s=REDIS_GRACE_S
            )
            supervisor.start(command)
            await supervisor.until(partial(devredis.missing, redis.socket), "The embedded Redis")
            await devredis.forget_lease(redis.socket, settings.name)
        supervisor.start(_worker_command(settings, WORKER_GRACE_S))
        supervisor.start(*[_api_command(settings, listening, (0.0, UP_DRAIN_S))] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, "/readyz"), "Loadstone")
        url = listener.url(settings.host, listening)
        click.echo(f"ready: {url}")
        if demo and (settings.models_dir / DEMO_MODEL).is_dir():
            click.echo(f"load the demo model: {_demo_line(settings, url)}", err=True)
        await supervisor.forever()


async def _api(settings: Settings, listening: socket.socket) -> None:
    async with Supervisor() as supervisor:
        command = _api_command(settings, listening, (settings.drain_s, settings.drain_s))
        supervisor.start(*[command] * settings.api_workers)
        await supervisor.until(partial(listener.missing, listening, "/healthz"), "The API")
        click.echo(f"listening: {listener.url(settings.host, listening)}")
        await supervisor.forever()


async def _worker(settings: Settings) -> None:
    async with Supervisor() as supervisor:
        supervisor.start(_worker_command(settings, LONE_WORKER_GRACE_S))
        await supervisor.forever()


def _api_command(settings: Settings, listening: socket.socket, drain_s: tuple[float, float]) -> Command:
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


def _worker_command(settings: Settings, grace_s: float) -> Command:
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


def _settings(flags: dict[str, str | None]) -> Settings:
    settings = from_environ(os.environ, flags)
    log.configure(settings.log_level, settings.log_format, service="supervisor")
    return settings


def _make_directories(settings: Settings) -> None:
    for field, mode in (("data_dir", 0o700), ("models_dir", 0o755)):
        path: Path = getattr(settings, field)
        try:
            path.mkdir(mode=mode, parents=True, exist_ok=True)
        except OSError as e:
            raise SettingsError(f"{variable(field)} is '{path}': it must be a directory ({e.strerror}).") from None


@contextmanager
def _only_one(data_dir: Path) -> Iterator[None]:
    """The right to run on a data directory, for as long as this process lives: children do not inherit it."""
    where = f"{variable('data_dir')} is '{data_dir}'"
    try:
        lock = (data_dir / "up.lock").open("w")
    except OSError as e:
        raise SettingsError(f"{where}: it must be a directory that can be written to ({e.strerror}).") from None
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SettingsError(f"{where}, where another `loadstone up` runs: each must have its own.") from None
        yield


def _write_demo(models_dir: Path) -> None:
    try:
        from shared import synthetic
    except ModuleNotFoundError as e:
        _refuse(f"--demo needs the module {e.name}: install Loadstone with its extra `demo`.", 2)
    try:
        synthetic.write_demo(models_dir)
    except OSError as e:
        where = f"{variable('models_dir')} is '{models_dir}'"
        raise SettingsError(f"{where}: with --demo it must be one that can be written to ({e.strerror}).") from None


def _demo_line(settings: Settings, url: str) -> str:
    token = ' -H "Authorization: Bearer $TOKEN"' if read_tokens(settings) else ""
    return (
        f"curl {url}/api/v1/models/load{token} -H 'Content-Type: application/json' "
        f"""-d '{{"model": "{DEMO_MODEL}", "echo_load_config": true}}'"""
    )
