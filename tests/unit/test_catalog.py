"""The catalog: the models of a directory, their keys, and the problems of files that are not models."""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared.lookup import by_name
from shared.quantization import tag
from shared.schema.http import LoadRequest
from shared.schema.model import Dimensions, Model, Problem, Weights
from shared.settings import Settings
from tests.support.headers import LLAMA, WEIGHTS, Value, header, vocabulary, write
from worker.catalog import keys
from worker.catalog.catalog import Catalog
from worker.catalog.keys import Place
from worker.catalog.modelfile import abbreviated
from worker.runner.parameters import plan

Look = Callable[[], dict[str, Model]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    path = tmp_path / "models"
    path.mkdir()
    return path


def everything(root: Path) -> Catalog:
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    while catalog.is_shallow:
        catalog.deepen(60)
    return catalog


@pytest.fixture
def look(root: Path) -> Look:
    """Return the models by key, with all headers read to the end."""
    return lambda: {model.key: model for model in everything(root).models()}


def problem(model: Model) -> str:
    assert model.problem is not None
    assert model.problem.code == "invalid_model_file"
    return model.problem.message


# ---- keys


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("Qwen/Qwen3-0.6B-GGUF/Qwen3-0.6B-Q8_0.gguf", "qwen/qwen3-0.6b"),
        ("lmstudio-community/gpt-oss-20b/any name.gguf", "lmstudio-community/gpt-oss-20b"),
        ("a/b/Pub/Name-GGUF/f.gguf", "pub/name"),
        ("Name-gguf/f.gguf", "name"),
        ("My-Model-Q4_K_M.gguf", "my-model-q4_k_m"),
        ("pub/name/UPPER.GGUF", "pub/name"),
        ("pub/-gguf/f.gguf", "pub/-gguf"),
    ],
)
def test_the_key_comes_from_the_last_two_folders(root: Path, look: Look, path: str, key: str) -> None:
    write(root / path)
    assert list(look()) == [key]


def test_quantizations_in_a_folder_differ_by_their_tags(root: Path, look: Look) -> None:
    for name in ("m-Q4_K_M.gguf", "m-UD-Q4_K_XL.gguf", "m-IQ2_XXS.gguf", "m-bf16.gguf", "notes.gguf"):
        write(root / "pub/M-GGUF" / name)
    assert sorted(look()) == ["pub/m@bf16", "pub/m@iq2_xxs", "pub/m@notes", "pub/m@q4_k_m", "pub/m@ud-q4_k_xl"]


def test_files_of_one_quantization_differ_by_their_stems(root: Path, look: Look) -> None:
    for name in ("M-Q8_0.gguf", "M.i1-Q8_0.gguf", "M-Q4_0.gguf"):
        write(root / "pub/m" / name)
    assert sorted(look()) == ["pub/m@m-q8_0", "pub/m@m.i1-q8_0", "pub/m@q4_0"]


QUANTIZED = ("Q4_K_M", "UD-Q2_K_XL")


def test_similar_folders_give_a_key_to_each_file(root: Path, look: Look) -> None:
    write(root / "Pub/M-GGUF/f.gguf")
    write(root / "pub/m/f.gguf")
    write(root / "x/pub/m/g-f16.gguf")
    models = look()
    assert sorted(models) == ["pub/m@f", "pub/m@f-2", "pub/m@f16"]
    assert models["pub/m@f"].shards == ["Pub/M-GGUF/f.gguf"]


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (
            [f"unsloth/Big-R1-GGUF/{q}/Big-R1-{q}-0000{n}-of-00002.gguf" for q in QUANTIZED for n in (1, 2)],
            ["unsloth/big-r1@q4_k_m", "unsloth/big-r1@ud-q2_k_xl"],
        ),
        (
            [f"unsloth/Big-R1/{q}/part-0000{n}-of-00002.gguf" for q in QUANTIZED for n in (1, 2)],
            ["unsloth/big-r1@q4_k_m", "unsloth/big-r1@ud-q2_k_xl"],
        ),
        (
            ["bart/L-70B-GGUF/L-70B-Q8_0/L-70B-Q8_0-00001-of-00001.gguf", "bart/L-70B-GGUF/L-70B-Q4_K_M.gguf"],
            ["bart/l-70b@q4_k_m", "bart/l-70b@q8_0"],
        ),
        (
            ["ub/K2-GGUF/smol-IQ2_KS/K2-smol-IQ2_KS.gguf", "ub/K2-GGUF/IQ4_KS/K2-IQ4_KS.gguf"],
            ["ub/k2@iq2_ks", "ub/k2@iq4_ks"],
        ),
        (["p/M-GGUF/UD-Q2_K_XL/m-Q2_K_XL.gguf", "p/M-GGUF/Q2_K_XL/m-Q2_K_XL.gguf"], ["p/m@q2_k_xl", "p/m@ud-q2_k_xl"]),
        (["p/m/m-Q8_0/f.gguf"], ["p/m"]),
        (["M-GGUF/BF16/f.gguf", "M-GGUF/f-Q8_0.gguf"], ["m@bf16", "m@q8_0"]),
        (["pub/M-Q8_0/f.gguf"], ["pub/m-q8_0"]),
        (["x/pub/M-Q8_0/f.gguf"], ["pub/m-q8_0"]),
        (["Q8_0/f.gguf"], ["q8_0"]),
    ],
)
def test_a_folder_for_one_quantization_names_no_model(
    root: Path, look: Look, paths: list[str], expected: list[str]
) -> None:
    for path in paths:
        write(root / path, {"split.count": 2} if "-of-00002" in path else {})
    models = look()
    assert {model.problem for model in models.values()} == {None}
    assert sorted(models) == expected


def test_a_projector_beside_quantization_folders_is_found(root: Path, look: Look) -> None:
    for quantized in QUANTIZED:
        write(root / f"unsloth/Big-R1-GGUF/{quantized}/Big-R1-{quantized}.gguf")
    write(root / "unsloth/Big-R1-GGUF/mmproj-F16.gguf", {"general.type": "mmproj"})
    assert {(model.publisher, model.vision) for model in look().values()} == {("unsloth", True)}


# ---- the cache of Hugging Face

MAIN, OLD = 40 * "a", 40 * "b"


def cached(hub: Path, repository: str, revision: str, name: str, **metadata: Value) -> Path:
    """Write a file as `hf download` does: a blob, and a link to it in a revision."""
    folder = hub / f"models--{repository.replace('/', '--')}"
    blob = write(folder / f"blobs/{revision[:4]}-{name.replace('/', '-').removesuffix('.gguf')}", {**metadata})
    link = folder / "snapshots" / revision / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(os.path.relpath(blob, link.parent))
    return folder


