"""What clients send and read over HTTP, as closed named types.

Strict towards clients (`forbid_unknown_fields` is enforced by `api.decode`, which must list all unknown keys).  The
description of a request's field stands in its type: /openapi.json, /docs and `loadstone load --help` show that text."""

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
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]  # what any field of llama.cpp's can hold
Parallel = Annotated[int, Meta(ge=1, le=64)]
Seconds = Annotated[float, Meta(gt=0, le=10 * 366 * 24 * 3600)]
Moment = Annotated[datetime, Meta(tz=True)]
Ratio = Annotated[float, Meta(ge=0, le=1)]
Name = Annotated[str, Meta(min_length=1)]
Devices = Annotated[list[Name], Meta(min_length=1, max_length=64)]
Ratios = Annotated[list[Annotated[float, Meta(ge=0, le=1_000_000)]], Meta(min_length=1, max_length=64)]


class GPURequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where a model may go."""

    offload: Annotated[
        Ratio | Literal["max", "off"] | UnsetType,
        Meta(
            description="Share of the layers, the output layer included, that goes to GPUs: 0 to 1, `max` (all) or "
            "`off` (none). Default: the operator's setting, which is all or as many as fit."
        ),
    ] = UNSET
    worker: Annotated[Name | UnsetType, Meta(description="Load only on the worker with this name.")] = UNSET
    devices: Annotated[
        Devices | UnsetType,
        Meta(
            description="Load only on the devices with these ids, as `GET /api/v1/workers` lists them; with `CPU` "
            "alone, on no GPU."
        ),
    ] = UNSET
    split: Annotated[
        Literal["even", "priority"] | Ratios | UnsetType,
        Meta(
            description="Use all of the GPUs that may be used: in equal parts (`even`), each one filled before the "
            "next (`priority`), or in these ratios. Default: as few GPUs as have room."
        ),
    ] = UNSET


class LoadRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """A request to load a model.  The server decides what is left out; null is refused."""

    model: Annotated[str, Meta(description="Key of the model, as `GET /api/v1/models` lists it, or `key@variant`.")]
    context_length: Annotated[
        Positive | UnsetType,
        Meta(description="Tokens that the context can hold, at most the model's `max_context_length`."),
    ] = UNSET
    eval_batch_size: Annotated[
        Positive | UnsetType, Meta(description="Tokens evaluated at once. LLMs only; no effect on other models.")
    ] = UNSET
    flash_attention: Annotated[
        bool | UnsetType,
        Meta(description="Use flash attention. LLMs only. Default: the engine decides, unless the operator set it."),
    ] = UNSET
    num_experts: Annotated[
        Positive | UnsetType,
        Meta(
            description="Experts used per token, at most as many as the model has. Mixtures of experts only; no "
            "effect on other models."
        ),
    ] = UNSET
    offload_kv_cache_to_gpu: Annotated[
        bool | UnsetType, Meta(description="Keep the KV cache on the GPU. LLMs only.")
    ] = UNSET
    parallel: Annotated[Parallel | UnsetType, Meta(description="Sequences that the context can hold. LLMs only.")] = (
        UNSET
    )
    echo_load_config: Annotated[
        bool,
        Meta(description="Add `load_config` to the reply: the parameters that applied, read back from the engine."),
    ] = False
    force: Annotated[
        bool,
        Meta(description="Try a model that crashed the engine in the last ten minutes, which is refused otherwise."),
    ] = False
    ttl_seconds: Annotated[
        Seconds | UnsetType,
        Meta(description="Unload the instance after this many seconds without use. Default: keep it loaded."),
    ] = UNSET
    gpu: Annotated[
        GPURequest | UnsetType, Meta(description="Where the model may go. The pool decides what is left out.")
    ] = UNSET


class UnloadRequest(Struct, frozen=True, kw_only=True):
    """A request to unload an instance."""

    instance_id: Annotated[str, Meta(description="Id of the instance, as the reply to its load has it.")]


class LoadConfig(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """The parameters that applied, as read back from the loaded model and context (tokens, sequences, experts)."""

    context_length: int
    eval_batch_size: int | UnsetType = UNSET
    parallel: int | UnsetType = UNSET
    flash_attention: bool | UnsetType = UNSET
    offload_kv_cache_to_gpu: bool | UnsetType = UNSET
    num_experts: int | UnsetType = UNSET


class LoadResult(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The reply to a load.  `model_instance_id` is the documented name, `instance_id` the one newer clients read."""

    type: ModelType
    model_instance_id: str
    instance_id: str
    load_time_seconds: float
    status: Literal["loaded"]
    load_config: LoadConfig | UnsetType = UNSET


