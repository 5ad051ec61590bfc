"""The model of an instance: the one of its files, whatever its key is now; and names as clients spell them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from shared.instance import Instance
from shared.lookup import folded, is_variant, of_instance, similar, spelled, spellings
from shared.schema.http import LoadRequest
from shared.schema.model import Dimensions, FileStat, Model

OLD = Model(
    key="p/m",
    base="p/m",
    variant="q4_k_m",
    shards=["p/m/a-00001-of-00002.gguf", "p/m/a-00002-of-00002.gguf"],
    files=[FileStat(10, 1, 101), FileStat(20, 1, 102)],
    architecture="llama",
    display_name="M",
    max_context_length=4096,
    bits_per_weight=4.9,
)

SHAPE = Dimensions(block_count=2, embedding_length=64, head_count=2, head_count_kv=2, key_length=32, value_length=32)


def changed(**fields: Any) -> Model:
    return msgspec.structs.replace(OLD, **fields)


def instance(source: Model | None = OLD) -> Instance:
    request = LoadRequest(model="p/m")
    return Instance(
        id="load_1",
        model="p/m",
        key="p/m",
        source=None if source is None else source.source,
        type="llm",
        worker="w",
        request=request,
    )


def found(*models: Model, source: Model | None = OLD) -> Model | None:
    return of_instance({model.key: model for model in models}, instance(source))


OTHER = changed(shards=["p/m/b.gguf"], files=[FileStat(30, 1, 103)])
LATER = [stat._replace(mtime_ns=2, inode=stat.inode + 100) for stat in OLD.files]


@pytest.mark.parametrize(
    "now",
    [
        OLD,
        changed(key="p/m@q4_k_m"),
        changed(bits_per_weight=None),
        changed(key="q/n", base="q/n", shards=["q/n/x-00001-of-00002.gguf", "q/n/x-00002-of-00002.gguf"]),  # moved
        changed(files=LATER),  # copied or downloaded again
        changed(key="p/m@q4_k_m", files=LATER),
        changed(root=1),
        changed(root=1, files=LATER, shards=["hub/a.gguf", "hub/b.gguf"]),  # the same model in another directory
    ],
)
def test_an_instance_belongs_to_its_files(now: Model) -> None:
    if now.key != OLD.key:
        assert found(now, OTHER) is now, "its key belongs to other files now"
    assert found(now, changed(key="z", shards=["z"], files=OTHER.files)) is now


@pytest.mark.parametrize(
    "other",
    [
        OTHER,
        changed(files=[FileStat(10, 2, 101), FileStat(21, 1, 102)]),  # of another size
        changed(files=LATER, max_context_length=512),  # of another header
        changed(files=LATER, display_name="N"),
        changed(files=LATER, shards=["q/n/a.gguf", "q/n/b.gguf"]),  # a model of the same sizes
        changed(files=OLD.files[:1], shards=OLD.shards[:1]),
        changed(root=1, base="q/n", files=LATER, shards=["hub/a.gguf", "hub/b.gguf"]),  # another model there
        changed(root=1, variant="q8_0", files=LATER, shards=["hub/a.gguf", "hub/b.gguf"]),
    ],
)
def test_an_instance_never_belongs_to_other_files(other: Model) -> None:
    assert found(other) is None
    assert found(msgspec.structs.replace(other, key="p/m@q8_0")) is None


def test_the_path_comes_first_then_a_link_then_a_copy() -> None:
    linked, copied = changed(key="a", shards=["x", "y"]), changed(key="b", files=LATER)
    assert found(linked, copied, changed(key="c")) == changed(key="c")
    assert found(copied, linked) is linked


def test_a_record_of_an_older_version_has_only_its_key() -> None:
    assert found(OTHER, source=None) is OTHER
    assert found(changed(key="p/m@q4_k_m"), source=None) is None
    assert found(OTHER, source=changed(files=[])) is OTHER


# ---- names as clients spell them


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("P/M", "p/m"),
        ("p/m-gguf", "p/m"),
        ("P/M-GGUF@Q4_K_M", "p/m@q4_k_m"),
        ("P/Stem@A-GGUF", "p/stem@a-gguf"),
        ("BARE-gguf", "bare-gguf"),  # the stem of a file keeps its name
        ("bare", "bare"),
        ("Other", "other-gguf"),
        ("p/m@q8_0", None),
        ("p/m-gguf-2", None),
        ("", None),
    ],
)
def test_a_name_is_known_in_any_case_and_with_gguf(spelling: str, name: str | None) -> None:
    known = ["p/m", "p/m@q4_k_m", "p/stem@a-gguf", "bare", "bare-gguf", "other-gguf"]
    assert spelled(spellings(known), spelling) == name


def test_the_number_of_an_instance_may_follow_gguf() -> None:
    assert [folded(name) for name in ("P/M-GGUF:2", "p/m-gguf:x", "p/m:2")] == ["p/m:2", "p/m-gguf:x", "p/m:2"]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("q/lama-3-8b", ["p/llama-3-8b", "q/llama-3-8b"]),
        ("llama-3", ["p/llama-3-8b", "q/llama-3-8b"]),
        ("P/Llama-3-8B-GGUF@q5_k_m", ["p/llama-3-8b@q4_k_m"]),
        ("p/other", []),
    ],
)
def test_names_are_similar_whatever_their_publisher(name: str, expected: list[str]) -> None:
    assert similar(name, ["p/llama-3-8b", "p/llama-3-8b@q4_k_m", "q/llama-3-8b", "p/mistral"]) == expected


def test_a_name_is_similar_to_at_most_three_others() -> None:
    names = [f"p/model-{n}" for n in range(9)]
    counts = {name: len(similar(name, names)) for name in ("model", "p/model-x", "p/mo", "", "z" * 200, "other")}
    assert counts == {"model": 3, "p/model-x": 3, "p/mo": 0, "": 0, "z" * 200: 0, "other": 0}


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"quantization": "Q8_0", "max_context_length": 1024, "display_name": "N"}, True),
        ({"architecture": "qwen3"}, False),
        ({"type": "embedding"}, False),
        ({"dimensions": Dimensions(**{**msgspec.structs.asdict(SHAPE), "block_count": 9})}, False),
        ({"architecture": "qwen3", "variant": ""}, True),  # only the plain key means it
    ],
)
def test_only_quantizations_of_one_model_are_variants(fields: dict[str, Any], expected: bool) -> None:
    assert is_variant(changed(**{"dimensions": SHAPE, **fields}), changed(dimensions=SHAPE)) is expected