@pytest.mark.parametrize("where", ["", "huggingface/hub"])
def test_a_file_in_hugging_faces_cache_has_its_repositorys_key(root: Path, look: Look, where: str) -> None:
    hub = root / where
    folder = cached(hub, "Org/Name-GGUF", MAIN, "x-Q4_K_M.gguf")
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(MAIN)
    (folder / ".no_exist" / MAIN).mkdir(parents=True)
    (hub / ".locks/models--Org--Name-GGUF").mkdir(parents=True)
    write(folder / "blobs/incomplete.gguf")
    cached(hub, "Org/Big-GGUF", MAIN, "Q8_0/big-Q8_0.gguf")
    cached(hub, "Org/Big-GGUF", MAIN, "gguf/any-Q4_0.gguf")
    cached(hub, "Org/Big-GGUF", MAIN, "mmproj-F16.gguf")
    cached(hub, "gpt2", MAIN, "gpt2.gguf")
    models = look()
    assert sorted(models) == ["gpt2", "org/big@q4_0", "org/big@q8_0", "org/name"]
    assert {key: (model.publisher, model.vision) for key, model in models.items()} == {
        "gpt2": ("", False),
        "org/big@q4_0": ("Org", True),
        "org/big@q8_0": ("Org", True),
        "org/name": ("Org", False),
    }
    assert {model.problem for model in models.values()} == {None}


def test_the_plain_key_is_of_the_revision_that_main_names(root: Path, look: Look) -> None:
    folder = cached(root, "org/name", OLD, "x-Q4_K_M.gguf", **{"general.name": "old"})
    assert look()["org/name"].display_name == "old", "it is the only one"
    cached(root, "org/name", MAIN, "x-Q8_0.gguf", **{"general.name": "new"})
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(f"{OLD}\n")
    (folder / "refs/v2").write_text(MAIN)
    named = by_name([*look().values()])
    assert (named["org/name"].display_name, named["org/name@aaaaaaa"].display_name) == ("old", "new")
    (folder / "refs/main").write_text(MAIN)
    models = look()
    assert sorted(models) == ["org/name", "org/name@bbbbbbb"]
    named = by_name([*models.values()])
    assert (named["org/name"].display_name, named["org/name@bbbbbbb"].display_name) == ("new", "old")
    (folder / "refs/main").unlink()
    os.mkfifo(folder / "refs/main")
    assert look()["org/name"].display_name == "new", "a reference of another name is used"


def test_a_file_that_two_revisions_share_is_one_model(root: Path, look: Look) -> None:
    folder = cached(root, "org/name", OLD, "x-Q4_K_M.gguf")
    (folder / "snapshots" / MAIN).mkdir()
    (folder / "snapshots" / MAIN / "x-Q4_K_M.gguf").symlink_to("../../blobs/bbbb-x-Q4_K_M")
    assert {key: model.shards for key, model in look().items()} == {
        "org/name": [f"models--org--name/snapshots/{MAIN}/x-Q4_K_M.gguf"]
    }


def test_a_link_out_of_hugging_faces_cache_is_refused(root: Path, look: Look) -> None:
    outside = write(root.parent / f"outside/{MAIN}/m.gguf").parent.parent
    (root / "models--p--m").mkdir()
    (root / "models--p--m/snapshots").symlink_to(outside)
    assert [problem(model) for model in look().values()] == [
        "snapshots is a symbolic link to a path outside the models directory"
    ]


# ---- files that are no models


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("solo-imatrix.gguf", {"general.type": "imatrix"}),
        ("solo-lora-F16.gguf", {"general.type": "adapter"}),
        ("solo-Q8_0.gguf", b"broken"),
        ("solo-Q8_0-00001-of-00002.gguf", {}),
        ("solo-DFlash-Q4_0.gguf", {"general.architecture": "dflash"}),
        ("ggml-vocab-solo.gguf", None),
    ],
)
def test_a_file_that_is_no_model_names_no_model(
    root: Path, look: Look, name: str, content: dict[str, Value] | bytes | None
) -> None:
    """It keeps a key of its own, for the reason to be told."""
    write(root / "bart/solo/solo-Q4_K_M.gguf")
    other = write(
        root / "bart/solo" / name, content if isinstance(content, dict) else {}, [] if content is None else WEIGHTS
    )
    if isinstance(content, bytes):
        other.write_bytes(content)
    usable = [key for key, model in look().items() if model.problem is None]
    assert usable == ["bart/solo"]
    named = by_name([*look().values()])
    assert named["bart/solo"] is named["bart/solo@q4_k_m"]
    assert len(look()) == 2


def test_an_unusable_file_alone_has_the_plain_key(root: Path, look: Look) -> None:
    (write(root / "p/m/m-Q4_0.gguf")).write_bytes(b"broken")
    assert list(look()) == ["p/m"]


MTP: dict[str, Value] = {
    "general.architecture": "glm4moe",
    "glm4moe.context_length": 4096,
    "glm4moe.block_count": 5,
    "glm4moe.nextn_predict_layers": 1,
    "glm4moe.expert_count": 8,
    "glm4moe.expert_used_count": 2,
}


def test_a_draft_is_no_model(root: Path, look: Look) -> None:
    write(root / "p/main/main-Q8_0.gguf")
    write(root / "p/main/main-DFlash-Q4_0.gguf", {"general.architecture": "dflash"})
    write(root / "p/main/eagle3-main-Q4_0.gguf", {"general.architecture": "eagle3"})
    named = by_name([*look().values()])
    assert named["p/main"].shards == ["p/main/main-Q8_0.gguf"]
    draft = named["p/main@main-dflash-q4_0"].problem
    assert draft is not None
    assert (draft.code, draft.message.split(":")[0]) == ("unsupported_model", "main-DFlash-Q4_0.gguf is a draft model")


def test_a_file_of_nothing_but_draft_layers_is_no_model(root: Path) -> None:
    """Only its tensors tell, so that they are read at once: keys do not change a second later."""
    embedding, trunk, last = (
        WEIGHTS[0],
        ("blk.0.attn_norm.weight", (32,), 0),
        ("blk.4.nextn.eh_proj.weight", (32,), 0),
    )
    write(root / "z/glm/glm-Q8_0.gguf", MTP | vocabulary(10), [embedding, trunk, last])
    write(root / "z/glm/mtp-glm-Q4_0.gguf", MTP | vocabulary(10), [embedding, last])
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    assert {model.key: model.problem and model.problem.code for model in catalog.models()} == {
        "z/glm": None,
        "z/glm@q4_0": "unsupported_model",
    }


@pytest.mark.parametrize(
    ("stem", "expected"),
    [
        ("Qwen3-0.6B-Q4_K_M", "q4_k_m"),
        ("m.i1-IQ2_XXS", "iq2_xxs"),
        ("Qwen3-30B-UD-Q4_K_XL", "ud-q4_k_xl"),
        ("gpt-oss-20b-MXFP4", "mxfp4"),
        ("m-f16", "f16"),
        ("m_fp16", "fp16"),
        ("BF16", "bf16"),
        ("m-TQ1_0", "tq1_0"),
        ("m-Q4_0_4_4", "q4_0_4_4"),
        ("f16-to-q4_0", "q4_0"),
        ("t5-v1_1-xxl", ""),
        ("llama-7b", ""),
    ],
)
def test_the_tag_comes_from_the_file_name(stem: str, expected: str) -> None:
    assert tag(stem) == expected


