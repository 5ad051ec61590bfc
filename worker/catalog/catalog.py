"""The catalog: the models of some directories, as the headers of their files describe them.

The content of a header is cached by the file's path, size, modification time and inode, in memory and on disk, so that
an unchanged file is read once.  The first pass stops before the vocabulary, which is most of a header; the rest is read
later, a few files at a time.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path, PurePosixPath
from typing import assert_never

import msgspec
from msgspec import Struct

import shared
from shared import quantization
from shared.files import replace_atomically
from shared.schema.model import FileStat, Model, Problem, Weights
from worker.catalog import directory, gguf, keys, modelfile, ollama, projectors
from worker.catalog.directory import Candidate, File
from worker.catalog.gguf import InvalidGGUF
from worker.catalog.keys import Home, Named, Place, Shard
from worker.catalog.modelfile import ModelFile
from worker.catalog.projectors import Described, Words
from worker.catalog.settings import SettingsFile
from worker.catalog.stores import kind

CACHE_VERSION = f"7 {shared.__version__}"  # the interpretation of a header may change with every release
NAMED_SHARDS = 5  # how many missing files a message names
COMPANION = "mmproj"  # in a file's name: the image encoder of a vision model


class Entry(Struct, frozen=True, array_like=True):
    stat: FileStat
    file: ModelFile


class CacheFile(Struct, frozen=True):
    version: str
    files: dict[str, Entry]  # by path


class Listed(Struct, frozen=True):
    """The models of some directories, the problems of their settings, and what an earlier directory hides."""

    models: list[Model]
    problems: list[str] = []
    hidden: list[Model] = []


class Catalog:
    """The models under `roots`, with the settings in the first of these directories.

    Call `look`, then `deepen` while `is_shallow` is true.  `listed` returns the current state at any time.
    """

    def __init__(self, roots: Sequence[Path], cache_file: Path) -> None:
        self.unlistable: dict[Path, str] = {}  # directory -> reason
        self._roots = roots
        self._cache_file = cache_file
        self._settings = SettingsFile(roots[0])
        self._entries = _load(cache_file)
        self._candidates: list[Candidate] = []
        self._unsaved = False

    def look(self) -> bool:
        """List the directories, and read the settings and the start of new files.  Returns whether anything changed.

        A directory that cannot be listed has no models, and is in `unlistable`.
        """
        before, self._candidates, self.unlistable = self._candidates, [], {}
        for i, root in enumerate(self._roots):
            try:
                self._candidates += [candidate._replace(root=i) for candidate in _walk(root)]
            except OSError as e:
                self.unlistable[root] = e.strerror or str(e)
        changed = self._settings.look() | (before != self._candidates)
        for candidate in self._candidates:
            known = self._entries.get(self._path(candidate))
            if candidate.refusal or (known and known.stat == candidate.stat and known.file.lasting):
                continue
            changed |= self._read(candidate, whole=False)
        return changed

    @property
    def is_shallow(self) -> bool:
        """Whether the header of a file is read only in part."""
        return any(self._lacks_rest(candidate) for candidate in self._candidates)

    def deepen(self, budget_s: float) -> None:
        """Read whole headers, at least one; start no further one after `budget_s` seconds."""
        end = time.monotonic() + budget_s
        for candidate in self._candidates:
            if self._lacks_rest(candidate):
                self._read(candidate, whole=True)
                if time.monotonic() >= end:
                    return

    def models(self) -> list[Model]:
        return self.listed().models

    def listed(self) -> Listed:
        paths = {candidate.file: self._path(candidate) for candidate in self._candidates}
        files = {file: self._entries[path].file for file, path in paths.items() if path in self._entries}
        models, hidden = assemble(self._candidates, files)
        return Listed(*self._settings.applied(models), hidden)

    def save(self) -> None:
        """Write the cache if it changed, so that a restart need not read the files again.  Raises OSError."""
        if not self._unsaved:
            return
        present = {self._path(candidate) for candidate in self._candidates}
        files = {path: e for path, e in self._entries.items() if path in present and e.file.lasting}
        self._cache_file.parent.mkdir(parents=True, exist_ok=True)
        data = msgspec.msgpack.encode(CacheFile(version=CACHE_VERSION, files=files))
        replace_atomically(self._cache_file, data, is_durable=False)  # a lost cache is rebuilt from the files
        self._unsaved = False

    def _lacks_rest(self, candidate: Candidate) -> bool:
        return not candidate.refusal and not self._entries[self._path(candidate)].file.whole

    def _path(self, candidate: Candidate) -> str:
        return f"{self._roots[candidate.root]}/{candidate.path}"

    def _read(self, candidate: Candidate, *, whole: bool) -> bool:
        """Read a file's header into the cache.  Returns whether the entry changed."""
        path = self._path(candidate)
        try:
            header = gguf.read(Path(path), whole=whole)
            if modelfile.needs_tensors(header):
                header = gguf.read(Path(path), whole=True)
            file = modelfile.describe(header)
        except InvalidGGUF as e:
            file = modelfile.unreadable(e)
        before = self._entries.get(path)
        self._entries[path] = Entry(candidate.stat, file)
        self._unsaved |= file.lasting
        return before is None or before.file != file


