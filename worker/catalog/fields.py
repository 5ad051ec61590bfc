"""Typed access to the metadata of a file."""

from __future__ import annotations

from shared.schema.model import PerBlock
from worker.catalog.gguf import Scalar, Value

MAX_LENGTH = 2**20  # the largest dimension that a memory estimate uses; no known model comes near
MAX_TEXT = 2000  # characters of a name or a description that are published
MAX_SHOWN = 40  # characters of a value in a sentence


class Fields:
    """The metadata of a file.  A value of another type counts as absent; llama.cpp reports it in a load."""

    def __init__(self, metadata: dict[str, Value]) -> None:
        self._metadata = metadata

    def text(self, key: str) -> str:
        value = self._metadata.get(key)
        return value[:MAX_TEXT] if isinstance(value, str) else ""

    def number(self, key: str, absent: int) -> int:
        """Return an integer; of an array with one per layer, the largest."""
        value = self._metadata.get(key)
        values: list[Scalar] = value if isinstance(value, list) else [absent if value is None else value]
        return max((v for v in values if isinstance(v, int)), default=absent)

    def length(self, key: str, absent: int = 0) -> int:
        """Return a dimension; of an array, the largest.  Returns `absent` also if the value is out of range."""
        value = self.number(key, absent)
        return value if 0 <= value <= MAX_LENGTH else absent

    def lengths(self, key: str, blocks: int, absent: PerBlock = 0) -> PerBlock:
        """Return a dimension for each block, or one for all.  Returns `absent` also if a value is out of range."""
        value = self._metadata.get(key)
        values = value[:blocks] if isinstance(value, list) else [value]
        valid = [v for v in values if isinstance(v, int) and 0 <= v <= MAX_LENGTH]
        if len(valid) != (blocks if isinstance(value, list) else 1):
            return absent
        return valid if isinstance(value, list) else valid[0]

    def integers(self, key: str) -> list[int]:
        """Return an integer, or those of an array; none if there is another value."""
        value = self._metadata.get(key)
        values: list[Scalar] = value if isinstance(value, list) else [] if value is None else [value]
        return [v for v in values if isinstance(v, int)]

    def real(self, key: str) -> float | None:
        value = self._metadata.get(key)
        return value if isinstance(value, float) else None

    def flag(self, key: str, absent: bool) -> bool:
        value = self._metadata.get(key)
        return value if isinstance(value, bool) else absent

    def has(self, key: str) -> bool:
        return key in self._metadata

    def is_integer(self, key: str) -> bool:
        """Return whether there is an integer, or an array of integers."""
        value = self._metadata.get(key)
        values = value if isinstance(value, list) else [value]
        return all(isinstance(v, int) for v in values)

    def shown(self, key: str) -> str:
        """Format a value for a sentence."""
        return repr(self._metadata.get(key))[:MAX_SHOWN]