names = st.text("ab@-2Q", min_size=1, max_size=3)
places = st.builds(
    Place,
    st.lists(st.one_of(names, st.sampled_from(["m", "M-GGUF", "m@q4_0"])), max_size=3).map(tuple),
    st.one_of(names, st.sampled_from(["m-Q4_0", "M-q4_0", "q4_0", "q4_0-2", "m"])),
)


@given(places=st.lists(places, unique=True, max_size=8), seed=st.randoms(use_true_random=False))
def test_keys_are_unique_and_independent_of_the_walk_order(places: list[Place], seed: random.Random) -> None:
    named = keys.name_all(places)
    assert len({name.key for name in named}) == len(places)
    shuffled = seed.sample(places, len(places))
    assert dict(zip(places, named, strict=True)) == dict(zip(shuffled, keys.name_all(shuffled), strict=True))


# ---- the model of a key


def model(base: str, variant: str, bits: float | None = None, *, alone: bool = False, **more: object) -> Model:
    key = base if alone else f"{base}@{variant}"
    fields = {"key": key, "base": base, "variant": variant, "shards": [], "bits_per_weight": bits, **more}
    return msgspec.convert(fields, Model)


def test_a_plain_key_means_the_variant_closest_to_4_5_bits() -> None:
    models = [model("p/m", "q8_0", 8.5), model("p/m", "q4_k_m", 4.9), model("p/m", "q4_0", 4.6), model("p/x", "f", 4.5)]
    assert by_name(models)["p/m"] is models[2]
    assert by_name(models)["p/m@q8_0"] is models[0]


def test_the_name_gives_the_bits_until_they_are_known() -> None:
    models = [model("p/m", "f16"), model("p/m", "iq4_xs"), model("p/m", "unknown"), model("p/m", "q2_k")]
    assert by_name(models)["p/m"] is models[1]


def test_a_plain_key_prefers_a_loadable_file() -> None:
    broken = Problem(code="invalid_model_file", message="m is empty")
    models = [model("p/m", "q4_0", 4.5, problem=broken), model("p/m", "q8_0", 8.5)]
    assert by_name(models)["p/m"] is models[1]
    assert by_name(models[:1])["p/m"] is models[0], "its problem is then reported"


def test_the_only_model_of_a_folder_also_has_a_variant_key() -> None:
    models = [model("p/m", "q4_0", alone=True), model("p/n", "", alone=True)]
    assert by_name(models)["p/m@q4_0"] is models[0]
    for unknown in ("p/m@q8_0", "P/M", "p/m@Q4_0", "p/n@", "m", ""):
        assert unknown not in by_name(models)


# ---- shards, companions, adapters


def test_shards_make_one_model_of_their_total_size(root: Path, look: Look) -> None:
    sizes = [
        write(root / f"p/m/M-Q8_0-0000{i}-of-00003.gguf", {"split.count": 3}, [(f"t{i}", (32, i), 8)]).stat().st_size
        for i in (1, 2, 3)
    ]
    model = look()["p/m"]
    assert model.problem is None
    assert model.size_bytes == sum(sizes)
    assert model.shards == [f"p/m/M-Q8_0-0000{i}-of-00003.gguf" for i in (1, 2, 3)]
    assert (model.variant, model.bits_per_weight, model.params_string) == ("q8_0", 8.5, "192")


def test_missing_shards_are_named(root: Path, look: Look) -> None:
    write(root / "p/m/M-00002-of-00004.gguf")
    write(root / "p/m/M-00003-of-00004.gguf")
    message = problem(look()["p/m"])
    assert "missing: M-00001-of-00004.gguf, M-00004-of-00004.gguf" in message
    write(root / "p/n/N-00001-of-00002.GGUF")
    assert "missing: N-00002-of-00002.GGUF" in problem(look()["p/n"])


def test_a_broken_shard_is_named(root: Path, look: Look) -> None:
    write(root / "p/m/M-00001-of-00002.gguf")
    (root / "p/m/M-00002-of-00002.gguf").write_bytes(b"")
    assert problem(look()["p/m"]) == "M-00002-of-00002.gguf is empty"


def test_a_shard_under_another_name_is_not_a_model(root: Path, look: Look) -> None:
    write(root / "p/m/part.gguf", {"split.count": 2})
    assert "one of the 2 files of a split model" in problem(look()["p/m"])


@pytest.mark.parametrize(
    ("name", "metadata"),
    [
        ("mmproj-F16.gguf", {}),
        ("vision.gguf", {"general.type": "mmproj"}),
        ("vision.gguf", {"general.architecture": "clip"}),
    ],
)
def test_a_companion_gives_vision_to_the_models_beside_it(
    root: Path, look: Look, name: str, metadata: dict[str, Value]
) -> None:
    write(root / "p/m/m-Q4_0.gguf")
    write(root / "p/m" / name, metadata)
    write(root / "p/blind/m-Q4_0.gguf")
    assert {key: model.vision for key, model in look().items()} == {"p/m": True, "p/blind": False}


GEMMA: dict[str, Value] = {"llama.embedding_length": 2560, "general.name": "Gemma VL 4b"}
HERMES: dict[str, Value] = {"llama.embedding_length": 4096, "general.name": "Hermes 7b"}
PROJECTOR: dict[str, Value] = {"general.architecture": "clip", "general.type": "mmproj"}


@pytest.mark.parametrize("folder", ["", "all/"])
@pytest.mark.parametrize(
    ("projector", "metadata"),
    [
        ("mmproj-gemma-vl.gguf", {}),
        ("mmproj-gemma-vl-4b-F16.gguf", {}),
        ("gemma-vl-4b.mmproj-Q8_0.gguf", {}),
        ("mmproj-google_gemma-vl-4b-f16.gguf", {}),
        ("mmproj-F16.gguf", {"general.name": "Gemma-VL-4B"}),
        ("mmproj-model-f16.gguf", {"general.basename": "gemma-vl"}),
        ("mmproj-F16.gguf", {"clip.vision.projection_dim": 2560}),
        ("mmproj-F16.gguf", {"general.name": "clip-vit-large", "clip.vision.projection_dim": 2560, "general.type": ""}),
    ],
)
def test_a_projector_belongs_to_the_model_of_its_names(
    root: Path, look: Look, folder: str, projector: str, metadata: dict[str, Value]
) -> None:
    write(root / f"{folder}hermes-7b-Q4_K_M.gguf", HERMES)
    write(root / f"{folder}gemma-vl-4b-Q4_K_M.gguf", GEMMA)
    write(root / f"{folder}gemma-vl-4b-Q8_0.gguf", GEMMA)
    write(root / f"{folder}{projector}", PROJECTOR | metadata)
    seen = {model.shards[0].removeprefix(folder): model.vision for model in look().values()}
    assert seen == {
        "gemma-vl-4b-Q4_K_M.gguf": True,
        "gemma-vl-4b-Q8_0.gguf": True,
        "hermes-7b-Q4_K_M.gguf": False,
    }


