"""Rows of the embedding: gather, race-free scatter-add of the gradient, and clearing of the gradient.

Letters: N rows, V vocabulary, C channels, P threads.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import kernel
from flashlm_numba.kernels._rows import gather_rows


@kernel
def _embedding_forward(out, weight, rows, threads):
    for thread in prange(threads):
        low, high = thread * rows.shape[0] // threads, (thread + 1) * rows.shape[0] // threads
        gather_rows(out[low:high], weight, rows[low:high])


@kernel
def _embedding_backward(dweight, dout, rows, threads):
    # A thread owns a range of columns: no two write the same number, and the order of additions is that of the rows
    # for any number of threads. (Adding by rows in parallel loses updates where a token occurs twice.)
    dim = dweight.shape[1]
    for thread in prange(threads):
        low, high = thread * dim // threads, (thread + 1) * dim // threads
        for n in range(rows.shape[0]):
            target, source = dweight[rows[n], low:high], dout[n, low:high]
            for c in range(high - low):
                target[c] += source[c]


@kernel
def _zero(flat, threads):
    for thread in prange(threads):
        part = flat[thread * flat.shape[0] // threads : (thread + 1) * flat.shape[0] // threads]
        for i in range(part.shape[0]):
            part[i] = np.float32(0)


def embedding_forward(weight: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """weight[rows]: (N, C) float32 for weight (V, C) float32 and rows (N,) int32 in [0, V).

    Raises ValueError if a shape, a dtype or a row is wrong.

    >>> embedding_forward(np.eye(2, dtype=np.float32), np.array([1, 0], np.int32)).tolist()
    [[0.0, 1.0], [1.0, 0.0]]
    """
    _check.array("embedding_forward", "weight", weight, (None, None))
    _check.array("embedding_forward", "rows", rows, (None,), np.int32)
    _check.indices("embedding_forward", "rows", rows, weight.shape[0], "check the tokenizer's vocabulary size")
    out = np.empty((rows.shape[0], weight.shape[1]), np.float32)
    _embedding_forward(out, weight, rows, numba.get_num_threads())
    return out


def embedding_backward(dweight: np.ndarray, dout: np.ndarray, rows: np.ndarray) -> None:
    """Add dout (N, C) to rows of dweight (V, C): dweight[rows[n]] += dout[n]. The bits do not depend on the threads.

    Raises ValueError if a shape, a dtype or a row is wrong.
    """
    _check.array("embedding_backward", "dweight", dweight, (None, None))
    _check.array("embedding_backward", "rows", rows, (None,), np.int32)
    _check.array("embedding_backward", "dout", dout, (rows.shape[0], dweight.shape[1]))
    _check.indices("embedding_backward", "rows", rows, dweight.shape[0], "check the tokenizer's vocabulary size")
    _embedding_backward(dweight, dout, rows, numba.get_num_threads())


def zero(array: np.ndarray) -> None:
    """Set a C-contiguous float32 array of any shape to zero with all threads, for large gradients once per step."""
    if not array.flags.c_contiguous or array.dtype != np.float32:
        raise ValueError(f"zero: array must be C-contiguous float32, got {array.dtype} with strides {array.strides}")
    _zero(array.reshape(-1), numba.get_num_threads())
