"""Rules for the repository: pins, the compose file, the documents, forbidden text, and names of tests."""

from __future__ import annotations

import ast
import re
import subprocess
import tomllib
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"(?P<name>[A-Za-z0-9._-]+)==(?P<version>[0-9][A-Za-z0-9.!+]*)")
REGISTRY_HOST = re.compile(r"\b(pypi|pythonhosted|anaconda|conda|jfrog)\.(org|com|io)\b|--(extra-)?index-url", re.I)
TOOLS_OF_AN_ENVIRONMENT = {"pip", "setuptools", "wheel"}
README_LINES = 150
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
HISTORY = "CHANGELOG.md"  # names files as they were
CODE, FENCED = re.compile(r"`([^`\n]+)`"), re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
LINK, HEADING = re.compile(r"\]\(([^)\s]+)\)"), re.compile(r"^#+ (.+)$", re.MULTILINE)
PATH = re.compile(r"\.?\w[\w.-]*(/[\w.*-]+)*/?")
SUFFIXES = (".py", ".md", ".lua", ".toml", ".yml", ".yaml", ".txt", ".png", ".html")
MADE = ("bench/out", "models.toml")  # by programs or operators, and not in git


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    matches = (PIN.fullmatch(line) for line in (ROOT / "constraints.txt").read_text().splitlines())
    return {normal(pin["name"]): pin["version"] for pin in matches if pin}


def requirements(name: str, extras: set[str]) -> set[str]:
    """Return the names of the installed distributions that a distribution requires, directly or indirectly."""
    seen: set[str] = set()
    queue = [name]
    while queue:
        current = queue.pop()
        for text in metadata.requires(current) or []:
            required, marker = re.match(r"[A-Za-z0-9._-]+", text), text.partition(";")[2]
            assert required
            extra = re.search(r"extra == ['\"]([^'\"]+)", marker)
            is_selected = not extra or (current == name and extra[1] in extras)
            dependency = normal(required[0])
            if is_selected and dependency not in seen and is_installed(dependency):
                seen.add(dependency)
                queue.append(dependency)
    return seen


def is_installed(name: str) -> bool:
    try:
        metadata.distribution(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def files() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    return [ROOT / name for name in listed.stdout.decode().split("\0") if name and (ROOT / name).is_file()]


def test_constraints_are_pins_only() -> None:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    assert [line for line in lines if not PIN.fullmatch(line)] == []
    assert len(pins()) == len(lines), "a distribution is pinned twice"


def test_constraints_pin_every_dependency() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    direct = project["dependencies"] + [name for extra in project["optional-dependencies"].values() for name in extra]
    names = {normal(re.split(r"[^A-Za-z0-9._-]", text)[0]) for text in direct}
    names |= requirements("loadstone", set(project["optional-dependencies"]))
    assert names - set(pins()) - TOOLS_OF_AN_ENVIRONMENT == set()


def test_a_version_in_pyproject_equals_its_pin() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        exact = [match for text in tomllib.load(file)["project"]["dependencies"] if (match := PIN.fullmatch(text))]
    assert exact
    assert [match[0] for match in exact if pins()[normal(match["name"])] != match["version"]] == []


def test_no_file_names_a_registry_host() -> None:
    mentions = []
    for file in files():
        if file == Path(__file__):
            continue
        text = file.read_bytes().decode("utf-8", "ignore")
        mentions += [f"{file.relative_to(ROOT)}: {match[0]}" for match in REGISTRY_HOST.finditer(text)]
    assert mentions == []


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
    return content


def test_only_the_api_is_published_and_only_on_loopback(compose: dict[str, Any]) -> None:
    published = {name: service["ports"] for name, service in compose["services"].items() if "ports" in service}
    assert published == {"api": ["127.0.0.1:1234:1234"]}


def test_workers_can_be_scaled(compose: dict[str, Any]) -> None:
    for name in ("worker", "worker-gpu", "worker-gpu-0", "worker-gpu-1"):
        service = compose["services"][name]
        assert not {"container_name", "hostname", "ports"} & set(service)
        locks, models, data = service["volumes"]
        assert locks == f"locks:{service['environment']['LOADSTONE_LOCK_DIR']}", (
            "one lock directory for all workers of a host"
        )
        assert models["read_only"]
        assert data == "/data", "an anonymous volume per container"
        assert service["init"]
        assert service["environment"]["LOADSTONE_WORKER_LISTEN"].startswith("0.0.0.0:"), (
            "the API is in another container"
        )


def test_every_service_has_the_grace_time_of_the_program(compose: dict[str, Any]) -> None:
    from cli import up
    from shared.settings import Settings

    grace = {name: float(s.get("stop_grace_period", "10s").rstrip("s")) for name, s in compose["services"].items()}
    drain_s = Settings().drain_s
    assert grace["api"] > drain_s + up.API_GRACE_S
    assert grace["worker"] > drain_s + up.LONE_WORKER_GRACE_S
    assert grace["worker-gpu"] > drain_s + up.LONE_WORKER_GRACE_S


def test_the_services_are_built_from_stages_that_exist(compose: dict[str, Any]) -> None:
    stages = re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    targets = {service["build"]["target"] for service in compose["services"].values() if "build" in service}
    assert targets == {"cpu", "cuda"}
    assert targets <= set(stages)


def test_secrets_are_in_no_commit_and_no_image(compose: dict[str, Any]) -> None:
    file = compose["secrets"]["api_tokens"]["file"].removeprefix("./")
    ignored = subprocess.run(["git", "check-ignore", "--quiet", file], cwd=ROOT, check=False)
    assert ignored.returncode == 0, f"{file} is not in .gitignore"
    allowed = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")]
    assert "*" in (ROOT / ".dockerignore").read_text().splitlines()
    assert not any("secrets" in line for line in allowed)


def test_make_and_ci_run_the_same_commands() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert {"setup", "run", "test", "check", "bench"} <= targets
    assert re.findall(r"^make (\S+)$", (ROOT / ".ci/run").read_text(), re.MULTILINE) == [
        "check",
        "test",
        "test-quality",
        "test-clients",
    ]


def name_of(document: Path) -> str:
    return document.relative_to(ROOT).as_posix()


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text("utf-8").splitlines()) <= README_LINES


