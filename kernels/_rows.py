"""Helpers, for use in kernels, that clear, copy, scale and gather rows of a matrix (N, C) float32; aligned memory."""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels._jit import helper

LINE = 64  # bytes of a line of the cache, and of the widest register


def aligned_zeros(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """An array that begins at the start of a line: NumPy's begin 16 bytes later, so every register read spans two."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    spare = np.zeros(size + LINE, np.uint8)
    first = -spare.ctypes.data % LINE
    return spare[first : first + size].view(dtype).reshape(shape)


@helper
def scale_rows(out, x, scale):
    """out (M, C) = scale * x (M, C); out and x may be the same array."""
    for m in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[m, c] = scale * x[m, c]


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