@pytest.mark.parametrize(
    ("projector", "metadata", "expected"),
    [
        ("mmproj-gemma-vl-4b.gguf", {}, False),
        ("mmproj-F16.gguf", {"general.name": "Gemma VL 4b"}, False),
        ("mmproj-F16.gguf", {"clip.vision.projection_dim": 2560}, False),
        ("mmproj-F16.gguf", {}, True),
        ("mmproj-F16.gguf", {"clip.vision.projection_dim": 4096}, True),
        ("mmproj-F16.gguf", {"clip.vision.projection_dim": 768, "general.type": ""}, True),  # the encoder's own
    ],
)
def test_a_projector_of_another_model_gives_no_vision(
    root: Path, look: Look, projector: str, metadata: dict[str, Value], expected: bool
) -> None:
    """The model beside it is the only one at the top of the directory."""
    write(root / "hermes-7b-Q4_K_M.gguf", HERMES)
    write(root / projector, PROJECTOR | metadata)
    assert look()["hermes-7b-q4_k_m"].vision is expected


def test_an_embedding_model_has_no_projector(root: Path, look: Look) -> None:
    """An old projector has the length of its encoder, which small embedding models have too."""
    write(root / "llava-7b-Q4_0.gguf", {"llama.embedding_length": 4096})
    write(root / "nomic-Q8_0.gguf", {"llama.embedding_length": 768, "llama.pooling_type": 1})
    write(root / "mmproj-model-f16.gguf", {"general.architecture": "clip", "clip.vision.projection_dim": 768})
    assert [key for key, model in look().items() if model.vision] == ["llava-7b-q4_0"]


def test_models_of_one_family_have_their_own_projectors(root: Path, look: Look) -> None:
    for size, width in (("4b", 2560), ("12b", 3840)):
        family: dict[str, Value] = {"general.basename": "gemma-3", "llama.embedding_length": width}
        write(root / f"gemma-3-{size}-it-Q4_0.gguf", family)
        write(root / f"gemma-3-{size}-pt-Q4_0.gguf", family)
    more: dict[str, Value] = {"general.basename": "gemma-3", "clip.vision.projection_dim": 2560}
    write(root / "mmproj-gemma-3-4b-it-f16.gguf", PROJECTOR | more)
    assert [key for key, model in look().items() if model.vision] == ["gemma-3-4b-it-q4_0"]
    (root / "mmproj-gemma-3-4b-it-f16.gguf").rename(root / "mmproj-F16.gguf")
    assert sorted(key for key, model in look().items() if model.vision) == ["gemma-3-4b-it-q4_0", "gemma-3-4b-pt-q4_0"]


@pytest.mark.parametrize(
    ("encoders", "expected"),
    [
        ({"clip.has_vision_encoder": False}, False),
        ({"clip.has_audio_encoder": True}, False),
        ({"clip.has_audio_encoder": True, "clip.has_vision_encoder": True}, True),
    ],
)
def test_an_audio_companion_gives_no_vision(root: Path, look: Look, encoders: dict[str, Value], expected: bool) -> None:
    write(root / "p/m/m.gguf")
    write(root / "p/m/mmproj.gguf", {"general.type": "mmproj", **encoders})
    assert look()["p/m"].vision is expected


@pytest.mark.parametrize(("kind", "word"), [("adapter", "LoRA adapter"), ("imatrix", "importance matrix")])
def test_a_file_of_another_kind_has_a_key_and_a_problem(root: Path, look: Look, kind: str, word: str) -> None:
    write(root / "p/m/x.gguf", {"general.type": kind})
    assert look()["p/m"].problem == Problem(code="unsupported_model", message=f"x.gguf is {_a(word)}, not a model")


def _a(word: str) -> str:
    return f"an {word}" if word[0] in "aeiou" else f"a {word}"


# ---- the fields of a model


@pytest.mark.parametrize(
    ("metadata", "expected"),
    [
        ({}, ("llm", True, -1)),
        ({"llama.pooling_type": 0}, ("llm", True, 0)),
        ({"llama.pooling_type": 3}, ("embedding", True, 3)),
        ({"llama.pooling_type": 4}, ("embedding", True, 4)),
        ({"llama.attention.causal": False}, ("embedding", False, -1)),
        ({"llama.pooling_type": 1, "llama.attention.causal": False}, ("embedding", False, 1)),
        ({"general.architecture": "bert", "bert.context_length": 512}, ("embedding", False, -1)),
        ({"general.architecture": "gemma-embedding", "gemma-embedding.context_length": 512}, ("embedding", False, -1)),
        (
            {"general.architecture": "dream", "dream.context_length": 512, "dream.attention.causal": False},
            ("llm", False, -1),
        ),
    ],
)
def test_embedding_models_are_recognized_by_metadata(
    root: Path, look: Look, metadata: dict[str, Value], expected: tuple[str, bool, int]
) -> None:
    write(root / "m.gguf", metadata)
    model = look()["m"]
    assert model.problem is None
    assert (model.type, model.causal, model.pooling) == expected


def test_fields_after_the_vocabulary_follow_later(root: Path) -> None:
    metadata: dict[str, Value] = {
        "general.name": "My Model",
        "general.description": "It talks.",
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        **vocabulary(2000),
        "tokenizer.chat_template": "{% if tools %}{{ tools }}{{ enable_thinking }}{{ reasoning_effort }}{% endif %}",
        "general.file_type": 7,
    }
    path = write(root / "Pub/M-GGUF/m.gguf", metadata, [("a", (1024, 1000), 8), ("b", (1024, 4), 0)])
    os.truncate(path, 2 << 20)
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    quick = catalog.models()[0]
    assert (quick.publisher, quick.display_name, quick.description) == ("Pub", "My Model", "It talks.")
    assert (quick.architecture, quick.max_context_length, quick.expert_count) == ("llama", 4096, 8)
    assert quick.size_bytes == 2 << 20
    assert (quick.quantization, quick.bits_per_weight, quick.params_string) == (None, None, None)
    catalog.deepen(60)
    whole = catalog.models()[0]
    assert not catalog.is_shallow
    assert whole == msgspec.structs.replace(
        quick,
        quantization="Q8_0",
        bits_per_weight=8.59,
        params_string="1M",
        trained_for_tool_use=True,
        reasoning=["off", "on", "low", "medium", "high"],
        weights=Weights(input_bytes=0, repeating_bytes=0, output_bytes=1_104_384, has_output=False),
    )


