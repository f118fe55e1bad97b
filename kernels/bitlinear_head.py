"""The output layer of the MatMul-free LM: inputs for the dense head's kernels, and logits from packed weights.

Training and scoring are the dense head's, on rounded inputs and on ternary values times their scale, in float32. A
generated token reads 2 bits per weight instead, and its logits are exact sums of integers times one float32 number.
Both round the inputs by the same code. Letters: N rows, C channels, V vocabulary, W packed bytes per row.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._ternary_dots import check_variant
from flashlm_numba.kernels.bitlinear import EXACT_COLUMNS, _bit_inputs
from flashlm_numba.kernels.ternary import packed_width
from flashlm_numba.kernels.ternary_gemv import SERIAL, best_variant


def bit_inputs(x: np.ndarray, norm: np.ndarray, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The inputs of a BitLinear layer for x (N, C) and the norm's weight (C,), float32; with one thread.

    Returns q (N, 4 W) int8, zero beyond C; scale times each row's step, (N,) float32; and rstd (N,) float32 of the
    norm. A row is about q times its step. Raises ValueError if a shape or dtype is wrong.

    >>> q, steps, _ = bit_inputs(np.array([[2, -2, 1]], np.float32), np.ones(3, np.float32))
    >>> q[0, :3].tolist()
    [127, -127, 64]
    """
    _check.array("bit_inputs", "x", x, (None, None))
    _check.array("bit_inputs", "norm", norm, (x.shape[1],))
    if x.shape[1] > EXACT_COLUMNS:
        raise ValueError(f"bit_inputs: x can have at most {EXACT_COLUMNS:,} columns, got {x.shape[1]:,}")
    q = np.empty((len(x), 4 * packed_width(x.shape[1])), np.int8)
    scales, rstd, row = np.empty(len(x), np.float32), np.empty(len(x), np.float32), np.empty(x.shape[1], np.float32)
    _bit_inputs(q, scales, np.empty(len(x), np.int32), rstd, row, x, norm, np.float32(scale))
    return q, scales, rstd


def bit_rows(x: np.ndarray, norm: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rounded inputs (N, C) float32 of a BitLinear layer, and rstd (N,); x, norm and errors as in bit_inputs."""
    q, steps, rstd = bit_inputs(x, norm)
    return q[:, : x.shape[1]].astype(np.float32) * steps[:, None], rstd


def bit_logits(
    x: np.ndarray, norm: np.ndarray, packed: np.ndarray, scale: float, *, variant: str | None = None
) -> np.ndarray:
    """The outputs (N, V) float32 of a BitLinear layer with packed (V, W) uint8 weights and their scale, by one thread.

    x, norm : as in bit_inputs;  variant : one of _ternary_dots.available(); default: the best. All give the same bits.
    Raises ValueError if a shape or dtype is wrong. The twin is reference_mmf.bitlinear_forward.

    >>> from flashlm_numba.kernels.ternary import pack_ternary
    >>> packed = pack_ternary(np.array([[1, -1, 0]], np.float32))
    >>> logits = bit_logits(np.array([[3, -3, 0]], np.float32), np.ones(3, np.float32), packed, 2.0)
    >>> round(float(logits[0, 0]), 3)  # 2 * (sqrt(1.5) + sqrt(1.5))
    4.899
    """
    _check.array("bit_logits", "x", x, (None, None))
    _check.array("bit_logits", "packed", packed, (None, packed_width(x.shape[1])), np.uint8)
    q, scales, _ = bit_inputs(x, norm, scale)
    products = np.empty((len(x), len(packed)), np.int32)
    SERIAL[check_variant(variant) if variant else best_variant()](products, packed, q)
    return products.astype(np.float32) * scales[:, None]
