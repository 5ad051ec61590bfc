"""The client commands of the command line.

The result goes to stdout, with --json as exactly one JSON document (of a failure, the error in the form of the API);
all other output goes to stderr.  Exit status: 0 success, 1 failure, 2 usage error, 130 cancelled.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import TYPE_CHECKING, Any, NoReturn, get_args, get_type_hints

import click
import msgspec
from msgspec import UNSET, Meta, Struct

from cli import address, completion, interrupt
from cli.completion import completing
from cli.display import Lines, clean, left, percent, stage, table, when
from cli.failure import Failure, Interrupted, cancelled, error
from cli.names import Load, meant
from shared.errors import ErrorBody
from shared.schema.http import (
    EngineBuild,
    EstimateResult,
    GPURequest,
    HeldInstance,
    Job,
    JobStatus,
    KVCacheType,
    ListedModel,
    LoadConfig,
    LoadEnd,
    LoadRequest,
    LoadResult,
)
from shared.units import size

if TYPE_CHECKING:
    from cli.bar import Bar
    from cli.client import Client

FAILED, CANCELLED = 1, interrupt.STATUS
USUAL_JOBS, MOST_JOBS = 20, 1000  # the most that a server lists
JOB_ID = re.compile(r"load_[0-9a-f]{32}")
WORK = ("kv_cells_used", "requests_running", "requests_waiting", "generated_tokens_per_second")  # of a HeldInstance
VISIBLE = {chr(code) for code in range(0x21, 0x7F)}


@click.group()
def client() -> None:
    """The commands that send requests to a server."""


def visible_ascii(context: click.Context, option: click.Parameter, text: str | None) -> str | None:
    """Validate a header value.  The error does not show it, since it may be the token."""
    if text is not None and not (text and set(text) <= VISIBLE):
        raise click.BadParameter("it must be visible ASCII (letters, digits, punctuation).")
    return text


def http_url(context: click.Context, option: click.Parameter, text: str) -> str:
    if (url := address.url_of(text)) is None:
        raise click.BadParameter(
            "it must be an HTTP URL such as http://host:1234, or a host with or without a port, without a user name or "
            "password."
        )
    return url


OPTIONS: list[click.Parameter] = [
    click.Option(
        ["--url"],
        envvar="LOADSTONE_URL",
        default="http://127.0.0.1:1234",
        callback=http_url,
        help="URL of the server, or host:port; the port of a host alone is 1234. [LOADSTONE_URL; default: "
        "http://127.0.0.1:1234]",
    ),
    click.Option(
        ["--token"],
        envvar="LOADSTONE_TOKEN",
        callback=visible_ascii,
        help="Bearer token. The variable is safer, since other users can see command lines. [LOADSTONE_TOKEN]",
    ),
    click.Option(["--json", "as_json"], is_flag=True, help="Write one JSON document to stdout."),
]


def command(function: Callable[..., None]) -> click.Command:
    """Register a command with OPTIONS.  Calls it with a Client, whether to write JSON, and its own options."""

    @functools.wraps(function)
    def run(url: str, token: str | None, as_json: bool, **words: Any) -> None:
        from cli.client import Client

        try:
            with Client(url, token or "", note=say) as server:
                function(server, as_json, **words)
        except Failure as failure:
            if as_json:
                document({"error": failure.error})
            say(str(failure))
            if isinstance(detail := failure.error.detail, dict) and "hub" in detail:
                say(f"The hub was asked too: {detail['hub']}")
            is_cancelled = isinstance(failure, Interrupted) or failure.error.code == "load_cancelled"
            sys.exit(CANCELLED if is_cancelled else FAILED)
        except KeyboardInterrupt:
            sys.exit(CANCELLED)
        except UnicodeError:
            raise click.UsageError("The arguments and stdin must be UTF-8.") from None

    made = client.command(function.__name__)(run)
    made.params += OPTIONS
    return made


@command
def ls(server: Client, as_json: bool) -> None:
    """List the models.  `list` is another name of this command."""
    listed = server.models()
    if as_json:
        document(listed)
        return
    headings = ("MODEL", "TYPE", "ARCHITECTURE", "QUANTIZATION", "SIZE", "MAX CONTEXT", "LOADED", "VARIANTS")
    rows = [
        (
            model.key,
            model.type,
            model.architecture or "-",
            model.quantization.name or "-",
            size(model.size_bytes),
            str(model.max_context_length),
            str(len(model.loaded_instances)),
            variants(model),
        )
        for model in listed.models
    ]
    table(headings, rows)


def variants(model: ListedModel) -> str:
    """Format what may follow the key of a model to select a quantization; the one that the key loads is first."""
    selected = "" if model.selected_variant is UNSET else model.selected_variant
    others = [] if model.variants is UNSET else [name for name in model.variants if name != selected]
    return ", ".join(filter(None, (name.removeprefix(model.key) for name in [selected, *others]))) or "-"


@command
def ps(server: Client, as_json: bool) -> None:
    """List the loaded instances and the loads in progress."""
    # In the order of the lifecycle: a load that changes state meanwhile is not missed.
    in_progress = {
        job.instance_id: job for status in ("queued", "loading") for job in server.jobs(status=status, limit=1000).jobs
    }
    models = {model.key: model for model in server.models().models}
    instances = [(key, instance) for key, model in models.items() for instance in model.loaded_instances]
    jobs = [job for id_, job in in_progress.items() if id_ not in {instance.id for _, instance in instances}]
    held = {one.id: one for worker in server.workers().workers for one in worker.instances}
    if as_json:
        loaded = [
            {
                "model": key,
                "state": "loaded",
                "job_id": held[i.id].job_id if i.id in held else None,  # it was unloaded meanwhile
                "size_bytes": held[i.id].size_bytes if i.id in held else None,
                **{name: getattr(held[i.id], name) if i.id in held else None for name in WORK},
                **msgspec.to_builtins(i),
            }
            for key, i in instances
        ]
        document({"instances": loaded, "jobs": jobs})
        return
    rows = [
        (
            i.id,
            key if i.variant is UNSET or len(models[key].variants or ()) < 2 else i.variant,
            "loaded",
            i.worker,
            ", ".join(i.devices),
            size(held[i.id].size_bytes) if i.id in held else "-",
            *work(i.config.context_length, held.get(i.id)),
            "100%",
            left(i.remaining_ttl_seconds),
            held[i.id].job_id if i.id in held else "-",
        )
        for key, i in instances
    ]
    rows += [
        (
            job.instance_id,
            job.model,
            stage(job.status, job.phase),
            job.worker,
            ", ".join(job.devices) or "-",
            size(job.total_size_bytes),
            *("-", "-", "-", "-"),
            percent(job.progress),
            "-",
            job.job_id,
        )
        for job in jobs
    ]
    headings = (
        *("INSTANCE", "MODEL", "STATE", "WORKER", "DEVICE", "SIZE"),
        *("CONTEXT", "RUNNING", "WAITING", "TOKENS/S"),
        *("PROGRESS", "TTL", "JOB"),
    )
    table(headings, rows)


def work(context_length: int, held: HeldInstance | None) -> tuple[str, str, str, str]:
    """Format what an instance does: the context in use, its requests, and the tokens that it generates."""
    if held is None:
        return str(context_length), "-", "-", "-"
    return (
        f"{held.kv_cells_used}/{context_length}",
        str(held.requests_running),
        str(held.requests_waiting),
        f"{held.generated_tokens_per_second:.1f}",
    )


@functools.cache
def hints(kind: type[Struct]) -> dict[str, Any]:
    return get_type_hints(kind, include_extras=True)


def description(kind: type[Struct], field: str) -> str:
    """Return the description of a request field from its type."""
    annotated = hints(kind)[field]
    (text,) = (meta.description for meta in annotated.__metadata__ if isinstance(meta, Meta))
    assert text is not None
    return text


def field_option(
    kind: type[Struct], field: str, *flags: str, note: str = "", **attributes: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Create the option for a request field.  Its help is the description of the field, followed by `note`."""
    return click.option(*flags, field, help=description(kind, field) + note, **attributes)


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
    raise click.BadParameter("it must be even, priority or ratios such as 2,1.")


