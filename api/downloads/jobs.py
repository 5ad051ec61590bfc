"""Derives the job and the events of a download from its record."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import UTC, datetime
from typing import Literal

import msgspec
from msgspec import UNSET

from api.downloads.intake import Downloads
from api.waiting import HEARTBEAT_S
from shared.download import OVER, Download, State
from shared.errors import JobNotFound
from shared.schema.http import DownloadEvent, DownloadJob, DownloadReply
from shared.store.connection import UNAVAILABLE

Kind = Literal["download.progress", "download.end"]


def reply(download: Download) -> DownloadReply:
    """Return the reply to the request for a download."""
    return DownloadReply(
        status=download.state.value,
        job_id=download.id,
        total_size_bytes=download.plan.total_bytes,
        started_at=_time(download.started_at or download.created_at),
        completed_at=UNSET if download.completed_at is None else _time(download.completed_at),
    )


def job(download: Download) -> DownloadJob:
    """Return the job of a download."""
    rate, left = download.bytes_per_second, download.plan.total_bytes - download.downloaded_bytes
    now = datetime.now(UTC).timestamp()
    return DownloadJob(
        job_id=download.id,
        status=download.state.value,
        model=download.model,
        repository=download.plan.repository,
        revision=download.plan.commit,
        files=[file.path for file in download.plan.files],
        worker=download.worker,
        total_size_bytes=download.plan.total_bytes,
        downloaded_bytes=download.downloaded_bytes,
        started_at=_time(download.started_at or download.created_at),
        bytes_per_second=UNSET if rate is None else round(rate),
        estimated_completion=_time(now + left / rate) if rate and download.state is State.DOWNLOADING else UNSET,
        completed_at=UNSET if download.completed_at is None else _time(download.completed_at),
        error=UNSET if download.error is None else download.error,
    )


def is_over(download: Download) -> bool:
    return download.state in OVER


async def events(downloads: Downloads, id_: str, after: int, closing: asyncio.Event) -> AsyncGenerator[bytes, None]:
    """Yield the state of a download whenever it changes after revision `after`, and comments, up to its end.

    The stream ends early if this process closes or Redis does not answer: the client reconnects.
    """
    spoke = time.monotonic()
    try:
        async with aclosing(downloads.follow(id_)) as revisions:
            async for download in revisions:
                if closing.is_set():
                    return
                if download.rev > after:
                    after, spoke = download.rev, time.monotonic()
                    kind: Kind = "download.end" if is_over(download) else "download.progress"
                    data = msgspec.json.encode(DownloadEvent(type=kind, job=job(download)))
                    yield b"id: %d\nevent: %b\ndata: %b\n\n" % (after, kind.encode(), data)
                if is_over(download):
                    return
                if time.monotonic() - spoke >= HEARTBEAT_S:
                    spoke = time.monotonic()
                    yield b": nothing new\n\n"
    except (*UNAVAILABLE, JobNotFound):
        yield b": the record cannot be read\n\n"


def _time(at: float) -> datetime:
    return datetime.fromtimestamp(round(at, 3), UTC)
