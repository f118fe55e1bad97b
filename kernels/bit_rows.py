"""What stands between the BitLinears of the MatMul-free LM: norms with an epsilon of choice, and the two gates.

    norm    x / sqrt(mean(x**2) + eps) * weight
    gated   norm(gate) * silu(h)                     the mixer's output, before its last layer
    swiglu  silu(gate) * up                          the GLU's middle

Training and decoding call the same compiled code by its address, so that they compute the same bits.
Letters: M rows, C channels, I inner width.
Source: Zhu et al. 2024, arXiv:2406.02528, section 3.3. Here, as in the authors' code, the gate is normed; in the paper
it is h.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels.mlgru import mlgru_sequence, sigmoid32

_ONE = np.float32(1)


@helper
def _norm_rows(out, rstd, x, weight, eps):
    dim = x.shape[1]
    for m in range(x.shape[0]):
        total = np.float32(0)
        for c in range(dim):
            total += x[m, c] * x[m, c]
        r = _ONE / np.float32(math.sqrt(total / np.float32(dim) + eps))
        rstd[m] = r
        for c in range(dim):
            out[m, c] = x[m, c] * r * weight[c]


@serial_kernel
def norm(out, rstd, x, weight, eps):
    """out (M, C) and rstd (M,) for x (M, C), weight (C,)."""
    _norm_rows(out, rstd, x, weight, eps)


@serial_kernel
def gated(out, rstd, gate, h, weight, eps):
    """out (M, C), and rstd (M,) of the gate's norm, for gate, h (M, C), weight (C,)."""
    _norm_rows(out, rstd, gate, weight, eps)
    for m in range(out.shape[0]):
        for c in range(out.shape[1]):
            out[m, c] = out[m, c] * (h[m, c] * sigmoid32(h[m, c]))


@helper
def gated_backward(dgate, dh, dweight, dout, gate, h, weight, rstd):
    """dgate, dh (M, C), and dweight (C,) +=, for dout (M, C)."""
    dim = gate.shape[1]
    for m in range(gate.shape[0]):
        r, dot = rstd[m], np.float32(0)
        for c in range(dim):
            s = sigmoid32(h[m, c])
            # forward: out = n silu(h) with n = gate r weight
            dh[m, c] = dout[m, c] * (gate[m, c] * r * weight[c]) * s * (_ONE + h[m, c] * (_ONE - s))
            dn = dout[m, c] * (h[m, c] * s)
            dgate[m, c] = dn
            dot += dn * weight[c] * gate[m, c]
        pull = dot * r * r * r / np.float32(dim)
        for c in range(dim):
            dn = dgate[m, c]
            dweight[c] += dn * gate[m, c] * r
            dgate[m, c] = dn * weight[c] * r - gate[m, c] * pull


@serial_kernel
def swiglu(out, gate_up):
    """out (M, I) for gate_up (M, 2 I), the gate's columns first."""
    inner = out.shape[1]
    for m in range(out.shape[0]):
        for i in range(inner):
            g = gate_up[m, i]
            out[m, i] = g * sigmoid32(g) * gate_up[m, inner + i]


@helper
def swiglu_backward(dgate_up, dout, gate_up):
    """dgate_up (M, 2 I) for dout (M, I)."""
    inner = dout.shape[1]
    for m in range(dout.shape[0]):
        for i in range(inner):
            g, u, d = gate_up[m, i], gate_up[m, inner + i], dout[m, i]
            s = sigmoid32(g)
            dgate_up[m, i] = d * u * s * (_ONE + g * (_ONE - s))
            dgate_up[m, inner + i] = d * (g * s)


@serial_kernel
def _scan(h, before, forget, value, bound, first, last):
    mlgru_sequence(h, before, forget, value, bound, first, last)


def norm_address() -> Any:
    """The addresses (_calls.py) of norm, gated, swiglu and mlgru_sequence; these compile them, or load them."""
    x, row = np.empty((0, 0), np.float32), np.empty(0, np.float32)
    return address(norm, x, row, x, row, _ONE)


def gated_address() -> Any:
    """See norm_address."""
    x, row = np.empty((0, 0), np.float32), np.empty(0, np.float32)
    return address(gated, x, row, x, x, row, _ONE)


def swiglu_address() -> Any:
    """See norm_address."""
    x = np.empty((0, 0), np.float32)
    return address(swiglu, x, x)


def scan_address() -> Any:
    """See norm_address."""
    x, row = np.empty((0, 0), np.float32), np.empty(0, np.float32)
    return address(_scan, x, row, x, x, row, 0, 0)
