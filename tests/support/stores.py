"""Stores of models as other programs write them."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path


def into_hugging_face(hub: Path, repository: str, name: str, file: Path) -> Path:
    """Put a copy of a file into the cache of Hugging Face as huggingface_hub 2.4.0 does.  Returns its path there."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    link = folder / "snapshots" / (40 * "a") / name
    blob = _blob(folder / "blobs", "", file)
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    (folder / "refs").mkdir(exist_ok=True)
    (folder / "refs/main").write_text(40 * "a")
    (hub / ".locks" / folder.name).mkdir(parents=True, exist_ok=True)
    (folder / "trees").mkdir(exist_ok=True)
    (folder / "trees" / f"{40 * 'a'}.json").write_text("{}")
    return link


def into_ollama(store: Path, name: str, **layers: Path) -> Path:
    """Put copies of files into a store of Ollama, under a name such as `registry.ollama.ai/library/tiny/latest`.

    `layers`: the files by their types, such as `model`.  Returns the manifest.
    """
    described = [
        {
            "mediaType": f"application/vnd.ollama.image.{kind}",
            "digest": _blob(store / "blobs", "sha256-", file).name.replace("-", ":"),
            "size": file.stat().st_size,
        }
        for kind, file in layers.items()
    ]
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.docker.distribution.manifest.v2+json",
        "config": {
            "mediaType": "application/vnd.docker.container.image.v1+json",
            "digest": f"sha256:{64 * '0'}",
            "size": 1,
        },
        "layers": described,
    }
    manifest.write_text(json.dumps(content))
    return manifest


def _blob(folder: Path, prefix: str, file: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with file.open("rb") as content:
        blob = folder / (prefix + hashlib.file_digest(content, "sha256").hexdigest())
    shutil.copyfile(file, blob)
    return blob
