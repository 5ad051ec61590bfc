"""`python -m worker`: one worker process, configured by `LOADSTONE_*` variables."""

from __future__ import annotations

import os
import sys

import uvloop

from shared import log
from shared.settings import PREFIX, SettingsError, from_environ
from worker.agent import LeaseLost
from worker.main import run


def main() -> int:
    status = 0
    try:
        settings = from_environ(os.environ)
        for name in [name for name in os.environ if name.startswith(PREFIX)]:
            del os.environ[name]  # runners inherit this environment, and no secret
        log.configure(settings.log_level, settings.log_format, service="worker", worker=settings.name)
        uvloop.run(run(settings))
    except* (SettingsError, LeaseLost) as group:
        print(f"loadstone: {_first(group)}", file=sys.stderr)  # noqa: T201
        status = 2
    return status


def _first(group: BaseExceptionGroup[BaseException]) -> BaseException:
    found: BaseException = group
    while isinstance(found, BaseExceptionGroup):
        found = found.exceptions[0]
    return found


if __name__ == "__main__":
    sys.exit(main())
