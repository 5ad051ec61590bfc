"""The types of requests and replies over HTTP.

Requests are decoded strictly: `api.decode` refuses unknown fields itself, because it must list all of them.  A field
carries its description in its type: /openapi.json, /docs and, for a request, `loadstone load --help` show that text.
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Literal

from msgspec import UNSET, Meta, Struct, UnsetType

from shared.errors import ErrorBody
from shared.lifecycle import State
from shared.schema.memory import Device
from shared.schema.model import ModelType

Phase = Literal["metadata", "weights", "context", "warmup"]
JobStatus = Literal["queued", "loading", "loaded", "failed", "cancelled"]
WorkerState = Literal["ready", "draining"]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # what an int field of llama.cpp can hold
Parallel = Annotated[int, Meta(ge=1, le=64)]
KVCacheType = Literal["f16", "q8_0", "q4_0"]
Seconds = Annotated[float, Meta(gt=0, le=10 * 366 * 24 * 3600)]
Moment = Annotated[datetime, Meta(tz=True)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]
Devices = Annotated[list[Name], Meta(min_length=1, max_length=64)]
Ratios = Annotated[list[Annotated[float, Meta(ge=0, le=1_000_000)]], Meta(min_length=1, max_length=64)]

# Fields of several types.
InstanceId = Annotated[str, Meta(description="Id of the instance.")]
SameId = Annotated[str, Meta(description="The same as `instance_id`: clients read one name or the other.")]
JobId = Annotated[str, Meta(description="Id of the load.")]
Outcome = Annotated[JobStatus, Meta(description="Outcome of the load so far.")]
Progress = Annotated[
    float,
    Meta(
        description="Share of the load that is done: 0 while it is queued, 1 once the model is loaded. It never "
        "decreases."
    ),
]
CurrentPhase = Annotated[Phase | None, Meta(description="What the load is doing; null before it begins.")]
TotalBytes = Annotated[int, Meta(description="Size of the files of the model.")]
LoadedBytes = Annotated[int, Meta(description="How much of the files is in memory.")]
Rate = Annotated[
    float | None,
    Meta(
        description="Bytes per second over the last seconds, or over the whole load once the model is loaded; null if "
        "it is not known."
    ),
]
Completion = Annotated[Moment | None, Meta(description="When the load will probably end; null if that is not known.")]


class GPURequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Constraints on the placement of a model."""

    offload: Annotated[
        Ratio | Literal["max", "off"] | UnsetType,
        Meta(
            description="Share of the layers, including the output layer, to place on GPUs: 0 to 1, `max` (all) or "
            "`off` (none). Default: set by the operator, either all layers or as many as fit."
        ),
    ] = UNSET
    worker: Annotated[Name | UnsetType, Meta(description="Load the model only on the worker with this name.")] = UNSET
    devices: Annotated[
        Devices | UnsetType,
        Meta(
            description="Use only the devices with these ids, as listed by `GET /api/v1/workers`. `CPU` alone means "
            "no GPU."
        ),
    ] = UNSET
    split: Annotated[
        Literal["even", "priority"] | Ratios | UnsetType,
        Meta(
            description="Split the model over all permitted GPUs: evenly (`even`), filling one GPU before the next "
            "(`priority`), or in the given ratios. Default: use as few GPUs as possible."
        ),
    ] = UNSET


class LoadRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request to load a model.  The server chooses values for absent fields; null is not allowed."""

    model: Annotated[str, Meta(description="Key of the model, as listed by `GET /api/v1/models`, or `key@variant`.")]
    context_length: Annotated[
        Positive | UnsetType,
        Meta(
            description="Size of the context in tokens, at most the `max_context_length` of the model. Default: set by "
            "the operator; for encoders the maximum, up to 8192."
        ),
    ] = UNSET
    eval_batch_size: Annotated[
        Positive | UnsetType,
        Meta(description="Number of tokens evaluated in one batch. LLMs only; ignored for other models."),
    ] = UNSET
    physical_batch_size: Annotated[
        Positive | UnsetType,
        Meta(
            description="Number of tokens computed at once, at most `eval_batch_size`. LLMs only; ignored for other "
            "models. Default: 512."
        ),
    ] = UNSET
    flash_attention: Annotated[
        bool | UnsetType,
        Meta(description="Use flash attention. LLMs only. Default: set by the operator, or else chosen by the engine."),
    ] = UNSET
    num_experts: Annotated[
        Positive | UnsetType,
        Meta(
            description="Number of experts used per token, at most the number that the model has. Mixture-of-experts "
            "models only; ignored for other models."
        ),
    ] = UNSET
    offload_kv_cache_to_gpu: Annotated[
        bool | UnsetType, Meta(description="Keep the KV cache in GPU memory. LLMs only.")
    ] = UNSET
    kv_cache_type: Annotated[
        KVCacheType | UnsetType,
        Meta(
            description="Element type of the KV cache. A quantized cache takes about half (`q8_0`) or a quarter "
            "(`q4_0`) of the memory and needs flash attention. LLMs only. Default: `f16`."
        ),
    ] = UNSET
    parallel: Annotated[
        Parallel | UnsetType,
        Meta(
            description="Maximum number of requests that run at once and share the context. LLMs only. Default: 4, at "
            "most the size of the context and of a batch."
        ),
    ] = UNSET
    echo_load_config: Annotated[
        bool,
        Meta(description="Add `load_config` to the reply: the parameters in effect, read back from the engine."),
    ] = False
    force: Annotated[
        bool,
        Meta(description="Load the model even if it crashed the engine in the last ten minutes."),
    ] = False
    ttl_seconds: Annotated[
        Seconds | UnsetType,
        Meta(description="Unload the instance after it was idle for this many seconds. Default: keep it loaded."),
    ] = UNSET
    gpu: Annotated[
        GPURequest | UnsetType, Meta(description="Constraints on the placement of the model. Default: none.")
    ] = UNSET


class UnloadRequest(Struct, frozen=True, kw_only=True):
    """A request to unload an instance."""

    instance_id: Annotated[str, Meta(description="Id of the instance, from the reply to its load.")]


class LoadConfig(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The parameters in effect, read back from the loaded model and context (in tokens, sequences and experts)."""

    context_length: Annotated[int, Meta(description="Size of the context in tokens.")]
    eval_batch_size: Annotated[
        int | UnsetType, Meta(description="Number of tokens evaluated in one batch. LLMs only.")
    ] = UNSET
    physical_batch_size: Annotated[
        int | UnsetType, Meta(description="Number of tokens that the engine computes at once. LLMs only.")
    ] = UNSET
    parallel: Annotated[
        int | UnsetType, Meta(description="Maximum number of sequences that share the context. LLMs only.")
    ] = UNSET
    flash_attention: Annotated[bool | UnsetType, Meta(description="Whether flash attention is used. LLMs only.")] = (
        UNSET
    )
    offload_kv_cache_to_gpu: Annotated[
        bool | UnsetType, Meta(description="Whether the KV cache is kept in GPU memory. LLMs only.")
    ] = UNSET
    kv_cache_type: Annotated[
        KVCacheType | UnsetType, Meta(description="Type of the elements of the KV cache; absent if it is `f16`.")
    ] = UNSET
    num_experts: Annotated[
        int | UnsetType, Meta(description="Number of experts used per token. Mixture-of-experts models only.")
    ] = UNSET


class LoadResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reply to a load."""

    type: Annotated[ModelType, Meta(description="Kind of the model.")]
    model_instance_id: SameId
    instance_id: InstanceId
    load_time_seconds: Annotated[
        float,
        Meta(description="Time that the load took in the runner, without the queue and the start of the process."),
    ]
    status: Annotated[Literal["loaded"], Meta(description="Always `loaded`.")]
    load_config: Annotated[
        LoadConfig | UnsetType, Meta(description="The parameters in effect, if the request had `echo_load_config`.")
    ] = UNSET


class Job(Struct, frozen=True, kw_only=True):
    """The state and the outcome of a load.  The status does not change when the instance is unloaded later."""

    job_id: JobId
    status: Outcome
    instance_state: Annotated[
        State, Meta(description="What the instance is now: this tells one that is in use from one that was unloaded.")
    ]
    model: Annotated[str, Meta(description="Key of the model, as requested.")]
    instance_id: InstanceId
    model_instance_id: SameId
    worker: Annotated[str, Meta(description="Name of the worker that has the load.")]
    devices: Annotated[
        list[str], Meta(description="Ids of the devices that the load uses; empty before the worker has placed it.")
    ]
    attempt: Annotated[int, Meta(description="Number of this attempt: a load whose worker dies is tried again.")]
    progress: Progress
    phase: CurrentPhase
    total_size_bytes: TotalBytes
    loaded_bytes: LoadedBytes
    bytes_per_second: Rate
    estimated_completion: Completion
    created_at: Annotated[Moment, Meta(description="When the load was accepted.")]
    started_at: Annotated[Moment | None, Meta(description="When the worker began the load; null before.")]
    completed_at: Annotated[Moment | None, Meta(description="When the load ended; null before.")]
    timing: Annotated[
        dict[str, float],
        Meta(description="Duration of each phase in seconds, and their sum as `total` once the load has ended."),
    ]
    evicted: Annotated[list[str], Meta(description="Ids of the instances that were unloaded to make room.")]
    result: Annotated[LoadResult | None, Meta(description="The reply to the load; null unless the model was loaded.")]
    error: Annotated[ErrorBody | None, Meta(description="Why the load failed; null unless it failed or was cancelled.")]

    def event(self) -> LoadEvent:
        """Return the event that describes the current state of this job."""
        if self.result is not None:
            return LoadEnd(
                model_instance_id=self.instance_id,
                job_id=self.job_id,
                load_time_seconds=self.result.load_time_seconds,
                result=self.result,
            )
        if self.error is not None:
            return LoadError(error=self.error)
        return LoadProgress(
            model_instance_id=self.instance_id,
            job_id=self.job_id,
            status=self.status,
            progress=self.progress,
            phase=self.phase,
            total_size_bytes=self.total_size_bytes,
            loaded_bytes=self.loaded_bytes,
            bytes_per_second=self.bytes_per_second,
            estimated_completion=self.estimated_completion,
        )


class JobList(Struct, frozen=True, kw_only=True):
    """Recent loads."""

    jobs: Annotated[list[Job], Meta(description="The loads, newest first.")]


class LoadStart(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.start"):
    """The first event of a load: the load was accepted."""

    model_instance_id: InstanceId
    job_id: JobId


class LoadProgress(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.progress"):
    """The progress of a load.  The fields are those of the job."""

    model_instance_id: InstanceId
    job_id: JobId
    status: Outcome
    progress: Progress
    phase: CurrentPhase
    total_size_bytes: TotalBytes
    loaded_bytes: LoadedBytes
    bytes_per_second: Rate
    estimated_completion: Completion


class LoadEnd(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.end"):
    """The last event of a successful load."""

    model_instance_id: InstanceId
    job_id: JobId
    load_time_seconds: Annotated[float, Meta(description="Time that the load took in the runner.")]
    result: Annotated[LoadResult, Meta(description="The reply to the load.")]


class LoadError(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The last event of a load that failed or was cancelled."""

    error: Annotated[ErrorBody, Meta(description="Why the load failed.")]


LoadEvent = LoadStart | LoadProgress | LoadEnd | LoadError


class UnloadResult(Struct, frozen=True, kw_only=True):
    """The reply to an unload."""

    instance_id: Annotated[str, Meta(description="Id of the instance that was unloaded.")]


