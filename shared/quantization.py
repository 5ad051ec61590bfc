"""Names of quantizations, such as `Q4_K_M`, `IQ2_XXS` and `MXFP4`, and their sizes."""

from __future__ import annotations

import re
from collections.abc import Mapping

GUESSED = 1024  # flag in general.file_type: the type was guessed (llama.h, enum llama_ftype)

# general.file_type -> name (llama.h, enum llama_ftype).
FILE_TYPES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    7: "Q8_0",
    8: "Q5_0",
    9: "Q5_1",
    10: "Q2_K",
    11: "Q3_K_S",
    12: "Q3_K_M",
    13: "Q3_K_L",
    14: "Q4_K_S",
    15: "Q4_K_M",
    16: "Q5_K_S",
    17: "Q5_K_M",
    18: "Q6_K",
    19: "IQ2_XXS",
    20: "IQ2_XS",
    21: "Q2_K_S",
    22: "IQ3_XS",
    23: "IQ3_XXS",
    24: "IQ1_S",
    25: "IQ4_NL",
    26: "IQ3_S",
    27: "IQ3_M",
    28: "IQ2_S",
    29: "IQ2_M",
    30: "IQ4_XS",
    31: "IQ1_M",
    32: "BF16",
    36: "TQ1_0",
    37: "TQ2_0",
    38: "MXFP4",
    39: "NVFP4",
    40: "Q1_0",
    41: "Q2_0",
}

# Tensor type -> (elements, bytes) of one block: ggml.h's enum ggml_type, ggml-common.h's block structs.
BLOCKS = {
    0: (1, 4),  # F32
    1: (1, 2),  # F16
    2: (32, 18),  # Q4_0
    3: (32, 20),  # Q4_1
    6: (32, 22),  # Q5_0
    7: (32, 24),  # Q5_1
    8: (32, 34),  # Q8_0
    9: (32, 36),  # Q8_1
    10: (256, 84),  # Q2_K
    11: (256, 110),  # Q3_K
    12: (256, 144),  # Q4_K
    13: (256, 176),  # Q5_K
    14: (256, 210),  # Q6_K
    15: (256, 292),  # Q8_K
    16: (256, 66),  # IQ2_XXS
    17: (256, 74),  # IQ2_XS
    18: (256, 98),  # IQ3_XXS
    19: (256, 50),  # IQ1_S
    20: (32, 18),  # IQ4_NL
    21: (256, 110),  # IQ3_S
    22: (256, 82),  # IQ2_S
    23: (256, 136),  # IQ4_XS
    24: (1, 1),  # I8
    25: (1, 2),  # I16
    26: (1, 4),  # I32
    27: (1, 8),  # I64
    28: (1, 8),  # F64
    29: (256, 56),  # IQ1_M
    30: (1, 2),  # BF16
    34: (256, 54),  # TQ1_0
    35: (256, 66),  # TQ2_0
    39: (32, 17),  # MXFP4
    40: (64, 36),  # NVFP4
    41: (128, 18),  # Q1_0
    42: (64, 18),  # Q2_0
}

# Tensor type -> name of a file that consists of it (src/llama-model-loader.cpp, "determine file type").  Types of
# intermediate results and of indices are no quantization.
NAMES = {
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K_M",
    12: "Q4_K_M",
    13: "Q5_K_M",
    14: "Q6_K",
    16: "IQ2_XXS",
    17: "IQ2_XS",
    18: "IQ3_XXS",
    19: "IQ1_S",
    20: "IQ4_NL",
    21: "IQ3_S",
    22: "IQ2_S",
    23: "IQ4_XS",
    29: "IQ1_M",
    30: "BF16",
    34: "TQ1_0",
    35: "TQ2_0",
    39: "MXFP4",
    40: "NVFP4",
    41: "Q1_0",
    42: "Q2_0",
}

# Bits per weight of an 8B model, from llama.cpp (tools/quantize/README.md), or of a block.  The digit in a name is less
# exact.
NOMINAL_BITS = {
    "Q1_0": 1.13,
    "TQ1_0": 1.69,
    "TQ2_0": 2.06,
    "Q2_0": 2.25,
    "Q4_1": 5.00,
    "Q5_1": 6.00,
    "IQ1_S": 2.00,
    "IQ1_M": 2.15,
    "IQ2_XXS": 2.38,
    "IQ2_XS": 2.59,
    "IQ2_S": 2.74,
    "IQ2_M": 2.93,
    "IQ3_XXS": 3.25,
    "IQ3_XS": 3.50,
    "IQ3_S": 3.66,
    "IQ3_M": 3.76,
    "IQ4_XS": 4.46,
    "IQ4_NL": 4.68,
    "MXFP4": 4.25,
    "MXFP4_MOE": 4.25,
    "Q2_K_S": 2.97,
    "Q2_K": 3.16,
    "Q3_K_S": 3.64,
    "Q3_K_M": 4.00,
    "Q3_K_L": 4.30,
    "Q4_K_S": 4.67,
    "Q4_K_M": 4.89,
    "Q5_K_S": 5.57,
    "Q5_K_M": 5.70,
    "Q6_K": 6.56,
}

TAG = re.compile(
    r"""(?<![a-z0-9])
    ( (?:ud-)? (?: i?q[1-8]_(?:[01]|k|xxs|xs|s|m|l|xl|nl|ks|kt|kss|kl)(?:_(?:xxs|xs|s|m|l|xl|xxl|p|[48]))*
                 | tq[12]_0 | mxfp4(?:_moe)? | nvfp4 )
      | bf16 | fp?16 | fp?32 )
    (?![a-z0-9])""",
    re.IGNORECASE | re.VERBOSE,
)


def tag(stem: str) -> str:
    """Return the last quantization in a file name, in lower case; "" if there is none."""
    tags = TAG.findall(stem)
    return tags[-1].lower() if tags else ""


def by_file_type(file_type: int) -> str | None:
    return FILE_TYPES.get(file_type & ~GUESSED)


def by_tensors(matrices: Mapping[int, int]) -> str | None:
    """Guess the quantization of a model from the numbers of its matrices by tensor type: the most frequent one.

    llama.cpp guesses in the same way, but also counts vectors, which are never quantized.
    """
    return NAMES.get(max(matrices, key=lambda kind: matrices[kind], default=-1))


def nominal_bits(name: str) -> float | None:
    """Estimate the bits per weight of a quantization from its name or tag; None if the name has no number."""
    name = name.upper().removeprefix("UD-")
    if name in NOMINAL_BITS:
        return NOMINAL_BITS[name]
    digits = re.search(r"\d+", name)
    if digits is None:
        return None
    bits = float(digits[0])
    return bits if bits >= 16 else bits + 0.5
