"""Rows of a matrix, (N, C) float32: cleared, copied, gathered. Helpers, called from kernels only."""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels._jit import helper


@helper
def clear_rows(out):
    """out (N, C) = 0."""
    for n in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[n, c] = np.float32(0)


@helper
def copy_rows(out, rows):
    """out (N, C) = rows (N, C)."""
    for n in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[n, c] = rows[n, c]


@helper
def gather_rows(out, weight, rows):
    """out (N, C) = weight[rows] for rows (N,)."""
    dim = weight.shape[1]
    for n in range(rows.shape[0]):
        row = rows[n]
        for c in range(dim):
            out[n, c] = weight[row, c]
