"""The names of repositories that clients write."""

from __future__ import annotations

import pytest

from shared.repository import Repository, parsed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Acme/Big-GGUF", Repository("Acme/Big-GGUF")),
        ("acme/big@q4_k_m", Repository("acme/big", "q4_k_m")),
        ("hf://acme/big", Repository("acme/big")),
        ("hf://acme/big@Q8_0", Repository("acme/big", "Q8_0")),
        (
            "hf://acme/big/Q8_0/big-Q8_0-00001-of-00002.gguf",
            Repository("acme/big", "Q8_0/big-Q8_0-00001-of-00002.gguf"),
        ),
        ("https://huggingface.co/acme/big", Repository("acme/big")),
        ("https://huggingface.co/acme/big/tree/main", Repository("acme/big")),
        ("https://hf.co/acme/big/blob/main/big-Q8_0.gguf", Repository("acme/big", "big-Q8_0.gguf")),
        ("https://hf.co/acme/big/resolve/main/sub/b.gguf?download=true", Repository("acme/big", "sub/b.gguf")),
    ],
)
def test_a_repository_is_named_in_several_ways(text: str, expected: Repository) -> None:
    assert parsed(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "big",
        "a/b/c",
        "../big",
        "acme/..",
        "acme/big@",
        "acme/big@a/b",
        "acme/big\n",
        "acme/big?x",
        "hf://acme/big/readme.md",
        "http://huggingface.co/acme/big",
        "https://example.org/acme/big",
        "https://huggingface.co@example.org/acme/big",
    ],
)
def test_other_names_are_those_of_no_repository(text: str) -> None:
    assert parsed(text) is None
