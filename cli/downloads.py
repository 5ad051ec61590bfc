"""The client commands of downloads: `loadstone get` and `loadstone rm`."""

from __future__ import annotations

import os
from contextlib import closing
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, NoReturn, assert_never

import click
from msgspec import UNSET

from cli import interrupt
from cli.commands import command, document, following, say, show
from cli.failure import Failure, Interrupted
from shared.errors import ErrorBody
from shared.schema.http import DownloadJob, DownloadRequest, LoadRequest
from shared.units import size

if TYPE_CHECKING:
    from cli.client import Client


@command
@click.argument("model", metavar="KEY[@QUANTIZATION]")
@click.option("--revision", metavar="NAME", help="Branch, tag or commit. Default: main.")
@click.option("--worker", metavar="NAME", help="Download to this worker. Default: the one with the most room.")
@click.option("--detach", is_flag=True, help="Do not wait for the download; write the id of its job to stdout.")
@click.option(
    "--estimate-only",
    is_flag=True,
    help="Download nothing; write what a load would use, and the quantizations. Exits with 1 if it does not fit.",
)
def get(
    server: Client,
    as_json: bool,
    model: str,
    revision: str | None,
    worker: str | None,
    detach: bool,
    estimate_only: bool,
) -> None:
    """Download a model.

    Writes the key that loads the model to stdout. KEY is that of a repository at Hugging Face, or its URL. Ctrl-C
    pauses the download; the same command resumes it.
    """
    if estimate_only:
        if revision or worker or detach:
            raise click.UsageError("--estimate-only cannot be combined with --revision, --worker or --detach.")
        show(server.estimate(LoadRequest(model=model)), as_json)
        return
    request = DownloadRequest(model=model, revision=revision or UNSET, worker=worker or UNSET)
    with interrupt.Raising():
        reply = server.download(request, os.urandom(16).hex())
        if reply.job_id is UNSET:
            say(f"{model} is there already.")
            if as_json:
                document(reply)
            return
        job_id = reply.job_id
        if reply.status == "paused":
            server.change_download(job_id, "resume")
        if detach:
            document(reply) if as_json else click.echo(job_id)
            return
        try:
            job = _followed(server, job_id, model)
        except KeyboardInterrupt:
            _paused(server, job_id)
    if as_json:
        document(job)
    else:
        click.echo(_key(model, job))


def _followed(server: Client, job_id: str, model: str) -> DownloadJob:
    """Show a download up to its end; return its job.  Raises Failure if it fails, or is paused or cancelled."""
    with following(model) as shown, closing(server.follow_download(job_id)) as jobs:
        server.note = shown.note
        for job in jobs:
            match job.status:
                case "downloading":
                    shown.update(_share(job), _facts(job))
                case "completed":
                    shown.update(1.0, f"{size(job.total_size_bytes)} downloaded")
                    return job
                case "failed" | "cancelled" | "paused":
                    message = f"The download was {job.status} as job {job_id}."
                    raise Failure(
                        ErrorBody(type="download_failed", message=message) if job.error is UNSET else job.error
                    )
                case _:
                    assert_never(job.status)
    raise AssertionError("a download is followed to its end")


def _share(job: DownloadJob) -> float:
    return job.downloaded_bytes / job.total_size_bytes if job.total_size_bytes else 0.0


def _facts(job: DownloadJob) -> str:
    """Format the bytes, the rate and the remaining time, as far as they are known."""
    parts = [f"{size(job.downloaded_bytes)} of {size(job.total_size_bytes)}"]
    if job.bytes_per_second is not UNSET:
        parts.append(f"{size(job.bytes_per_second)}/s")
    if job.estimated_completion is not UNSET:
        left_s = max(0.0, (job.estimated_completion - datetime.now(UTC)).total_seconds())
        parts.append(f"{timedelta(seconds=round(left_s))} left")
    return ", ".join(parts)


def _paused(server: Client, job_id: str) -> NoReturn:
    """Pause a download.  Raises Interrupted."""
    server.note = say
    try:
        server.change_download(job_id, "pause")
        message = f"Paused as job {job_id}. The same command resumes it."
    except Failure as failure:
        message = str(failure)
    raise Interrupted(ErrorBody(type="interrupted", message=message)) from None


def _key(model: str, job: DownloadJob) -> str:
    """Return a key that loads what was downloaded."""
    base = job.repository.lower().removesuffix("-gguf")
    _, _, quantization = model.partition("@")
    return f"{base}@{quantization.lower()}" if quantization and "://" not in model else base


@command
@click.argument("model", metavar="KEY")
@click.option("--worker", metavar="NAME", help="Remove the model from this worker only.")
def rm(server: Client, as_json: bool, model: str, worker: str | None) -> None:
    """Remove the files of a model that is not loaded."""
    removed = server.remove(model, worker)
    if as_json:
        document(removed)
    else:
        say(f"Removed {model} from {', '.join(removed.workers)}.")


COMMANDS = {"get": get, "rm": rm}