def test_without_a_file_type_the_tensors_name_the_quantization(root: Path, look: Look) -> None:
    """Vectors are never quantized: an encoder has more of them than matrices.  Shards are counted together."""
    vectors = [(f"norm{i}", (64,), 0) for i in range(9)]
    write(root / "m.gguf", {}, [("a", (256, 2), 12), ("b", (256, 2), 12), ("c", (256, 2), 14), *vectors])
    write(root / "new.gguf", {"general.file_type": 99}, [("a", (64, 2), 42), *vectors])
    write(root / "s-00001-of-00002.gguf", {"split.count": 2}, [("a", (64, 2), 0)])
    write(root / "s-00002-of-00002.gguf", {}, [("b", (64, 2), 8), ("c", (64, 2), 8)])
    write(root / "n-Q4_K_S.gguf", {}, [("a", (256, 2), 12)])
    names = {key: model.quantization for key, model in look().items()}
    assert names == {"m": "Q4_K_M", "new": "Q2_0", "s": "Q8_0", "n-q4_k_s": "Q4_K_S"}


# ---- the input of a memory estimate

SIZES: dict[str, Value] = {
    "llama.embedding_length": 64,
    "llama.attention.head_count": 4,
    "llama.feed_forward_length": 128,
}


def test_dimensions_come_first_and_the_vocabulary_size_later(root: Path) -> None:
    more: dict[str, Value] = {
        "llama.attention.head_count_kv": [2, 1],
        "llama.attention.value_length": 32,
        "llama.expert_count": 8,
        "llama.expert_used_count": 2,
        "llama.expert_feed_forward_length": 48,
        "llama.attention.sliding_window": 512,
    }
    write(root / "m.gguf", SIZES | more | vocabulary(2000))
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    quick = catalog.models()[0].dimensions
    assert quick == Dimensions(
        block_count=2,
        embedding_length=64,
        head_count=4,
        head_count_kv=[2, 1],
        key_length=16,
        value_length=32,
        feed_forward_length=128,
        expert_used_count=2,
        expert_feed_forward_length=48,
        sliding_window=512,
        vocabulary=None,
    )
    catalog.deepen(60)
    assert catalog.models()[0].dimensions == msgspec.structs.replace(quick, vocabulary=2000)


def test_a_declared_vocabulary_size_is_known_at_once(root: Path) -> None:
    write(root / "m.gguf", SIZES | {"llama.vocab_size": 3000} | vocabulary(3000))
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    dimensions = catalog.models()[0].dimensions
    assert dimensions is not None
    assert (dimensions.vocabulary, dimensions.head_count_kv) == (3000, 4)


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.embedding_length": 0},
        {"llama.embedding_length": 2**31},
        {"llama.attention.head_count": "four"},
        {"llama.attention.head_count": [4]},  # there are two blocks
        {"llama.block_count": 2**31},
    ],
)
def test_invalid_dimensions_are_left_out(root: Path, look: Look, metadata: dict[str, Value]) -> None:
    write(root / "m.gguf", SIZES | metadata)
    assert look()["m"].dimensions is None


@pytest.mark.parametrize("heads", [0, [0, 0]])
def test_a_model_without_attention_has_dimensions(root: Path, look: Look, heads: Value) -> None:
    """Its blocks must be known, so that a GPU takes all of them."""
    write(root / "m.gguf", SIZES | {"llama.attention.head_count": heads})
    dimensions = look()["m"].dimensions
    assert dimensions is not None
    assert (dimensions.block_count, dimensions.head_count, dimensions.head_count_kv) == (2, heads, heads)


def test_weights_are_summed_by_place_over_all_shards(root: Path, look: Look) -> None:
    embedding, block, last = ("token_embd.weight", (64, 32), 0), ("blk.0.x", (64, 2), 0), ("output.weight", (64, 8), 0)
    write(root / "m-00001-of-00002.gguf", {"split.count": 2}, [embedding, block])
    write(
        root / "m-00002-of-00002.gguf", {"split.count": 2}, [("blk.1.x", (64, 2), 0), ("output_norm", (64,), 0), last]
    )
    weights = Weights(input_bytes=8192, repeating_bytes=1024, output_bytes=256 + 2048, has_output=True)
    assert look()["m"].weights == weights


def test_weights_of_an_unknown_type_are_unknown(root: Path, look: Look) -> None:
    write(root / "m.gguf", tensors=[("token_embd.weight", (64, 32), 0), ("blk.0.x", (64, 2), 200)])
    assert look()["m"].weights is None


def test_a_header_without_names_leaves_the_file_name(root: Path, look: Look) -> None:
    write(root / "Some-Q5_K_M.gguf", {"general.organization": "Org"})
    model = look()["some-q5_k_m"]
    assert (model.display_name, model.quantization, model.publisher) == ("Some-Q5_K_M", "Q5_K_M", "Org")


@pytest.mark.parametrize(
    ("parameters", "text"),
    [(7_000_000_000, "7B"), (1_540_000_000, "1.5B"), (32_800_000_000, "33B"), (596_000_000, "596M"),
     (999_900_000, "1B"), (22_700, "23K"), (2_000_000_000_000, "2T"), (12, "12")],
)  # fmt: skip
def test_numbers_of_weights_are_abbreviated(parameters: int, text: str) -> None:
    assert abbreviated(parameters) == text


@pytest.mark.parametrize(
    ("stem", "file_type", "name"),
    [
        ("m-UD-Q4_K_XL", 15, "UD-Q4_K_XL"),
        ("m-UD-IQ2_M", 29, "UD-IQ2_M"),
        ("m-Q6_K_L", 18, "Q6_K_L"),
        ("m-Q4_K_M", 15, "Q4_K_M"),
        ("m-fp16", 1, "F16"),
        ("m-mxfp4", 38, "MXFP4"),
        ("m", 15, "Q4_K_M"),
        ("m", None, "F32"),  # of the tensors
    ],
)
def test_the_quantization_is_the_one_that_the_file_names(
    root: Path, look: Look, stem: str, file_type: int | None, name: str | None
) -> None:
    """The header knows only the type of most tensors."""
    write(root / f"p/m/{stem}.gguf", {} if file_type is None else {"general.file_type": file_type})
    assert look()["p/m"].quantization == name


# ---- problems


LENGTHS = ("attention.key_length", "attention.value_length")


def of(architecture: str, metadata: dict[str, Value]) -> dict[str, Value]:
    """Return the metadata of a model of another architecture than LLAMA's."""
    required: dict[str, Value] = {"context_length": 4096, "block_count": 2}
    named = {f"{architecture}.{name}": value for name, value in (required | metadata).items()}
    return {"general.architecture": architecture, **named}


