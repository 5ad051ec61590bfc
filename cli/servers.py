"""The commands that run servers, with their flags from the settings.  `cli.up` runs them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import click
import msgspec

from shared.settings import Settings, entry, variable


@click.group()
def servers() -> None:
    """The commands that run servers."""


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


@servers.command()
@options("up")
@click.option(
    "--demo",
    is_flag=True,
    help="Write tiny demo models and download a small real one first, if the models directory has no other files.",
)
def up(demo: bool, **flags: str | None) -> None:
    """Run a whole server on this machine: API, worker and Redis.

    Without a Redis server that is configured, an embedded one is run.
    """
    from cli.up import run_up

    run_up(flags, demo=demo)


@servers.command()
@options("api")
def api(**flags: str | None) -> None:
    """Run the HTTP API of a pool.  Its workers must use the same Redis."""
    from cli.up import run_api

    run_api(flags)


@servers.command()
@options("worker")
def worker(**flags: str | None) -> None:
    """Run a worker of a pool.  It loads models onto the devices of this machine."""
    from cli.up import run_worker

    run_worker(flags)