@command
@click.argument("model", metavar="KEY", shell_complete=completing(completion.models))
@field_option(LoadRequest, "context_length", "-c", "--context-length", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "eval_batch_size", "--eval-batch-size", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "physical_batch_size", "--physical-batch-size", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "flash_attention", "--flash-attention/--no-flash-attention", default=None)
@field_option(LoadRequest, "num_experts", "--num-experts", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "offload_kv_cache_to_gpu", "--offload-kv-cache/--no-offload-kv-cache", default=None)
@field_option(LoadRequest, "kv_cache_type", "--kv-cache-type", type=click.Choice(get_args(KVCacheType)))
@field_option(LoadRequest, "parallel", "--parallel", type=click.IntRange(1), metavar="N")
@field_option(LoadRequest, "ttl_seconds", "--ttl", type=click.FloatRange(min=0, min_open=True), metavar="SECONDS")
@field_option(GPURequest, "offload", "--gpu-offload", callback=offload_of, metavar="SHARE")
@field_option(GPURequest, "worker", "--gpu-worker", metavar="NAME", shell_complete=completing(completion.workers))
@field_option(
    GPURequest,
    "devices",
    "--gpu-device",
    note=" May be repeated.",
    multiple=True,
    metavar="ID",
    shell_complete=completing(completion.devices),
)
@field_option(GPURequest, "split", "--gpu-split", callback=split_of, metavar="even|priority|N,N...")
@click.option("--copies", type=click.IntRange(1), default=1, metavar="N", help="Number of instances to load.")
@field_option(LoadRequest, "force", "--force", is_flag=True, default=None)
@click.option(
    "--estimate-only",
    is_flag=True,
    help="Show the required memory without loading. Exit status 0: it fits, 1: it does not.",
)
@click.option("--detach", is_flag=True, help="Do not wait for the load; write the id of its job to stdout.")
@click.option(
    "--idempotency-key",
    metavar="KEY",
    callback=visible_ascii,
    help="Repeating a load with the same key joins the first load.",
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
    """Load a model.

    Writes the id of the instance to stdout once it is in memory. Ctrl-C cancels the load and waits until it has ended;
    a second Ctrl-C exits at once.
    """
    gpu = {name: fields.pop(name) for name in ("offload", "worker", "devices", "split")}
    gpu = {name: value for name, value in gpu.items() if value not in (None, ())}
    given = {name: value for name, value in fields.items() if value is not None}
    if gpu:
        given["gpu"] = GPURequest(**gpu | ({"devices": [*gpu["devices"]]} if "devices" in gpu else {}))
    if estimate_only:
        if detach or idempotency_key:
            raise click.UsageError("--estimate-only cannot be combined with --detach or --idempotency-key.")
        show(server.estimate(LoadRequest(model=model, **given)), as_json)
        return
    request = LoadRequest(model=model, echo_load_config=True, **given)
    key = idempotency_key or os.urandom(16).hex()
    jobs: dict[str, Job | None] = dict.fromkeys([key] if copies == 1 else [f"{key}-{n + 1}" for n in range(copies)])
    with interrupt.Raising():
        try:
            for key in jobs:  # submit all before waiting for the first, so that they load concurrently
                jobs[key] = server.submit(request, key)
            accepted = [job for job in jobs.values() if job is not None]
            if detach:
                if as_json:
                    document(accepted if copies > 1 else accepted[0])
                else:
                    click.echo("\n".join(job.job_id for job in accepted))
                return
            results, failures = followed(server, request, accepted, as_json=as_json)
        except KeyboardInterrupt:
            interrupted(server, request, jobs)
    if as_json and copies > 1:
        document({"loaded": results, "errors": [failure.error for failure in failures]})
        sys.exit(FAILED if failures else 0)
    if failures:
        raise failures[0]
    if as_json:
        document(results[0])


def followed(
    server: Client, request: LoadRequest, jobs: list[Job], *, as_json: bool
) -> tuple[list[LoadResult], list[Failure]]:
    """Follow loads to their ends, in order, and write the id of each instance once it is loaded."""
    results: list[LoadResult] = []
    failures: list[Failure] = []
    said = set[str]()
    for job in jobs:
        try:
            result = outcome(server, job)
        except Failure as failure:
            if failure.retry_after_s is not None:  # the retries ended, not the load
                say(f"The load continues as job {job.job_id}.")
            elif failures or job is not jobs[-1]:  # the first failure is reported last
                say(str(failure))
            failures.append(failure)
            continue
        results.append(result)
        config = result.load_config
        unused = [] if config is UNSET else [*without_effect(request, config), *without_gpu(server, request, job)]
        for sentence in unused:
            if sentence not in said:
                say(sentence)
                said.add(sentence)
        if not as_json:
            applied = "" if config is UNSET else describe(config)
            say(f"loaded in {result.load_time_seconds:.3g} s{applied}")
            click.echo(clean(result.instance_id))
    return results, failures


def without_effect(request: LoadRequest, config: LoadConfig) -> Iterator[str]:
    """Yield a sentence for each option of a load that the parameters in effect do not have."""
    options = {option.name: option for option in click.get_current_context().command.params}
    for field in config.__struct_fields__:
        requested, used = getattr(request, field), getattr(config, field)
        if requested is UNSET or requested == used:
            continue
        option = options[field]
        flag = option.secondary_opts[0] if requested is False else option.opts[-1]
        if used is UNSET:
            yield f"{flag} has no effect on this model."
        else:
            yield f"{flag} has another value for this model: {str(used).lower()}."


def without_gpu(server: Client, request: LoadRequest, job: Job) -> Iterator[str]:
    """Yield a sentence for each option about GPUs of an instance that uses none."""
    gpu = GPURequest() if request.gpu is UNSET else request.gpu
    flags = ["--gpu-offload"] if gpu.offload not in (UNSET, "off", 0) else []
    flags += [] if gpu.split is UNSET else ["--gpu-split"]
    if flags and server.job(job.job_id).devices == ["CPU"]:
        yield from (f"{flag} has no effect: the instance uses no GPU." for flag in flags)


def show(estimate: EstimateResult, as_json: bool) -> None:
    """Write an estimate.  Exits with FAILED if the load does not fit."""
    if as_json:
        document(estimate)
    else:
        headings = ("DEVICE", "WORKER", "WEIGHTS", "CONTEXT", "COMPUTE", "TOTAL", "FREE", "FITS", "LARGEST CONTEXT")
        ends = ("yes" if estimate.fits else "no", str(estimate.max_context_length_that_fits or "-"))
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
                for device in estimate.devices
            ],
        )
        if not estimate.exact:
            say("This estimate is approximate: it is not verified against the engine for this configuration.")
        if estimate.quantizations:
            rows = [(one.name, size(one.size_bytes), "yes" if one.fits else "no") for one in estimate.quantizations]
            table(("QUANTIZATION", "SIZE", "FITS"), rows)
    if not estimate.fits:
        sys.exit(FAILED)