class EstimatedDevice(Struct, frozen=True, kw_only=True):
    """The memory that a load would use on a device, and the memory that is available for loads there."""

    id: Annotated[str, Meta(description="Id of the device.")]
    worker: Annotated[str, Meta(description="Name of the worker of the device.")]
    weights_bytes: Annotated[int, Meta(description="What the weights would take.")]
    context_bytes: Annotated[int, Meta(description="What the context (the KV cache) would take.")]
    compute_bytes: Annotated[int, Meta(description="What the buffers of the computation would take.")]
    total_bytes: Annotated[int, Meta(description="The sum of these.")]
    free_bytes: Annotated[int, Meta(description="What loads may be given on this device now.")]


class EstimatedQuantization(Struct, frozen=True, kw_only=True):
    """A quantization of a model that the hub has."""

    name: Annotated[str, Meta(description="What follows the `@` of the model to choose it.")]
    size_bytes: Annotated[int, Meta(description="Size of its files.")]
    fits: Annotated[bool, Meta(description="Whether it fits now as the estimated one would, by the size of its files.")]


class EstimateResult(Struct, frozen=True, kw_only=True):
    """The memory that a load would use."""

    model: Annotated[str, Meta(description="Key of the model, as requested.")]
    fits: Annotated[bool, Meta(description="Whether the load fits now, if need be after evictions.")]
    devices: Annotated[list[EstimatedDevice], Meta(description="What the load would use of each device.")]
    total_bytes: Annotated[int, Meta(description="The sum over all devices.")]
    evicts: Annotated[list[str], Meta(description="Ids of the instances that would be unloaded to make room.")]
    max_context_length_that_fits: Annotated[
        int | None, Meta(description="The largest context with all other fields as requested; null if none fits.")
    ]
    exact: Annotated[bool, Meta(description="Whether the estimate has been verified against the engine.")]
    quantizations: Annotated[
        list[EstimatedQuantization] | UnsetType,
        Meta(description="The quantizations in the repository; only of a model that the hub has and no worker."),
    ] = UNSET


class Quantization(Struct, frozen=True, kw_only=True):
    """The quantization of a model."""

    name: Annotated[
        str | None, Meta(description="Name of the quantization, such as `Q4_K_M`; null if it is not known.")
    ]
    bits_per_weight: Annotated[
        int | None, Meta(description="Rounded down, since typed clients need an integer; null if it is not known yet.")
    ]


class Reasoning(Struct, frozen=True, kw_only=True):
    """How the reasoning of a model can be set."""

    allowed_options: Annotated[
        list[str],
        Meta(description="`off` and `on`: it can be turned off. `low`, `medium`, `high`: its effort can be set."),
    ]
    default: Annotated[str, Meta(description="The setting of a request that has none.")]


class Capabilities(Struct, frozen=True, kw_only=True):
    """What an LLM can do."""

    vision: Annotated[bool, Meta(description="Whether the model understands images.")]
    trained_for_tool_use: Annotated[bool, Meta(description="Whether the model is trained to call tools.")]
    reasoning: Annotated[
        Reasoning | UnsetType,
        Meta(description="How its reasoning can be set; absent if its chat template has no variable for that."),
    ] = UNSET


