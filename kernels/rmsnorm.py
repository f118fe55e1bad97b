"""RMSNorm: y = x / sqrt(mean(x**2) + eps) * weight, row by row.

Letters: N rows, C channels. Source: Zhang & Sennrich 2019, arXiv:1910.07467, section 3, with v3's eps of 1e-8.
"""

from __future__ import annotations

import math

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel

EPS = np.float32(1e-8)
_ONE = np.float32(1)


@helper
def rmsnorm_rows(out, rstd, x, weight):
    """Write out (N, C) and rstd (N,) = 1 / rms for x (N, C), weight (C,)."""
    rows, dim = x.shape
    for n in range(rows):
        total = np.float32(0)
        for c in range(dim):
            total += x[n, c] * x[n, c]
        r = _ONE / np.float32(math.sqrt(total / np.float32(dim) + EPS))
        rstd[n] = r
        for c in range(dim):
            out[n, c] = x[n, c] * r * weight[c]


@helper
def rmsnorm_scales(rstd, x):
    """The rstd (N,) of rmsnorm_rows alone."""
    rows, dim = x.shape
    for n in range(rows):
        total = np.float32(0)
        for c in range(dim):
            total += x[n, c] * x[n, c]
        rstd[n] = _ONE / np.float32(math.sqrt(total / np.float32(dim) + EPS))


@helper
def rmsnorm_recompute(out, x, weight, rstd):
    """Compute out of rmsnorm_rows again from the saved rstd, which is cheaper than storing out."""
    rows, dim = x.shape
    for n in range(rows):
        r = rstd[n]
        for c in range(dim):
            out[n, c] = x[n, c] * r * weight[c]


@helper
def rmsnorm_backward_rows(dx, dweight, dout, x, weight, rstd, accumulate):
    """dx (N, C) (+)= and dweight (C,) += for dout (N, C)."""
    rows, dim = x.shape
    for n in range(rows):
        r = rstd[n]
        dot = np.float32(0)
        for c in range(dim):
            dot += dout[n, c] * weight[c] * x[n, c]
        # forward: y_c = w_c x_c r with r = (mean(x**2) + eps)**-0.5, so dr/dx_c = -r**3 x_c / C
        pull = dot * r * r * r / np.float32(dim)
        if accumulate:
            for c in range(dim):
                dx[n, c] += dout[n, c] * weight[c] * r - x[n, c] * pull
                dweight[c] += dout[n, c] * x[n, c] * r
        else:
            for c in range(dim):
                dx[n, c] = dout[n, c] * weight[c] * r - x[n, c] * pull
                dweight[c] += dout[n, c] * x[n, c] * r


@serial_kernel
def _rmsnorm_forward(out, rstd, x, weight):
    rmsnorm_rows(out, rstd, x, weight)


@serial_kernel
def _rmsnorm_backward(dx, dweight, dout, x, weight, rstd):
    rmsnorm_backward_rows(dx, dweight, dout, x, weight, rstd, True)


def rmsnorm_forward(x: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Normalise every row of x (N, C) float32 by its root mean square and scale it by weight (C,) float32.

    Returns out (N, C) and rstd (N,), the reciprocal root mean square, which the backward pass needs.
    Raises ValueError if a shape or dtype is wrong. Source: arXiv:1910.07467, section 3.

    >>> out, rstd = rmsnorm_forward(np.full((1, 4), 2, np.float32), np.ones(4, np.float32))
    >>> out.round(5).tolist(), rstd.round(5).tolist()
    ([[1.0, 1.0, 1.0, 1.0]], [0.5])
    """
    _check.array("rmsnorm_forward", "x", x, (None, None))
    _check.array("rmsnorm_forward", "weight", weight, (x.shape[1],))
    out, rstd = np.empty_like(x), np.empty(x.shape[0], np.float32)
    _rmsnorm_forward(out, rstd, x, weight)
    return out, rstd


def rmsnorm_backward(
    dout: np.ndarray, x: np.ndarray, weight: np.ndarray, rstd: np.ndarray, dx: np.ndarray, dweight: np.ndarray
) -> None:
    """Add the gradients for dout (N, C) to dx (N, C) and dweight (C,); x, weight, rstd as in the forward pass.

    Raises ValueError if a shape or dtype is wrong.
    """
    _check.array("rmsnorm_backward", "x", x, (None, None))
    _check.array("rmsnorm_backward", "dout", dout, x.shape)
    _check.array("rmsnorm_backward", "dx", dx, x.shape)
    _check.array("rmsnorm_backward", "weight", weight, (x.shape[1],))
    _check.array("rmsnorm_backward", "dweight", dweight, (x.shape[1],))
    _check.array("rmsnorm_backward", "rstd", rstd, (x.shape[0],))
    _rmsnorm_backward(dx, dweight, dout, x, weight, rstd)
