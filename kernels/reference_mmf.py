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