@contextmanager
def following(model: str) -> Iterator[Bar | Lines]:
    """Show the progress of a load on stderr during the `with` block."""
    if sys.stderr.isatty() and os.environ.get("TERM") not in ("dumb", "unknown"):
        from cli.bar import Bar

        bar = Bar(model)
        with bar.live:
            bar.live.refresh()
            yield bar
    else:
        yield Lines(model, say)


def outcome(server: Client, job: Job) -> LoadResult:
    """Follow a load and show its progress.  Raises Failure if it fails or is cancelled."""
    with following(job.model) as shown, closing(server.follow(job.job_id)) as events:
        server.note = shown.note
        for event in events:
            shown.show(event)
            if isinstance(event, LoadEnd):
                return event.result
    raise AssertionError("the events ended before the load")


def interrupted(server: Client, request: LoadRequest, jobs: dict[str, Job | None]) -> NoReturn:
    """Cancel loads by their keys, and wait until they have ended or Ctrl-C is pressed again.

    Loaded instances stay loaded.  Raises Interrupted.
    """
    server.note = say
    ended: list[ErrorBody] = []
    try:
        say("Cancelling the load. Press Ctrl-C again to exit without waiting.")
        unsent = False
        for key, job in jobs.items():
            if unsent:
                break
            # Without a response, the server may or may not have accepted it; the same key finds or creates the load.
            unsent = job is None
            try:
                cancelled_job = server.cancel((job or server.submit(request, key)).job_id)
                ended.append(cancelled_job.error or cancelled(request.model))
            except Failure as failure:
                ended.append(failure.error)
    except KeyboardInterrupt:
        message = "Not waiting. Run `loadstone jobs` to see the outcome of the load."
        raise Interrupted(ErrorBody(type="interrupted", message=message)) from None
    raise Interrupted(ended[0])


