"""`python -m api --fd N`: one API process on a listening socket that it inherits."""

from __future__ import annotations

import argparse
import asyncio
import os
import socket
import sys
from types import FrameType

import uvicorn
from starlette.applications import Starlette

from api.app import create_app
from shared import log
from shared.settings import SettingsError, check_exposure, from_environ, redis_url

GRACE_S = 3  # for replies that are being written when the process is told to stop


class Server(uvicorn.Server):
    """uvicorn, which also tells waiting replies that it is told to stop."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self.closing = closing

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.closing.set()
        super().handle_exit(sig, frame)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m api")
    parser.add_argument("--fd", type=int, required=True, help="the listening socket")
    listening = socket.socket(fileno=parser.parse_args().fd)
    try:
        settings = from_environ(os.environ)
        redis_url(settings)
        check_exposure(settings)
        log.configure(settings.log_level, settings.log_format, service="api")
        closing = asyncio.Event()
        app = create_app(settings, closing)
    except SettingsError as e:
        print(f"loadstone: {e}", file=sys.stderr)  # noqa: T201  the log is not set up yet
        return 2
    Server(server_config(app), closing).run(sockets=[listening])
    return 0


def server_config(app: Starlette) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_config=None,
        server_header=False,
        timeout_keep_alive=75,  # clients keep connections; 5 s, uvicorn's default, would cut them between two calls
        timeout_graceful_shutdown=GRACE_S,
    )


if __name__ == "__main__":
    sys.exit(main())
