"""The operations of the API: the source of the OpenAPI document (`api.openapi.document`)."""

from __future__ import annotations

from typing import Any, get_args

import msgspec
from msgspec import Struct

from api.anthropic.answer import AnthropicMessage
from api.anthropic.answer import Event as MessageEvent
from api.anthropic.errors import AnthropicErrorReply
from api.anthropic.messages import TokenCount
from api.anthropic.models import MOST_MODELS, AnthropicModel, AnthropicModelList
from api.anthropic.request import MessagesRequest
from api.headers import LONGEST_WAIT_S, MOST_JOBS, USUAL_JOBS
from api.lmstudio.answers import LegacyChunk, LegacyCompletion, LegacyTextChunk, LegacyTextCompletion
from api.lmstudio.chat.events import ChatResult
from api.lmstudio.chat.events import Event as ChatEvent
from api.lmstudio.chat.request import NativeChatRequest
from api.lmstudio.models import LegacyModel, LegacyModelList
from api.openai.answer import Chunk, Completion
from api.openai.completions import CompletionRequest
from api.openai.embeddings import EmbeddingList, EmbeddingRequest
from api.openai.errors import OpenAIErrorReply
from api.openai.models import OpenAIModel, OpenAIModelList
from api.openai.request import ChatRequest
from api.openai.text import TextChunk, TextCompletion
from api.rerank.forms import RankedText, Ranking, RerankRequest
from api.responses.events import Event
from api.responses.request import ResponseRequest
from api.responses.response import DeletedResponse, DeletedResponses, ResponseObject
from api.tokens.forms import (
    CountReply,
    DetokenizeReply,
    DetokenizeRequest,
    TemplateReply,
    TokenizeReply,
    TokenizeRequest,
    TokenizerReply,
)
from shared import errors, paths
from shared.errors import ServiceError
from shared.schema.http import (
    DownloadEvent,
    DownloadJob,
    DownloadJobList,
    DownloadReply,
    DownloadRequest,
    EstimateResult,
    GPURequest,
    Job,
    JobList,
    JobStatus,
    LoadEvent,
    LoadRequest,
    LoadResult,
    ModelList,
    RemovedModel,
    UnloadRequest,
    UnloadResult,
    WorkerList,
)

