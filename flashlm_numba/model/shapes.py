"""SHAPES: named model shapes, the values of `--model`; and the sizes in memory that the small ones promise.

>>> SHAPES["v3"].ffn_dim, SHAPES["nano"].dim
(683, 96)
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import NamedTuple

from flashlm_numba.model.config import ModelConfig

_V3 = ModelConfig()  # FlashLM v3 exactly: 13,555,969 parameters
# the MatMul-free LM in the size of FlashLM v3, with a head of its own; the GLU's width is the multiple of 256 that the
# authors' rule gives
_MMF = ModelConfig(dim=128, ffn_dim=512, mixer="mlgru", linear="bitlinear", n_blocks=3, n_passes=1)
_DEFAULT = replace(
    _V3,
    # about fan_in**-0.5 for each ternary matrix in the branch
    mixer_residual_scale=2**-4,
    ffn_residual_scale=2**-18,
    leaky_decay=0.98,
    ternary_threshold=0.5,
    activations="int8",
    ngram_copy_orders=(1, 1, 1, 2, 2, 3),
    ngram_copy_output="mixture",
)


def _small(dim: int, ffn_dim: int, groups: int, dilations: tuple[int, ...], scales: tuple[float, float]) -> ModelConfig:
    """The default shape with other widths, and residual scales that fit them. scales : of the mixer and of the GLU"""
    mixer, ffn = scales
    narrow = replace(_DEFAULT, dim=dim, ffn_dim=ffn_dim, groups=groups, dilations=dilations)
    return replace(narrow, mixer_residual_scale=mixer, ffn_residual_scale=ffn)


def _paper(dim: int, n_blocks: int) -> ModelConfig:
    """A published MatMul-free LM. As in the authors' code, its GLU is the first multiple of 256 from 8/3 of dim on."""
    return replace(_MMF, vocab_size=32_000, dim=dim, ffn_dim=256 * math.ceil(dim * 8 // 3 / 256), n_blocks=n_blocks)


# A shape leaves the number of tokens to the vocabulary of the training text.
SHAPES: dict[str, ModelConfig] = {
    "v3": _V3,
    "default": _DEFAULT,
    "nano": _small(96, 256, 12, (1, 4, 12), (2**-3, 2**-15)),
    "micro": _small(144, 384, 18, (1, 4, 32), (2**-4, 2**-17)),
    "mini": replace(_DEFAULT, n_blocks=2, n_passes=1),  # the arithmetic of the default shape, twice its trunk weights
    "mmf": _MMF,
    # Zhu et al. 2024, arXiv:2406.02528; for random weights of their sizes see tools/bench_scale.py
    "paper-370m": _paper(1024, 24),
    "paper-1.3b": _paper(2048, 24),
    "paper-2.7b": _paper(2560, 32),
}


class Budget(NamedTuple):
    """What a shape takes at most on a device, in bytes, with a vocabulary of vocab_size tokens."""

    vocab_size: int
    weights: int  # weights with int8 rows, their scales, the head's tree, and the tokenizer's tables
    state: int | None  # decoding state in int8, with one token's working memory and logits; None: no limit


# 1 KB is 1,000 bytes
BUDGETS: dict[str, Budget] = {
    "nano": Budget(1_024, 224_000, 26_000),
    "micro": Budget(4_096, 960_000, 84_000),
    "mini": Budget(8_192, 4_000_000, None),
}