def test_a_folder_too_deep_is_a_problem(root: Path, look: Look) -> None:
    deep = root / "/".join("d" for _ in range(32))
    write(deep / "m.gguf")
    write(deep / "further/m.gguf")
    (refused,) = (problem(model) for model in look().values() if model.problem)
    assert refused == "further is more than 32 folders deep, and is not searched"
    assert "d/d" in look()


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.block_count": 0},
        {"llama.block_count": 513},
        {"llama.expert_count": 1025, "llama.expert_used_count": 2},
        {"llama.expert_count": 8},
        {"llama.expert_count": 8, "llama.expert_used_count": 9},
        {"llama.expert_used_count": 1},
        {"llama.expert_count": 8, "llama.expert_used_count": [2, 0]},
        {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_group_count": 3},
        {"llama.expert_group_count": 1},
        {"llama.rope.scaling.type": "sideways"},
        {"llama.context_length": 0},
        {"llama.context_length": 2**31},
        {"llama.context_length": "4096"},
        {"llama.nextn_predict_layers": 3},
        {"llama.nextn_predict_layers": 2},
        {"llama.embedding_length": 64, "llama.attention.head_count": 3},
        {"llama.expert_count": 8, "llama.expert_used_count": 2, "llama.expert_gating_func": 5},
        {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 3},
        {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 16},
        {"llama.attention.head_count": [8, 8], "llama.attention.head_count_kv": [4, 3]},
        {"llama.attention.head_count": 8, "llama.attention.head_count_kv": [4, 0]},
        {"llama.attention.head_count": 0},
        {"llama.attention.key_length": 64, "llama.attention.value_length": 32},
        {"llama.embedding_length": 256, "llama.attention.head_count": 4, "llama.attention.key_length": 32},
        {"llama.attention.key_length": 64, "llama.attention.value_length": 64, "llama.rope.dimension_count": 32},
        {"llama.embedding_length": 256, "llama.attention.head_count": 4, "llama.rope.dimension_count": 32},
        {"llama.attention.key_length": 0, "llama.attention.value_length": 64},
        {"llama.attention.layer_norm_rms_epsilon": -1e-6},
        {"llama.attention.layer_norm_rms_epsilon": float("nan")},
        {"llama.pooling_type": 7},
        {"general.architecture": ""},
        of("phi2", {"attention.key_length": 80, "rope.dimension_count": 33}),
        of("phi2", {"attention.key_length": 80, "rope.dimension_count": 96}),
        of("phi2", {"attention.key_length": 80, "rope.dimension_count": 0}),
        of("gemma2", {"attention.key_length": 64, "rope.dimension_count_swa": 96}),
        of("gemma2", {"attention.sliding_window_pattern": 1}),
        of("gemma4", {"attention.key_length": 64, "attention.key_length_swa": 32}),
        of("gemma4", {"attention.key_length": 64, "attention.value_length": 32}),
        of("gemma4", {"attention.shared_kv_layers": 1}),
        of("step35", {"attention.sliding_window_pattern": [False, False]}),
        of("qwen35", {"attention.key_length": 64, "rope.dimension_sections": [0, 0, 0, 0]}),
        of("qwen35", {"full_attention_interval": 0}),
        of("qwen3next", {"ssm.inner_size": 512, "ssm.state_size": 32, "ssm.time_step_rank": 8, "ssm.group_count": 4}),
        of("qwen3next", {"ssm.inner_size": 256, "ssm.state_size": 32, "ssm.time_step_rank": 8, "ssm.group_count": 3}),
        of("jamba", {"embedding_length": 64, "ssm.inner_size": 64}),
        of("glm4moe", {"expert_count": 0}),
        of("deepseek2", {"attention.key_length": 96, "attention.key_length_mla": 64, "rope.dimension_count": 64}),
        of("rwkv6", {"token_shift_count": 1}),
        of("rwkv7", {"embedding_length": 64, "wkv.head_size": 0}),
        of("arwkv7", {"embedding_length": 64, "wkv.head_size": 64}),
        of("ernie4_5-moe", {"interleave_moe_layer_step": 0}),
        of("llama4", {"attention.sliding_window": 0}),
        of("gemma-embedding", {"embedding_length": 64, "dense_2_feat_in": 32}),
        of("wavtokenizer-dec", {"posnet.block_count": 3}),
        of("t5", {"decoder_block_count": 513}),
    ],
)
def test_values_that_would_abort_the_engine_are_problems(root: Path, look: Look, metadata: dict[str, Value]) -> None:
    write(root / "m.gguf", metadata)
    assert problem(look()["m"]).startswith("m.gguf ")


@pytest.mark.parametrize(("alignment", "can_map"), [(8, False), (16, False), (32, True), (64, True)])
def test_a_file_with_a_small_alignment_cannot_be_mapped(root: Path, look: Look, alignment: int, can_map: bool) -> None:
    write(root / "m-00001-of-00002.gguf", {"split.count": 2})
    write(root / "m-00002-of-00002.gguf", {"general.alignment": alignment})
    model = look()["m"]
    assert (model.problem, model.can_map) == (None, can_map)
    assert plan(LoadRequest(model="m"), model, Settings(), [], []).can_map == can_map


@pytest.mark.parametrize(
    "metadata",
    [
        {"llama.nextn_predict_layers": 1},
        {"llama.attention.head_count": 8, "llama.attention.head_count_kv": 1},
        of("llama", {"embedding_length": 64, "attention.head_count": 3, **dict.fromkeys(LENGTHS, 24)}),
        {"llama.attention.head_count": [8, 4], "llama.attention.head_count_kv": [2, 4]},
        {"llama.embedding_length": 256, "llama.attention.head_count": 4, "llama.rope.dimension_count": 64},
        {"llama.attention.layer_norm_rms_epsilon": 0.0},
        {"llama.pooling_type": 2**32 - 1},
        of("gemma2", {"attention.sliding_window_pattern": 2}),
        of("step35", {"attention.sliding_window_pattern": [False, True]}),
        of("gemma4", {"attention.key_length": 64, "attention.key_length_swa": 32, "rope.dimension_count_swa": 32}),
        of("hunyuan-dense", {"expert_count": 1, "expert_used_count": 0}),
        of("lfm2", {"attention.head_count": 8, "attention.head_count_kv": [0, 2]}),
        of("deci", {"attention.head_count": [8, 0], "attention.head_count_kv": [2, 0]}),
        of("mamba", {"attention.head_count": 0, "feed_forward_length": 0}),
        of("deepseek2", {"attention.key_length": 576, "attention.value_length": 512, "rope.dimension_count": 64}),
        of("deepseek2", {}),
        of("deepseek2-ocr", {"attention.key_length": 128, "rope.dimension_count": 128}),
        of("phi2", {"attention.key_length": 80, "rope.dimension_count": 32}),
        of("gpt2", {"attention.key_length": 64, "rope.dimension_count": 65}),
        of("rwkv6", {"embedding_length": 64, "wkv.head_size": 32}),
        of("arwkv7", {"token_shift_count": 1}),
    ],
)
def test_values_that_the_engine_accepts_are_no_problem(root: Path, look: Look, metadata: dict[str, Value]) -> None:
    write(root / "m.gguf", metadata)
    assert look()["m"].problem is None


