"""The files that every subject loads: random weights, real sizes, written once and kept in bench/out/models."""

from __future__ import annotations

from pathlib import Path

from msgspec import Struct

from bench.__main__ import BIG, MODELS, Q4_0, TINY, WIDE, path_of, written_big, written_q4_0, written_wide
from shared.synthetic import models as synthetic

SHARDED = "loadstone/bench-sharded"
SHARDS = 3


class Model(Struct, frozen=True, kw_only=True):
    """`shards` are all files of it, the first one that which is opened."""

    key: str
    title: str
    shards: list[Path]

    @property
    def is_tiny(self) -> bool:
        return self.key == TINY

    @property
    def is_repackable(self) -> bool:
        """Whether llama.cpp, left alone, would turn its weights into another form while it loads."""
        return self.key == Q4_0

    @property
    def n_bytes(self) -> int:
        return sum(shard.stat().st_size for shard in self.shards)


def models() -> list[Model]:
    """All of them, and those that an earlier run did not leave are written now."""
    synthetic.tiny_llama(path_of(TINY))
    big = written_big()
    q4_0 = written_q4_0()
    wide = written_wide()
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
