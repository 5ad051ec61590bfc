"""The model that runners practise with is the one that the generator writes."""

from __future__ import annotations

from pathlib import Path

import worker
from shared import synthetic


def test_it_can_be_made_again(tmp_path: Path) -> None:
    kept = Path(worker.__file__).with_name("practice.gguf")
    assert synthetic.practice(tmp_path / "practice.gguf").read_bytes() == kept.read_bytes()
