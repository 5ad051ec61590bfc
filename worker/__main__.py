"""`python -m worker`: one worker process, configured by `LOADSTONE_*` variables."""

from __future__ import annotations

import argparse
import os
import sys

import uvloop

from shared.heartbeat import heartbeat
from shared.settings import SettingsError, from_environ
from shared.telemetry import log
from worker.agent import LeaseLost
from worker.environment import strip_environment
from worker.hub.client import access
from worker.main import CatalogLate, run
from worker.runner.process import RunnerDied, RunnerStuck


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker")
    parser.add_argument("--beat-fd", type=int, help="file descriptor of the heartbeat to the supervisor")
    beat = heartbeat(parser.parse_args().beat_fd)
    status = 0
    try:
        settings = from_environ(os.environ)
        hub = access(os.environ, settings.hub_hosts) if settings.downloads == "on" else None
        strip_environment()
        # libgomp reads this when the fork server imports the engine.  Threads that spin at a barrier would take the
        # core from the thread they wait for if cores are busy (libgomp's OMP_WAIT_POLICY).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        log.configure(settings.log_level, settings.log_format, service="worker", worker=settings.name)
        uvloop.run(run(settings, beat, hub))
    except* (SettingsError, LeaseLost) as group:
        print(f"loadstone: {_first(group)}", file=sys.stderr)  # noqa: T201
        status = 2
    except* (CatalogLate, RunnerDied, RunnerStuck) as group:  # the supervisor restarts the worker
        print(f"loadstone: {_first(group)}", file=sys.stderr)  # noqa: T201
        status = 1
    return status


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    error: BaseException = group
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    sys.exit(main())
