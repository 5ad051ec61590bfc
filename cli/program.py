"""The command line: its commands, and what all of them have in common.

The modules of commands are light.  A command imports what it runs with when it runs, so that each starts quickly.
"""

from __future__ import annotations

import errno
import io
import os
import sys
from typing import Any

import click

import shared

UNWRITABLE = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EBADF})  # of write(2)
SERVERS = ("up", "api", "worker")  # of cli.servers
COMPLETE = "_LOADSTONE_COMPLETE"  # the variable by which a shell asks for completions
ALIASES = {"list": "ls"}
CLIENTS = ("ls", "ps", "load", "unload", "chat", "embed", "jobs", "cancel", "logs", "workers")  # of cli.commands
DOWNLOADS = ("get", "rm")  # of cli.downloads


class Program(click.Group):
    """The group of all commands.  Imports the module of the command that is run."""

    def main(self, *args: Any, **kwargs: Any) -> Any:
        """Run a command.  Its output never fails because of a character, and fails in one sentence on a full disk."""
        for stream in (sys.stdout, sys.stderr):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
        if COMPLETE in os.environ:
            from cli import completion

            completion.register()
        try:
            return super().main(*args, **kwargs)
        except OSError as e:
            if e.errno not in UNWRITABLE or e.filename is not None:
                raise
            sys.stdout = None  # the interpreter would write the rest again when it exits
            click.echo(f"loadstone: the output cannot be written: {e.strerror}.", err=True)
            sys.exit(1)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return [*SERVERS, *CLIENTS, *DOWNLOADS]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        cmd_name = ALIASES.get(cmd_name, cmd_name)
        if cmd_name in SERVERS:
            from cli.servers import servers

            return servers.get_command(ctx, cmd_name)
        if cmd_name == "chat":
            from cli.chat import chat

            return chat
        if cmd_name == "embed":
            from cli.embed import embed

            return embed
        if cmd_name in CLIENTS:
            from cli.commands import client

            return client.get_command(ctx, cmd_name)
        if cmd_name in DOWNLOADS:
            from cli import downloads

            return downloads.COMMANDS[cmd_name]
        return None


@click.group(cls=Program, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(shared.__version__, prog_name="loadstone", message="%(prog)s %(version)s")
def program() -> None:
    """Loads GGUF models into memory on request: an LM Studio compatible model API for a pool of GPUs."""
