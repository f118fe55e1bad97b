"""The sum of squares of a gradient, for clipping by global norm."""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._elementwise import SMALL, sum_squares
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel

# Elements per partial sum. A block is a fixed piece of work, so the total is the same for any number of threads.
BLOCK = 4_096


@helper
def _block_squares(x, b):
    """Sum of squares of block b of x (N,)."""
    return sum_squares(x[b * BLOCK : min((b + 1) * BLOCK, x.shape[0])])


@kernel
def _partial_squares(partial, x, threads):
    """Write the sum of squares of block b of x (N,) to partial (blocks,) float64. Parallel over b."""
    blocks = partial.shape[0]
    for th in prange(threads):
        for b in range(th * blocks // threads, (th + 1) * blocks // threads):
            partial[b] = _block_squares(x, b)


@serial_kernel
def _small_squares(x):
    """Sum of squares of x (N,), block by block."""
    total = 0.0
    for b in range((x.shape[0] + BLOCK - 1) // BLOCK):
        total += _block_squares(x, b)
    return total


def sum_of_squares(x: np.ndarray) -> float:
    """Sum of x**2 over all elements of a C-contiguous float32 array of any shape, accumulated in float64.

    The sum is the same for any number of threads. It is not finite if an element is not finite, so the caller only has
    to check one number. Raises ValueError if the dtype is wrong or x is not C-contiguous.

    >>> sum_of_squares(np.array([[3.0, 4.0]], np.float32))
    25.0
    """
    _check.array("sum_of_squares", "x", x, (None,) * x.ndim)
    flat = x.reshape(-1)
    if flat.size < SMALL:
        return float(_small_squares(flat))
    partial = np.empty(-(-flat.size // BLOCK), np.float64)
    _partial_squares(partial, flat, numba.get_num_threads())
    return float(partial.sum())  # one thread, one order
