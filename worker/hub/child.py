"""Starts the process that talks to the hub, and reads what it replies."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator
from contextlib import suppress

import msgspec

from shared import framing
from shared.telemetry import log
from worker.hub.protocol import Ask, Told, decode_told

MOST_BYTES = 64 << 20  # of a reply

_log = log.get("worker")


async def answers(ask: Ask) -> AsyncGenerator[Told, None]:
    """Yield what a new process replies.  Ends it when closed; the process is reaped by then."""
    try:
        child = await asyncio.create_subprocess_exec(
            sys.executable,
            "-P",
            "-m",
            "worker.hub.process",
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
    except OSError as e:
        _log.error("process not started", action="download_process_failed", reason=e.strerror)
        return
    assert child.stdin is not None
    assert child.stdout is not None
    try:
        child.stdin.write(framing.frame(ask))
        with suppress(framing.TooLong, msgspec.MsgspecError):  # what an attacker in it says is the end of it
            while (data := await framing.read(child.stdout, MOST_BYTES)) is not None:
                yield decode_told(data)
    finally:
        with suppress(ProcessLookupError):
            child.kill()
        child.stdin.close()
        await child.communicate()