def _walk(root: Path) -> list[Candidate]:
    """List a directory of any kind.  Raises OSError."""
    match kind(root):
        case "ollama":
            return ollama.walk(root)
        case "files" | "huggingface":
            return directory.walk(root)
        case unknown:
            assert_never(unknown)


def _load(cache_file: Path) -> dict[str, Entry]:
    """Read the cache.  Returns no entries if the file is missing, damaged or of another version."""
    try:
        cache = msgspec.msgpack.decode(cache_file.read_bytes(), type=CacheFile)
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return {}
    return cache.files if cache.version == CACHE_VERSION else {}


class Group(Struct, frozen=True):
    """The files of one model."""

    place: Place
    home: Home
    of: int  # number of shards; 0: the model is a single file
    parts: dict[int, Candidate]  # by number, from 1

    @property
    def stats(self) -> list[FileStat]:
        return [self.parts[no].stat for no in sorted(self.parts)]


def assemble(candidates: Sequence[Candidate], files: Mapping[File, ModelFile]) -> tuple[list[Model], list[Model]]:
    """Group files into models, sorted by key.  `files` describes every candidate without a refusal.

    An unreadable file, or a folder that cannot be listed, becomes a model with a problem.  Returns also the models that
    are not listed, because an earlier directory has the same.
    """
    groups: dict[tuple[Place, object], Group] = {}
    companions: dict[Home, list[Described]] = {}
    for candidate in candidates:
        if candidate.is_folder:
            folders = PurePosixPath(candidate.path).parts
            place = Place(folders, folders[-1], candidate.revision, candidate.root)
            groups[place, candidate.path] = Group(place, keys.home(place), 0, {1: candidate})
            continue
        place, no, of = (
            Shard(keys.tagged(candidate.named, candidate.root), 1, 0)
            if candidate.named
            else keys.shard(candidate.path, candidate.revision, candidate.root)
        )
        file = files.get(candidate.file)
        if COMPANION in place.stem.lower() or (file is not None and file.kind == "companion"):
            if file is not None and file.vision and not candidate.refusal:
                companions.setdefault(keys.home(place), []).append(_described(place, file))
            continue
        if (group := groups.get((place, of or candidate.path))) is None:
            group = groups[place, of or candidate.path] = Group(place, keys.home(place), of, {})
        group.parts[no] = candidate
    found = [(group, _problem(group, files)) for group in _without_copies([*groups.values()])]
    shown = _without_hidden([group for group, problem in found if problem is None])
    models = {group.place for group in shown}
    hidden = [group for group, problem in found if problem is None and group.place not in models]
    broken = [(group, problem) for group, problem in found if problem is not None]
    names = keys.name_all([group.place for group in shown], [group.place for group, _ in broken])
    vision = _with_vision(shown, companions, files)
    described = [*((group, None) for group in shown), *broken]
    assembled = [_model(name, *one, files, vision) for name, one in zip(names, described, strict=True)]
    beneath = [
        _model(name, group, None, files, vision)
        for name, group in zip(keys.name_all([group.place for group in hidden]), hidden, strict=True)
    ]
    return sorted(assembled, key=lambda model: model.key), beneath


def _without_hidden(models: Sequence[Group]) -> list[Group]:
    """Leave out what an earlier directory has too: the same quantization of a model with the same name.

    Files with the same key and quantization are of different models if both of their names have words that differ.
    """
    seen: dict[tuple[str, str], list[tuple[int, Words]]] = {}
    kept: list[Group] = []
    for group in sorted(models, key=lambda group: group.place.root):
        root, words = group.place.root, projectors.words(group.place.stem)
        same = seen.setdefault((keys.base(group.place), keys.tag(group.place)), [])
        if not any(earlier < root and (not words or not theirs or words == theirs) for earlier, theirs in same):
            same.append((root, words))
            kept.append(group)
    return kept


def _without_copies(groups: Sequence[Group]) -> list[Group]:
    """Leave out the models of old revisions whose files are also those of another revision of the repository."""
    seen: set[tuple[tuple[str, ...], tuple[FileStat, ...]]] = set()
    kept: list[Group] = []
    for group in sorted(groups, key=lambda group: group.place.revision):  # the current revision is first
        identity = group.home.folders, tuple(group.stats)
        if not group.place.revision or identity not in seen:
            kept.append(group)
        seen.add(identity)
    return kept


def _described(place: Place, file: ModelFile) -> Described:
    return Described(place.stem, file.names, file.width, file.exact)


