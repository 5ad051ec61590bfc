"""`python -m api --fd N`: runs one API process on an inherited listening socket.

After a stop signal, the process drains (`Server`): `/readyz` fails, new requests for models are refused, and those in
progress get more time.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
import time
from collections.abc import Callable
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from api.app import create_app
from shared.heartbeat import heartbeat
from shared.settings import SettingsError, from_environ, redis_url
from shared.telemetry import log
from shared.tokens import check_exposure

GRACE_S = 2  # for replies that are still being sent when the drain ends
TICKS = 10  # per second, of uvicorn


class Server(uvicorn.Server):
    """A uvicorn server that drains before it stops, and calls `beat` every second.

    The first signal sets `draining`.  The server then continues as long as requests are in progress, for up to
    `drain_s` seconds; then it sets `closing` and stops.  A second signal ends the drain at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        draining: asyncio.Event,
        closing: asyncio.Event,
        drain_s: float,
        beat: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.draining, self.closing = draining, closing
        self.drain_s, self.beat = drain_s, beat
        self.stop_signal_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Start the drain.  uvicorn's own handler stops at once, and raises the signal again in the end."""
        if self.draining.is_set():
            self.force_exit = True
        else:
            self.stop_signal_at = time.monotonic()
            self.draining.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS == 0:
            self.beat()
        if self.draining.is_set() and self._is_drained():
            self.closing.set()
            self.should_exit = True
        if self.lifespan.error_occurred:  # the background tasks have failed: exit, to be restarted
            self.closing.set()
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Also end the lifespan after a forced exit: uvicorn would cancel it and log an error."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def _is_drained(self) -> bool:
        elapsed_s = time.monotonic() - self.stop_signal_at
        return self.force_exit or not self.server_state.tasks or elapsed_s >= self.drain_s


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--fd", type=int, required=True, help="file descriptor of the listening socket")
    parser.add_argument("--drain", type=float, default=0.0, metavar="S", help="seconds for requests in progress")
    parser.add_argument("--beat-fd", type=int, help="file descriptor for heartbeats to the supervisor")
    arguments = parser.parse_args()
    listening = socket.socket(fileno=arguments.fd)
    beat = heartbeat(arguments.beat_fd)
    try:
        settings = from_environ(os.environ)
        redis_url(settings)
        check_exposure(settings)
        log.configure(settings.log_level, settings.log_format, service="api")
        draining, closing = asyncio.Event(), asyncio.Event()
        app = create_app(settings, closing, draining)
    except SettingsError as e:
        print(f"loadstone: {e}", file=sys.stderr)  # noqa: T201  the log is not set up yet
        return 2
    Server(server_config(app), draining, closing, arguments.drain, beat).run(sockets=[listening])
    return 0


def server_config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        reset_contextvars=True,  # do not carry log context over to the next request of a connection
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,  # uvicorn's default of 5 s would close connections that clients keep
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    sys.exit(main())