def describe(config: LoadConfig) -> str:
    """Format the parameters in effect, each preceded by a comma."""
    return "".join(f", {name} {str(value).lower()}" for name, value in msgspec.to_builtins(config).items())


@command
@click.argument("instances", nargs=-1, metavar="[INSTANCE]...", shell_complete=completing(completion.instances))
@click.option("--all", "everything", is_flag=True, help="Unload all loaded instances.")
def unload(server: Client, as_json: bool, instances: tuple[str, ...], everything: bool) -> None:
    """Unload instances, and wait until their memory is free.  Loads in progress are cancelled."""
    if bool(instances) == everything:
        raise click.UsageError("Specify either the instances to unload or --all.")
    if everything:
        instances = tuple(i.id for model in server.models().models for i in model.loaded_instances)
    unloaded, errors = [], []
    for instance_id in instances:
        try:
            server.unload(instance_id)
        except Failure as failure:
            if everything and failure.error.type == "model_not_found":
                continue  # it was unloaded meanwhile
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
@click.option("--status", type=click.Choice(get_args(JobStatus)), help="List only loads with this status.")
@click.option(
    "-n", "--limit", type=click.IntRange(1, MOST_JOBS), metavar="N", help=f"List at most N. [default: {USUAL_JOBS}]"
)
@click.option("--all", "everything", is_flag=True, help=f"List up to {MOST_JOBS}, the most that the server lists.")
def jobs(server: Client, as_json: bool, status: str | None, limit: int | None, everything: bool) -> None:
    """List loads, newest first, with what became of their instances."""
    if limit is None and not everything:
        listed = server.jobs(status=status, limit=USUAL_JOBS + 1).jobs
        if len(listed) > USUAL_JOBS:
            say(f"There are more than {USUAL_JOBS} loads. List them with -n N or --all.")
            listed = listed[:USUAL_JOBS]
    else:
        listed = server.jobs(status=status, limit=limit or MOST_JOBS).jobs
    if as_json:
        document({"jobs": listed})
        return
    headings = ("JOB", "STATUS", "INSTANCE", "STATE", "WORKER", "PROGRESS", "CREATED", "ERROR")
    rows = [
        (
            job.job_id,
            job.status,
            job.instance_id,
            job.instance_state,
            job.worker,
            percent(job.progress),
            when(job.created_at),
            str(job.error.code or job.error.type) if job.error else "-",
        )
        for job in listed
    ]
    table(headings, rows)


