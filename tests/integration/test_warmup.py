"""The warm-up of a load in the real engine."""

from __future__ import annotations

from pathlib import Path

from shared.memory.plan import plan
from shared.schema.http import LoadRequest
from shared.settings import Settings
from shared.synthetic.models import tiny_bert, tiny_embedding, tiny_llama, tiny_moe
from tests.integration.conftest import catalog
from tests.support.noalloc import load
from tests.support.warmup import WarmedUp, warmed_up

KINDS = {"llama": tiny_llama, "moe": tiny_moe, "bert": tiny_bert, "embedding": tiny_embedding}


def test_the_warm_up_evaluates_a_token_and_empties_the_cache(tmp_path: Path) -> None:
    loads = []
    for name, write in KINDS.items():
        write(tmp_path / f"m/p/{name}/m.gguf")
    models = catalog(tmp_path / "m", tmp_path / "catalog")
    for name in KINDS:
        model = models[f"p/{name}"]
        planned = plan(LoadRequest(model=model.key), model, Settings())
        loads.append(load([tmp_path / "m" / shard for shard in model.shards], planned, []))
    assert dict(zip(KINDS, warmed_up(loads), strict=True)) == dict.fromkeys(KINDS, WarmedUp(True, 0))
