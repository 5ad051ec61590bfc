"""The real models in the bare engine: a failure here is the fault of a file or of the engine, not of Loadstone."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

FIRST_TOKEN = """
model = Llama(path, n_ctx=256, verbose=False)
print(json.dumps(model("The capital of France is", max_tokens=1, temperature=0)["choices"][0]["text"]))
"""
EMBEDDINGS = """
model = Llama(path, n_ctx=512, embedding=True, verbose=False)
tokens = model.tokenize(b"Hello world")
print(json.dumps([tokens, model.embed(json.loads(sys.argv[2]), normalize=True)]))
"""


def ask(code: str, *arguments: str) -> Any:
    """Run code that uses llama-cpp-python in a process of its own."""
    imports = "import json, sys\nfrom llama_cpp import Llama\npath = sys.argv[1]\n"
    done = subprocess.run(
        [sys.executable, "-c", imports + code, *arguments], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def test_smollm2_decodes_the_expected_first_token(smollm2: Path) -> None:
    assert ask(FIRST_TOKEN, str(smollm2)) == " Paris"


def test_minilm_embeds_a_paraphrase_near_its_sentence(minilm: Path) -> None:
    sentences = ["A man is eating food.", "A man eats something.", "Stock prices fell sharply today."]
    tokens, (sentence, paraphrase, other) = ask(EMBEDDINGS, str(minilm), json.dumps(sentences))
    assert tokens == [101, 7592, 2088, 102]  # as the tokenizer of the original model has them
    assert cosine(sentence, paraphrase) > 0.8
    assert cosine(sentence, other) < 0.2


def cosine(one: list[float], other: list[float]) -> float:
    """Return the cosine of the angle between two vectors of length 1."""
    return sum(a * b for a, b in zip(one, other, strict=True))
