"""Everything that crosses HTTP or Redis, as closed named types.

Strict towards clients (`forbid_unknown_fields` is enforced by `api.decode`, which must list all unknown keys),
tolerant between our own processes: a new field has a default, so that two versions can share one Redis.

What a large pool has tens of thousands of cannot be part of a reference cycle, so the garbage collector does not look
at it (`gc=False`): that took half of the time of reading such a pool.
"""

from __future__ import annotations

import hashlib
import os
import time
from datetime import datetime
from typing import Annotated, Any, Literal, NamedTuple

import msgspec
from msgspec import UNSET, Meta, Struct, UnsetType

from shared.errors import ErrorBody, LoadFailed
from shared.lifecycle import TERMINAL, Event, State, step

ModelType = Literal["llm", "embedding"]
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

# ---- what a client sends


class GPURequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """Where a model may go.  What is left out, the pool decides.

    `offload` is the part of the layers, the output among them, that GPUs take ("max": all, "off": none).  `devices`
    are the only ones that may be used, by their ids.  `split` uses all of these that are GPUs: in equal parts, each
    one filled before the next, or in these ratios.
    """

    offload: Ratio | Literal["max", "off"] | UnsetType = UNSET
    worker: Name | UnsetType = UNSET
    devices: Devices | UnsetType = UNSET
    split: Literal["even", "priority"] | Ratios | UnsetType = UNSET


