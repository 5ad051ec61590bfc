"""The committed model for prewarming runners equals the output of the generator."""

from __future__ import annotations

from pathlib import Path

from shared.synthetic import models as synthetic

KEPT = Path(__file__).parents[2] / "worker/engine/prewarm.gguf"


def test_the_prewarm_model_can_be_regenerated(tmp_path: Path) -> None:
    assert synthetic.prewarm(tmp_path / "prewarm.gguf").read_bytes() == KEPT.read_bytes()
