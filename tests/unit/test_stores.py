"""Stores of models: their kinds, the names of models in those of other programs, and who may write to them."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.lookup import by_name
from shared.schema.model import Model
from tests.support.headers import write
from tests.support.stores import into_hugging_face, into_ollama
from worker.catalog.catalog import Catalog
from worker.catalog.stores import ID_FILE, ReadOnly, identified, kind, seen, writable

LIBRARY = "registry.ollama.ai/library"


@pytest.fixture
def store(tmp_path: Path) -> Path:
    (tmp_path / "ollama/manifests").mkdir(parents=True)
    (tmp_path / "ollama/blobs").mkdir()
    return tmp_path / "ollama"


def model(tmp_path: Path, name: str = "Some Model", file_type: int = 2) -> Path:
    return write(tmp_path / f"files/{name}.gguf", {"general.name": name, "general.file_type": file_type})


def listed(*roots: Path) -> dict[str, Model]:
    catalog = Catalog(roots, roots[0].parent / "cache")
    catalog.look()
    while catalog.is_shallow:
        catalog.deepen(60)
    return {one.key: one for one in catalog.models()}


def reason(model: Model) -> str:
    assert model.problem is not None
    return model.problem.message


def test_the_kind_of_a_store_is_told_by_its_folders(tmp_path: Path, store: Path) -> None:
    into_hugging_face(tmp_path / "hub", "org/name", "m-Q4_0.gguf", model(tmp_path))
    assert kind(tmp_path / "hub") == "huggingface"
    assert kind(store) == "ollama"
    (tmp_path / "hub/datasets--org--texts").mkdir()
    assert kind(tmp_path / "hub") == "huggingface"
    (tmp_path / "hub/acme").mkdir()
    assert kind(tmp_path / "hub") == "files"
    assert kind(tmp_path / "files") == "files"
    (store / "blobs").rmdir()
    (store / "blobs").write_bytes(b"")
    assert kind(store) == "files"


def test_a_model_of_ollama_is_named_by_name_and_tag(tmp_path: Path, store: Path) -> None:
    for name, file in (
        (f"{LIBRARY}/llama3.2/latest", model(tmp_path)),
        ("registry.ollama.ai/Somebody/Tuned/7b-Q8_0", model(tmp_path, "Tuned", 7)),
        ("hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF/Q4_K_M", model(tmp_path, "One", 15)),
        ("hf.co/bartowski/Llama-3.2-1B-Instruct-GGUF/latest", model(tmp_path, "One", 15)),
    ):
        into_ollama(store, name, model=file, template=file)
    models = listed(store)
    one = models["llama3.2"]
    assert one.full_key == "llama3.2@latest"
    assert (one.display_name, one.quantization, one.publisher) == ("Some Model", "Q4_0", "")
    assert one.shards[0].startswith("blobs/sha256-")
    tuned = models["somebody/tuned"]
    assert (tuned.full_key, tuned.publisher, tuned.quantization) == ("somebody/tuned@7b-q8_0", "Somebody", "Q8_0")
    two = [key for key in models if key.startswith("bartowski")]
    assert two == [f"bartowski/llama-3.2-1b-instruct@{tag}" for tag in ("latest", "q4_k_m")]
    assert by_name([*models.values()])["bartowski/llama-3.2-1b-instruct"].shards == models[two[0]].shards
    assert {one.problem for one in models.values()} == {None}
    assert len(models) == 4


def test_a_model_without_a_name_shows_that_of_ollama(tmp_path: Path, store: Path) -> None:
    into_ollama(store, f"{LIBRARY}/Tiny/1b", model=model(tmp_path, ""))
    assert listed(store)["tiny"].display_name == "Tiny:1b"


def test_a_projector_of_ollama_is_for_its_own_tag_only(tmp_path: Path, store: Path) -> None:
    projector = write(tmp_path / "files/p.gguf", {"general.architecture": "clip", "clip.has_vision_encoder": True})
    into_ollama(store, f"{LIBRARY}/gemma/4b", model=model(tmp_path), projector=projector)
    into_ollama(store, f"{LIBRARY}/gemma/1b", model=model(tmp_path, "Other", 7))
    assert {key: one.vision for key, one in listed(store).items()} == {"gemma@1b": False, "gemma@4b": True}


def test_what_ollama_has_and_no_engine_loads_has_a_reason(tmp_path: Path, store: Path) -> None:
    file = model(tmp_path)
    into_ollama(store, f"{LIBRARY}/adapted/1b", model=file, adapter=file)
    into_ollama(store, f"{LIBRARY}/cloud/latest", license=file)
    into_ollama(store, f"{LIBRARY}/broken/latest", model=file).write_bytes(b'{"layers": 1}')
    into_ollama(store, f"{LIBRARY}/escaping/latest", model=file).write_text(
        '{"layers": [{"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../files/m"}]}'
    )
    into_ollama(store, f"{LIBRARY}/text/latest", model=_text(tmp_path))
    assert {key: reason(one) for key, one in listed(store).items()} == {
        "adapted": "adapted:1b has a LoRA adapter, which is not supported",
        "cloud": "cloud:latest has no GGUF file",
        "broken": "broken:latest has a manifest that cannot be read",
        "escaping": "escaping:latest has a manifest that cannot be read",
        "text": "text:latest does not start with 'GGUF': it is not a GGUF file, or it is damaged",
    }


def _text(tmp_path: Path) -> Path:
    (tmp_path / "files/text").write_text("text")
    return tmp_path / "files/text"


def test_a_model_of_ollama_without_its_file_is_a_problem(tmp_path: Path, store: Path) -> None:
    into_ollama(store, f"{LIBRARY}/m/latest", model=model(tmp_path))
    (blob,) = (store / "blobs").iterdir()
    blob.unlink()
    assert reason(listed(store)["m"]) == "m:latest cannot be read: No such file or directory"


def test_a_link_out_of_a_store_of_ollama_is_refused(tmp_path: Path, store: Path) -> None:
    into_ollama(store, f"{LIBRARY}/m/latest", model=model(tmp_path))
    (blob,) = (store / "blobs").iterdir()
    blob.rename(tmp_path / "elsewhere")
    blob.symlink_to(tmp_path / "elsewhere")
    assert reason(listed(store)["m"]) == "m:latest is a symbolic link to a path outside the models directory"
    (store / "manifests").rename(tmp_path / "manifests")
    (store / "manifests").symlink_to(tmp_path / "manifests")
    assert [reason(one) for one in listed(store).values()] == [
        "manifests is a symbolic link to a path outside the models directory"
    ]


def test_what_is_no_manifest_is_no_model(tmp_path: Path, store: Path) -> None:
    manifest = into_ollama(store, f"{LIBRARY}/m/latest", model=model(tmp_path))
    (store / "manifests/stray").write_bytes(b"")
    (manifest.parent / ".DS_Store").write_bytes(b"")
    (manifest.parent / "folder").mkdir()
    (manifest.parent / "link").symlink_to("latest")
    os.mkfifo(manifest.parent / "fifo")
    manifest.with_name(os.fsdecode(b"\xff")).write_bytes(b"")
    (manifest.parents[1] / "linked").symlink_to(manifest.parent)
    assert [*listed(store)] == ["m"]


def test_the_same_model_in_two_stores_is_that_of_the_first(tmp_path: Path, store: Path) -> None:
    name, file = "Llama-3.2-1B-Instruct", model(tmp_path)
    files = tmp_path / "models"
    write(files / f"bartowski/{name}-GGUF/{name}-Q4_K_M.gguf")
    hub = tmp_path / "hub"
    into_hugging_face(hub, f"bartowski/{name}-GGUF", f"{name}-Q4_K_M.gguf", file)
    into_hugging_face(hub, f"bartowski/{name}-GGUF", f"{name}-Q8_0.gguf", file)
    into_ollama(store, f"hf.co/bartowski/{name}-GGUF/Q4_K_M", model=file)
    into_ollama(store, f"hf.co/bartowski/{name}-GGUF/Q8_0", model=file)
    into_ollama(store, f"hf.co/bartowski/{name}-GGUF/IQ2_M", model=file)
    found = {key.partition("@")[2]: one.root for key, one in listed(files, hub, store).items()}
    assert found == {"q4_k_m": 0, "q8_0": 1, "iq2_m": 2}


# ---- who may write


def test_a_store_has_the_same_id_for_all_who_see_it(tmp_path: Path) -> None:
    (tmp_path / "models").mkdir()
    (tmp_path / "elsewhere").symlink_to("models")
    first, second = seen(tmp_path / "models"), seen(tmp_path / "elsewhere")
    assert (first.id, first.is_read_only) == ("", False)
    with ThreadPoolExecutor(8) as pool:
        ids = {store.id for store in pool.map(identified, [first, second] * 8)}
    assert ids == {seen(tmp_path / "models").id}
    assert len(ids.pop()) == 32
    assert os.listdir(tmp_path / "models") == [ID_FILE]
    assert listed(tmp_path / "models") == {}


def test_a_damaged_id_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ID_FILE).write_bytes(b"")
    assert seen(tmp_path).id == ""
    assert identified(seen(tmp_path)).id == seen(tmp_path).id != ""


def test_the_first_directory_that_may_be_written_to_is_used(tmp_path: Path, store: Path) -> None:
    into_hugging_face(tmp_path / "hub", "org/name", "m-Q4_0.gguf", model(tmp_path))
    foreign = [tmp_path / "hub", store, tmp_path / "missing"]
    for name in ("models", "others"):
        (tmp_path / name).mkdir()
    chosen = writable([*foreign, tmp_path / "models", tmp_path / "others"])
    assert (chosen.path, chosen.id) == (tmp_path / "models", seen(tmp_path / "models").id)
    with pytest.raises(ReadOnly) as caught:
        writable(foreign)
    assert str(caught.value) == (
        "No models directory may be written to (1: it is a cache of Hugging Face, which is only read; "
        "2: it is a store of Ollama, which is only read; 3: it cannot be read: No such file or directory)."
    )
    assert [*(tmp_path / "hub").glob(f"{ID_FILE}*")] == []


def test_a_directory_without_permission_is_read_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a mock, the test would depend on its user: root may write everywhere."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert seen(tmp_path).refusal == "is not writable for the worker"