class LoadedInstance(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A loaded instance."""

    id: InstanceId
    config: Annotated[LoadConfig, Meta(description="The parameters in effect.")]
    variant: Annotated[
        str | UnsetType, Meta(description="Which of the `variants` of the model is loaded; absent if it has none.")
    ] = UNSET
    worker: Annotated[str, Meta(description="Name of the worker that holds the instance.")]
    devices: Annotated[list[str], Meta(description="Ids of the devices that hold the instance.")]
    remaining_ttl_seconds: Annotated[
        float | UnsetType,
        Meta(description="Seconds until the instance is unloaded if it stays idle; absent if it has no TTL."),
    ] = UNSET


class ListedModel(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An entry of the model list.  Embedding models have no architecture, capabilities or description."""

    type: Annotated[ModelType, Meta(description="Kind of the model.")]
    publisher: Annotated[str, Meta(description="Publisher of the model; empty if it is not known.")]
    key: Annotated[str, Meta(description="The name by which the model is loaded.")]
    display_name: Annotated[str, Meta(description="Name of the model for people.")]
    architecture: Annotated[
        str | UnsetType, Meta(description="Architecture, under its name in llama.cpp. LLMs only.")
    ] = UNSET
    quantization: Annotated[Quantization, Meta(description="Quantization of the weights.")]
    size_bytes: Annotated[int, Meta(description="Size of the files.")]
    params_string: Annotated[
        str | None, Meta(description="Number of parameters, such as `7B`; null if it is not known yet.")
    ]
    loaded_instances: Annotated[
        list[LoadedInstance], Meta(description="The instances of all variants that are loaded and can be used.")
    ]
    max_context_length: Annotated[int, Meta(description="The largest context of the model, in tokens.")]
    format: Annotated[Literal["gguf"], Meta(description="Format of the files.")]
    capabilities: Annotated[Capabilities | UnsetType, Meta(description="What the model can do. LLMs only.")] = UNSET
    description: Annotated[
        str | UnsetType | None,
        Meta(description="Description from the header of the file; null if it has none. LLMs only."),
    ] = UNSET
    variants: Annotated[
        list[str] | UnsetType,
        Meta(description="Keys of the quantizations of the model; absent if the names of its files tell none."),
    ] = UNSET
    selected_variant: Annotated[
        str | UnsetType, Meta(description="The variant that `key` loads, and that the other fields describe.")
    ] = UNSET


class ModelList(Struct, frozen=True, kw_only=True):
    """The models that can be loaded."""

    models: Annotated[list[ListedModel], Meta(description="The models, sorted by key.")]


class HeldInstance(Struct, frozen=True, kw_only=True, gc=False):
    """An instance in any state that is not terminal."""

    id: InstanceId
    job_id: JobId
    state: Annotated[State, Meta(description="State of the instance.")]
    model: Annotated[str, Meta(description="Key of the model, as requested.")]
    devices: Annotated[list[str], Meta(description="Ids of the devices that the instance uses or will use.")]
    size_bytes: Annotated[int, Meta(description="Size of the files of the model.")]
    requests_running: Annotated[int, Meta(description="Requests that it processes.")] = 0
    requests_waiting: Annotated[int, Meta(description="Requests that wait for it.")] = 0
    kv_cells_used: Annotated[
        int, Meta(description="Tokens in its KV cache, with those that are kept for later requests.")
    ] = 0
    generated_tokens_per_second: Annotated[
        float, Meta(description="Tokens that it generated per second, in the last seconds.")
    ] = 0.0


class EngineBuild(Struct, frozen=True, kw_only=True):
    """The build of llama.cpp that a worker uses."""

    llama_cpp_python: Annotated[str, Meta(description="Version of llama-cpp-python.")]
    llama_cpp_commit: Annotated[str, Meta(description="Commit of llama.cpp.")]
    backends: Annotated[list[str], Meta(description="Backends of ggml, such as `CUDA` and `CPU`.")]
    chat_unavailable: Annotated[str | None, Meta(description="Why chat templates cannot be used; null if they can.")]


class ListedWorker(Struct, frozen=True, kw_only=True, gc=False):
    """A live worker."""

    name: Annotated[str, Meta(description="Name of the worker.")]
    state: Annotated[WorkerState, Meta(description="`ready`, or `draining`: it stops and takes no more loads.")]
    devices: Annotated[list[Device], Meta(description="The devices that the worker owns.")]
    instances: Annotated[list[HeldInstance], Meta(description="Its instances in all states that are not terminal.")]
    lease_age_seconds: Annotated[float, Meta(description="Seconds since its last heartbeat.")]
    version: Annotated[str, Meta(description="Version of Loadstone that the worker runs.")]
    engine: Annotated[
        EngineBuild | None,
        Meta(description="Its build of llama.cpp; null if the worker is of a version that does not report it."),
    ]
    problems: Annotated[list[str], Meta(description="What is wrong in `models.toml` of its models directory.")] = []


class WorkerList(Struct, frozen=True, kw_only=True):
    """The workers of the pool."""

    workers: Annotated[list[ListedWorker], Meta(description="The live workers.")]


DownloadStatus = Literal["downloading", "paused", "completed", "failed", "cancelled"]
DownloadId = Annotated[str, Meta(description="Id of the download.")]
Started = Annotated[Moment, Meta(description="When the download began.")]
Ended = Annotated[Moment | UnsetType, Meta(description="When it ended; absent before.")]


class DownloadRequest(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A request to download a model from the hub."""

    model: Annotated[
        str,
        Meta(
            min_length=1,
            description="Repository of the model, `publisher/name` or `publisher/name@quantization`, or its URL at "
            "Hugging Face.",
        ),
    ]
    quantization: Annotated[
        str | UnsetType,
        Meta(
            description="Quantization, such as `Q4_K_M`, or name of a file. Default: the one that the plain key of the "
            "model would select."
        ),
    ] = UNSET
    revision: Annotated[
        str | UnsetType,
        Meta(description="Branch, tag or commit. Default: `main`, as it is at the time of the request."),
    ] = UNSET
    worker: Annotated[
        str | UnsetType,
        Meta(description="Download to the worker with this name. Default: the one with the most room on its disk."),
    ] = UNSET


class DownloadReply(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A download that was started, or that was not needed."""

    status: Annotated[
        DownloadStatus | Literal["already_downloaded"],
        Meta(description="`already_downloaded`: the files are there, and there is no job."),
    ]
    job_id: Annotated[str | UnsetType, Meta(description="Id of the download.")] = UNSET
    total_size_bytes: Annotated[int | UnsetType, Meta(description="Size of the files of the model.")] = UNSET
    started_at: Annotated[Moment | UnsetType, Meta(description="When the download began.")] = UNSET
    completed_at: Ended = UNSET


class DownloadJob(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A download."""

    job_id: DownloadId
    status: Annotated[DownloadStatus, Meta(description="Status of the download.")]
    model: Annotated[str, Meta(description="The model, as requested.")]
    repository: Annotated[str, Meta(description="Repository of the model.")]
    revision: Annotated[str, Meta(description="Commit of the files, which does not change once the job exists.")]
    files: Annotated[list[str], Meta(description="Paths of the files in the repository.")]
    worker: Annotated[str, Meta(description="Name of the worker that downloads it.")]
    total_size_bytes: Annotated[int, Meta(description="Size of the files of the model.")]
    downloaded_bytes: Annotated[int, Meta(description="How much of them has been received.")]
    started_at: Started
    bytes_per_second: Annotated[
        float | UnsetType, Meta(description="Rate over the last seconds; absent if nothing is being received.")
    ] = UNSET
    estimated_completion: Annotated[
        Moment | UnsetType, Meta(description="When the download will probably end; absent if that is not known.")
    ] = UNSET
    completed_at: Ended = UNSET
    error: Annotated[ErrorBody | UnsetType, Meta(description="Why the download failed.")] = UNSET


class DownloadJobList(Struct, frozen=True, kw_only=True):
    """Recent downloads."""

    jobs: Annotated[list[DownloadJob], Meta(description="The downloads, newest first.")]


class DownloadEvent(Struct, frozen=True, kw_only=True):
    """An event of a download: its state at that time."""

    type: Annotated[
        Literal["download.progress", "download.end"],
        Meta(description="Name of the event; `download.end` is the last one."),
    ]
    job: Annotated[DownloadJob, Meta(description="The download.")]


class RemovedModel(Struct, frozen=True, kw_only=True):
    """A model whose files were removed."""

    model: Annotated[str, Meta(description="Key of the model, as requested.")]
    workers: Annotated[list[str], Meta(description="Names of the workers that had it.")]