class LoadRequest(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """What a client may ask for.  What is left out, the worker decides; null is not absence."""

    model: str
    context_length: Positive | UnsetType = UNSET
    eval_batch_size: Positive | UnsetType = UNSET
    flash_attention: bool | UnsetType = UNSET
    num_experts: Positive | UnsetType = UNSET
    offload_kv_cache_to_gpu: bool | UnsetType = UNSET
    parallel: Parallel | UnsetType = UNSET
    echo_load_config: bool = False
    force: bool = False
    ttl_seconds: Seconds | UnsetType = UNSET
    gpu: GPURequest | UnsetType = UNSET


class UnloadRequest(Struct, frozen=True, kw_only=True):
    instance_id: str


# ---- what a client reads


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


# ---- what workers publish


class Problem(Struct, frozen=True, kw_only=True):
    """Why a file that has a key cannot be loaded."""

    code: Literal["invalid_model_file", "unsupported_model"]
    message: str


class FileStat(NamedTuple):
    """While all of this stays the same, a file is taken to be unchanged."""

    size: int  # bytes
    mtime_ns: int
    inode: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStat:
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


PerBlock = int | list[int]  # the same in every block, or one for each


def each(value: PerBlock, block_count: int) -> list[int]:
    """A value for each block."""
    return value if isinstance(value, list) else [value] * block_count


class Dimensions(Struct, frozen=True, kw_only=True):
    """What of a header tells how much memory a load takes, by its names there; counts of elements.  0: it names none.

    There is at least one block, and a list has a value for each.
    """

    block_count: int
    embedding_length: int
    head_count: PerBlock
    head_count_kv: PerBlock
    key_length: int  # of one head
    value_length: int
    feed_forward_length: PerBlock = 0
    expert_used_count: int = 0
    expert_feed_forward_length: int = 0
    sliding_window: int = 0
    vocabulary: int | None = None  # tokens; None: it is not known yet


class Weights(Struct, frozen=True, kw_only=True):
    """Bytes of the tensors, by the place that llama.cpp has for them."""

    input_bytes: int  # embeddings: of tokens, their positions and their types
    repeating_bytes: int  # the blocks
    output_bytes: int  # the output matrix, and what belongs to no block
    has_output: bool  # False: the tokens' embeddings are the output matrix too
    block_bytes: list[int] = []  # of each block; of a whole model [] where they are equal


class Model(Struct, frozen=True, kw_only=True, gc=False):
    """A GGUF model on a worker's disk, as its file header describes it.

    `problem` is set where the header cannot be read or names something that is no model: such an entry keeps its
    key, so that loading it can say why, and is not listed.  Fields that lie behind a large vocabulary in the file
    are None until the whole header was read: `bits_per_weight`, `params_string`, `weights`.
    """

    key: str  # what clients load by: "publisher/name", "publisher/name@q4_k_m" or a bare file's stem
    base: str  # the key without its variant
    variant: str  # "q4_k_m": from the file's name; "" where the name tells none
    shards: list[str]  # paths under the models directory, first shard first
    size_bytes: int = 0  # of all shards
    problem: Problem | None = None
    type: ModelType = "llm"
    publisher: str = ""
    display_name: str = ""
    description: str | None = None
    architecture: str = ""
    quantization: str | None = None  # "Q4_K_M"
    bits_per_weight: float | None = None
    params_string: str | None = None  # "7B", "8x7B"
    max_context_length: int = 0  # tokens
    expert_count: int = 0
    causal: bool = True  # False: an encoder, whose whole input is one batch
    pooling: int = -1  # llama.cpp's pooling type, -1: the file names none (0 none, 1 mean, 2 cls, 3 last, 4 rank)
    vision: bool = False
    trained_for_tool_use: bool = False
    files: list[FileStat] = []  # of each shard
    dimensions: Dimensions | None = None  # None: the header lacks some
    weights: Weights | None = None  # of all shards

    @property
    def fingerprint(self) -> str:
        """A digest of its files' paths, sizes and times: the same wherever the same files were copied to.  "" where
        they are not known, as in what an older version published."""
        if not self.files:
            return ""
        facts = [(path, stat.size, stat.mtime_ns) for path, stat in zip(self.shards, self.files, strict=True)]
        return hashlib.sha256(msgspec.msgpack.encode(facts)).hexdigest()[:32]


CPU = "CPU"  # the id of the host's memory as a device


class Taken(Struct, frozen=True, kw_only=True):
    """Bytes that a load takes of a device."""

    id: str
    weights_bytes: int = 0
    context_bytes: int = 0  # the KV cache
    compute_bytes: int = 0

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.context_bytes + self.compute_bytes


class Device(Struct, frozen=True, kw_only=True, gc=False):
    """What models are loaded onto, as its worker knew it at its last beat."""

    id: str  # of a GPU its UUID, as NVML names it
    kind: Literal["gpu", "cpu"]
    name: str
    total_bytes: int
    free_bytes: int  # nobody uses them
    reserved_bytes: int = 0  # what the instances take that are there, or on their way
    leaked_bytes: int = 0  # used, but neither by these instances nor by anybody whom the driver names
    available_bytes: int = 0  # what loads may be given now


class Holding(Struct, frozen=True, kw_only=True, gc=False):
    """What an instance takes of its worker's devices."""

    id: str = ""  # of its load, where an API keeps in mind what it has just placed
    instance_id: str
    key: str
    devices: dict[str, int]  # bytes by device
    used_at: float  # the last use, in seconds since the epoch; 0.0: it is not loaded yet
    is_evictable: bool  # it may be unloaded to make room


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


class WorkerSnapshot(Struct, frozen=True, kw_only=True, gc=False):
    """A worker as it was at its last beat."""

    name: str
    epoch: str
    version: str
    catalog: str  # digest of the catalog it last published
    residents: int  # instances that it holds or has queued
    state: WorkerState = "ready"  # a draining one takes nothing more
    devices: list[Device] = []
    held: list[Holding] = []
    taken: list[str] = []  # the ends (`short`) of the ids of the loads that it has placed or refused last
    partly_on_cpu: bool = False  # where GPUs have no room for all layers, the CPU may take some
    lease_s: float = 0.0


def short(id_: str) -> str:
    """The end of a load's id, which tells it from others of the last seconds."""
    return id_[-8:]


class Sizing(Struct, frozen=True, kw_only=True):
    """What an API asks a worker's engine: what a load would take, on these GPUs."""

    request: LoadRequest
    key: str
    gpus: list[str]
    layers: list[int]


# ---- the record of an instance

UNBEGUN: dict[str, Any] = {  # what of a record goes back when it is requeued; its progress does not
    "epoch": None,
    "phase": None,
    "loaded_bytes": 0,
    "bytes_per_second": None,
    "estimated_completion": None,
    "devices": [],
    "evicted": [],
    "started_at": None,
    "timing": {},
}


class Instance(Struct, frozen=True, kw_only=True, omit_defaults=True, gc=False):
    """One load of one model with one configuration: the only thing that has a life.

    `id` names the load (the job), `instance_id` the thing in memory that clients use.  Times are seconds since the
    epoch, `timing` is seconds by phase.  The last four fields are the store's own; they are not in `doc`.
    """

    id: str
    model: str  # the key as asked
    key: str  # the key in the worker's catalog that it means
    type: ModelType
    worker: str
    request: LoadRequest
    traceparent: str = ""  # the span that asked for it: those that work on it are its children
    state: State = State.QUEUED
    epoch: str | None = None  # of the worker process that claimed it
    attempt: int = 1  # how often it was begun, counting this time
    restoring: int = 0  # how often what a worker's end took was tried to be loaded again; 0: a client asked for it
    not_before: float = 0.0  # its worker begins it at this time, not earlier
    phase: Phase | None = None
    progress: float = 0.0  # 0..1, never decreases, 1 only when loaded
    total_size_bytes: int = 0
    loaded_bytes: int = 0
    bytes_per_second: float | None = None  # of the last seconds; once loaded, of all the weights
    estimated_completion: float | None = None
    devices: list[str] = []
    evicted: list[str] = []  # instance ids of what was unloaded to make room for it
    refused: list[str] = []  # workers that had no room for it
    refusal: ErrorBody | None = None  # what the last of these said
    started_at: float | None = None
    loaded_at: float | None = None
    used_at: float | None = None  # until there is something to use it for: when it was loaded, if not restored
    completed_at: float | None = None
    timing: dict[str, float] = {}
    load_time_seconds: float | None = None
    load_config: LoadConfig | None = None
    error: ErrorBody | None = None

    instance_id: str = ""
    created_at: float = 0.0  # by Redis' clock, like the queue time that is measured from it
    rev: int = 0  # the fence: whoever holds an older one has lost the right to write
    stop_requested: bool = False

    def after(self, event: Event, **changes: Any) -> Instance:
        """This record once `event` has happened.

        Raises IllegalTransition where the table has no such move, and ValueError where `failed` would come without
        an error or another state with one.
        """
        state = step(self.state, event, was_loaded=self.loaded_at is not None)
        if (state is State.FAILED) != (changes.get("error") is not None):
            raise ValueError(f"{state} and its error do not go together: {changes}")
        if state in TERMINAL:
            changes["completed_at"] = time.time()
        if event is Event.REQUEUE:
            changes = {**UNBEGUN, "attempt": self.attempt + (self.state is not State.QUEUED), **changes}
        return msgspec.structs.replace(self, state=state, **changes)

    def abandoned(self, attempts: int, **changes: Any) -> Instance:
        """This record once its worker ended under it.  What was never loaded is begun anew, with `changes`, unless it
        was begun `attempts` times; what was, or is being unloaded, is lost."""
        if self.state not in (State.QUEUED, State.LOADING):
            return self.after(Event.EXPIRE)
        if self.state is State.QUEUED or self.attempt < attempts:
            return self.after(Event.REQUEUE, **changes)
        reason = f"its worker ended under it, the last time '{self.worker}', and it was begun {self.attempt} times"
        return self.after(Event.FAIL, error=LoadFailed("worker_lost", self.type, self.model, reason).body())

    @property
    def ids(self) -> dict[str, str]:
        """What log lines about it carry."""
        return {"job": self.id, "instance": self.instance_id, "worker": self.worker}

    @property
    def idle_at(self) -> float | None:
        """When it is unloaded if nothing uses it until then; None: never by itself, or not loaded yet."""
        ttl_s = self.request.ttl_seconds
        return None if ttl_s is UNSET or self.used_at is None else self.used_at + ttl_s

    def result(self) -> LoadResult:
        """The reply of a load that came to `loaded`."""
        assert self.load_time_seconds is not None
        assert self.load_config is not None
        return LoadResult(
            type=self.type,
            model_instance_id=self.instance_id,
            instance_id=self.instance_id,
            load_time_seconds=round(self.load_time_seconds, 6),
            status="loaded",
            load_config=self.load_config if self.request.echo_load_config else UNSET,
        )
