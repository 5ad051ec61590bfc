"""Interprets the header of one GGUF file: a model, a shard, a companion, or an unusable file with the reason."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from typing import Literal

from msgspec import Struct, structs

from shared import quantization
from shared.schema.model import ENCODERS, Dimensions, ModelType, Problem, Weights
from worker.catalog import defects
from worker.catalog.architectures import ARCHITECTURES
from worker.catalog.fields import MAX_SHOWN, Fields
from worker.catalog.gguf import ALIGNMENT, TOKENS, Header, InvalidGGUF, Tensor, Value

MAPPED_ALIGNMENT = 32  # bytes; of a mapping with less, llama.cpp makes no buffer (ggml's TENSOR_ALIGNMENT)
DIFFUSERS = frozenset({"dream", "llada", "llada-moe", "rnd1"})  # not causal, but they generate text

INPUT_TENSORS = frozenset({"token_embd.weight", "token_types.weight", "position_embd.weight"})

NO_MODEL = {  # by general.type or architecture
    "adapter": "is a LoRA adapter, not a model",
    "controlvector": "is a control vector, not a model",
    "imatrix": "is an importance matrix, not a model",
}
# Architectures that predict tokens for another model, and have no context without it (llama-context.cpp, `ctx_other`).
DRAFTS = frozenset({"dflash", "eagle3", "gemma4-assistant"})
DRAFT = "is a draft model: it only speeds up another model, and cannot be loaded alone"

Kind = Literal["model", "companion", "other"]


class ModelFile(Struct, frozen=True, kw_only=True):
    """The description that one file gives of itself.

    `whole`: its header was read to the end, or cannot be read.  The message of `problem` continues a sentence that
    begins with the file's name.
    """

    whole: bool
    readable: bool = True
    kind: Kind = "model"
    problem: Problem | None = None
    lasting: bool = True  # False: the problem may disappear without a change to the file
    type: ModelType = "llm"
    architecture: str = ""
    name: str = ""
    organization: str = ""
    description: str | None = None
    size_label: str | None = None
    quantization: str | None = None  # by `general.file_type`
    matrices: dict[int, int] = {}  # their number by tensor type
    context_length: int = 0  # tokens
    expert_count: int = 0
    causal: bool = True
    pooling: int = -1
    names: list[str] = []  # general.name and general.basename
    width: int = 0  # embedding length; of a companion, the one that it produces; 0: unknown
    vision: bool = False  # of a companion: it encodes images
    exact: bool = False  # of a companion: names and width are those of the models that it belongs to
    tool_use: bool = False
    reasoning: list[str] = []
    split_count: int = 0  # number of files of a split model; 0: the header has none
    n_tensors: int = 0
    parameters: int | None = None
    tensor_bytes: int | None = None
    dimensions: Dimensions | None = None
    weights: Weights | None = None
    can_map: bool = True


def unreadable(error: InvalidGGUF) -> ModelFile:
    problem = Problem(code="invalid_model_file", message=error.reason)
    return ModelFile(whole=True, readable=False, problem=problem, lasting=error.lasting)


def describe(header: Header) -> ModelFile:
    """Describe a file by its header.  Accepts any header; a defect is reported in `problem`."""
    fields = Fields(header.metadata)
    architecture = fields.text("general.architecture")
    of = f"{architecture}.".__add__
    pooling = fields.number(of("pooling_type"), -1)
    causal = architecture not in ENCODERS and fields.flag(of("attention.causal"), True)
    file_type = fields.number("general.file_type", -1)
    parameters, tensor_bytes = _weigh(header)
    no_model = _no_model(fields, header)
    file = ModelFile(
        whole=header.tensors is not None,
        kind=_kind(fields, no_model),
        type="embedding" if pooling in (1, 2, 3, 4) or (not causal and architecture not in DIFFUSERS) else "llm",
        architecture=architecture,
        name=fields.text("general.name").strip(),
        organization=fields.text("general.organization") or fields.text("general.quantized_by"),
        description=fields.text("general.description") or None,
        size_label=fields.text("general.size_label") or None,
        quantization=quantization.by_file_type(file_type) if file_type >= 0 else None,
        matrices=Counter(tensor.type for tensor in header.tensors or () if len(tensor.dims) > 1),
        context_length=fields.number(of("context_length"), 0),
        expert_count=fields.number(of("expert_count"), 0),
        causal=causal,
        pooling=pooling,
        names=[name for key in ("general.name", "general.basename") if (name := fields.text(key))],
        width=fields.length("clip.vision.projection_dim") or fields.length(of("embedding_length")),
        vision=fields.flag("clip.has_vision_encoder", not fields.flag("clip.has_audio_encoder", False)),
        exact=fields.text("general.type") == "mmproj",
        tool_use=any(re.search(r"\btools\b", template) for template in _templates(header.metadata)),
        reasoning=_reasoning(_templates(header.metadata)),
        split_count=fields.number("split.count", 0),
        n_tensors=header.n_tensors,
        parameters=parameters,
        tensor_bytes=tensor_bytes,
        dimensions=_dimensions(fields, architecture, header.array_lengths.get(TOKENS)),
        weights=None if tensor_bytes is None else _by_place(header.tensors or ()),
        can_map=fields.number(ALIGNMENT, MAPPED_ALIGNMENT) % MAPPED_ALIGNMENT == 0,
    )
    return structs.replace(file, problem=_problem(fields, file, no_model))


def needs_tensors(header: Header) -> bool:
    """Return whether only the tensors tell if a file is a model, since it may have nothing but a model's draft layers.

    These predict several tokens at once (MTP, NextN).
    """
    return header.tensors is None and _draft_blocks(Fields(header.metadata)) is not None


def _draft_blocks(fields: Fields) -> int | None:
    """Return the number of the first block that belongs to a model's draft layers; None if it has none."""
    of = f"{fields.text('general.architecture')}.".__add__
    n = fields.number(of("nextn_predict_layers"), 0)
    return fields.number(of("block_count"), 0) - n if n > 0 else None


