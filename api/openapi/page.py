"""Renders the OpenAPI document as an HTML page."""

from __future__ import annotations

from typing import Any

import msgspec
from jinja2 import Environment, PackageLoader, StrictUndefined

METHODS = ("get", "post", "delete")
BASE_URL = "http://localhost:1234"


def page(document: dict[str, Any]) -> str:
    """Return a self-contained HTML page, without scripts, fonts or images."""
    environment = Environment(
        loader=PackageLoader("api.openapi"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    operations = [
        {"method": method.upper(), "path": path, "curl": curl(document, path, method, item[method]), **item[method]}
        for path, item in document["paths"].items()
        for method in METHODS
        if method in item
    ]
    return environment.get_template("docs.html").render(document=document, operations=operations)


def curl(document: dict[str, Any], path: str, method: str, operation: dict[str, Any]) -> str:
    """Return a curl command that calls an operation."""
    words = [
        f"curl {BASE_URL}{path.format(job_id='load_0d4f', model_id='openai/gpt-oss-20b', response_id='resp_0d4f')}"
    ]
    if method not in ("get", "post"):
        words.append(f"-X {method.upper()}")
    if [*operation["responses"]["200"]["content"]] == ["text/event-stream"]:
        words.append("--no-buffer")
    if operation["security"]:
        words.append('-H "Authorization: Bearer $TOKEN"')
    for content in operation.get("requestBody", {}).get("content", {}).values():
        kind = content["schema"]["$ref"].rpartition("/")[2]
        example = msgspec.json.encode(document["components"]["schemas"][kind]["examples"][0]).decode()
        words += ["-H 'Content-Type: application/json'", f"-d '{example}'"]
    return " \\\n  ".join(words)
