"""`python -m api --fd N`: one API process on a listening socket that it inherits.

Told to stop, it drains (`Server`): a balancer sees `/readyz` fail before anything else does, and whoever waits gets a
last while.
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
from shared.settings import SettingsError, check_exposure, from_environ, redis_url
from shared.telemetry import log

GRACE_S = 2  # for replies that are being written when the drain ends
TICKS = 10  # of uvicorn, in a second


class Server(uvicorn.Server):
    """uvicorn, which drains before it stops, and calls `beat` each second.

    The first signal sets `draining`.  It answers on for `drain_s[0]` seconds, and while requests are under way for up
    to `drain_s[1]`; then it sets `closing` and stops.  A second signal does that at once.
    """

    def __init__(
        self,
        config: uvicorn.Config,
        draining: asyncio.Event,
        closing: asyncio.Event,
        drain_s: tuple[float, float],
        beat: Callable[[], None],
    ) -> None:
        super().__init__(config)
        self.draining, self.closing = draining, closing
        self.drain_s, self.beat = drain_s, beat
        self.told_at = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Not uvicorn's, which stops at once, and dies of the signal in the end."""
        if self.draining.is_set():
            self.force_exit = True
        else:
            self.told_at = time.monotonic()
            self.draining.set()

    async def on_tick(self, counter: int) -> bool:
        if counter % TICKS == 0:
            self.beat()
        if self.draining.is_set() and self._is_drained():
            self.closing.set()
            self.should_exit = True
        if self.lifespan.error_occurred:  # what follows, refreshes and sweeps is dead: another process will do it
            self.closing.set()
            return True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """In a hurry uvicorn would leave the lifespan to be cancelled, which it then logs as a fault."""
        await super().shutdown(sockets)
        if self.force_exit:
            await self.lifespan.shutdown()

    def _is_drained(self) -> bool:
        least_s, most_s = self.drain_s
        so_far_s = time.monotonic() - self.told_at
        under_way = bool(self.server_state.tasks)
        return self.force_exit or so_far_s >= (most_s if under_way else least_s)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    parser.add_argument("--drain", type=float, nargs=2, default=(0.0, 0.0), metavar=("LEAST", "MOST"), help="seconds")
    parser.add_argument("--beat-fd", type=int, help="where the supervisor hears that we live")
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
    Server(server_config(app), draining, closing, tuple(arguments.drain), beat).run(sockets=[listening])
    return 0


def server_config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        reset_contextvars=True,  # what a request's lines carry is not on those of the next on its connection
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,  # clients keep connections; 5 s, uvicorn's default, would cut them between two calls
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    sys.exit(main())
