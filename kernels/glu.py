"""The gated linear unit's middle: out = relu(gate)**2 * up. Letters: N rows, I inner width.

Source: Shazeer 2020, arXiv:2002.05202, section 2 (gating); So et al. 2021, arXiv:2109.08668 (squared ReLU).
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel

_ZERO, _ONE, _TWO = np.float32(0), np.float32(1), np.float32(2)


@helper
def glu_rows(out, gate_up, scale):
    """out (N, I), times scale, for gate_up (N, 2 I), the gate's columns first."""
    rows, inner = out.shape
    for n in range(rows):
        for i in range(inner):
            g = max(gate_up[n, i], _ZERO)
            out[n, i] = scale * (g * g * gate_up[n, inner + i])


@helper
def glu_backward_rows(out, dgate_up, dout, gate_up, scale):
    """dgate_up (N, 2 I), and out (N, I) computed again, for dout (N, I)."""
    rows, inner = out.shape
    for n in range(rows):
        for i in range(inner):
            g = max(gate_up[n, i], _ZERO)
            u = gate_up[n, inner + i]
            d = scale * dout[n, i]
            # forward: out = scale g**2 u with g = relu(gate)
            out[n, i] = scale * (g * g * u)
            dgate_up[n, i] = _TWO * d * g * u
            dgate_up[n, inner + i] = d * g * g


@serial_kernel
def _glu_forward(out, gate_up):
    glu_rows(out, gate_up, _ONE)


@serial_kernel
def _glu_backward(out, dgate_up, dout, gate_up):
    glu_backward_rows(out, dgate_up, dout, gate_up, _ONE)


def glu_forward(gate_up: np.ndarray) -> np.ndarray:
    """relu(gate)**2 * up for gate_up (N, 2 I) float32, the gate's columns first; returns (N, I).

    Raises ValueError if the width is odd or a dtype is wrong. Source: arXiv:2002.05202 section 2, arXiv:2109.08668.

    >>> glu_forward(np.array([[2, -1, 3, 5]], np.float32)).tolist()
    [[12.0, 0.0]]
    """
    _check.array("glu_forward", "gate_up", gate_up, (None, None))
    if gate_up.shape[1] % 2:
        raise ValueError(f"glu_forward: gate_up must have an even number of columns, got {gate_up.shape[1]}")
    out = np.empty((gate_up.shape[0], gate_up.shape[1] // 2), np.float32)
    _glu_forward(out, gate_up)
    return out


def glu_backward(dout: np.ndarray, gate_up: np.ndarray) -> np.ndarray:
    """Gradient (N, 2 I) with respect to gate_up for dout (N, I), both float32. Raises ValueError on wrong shapes."""
    _check.array("glu_backward", "dout", dout, (None, None))
    _check.array("glu_backward", "gate_up", gate_up, (dout.shape[0], 2 * dout.shape[1]))
    out, dgate_up = np.empty_like(dout), np.empty_like(gate_up)
    _glu_backward(out, dgate_up, dout, gate_up)
    return dgate_up