def _with_vision(
    models: Sequence[Group], companions: Mapping[Home, list[Described]], files: Mapping[File, ModelFile]
) -> dict[Home, set[Words]]:
    """Return the models that have an image encoder: the words of their stems, by home."""
    beside: dict[Home, list[Described]] = {}
    for group in models:
        file = files[group.parts[1].file]
        if group.home in companions and file.type == "llm":
            beside.setdefault(group.home, []).append(_described(group.place, file))
    return {
        home: set[Words]().union(
            *(projectors.owners(one, models_there, in_folder=bool(home.folders)) for one in companions[home])
        )
        for home, models_there in beside.items()
    }


def _model(
    name: Named,
    group: Group,
    problem: Problem | None,
    files: Mapping[File, ModelFile],
    vision: Mapping[Home, set[Words]],
) -> Model:
    place, parts = group.place, group.parts
    shards = [parts[no] for no in sorted(parts)]
    readable = [files[shard.file] for shard in shards if not shard.refusal]
    first = readable[0] if readable and 1 in parts and not parts[1].refusal else ModelFile(whole=True)
    parameters = _sum([file.parameters for file in readable])
    tensor_bytes = _sum([file.tensor_bytes for file in readable])
    return Model(
        key=name.key,
        base=name.base,
        variant=name.variant,
        shards=[shard.path for shard in shards],
        root=place.root,
        size_bytes=sum(shard.stat.size for shard in shards),
        problem=problem,
        type=first.type,
        publisher=keys.publisher(group.home) or first.organization,
        display_name=first.name or keys.title(place),
        description=first.description,
        architecture=first.architecture,
        quantization=keys.label(place) or first.quantization or quantization.by_tensors(_all_matrices(readable)),
        bits_per_weight=round(8 * tensor_bytes / parameters, 2) if tensor_bytes and parameters else None,
        params_string=first.size_label or (modelfile.abbreviated(parameters) if parameters else None),
        max_context_length=first.context_length,
        expert_count=first.expert_count,
        causal=first.causal,
        pooling=first.pooling,
        vision=group.home in vision and projectors.words(place.stem) in vision[group.home],
        trained_for_tool_use=first.tool_use,
        reasoning=first.reasoning,
        files=[shard.stat for shard in shards],
        can_map=all(file.can_map for file in readable),
        dimensions=first.dimensions,
        weights=_all_weights([file.weights for file in readable]),
    )


def _sum(numbers: Sequence[int | None]) -> int | None:
    known = [n for n in numbers if n is not None]
    return sum(known) if len(known) == len(numbers) else None


def _all_matrices(shards: Sequence[ModelFile]) -> Counter[int]:
    """Sum the numbers of matrices of all shards.  Returns none until all are known."""
    return sum((Counter(file.matrices) for file in shards if all(shard.whole for shard in shards)), Counter())


def _all_weights(shards: Sequence[Weights | None]) -> Weights | None:
    """Sum the weights of all shards.  Returns None until all are known.  The list of blocks is empty if all have the
    same size."""
    known = [weights for weights in shards if weights is not None]
    if not known or len(known) != len(shards):
        return None
    blocks = [sum(parts) for parts in zip_longest(*(weights.block_bytes for weights in known), fillvalue=0)]
    return Weights(
        input_bytes=sum(weights.input_bytes for weights in known),
        repeating_bytes=sum(weights.repeating_bytes for weights in known),
        output_bytes=sum(weights.output_bytes for weights in known),
        has_output=any(weights.has_output for weights in known),
        block_bytes=blocks if len({*blocks}) > 1 else [],
    )


def _problem(group: Group, files: Mapping[File, ModelFile]) -> Problem | None:
    """Return the first reason why the files cannot be loaded as one model, with the name of the file at fault."""
    place, of, parts = group.place, group.of, group.parts
    for no in sorted(parts):
        if parts[no].refusal:
            return _fault(parts[no], parts[no].refusal)
    missing = [no for no in range(1, of + 1) if no not in parts]
    if missing:
        suffix = PurePosixPath(next(iter(parts.values())).path).suffix  # .gguf in any case
        names = [f"{place.stem}-{no:05}-of-{of:05}{suffix}" for no in missing[:NAMED_SHARDS]]
        more = [f"{len(missing) - NAMED_SHARDS} more"] if len(missing) > NAMED_SHARDS else []
        message = f"the model is split into {of} files; missing: {', '.join(names + more)}"
        return Problem(code="invalid_model_file", message=message)
    for no in sorted(parts):
        file = files[parts[no].file]
        if file.problem is not None and (no == 1 or not file.readable):  # only the first shard describes the model
            return _fault(parts[no], file.problem.message, file.problem)
    split_count = files[parts[1].file].split_count
    if split_count > 1 and not of:
        suffix = f"-00001-of-{split_count:05}"
        return _fault(parts[1], f"is one of the {split_count} files of a split model, but lacks a suffix like {suffix}")
    if not any(files[shard.file].n_tensors for shard in parts.values()):
        return _fault(parts[1], "has no tensors: it is a vocabulary, not a model")
    return None


def _fault(candidate: Candidate, reason: str, problem: Problem | None = None) -> Problem:
    message = f"{candidate.name} {reason}"
    return Problem(code=problem.code if problem else "invalid_model_file", message=message)
