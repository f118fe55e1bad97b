"""The dense head for generation: the logits of one position with one thread, or of several on all threads.

For one position each row of the embedding is read once and used once, so memory bandwidth limits the speed. As int8
with a scale per row the embedding takes a quarter of the memory. Several positions, each of another text, share the
reading; each has the bits that it has alone. Letters: V vocabulary, C channels, N positions.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._microkernels import dot_products_int8, row_products


@serial_kernel
def _dense_logits(out, x, weight):
    row_products(out, x, weight)


@helper
def _products_int8(out, x, q, scales):
    dot_products_int8(out, x, q[:, : x.shape[1]])
    for n in range(out.shape[0]):
        for v in range(out.shape[1]):
            out[n, v] *= scales[v]


@serial_kernel
def _dense_logits_int8(out, x, q, scales):
    _products_int8(out, x, q, scales)


@helper
def _share(out, x, weight, thread, threads):
    """A thread's columns of out (N, V)."""
    for v in range(thread * out.shape[1] // threads, (thread + 1) * out.shape[1] // threads):
        for n in range(out.shape[0]):  # the row of the weight stays in the first-level cache
            row_products(out[n : n + 1, v : v + 1], x[n : n + 1], weight[v : v + 1])


@helper
def _share_int8(out, x, q, scales, thread, threads):
    # whole fours, which are computed together
    first = thread * out.shape[1] // threads // 4 * 4
    last = (thread + 1) * out.shape[1] // threads // 4 * 4 if thread + 1 < threads else out.shape[1]
    _products_int8(out[:, first:last], x, q[first:last], scales[first:last])


@kernel
def _dense_logits_of_several(out, x, weight, threads):
    for index in prange(threads):
        _share(out, x, weight, np.int64(index), threads)


@kernel
def _dense_logits_of_several_int8(out, x, q, scales, threads):
    for index in prange(threads):
        _share_int8(out, x, q, scales, np.int64(index), threads)


def dense_logits(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Logits (N, V) of x (N, C) for weight (V, C), float32. Raises ValueError if a shape or dtype is wrong."""
    _check.array("dense_logits", "weight", weight, (None, None))
    _check.array("dense_logits", "x", x, (None, weight.shape[1]))
    out = np.empty((len(x), len(weight)), np.float32)
    if len(x) == 1:
        _dense_logits(out, x, weight)
    elif len(x):
        _dense_logits_of_several(out, x, weight, numba.get_num_threads())
    return out


def dense_logits_int8(x: np.ndarray, q: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Logits (N, V) of x (N, C) float32 for rows q (V, C or wider) int8 with scales (V,), from quantize_rows.

    Their error is at most half a scale times the sum of |x|, plus float32 rounding. Raises ValueError if a shape or
    dtype is wrong.
    """
    _check.array("dense_logits_int8", "q", q, (None, None), np.int8)
    _check.array("dense_logits_int8", "scales", scales, (len(q),))
    _check.array("dense_logits_int8", "x", x, (None, None))
    if x.shape[1] > q.shape[1]:
        raise ValueError(f"dense_logits_int8: x has {x.shape[1]} channels, q has {q.shape[1]}")
    out = np.empty((len(x), len(q)), np.float32)
    if len(x) == 1:
        _dense_logits_int8(out, x, q, scales)
    elif len(x):
        _dense_logits_of_several_int8(out, x, q, scales, numba.get_num_threads())
    return out
