"""The types of requests and replies over HTTP.

Requests are decoded strictly: `api.decode` refuses unknown fields itself, because it must list all of them.  A request
field carries its description in its type: /openapi.json, /docs and `loadstone load --help` show that text.
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
Seconds = Annotated[float, Meta(gt=0, le=10 * 366 * 24 * 3600)]
Moment = Annotated[datetime, Meta(tz=True)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]
Devices = Annotated[list[Name], Meta(min_length=1, max_length=64)]
Ratios = Annotated[list[Annotated[float, Meta(ge=0, le=1_000_000)]], Meta(min_length=1, max_length=64)]


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
    parallel: Annotated[
        Parallel | UnsetType,
        Meta(description="Maximum number of sequences that share the context. LLMs only. Default: 1."),
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

    context_length: int
    eval_batch_size: int | UnsetType = UNSET
    physical_batch_size: int | UnsetType = UNSET
    parallel: int | UnsetType = UNSET
    flash_attention: bool | UnsetType = UNSET
    offload_kv_cache_to_gpu: bool | UnsetType = UNSET
    num_experts: int | UnsetType = UNSET


class LoadResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reply to a load.  `instance_id` equals `model_instance_id`: clients read one name or the other."""

    type: ModelType
    model_instance_id: str
    instance_id: str
    load_time_seconds: float
    status: Literal["loaded"]
    load_config: LoadConfig | UnsetType = UNSET


class Job(Struct, frozen=True, kw_only=True):
    """The state and the outcome of a load.  The status does not change when the instance is unloaded later.

    Sizes are in bytes.  `timing` holds the duration of each phase in seconds, and their sum as `total` once the load
    has ended.  `evicted` lists the instances that were unloaded to make room.
    """

    job_id: str
    status: JobStatus
    model: str
    instance_id: str
    model_instance_id: str
    worker: str
    devices: list[str]
    attempt: int
    progress: float
    phase: Phase | None
    total_size_bytes: int
    loaded_bytes: int
    bytes_per_second: float | None
    estimated_completion: Moment | None
    created_at: Moment
    started_at: Moment | None
    completed_at: Moment | None
    timing: dict[str, float]
    evicted: list[str]
    result: LoadResult | None
    error: ErrorBody | None

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
    jobs: list[Job]


class LoadStart(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.start"):
    """The first event of a load: the load was accepted."""

    model_instance_id: str
    job_id: str


class LoadProgress(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.progress"):
    """The progress of a load.  The fields are those of the job."""

    model_instance_id: str
    job_id: str
    status: JobStatus
    progress: float
    phase: Phase | None
    total_size_bytes: int
    loaded_bytes: int
    bytes_per_second: float | None
    estimated_completion: Moment | None


class LoadEnd(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.end"):
    """The last event of a successful load."""

    model_instance_id: str
    job_id: str
    load_time_seconds: float
    result: LoadResult


class LoadError(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The last event of a load that failed or was cancelled."""

    error: ErrorBody


LoadEvent = LoadStart | LoadProgress | LoadEnd | LoadError


class UnloadResult(Struct, frozen=True, kw_only=True):
    instance_id: str


class EstimatedDevice(Struct, frozen=True, kw_only=True):
    """The memory that a load would use on a device, and the memory that is available for loads there."""

    id: str
    worker: str
    weights_bytes: int
    context_bytes: int
    compute_bytes: int
    total_bytes: int
    free_bytes: int


class EstimateResult(Struct, frozen=True, kw_only=True):
    """The memory that a load would use.

    `evicts` lists the instances that would be unloaded to make room.  `max_context_length_that_fits` assumes that all
    other fields stay as requested; it is null if no context length fits.  `exact` is false if the estimate has not been
    verified against the engine.
    """

    model: str
    fits: bool
    devices: list[EstimatedDevice]
    total_bytes: int
    evicts: list[str]
    max_context_length_that_fits: int | None
    exact: bool


class Quantization(Struct, frozen=True, kw_only=True):
    """The quantization of a model.  `bits_per_weight` is rounded down, since typed clients need an integer."""

    name: str | None
    bits_per_weight: int | None


class Capabilities(Struct, frozen=True, kw_only=True):
    vision: bool
    trained_for_tool_use: bool


class LoadedInstance(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A loaded instance.  `variant` is the one of the model's `variants` that is loaded.  `remaining_ttl_seconds` is
    the time until the instance is unloaded if it stays idle, absent if it has no TTL."""

    id: str
    config: LoadConfig
    variant: str | UnsetType = UNSET
    worker: str
    devices: list[str]
    remaining_ttl_seconds: float | UnsetType = UNSET


class ListedModel(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """An entry of the model list.  Embedding models have no architecture, capabilities or description.

    `variants` are the keys of the quantizations of the model, and `selected_variant` is the one that `key` loads, which
    the other fields describe.  `loaded_instances` are those of all variants.  A model whose files tell no quantization
    has no variants.
    """

    type: ModelType
    publisher: str
    key: str
    display_name: str
    architecture: str | UnsetType = UNSET
    quantization: Quantization
    size_bytes: int
    params_string: str | None
    loaded_instances: list[LoadedInstance]
    max_context_length: int
    format: Literal["gguf"]
    capabilities: Capabilities | UnsetType = UNSET
    description: str | UnsetType | None = UNSET
    variants: list[str] | UnsetType = UNSET
    selected_variant: str | UnsetType = UNSET


class ModelList(Struct, frozen=True, kw_only=True):
    models: list[ListedModel]


class HeldInstance(Struct, frozen=True, kw_only=True, gc=False):
    """An instance in any state that is not terminal, with the devices that it uses or will use."""

    id: str
    state: State
    model: str
    devices: list[str]


class EngineBuild(Struct, frozen=True, kw_only=True):
    """The build of llama.cpp that a worker uses.

    `backends` are those of ggml, such as CUDA and CPU.  `chat_unavailable` is the reason why chat templates cannot be
    used; null if they can.
    """

    llama_cpp_python: str
    llama_cpp_commit: str
    backends: list[str]
    chat_unavailable: str | None


class ListedWorker(Struct, frozen=True, kw_only=True, gc=False):
    """A live worker.  `lease_age_seconds` is the time since its last heartbeat; `engine` is null if the worker is of a
    version that does not report it."""

    name: str
    state: WorkerState
    devices: list[Device]
    instances: list[HeldInstance]
    lease_age_seconds: float
    version: str
    engine: EngineBuild | None


class WorkerList(Struct, frozen=True, kw_only=True):
    workers: list[ListedWorker]
