"""The catalog: the models of a directory, as the headers of their files describe them.

What a header said is remembered by the file's path, size, time and inode, in memory and on disk, so that an
unchanged file is read once.  A first look stops before the vocabulary, which is most of a header; the rest is read
afterwards, a few files at a time.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath

import msgspec
from msgspec import Struct

import shared
from shared import quantization
from shared.files import replace_atomically
from shared.schema.model import FileStat, Model, Problem, Weights
from worker.catalog import gguf, keys, modelfile
from worker.catalog.directory import Found, walk
from worker.catalog.gguf import InvalidGGUF
from worker.catalog.keys import Named, Place
from worker.catalog.modelfile import ModelFile

CACHE_VERSION = f"3 {shared.__version__}"  # what is concluded from a header may change with every release
NAMED_SHARDS = 5  # missing files that are named in a message
COMPANION = "mmproj"  # in a file's name: the part of a vision model that encodes images


class Entry(Struct, frozen=True, array_like=True):
    stat: FileStat
    file: ModelFile


class CacheFile(Struct, frozen=True):
    version: str
    files: dict[str, Entry]


class Catalog:
    """The models under `models_dir`.  `look`, then `deepen` as long as `is_shallow`; `models` is what is known now."""

    def __init__(self, models_dir: Path, cache_file: Path) -> None:
        self._models_dir = models_dir
        self._cache_file = cache_file
        self._entries = _load(cache_file)
        self._found: list[Found] = []
        self._unsaved = False

    def look(self) -> bool:
        """See what is there and read the start of what is new; whether anything changed.

        Raises OSError where the models directory cannot be listed: there are no models then.
        """
        before, self._found = self._found, []
        self._found = walk(self._models_dir)
        changed = before != self._found
        for found in self._found:
            known = self._entries.get(found.path)
            if found.refusal or (known and known.stat == found.stat and known.file.lasting):
                continue
            changed |= self._read(found, whole=False)
        return changed

    @property
    def is_shallow(self) -> bool:
        return any(self._lacks_rest(found) for found in self._found)

    def deepen(self, budget_s: float) -> None:
        """Read whole headers, at least one and no further one after `budget_s` seconds."""
        end = time.monotonic() + budget_s
        for found in self._found:
            if self._lacks_rest(found):
                self._read(found, whole=True)
                if time.monotonic() >= end:
                    return

    def models(self) -> list[Model]:
        return assemble(self._found, {path: entry.file for path, entry in self._entries.items()})

    def save(self) -> None:
        """Write what was learnt since the last time, so that a restart need not read it again.  Raises OSError."""
        if not self._unsaved:
            return
        present = {found.path for found in self._found}
        files = {path: e for path, e in self._entries.items() if path in present and e.file.lasting}
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        data = msgspec.msgpack.encode(CacheFile(version=CACHE_VERSION, files=files))
        replace_atomically(self._cache_file, data, is_durable=False)  # a lost cache is read from the models again
        self._unsaved = False

    def _lacks_rest(self, found: Found) -> bool:
        return not found.refusal and not self._entries[found.path].file.whole

    def _read(self, found: Found, *, whole: bool) -> bool:
        """Read a file's header and keep what it says; whether that differs from what was known."""
        try:
            file = modelfile.describe(gguf.read(self._models_dir / found.path, whole=whole))
        except InvalidGGUF as e:
            file = modelfile.unreadable(e)
        before = self._entries.get(found.path)
        self._entries[found.path] = Entry(found.stat, file)
        self._unsaved |= file.lasting
        return before is None or before.file != file


