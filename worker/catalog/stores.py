"""The directories of models: their kinds, by what is in them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from worker.catalog import ollama
from worker.catalog.keys import REPOSITORY

Kind = Literal["files", "huggingface", "ollama"]


def kind(root: Path) -> Kind:
    """Return the kind of a directory of models.  Raises OSError if it cannot be listed."""
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir()}
    if {ollama.MANIFESTS, ollama.BLOBS} <= folders:
        return "ollama"
    return "huggingface" if any(REPOSITORY.fullmatch(folder) for folder in folders) else "files"