JSON, SSE, TEXT, HTML = "application/json", "text/event-stream", "text/plain", "text/html"
REF = "#/components/schemas/{name}"


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the schema of a type, by reference.  A schema is returned unchanged."""
    if isinstance(kind, dict):
        return kind
    return msgspec.json.schema_components([kind], schema_hook=anything, ref_template=REF)[0][0]


def either(*kinds: Any) -> dict[str, Any]:
    """Return the schema of a value of one of these types."""
    return {"anyOf": [schema_of(kind) for kind in kinds]}


def anything(kind: type) -> dict[str, Any]:
    return {"description": "Any JSON value."}


class Reply(Struct, frozen=True, kw_only=True):
    """A successful reply.  `content` maps media types to types or schemas; `more_headers` are optional."""

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
        "description": "The id of a load or a download, from the reply to its request.",
        "schema": {"type": "string"},
    },
    "response_id": {
        "in": "path",
        "required": True,
        "description": "The id of a response, from its reply.",
        "schema": {"type": "string"},
    },
    "wait": {
        "in": "query",
        "description": f"Wait up to this many seconds for the load to end. The maximum is {LONGEST_WAIT_S}; larger "
        "values are reduced to it.",
        "schema": {"type": "integer", "minimum": 0, "default": 0},
    },
    "status": {
        "in": "query",
        "description": "Return only loads with this status.",
        "schema": {"type": "string", "enum": list(get_args(JobStatus))},
    },
    "limit": {
        "in": "query",
        "description": f"Return at most this many. The maximum is {MOST_JOBS}; larger values are reduced to it.",
        "schema": {"type": "integer", "minimum": 1, "default": USUAL_JOBS},
    },
    "model_id": {
        "in": "path",
        "required": True,
        "description": "Key of a model, or id of a loaded instance. It may have slashes, percent-encoded or not.",
        "schema": {"type": "string"},
    },
    "worker": {
        "in": "query",
        "description": "Remove the model from this worker only.",
        "schema": {"type": "string"},
    },
    "model": {
        "in": "query",
        "description": "A model key or alias, or the id of a loaded instance. Absent: the default model, or else the "
        "only loaded LLM.",
        "schema": {"type": "string"},
    },
    "limit of a page": {
        "name": "limit",
        "in": "query",
        "description": "Reply in Anthropic's form, with at most this many ids. The maximum, and the default of clients "
        f"that send `anthropic-version`, is {MOST_MODELS}; larger values are reduced to it.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "after_id": {
        "in": "query",
        "description": "In Anthropic's form: return the ids after this one.",
        "schema": {"type": "string"},
    },
    "before_id": {
        "in": "query",
        "description": "In Anthropic's form: return the ids before this one.",
        "schema": {"type": "string"},
    },
    "anthropic-version": {
        "in": "header",
        "description": "Reply in Anthropic's form. Any value is accepted.",
        "schema": {"type": "string"},
    },
    "Prefer": {
        "in": "header",
        "description": "`respond-async`: reply with 202 and the job immediately. `wait=N`: reply with 202 and the job "
        f"if the load takes longer than N seconds (at most {LONGEST_WAIT_S}). Invalid preferences are ignored (RFC "
        "7240).",
        "schema": {"type": "string"},
        "examples": {"async": {"value": "respond-async"}, "wait": {"value": "wait=30"}},
    },
    "Idempotency-Key": {
        "in": "header",
        "description": "Makes retries safe: repeating a request with the same key within 24 hours returns the outcome "
        "of the first load instead of starting another one.",
        "schema": {"type": "string", "pattern": "^[!-~]{1,255}$"},
    },
    "Last-Event-ID": {
        "in": "header",
        "description": "Resume after the event with this `id`. Invalid values are ignored.",
        "schema": {"type": "string"},
    },
}

OPEN: frozenset[type[Struct]] = frozenset(
    {
        ChatRequest,
        MessagesRequest,
        ResponseRequest,
        TokenizeRequest,
        DetokenizeRequest,
        EmbeddingRequest,
        RerankRequest,
    }
)  # requests of which unknown fields are ignored
EXAMPLES: dict[type[Struct], dict[str, object]] = {  # one for each request type
    LoadRequest: {"model": "openai/gpt-oss-20b", "context_length": 16384, "echo_load_config": True},
    GPURequest: {"offload": "max", "worker": "gpu-host-1", "split": "even"},
    DownloadRequest: {"model": "ggml-org/gpt-oss-20b-GGUF", "quantization": "MXFP4"},
    UnloadRequest: {"instance_id": "openai/gpt-oss-20b"},
    ChatRequest: {"model": "openai/gpt-oss-20b", "messages": [{"role": "user", "content": "Hello!"}], "stream": True},
    NativeChatRequest: {"model": "openai/gpt-oss-20b", "input": "Hello!", "stream": True},
    ResponseRequest: {"model": "openai/gpt-oss-20b", "input": "Hello!", "stream": True},
    MessagesRequest: {
        "model": "openai/gpt-oss-20b",
        "max_tokens": 60,
        "messages": [{"role": "user", "content": "Hello!"}],
    },
    CompletionRequest: {"model": "openai/gpt-oss-20b", "prompt": "Once upon a time", "max_tokens": 60},
    TokenizeRequest: {"model": "openai/gpt-oss-20b", "content": "Hello!", "with_pieces": True},
    EmbeddingRequest: {"model": "nomic-ai/nomic-embed-text-v1.5", "input": ["The sky is blue.", "Grass is green."]},
    RerankRequest: {"model": "BAAI/bge-reranker-v2-m3", "query": "Is it blue?", "documents": ["The sky is blue."]},
    DetokenizeRequest: {"model": "openai/gpt-oss-20b", "tokens": [13225, 0]},
}

HEADERS: dict[str, dict[str, Any]] = {
    "Location": {"description": "The path of the job.", "schema": {"type": "string"}},
    "Preference-Applied": {"description": "The preferences that were applied.", "schema": {"type": "string"}},
    "Retry-After": {
        "description": "The number of seconds to wait before the next request.",
        "schema": {"type": "integer", "minimum": 1},
    },
    "Server-Timing": {
        "description": "Duration of each phase in milliseconds: `queue`, `spawn`, `metadata`, `weights`, `context`, "
        "`warmup`, and their sum, `total`.",
        "schema": {"type": "string"},
    },
    "Loadstone-Instance": {
        "description": "The id of the instance that answered.",
        "schema": {"type": "string"},
    },
    "Loadstone-Evicted": {
        "description": "The ids of the instances that were unloaded to make room, percent-encoded.",
        "schema": {"type": "string"},
    },
    "Accept-Encoding": {"description": "The accepted encoding.", "schema": {"type": "string", "const": "identity"}},
    "Loadstone-Joined": {
        "description": "The id of the load that the request joined, if it did not start one.",
        "schema": {"type": "string"},
    },
    "WWW-Authenticate": {"description": "The authentication scheme.", "schema": {"type": "string", "const": "Bearer"}},
    "Content-Security-Policy": {"description": "Forbids the page to load any resources.", "schema": {"type": "string"}},
}

IN_A_BODY = (
    errors.InvalidJSON,
    errors.InvalidType,
    errors.MissingParameter,
    errors.UnrecognizedKeys,
    errors.InvalidValue,
    errors.BodyTooLarge,
    errors.BodyTooSlow,
    errors.TooManyWaiting,
    errors.UnsupportedMediaType,
    errors.UnsupportedEncoding,
)
OF_A_MODEL = (  # that a request asks
    *(one for one in IN_A_BODY if one is not errors.UnrecognizedKeys),
    errors.ModelNotFound,
    errors.ModelNotLoaded,
    errors.QueueFull,
    errors.RequestFailed,
    errors.LoadFailed,
    errors.LoadInterrupted,
    errors.NoWorker,
    errors.QueueTimeout,
    errors.NoRoute,
    errors.ModelUnloaded,
    errors.RunnerLost,
    errors.QueueUnavailable,
)
OF_A_CONVERSATION = (*OF_A_MODEL, errors.NotSupported, errors.RequestCrashed, errors.ChatUnavailable)
IN_A_PATH = (errors.JobNotFound, errors.NotFound)  # an id with a slash matches another path
OF_AN_ID = (errors.ModelNotFound, errors.NotFound)  # an id with a line break matches no path


def _stream(
    names: list[Any], data: Any, last: str, *, has_ids: bool = False, has_comments: bool = True
) -> dict[str, Any]:
    """Describe a stream of named events: with the type of their data, and the words for the last one.

    `has_ids`: the events have ids, with which a client resumes.
    """
    comments = " The stream also contains comment lines." if has_comments else ""
    id_ = {"id": {"type": "string", "description": "Id of the event, for `Last-Event-ID`."}} if has_ids else {}
    return {
        # Before OpenAPI 3.2, an event stream is by convention described by the schema of one event.
        SSE: {
            "type": "object",
            "description": f"One event, whose name is the `type` of its data. The last event is {last}.{comments}",
            "properties": {
                **id_,
                "event": {"enum": names, "description": "Name of the event."},
                "data": {
                    "type": "string",
                    "contentMediaType": JSON,
                    "contentSchema": schema_of(data),
                    "description": "The event.",
                },
            },
            "required": ["event", "data"],
        }
    }


def _names(union: Any) -> list[Any]:
    """Return the names of the events of a union of types, which are their tags."""
    return [kind.__struct_config__.tag for kind in get_args(union)]


EVENTS = _stream(_names(LoadEvent), LoadEvent, "either `model_load.end` or `error`", has_ids=True)
PROGRESS = _stream(["download.progress", "download.end"], DownloadEvent, "`download.end`", has_ids=True)
CHATTING = _stream(_names(ChatEvent), ChatEvent, "`chat.end`")
RESPONDING = _stream(_names(Event), Event, "`response.completed`, `response.incomplete` or `response.failed`")
MESSAGE = _stream(
    [*_names(MessageEvent), "error"],
    either(MessageEvent, AnthropicErrorReply),
    "either `message_stop` or `error`",
    has_comments=False,
)


def _chunks(kind: type[Struct]) -> dict[str, Any]:
    """Describe the stream of a reply in chunks."""
    return {
        "type": "object",
        "description": "One event. The stream also contains comment lines. Its last event is either `[DONE]` or an "
        "error.",
        "properties": {
            "data": {
                "anyOf": [
                    {"type": "string", "const": "[DONE]"},
                    {
                        "type": "string",
                        "contentMediaType": JSON,
                        "contentSchema": either(kind, OpenAIErrorReply),
                    },
                ],
                "description": "The chunk; `[DONE]` after the last one; or an error.",
            },
        },
        "required": ["data"],
    }


FOLLOWED = {
    name: {"operationId": name, "parameters": {"job_id": "$response.body#/job_id"}}
    for name in ("get_job", "cancel_load", "follow_load", "read_log")
}

OPERATIONS: dict[tuple[str, str], Operation] = {
    ("POST", paths.LOAD): Operation(
        name="load_model",
        summary="Load a model into memory",
        description="By default, replies once the model is ready. With `Prefer`, the reply may instead be a job to "
        "poll; with `Accept: text/event-stream`, it is a stream of events. Disconnecting does not cancel the load: "
        "the next identical request joins it. Otherwise, loading a model again creates another instance with the next "
        "free id: `key:2`, `key:3`, and so on.",
        parameters=("Prefer", "Idempotency-Key"),
        body=LoadRequest,
        replies={
            200: Reply(
                description="The model is in memory and has decoded a first token; or the event stream, if requested.",
                content={JSON: LoadResult, **EVENTS},
                more_headers=("Server-Timing", "Loadstone-Evicted", "Loadstone-Joined", "Preference-Applied"),
                links={
                    "unload_model": {
                        "operationId": "unload_model",
                        "requestBody": {"instance_id": "$response.body#/instance_id"},
                    }
                },
            ),
            202: Reply(
                description="The load was accepted and is in progress.",
                content={JSON: Job},
                headers=("Location", "Retry-After"),
                more_headers=("Loadstone-Joined", "Preference-Applied"),
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
        summary="Estimate the memory of a load, and whether it fits",
        description="Accepts the same body as a load, but loads nothing. The estimate is for the devices that the "
        "load would use now. If the load fits nowhere, `fits` is false, and the devices are those with the most free "
        "memory. If `exact` is true, the estimate is within 3 % of what the engine would allocate. A model that no "
        "worker has is estimated by the headers of its files on the hub: `publisher/name` or "
        "`publisher/name@quantization`. The reply lists the quantizations that the repository has.",
        body=LoadRequest,
        replies={200: Reply(description="The estimate, whether or not the load fits.", content={JSON: EstimateResult})},
        errors=(
            *IN_A_BODY,
            errors.ModelNotFound,
            errors.LoadFailed,
            errors.NoWorker,
            errors.QueueUnavailable,
            errors.TooManyWaiting,
        ),
    ),
    ("GET", paths.JOBS): Operation(
        name="list_jobs",
        summary="List recent loads, newest first",
        parameters=("status", "limit"),
        replies={200: Reply(description="The loads.", content={JSON: JobList})},
        errors=(errors.InvalidType, errors.InvalidValue, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB): Operation(
        name="get_job",
        summary="Get the status of a load",
        parameters=("job_id", "wait"),
        replies={200: Reply(description="The job.", content={JSON: Job})},
        errors=(errors.InvalidType, errors.InvalidValue, *IN_A_PATH, errors.TooManyWaiting, errors.QueueUnavailable),
    ),
    ("DELETE", paths.JOB): Operation(
        name="cancel_load",
        summary="Cancel a load",
        description="Replies once the memory is free. The job is kept, with the status `cancelled`.",
        parameters=("job_id",),
        replies={200: Reply(description="The load was cancelled and its memory is free.", content={JSON: Job})},
        errors=(*IN_A_PATH, errors.JobAlreadyFinished, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB_EVENTS): Operation(
        name="follow_load",
        summary="Stream the events of a load, from the first one",
        parameters=("job_id", "Last-Event-ID"),
        replies={
            200: Reply(description="The events. The stream ends with the load.", content=EVENTS),
            204: Reply(description="The load has ended, and there are no events after `Last-Event-ID`."),
        },
        errors=(*IN_A_PATH, errors.TooManyWaiting, errors.QueueUnavailable),
    ),
    ("GET", paths.JOB_LOGS): Operation(
        name="read_log",
        summary="Get the engine log of a load",
        parameters=("job_id",),
        replies={200: Reply(description="The log, at most its last 256 KiB.", content={TEXT: str})},
        errors=(*IN_A_PATH, errors.QueueUnavailable),
    ),
    ("POST", paths.UNLOAD): Operation(
        name="unload_model",
        summary="Unload an instance",
        description="Replies once the memory is free. If the instance is still loading, its load is cancelled.",
        body=UnloadRequest,
        replies={
            200: Reply(description="The instance was unloaded and its memory is free.", content={JSON: UnloadResult})
        },
        errors=(*IN_A_BODY, errors.ModelNotFound, errors.QueueUnavailable),
    ),
    ("POST", paths.DOWNLOAD): Operation(
        name="download_model",
        summary="Download a model from the hub",
        description="The worker downloads it into its models directory. Requests for files that are on their way get "
        "the same job. A job survives restarts, and fetches nothing twice.",
        parameters=("Idempotency-Key",),
        body=DownloadRequest,
        replies={200: Reply(description="The download, or that it is not needed.", content={JSON: DownloadReply})},
        errors=(
            *IN_A_BODY,
            errors.IdempotencyKeyReused,
            errors.ModelNotFound,
            errors.DownloadFailed,
            errors.NoWorker,
            errors.QueueUnavailable,
        ),
    ),
    ("GET", paths.DOWNLOADS): Operation(
        name="list_downloads",
        summary="List recent downloads, newest first",
        parameters=("limit",),
        replies={200: Reply(description="The downloads.", content={JSON: DownloadJobList})},
        errors=(errors.InvalidType, errors.InvalidValue, errors.QueueUnavailable),
    ),
    ("GET", paths.ONE_DOWNLOAD): Operation(
        name="get_download",
        summary="Get the status of a download",
        parameters=("job_id",),
        replies={200: Reply(description="The download.", content={JSON: DownloadJob})},
        errors=(*IN_A_PATH, errors.QueueUnavailable),
    ),
    ("DELETE", paths.ONE_DOWNLOAD): Operation(
        name="cancel_download",
        summary="Cancel a download, and remove what has come of it",
        parameters=("job_id",),
        replies={200: Reply(description="The download was cancelled.", content={JSON: DownloadJob})},
        errors=(*IN_A_PATH, errors.JobAlreadyFinished, errors.QueueUnavailable),
    ),
    ("GET", paths.DOWNLOAD_EVENTS): Operation(
        name="follow_download",
        summary="Stream the progress of a download",
        parameters=("job_id", "Last-Event-ID"),
        replies={
            200: Reply(description="The events. The stream ends with the download.", content=PROGRESS),
            204: Reply(description="The download has ended, and there are no events after `Last-Event-ID`."),
        },
        errors=(*IN_A_PATH, errors.TooManyWaiting, errors.QueueUnavailable),
    ),
    ("POST", paths.PAUSE_DOWNLOAD): Operation(
        name="pause_download",
        summary="Pause a download",
        description="What has come of it is kept.",
        parameters=("job_id",),
        replies={200: Reply(description="The download is paused.", content={JSON: DownloadJob})},
        errors=(*IN_A_PATH, errors.JobAlreadyFinished, errors.QueueUnavailable),
    ),
    ("POST", paths.RESUME_DOWNLOAD): Operation(
        name="resume_download",
        summary="Resume a download that is paused or has failed",
        parameters=("job_id",),
        replies={200: Reply(description="The download goes on.", content={JSON: DownloadJob})},
        errors=(*IN_A_PATH, errors.JobAlreadyFinished, errors.QueueUnavailable),
    ),
    ("DELETE", paths.MODEL): Operation(
        name="remove_model",
        summary="Remove the files of a model that is not loaded",
        parameters=("model_id", "worker"),
        replies={200: Reply(description="The files were removed.", content={JSON: RemovedModel})},
        errors=(
            *OF_AN_ID,
            errors.ModelInUse,
            errors.DownloadFailed,
            errors.NoWorker,
            errors.QueueUnavailable,
        ),
    ),
    ("GET", paths.MODELS): Operation(
        name="list_models",
        summary="List the available models and their loaded instances",
        replies={200: Reply(description="The models of all live workers.", content={JSON: ModelList})},
        errors=(errors.QueueUnavailable,),
    ),
    ("POST", paths.CHAT_COMPLETIONS): Operation(
        name="create_chat_completion",
        summary="Answer a conversation",
        description="An LLM answers, as in OpenAI's API. If it is not loaded, the request loads it. With `stream`, the "
        "reply is a stream of events: each has a chunk as its data, and the last one has `[DONE]`. An error after the "
        "first byte is the data of the last event. Disconnecting cancels the request.",
        body=ChatRequest,
        replies={
            200: Reply(
                description="The answers; or the event stream, if requested.",
                content={JSON: Completion, SSE: _chunks(Chunk)},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(*OF_A_CONVERSATION, errors.ContextLengthExceeded),
    ),
    ("POST", paths.RESPONSES): Operation(
        name="create_response",
        summary="Answer a conversation, in OpenAI's newer form",
        description="An LLM answers with reasoning, messages and calls of tools, each an item of the response. If it "
        "is not loaded, the request loads it. With `stream`, the reply is a stream of events. Disconnecting cancels "
        "the request, and then nothing is stored.",
        body=ResponseRequest,
        replies={
            200: Reply(
                description="The response; or the event stream, if requested.",
                content={JSON: ResponseObject, **RESPONDING},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(
            *OF_A_CONVERSATION,
            errors.PreviousResponseNotFound,
            errors.IntegrationsRefused,
            errors.ContextLengthExceeded,
        ),
    ),
    ("DELETE", paths.RESPONSES): Operation(
        name="delete_responses",
        summary="Remove all stored responses",
        description="Removes those of the token, of whatever route.",
        replies={200: Reply(description="They are removed.", content={JSON: DeletedResponses})},
        errors=(errors.QueueUnavailable,),
    ),
    ("GET", paths.RESPONSE): Operation(
        name="get_response",
        summary="Get a stored response",
        parameters=("response_id",),
        replies={200: Reply(description="The response.", content={JSON: ResponseObject})},
        errors=(errors.ResponseNotFound, errors.NotFound, errors.NotSupported, errors.QueueUnavailable),
    ),
    ("DELETE", paths.RESPONSE): Operation(
        name="delete_response",
        summary="Remove a stored response",
        parameters=("response_id",),
        replies={200: Reply(description="It is removed.", content={JSON: DeletedResponse})},
        errors=(errors.ResponseNotFound, errors.NotFound, errors.QueueUnavailable),
    ),
    ("POST", paths.RESPONSES_INPUT_TOKENS): Operation(
        name="count_response_input_tokens",
        summary="Count the tokens of a response's prompt",
        description="Takes the body of `POST /v1/responses`, and answers how many tokens its prompt has.",
        body=ResponseRequest,
        replies={200: Reply(description="The count.", content={JSON: CountReply}, headers=("Loadstone-Instance",))},
        errors=(*OF_A_CONVERSATION, errors.PreviousResponseNotFound, errors.IntegrationsRefused),
    ),
    ("POST", paths.MESSAGES): Operation(
        name="create_message",
        summary="Answer a conversation as Anthropic's API does",
        description="An LLM answers. If it is not loaded, the request loads it. With `stream`, the reply is a stream "
        "of events. An error after the first byte is the last event. Disconnecting cancels the request.",
        body=MessagesRequest,
        replies={
            200: Reply(
                description="The answer; or the event stream, if requested.",
                content={JSON: AnthropicMessage, **MESSAGE},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(*OF_A_CONVERSATION, errors.IntegrationsRefused, errors.ContextLengthExceeded),
    ),
    ("POST", paths.COUNT_TOKENS): Operation(
        name="count_message_tokens",
        summary="Count the tokens of a conversation as Anthropic's API does",
        description="Takes the body of `POST /v1/messages`, and answers how many tokens its prompt has.",
        body=MessagesRequest,
        replies={200: Reply(description="The count.", content={JSON: TokenCount}, headers=("Loadstone-Instance",))},
        errors=(*OF_A_CONVERSATION, errors.IntegrationsRefused),
    ),
    ("POST", paths.COMPLETIONS): Operation(
        name="create_completion",
        summary="Continue prompts",
        description="An LLM continues texts or tokens, with no template, as in OpenAI's API for its older models. If "
        "it is not loaded, the request loads it. With `stream`, the reply is a stream of events: each has a chunk as "
        "its data, and the last one has `[DONE]`. An error after the first byte is the data of the last event. "
        "Disconnecting cancels the request.",
        body=CompletionRequest,
        replies={
            200: Reply(
                description="The answers; or the event stream, if requested.",
                content={JSON: TextCompletion, SSE: _chunks(TextChunk)},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(*OF_A_MODEL, errors.NotSupported, errors.ContextLengthExceeded),
    ),
    ("POST", paths.EMBEDDINGS): Operation(
        name="create_embeddings",
        summary="Compute the vectors of texts",
        description="An embedding model computes a vector of length 1 for each text, as in OpenAI's API. If it is not "
        "loaded, the request loads it. Nothing is cut: a text that is too long is an error.",
        body=EmbeddingRequest,
        replies={
            200: Reply(description="The vectors.", content={JSON: EmbeddingList}, headers=("Loadstone-Instance",))
        },
        errors=(*OF_A_MODEL, errors.WrongModelType, errors.ContextLengthExceeded),
    ),
    **{
        ("POST", path): Operation(
            name=path.removeprefix("/").replace("/", "_"),
            summary="Rank documents",
            description="A reranker scores how well each document answers a query, as in the APIs of Jina, Cohere and "
            "llama.cpp's server; with `texts`, in the form of Text Embeddings Inference. If the model is not loaded, "
            f"the request loads it. The paths {', '.join(f'`{other}`' for other in paths.RERANKS)} do the same.",
            body=RerankRequest,
            replies={
                200: Reply(
                    description="The documents, best first.",
                    content={JSON: either(Ranking, list[RankedText])},
                    headers=("Loadstone-Instance",),
                )
            },
            errors=(*OF_A_MODEL, errors.UnsupportedOperation, errors.ContextLengthExceeded),
        )
        for path in paths.RERANKS
    },
    ("POST", paths.V0_EMBEDDINGS): Operation(
        name="create_legacy_embeddings",
        summary="Compute the vectors of texts as LM Studio's older API does",
        description="The same as `POST /v1/embeddings`.",
        body=EmbeddingRequest,
        replies={
            200: Reply(description="The vectors.", content={JSON: EmbeddingList}, headers=("Loadstone-Instance",))
        },
        errors=(*OF_A_MODEL, errors.WrongModelType, errors.ContextLengthExceeded),
    ),
    ("POST", paths.NATIVE_CHAT): Operation(
        name="chat",
        summary="Answer a conversation as LM Studio does",
        description="An LLM answers the user, and the conversation is stored to be continued. If the model is not "
        "loaded, the request loads it. With `stream`, the reply is a stream of events. Disconnecting cancels the "
        "request, and then nothing is stored.",
        body=NativeChatRequest,
        replies={
            200: Reply(
                description="The answer; or the event stream, if requested.",
                content={JSON: ChatResult, **CHATTING},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(
            *OF_A_CONVERSATION,
            errors.UnrecognizedKeys,
            errors.InvalidUnion,
            errors.PreviousResponseNotFound,
            errors.IntegrationsRefused,
            errors.ContextLengthExceeded,
        ),
    ),
    ("POST", paths.V0_CHAT_COMPLETIONS): Operation(
        name="create_legacy_chat_completion",
        summary="Answer a conversation as LM Studio's older API does",
        description="Takes the body of `POST /v1/chat/completions`, and adds statistics and what answered to the "
        "reply, or to the last chunk of a stream.",
        body=ChatRequest,
        replies={
            200: Reply(
                description="The answers; or the event stream, if requested.",
                content={JSON: LegacyCompletion, SSE: _chunks(LegacyChunk)},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(*OF_A_CONVERSATION, errors.ContextLengthExceeded),
    ),
    ("POST", paths.V0_COMPLETIONS): Operation(
        name="create_legacy_completion",
        summary="Continue prompts as LM Studio's older API does",
        description="Takes the body of `POST /v1/completions`, and adds statistics and what answered to the reply, or "
        "to the last chunk of a stream.",
        body=CompletionRequest,
        replies={
            200: Reply(
                description="The answers; or the event stream, if requested.",
                content={JSON: LegacyTextCompletion, SSE: _chunks(LegacyTextChunk)},
                headers=("Loadstone-Instance",),
            )
        },
        errors=(*OF_A_MODEL, errors.NotSupported, errors.ContextLengthExceeded),
    ),
    ("POST", paths.CHAT_INPUT_TOKENS): Operation(
        name="count_input_tokens",
        summary="Count the tokens of a conversation",
        description="Takes the body of a chat completion, and answers how many tokens its prompt has.",
        body=ChatRequest,
        replies={200: Reply(description="The count.", content={JSON: CountReply}, headers=("Loadstone-Instance",))},
        errors=OF_A_CONVERSATION,
    ),
    ("POST", paths.APPLY_TEMPLATE): Operation(
        name="apply_template",
        summary="Render a conversation",
        description="Takes the body of a chat completion, and answers what the model's chat template makes of it.",
        body=ChatRequest,
        replies={200: Reply(description="The prompt.", content={JSON: TemplateReply}, headers=("Loadstone-Instance",))},
        errors=OF_A_CONVERSATION,
    ),
    ("POST", paths.TOKENIZE): Operation(
        name="tokenize",
        summary="Split a text or a conversation into tokens",
        description="Takes the bodies of llama.cpp's server and of vLLM, with `model` added to the former.",
        body=TokenizeRequest,
        replies={200: Reply(description="The tokens.", content={JSON: TokenizeReply}, headers=("Loadstone-Instance",))},
        errors=OF_A_CONVERSATION,
    ),
    ("GET", paths.TOKENIZER_INFO): Operation(
        name="get_tokenizer",
        summary="Describe a tokenizer",
        description="As vLLM does: clients find out here that they need no tokenizer of their own.",
        parameters=("model",),
        replies={
            200: Reply(description="The tokenizer.", content={JSON: TokenizerReply}, headers=("Loadstone-Instance",))
        },
        errors=OF_A_MODEL,
    ),
    ("POST", paths.DETOKENIZE): Operation(
        name="detokenize",
        summary="Join tokens to a text",
        description="Takes the bodies of llama.cpp's server and of vLLM, with `model` added to the former.",
        body=DetokenizeRequest,
        replies={200: Reply(description="The text.", content={JSON: DetokenizeReply}, headers=("Loadstone-Instance",))},
        errors=OF_A_MODEL,
    ),
    ("GET", paths.V1_MODELS): Operation(
        name="list_ids",
        summary="List the models as OpenAI's API does",
        description="Lists each key that can be loaded, embedding models included, and the ids of loaded instances "
        "that differ from it. Clients of Anthropic's API get its form.",
        parameters=("anthropic-version", "limit of a page", "after_id", "before_id"),
        replies={200: Reply(description="The ids.", content={JSON: either(OpenAIModelList, AnthropicModelList)})},
        errors=(errors.InvalidType, errors.InvalidValue, errors.ModelNotFound, errors.QueueUnavailable),
    ),
    ("GET", paths.V1_MODEL): Operation(
        name="get_id",
        summary="Get one model as OpenAI's API does",
        parameters=("model_id", "anthropic-version"),
        replies={200: Reply(description="The id.", content={JSON: either(OpenAIModel, AnthropicModel)})},
        errors=(*OF_AN_ID, errors.QueueUnavailable),
    ),
    ("GET", paths.V0_MODELS): Operation(
        name="list_legacy_models",
        summary="List the models as LM Studio's older API does",
        description="Lists the same ids as `GET /v1/models`.",
        replies={200: Reply(description="The ids.", content={JSON: LegacyModelList})},
        errors=(errors.QueueUnavailable,),
    ),
    ("GET", paths.V0_MODEL): Operation(
        name="get_legacy_model",
        summary="Get one model as LM Studio's older API does",
        parameters=("model_id",),
        replies={200: Reply(description="The id.", content={JSON: LegacyModel})},
        errors=(*OF_AN_ID, errors.QueueUnavailable),
    ),
    ("GET", paths.WORKERS): Operation(
        name="list_workers",
        summary="List the live workers, with their devices and all of their instances",
        replies={200: Reply(description="The workers.", content={JSON: WorkerList})},
        errors=(errors.QueueUnavailable,),
    ),
    ("GET", paths.HEALTHZ): Operation(
        name="healthz",
        summary="Check whether the process is alive",
        replies={200: Reply(description="The process is alive.", content={TEXT: str})},
    ),
    ("GET", paths.READYZ): Operation(
        name="readyz",
        summary="Check whether the service can accept loads",
        replies={
            200: Reply(description="The service can accept loads.", content={TEXT: str}),
            503: Reply(
                description="The reason: Redis or a worker is missing, or the process is shutting down.",
                content={TEXT: str},
                headers=("Retry-After",),
            ),
        },
    ),
    ("GET", paths.METRICS): Operation(
        name="metrics",
        summary="Get metrics for Prometheus",
        description="Any API process serves the metrics of the whole pool. The documentation lists the metrics.",
        replies={
            200: Reply(
                description="The text format of Prometheus, version 0.0.4. If Redis is unavailable, little more than "
                "`loadstone_redis_up 0`.",
                content={TEXT: str},
            )
        },
    ),
    ("GET", paths.OPENAPI): Operation(
        name="openapi",
        summary="Get this API as an OpenAPI document",
        replies={200: Reply(description="An OpenAPI 3.1 document.", content={JSON: dict[str, Any]})},
    ),
    ("GET", paths.DOCS): Operation(
        name="docs",
        summary="Get this API as an HTML page",
        replies={200: Reply(description="The page.", content={HTML: str}, headers=("Content-Security-Policy",))},
    ),
}