@pytest.mark.parametrize(
    ("metadata", "says"),
    [
        ({"llama.rope.scaling.type": 2}, "llama.rope.scaling.type = 2; it must be one of linear, longrope, none, yarn"),
        ({"llama.expert_count": 8}, "no llama.expert_used_count; it must be from 1 to llama.expert_count (8)"),
        (of("arwkv7", {}), "no arwkv7.token_shift_count; it must be that of arwkv7 (1)"),
        (of("glm4moe", {}), "no glm4moe.expert_count; a model of the architecture glm4moe has experts"),
        ({"general.architecture": 7}, "general.architecture = 7; it must be a name"),
        ({"llama.context_length": "4096"}, "llama.context_length = '4096'; it must be an integer"),
        ({"llama.expert_count": "8", "llama.expert_used_count": 2}, "llama.expert_count = '8'; it must be an integer"),
        ({"llama.expert_used_count": 2.0, "llama.expert_count": 8}, "llama.expert_used_count = 2.0; it must be an"),
    ],
)
def test_a_sentence_shows_what_the_file_has(root: Path, look: Look, metadata: dict[str, Value], says: str) -> None:
    write(root / "m.gguf", metadata)
    assert f"m.gguf has {says}" in problem(look()["m"])


@pytest.mark.parametrize("architecture", ["flux", "sd3", "wan", "qwen_image", "ltxv", "hidream", "whisper", "lumina2"])
def test_a_model_of_another_kind_is_unsupported_not_damaged(root: Path, look: Look, architecture: str) -> None:
    """Such files are whole, and have none of the keys that a language model has."""
    path = root / "m.gguf"
    path.write_bytes(header({"general.architecture": architecture, "general.file_type": 1}, []) + bytes(64))
    write(root / "n.gguf", of(architecture, {"block_count": 0}))
    for key, model in look().items():
        assert model.problem is not None
        assert model.problem.code == "unsupported_model"
        assert model.problem.message.startswith(f"{key}.gguf is a model of the architecture '{architecture}', which")


def test_a_text_encoder_is_unsupported_and_no_companion(root: Path, look: Look) -> None:
    clip: dict[str, Value] = {"general.architecture": "clip", "clip.has_text_encoder": True}
    write(root / "p/clip/clip.gguf", clip)
    model = look()["p/clip"]
    assert model.problem is not None
    assert model.problem.code == "unsupported_model"


def test_a_repeated_token_is_a_problem(root: Path, look: Look) -> None:
    """The engine asserts that each token has one id.  It names empty tokens itself, and reads C's strings."""
    tokens = vocabulary(2000)["tokenizer.ggml.tokens"]
    assert isinstance(tokens, list)
    write(root / "few.gguf", {"tokenizer.ggml.tokens": ["a", "b", "a"]})
    write(root / "many.gguf", {"tokenizer.ggml.tokens": [*tokens, "token7"]})
    write(root / "cut.gguf", {"tokenizer.ggml.tokens": ["a", "a\0b"]})
    write(root / "empty.gguf", {"tokenizer.ggml.tokens": ["", "a", ""]})
    write(root / "merges.gguf", {"tokenizer.ggml.tokens": ["a"], "tokenizer.ggml.merges": ["a b", "a b"]})
    models = look()
    for key, token in (("few", "a"), ("many", "token7"), ("cut", "a")):
        assert f"{key}.gguf has the token '{token}' twice in its vocabulary" in problem(models[key])
    assert (models["empty"].problem, models["merges"].problem) == (None, None)


def test_experts_may_be_given_per_layer(root: Path, look: Look) -> None:
    write(root / "m.gguf", {"llama.expert_count": 8, "llama.expert_used_count": [4, 2]})
    assert look()["m"].problem is None


def test_a_vocabulary_alone_is_not_a_model(root: Path, look: Look) -> None:
    write(root / "m.gguf", vocabulary(4), [])
    assert "it is a vocabulary" in problem(look()["m"])


def test_a_bad_file_has_a_key_and_does_not_hide_the_others(root: Path, look: Look) -> None:
    write(root / "p/good/m.gguf")
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", header()[:-80]), ("short", header())):
        (root / "p" / name).mkdir()
        (root / "p" / name / "m.gguf").write_bytes(content)
    (root / "p/fifo").mkdir()
    os.mkfifo(root / "p/fifo/m.gguf")
    (root / "p/folder/m.gguf").mkdir(parents=True)
    (root / "p/dangling").mkdir()
    (root / "p/dangling/m.gguf").symlink_to("nowhere")
    (root / "p/loop").mkdir()
    (root / "p/loop/m.gguf").symlink_to("m.gguf")
    models = look()
    assert [key for key, model in models.items() if model.problem is None] == ["p/good"]
    assert sorted(models) == [f"p/{n}" for n in ("cut", "dangling", "empty", "fifo", "good", "loop", "short", "text")]
    assert not any(str(root) in problem(model) for model in models.values() if model.problem)


def test_links_out_of_the_directory_are_refused_unopened(root: Path, look: Look) -> None:
    """llama.cpp would follow such a link and write the first bytes of the target to its log."""
    outside = write(root.parent / "outside/p/m.gguf").parent
    (root / "p/file").mkdir(parents=True)
    (root / "p/file/m.gguf").symlink_to(outside / "m.gguf")
    (root / "p/folder").symlink_to(outside)
    models = look()
    assert sorted(models) == ["p/file", "p/folder"]
    for refused in models.values():
        assert problem(refused).endswith("is a symbolic link to a path outside the models directory")
        assert refused.architecture == ""


def test_links_within_the_directory_count_as_files(root: Path, look: Look) -> None:
    """The layout of the Hugging Face cache: snapshots link to blobs, which have no ending."""
    blob = write(root / "models--p--m/blobs/0a1b")
    snapshot = root / "models--p--m/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "m-Q4_0.gguf").symlink_to("../../blobs/0a1b")
    (root / "p").mkdir()
    (root / "p/nice-name").symlink_to(snapshot)
    models = look()
    assert sorted(models) == ["p/nice-name", "snapshots/abc"]
    assert all(model.problem is None and model.size_bytes == blob.stat().st_size for model in models.values())


def test_folders_that_link_to_each_other_are_walked_once(root: Path, look: Look) -> None:
    write(root / "p/m/m.gguf")
    (root / "p/m/up").symlink_to(root)
    (root / "p/m/self").symlink_to(".")
    (root / "a").mkdir()
    (root / "a/to-p").symlink_to("../p")
    (root / "p/to-a").symlink_to("../a")
    assert sorted(look()) == ["p/m", "to-p/m"]