def _load(cache_file: Path) -> dict[str, Entry]:
    """A cache that cannot be used (missing, damaged, of another version) is as good as an empty one."""
    try:
        cache = msgspec.msgpack.decode(cache_file.read_bytes(), type=CacheFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return cache.files if cache.version == CACHE_VERSION else {}


def assemble(found: Sequence[Found], files: Mapping[str, ModelFile]) -> list[Model]:
    """The models that these files make, by key.  `files` has what is known of every one that may be opened.

    A file that cannot be read, and a folder that cannot be listed, is a model with a problem.
    """
    groups: dict[tuple[Place, object], dict[int, Found]] = {}
    seeing_folders: set[tuple[str, ...]] = set()
    for one in found:
        if one.is_folder:
            folders = PurePosixPath(one.path).parts
            groups[Place(folders, folders[-1]), one.path] = {1: one}
            continue
        place, no, of = keys.shard(one.path)
        file = files.get(one.path)
        if COMPANION in place.stem.lower() or (file is not None and file.kind == "companion"):
            if file is not None and file.vision and not one.refusal:
                seeing_folders.add(place.folders)
        else:
            groups.setdefault((place, of or one.path), {})[no] = one
    names = keys.name_all([place for place, _ in groups])
    models = [
        _model(name, place, of if isinstance(of, int) else 0, parts, files, vision=place.folders in seeing_folders)
        for name, ((place, of), parts) in zip(names, groups.items(), strict=True)
    ]
    return sorted(models, key=lambda model: model.key)


def _model(
    name: Named, place: Place, of: int, parts: dict[int, Found], files: Mapping[str, ModelFile], *, vision: bool
) -> Model:
    shards = [parts[no] for no in sorted(parts)]
    read = [files[one.path] for one in shards if not one.refusal]
    first = read[0] if read and 1 in parts and not parts[1].refusal else ModelFile(whole=True)
    parameters = _sum([file.parameters for file in read])
    tensor_bytes = _sum([file.tensor_bytes for file in read])
    tag = quantization.tag(place.stem).upper()
    return Model(
        key=name.key,
        base=name.base,
        variant=name.variant,
        shards=[one.path for one in shards],
        size_bytes=sum(one.stat.size for one in shards),
        problem=_problem(place, of, parts, files),
        type=first.type,
        publisher=keys.publisher(place) or first.organization,
        display_name=first.name or place.stem,
        description=first.description,
        architecture=first.architecture,
        quantization=first.quantization or tag or None,
        bits_per_weight=round(8 * tensor_bytes / parameters, 2) if tensor_bytes and parameters else None,
        params_string=first.size_label or (modelfile.abbreviated(parameters) if parameters else None),
        max_context_length=first.context_length,
        expert_count=first.expert_count,
        causal=first.causal,
        pooling=first.pooling,
        vision=vision,
        trained_for_tool_use=first.tool_use,
        files=[one.stat for one in shards],
        dimensions=first.dimensions,
        weights=_all_weights([file.weights for file in read]),
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if len(known) == len(numbers) else None


def _all_weights(found: Sequence[Weights | None]) -> Weights | None:
    """Of all shards, once all are known; a list of equal blocks is left out."""
    known = [weights for weights in found if weights is not None]
    if not known or len(known) != len(found):
        return None
    blocks = [sum(parts) for parts in zip_longest(*(weights.block_bytes for weights in known), fillvalue=0)]
    return Weights(
        input_bytes=sum(weights.input_bytes for weights in known),
        repeating_bytes=sum(weights.repeating_bytes for weights in known),
        output_bytes=sum(weights.output_bytes for weights in known),
        has_output=any(weights.has_output for weights in known),
        block_bytes=blocks if len({*blocks}) > 1 else [],
    )


def _problem(place: Place, of: int, parts: dict[int, Found], files: Mapping[str, ModelFile]) -> Problem | None:
    """The first reason why the files cannot be loaded as one model, with the name of the file at fault."""
    for no in sorted(parts):
        if parts[no].refusal:
            return _fault(parts[no], parts[no].refusal)
    missing = [no for no in range(1, of + 1) if no not in parts]
    if missing:
        names = [f"{place.stem}-{no:05}-of-{of:05}.gguf" for no in missing[:NAMED_SHARDS]]
        more = [f"{len(missing) - NAMED_SHARDS} more"] if len(missing) > NAMED_SHARDS else []
        message = f"the model is split into {of} files, of which {', '.join(names + more)} cannot be found"
        return Problem(code="invalid_model_file", message=message)
    for no in sorted(parts):
        file = files[parts[no].path]
        if file.problem is not None and (no == 1 or not file.readable):  # only the first shard describes the model
            return _fault(parts[no], file.problem.message, file.problem)
    split_count = files[parts[1].path].split_count
    if split_count > 1 and not of:
        return _fault(parts[1], f"is one of the {split_count} files of a split model, but is not named like one")
    if not any(files[one.path].n_tensors for one in parts.values()):
        return _fault(parts[1], "has no tensors: it is a vocabulary, not a model")
    return None


def _fault(found: Found, reason: str, problem: Problem | None = None) -> Problem:
    message = f"{PurePosixPath(found.path).name} {reason}"
    return Problem(code=problem.code if problem else "invalid_model_file", message=message)
