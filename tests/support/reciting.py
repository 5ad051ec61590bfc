"""Models that recite a text: after any prompt, each token of it is the most probable one, and then the end.

They have real templates and a real engine, and nothing is left to chance.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from shared.synthetic import models, tokenizers
from shared.synthetic.architectures import TINY, Model, decoder

PIECE = 3  # characters of a token; more where they come twice
MARKER = "[THEN]"
STRONG = 10.0  # weight that makes a token certain


def reciting(
    path: Path,
    text: str,
    template: str,
    *,
    special: Collection[str] = (),
    after: str = "",
    then: str = "",
    metadata: dict[str, Any] | None = None,
) -> Path:
    """Write a model that recites a text.

    `special`: texts that are control tokens, unless they come twice.  `after`: the end of all prompts.  `then`: another
    text, which it recites after prompts that end with MARKER.
    """
    vocabulary: dict[str, Any] = tokenizers.bpe()
    known: list[str] = list(vocabulary["tokenizer.ggml.tokens"])
    kinds: list[int] = list(vocabulary["tokenizer.ggml.token_type"])
    first = len(known)
    chains = [_pieces(text, special, after), _pieces(then, special, after)]
    pieces = [*chains[0], MARKER, *chains[1]]
    assert len({*pieces}) == len(pieces), "the texts have a piece in common"
    known += pieces
    controls = {*special, MARKER}
    kinds += [tokenizers.CONTROL if piece in controls else tokenizers.USER_DEFINED for piece in pieces]
    padding = -len(known) % 32
    vocabulary["tokenizer.ggml.tokens"] = known + [f"[MORE{i}]" for i in range(padding)]
    vocabulary["tokenizer.ggml.token_type"] = kinds + [tokenizers.UNUSED] * padding
    vocabulary["tokenizer.chat_template"] = template
    n_embd = -(-(len(pieces) + 1) // 32) * 32
    made = decoder(replace(TINY, block_count=1, embedding_length=n_embd), vocabulary, "F32")
    models._write_one(path, models._model(Model(*made), path.stem, "F32"), metadata)
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path, "r+").tensors}
    for name, weight in weights.items():
        weight[:] = name.endswith("norm.weight")
    weights["token_embd.weight"][:, 0] = 1
    for i in range(len(pieces)):
        weights["token_embd.weight"][first + i] = np.eye(n_embd)[i + 1]
        if pieces[i] != MARKER:  # which begins the other text
            weights["output.weight"][first + i, i] = STRONG
    for last in (len(chains[0]), len(pieces)):
        weights["output.weight"][vocabulary["tokenizer.ggml.eos_token_id"], last] = STRONG
    return path


def _pieces(text: str, special: Collection[str], after: str) -> list[str]:
    """Divide a text into pieces that occur in it once, so that there is no other way to tokenize it, and that do not
    end the prompt."""
    pieces: list[str] = []
    start = 0
    while start < len(text):
        end = start + PIECE
        for each in special:
            if text.startswith(each, start) and text.count(each) == 1:
                end = start + len(each)
            elif start < text.find(each) < end and text.count(each) == 1:
                end = text.find(each)
        while end < len(text) and (text.count(text[start:end]) > 1 or after.endswith(text[start:end])):
            end += 1
        pieces.append(text[start:end])
        if text.count(pieces[-1]) > 1 or len(pieces[-1]) == 1:  # the end
            pieces[-2:] = ["".join(pieces[-2:])]
        start = end
    return pieces
