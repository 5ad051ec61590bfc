"""Names of repositories of a hub of models, as clients write them."""

from __future__ import annotations

import re
from typing import NamedTuple

_PART = r"[A-Za-z0-9][A-Za-z0-9._-]{0,95}"
_FILE = r"(?P<file>[^?#]+\.gguf)"
NAME = re.compile(rf"{_PART}/{_PART}")
FORMS = (
    re.compile(rf"(hf://)?(?P<name>{_PART}/{_PART})(@(?P<quantization>[^/@]+))?"),
    re.compile(rf"hf://(?P<name>{_PART}/{_PART})/{_FILE}", re.IGNORECASE),
    re.compile(
        rf"https://(huggingface\.co|hf\.co)/(?P<name>{_PART}/{_PART})"
        rf"(/|(/tree/[^/?#]+/?)|/(blob|resolve)/[^/?#]+/{_FILE}(\?download=true)?)?",
        re.IGNORECASE,
    ),
)


class Repository(NamedTuple):
    name: str  # "publisher/name"
    quantization: str | None = None  # or the path of its file


def parsed(text: str) -> Repository | None:
    """Return the repository that a client means: `publisher/name`, `publisher/name@quantization`, the same after
    `hf://`, `hf://publisher/name/file.gguf`, or the address of its page or of a file there.  None if it is none."""
    for form in FORMS:
        if (found := form.fullmatch(text)) is not None:
            named = found.groupdict()
            return Repository(named["name"], named.get("quantization") or named.get("file"))
    return None
