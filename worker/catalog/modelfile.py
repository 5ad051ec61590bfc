"""What one GGUF file is to Loadstone: a model, a part of one, a companion, or none of these, and why."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct, structs

from shared import quantization
from shared.schema.model import ENCODERS, Dimensions, ModelType, PerBlock, Problem, Weights
from worker.catalog.gguf import Header, InvalidGGUF, Scalar, Tensor, Value

# Limits that llama.cpp checks with GGML_ASSERT (src/llama-model.cpp, load_hparams): beyond them the process aborts.
MAX_BLOCKS = 512  # LLAMA_MAX_LAYERS
MAX_EXPERTS = 1024  # LLAMA_MAX_EXPERTS; measured: 1024 passes, 1025 aborts
ROPE_SCALING_TYPES = frozenset({"none", "linear", "yarn", "longrope"})
MAX_CONTEXT_LENGTH = 2**31 - 1
MAX_LENGTH = 2**20  # elements of what a memory estimate counts with: no model comes near
MAX_TEXT = 2000  # characters of a name or a description that are passed on
DIFFUSERS = frozenset({"dream", "llada", "llada-moe", "rnd1"})  # not causal either, but they write text

INPUT_TENSORS = frozenset({"token_embd.weight", "token_types.weight", "position_embd.weight"})

NO_MODEL = {
    "adapter": "is a LoRA adapter, not a model",
    "controlvector": "is a control vector, not a model",
    "imatrix": "is an importance matrix, not a model",
}

Kind = Literal["model", "companion", "other"]


class ModelFile(Struct, frozen=True, kw_only=True):
    """What one file says of itself.

    `whole`: its header was read to the end (or cannot be), and nothing more is to be learnt.  The message of
    `problem` continues a sentence that begins with the file's name.
    """

    whole: bool
    readable: bool = True
    kind: Kind = "model"
    problem: Problem | None = None
    lasting: bool = True  # False: the problem may pass without a change to the file
    type: ModelType = "llm"
    architecture: str = ""
    name: str = ""
    organization: str = ""
    description: str | None = None
    size_label: str | None = None
    quantization: str | None = None
    context_length: int = 0  # tokens
    expert_count: int = 0
    causal: bool = True
    pooling: int = -1
    vision: bool = False  # if it is a companion, what it encodes is images
    tool_use: bool = False
    split_count: int = 0  # files that the model is split into, 0: the file names none
    n_tensors: int = 0
    parameters: int | None = None
    tensor_bytes: int | None = None
    dimensions: Dimensions | None = None
    weights: Weights | None = None


def unreadable(error: InvalidGGUF) -> ModelFile:
    problem = Problem(code="invalid_model_file", message=error.reason)
    return ModelFile(whole=True, readable=False, problem=problem, lasting=error.lasting)


def describe(header: Header) -> ModelFile:
    """What the header says.  Any header has an answer; what is wrong with it is in `problem`."""
    fields = _Fields(header.metadata)
    architecture = fields.text("general.architecture")
    of = f"{architecture}.".__add__
    pooling = fields.number(of("pooling_type"), -1)
    causal = architecture not in ENCODERS and fields.flag(of("attention.causal"), True)
    file_type = fields.number("general.file_type", -1)
    parameters, tensor_bytes = _weigh(header)
    found = ModelFile(
        whole=header.tensors is not None,
        kind=_kind(fields),
        type="embedding" if pooling in (1, 2, 3, 4) or (not causal and architecture not in DIFFUSERS) else "llm",
        architecture=architecture,
        name=fields.text("general.name").strip(),
        organization=fields.text("general.organization") or fields.text("general.quantized_by"),
        description=fields.text("general.description") or None,
        size_label=fields.text("general.size_label") or None,
        quantization=quantization.by_file_type(file_type) if file_type >= 0 else None,
        context_length=fields.number(of("context_length"), 0),
        expert_count=fields.number(of("expert_count"), 0),
        causal=causal,
        pooling=pooling,
        vision=fields.flag("clip.has_vision_encoder", True),
        tool_use=_mentions_tools(header.metadata),
        split_count=fields.number("split.count", 0),
        n_tensors=header.n_tensors,
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        dimensions=_dimensions(fields, architecture, header.array_lengths.get("tokenizer.ggml.tokens")),
        weights=None if tensor_bytes is None else _by_place(header.tensors or ()),
    )
    return structs.replace(found, problem=_problem(fields, found))


class _Fields:
    """Metadata by key and type: a value of another type counts as absent, and llama.cpp will say so."""

    def __init__(self, metadata: dict[str, Value]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        return value[:MAX_TEXT] if isinstance(value, str) else ""

    def number(self, key: str, absent: int) -> int:
        """An integer, the largest of several (one per layer)."""
        value = self._metadata.get(key)
        values: list[Scalar] = value if isinstance(value, list) else [absent if value is None else value]
        return max((v for v in values if isinstance(v, int)), default=absent)

    def length(self, key: str, absent: int = 0) -> int:
        """A count of elements, the largest of several; `absent` also for what can be none."""
        value = self.number(key, absent)
        return value if 0 <= value <= MAX_LENGTH else absent

    def lengths(self, key: str, blocks: int, absent: PerBlock = 0) -> PerBlock:
        """A count of elements for each block, or one for all; `absent` also for what can be none."""
        value = self._metadata.get(key)
        values = value[:blocks] if isinstance(value, list) else [value]
        found = [v for v in values if isinstance(v, int) and 0 <= v <= MAX_LENGTH]
        if len(found) != (blocks if isinstance(value, list) else 1):
            return absent
        return found if isinstance(value, list) else found[0]

    def flag(self, key: str, absent: bool) -> bool:
        value = self._metadata.get(key)
        return value if isinstance(value, bool) else absent

    def has(self, key: str) -> bool:
        return key in self._metadata


def _kind(fields: _Fields) -> Kind:
    if fields.text("general.type") == "mmproj" or fields.text("general.architecture") == "clip":
        return "companion"
    return "other" if _no_model(fields) else "model"


def _no_model(fields: _Fields) -> str | None:
    return NO_MODEL.get(fields.text("general.type")) or NO_MODEL.get(fields.text("general.architecture"))


def _problem(fields: _Fields, found: ModelFile) -> Problem | None:
    if (message := _no_model(fields)) is not None:
        return Problem(code="unsupported_model", message=message)
    if found.kind == "companion":
        return None
    if (message := _defect(fields, found)) is not None:
        return Problem(code="invalid_model_file", message=message)
    return None


def _defect(fields: _Fields, found: ModelFile) -> str | None:
    """The first value that llama.cpp would abort on, or could not begin with."""
    if not found.architecture:
        return "names no architecture"
    prefix = found.architecture
    if not 1 <= found.context_length <= MAX_CONTEXT_LENGTH:
        if not fields.has(f"{prefix}.context_length"):
            return f"has no {prefix}.context_length"
        return f"has {prefix}.context_length = {found.context_length}; it must be from 1 to {MAX_CONTEXT_LENGTH}"
    blocks = fields.number(f"{prefix}.block_count", 1)
    if not 1 <= blocks <= MAX_BLOCKS:
        return f"has {prefix}.block_count = {blocks}; it must be from 1 to {MAX_BLOCKS}"
    if (message := _expert_defect(fields, prefix, found.expert_count)) is not None:
        return message
    scaling = fields.text(f"{prefix}.rope.scaling.type")
    if fields.has(f"{prefix}.rope.scaling.type") and scaling not in ROPE_SCALING_TYPES:
        allowed = ", ".join(sorted(ROPE_SCALING_TYPES))
        return f"has {prefix}.rope.scaling.type = {scaling[:40]!r}; it must be one of {allowed}"
    return None


def _expert_defect(fields: _Fields, prefix: str, experts: int) -> str | None:
    if not 0 <= experts <= MAX_EXPERTS:
        return f"has {prefix}.expert_count = {experts}; it must be at most {MAX_EXPERTS}"
    used = fields.number(f"{prefix}.expert_used_count", 0)
    if not (1 <= used <= experts if experts else used == 0):
        allowed = f"from 1 to {prefix}.expert_count ({experts})" if experts else "0 in a model without experts"
        return f"has {prefix}.expert_used_count = {used}; it must be {allowed}"
    groups = fields.number(f"{prefix}.expert_group_count", 0)
    groups_used = fields.number(f"{prefix}.expert_group_used_count", 0)
    if groups and groups >= experts:
        return f"has {prefix}.expert_group_count = {groups}; it must be less than {prefix}.expert_count ({experts})"
    if groups > 1 and (experts % groups or not 0 < groups_used < groups):
        return f"has {prefix}.expert_group_count = {groups}: it must divide the experts, and some groups must be used"
    return None


def _mentions_tools(metadata: dict[str, Value]) -> bool:
    """Whether a chat template has a place for tools: what a model that was not trained with them lacks."""
    templates = [value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")]
    return any(isinstance(template, str) and re.search(r"\btools\b", template) is not None for template in templates)


def _weigh(header: Header) -> tuple[int | None, int | None]:
    """Number of weights, and bytes that they take; None where the header does not tell (yet)."""
    if header.tensors is None:
        return None, None
    parameters = sum(tensor.elements for tensor in header.tensors)
    sizes = [tensor.size for tensor in header.tensors]
    return parameters, None if None in sizes else sum(size for size in sizes if size is not None)


def _by_place(tensors: Sequence[Tensor]) -> Weights:
    """Their bytes; every one is of a known type."""
    by_place, by_block = Counter[str](), Counter[int]()
    for tensor in tensors:
        size = tensor.size or 0
        place = "repeating" if tensor.name.startswith("blk.") else "input" if tensor.name in INPUT_TENSORS else "output"
        by_place[place] += size
        if block := re.match(r"blk\.(\d{1,3})\.", tensor.name):
            by_block[int(block[1])] += size
    return Weights(
        input_bytes=by_place["input"],
        repeating_bytes=by_place["repeating"],
        output_bytes=by_place["output"],
        has_output=any(tensor.name == "output.weight" for tensor in tensors),
        block_bytes=[by_block[i] for i in range(max(by_block, default=-1) + 1)],
    )


def _dimensions(fields: _Fields, architecture: str, tokens: int | None) -> Dimensions | None:
    """None where something is missing without which llama.cpp loads nothing, or is none of what there can be."""
    of = f"{architecture}.".__add__
    blocks, n_embd = fields.length(of("block_count")), fields.length(of("embedding_length"))
    heads = fields.lengths(of("attention.head_count"), blocks)
    most_heads = max(heads) if isinstance(heads, list) and heads else heads
    if not 1 <= blocks <= MAX_BLOCKS or not n_embd or not isinstance(most_heads, int) or not most_heads:
        return None
    return Dimensions(
        block_count=blocks,
        embedding_length=n_embd,
        head_count=heads,
        head_count_kv=fields.lengths(of("attention.head_count_kv"), blocks, heads),
        key_length=fields.length(of("attention.key_length"), n_embd // most_heads),
        value_length=fields.length(of("attention.value_length"), n_embd // most_heads),
        feed_forward_length=fields.lengths(of("feed_forward_length"), blocks),
        expert_used_count=fields.length(of("expert_used_count")),
        expert_feed_forward_length=fields.length(of("expert_feed_forward_length")),
        sliding_window=fields.length(of("attention.sliding_window")),
        vocabulary=tokens or fields.length(of("vocab_size")) or None,
    )


def abbreviated(parameters: int) -> str:
    """A number of weights as people say it: 7B, 1.5B, 596M, 22K."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        value = parameters / size
        if value >= 0.9995:
            return (f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:.0f}") + unit
    return str(parameters)