def _kind(fields: Fields, no_model: str | None) -> Kind:
    """A companion encodes images or audio for the models beside it; a CLIP model that encodes text is no companion."""
    is_clip = fields.text("general.architecture") == "clip" and not fields.flag("clip.has_text_encoder", False)
    if fields.text("general.type") == "mmproj" or is_clip:
        return "companion"
    return "model" if no_model is None else "other"


def _no_model(fields: Fields, header: Header) -> str | None:
    """Return the reason why a file is not a model, None if it is one."""
    architecture = fields.text("general.architecture")
    if architecture in DRAFTS:
        return DRAFT
    first, blocks = _draft_blocks(fields), [number for t in header.tensors or () if (number := _block(t)) is not None]
    if first is not None and blocks and min(blocks) >= first >= 0:
        return DRAFT
    return NO_MODEL.get(fields.text("general.type")) or NO_MODEL.get(architecture)


def _block(tensor: Tensor) -> int | None:
    """Return the number of the block that a tensor belongs to; None if it belongs to none."""
    block = re.match(r"blk\.(\d{1,3})\.", tensor.name)
    return None if block is None else int(block[1])


def _problem(fields: Fields, file: ModelFile, no_model: str | None) -> Problem | None:
    if no_model is not None:
        return Problem(code="unsupported_model", message=no_model)
    if file.kind == "companion":
        return None
    message = defects.defect(fields)
    if message is None:
        return None
    if file.architecture and file.architecture not in ARCHITECTURES:  # what it lacks belongs to language models
        message = f"is a model of the architecture {file.architecture[:MAX_SHOWN]!r}, which llama.cpp does not support"
        return Problem(code="unsupported_model", message=message)
    return Problem(code="invalid_model_file", message=message)


def _templates(metadata: dict[str, Value]) -> list[str]:
    """Return the chat templates.  That of a model trained for tool use has a variable `tools`."""
    values = [value for key, value in metadata.items() if key.startswith("tokenizer.chat_template")]
    return [value for value in values if isinstance(value, str)]


def _reasoning(templates: list[str]) -> list[str]:
    """Return the settings of reasoning for which chat templates have variables."""
    options = []
    if any("enable_thinking" in template for template in templates):
        options += ["off", "on"]
    if any("reasoning_effort" in template for template in templates):
        options += ["low", "medium", "high"]
    return options


def _weigh(header: Header) -> tuple[int | None, int | None]:
    """Return the number of weights and their bytes.  Each is None if unknown: the tensors were not read yet, or for the
    bytes, have an unknown type."""
    if header.tensors is None:
        return None, None
    parameters = sum(tensor.elements for tensor in header.tensors)
    sizes = [tensor.size for tensor in header.tensors]
    return parameters, None if None in sizes else sum(size for size in sizes if size is not None)


def _by_place(tensors: Sequence[Tensor]) -> Weights:
    """Sum the bytes of tensors, all of known types, by their place in the model."""
    by_place, by_block = Counter[str](), Counter[int]()
    for tensor in tensors:
        size = tensor.size or 0
        place = "repeating" if tensor.name.startswith("blk.") else "input" if tensor.name in INPUT_TENSORS else "output"
        by_place[place] += size
        if (block := _block(tensor)) is not None:
            by_block[block] += size
    return Weights(
        input_bytes=by_place["input"],
        repeating_bytes=by_place["repeating"],
        output_bytes=by_place["output"],
        has_output=any(tensor.name == "output.weight" for tensor in tensors),
        block_bytes=[by_block[i] for i in range(max(by_block, default=-1) + 1)],
    )


def _dimensions(fields: Fields, architecture: str, tokens: int | None) -> Dimensions | None:
    """Return the model's dimensions.  Returns None if a field that llama.cpp requires is missing or out of range.

    A model without attention has 0 heads.
    """
    of = f"{architecture}.".__add__
    blocks, n_embd = fields.length(of("block_count")), fields.length(of("embedding_length"))
    heads = fields.lengths(of("attention.head_count"), blocks, -1)
    most_heads = max(heads) if isinstance(heads, list) and heads else heads
    if not 1 <= blocks <= defects.MAX_BLOCKS or not n_embd or not isinstance(most_heads, int) or most_heads < 0:
        return None
    head_length = n_embd // max(1, most_heads)
    return Dimensions(
        block_count=blocks,
        embedding_length=n_embd,
        head_count=heads,
        head_count_kv=fields.lengths(of("attention.head_count_kv"), blocks, heads),
        key_length=fields.length(of("attention.key_length"), head_length),
        value_length=fields.length(of("attention.value_length"), head_length),
        feed_forward_length=fields.lengths(of("feed_forward_length"), blocks),
        expert_used_count=fields.length(of("expert_used_count")),
        expert_feed_forward_length=fields.length(of("expert_feed_forward_length")),
        sliding_window=fields.length(of("attention.sliding_window")),
        vocabulary=tokens or fields.length(of("vocab_size")) or None,
    )


def abbreviated(parameters: int) -> str:
    """Format a number of weights in the usual short form: 7B, 1.5B, 596M, 22K."""
    for unit, size in (("T", 10**12), ("B", 10**9), ("M", 10**6), ("K", 10**3)):
        value = parameters / size
        if value >= 0.9995:
            return (f"{value:.1f}".removesuffix(".0") if value < 9.95 else f"{value:.0f}") + unit
    return str(parameters)