def found(server: Client, word: str, *, in_progress: bool = False) -> str:
    """Return the id of the job that `word` means: that of a job or an instance, or a prefix of one.

    Prefers instances that have not ended, or with `in_progress` loads that have not.  Raises Failure, and
    UnicodeEncodeError if the word is not UTF-8.
    """
    word.encode()
    if JOB_ID.fullmatch(word):
        return word
    newest = server.jobs(limit=MOST_JOBS).jobs
    loads = [Load(job.job_id, job.instance_id) for job in newest]
    held = [one for worker in server.workers().workers for one in worker.instances]  # also those of older loads
    if in_progress:
        preferred = [Load(job.job_id, job.instance_id) for job in newest if job.status in ("queued", "loading")]
    else:
        preferred = [Load(one.job_id, one.id) for one in held]
    if (load := meant(word, preferred, loads)) is None:
        raise Failure(error("job_not_found", f"No load or instance has the id '{word}', or one that begins so."))
    return load.job_id


@command
@click.argument("word", metavar="JOB|INSTANCE", shell_complete=completing(completion.loads))
def cancel(server: Client, as_json: bool, word: str) -> None:
    """Cancel a load, and wait until its memory is free.

    Takes the id of a job or of an instance, or the beginning of one if no other begins so.
    """
    ended = server.cancel(found(server, word, in_progress=True))
    if as_json:
        document(ended)
    else:
        click.echo(clean(ended.job_id))


