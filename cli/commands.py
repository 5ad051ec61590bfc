"""The client commands of the command line: each asks a server, and says what came of it.

stdout has the result, or with --json exactly one JSON document (a failure's is the error, as the API shows it), and
stderr everything else.  Exit status: 0 done, 1 failed, 2 wrong usage, 130 cancelled.
"""

from __future__ import annotations

import functools
import sys
import uuid
from collections.abc import Callable
from contextlib import closing, suppress
from typing import Any, NoReturn, get_args, get_type_hints

import click
import msgspec
from msgspec import UNSET, Meta, Struct

from cli.client import Client, Failure, cancelled, checked_url
from cli.display import clean, following, left, percent, stage, table, when
from shared.errors import ErrorBody
from shared.schema.http import EstimateResult, GPURequest, Job, JobStatus, LoadConfig, LoadEnd, LoadRequest, LoadResult
from shared.units import size

FAILED, CANCELLED = 1, 130
VISIBLE = {chr(code) for code in range(0x21, 0x7F)}


class Interrupted(Failure):
    """Ctrl-C, whatever became of the load."""


@click.group()
def client() -> None:
    """The commands that ask a server."""


def visible_ascii(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """What a header can hold.  The sentence does not show it: it may be the token."""
    if text is not None and not (text and set(text) <= VISIBLE):
        raise click.BadParameter("it must be visible ASCII: letters, digits and signs.")
    return text


def http_url(context: click.Context, option: click.Parameter, text: str) -> str:
    if (url := checked_url(text)) is None:
        raise click.BadParameter("it must be like http://host:1234, without a user or password.")
    return url


OPTIONS: list[click.Parameter] = [
    click.Option(
        ["--url"],
        envvar="LOADSTONE_URL",
        default="http://127.0.0.1:1234",
        callback=http_url,
        help="Server to ask. [LOADSTONE_URL; default: http://127.0.0.1:1234]",
    ),
    click.Option(
        ["--token"],
        envvar="LOADSTONE_TOKEN",
        callback=visible_ascii,
        help="Bearer token; safer in the variable, since others can read a command line. [LOADSTONE_TOKEN]",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Write one JSON document to stdout."),
]


def command(function: Callable[..., None]) -> click.Command:
    """Add a command with the OPTIONS.  It gets a Client, whether to write JSON, and what options it has itself."""

    @functools.wraps(function)
    def run(url: str, token: str | None, as_json: bool, **words: Any) -> None:
        try:
            with Client(url, token or "", note=say) as server:
                function(server, as_json, **words)
        except Failure as failure:
            if as_json:
                document({"error": failure.error})
            say(str(failure))
            is_cancelled = isinstance(failure, Interrupted) or failure.error.code == "load_cancelled"
            sys.exit(CANCELLED if is_cancelled else FAILED)
        except KeyboardInterrupt:
            sys.exit(CANCELLED)

    made = client.command(function.__name__)(run)
    made.params += OPTIONS
    return made


@command
def ls(server: Client, as_json: bool) -> None:
    """List the models."""
    found = server.models()
    if as_json:
        document(found)
        return
    headings = ("MODEL", "TYPE", "ARCHITECTURE", "QUANTIZATION", "SIZE", "MAX CONTEXT", "LOADED")
    rows = [
        (
            model.key,
            model.type,
            model.architecture or "-",
            model.quantization.name or "-",
            size(model.size_bytes),
            str(model.max_context_length),
            str(len(model.loaded_instances)),
        )
        for model in found.models
    ]
    table(headings, rows)


@command
def ps(server: Client, as_json: bool) -> None:
    """List the instances that are loaded, and the loads that are under way."""
    # In the order in which they move on: what does so meanwhile is seen in its later state, and not missed.
    under_way = {
        job.instance_id: job for status in ("queued", "loading") for job in server.jobs(status=status, limit=1000).jobs
    }
    instances = [(model.key, instance) for model in server.models().models for instance in model.loaded_instances]
    jobs = [job for id_, job in under_way.items() if id_ not in {instance.id for _, instance in instances}]
    if as_json:
        loaded = [{"model": key, "state": "loaded", **msgspec.to_builtins(instance)} for key, instance in instances]
        document({"instances": loaded, "jobs": jobs})
        return
    rows = [
        (i.id, key, "loaded", i.worker, str(i.config.context_length), "100%", left(i.remaining_ttl_seconds))
        for key, i in instances
    ]
    rows += [
        (job.instance_id, job.model, stage(job.status, job.phase), job.worker, "-", percent(job.progress), "-")
        for job in jobs
    ]
    table(("INSTANCE", "MODEL", "STATE", "WORKER", "CONTEXT", "PROGRESS", "TTL"), rows)


def description(kind: type[Struct], field: str) -> str:
    """Return the description of a request's field, which its type carries."""
    annotated = get_type_hints(kind, include_extras=True)[field]
    (text,) = (meta.description for meta in annotated.__metadata__ if isinstance(meta, Meta))
    assert text is not None
    return text


def field_option(
    kind: type[Struct], field: str, flags: str, *, note: str = "", **attributes: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Make the option for a request's field.  Its help is the field's description, and `note`."""
    return click.option(flags, field, help=description(kind, field) + note, **attributes)


def offload_of(context: click.Context, option: click.Parameter, text: str | None) -> float | str | None:
    if text in (None, "max", "off"):
        return text
    with suppress(ValueError):
        if 0 <= (part := float(str(text))) <= 1:
            return part
    raise click.BadParameter("it must be a number from 0 to 1, max or off.")


def split_of(context: click.Context, option: click.Parameter, text: str | None) -> list[float] | str | None:
    if text in (None, "even", "priority"):
        return text
    with suppress(ValueError):
        parts = [float(part) for part in str(text).split(",")]
        if all(0 <= part < float("inf") for part in parts):
            return parts
    raise click.BadParameter("it must be even, priority or numbers like 2,1.")


@command
@click.argument("model", metavar="KEY")
@field_option(LoadRequest, "context_length", "--context-length", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "eval_batch_size", "--eval-batch-size", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "flash_attention", "--flash-attention/--no-flash-attention", default=None)
@field_option(LoadRequest, "num_experts", "--num-experts", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "offload_kv_cache_to_gpu", "--offload-kv-cache/--no-offload-kv-cache", default=None)
@field_option(LoadRequest, "parallel", "--parallel", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "ttl_seconds", "--ttl", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS")
@field_option(GPURequest, "offload", "--gpu-offload", callback=offload_of, metavar="SHARE")
@field_option(GPURequest, "worker", "--gpu-worker", metavar="NAME")
@field_option(GPURequest, "devices", "--gpu-device", note=" May be repeated.", multiple=True, metavar="ID")
@field_option(GPURequest, "split", "--gpu-split", callback=split_of, metavar="even|priority|N,N...")
@click.option("--copies", type=click.IntRange(1), default=1, metavar="N", help="Load it so many times.")
@field_option(LoadRequest, "force", "--force", is_flag=True, default=None)
@click.option("--estimate-only", is_flag=True, help="Load nothing: say what it would take. Exit status 0: it fits.")
@click.option("--detach", is_flag=True, help="Do not wait: write the job's id to stdout.")
@click.option(
    "--idempotency-key", metavar="KEY", callback=visible_ascii, help="The same key again joins the load it began."
)
def load(
    server: Client,
    as_json: bool,
    model: str,
    estimate_only: bool,
    detach: bool,
    copies: int,
    idempotency_key: str | None,
    **fields: Any,
) -> None:
    """Load a model, and write the id of its instance to stdout once it is in memory.

    Ctrl-C cancels the load; a second one does not wait until it has ended.
    """
    gpu = {name: fields.pop(name) for name in ("offload", "worker", "devices", "split")}
    gpu = {name: value for name, value in gpu.items() if value not in (None, ())}
    given = {name: value for name, value in fields.items() if value is not None}
    if gpu:
        given["gpu"] = GPURequest(**gpu | ({"devices": [*gpu["devices"]]} if "devices" in gpu else {}))
    if estimate_only:
        if detach or idempotency_key:
            raise click.UsageError("--estimate-only loads nothing: leave out --detach and --idempotency-key.")
        show(server.estimate(LoadRequest(model=model, **given)), as_json)
        return
    request = LoadRequest(model=model, echo_load_config=True, **given)
    key = idempotency_key or uuid.uuid4().hex
    jobs: dict[str, Job | None] = dict.fromkeys([key] if copies == 1 else [f"{key}-{n + 1}" for n in range(copies)])
    try:
        for key in jobs:  # all are accepted before the first is waited for, so that several devices load at once
            jobs[key] = server.submit(request, key)
        accepted = [job for job in jobs.values() if job is not None]
        if detach:
            if as_json:
                document(accepted if copies > 1 else accepted[0])
            else:
                click.echo("\n".join(job.job_id for job in accepted))
            return
        results, failures = followed(server, accepted, as_json=as_json)
    except KeyboardInterrupt:
        interrupted(server, request, jobs)
    if as_json and copies > 1:
        document({"loaded": results, "errors": [failure.error for failure in failures]})
        sys.exit(FAILED if failures else 0)
    if failures:
        raise failures[0]
    if as_json:
        document(results[0])


def followed(server: Client, jobs: list[Job], *, as_json: bool) -> tuple[list[LoadResult], list[Failure]]:
    """Follow loads to their ends, one after the other, and write the id of each instance as soon as it is loaded."""
    results: list[LoadResult] = []
    failures: list[Failure] = []
    for job in jobs:
        try:
            result = outcome(server, job)
        except Failure as failure:
            if failure.retry_after_s is not None:  # patience ended, and not the load
                say(f"The load goes on as {job.job_id}.")
            elif failures or job is not jobs[-1]:  # the last thing said is the first that failed
                say(str(failure))
            failures.append(failure)
            continue
        results.append(result)
        if not as_json:
            applied = describe(result.load_config) if result.load_config is not UNSET else ""
            say(f"loaded in {result.load_time_seconds:.3g} s{applied}")
            click.echo(clean(result.instance_id))
    return results, failures


def show(found: EstimateResult, as_json: bool) -> None:
    """Write an estimate.  Exits with FAILED where it does not fit."""
    if as_json:
        document(found)
    else:
        headings = ("DEVICE", "WORKER", "WEIGHTS", "CONTEXT", "COMPUTE", "TOTAL", "FREE", "FITS", "LARGEST CONTEXT")
        ends = ("yes" if found.fits else "no", str(found.max_context_length_that_fits or "-"))
        table(
            headings,
            [
                (
                    device.id,
                    device.worker,
                    size(device.weights_bytes),
                    size(device.context_bytes),
                    size(device.compute_bytes),
                    size(device.total_bytes),
                    size(device.free_bytes),
                    *ends,
                )
                for device in found.devices
            ],
        )
        if not found.exact:
            say("This is a guess: the formula was not compared with the engine for this.")
    if not found.fits:
        sys.exit(FAILED)


def outcome(server: Client, job: Job) -> LoadResult:
    """Follow a load, showing how far it has come.  Raises Failure where it does not end loaded."""
    with following(job.model, say) as shown, closing(server.follow(job.job_id)) as events:
        server.note = shown.note
        for event in events:
            shown.show(event)
            if isinstance(event, LoadEnd):
                return event.result
    raise AssertionError("a load is followed to its end")


def interrupted(server: Client, request: LoadRequest, jobs: dict[str, Job | None]) -> NoReturn:
    """Have loads cancelled, by their keys, and wait for that, unless told again to leave.  One that has been loaded
    stays."""
    server.note = say
    ended: list[ErrorBody] = []
    try:
        say("Cancelling the load. Ctrl-C again does not wait for that.")
        unsent = False
        for key, job in jobs.items():
            if unsent:
                break
            # Without an answer so far the server may have it or not; under the same key this finds it, or makes it.
            unsent = job is None
            try:
                cancelled_job = server.cancel((job or server.submit(request, key)).job_id)
                ended.append(cancelled_job.error or cancelled(request.model))
            except Failure as failure:
                ended.append(failure.error)
    except KeyboardInterrupt:
        left = "Not waiting; `loadstone jobs` shows what becomes of the load."
        raise Interrupted(ErrorBody(type="interrupted", message=left)) from None
    raise Interrupted(ended[0])


def describe(config: LoadConfig) -> str:
    return "".join(f", {name} {str(value).lower()}" for name, value in msgspec.to_builtins(config).items())


@command
@click.argument("instances", nargs=-1, metavar="[INSTANCE]...")
@click.option("--all", "everything", is_flag=True, help="Every instance that is loaded.")
def unload(server: Client, as_json: bool, instances: tuple[str, ...], everything: bool) -> None:
    """Unload instances, and return once their memory is back; what is still loading is cancelled."""
    if bool(instances) == everything:
        raise click.UsageError("Name the instances to unload, or give --all.")
    if everything:
        instances = tuple(i.id for model in server.models().models for i in model.loaded_instances)
    unloaded, errors = [], []
    for instance_id in instances:
        try:
            server.unload(instance_id)
        except Failure as failure:
            if everything and failure.error.type == "model_not_found":
                continue  # it went by itself
            errors.append({"instance_id": instance_id, "error": failure.error})
            say(str(failure))
        else:
            unloaded.append(instance_id)
            if not as_json:
                click.echo(clean(instance_id))
    if as_json:
        document({"unloaded": unloaded, "errors": errors})
    if errors:
        sys.exit(FAILED)


@command
@click.option("--status", type=click.Choice(get_args(JobStatus)), help="Only those with this status.")
@click.option("--limit", type=click.IntRange(1), metavar="N", help="At most so many.")
def jobs(server: Client, as_json: bool, status: str | None, limit: int | None) -> None:
    """List loads, newest first."""
    found = server.jobs(status=status, limit=limit)
    if as_json:
        document(found)
        return
    headings = ("JOB", "STATUS", "INSTANCE", "WORKER", "PROGRESS", "CREATED", "ERROR")
    rows = [
        (
            job.job_id,
            job.status,
            job.instance_id,
            job.worker,
            percent(job.progress),
            when(job.created_at),
            str(job.error.code or job.error.type) if job.error else "-",
        )
        for job in found.jobs
    ]
    table(headings, rows)


@command
@click.argument("job_id", metavar="JOB")
def cancel(server: Client, as_json: bool, job_id: str) -> None:
    """Cancel a load, and return once its memory is back."""
    ended = server.cancel(job_id)
    if as_json:
        document(ended)
    else:
        click.echo(clean(ended.job_id))


@command
@click.argument("job_id", metavar="JOB")
def logs(server: Client, as_json: bool, job_id: str) -> None:
    """Write what the engine said during a load."""
    lines = server.logs(job_id).split("\n")
    if not lines[-1]:
        lines.pop()
    if as_json:
        document({"job_id": job_id, "lines": lines})
        return
    for line in lines:
        click.echo(clean(line))


@command
def workers(server: Client, as_json: bool) -> None:
    """List the workers that are alive: each device, and how many instances there are in whatever state."""
    found = server.workers()
    if as_json:
        document(found)
        return
    headings = ("WORKER", "STATE", "DEVICE", "NAME", "AVAILABLE", "TOTAL", "INSTANCES", "LEASE AGE", "VERSION")
    rows = [
        (
            worker.name,
            worker.state,
            device.id,
            device.name,
            size(max(0, device.available_bytes)),
            size(device.total_bytes),
            str(sum(device.id in instance.devices for instance in worker.instances)),
            f"{worker.lease_age_seconds:.1f} s",
            worker.version,
        )
        for worker in found.workers
        for device in worker.devices
    ]
    table(headings, rows)


def document(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)))


def say(sentence: str) -> None:
    click.echo(f"loadstone: {clean(sentence)}", err=True)
