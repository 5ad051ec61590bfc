"""Small but real tokenizers, as the `tokenizer.*` metadata of a GGUF file.

Keys and numbers of token types: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md#tokenizer
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import islice, product
from string import ascii_lowercase

Value = bool | int | float | str | Sequence[str] | Sequence[int] | Sequence[float]
Metadata = Mapping[str, Value]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6  # kinds of token

WORDS = tuple(
    re.findall(
        r"\w+",
        "the of and to in is was for that it on as with he be by at this had not are but from or have an they which "
        "one you were all there would their we when who will more no if out so said what up about into than can only "
        "other new some time Hello World user assistant system model load token",
    )
)
SPACE = "\u2581"  # marks the start of a word in SentencePiece and in the WordPiece of llama.cpp

CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}assistant:"
CHAT_WITH_TOOLS = (
    "{% if tools %}<|im_start|>system\n# Tools\n{% for tool in tools %}{{ tool | tojson }}\n{% endfor %}"
    'Answer with <tool_call>{"name": ..., "arguments": ...}</tool_call>.<|im_end|>\n{% endif %}'
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def spm(n_tokens: int = 0) -> dict[str, Value]:
    """Return a SentencePiece tokenizer: all bytes, ASCII and the prefixes of WORDS, padded to `n_tokens` tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256
    prefixes = [prefix for word in WORDS for prefix in _prefixes(SPACE + word)]
    pieces = [*dict.fromkeys([*prefixes, SPACE, *map(chr, range(0x21, 0x7F))])]
    pieces += _filler(f"{SPACE}filler", n_tokens, len(tokens) + len(pieces))
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens + pieces,
        "tokenizer.ggml.scores": [0.0] * len(tokens) + [-float(rank) for rank in range(1, len(pieces) + 1)],
        "tokenizer.ggml.token_type": kinds + [NORMAL] * len(pieces),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": False,
        "tokenizer.chat_template": CHAT,
    }


def bpe(n_tokens: int = 0) -> dict[str, Value]:
    """Return a byte-level BPE tokenizer like that of Qwen: all bytes, the merges of WORDS, and three control tokens.

    A larger `n_tokens` adds merges of letters into pairs and of pairs into fours (up to 457,000), so that the header
    has about as many merges as tokens, like the headers of real models.
    """
    tokens = dict.fromkeys(_byte_letters())
    merges: list[str] = []

    def merge(left: str, right: str) -> None:
        if left + right not in tokens:
            tokens[left + right] = None
            merges.append(f"{left} {right}")

    for word in WORDS:
        for prefix in _prefixes("\u0120" + word):  # a space, in the byte encoding of GPT-2
            merge(prefix[:-1], prefix[-1])
    control = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    pairs = [a + b for a, b in product(ascii_lowercase, repeat=2)]
    more = [*product(ascii_lowercase, repeat=2), *islice(product(pairs, repeat=2), n_tokens)] if n_tokens else []
    for left, right in more:
        if len(tokens) + len(control) >= n_tokens:
            break
        merge(left, right)
    first_control = len(tokens)
    padding = _filler("[PAD", n_tokens, first_control + len(control))
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": [*tokens, *control, *padding],
        "tokenizer.ggml.token_type": [NORMAL] * first_control + [CONTROL] * len(control) + [UNUSED] * len(padding),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": first_control,
        "tokenizer.ggml.eos_token_id": first_control + 2,
        "tokenizer.ggml.padding_token_id": first_control,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_WITH_TOOLS,
    }


def wordpiece(n_tokens: int = 0) -> dict[str, Value]:
    """Return a WordPiece tokenizer like that of BERT, padded to `n_tokens` tokens.

    It has five control tokens, lower-case letters at the start of and inside a word, and WORDS.
    """
    control = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(code) for code in range(0x21, 0x7F) if not chr(code).isupper()]
    whole_words = [SPACE + word.lower() for word in WORDS]
    pieces = [*dict.fromkeys([*(SPACE + letter for letter in letters), *letters, *whole_words])]
    unused = _filler("[unused", n_tokens, len(control) + len(pieces))
    return {
        "tokenizer.ggml.model": "bert",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": [*control, *pieces, *unused],
        "tokenizer.ggml.token_type": [
            *(UNKNOWN if token == "[UNK]" else CONTROL for token in control),  # noqa: S105 - no password
            *([NORMAL] * len(pieces)),
            *([UNUSED] * len(unused)),
        ],
        "tokenizer.ggml.token_type_count": 2,
        "tokenizer.ggml.padding_token_id": 0,
        "tokenizer.ggml.unknown_token_id": 1,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.cls_token_id": 2,
        "tokenizer.ggml.eos_token_id": 3,
        "tokenizer.ggml.seperator_token_id": 3,  # spelled like this in the format
        "tokenizer.ggml.mask_token_id": 4,
    }


def n_tokens(tokenizer: Metadata) -> int:
    tokens = tokenizer["tokenizer.ggml.tokens"]
    assert isinstance(tokens, Sequence)
    return len(tokens)


def _prefixes(word: str) -> list[str]:
    """Return the prefixes of a word from two letters up; each is one merge longer than the previous one."""
    return [word[:end] for end in range(2, len(word) + 1)]


def _filler(stem: str, n_tokens: int, have: int) -> list[str]:
    """Return the tokens that pad `have` tokens to `n_tokens`, or if that is 0, to the next multiple of 32."""
    end = "]" if stem.startswith("[") else ""
    return [f"{stem}{number}{end}" for number in range(n_tokens - have if n_tokens else -have % 32)]


def _byte_letters() -> list[str]:
    """Return the printable letter for each byte, as in GPT-2's `bytes_to_unicode`."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(0x100, 0x200))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
