"""The model with which runners prewarm is the one that the generator writes."""

from __future__ import annotations

from pathlib import Path

from shared.synthetic import models as synthetic

KEPT = Path(__file__).parents[2] / "worker/engine/prewarm.gguf"


def test_it_can_be_made_again(tmp_path: Path) -> None:
    assert synthetic.prewarm(tmp_path / "prewarm.gguf").read_bytes() == KEPT.read_bytes()
