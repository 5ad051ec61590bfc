"""The choice of the files of a repository, by their names."""

from __future__ import annotations

import pytest

from shared.errors import InvalidValue
from worker.hub.choice import RemoteFile, choose, quantizations


def listed(*paths: str) -> list[RemoteFile]:
    """Return files whose sizes are in the order of their paths."""
    return [RemoteFile(path, 1000 + i) for i, path in enumerate(paths)]


def chosen(files: list[RemoteFile], quantization: str | None = None) -> list[str]:
    return [file.path for file in choose(files, quantization)]


BARTOWSKI = listed(
    *(f"Qwen3-8B-{name}.gguf" for name in ("IQ2_M", "Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q8_0", "bf16")),
    *("Qwen3-8B.imatrix", "qwen3-8b-imatrix.gguf", "mmproj-Qwen3-8B-f16.gguf", "README.md", "mtp-Qwen3-8B-Q8_0.gguf"),
)
UNSLOTH = listed(
    "DeepSeek-V3-UD-Q2_K_XL.gguf",
    *(f"UD-Q4_K_XL/DeepSeek-V3-UD-Q4_K_XL-0000{no}-of-00003.gguf" for no in (2, 3, 1)),
    *(f"DeepSeek-V3-Q8_0/DeepSeek-V3-Q8_0-0000{no}-of-00002.gguf" for no in (1, 2)),
    "mtp/DeepSeek-V3-eagle3-Q8_0.gguf",
)
TWO = listed("m-7b-Q4_0.gguf", "m-7b-Q8_0.gguf", "m-13b-Q4_0.gguf")


def test_the_default_is_the_quantization_of_a_plain_key() -> None:
    assert chosen(BARTOWSKI) == ["Qwen3-8B-IQ4_XS.gguf"]
    assert chosen(listed("m-Q8_0.gguf", "m-Q4_K_M.gguf", "m-f16.gguf")) == ["m-Q4_K_M.gguf"]
    assert chosen(listed("Phi-3-mini-fp16.gguf", "Phi-3-mini-q4.gguf")) == ["Phi-3-mini-q4.gguf"]
    assert chosen(listed("m.gguf")) == ["m.gguf"]


@pytest.mark.parametrize(
    "quantization", ["Q8_0", "q8_0", "Qwen3-8B-Q8_0", "qwen3-8b-q8_0.gguf"], ids=["upper", "lower", "stem", "file"]
)
def test_a_quantization_is_named_in_several_ways(quantization: str) -> None:
    assert chosen(BARTOWSKI, quantization) == ["Qwen3-8B-Q8_0.gguf"]


def test_a_model_has_all_its_shards_in_their_order() -> None:
    whole = [f"UD-Q4_K_XL/DeepSeek-V3-UD-Q4_K_XL-0000{no}-of-00003.gguf" for no in (1, 2, 3)]
    assert chosen(UNSLOTH, "UD-Q4_K_XL") == chosen(UNSLOTH, whole[0]) == chosen(UNSLOTH) == whole


def test_a_model_that_lacks_a_shard_is_not_offered() -> None:
    files = [file for file in UNSLOTH if "00003-of-00003" not in file.path]
    assert [one.name for one in quantizations(files)] == ["UD-Q2_K_XL", "Q8_0"]


def test_a_single_file_has_precedence_over_its_shards() -> None:
    files = listed("m-Q4_0-00001-of-00002.gguf", "m-Q4_0.gguf", "m-Q4_0-00002-of-00002.gguf")
    assert chosen(files) == ["m-Q4_0.gguf"]


def test_companions_and_drafts_are_not_offered() -> None:
    names = ["IQ2_M", "Q2_K", "Q3_K_M", "IQ4_XS", "Q4_K_M", "Q8_0", "BF16"]
    assert [one.name for one in quantizations(BARTOWSKI)] == names
    assert [one.name for one in quantizations(UNSLOTH)] == ["UD-Q2_K_XL", "Q8_0", "UD-Q4_K_XL"]
    assert chosen(listed("Qwen3.5-MTP-Q4_0.gguf")) == ["Qwen3.5-MTP-Q4_0.gguf"], "it is a model with draft layers"


def test_several_models_in_one_quantization_are_ambiguous() -> None:
    for quantization in ("Q4_0", None):
        with pytest.raises(InvalidValue, match=r"several models in .*Q4_0.*: m-7b-Q4_0, m-13b-Q4_0\.") as caught:
            choose(TWO, quantization)
        assert caught.value.param == "quantization"
        assert caught.value.detail["candidates"] == [
            {"quantization": "m-7b-Q4_0", "size_bytes": 1000},
            {"quantization": "m-13b-Q4_0", "size_bytes": 1002},
        ]
    assert chosen(TWO, "M-13B-Q4_0") == ["m-13b-Q4_0.gguf"]
    assert chosen(TWO, "Q8_0") == ["m-7b-Q8_0.gguf"]
    with pytest.raises(InvalidValue, match=r"several models\. .*: a, b\."):
        choose(listed("a.gguf", "b.gguf"), None)


def test_models_in_two_folders_are_told_apart_by_their_paths() -> None:
    files = listed("small/m-Q4_0.gguf", "large/m-Q4_0.gguf")
    assert chosen(files, "large/m-Q4_0") == ["large/m-Q4_0.gguf"]
    with pytest.raises(InvalidValue, match="one of: small/m-Q4_0, large/m-Q4_0"):
        choose(files, "m-Q4_0")


def test_an_absent_quantization_is_answered_with_all_others() -> None:
    with pytest.raises(InvalidValue, match=r"no model in 'Q5_0'.*: m-7b-Q4_0, Q8_0, m-13b-Q4_0"):
        choose(TWO, "Q5_0")
    with pytest.raises(InvalidValue, match="no model in ''"):
        choose(TWO, "")
    with pytest.raises(InvalidValue, match="no GGUF model") as caught:
        choose(listed("model.safetensors", "mmproj-f16.gguf"), None)
    assert caught.value.param == "model"


def test_an_error_names_a_bounded_number_of_candidates() -> None:
    with pytest.raises(InvalidValue, match="and 50 more") as caught:
        choose(listed(*(f"m{i}.gguf" for i in range(100))), None)
    assert len(str(caught.value)) < 1000