@command
@click.argument("word", metavar="JOB|INSTANCE", shell_complete=completing(completion.loads))
@click.option("-f", "--follow", is_flag=True, help="Write new lines until the instance ends.")
@click.option("--tail", type=click.IntRange(0), metavar="N", help="Begin with the last N lines.")
def logs(server: Client, as_json: bool, word: str, follow: bool, tail: int | None) -> None:
    """Show the engine's log of a load, and why it failed.

    Takes the id of a job or of an instance, or the beginning of one if no other begins so.
    """
    if follow and as_json:
        raise click.UsageError("--follow cannot be combined with --json.")
    job_id = found(server, word)
    if follow:
        for line in server.follow_log(job_id, tail):
            click.echo(clean(line))
        return
    lines = server.logs(job_id)
    lines = lines if tail is None else lines[max(0, len(lines) - tail) :]
    if as_json:
        document({"job_id": job_id, "lines": lines})
        return
    for line in lines:
        click.echo(clean(line))


@command
def workers(server: Client, as_json: bool) -> None:
    """List the live workers, their devices, and their instances."""
    listed = server.workers()
    if as_json:
        document(listed)
        return
    headings = (
        "WORKER",
        "STATE",
        "DEVICE",
        "NAME",
        "AVAILABLE",
        "TOTAL",
        "INSTANCES",
        "LEASE AGE",
        "VERSION",
        "ENGINE",
        "CHAT",
    )
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
            *built(worker.engine),
        )
        for worker in listed.workers
        for device in worker.devices
    ]
    table(headings, rows)
    for worker in listed.workers:
        for problem in worker.problems:
            click.echo(f"{worker.name}: {problem}", err=True)


def built(engine: EngineBuild | None) -> tuple[str, str]:
    """Format the build of a worker's engine, and whether it can use chat templates."""
    if engine is None:
        return "-", "-"
    return (
        f"{engine.llama_cpp_python} ({engine.llama_cpp_commit}, {'+'.join(engine.backends)})",
        "no" if engine.chat_unavailable else "yes",
    )


def document(value: object) -> None:
    click.echo(msgspec.json.format(msgspec.json.encode(value)))


def say(sentence: str) -> None:
    click.echo(f"loadstone: {clean(sentence)}", err=True)
