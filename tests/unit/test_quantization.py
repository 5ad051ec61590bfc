"""The tables of quantizations: they have all that the engine knows, under its names."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

from shared.quantization import BLOCKS, FILE_TYPES, GUESSED, NAMES, nominal_bits
from tests.support.child import in_child
from tests.support.headers import write

BEYOND = 200  # a tensor type that no engine has


def blocks_of_the_engine(directory: Path) -> dict[int, tuple[int, int]]:
    """Return elements and bytes of a block by tensor type; a removed type has none."""
    from llama_cpp import llama_cpp as lib

    lines: list[str] = []
    log = lib.llama_log_callback(lambda _level, text, _data: lines.append(text.decode()))
    lib.llama_log_set(log, ctypes.c_void_p(0))
    path = write(directory / "m.gguf", tensors=[("t", (32,), BEYOND)])
    assert not lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
    n_types = re.search(rf"invalid ggml type {BEYOND}\. should be in \[0, (\d+)\)", "".join(lines))
    assert n_types is not None
    ggml = lib._lib
    ggml.ggml_blck_size.restype, ggml.ggml_type_size.restype = ctypes.c_int64, ctypes.c_size_t
    return {kind: (ggml.ggml_blck_size(kind), ggml.ggml_type_size(kind)) for kind in range(int(n_types[1]))}


def file_types_of_the_engine() -> dict[int, str]:
    """Return the names of the file types, as the constants of llama.h have them."""
    from llama_cpp import llama_cpp as lib

    lib._lib.llama_ftype_name.restype = ctypes.c_char_p
    known = {n for n in range(GUESSED) if not lib._lib.llama_ftype_name(n).startswith(b"unknown")}
    names = {getattr(lib, name): name for name in dir(lib) if re.match(r"LLAMA_FTYPE_(ALL|MOSTLY)_", name)}
    return {n: names[n].removeprefix("LLAMA_FTYPE_").removeprefix("ALL_").removeprefix("MOSTLY_") for n in known}


def test_block_sizes_are_those_of_the_engine(tmp_path: Path) -> None:
    blocks = in_child(blocks_of_the_engine, tmp_path)
    assert {kind: block for kind, block in blocks.items() if block != (0, 0)} == BLOCKS


def test_file_types_are_those_of_the_engine() -> None:
    assert in_child(file_types_of_the_engine) == FILE_TYPES | {38: "MXFP4_MOE"}


def test_every_weight_type_has_the_name_of_a_file_type() -> None:
    """What only holds intermediate results (Q8_1, Q8_K), integers or doubles is no quantization of a file."""
    assert BLOCKS.keys() - NAMES.keys() == {9, 15, 24, 25, 26, 27, 28}
    assert {*NAMES.values()} <= {*FILE_TYPES.values()}


def test_a_nominal_size_is_known_for_common_names() -> None:
    assert nominal_bits("ud-q4_k_m") == nominal_bits("Q4_K_M")
    assert nominal_bits("f16") == 16
    assert nominal_bits("q8_0") == 8.5
    assert nominal_bits("q2_0") == 2.25
    assert nominal_bits("model") is None