class Job(Struct, frozen=True, kw_only=True):
    """A load as its followers see it.  Its status is the load's outcome, and stays when the instance is unloaded.

    Sizes are in bytes; `timing` is in seconds by phase, with their sum as `total` once the load has ended.  `evicted`
    are the instances that were unloaded to make room for it.
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
        """What the stream of this load says of it as it is now."""
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
    """The first event of a load: it was accepted."""

    model_instance_id: str
    job_id: str


class LoadProgress(Struct, frozen=True, kw_only=True, tag_field="type", tag="model_load.progress"):
    """How far a load has come; the fields are the job's."""

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
    """The last event of a load that came to `loaded`."""

    model_instance_id: str
    job_id: str
    load_time_seconds: float
    result: LoadResult


class LoadError(Struct, frozen=True, kw_only=True, tag_field="type", tag="error"):
    """The last event of any other load."""

    error: ErrorBody


LoadEvent = LoadStart | LoadProgress | LoadEnd | LoadError


class UnloadResult(Struct, frozen=True, kw_only=True):
    instance_id: str


class EstimatedDevice(Struct, frozen=True, kw_only=True):
    """What a load would take of a device, and what is free there for loads."""

    id: str
    worker: str
    weights_bytes: int
    context_bytes: int
    compute_bytes: int
    total_bytes: int
    free_bytes: int


class EstimateResult(Struct, frozen=True, kw_only=True):
    """What a load would take.

    `evicts` are the instances that would be unloaded for it.  `max_context_length_that_fits` is with everything else
    as asked, and null where none does.  `exact` is false where it was not compared with the engine's own figures.
    """

    model: str
    fits: bool
    devices: list[EstimatedDevice]
    total_bytes: int
    evicts: list[str]
    max_context_length_that_fits: int | None
    exact: bool


class Quantization(Struct, frozen=True, kw_only=True):
    """`bits_per_weight` is whole and rounded down, as LM Studio lists it: typed clients refuse a fraction."""

    name: str | None
    bits_per_weight: int | None


class Capabilities(Struct, frozen=True, kw_only=True):
    vision: bool
    trained_for_tool_use: bool


class LoadedInstance(Struct, frozen=True, kw_only=True, gc=False):
    id: str
    config: LoadConfig
    worker: str
    devices: list[str]
    remaining_ttl_seconds: float | None  # until it is unloaded if nothing uses it; None: it is not by itself


class ListedModel(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One row of the model list.  Embedding models have no architecture, capabilities and description."""

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


class ModelList(Struct, frozen=True, kw_only=True):
    models: list[ListedModel]


class HeldInstance(Struct, frozen=True, kw_only=True, gc=False):
    """An instance in whatever state, and where it is or is to be."""

    id: str
    state: State
    model: str
    devices: list[str]


class ListedWorker(Struct, frozen=True, kw_only=True, gc=False):
    """A worker that is alive; `lease_age_seconds` have passed since its last sign of life."""

    name: str
    state: WorkerState
    devices: list[Device]
    instances: list[HeldInstance]
    lease_age_seconds: float
    version: str


class WorkerList(Struct, frozen=True, kw_only=True):
    workers: list[ListedWorker]
