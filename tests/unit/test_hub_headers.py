"""Models of which only the headers are read, piece by piece."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec import structs

from shared.schema.model import Model
from shared.synthetic import models as synthetic
from tests.support.headers import header, vocabulary, write
from worker.catalog.catalog import Catalog
from worker.hub import headers
from worker.hub.choice import RemoteFile
from worker.hub.headers import STEPS, found


class Repository:
    """The files of a folder as a repository, with what was read of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.read_bytes = folder, 0
        self.files = [RemoteFile(path.name, path.stat().st_size) for path in sorted(folder.iterdir())]

    def read(self, file: RemoteFile, start: int, end: int) -> bytes:
        assert 0 <= start < end <= file.size
        self.read_bytes += end - start
        return (self.folder / file.path).read_bytes()[start:end]

    def described(self) -> Model:
        return found("Acme/Tiny-GGUF", self.files, self.read).model


def local(root: Path) -> Model:
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    while catalog.is_shallow:
        catalog.deepen(60)
    (model,) = catalog.models()
    return model


def test_a_remote_model_is_described_as_a_local_one(tmp_path: Path) -> None:
    folder = tmp_path / "models/Acme/Tiny-GGUF"
    synthetic.sharded(folder / "tiny-F16.gguf", 3)
    repository = Repository(folder)
    model = repository.described()
    assert model == structs.replace(local(tmp_path / "models"), files=model.files)
    assert (model.key, model.weights is not None, model.problem) == ("acme/tiny", True, None)
    assert [file.size for file in model.files] == [file.size for file in repository.files]


def test_only_headers_are_read(tmp_path: Path) -> None:
    path = write(tmp_path / "models/acme/tiny/tiny-Q8_0.gguf", vocabulary(100_000))
    with path.open("r+b") as file:
        file.truncate(1 << 30)
    repository = Repository(path.parent)
    repository.folder = tmp_path / "head"
    with path.open("rb") as file:
        (tmp_path / "head").mkdir()
        (tmp_path / "head/tiny-Q8_0.gguf").write_bytes(file.read(STEPS[1]))
    model = repository.described()
    assert (model.problem, model.size_bytes) == (None, 1 << 30)
    assert repository.read_bytes == STEPS[1], "no byte is read twice"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"<!doctype html>", "tiny.gguf is a web page, probably an error page saved as a download"),
        (header(vocabulary(50_000)), "tiny.gguf has a header that is too long for an estimate"),
        (header()[:100], "tiny.gguf ends within its header: it is damaged, or its download is incomplete"),
    ],
    ids=["no GGUF", "too long", "cut"],
)
def test_a_file_that_cannot_be_loaded_has_a_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, reason: str
) -> None:
    monkeypatch.setattr(headers, "MOST_BYTES", 256 << 10)
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository/tiny.gguf").write_bytes(content)
    problem = Repository(tmp_path / "repository").described().problem
    assert problem is not None
    assert problem.message == reason
