"""The programs that use the engine, benchmarks and runners: what they import, in which order."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAMS = [path for path in sorted((ROOT / "bench").rglob("*.py")) if "__main__" in path.read_text("utf-8")]
MODULES = [".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PROGRAMS] + ["worker.engine.child"]
ORDER = """
import importlib, sys
importlib.import_module(sys.argv[1])
loaded = [name for name in sys.modules if name in ("llama_cpp.llama_cpp", "numpy")]
print(*loaded)
"""


# libstdc++, which numpy brings, crashes an engine that has symbols of it in its own libraries, unless it comes later.
@pytest.mark.parametrize("module", MODULES)
def test_the_engine_is_imported_before_numpy(module: str) -> None:
    done = subprocess.run([sys.executable, "-c", ORDER, module], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() in ([], ["numpy"], ["llama_cpp.llama_cpp", "numpy"])
