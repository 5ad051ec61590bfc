"""The models that every subject loads: random weights and real sizes, kept in bench/out/models."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from bench.__main__ import BIG, MODELS, Q4_0, TINY, WIDE, path_of, write_big, write_q4_0, write_wide
from shared.synthetic import models as synthetic

SHARDED = "loadstone/bench-sharded"
SHARDS = 3


class Model(Struct, frozen=True, kw_only=True):
    """A model; the first of its `shards` is the file to open."""

    key: str
    title: str
    shards: list[Path]

    @property
    def is_tiny(self) -> bool:
        return self.key == TINY

    @property
    def is_repackable(self) -> bool:
        """Return whether llama.cpp repacks its weights by default."""
        return self.key == Q4_0

    @property
    def n_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def models() -> list[Model]:
    """Return all models; write those that no earlier run has written."""
    synthetic.tiny_llama(path_of(TINY))
    big = write_big()
    q4_0 = write_q4_0()
    wide = write_wide()
    if len(shards := _shards()) != SHARDS:
        shards = synthetic.big(path_of(SHARDED), 2, shards=SHARDS)
    return [
        Model(key=TINY, title="tiny", shards=[path_of(TINY)]),
        Model(key=BIG, title="2 GB Q8_0", shards=[big]),
        Model(key=Q4_0, title="2 GB Q4_0", shards=[q4_0]),
        Model(key=WIDE, title="4 GB Q8_0, 150k BPE", shards=[wide]),
        Model(key=SHARDED, title=f"2 GB Q8_0, {SHARDS} shards", shards=shards),
    ]


def _shards() -> list[Path]:
    return sorted((MODELS / SHARDED).glob("*-of-*.gguf"))
