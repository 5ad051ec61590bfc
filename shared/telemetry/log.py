"""Logging: one line per event on stderr, with a stable `action` and the ids of the objects involved."""

from __future__ import annotations

import logging
import sys
from contextlib import AbstractContextManager
from typing import Any, Literal, assert_never

import structlog

from shared.instance import Instance
from shared.telemetry import trace


def configure(level: str, form: Literal["console", "json"], **context: str) -> None:
    """Set up structlog and the standard library's loggers for this process; every line carries `context`."""

    def add_context(_: Any, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, **{name: value for name, value in context.items() if name not in event}}

    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        add_context,
        structlog.stdlib.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.format_exc_info,
    ]
    structlog.configure(
        processors=[
            structlog.stdlib.filter_by_level,
            *shared,
            structlog.stdlib.ProcessorFormatter.wrap_for_formatter,
        ],
        logger_factory=structlog.stdlib.LoggerFactory(),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, _renderer(form)],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    for noisy in ("arq", "gguf", "uvicorn.access", "uvicorn.error", "asyncio"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _renderer(form: Literal["console", "json"]) -> structlog.typing.Processor:
    match form:
        case "console":
            return structlog.dev.ConsoleRenderer(colors=sys.stderr.isatty(), sort_keys=False)
        case "json":
            return structlog.processors.JSONRenderer()
        case _:
            assert_never(form)


def begin(**ids: str) -> None:
    """Give all further lines of the current task these ids, and no others, as `bind` does."""
    structlog.contextvars.clear_contextvars()
    bind(**ids)


def bind(**ids: str) -> None:
    """Add ids to all further lines of the current task, and of the tasks that it starts from now on."""
    structlog.contextvars.bind_contextvars(**ids)


def about(instance: Instance) -> AbstractContextManager[None]:
    """Add the ids of a load and of its trace to the lines of a `with` block, for tasks that work on many loads."""
    span = trace.parse(instance.traceparent)
    return structlog.contextvars.bound_contextvars(**instance.ids, **({"trace_id": span.trace_id} if span else {}))


def get(name: str) -> Any:
    """Return a structlog logger: `log.info("loaded", action="transition", old=...)`."""
    return structlog.get_logger(name)
