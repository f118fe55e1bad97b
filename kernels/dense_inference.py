"""The dense head for generation: the logits of one position, with one thread.

Each row of the embedding is read once and used once, so memory bandwidth limits the speed. As int8 with a scale per row
the embedding takes a quarter of the memory. Letters: V vocabulary, C channels.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import serial_kernel
from flashlm_numba.kernels._microkernels import dot_products_int8, row_products


@serial_kernel
def _dense_logits(out, x, weight):
    row_products(out, x, weight)


@serial_kernel
def _dense_logits_int8(out, x, q, scales):
    dot_products_int8(out, x, q[:, : x.shape[1]])
    for v in range(out.shape[1]):
        out[0, v] *= scales[v]


def dense_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Logits (1, V) of x (1, C) for weight (V, C), float32. Raises ValueError if a shape or dtype is wrong."""
    _check.array("dense_logits", "weight", weight, (None, None))
    _check.array("dense_logits", "x", x, (1, weight.shape[1]))
    out = np.empty((1, len(weight)), np.float32)
    _dense_logits(out, x, weight)
    return out


def dense_logits_int8(x: np.ndarray, q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Logits (1, V) of x (1, C) float32 for rows q (V, C or wider) int8 with scales (V,), from quantize_rows.

    Their error is at most half a scale times the sum of |x|, plus float32 rounding. Raises ValueError if a shape or
    dtype is wrong.
    """
    _check.array("dense_logits_int8", "q", q, (None, None), np.int8)
    _check.array("dense_logits_int8", "scales", scales, (len(q),))
    _check.array("dense_logits_int8", "x", x, (1, None))
    if x.shape[1] > q.shape[1]:
        raise ValueError(f"dense_logits_int8: x has {x.shape[1]} channels, q has {q.shape[1]}")
    out = np.empty((1, len(q)), np.float32)
    _dense_logits_int8(out, x, q, scales)
    return out
