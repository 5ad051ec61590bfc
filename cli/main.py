"""The command line: commands, flags and error messages."""

from __future__ import annotations

import asyncio
import errno
import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import click
import msgspec

import shared
from cli import devredis, listener
from cli.demo import write_demo
from cli.devredis import RedisUnavailable
from cli.supervisor import StartFailed, Stopped
from cli.up import make_directories, only_one, run_all, run_api, run_worker
from shared.settings import (
    Settings,
    SettingsError,
    check_exposure,
    entry,
    from_environ,
    redis_url,
    variable,
)
from shared.telemetry import log

UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})  # of write(2)
CLIENT_COMMANDS = ("ls", "ps", "load", "unload", "jobs", "cancel", "logs", "workers")  # of cli.commands


@contextmanager
def sentences() -> Iterator[None]:
    """Print errors that users can correct without a traceback, and exit.  A stop signal is not an error."""
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
    """Add the flags of a command from the settings that name it.  Values stay text; the settings validate them."""

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
    """Imports the client commands only when one of them is used, since servers need no HTTP client."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command.  Its output never fails because of a character, and fails in one sentence on a full disk."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        try:
            return super().main(*args, **kwargs)
        except OSError as e:
            if e.errno not in UNWRITABLE or e.filename is not None:
                raise
            sys.stdout = None  # the interpreter would write the rest again when it exits
            _refuse(f"the output cannot be written: {e.strerror}.", 1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*super().list_commands(ctx), *CLIENT_COMMANDS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in CLIENT_COMMANDS:
            return super().get_command(ctx, cmd_name)
        from cli import commands

        return commands.client.get_command(ctx, cmd_name)


@click.group(cls=Program)
@click.version_option(shared.__version__, prog_name="loadstone", message="%(prog)s %(version)s")
def main() -> None:
    """Loads GGUF models into memory on request: an LM Studio compatible model API for a pool of GPUs."""


@main.command()
@options("up")
@click.option(
    "--demo",
    is_flag=True,
    help="Write tiny demo models and download a small real one first, if the models directory has no other files.",
)
def up(demo: bool, **flags: str | None) -> None:
    """Run an API, a worker and, unless a Redis server is configured, an embedded Redis on this machine."""
    with sentences(), ExitStack() as undo:
        settings = _settings(flags)
        check_exposure(settings)
        make_directories(settings)
        undo.enter_context(only_one(settings.data_dir))
        listening = undo.enter_context(listener.bind(settings))
        first = write_demo(settings.models_dir) if demo else None
        redis = None if settings.redis_url else undo.enter_context(devredis.prepared(settings.data_dir))
        asyncio.run(run_all(settings, listening, redis, first))


@main.command()
@options("api")
def api(**flags: str | None) -> None:
    """Run the HTTP API of a pool.  Its workers must use the same Redis."""
    with sentences():
        settings = _settings(flags)
        redis_url(settings)
        check_exposure(settings)
        with listener.bind(settings) as listening:
            asyncio.run(run_api(settings, listening))


@main.command()
@options("worker")
def worker(**flags: str | None) -> None:
    """Run a worker of a pool, which loads models onto the devices of this machine."""
    with sentences():
        settings = _settings(flags)
        redis_url(settings)
        asyncio.run(run_worker(settings))


def _settings(flags: dict[str, str | None]) -> Settings:
    settings = from_environ(os.environ, flags)
    log.configure(settings.log_level, settings.log_format, service="supervisor")
    return settings
