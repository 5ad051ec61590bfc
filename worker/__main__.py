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
from worker.main import run
from worker.runner.process import RunnerDied


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m worker")
    parser.add_argument("--beat-fd", type=int, help="where the supervisor hears that we live")
    beat = heartbeat(parser.parse_args().beat_fd)
    status = 0
    try:
        settings = from_environ(os.environ)
        strip_environment()
        # Read as the runners' server imports the engine: its threads wait for each other asleep, since spinning takes
        # the core from the one that is waited for, where cores are busy (libgomp's OMP_WAIT_POLICY).
        os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
        log.configure(settings.log_level, settings.log_format, service="worker", worker=settings.name)
        uvloop.run(run(settings, beat))
    except* (SettingsError, LeaseLost) as group:
        print(f"loadstone: {_first(group)}", file=sys.stderr)  # noqa: T201
        status = 2
    except* RunnerDied as group:  # the supervisor starts us again
        print(f"loadstone: {_first(group)}", file=sys.stderr)  # noqa: T201
        status = 1
    return status


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
