"""The settings of models in `models.toml`: what they mean, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shared.lookup import further_names
from shared.schema.model import Model, ModelSettings, SamplingSettings
from tests.support.headers import write
from worker.catalog.catalog import Catalog
from worker.catalog.settings import FILE, InvalidSettings, applied, parsed

EVERYTHING = """
default_model = "Acme/Tiny"

[models."acme/tiny"]
aliases = ["gpt-4o-mini", "small"]
context_length = 2048
parallel = 2
kv_cache_type = "q8_0"
ttl_seconds = 600
sampling = { temperature = 0.2, top_k = 20 }
system_prompt = "Be brief."
preload = true
pin = true
"""


def model(base: str, variant: str = "", bits: float = 4.5) -> Model:
    key = f"{base}@{variant}" if variant else base
    return Model(
        key=key, base=base, variant=variant, shards=[f"{key}.gguf"], bits_per_weight=bits, max_context_length=4096
    )


TINY, OTHER = model("acme/tiny"), model("acme/other")
Q4, Q8 = model("acme/both", "q4_0", 4.5), model("acme/both", "q8_0", 8.5)


def settings(text: str, *models: Model) -> dict[str, ModelSettings]:
    """Return the settings by key.  There must be no problem."""
    found, problems = applied(parsed(text.encode()), models)
    assert problems == []
    return {one.key: one.settings for one in found}


def problems(text: str, *models: Model) -> list[str]:
    return applied(parsed(text.encode()), models)[1]


def test_all_settings_of_a_model_are_read() -> None:
    assert settings(EVERYTHING, TINY, OTHER) == {
        "acme/tiny": ModelSettings(
            aliases=["gpt-4o-mini", "small"],
            is_default=True,
            context_length=2048,
            parallel=2,
            kv_cache_type="q8_0",
            ttl_seconds=600.0,
            sampling=SamplingSettings(temperature=0.2, top_k=20),
            system_prompt="Be brief.",
            preload=True,
            pin=True,
        ),
        "acme/other": ModelSettings(),
    }


def test_names_are_compared_as_those_of_requests() -> None:
    assert settings('[models."ACME/Tiny-GGUF"]\npin = true', TINY)["acme/tiny"].pin


def test_a_plain_key_means_all_quantizations() -> None:
    text = """
        default_model = "acme/both"
        [models."acme/both"]
        aliases = ["both"]
        preload = true
        context_length = 1024
        sampling = { top_k = 1, top_p = 0.5 }
        [models."acme/both@q8_0"]
        aliases = ["large"]
        context_length = 512
        sampling = { top_k = 2 }
    """
    found = settings(text, Q4, Q8)
    q4, q8 = found["acme/both@q4_0"], found["acme/both@q8_0"]
    assert (q4.context_length, q4.preload, q4.is_default) == (1024, True, True)
    assert (q8.context_length, q8.preload, q8.is_default) == (512, False, False)
    assert q8.sampling == SamplingSettings(top_k=2, top_p=0.5)
    models, _ = applied(parsed(text.encode()), [Q4, Q8])
    assert further_names(models) == {"both": "acme/both", "large": "acme/both@q8_0", "": "acme/both"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("default = 'x'", "default: unknown key; expected one of default_model, models"),
        ("default_model = 1", "default_model: expected a string"),
        ("[models.tiny]\ncontxt = 1", 'models."tiny".contxt: unknown key; expected one of aliases, context_length'),
        ("[models.tiny]\nis_default = true", 'models."tiny".is_default: unknown key'),
        ("[models.tiny.sampling]\ntemp = 1", 'models."tiny".sampling.temp: unknown key; expected one of frequency_p'),
        ("[models.tiny]\ncontext_length = '1'", 'models."tiny".context_length: expected `int | null`, got `str`'),
        ("[models.tiny]\naliases = [1]", 'models."tiny".aliases[0]: expected `str`, got `int`'),
        ("[models.tiny.sampling]\ntop_p = 2", 'models."tiny".sampling.top_p: expected `float` <= 1.0'),
        ("[models.tiny]\nsampling = 3", 'models."tiny".sampling: expected `object`, got `int`'),
        ("[models]\ntiny = 3", 'models."tiny": expected a table'),
        ("models = 3", 'models: expected tables such as [models."publisher/name"]'),
        ("[models.tiny]\npin = yes", "Invalid value (at line 2, column 7)"),
        ("x = " + "[" * 100_000, ""),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str) -> None:
    with pytest.raises(InvalidSettings) as raised:
        parsed(text.encode())
    assert str(raised.value).startswith(message)


def test_a_file_that_is_not_utf8_is_refused() -> None:
    with pytest.raises(InvalidSettings, match="not UTF-8"):
        parsed(b"\xff")


def test_settings_that_fit_no_model_are_reported() -> None:
    text = """
        default_model = "acme/none"
        [models."acme/tiny"]
        aliases = ["acme/other", "a"]
        context_length = 8192
        pin = true
        [models."acme/other"]
        aliases = ["A"]
        [models."acme/gone"]
        [models."ACME/TINY"]
    """
    assert problems(text, TINY, OTHER) == [
        "models.\"acme/tiny\".aliases: 'acme/other' is the name of a model",
        "models.\"acme/other\".aliases: 'A' is an alias of another model too",
        'models."acme/gone": there is no such model',
        'models."ACME/TINY": another table is for the same model',
        "default_model: there is no model 'acme/none'",
        'models."acme/tiny".context_length: the maximum of the model is 4096',
    ]
    (tiny, other), _ = applied(parsed(text.encode()), [TINY, OTHER])
    assert tiny.settings == ModelSettings(aliases=["a"], pin=True)
    assert other.settings == ModelSettings()


def test_the_default_model_may_be_named_by_an_alias() -> None:
    assert settings('default_model = "T"\n[models."acme/tiny"]\naliases = ["t"]', TINY)["acme/tiny"].is_default


# ---- the file


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write(tmp_path / "models/acme/tiny/tiny.gguf")
    return tmp_path / "models"


def change(path: Path, text: str) -> None:
    new = path.with_suffix(".new")
    new.write_text(text)
    new.replace(path)


def test_an_invalid_file_keeps_the_last_settings_and_is_reported(root: Path) -> None:
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    assert catalog.listed().problems == []
    change(root / FILE, '[models."acme/tiny"]\npin = true')
    assert catalog.look()
    assert catalog.models()[0].settings.pin
    change(root / FILE, '[models."acme/tiny"]\npin = 1')
    assert catalog.look()
    listed = catalog.listed()
    assert listed.models[0].settings.pin
    assert listed.problems == ['models.toml: models."acme/tiny".pin: expected `bool`, got `int`']
    assert not catalog.look()
    change(root / FILE, "")
    assert catalog.look()
    listed = catalog.listed()
    assert (listed.models[0].settings, listed.problems) == (ModelSettings(), [])


def test_a_removed_file_ends_its_settings(root: Path) -> None:
    change(root / FILE, '[models."acme/tiny"]\npin = true')
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    (root / FILE).unlink()
    assert catalog.look()
    assert not catalog.models()[0].settings.pin


@pytest.mark.parametrize("kind", ["fifo", "folder", "large"])
def test_what_is_no_file_of_settings_is_reported(root: Path, kind: str) -> None:
    if kind == "fifo":
        os.mkfifo(root / FILE)
    elif kind == "folder":
        (root / FILE).mkdir()
    else:
        (root / FILE).write_bytes(b"#" * (2 << 20))
    catalog = Catalog([root], root.parent / "cache")
    catalog.look()
    assert [problem.partition(":")[0] for problem in catalog.listed().problems] == [FILE]