def named_files(text: str) -> set[str]:
    """Return what looks like a file or a directory of the repository, among the code within a document's lines."""
    rooms = {path.name for path in ROOT.iterdir() if path.is_dir() and path.name not in {".git", ".venv", ".run"}}
    paths = {code for code in CODE.findall(FENCED.sub("", text)) if PATH.fullmatch(code)}
    paths = {path for path in paths if ("/" in path and path.split("/")[0] in rooms) or path.endswith(SUFFIXES)}
    return {path for path in paths if not path.startswith(MADE)}


def test_files_are_found_among_a_documents_code() -> None:
    text = (
        "`api/app.py` `/docs` `publisher/name` `docs/gone.md` `bench/out` `gone.toml` `shared/`\n```\n`cli/x.py`\n```"
    )
    assert named_files(text) == {"api/app.py", "docs/gone.md", "gone.toml", "shared/"}


@pytest.mark.parametrize("document", [each for each in DOCUMENTS if each.name != HISTORY], ids=name_of)
def test_the_files_that_a_document_names_exist(document: Path) -> None:
    assert [path for path in sorted(named_files(document.read_text("utf-8"))) if not [*ROOT.glob(path)]] == []


def anchors(document: Path) -> set[str]:
    """Return the anchors of a document's headings, as forges make them."""
    headings = HEADING.findall(FENCED.sub("", document.read_text("utf-8")))
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_the_links_of_a_document_lead_somewhere(document: Path) -> None:
    broken = []
    for link in LINK.findall(FENCED.sub("", document.read_text("utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_the_house_in_design_is_the_one_that_stands() -> None:
    text = (ROOT / "DESIGN.md").read_text("utf-8")
    section = text.partition("\n## The house\n")[2].partition("\n## ")[0]
    described: dict[str, set[str]] = {}
    room = ""
    for directory, names in re.findall(r"^\| (?:`([\w/]+)/`)? ?\| ([\w, ]+) \|", section, re.MULTILINE):
        room = directory or room
        described.setdefault(room, set()).update(names.split(", "))
    packages = [package for top in ("api", "worker", "shared", "cli") for package in (ROOT / top).rglob("__init__.py")]
    standing = {
        name_of(package.parent): {file.stem for file in package.parent.glob("[!_]*.py")} for package in packages
    }
    assert described == standing


def test_every_decision_has_its_context_and_its_price() -> None:
    records = sorted((ROOT / "docs/decisions").glob("[0-9]*.md"))
    listed = LINK.findall((ROOT / "docs/decisions/README.md").read_text("utf-8"))
    assert [record.name for record in records] == [link for link in listed if link[0].isdigit()]
    for number, record in enumerate(records, 1):
        text = record.read_text("utf-8")
        assert record.name.startswith(f"{number:04}-")
        assert text.startswith(f"# {number:04}. ")
        assert re.findall(r"^## (.+)$", text, re.MULTILINE) == ["Context", "Decision", "Price"], record.name


def test_the_project_has_a_licence_and_says_which() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        project = tomllib.load(file)["project"]
    text = (ROOT / "LICENSE").read_text("utf-8")
    assert project["license"] == "Apache-2.0"
    assert project["license-files"] == ["LICENSE"]
    assert "Apache License\n                           Version 2.0, January 2004\n" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "!LICENSE" in (ROOT / ".dockerignore").read_text().splitlines(), "an image is built with it"


def test_every_package_tells_that_it_is_typed() -> None:
    with (ROOT / "pyproject.toml").open("rb") as file:
        packages = tomllib.load(file)["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert packages
    assert [package for package in packages if not (ROOT / package / "py.typed").is_file()] == []


def test_a_forge_runs_what_must_pass() -> None:
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    (job,) = workflow["jobs"].values()
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    assert job["strategy"]["matrix"]["python"][0] == "3.11", "the oldest that pyproject.toml allows"


LONGEST_TEST_NAME = 60


def test_names_of_tests_have_at_most_60_characters() -> None:
    names = [
        (len(node.name), f"{file.relative_to(ROOT)}: {node.name}")
        for file in sorted((ROOT / "tests").rglob("test_*.py"))
        for node in ast.walk(ast.parse(file.read_text("utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_")
    ]
    assert len(names) > 500
    assert [name for length, name in names if length > LONGEST_TEST_NAME] == []
