"""NumPy twins of the MatMul-free LM's layers and of its trunk, for any floating dtype.

The gradients pass straight through both roundings of a BitLinear. With rounded=False nothing is rounded, neither
inputs nor weights, so that central differences can check the gradients.
Letters: B batch, T time, N = B*T positions, C channels, L blocks. Source: Zhu et al. 2024, arXiv:2406.02528, with the
authors' code where the two differ (docs/model.md).
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import reference as r

LEAST = 1e-5  # of a row's largest magnitude and of a matrix's mean magnitude


def silu(x):
    return x * r.sigmoid(x)


def silu_slope(x):
    s = r.sigmoid(x)
    return s * (1 + x * (1 - s))


# --- the recurrence ---


def mlgru_forward(forget, value, bound):
    """h (B, T, H) for forget, value (B, T, H) and bound (H,)."""
    f = bound + (1 - bound) * r.sigmoid(forget)
    h, state = np.zeros_like(value), np.zeros_like(value[:, 0]) if value.shape[1] else None
    for t in range(value.shape[1]):
        state = f[:, t] * state + (1 - f[:, t]) * silu(value[:, t])
        h[:, t] = state
    return h


def mlgru_backward(dh, h, forget, value, bound):
    """dforget, dvalue (B, T, H) and dbound (H,) for dh (B, T, H)."""
    s = r.sigmoid(forget)
    f, df, dvalue = bound + (1 - bound) * s, np.zeros_like(forget), np.zeros_like(value)
    later = np.zeros_like(dh[:, 0]) if dh.shape[1] else None
    for t in reversed(range(dh.shape[1])):
        d = dh[:, t] + later
        before = h[:, t - 1] if t else np.zeros_like(d)
        df[:, t] = d * (before - silu(value[:, t]))
        dvalue[:, t] = d * (1 - f[:, t]) * silu_slope(value[:, t])
        later = f[:, t] * d
    return df * (1 - bound) * s * (1 - s), dvalue, (df * (1 - s)).sum((0, 1))


# --- layers ---


def rmsnorm(x, weight, eps):
    """The normed rows of x (N, C), and rstd (N,)."""
    rstd = 1 / np.sqrt((x * x).mean(1, dtype=x.dtype) + x.dtype.type(eps))
    return x * rstd[:, None] * weight, rstd


def absmean_ternary(weight):
    """Ternary values and scale of weight (R, K)."""
    sizes = np.abs(weight)
    alike = np.unique(sizes[sizes > 0]).size <= 1  # ternary values times a scale already
    total = np.cumsum(sizes.ravel(), dtype=np.float64)[-1] if weight.size else 0.0  # in order
    scale = sizes.max(initial=0) if alike else total / weight.size
    scale = weight.dtype.type(max(np.float32(scale), np.float32(LEAST)))
    return (weight > scale / 2).astype(weight.dtype) - (weight < -scale / 2), scale


def round_inputs(y):
    """Rows of y (N, K) in 127 steps of their largest magnitude: whole numbers (N, K), and the steps (N, 1)."""
    largest = np.maximum(np.abs(y).max(1, keepdims=True, initial=0), y.dtype.type(LEAST))
    return np.rint(y * (y.dtype.type(127) / largest)), largest / y.dtype.type(127)


def bitlinear_forward(x, norm, weight, *, eps=1e-6, rounded=True):
    """Output (N, R) for x (N, K), and what the backward pass needs."""
    y, rstd = rmsnorm(x, norm, eps)
    values, scale = absmean_ternary(weight) if rounded else (weight, weight.dtype.type(1))
    q, step = round_inputs(y) if rounded else (y, np.ones_like(rstd[:, None]))
    return (q @ values.T) * (step * scale), (q * step, values * scale, x, norm, rstd)


def bitlinear_backward(dout, saved):
    """dx (N, K), dnorm (K,) and dweight (R, K) for dout (N, R)."""
    y, weight, x, norm, rstd = saved
    dx, dnorm = r.rmsnorm_backward(dout @ weight, x, norm, rstd)
    return dx, dnorm, dout.T @ y
