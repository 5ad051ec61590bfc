"""The table of architectures: it has all that the engine knows, and no other."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from tests.support.child import in_child
from tests.support.headers import header
from worker.catalog import architectures

NO_MODELS = {"clip", "gptj"}  # the engine knows the names, but loads no such model


def known_to_the_engine(directory: Path, names: frozenset[str]) -> set[str]:
    """Return which of `names`, and of the strings in the engine's library, it accepts as an architecture."""
    from llama_cpp import llama_cpp as lib

    lines: list[str] = []
    log = lib.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
    lib.llama_log_set(log, ctypes.c_void_p(0))
    library = Path(lib._lib._name).read_bytes()
    strings = {string.decode() for string in re.findall(rb"(?<=\0)[a-z][a-z0-9_-]{1,24}(?=\0)", library)}
    path, accepted = directory / "m.gguf", set()
    for name in names | strings:
        path.write_bytes(header({"general.architecture": name}, []))
        lines.clear()
        assert not lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if f"unknown model architecture: '{name}'" not in "".join(lines):
            accepted.add(name)
    return accepted


def test_the_architectures_are_those_of_the_engine(tmp_path: Path) -> None:
    accepted = in_child(known_to_the_engine, tmp_path, architectures.ARCHITECTURES)
    assert accepted - NO_MODELS == architectures.ARCHITECTURES


def test_every_rule_is_for_a_known_architecture() -> None:
    tables = [table for name, table in vars(architectures).items() if name.isupper()]
    assert len(tables) == 10
    assert frozenset().union(*tables) == architectures.ARCHITECTURES
    assert architectures.WHOLE_ROTATION <= architectures.EQUAL_LENGTHS
    assert architectures.BY_INTERVAL <= architectures.HYBRIDS
    assert not architectures.WHOLE_ROTATION & architectures.NO_ROTATION
