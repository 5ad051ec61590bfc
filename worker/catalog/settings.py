"""The settings of models that an operator wrote into `models.toml` of the models directory."""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct

from shared.lookup import by_name, folded, spelled, spellings
from shared.memory.estimate import BLOCK
from shared.schema.model import FileStat, Model, ModelSettings, SamplingSettings

FILE = "models.toml"
MOST_BYTES = 1 << 20
MODELS, DEFAULT, SAMPLING = "models", "default_model", "sampling"
KEYS = frozenset(ModelSettings.__struct_fields__) - {"is_default"}
SAMPLING_KEYS = frozenset(SamplingSettings.__struct_fields__)


class InvalidSettings(Exception):
    """The file is not as it should be."""


class Settings(Struct, frozen=True):
    """The content of the file: a table of settings for each name of a model, and the name of the default model."""

    tables: dict[str, dict[str, Any]] = {}
    default: str | None = None


class SettingsFile:
    """The file of a models directory.  While it is invalid, the last valid content counts."""

    def __init__(self, models_dir: Path) -> None:
        self._path = models_dir / FILE
        self._stat: FileStat | None = None
        self._settings = Settings()
        self._problem = ""

    def look(self) -> bool:
        """Read the file if it changed.  Returns whether anything changed."""
        before = self._settings, self._problem
        try:
            version = FileStat.of(self._path.stat())
            if version == self._stat:
                return False
            self._stat = version
            self._settings, self._problem = parsed(_read(self._path)), ""
        except FileNotFoundError:
            self._stat, self._settings, self._problem = None, Settings(), ""
        except OSError as e:
            self._stat, self._problem = None, f"{FILE}: it cannot be read: {e.strerror}"
        except InvalidSettings as e:
            self._problem = f"{FILE}: {e}"
        return before != (self._settings, self._problem)

    def applied(self, models: Sequence[Model]) -> tuple[list[Model], list[str]]:
        """Return models with their settings, and all problems of the file."""
        with_settings, problems = applied(self._settings, models)
        return with_settings, [*([self._problem] if self._problem else []), *(f"{FILE}: {one}" for one in problems)]


def _read(path: Path) -> bytes:
    """Read a regular file.  Never blocks on a FIFO.  Raises OSError and InvalidSettings."""
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise InvalidSettings("it is not a regular file")
        with os.fdopen(fd, "rb", closefd=False) as file:
            data = file.read(MOST_BYTES + 1)
    finally:
        os.close(fd)
    if len(data) > MOST_BYTES:
        raise InvalidSettings(f"it has more than {MOST_BYTES} bytes")
    return data


def parsed(data: bytes) -> Settings:
    """Return the settings in a file.  Raises InvalidSettings, which names the line or the key."""
    try:
        content = tomllib.loads(data.decode())
    except UnicodeDecodeError:
        raise InvalidSettings("it is not UTF-8") from None
    except (tomllib.TOMLDecodeError, RecursionError) as e:
        raise InvalidSettings(str(e)) from None
    _check_keys(content, {MODELS, DEFAULT}, "")
    default = content.get(DEFAULT)
    if default is not None and not isinstance(default, str):
        raise InvalidSettings(f"{DEFAULT}: expected a string")
    tables = content.get(MODELS, {})
    if not isinstance(tables, dict):
        raise InvalidSettings(f'{MODELS}: expected tables such as [{MODELS}."publisher/name"]')
    for name, table in tables.items():
        where = f'{MODELS}."{name}"'
        if not isinstance(table, dict):
            raise InvalidSettings(f"{where}: expected a table")
        _check_keys(table, KEYS, f"{where}.")
        if isinstance(sampling := table.get(SAMPLING), dict):
            _check_keys(sampling, SAMPLING_KEYS, f"{where}.{SAMPLING}.")
        try:
            msgspec.convert(table, ModelSettings)
        except msgspec.ValidationError as e:
            what, _, path = str(e).partition(" - at `$")
            raise InvalidSettings(f"{where}{path.rstrip('`')}: {what[:1].lower()}{what[1:]}") from None
    return Settings(tables, default)


def _check_keys(table: Mapping[str, Any], known: frozenset[str] | set[str], where: str) -> None:
    if unknown := [key for key in table if key not in known]:
        raise InvalidSettings(f"{where}{unknown[0]}: unknown key; expected one of {', '.join(sorted(known))}")


def applied(settings: Settings, models: Sequence[Model]) -> tuple[list[Model], list[str]]:
    """Return models with their settings, and what is wrong with these.

    A table belongs to the model with its name, or for the plain key of a folder to all quantizations in it, of which
    the table of a single one takes precedence.
    """
    names = by_name(models)
    known = spellings(names)
    problems: list[str] = []
    tables: dict[str, dict[str, Any]] = {}  # by the name of the model
    aliases: dict[str, str] = {}  # folded -> the name of the model
    for written, table in settings.tables.items():
        where = f'{MODELS}."{written}"'
        if (name := spelled(known, written)) is None:
            problems.append(f"{where}: there is no such model")
            continue
        if name in tables:
            problems.append(f"{where}: another table is for the same model")
            continue
        tables[name] = table
        for alias in table.get("aliases", ()):
            if spelled(known, alias) is not None:
                problems.append(f"{where}.aliases: '{alias}' is the name of a model")
            elif aliases.setdefault(folded(alias), name) != name:
                problems.append(f"{where}.aliases: '{alias}' is an alias of another model too")
    default = None if settings.default is None else spelled(known, settings.default)
    if settings.default is not None and default is None:
        default = aliases.get(folded(settings.default))
        if default is None:
            problems.append(f"{DEFAULT}: there is no model '{settings.default}'")
    found: list[Model] = []
    for model in models:
        own = {model.key, model.full_key} - {model.base}
        plain, single = tables.get(model.base, {}), {k: v for name in own for k, v in tables.get(name, {}).items()}
        merged = {**plain, **single, SAMPLING: {**plain.get(SAMPLING, {}), **single.get(SAMPLING, {})}}
        is_selected = names[model.base] is model
        of_model = own | ({model.base} if is_selected else set())
        merged["preload"] = single.get("preload", is_selected and plain.get("preload", False))
        merged["aliases"] = [
            alias
            for name in (model.base, *sorted(own))
            for alias in tables.get(name, {}).get("aliases", ())
            if aliases.get(folded(alias)) == name
        ]
        if merged.get("context_length", 0) > model.max_context_length and model.problem is None:
            problems.append(
                f'{MODELS}."{model.key}".context_length: the maximum of the model is {model.max_context_length}'
            )
            del merged["context_length"]
        heads = model.dimensions
        if merged.get("kv_cache_type", "f16") != "f16" and heads and (heads.key_length | heads.value_length) % BLOCK:
            problems.append(
                f'{MODELS}."{model.key}".kv_cache_type: heads of {heads.key_length} elements cannot be quantized'
            )
            del merged["kv_cache_type"]
        chosen = msgspec.convert({**merged, "is_default": default in of_model}, ModelSettings)
        found.append(model if chosen == model.settings else msgspec.structs.replace(model, settings=chosen))
    return found, problems
