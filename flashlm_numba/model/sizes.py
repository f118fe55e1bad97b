"""Sizes of a model, from the shapes of its arrays: parameters by part, packed bytes, and bytes of a decoding state.

Nothing here allocates a model. A "part" is embedding, mixer, glu, norms, router, ngram_copy or head.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING

from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.mixers import MIXERS
from flashlm_numba.model.parameters import EMBEDDING, ternary_names
from flashlm_numba.model.rounded_rows import rows_bytes

if TYPE_CHECKING:
    from flashlm_numba.data.tokenizer import Vocabulary
    from flashlm_numba.model.model import Model

Shapes = Mapping[str, tuple[int, ...]]  # shape of each parameter, by name
PER_BYTE = 4  # ternary weights in a byte of a device's memory; a file stores five


def parameters_by_part(shapes: Shapes) -> dict[str, int]:
    """Number of parameters of each part, in the order of the parameters."""
    parts: dict[str, int] = {}
    for name, shape in shapes.items():
        names = name.split(".")
        part = names[2] if names[0] == "blocks" else names[0]
        part = "norms" if part in ("norm1", "norm2", "final_norm") else "mixer" if part == "lower_bounds" else part
        parts[part] = parts.get(part, 0) + math.prod(shape)
    return parts


def packed_bytes(shapes: Shapes, ternary: Collection[str], rows: str = "int8") -> int:
    """Bytes of the weights and their scales on a device: 2 bits per ternary weight, 4 bytes per other weight.

    ternary : names of the ternary matrices, whose rows begin at whole bytes
    rows : arithmetic of the embedding's rows, in ROWS
    """
    total = 0
    for name, shape in shapes.items():
        if name in ternary:
            total += shape[0] * -(-shape[1] // PER_BYTE)
        elif name == EMBEDDING:
            total += rows_bytes(shape[0], shape[1], rows)
        elif not name.startswith("router."):  # nothing reads it
            total += 4 * math.prod(shape)
    return total


def tokenizer_bytes(tokens: Collection[bytes]) -> int:
    """Bytes of tables that encode and decode: each token's bytes, where they begin, and the two ids that merge to it.

    tokens : the bytes of each token, by id
    """
    ids = 2 if len(tokens) <= 1 << 16 else 4
    return sum(map(len, tokens)) + len(tokens) * (4 + 2 * ids)


def state_bytes(config: ModelConfig) -> int:
    """Bytes of decoding one text in int8: what a text leaves behind, the working memory of a token, and its logits."""
    ids = 2 if config.vocab_size <= 1 << 16 else 4
    layers = config.n_blocks * config.n_passes
    orders = config.ngram_copy_orders
    history = ids * (config.ngram_copy_reach + max(orders)) if orders else 0
    # x, the input of the mixer and of the GLU, a product's result; gate and up; the rounded input of a product
    working = 4 * (4 * config.dim + 2 * config.ffn_dim) + max(config.dim, config.ffn_dim)
    return layers * MIXERS[config.mixer].state_bytes(config) + history + working + 4 * config.vocab_size


def device_bytes(model: Model, vocabulary: Vocabulary, rows: str = "int8") -> dict[str, int]:
    """What a model takes on a device: its packed weights with the head's arrays, the tokenizer, a decoding state.

    rows : arithmetic of the embedding's rows, in ROWS
    """
    shapes = {name: value.shape for name, value in model.parameters.items()}
    head = sum(value.nbytes for value in model.head.constants().values())
    return {
        "packed": packed_bytes(shapes, [*ternary_names(model.config), *model.head_ternary_names], rows) + head,
        "tokenizer_tables": tokenizer_bytes(vocabulary.token_bytes),
        "decoding_state_int8": state_bytes(model.config),
    }


def in_units(size: float) -> str:
    """A number of bytes as a person reads it.

    >>> in_units(216_800), in_units(13_270_000), in_units(2.5e9)
    ('217 KB', '13.3 MB', '2.50 GB')
    """
    if size < 1e6:
        return f"{size / 1e3:,.0f} KB"
    return f"{size / 1e6:,.1f} MB" if size < 1e9 else f"{size / 1e9:,.2f} GB"


def in_words(sizes: Mapping[str, int]) -> str:
    """Names and numbers on one line."""
    return ", ".join(f"{name} {size:,}" for name, size in sizes.items())
