"""What a worker says about the build of llama.cpp that it uses."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from worker.chat.code import LIBRARY, ChatCode, ChatUnavailable
from worker.runner.warm import Runners

REGISTRY = """
llama.initialise("-1")
ggml = llama.lib._lib
ggml.ggml_backend_reg_count.restype = ctypes.c_size_t
ggml.ggml_backend_reg_get.argtypes, ggml.ggml_backend_reg_get.restype = [ctypes.c_size_t], ctypes.c_void_p
ggml.ggml_backend_reg_name.argtypes, ggml.ggml_backend_reg_name.restype = [ctypes.c_void_p], ctypes.c_char_p
registered = [ggml.ggml_backend_reg_get(i) for i in range(ggml.ggml_backend_reg_count())]
"""


def ask(expression: str, before: str = "") -> Any:
    """Evaluate an expression in a process that has imported the engine."""
    imports = "import ctypes, json\nfrom worker.chat import code\nfrom worker.engine import llama"
    code = f"{imports}\n{before}\nprint(json.dumps({expression}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


async def test_a_warm_runner_describes_its_engine(forkserver: None) -> None:
    runners = Runners(10.0, visible="-1")
    try:
        await runners.warmed()
        engine = runners.engine
    finally:
        await runners.close()
    assert engine
    assert engine.llama_cpp_python == metadata.version("llama-cpp-python")
    assert re.fullmatch(r"[0-9a-f]{7,40}(-dirty)?|unknown", engine.llama_cpp_commit)
    assert [engine.backends, engine.chat_unavailable] == ask("[llama.backends(), code.available()]")


def test_the_backends_are_those_that_ggml_registers() -> None:
    registered = ask("[ggml.ggml_backend_reg_name(backend).decode() for backend in registered]", REGISTRY)
    assert registered == ask("llama.backends()")


@pytest.mark.parametrize("kind", ["text", "foreign", "unlinked"])
def test_another_library_is_no_chat_code(tmp_path: Path, kind: str) -> None:
    path = tmp_path / LIBRARY
    if kind == "text":
        path.write_text("not a library")
    else:
        code = "int other;" if kind == "foreign" else "int missing(void); int other(void) { return missing(); }"
        subprocess.run(["cc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)], input=code, text=True, check=True)
    with pytest.raises(ChatUnavailable) as unavailable:
        ChatCode(tmp_path)
    assert str(unavailable.value).startswith("libloadstone_chat.so cannot be loaded: ")
    assert str(tmp_path) not in str(unavailable.value)