def test_hidden_files_are_ignored(root: Path, look: Look) -> None:
    write(root / ".cache/m.gguf")
    write(root / "p/m/._m.gguf")
    assert look() == {}


def test_a_name_that_is_not_utf_8_is_a_problem_of_its_model(root: Path, look: Look) -> None:
    (root / os.fsdecode(b"m\xff.gguf")).write_bytes(header())
    (model,) = look().values()
    assert "not UTF-8" in problem(model)
    msgspec.msgpack.encode(model)


def test_an_unreadable_file_is_retried(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A change of permissions changes neither the modification time nor the size."""
    write(root / "m.gguf")
    catalog = Catalog([root], root.parent / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", _forbidden)
        catalog.look()
    assert problem(catalog.models()[0]) == "m.gguf cannot be read: Permission denied"
    assert catalog.look()
    assert catalog.models()[0].problem is None


def _forbidden(*_: object) -> int:
    raise PermissionError(13, "Permission denied")


# ---- the cache


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were opened with os.open; the header reader uses it."""
    names: list[str] = []
    really_open = os.open

    def recording(path: Path, flags: int, *rest: int) -> int:
        names.append(path.name)
        return really_open(path, flags, *rest)

    monkeypatch.setattr(os, "open", recording)
    return names


def test_an_unchanged_file_is_not_read_again_after_a_restart(root: Path, opened: list[str]) -> None:
    write(root / "a.gguf", vocabulary(10))
    (root / "bad.gguf").write_bytes(b"bad")
    first = everything(root)
    first.save()
    assert opened == ["a.gguf", "bad.gguf", "a.gguf"], "a quick look at both, then the rest of the valid file"
    opened.clear()
    assert not first.look()
    second = everything(root)
    assert second.models() == first.models()
    assert opened == []


def test_a_changed_file_is_read_again(root: Path) -> None:
    path = write(root / "a.gguf")
    catalog = everything(root)
    write(path, {"llama.context_length": 99})
    os.utime(path, ns=(1, 1))
    assert catalog.look()
    assert catalog.models()[0].max_context_length == 99
    path.unlink()
    assert catalog.look()
    assert catalog.models() == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"\x82\xa7version\xa1x\xa5files\x80", b"\xc1" * 100])
def test_a_damaged_cache_is_ignored_and_rewritten(root: Path, content: bytes, opened: list[str]) -> None:
    write(root / "a.gguf")
    cache = root.parent / "cache"
    cache.write_bytes(content)
    everything(root).save()
    opened.clear()
    assert everything(root).models()[0].max_context_length == LLAMA["llama.context_length"]
    assert opened == []
    assert sorted(path.name for path in root.parent.iterdir()) == ["cache", "models"]


def test_a_missing_models_directory_has_no_models(root: Path) -> None:
    write(root / "a.gguf")
    catalog = everything(root)
    root.rename(root.parent / "elsewhere")
    assert catalog.look()
    assert catalog.unlistable == {root: "No such file or directory"}
    assert catalog.models() == []


# ---- several directories


@pytest.fixture
def second(root: Path) -> Path:
    return root.parent / "second"


def of_both(root: Path, second: Path) -> Catalog:
    catalog = Catalog([root, second], root.parent / "cache")
    catalog.look()
    return catalog


def test_models_of_all_directories_are_named_as_if_of_one(root: Path, second: Path) -> None:
    write(root / "p/m/m-Q4_0.gguf")
    write(second / "P/M-GGUF/m-Q8_0.gguf")
    write(second / "other.gguf")
    catalog = of_both(root, second)
    models = {model.key: model for model in catalog.models()}
    assert sorted(models) == ["other", "p/m@q4_0", "p/m@q8_0"]
    settings = Settings(models_dir=Path(f"{root}:{second}"))
    opened = [plan(LoadRequest(model=key), model, settings, [], []).shards for key, model in sorted(models.items())]
    files = [second / "other.gguf", root / "p/m/m-Q4_0.gguf", second / "P/M-GGUF/m-Q8_0.gguf"]
    assert opened == [[str(file)] for file in files]


def test_of_the_same_model_in_two_directories_the_first_counts(root: Path, second: Path) -> None:
    for directory, name in ((second, "M.Q4_0"), (second, "m-Q8_0"), (root, "m-Q4_0"), (second, "other-Q4_0")):
        write(directory / f"p/m/{name}.gguf")
    catalog = of_both(root, second)
    found = {model.key: (model.root, model.shards) for model in catalog.models()}
    assert found == {
        "p/m@m-q4_0": (0, ["p/m/m-Q4_0.gguf"]),
        "p/m@q8_0": (1, ["p/m/m-Q8_0.gguf"]),
        "p/m@other-q4_0": (1, ["p/m/other-Q4_0.gguf"]),
    }
    assert [(model.root, model.shards) for model in catalog.listed().hidden] == [(1, ["p/m/M.Q4_0.gguf"])]
    (root / "p/m/m-Q4_0.gguf").write_bytes(b"damaged")
    catalog.look()
    assert (1, ["p/m/M.Q4_0.gguf"]) in [(model.root, model.shards) for model in catalog.models() if not model.problem]
    assert catalog.listed().hidden == []


def test_a_directory_that_is_away_does_not_hide_the_others(root: Path, second: Path) -> None:
    write(second / "p/m/m.gguf")
    root.rmdir()
    catalog = of_both(root, second)
    assert [model.key for model in catalog.models()] == ["p/m"]
    assert [*catalog.unlistable] == [root]
    write(root / "p/n/n.gguf")
    assert catalog.look()
    assert [model.key for model in catalog.models()] == ["p/m", "p/n"]
    assert not catalog.unlistable


def test_a_link_into_another_directory_is_refused(root: Path, second: Path) -> None:
    (root / "link.gguf").symlink_to(write(second / "m.gguf"))
    models = {model.key: model for model in of_both(root, second).models()}
    assert "outside the models directory" in problem(models["link"])
    assert models["m"].problem is None


def test_a_projector_is_for_the_models_of_its_directory(root: Path, second: Path) -> None:
    write(root / "p/m/m-Q4_0.gguf")
    write(second / "p/m/m-Q8_0.gguf")
    write(second / "p/m/mmproj-f16.gguf", {"general.type": "mmproj", "general.architecture": "clip"})
    models = {model.key: model.vision for model in of_both(root, second).models()}
    assert models == {"p/m@q4_0": False, "p/m@q8_0": True}


def test_settings_of_models_are_those_of_the_first_directory(root: Path, second: Path) -> None:
    write(second / "p/m/m.gguf")
    for directory, length in ((root, 7), (second, 8)):
        (directory / "models.toml").write_text(f'[models."p/m"]\ncontext_length = {length}\n')
    assert [model.settings.context_length for model in of_both(root, second).models()] == [7]
