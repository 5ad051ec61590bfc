"""The entry point of `loadstone`.  Imports the program only once Ctrl-C ends the process without a traceback."""

from __future__ import annotations

from cli import interrupt


def main() -> None:
    """Run the command of this process's arguments, and exit."""
    interrupt.leave_at_once()
    from cli.program import program

    program()
