"""Every operation of the API, in words and types: what `api.openapi.document` makes its document from."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from msgspec import Struct

from api.headers import LONGEST_WAIT_S, MOST_JOBS, USUAL_JOBS
from shared import errors, paths
from shared.errors import ServiceError
from shared.schema.http import (
    EstimateResult,
    GPURequest,
    Job,
    JobList,
    JobStatus,
    LoadEvent,
    LoadRequest,
    LoadResult,
    ModelList,
    UnloadRequest,
    UnloadResult,
    WorkerList,
)

JSON, SSE, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
REF = "#/components/schemas/{name}"


def schema_of(kind: Any) -> dict[str, Any]:
    """The schema of a type, by reference; what is a schema already stays as it is."""
    if isinstance(kind, dict):
        return kind
    return msgspec.json.schema_components([kind], schema_hook=anything, ref_template=REF)[0][0]


def anything(kind: type) -> dict[str, Any]:
    return {"description": "Any JSON value."}


class Reply(Struct, frozen=True, kw_only=True):
    """A reply that is no error: a type or a schema by media type, the headers that it has, and those it may have."""

    description: str
    content: dict[str, Any] = {}
    headers: tuple[str, ...] = ()
    more_headers: tuple[str, ...] = ()
    links: dict[str, Any] = {}


class Operation(Struct, frozen=True, kw_only=True):
    name: str
    summary: str
    description: str = ""
    parameters: tuple[str, ...] = ()
    body: type[Struct] | None = None
    replies: dict[int, Reply]
    errors: tuple[type[ServiceError], ...] = ()


PARAMETERS: dict[str, dict[str, Any]] = {
    "job_id": {
        "in": "path",
        "required": True,
        "description": "The id of a load, from the reply to it.",
        "schema": {"type": "string"},
    },
    "wait": {
        "in": "query",
        "description": f"Reply when the load is over, after this many seconds at the latest; over {LONGEST_WAIT_S} "
        f"counts as {LONGEST_WAIT_S}.",
        "schema": {"type": "integer", "minimum": 0, "default": 0},
    },
    "status": {
        "in": "query",
        "description": "Only loads with this status.",
        "schema": {"type": "string", "enum": list(get_args(JobStatus))},
    },
    "limit": {
        "in": "query",
        "description": f"At most this many loads; over {MOST_JOBS} counts as {MOST_JOBS}.",
        "schema": {"type": "integer", "minimum": 1, "default": USUAL_JOBS},
    },
    "Prefer": {
        "in": "header",
        "description": "`respond-async`: reply with 202 and the job at once. `wait=N`: reply with 202 and the job if "
        f"the load takes longer than N seconds; over {LONGEST_WAIT_S} counts as {LONGEST_WAIT_S}. A preference that "
        "cannot be read is ignored (RFC 7240).",
        "schema": {"type": "string"},
        "examples": {"async": {"value": "respond-async"}, "wait": {"value": "wait=30"}},
    },
    "Idempotency-Key": {
        "in": "header",
        "description": "Makes retries safe: the same key with the same request, within 24 hours, gets the outcome of "
        "the same load.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
    "Last-Event-ID": {
        "in": "header",
        "description": "Start after the event with this `id`; one that cannot be read is ignored.",
        "schema": {"type": "string"},
    },
}

EXAMPLES: dict[type[Struct], dict[str, object]] = {  # one of each type that clients send
    LoadRequest: {"model": "openai/gpt-oss-20b", "context_length": 16384, "echo_load_config": True},
    GPURequest: {"offload": "max", "worker": "gpu-host-1", "split": "even"},
    UnloadRequest: {"instance_id": "openai/gpt-oss-20b"},
}

HEADERS: dict[str, dict[str, Any]] = {
    "Location": {"description": "The path of the job.", "schema": {"type": "string"}},
    "Preference-Applied": {"description": "What was heard of `Prefer`.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "Seconds after which to ask again.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Server-Timing": {
        "description": "Milliseconds by phase: `queue`, `spawn`, `metadata`, `weights`, `context`, `warmup`, and "
        "their sum, `total`.",
        "schema": {"type": "string"},
    },
    "Loadstone-Evicted": {
        "description": "The instances that were unloaded to make room, by their ids, percent-encoded.",
        "schema": {"type": "string"},
    },
    "WWW-Authenticate": {"description": "The scheme to use.", "schema": {"type": "string", "const": "Bearer"}},
    "Content-Security-Policy": {"description": "The page fetches nothing.", "schema": {"type": "string"}},
}

IN_A_BODY = (
    errors.InvalidJSON,
    errors.InvalidType,
    errors.MissingParameter,
    errors.UnrecognizedKeys,
    errors.InvalidValue,
    errors.BodyTooLarge,
    errors.UnsupportedMediaType,
)
IN_A_PATH = (errors.JobNotFound, errors.NotFound)  # an id with a slash names another path
EVENTS = {  # before OpenAPI 3.2, the schema of an event stream is by custom that of one event
    SSE: {
        "type": "object",
        "description": "One event: its name is the `type` of its data. Exactly one `model_load.end` or `error` comes "
        "last; comment lines come in between.",
        "properties": {
            "id": {"type": "string"},
            "event": {"enum": [kind.__struct_config__.tag for kind in get_args(LoadEvent)]},
            "data": {"type": "string", "contentMediaType": JSON, "contentSchema": schema_of(LoadEvent)},
        },
        "required": ["event", "data"],
    }
}
FOLLOWED = {
    name: {"operationId": name, "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get_job", "cancel_load", "follow_load", "read_log")
}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", paths.LOAD): Operation(
        name="load_model",
        summary="Load a model into memory",
        description="Replies when the model can be used. With `Prefer` the reply may come earlier and be a job to "
        "poll; with `Accept: text/event-stream` it is the events of the load. A client that goes away does not cancel "
        "its load. A load of a loaded model makes a further instance: `key:2`, `key:3`, the lowest free number.",
        parameters=("Prefer", "Idempotency-Key"),
        body=LoadRequest,
        replies={
            200: Reply(
                description="The model is in memory and has run a first token; or, where events were asked for, these.",
                content={JSON: LoadResult, **EVENTS},
                more_headers=("Server-Timing", "Loadstone-Evicted", "Preference-Applied"),
                links={
                    "unload_model": {
                        "operationId": "unload_model",
                        "requestBody": {"instance_id": "$response.body#/instance_id"},
                    }
                },
            ),
            202: Reply(
                description="The load was accepted and goes on.",
                content={JSON: Job},
                headers=("Location", "Retry-After"),
                more_headers=("Preference-Applied",),
                links=FOLLOWED,
            ),
        },
        errors=(
            *IN_A_BODY,
            errors.IdempotencyKeyReused,
            errors.ModelNotFound,
            errors.JobNotFound,
            errors.QueueFull,
            errors.TooManyWaiting,
            errors.LoadFailed,
            errors.NoWorker,
            errors.QueueUnavailable,
        ),
    ),
    ("POST", paths.ESTIMATE): Operation(
        name="estimate_load",
        summary="Say how much memory a load would take, and whether it would fit",
        description="Takes the body of a load, and loads nothing. The estimate is for the devices that the load would "
        "use now, by what the workers published last. If the load fits nowhere, `fits` is false, and the devices are "
        "those with the most room. If `exact` is true, the estimate is within 3 % of what the engine would allocate.",
        body=LoadRequest,
        replies={200: Reply(description="The estimate, whether or not it fits.", content={JSON: EstimateResult})},
        errors=(
            *IN_A_BODY,
            errors.ModelNotFound,
            errors.LoadFailed,
            errors.NoWorker,
            errors.QueueUnavailable,
        ),
    ),
    ("GET", paths.JOBS): Operation(
        name="list_jobs",
        summary="List the loads of the last day, newest first",
        parameters=("status", "limit"),
        replies={200: Reply(description="The loads.", content={JSON: JobList})},
        errors=(errors.InvalidType, errors.InvalidValue, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB): Operation(
        name="get_job",
        summary="Say how far a load is",
        parameters=("job_id", "wait"),
        replies={200: Reply(description="The load as it is.", content={JSON: Job})},
        errors=(errors.InvalidType, errors.InvalidValue, *IN_A_PATH, errors.TooManyWaiting, errors.QueueUnavailable),
    ),
    ("DELETE", paths.JOB): Operation(
        name="cancel_load",
        summary="Cancel a load",
        description="The job stays, with the status `cancelled`.",
        parameters=("job_id",),
        replies={200: Reply(description="The load is over and its memory is back.", content={JSON: Job})},
        errors=(*IN_A_PATH, errors.JobAlreadyFinished, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB_EVENTS): Operation(
        name="follow_load",
        summary="Follow a load, from its first event on",
        parameters=("job_id", "Last-Event-ID"),
        replies={
            200: Reply(description="The events; the stream ends with the load.", content=EVENTS),
            204: Reply(description="The load is over, and there is no event after that one."),
        },
        errors=(*IN_A_PATH, errors.TooManyWaiting, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB_LOGS): Operation(
        name="read_log",
        summary="Read what the engine logged during a load",
        parameters=("job_id",),
        replies={200: Reply(description="The last 256 KiB at most.", content={TEXT: str})},
        errors=(*IN_A_PATH, errors.QueueUnavailable),
    ),
    ("POST", paths.UNLOAD): Operation(
        name="unload_model",
        summary="Unload an instance",
        description="One that is not loaded yet is cancelled.",
        body=UnloadRequest,
        replies={200: Reply(description="The instance is gone and its memory is back.", content={JSON: UnloadResult})},
        errors=(*IN_A_BODY, errors.ModelNotFound, errors.QueueUnavailable),
    ),
    ("GET", paths.MODELS): Operation(
        name="list_models",
        summary="List the models that can be loaded, with their loaded instances",
        replies={200: Reply(description="The models of all live workers.", content={JSON: ModelList})},
        errors=(errors.QueueUnavailable,),
    ),
    ("GET", paths.WORKERS): Operation(
        name="list_workers",
        summary="List the workers that are alive, with their devices and their instances in every state",
        replies={200: Reply(description="The workers.", content={JSON: WorkerList})},
        errors=(errors.QueueUnavailable,),
    ),
    ("GET", paths.HEALTHZ): Operation(
        name="healthz",
        summary="Say whether the process lives",
        replies={200: Reply(description="It does.", content={TEXT: str})},
    ),
    ("GET", paths.READYZ): Operation(
        name="readyz",
        summary="Say whether loads can be accepted and carried out",
        replies={
            200: Reply(description="They can.", content={TEXT: str}),
            503: Reply(
                description="What is missing: Redis, or a worker.", content={TEXT: str}, headers=("Retry-After",)
            ),
        },
    ),
    ("GET", paths.METRICS): Operation(
        name="metrics",
        summary="Say what the pool is and has done, for Prometheus",
        description="Any API process answers for the whole pool; its README lists the families.",
        replies={
            200: Reply(
                description="Prometheus' text format, version 0.0.4; where Redis does not answer, little more than "
                "`loadstone_redis_up 0`.",
                content={TEXT: str},
            )
        },
    ),
    ("GET", paths.OPENAPI): Operation(
        name="openapi",
        summary="This API as an OpenAPI document",
        replies={200: Reply(description="OpenAPI 3.1.", content={JSON: dict[str, Any]})},
    ),
    ("GET", paths.DOCS): Operation(
        name="docs",
        summary="This API as a page to read",
        replies={200: Reply(description="The page.", content={HTML: str}, headers=("Content-Security-Policy",))},
    ),
}
