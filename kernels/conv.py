"""Gated causal dilated grouped convolution: out = sigmoid(conv_gate(x)) * conv_value(x).

    conv(x)[t, o] = sum over taps k and the group's inputs i of  w[o, i, k] * x[t - (K - 1 - k) * dilation, i]

with x zero before the sequence begins. Gate and value are two convolutions of the same inputs with adjacent weights.
The buffers are group-major: n (G, T, S) for inputs and gv (G, 2, T, S) for outputs, the gate first. S is the group's
width rounded up to 16, to complete vector registers; the padding is zero, and one half after a gate. Segments with
equal numbers of taps avoid reads before the start of the sequence, so no padding in time is copied.
Elementwise loops over a share of the groups run over all of them and skip the others: in range(first, last) the
compiler cannot exclude a negative index, so it does not vectorise, and the loop takes more than twice the time.
Letters: B batch, T time, C channels, G groups, K taps.
Source: van den Oord et al. 2016, arXiv:1609.03499, sections 2.1 and 2.3 (dilation, gating).
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._math import exp32
from flashlm_numba.kernels._microkernels import TileLeft, TileOut, TileRight, address_of, tile_product_16

_ONE = np.float32(1)


def padded_width(channels: int, groups: int) -> int:
    """Channels of a group, rounded up to a multiple of 16."""
    return -(-(channels // groups) // 16) * 16


def pack_conv_weights(gate: np.ndarray, value: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Pack gate and value (C, C/G, K) float32, in PyTorch's order, into the layouts of the kernels.

    Returns weight (G, K, S, 2 S) for the forward pass, and its transpose with reversed taps (G, K, 2 S, S) for the
    gradient of the inputs.
    """
    channels, width, taps = gate.shape
    size = padded_width(channels, groups)
    both = np.stack([gate, value]).reshape(2, groups, width, width, taps)  # (2, G, out, in, K)
    padded = np.zeros((groups, taps, size, 2, size), np.float32)
    padded[:, :, :width, :, :width] = both.transpose(1, 4, 3, 0, 2)
    weight = padded.reshape(groups, taps, size, 2 * size)
    return weight, np.ascontiguousarray(weight[:, ::-1].transpose(0, 1, 3, 2))


def unpack_conv_gradient(dweight: np.ndarray, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Gradients of gate and value (C, C/G, K) from dweight (G, K, S, 2 S); width is C/G."""
    groups, taps, size, _ = dweight.shape
    both = dweight.reshape(groups, taps, size, 2, size)[:, :, :width, :, :width].transpose(3, 0, 4, 2, 1)
    both = both.reshape(2, groups * width, width, taps)
    return both[0], both[1]


@helper
def conv_sequence(gv, n, weight, dilation, first, last):
    """gv (G, 2, T, S) for n (G, T, S), weight (G, K, S, 2 S); groups first..last only."""
    _, time, size = n.shape
    taps = weight.shape[1]
    flat_n, flat_gv, flat_w = n.reshape(-1), gv.reshape(-1), weight.reshape(-1)
    for g in range(first, last):
        for s in range(taps):  # s taps before the present one reach into the sequence
            low = min(s * dilation, time)
            high = time if s == taps - 1 else min((s + 1) * dilation, time)
            for half in range(2):
                for w in range(0, size, 16):
                    first_tap = ((g * taps + taps - 1 - s) * 2 * size + half) * size + w
                    out = TileOut(address_of(flat_gv, ((2 * g + half) * time + low) * size + w), size)
                    left = TileLeft(
                        address_of(flat_n, (g * time + low - s * dilation) * size), size, 1, dilation * size
                    )
                    right = TileRight(address_of(flat_w, first_tap), 2 * size, 2 * size * size)
                    tile_product_16(out, left, right, high - low, size, s + 1, 0)


@helper
def conv_sequence_dinput(dn, dgv, weight_t, dilation, first, last):
    """dn (G, T, S) for dgv (G, 2, T, S), weight_t (G, K, 2 S, S) with the taps reversed; groups first..last only."""
    _, time, size = dn.shape
    taps = weight_t.shape[1]
    flat_dn, flat_dgv, flat_w = dn.reshape(-1), dgv.reshape(-1), weight_t.reshape(-1)
    for g in range(first, last):
        for s in range(taps):  # s taps after the present one lie in the sequence
            high = max(time - s * dilation, 0)
            low = 0 if s == taps - 1 else max(time - (s + 1) * dilation, 0)
            for half in range(2):
                for w in range(0, size, 16):
                    out = TileOut(address_of(flat_dn, (g * time + low) * size + w), size)
                    left = TileLeft(
                        address_of(flat_dgv, ((2 * g + half) * time + low) * size), size, 1, dilation * size
                    )
                    right = TileRight(
                        address_of(flat_w, (g * taps * 2 + half) * size * size + w), size, 2 * size * size
                    )
                    tile_product_16(out, left, right, high - low, size, s + 1, half)


@helper
def conv_sequence_dweight(dweight, n, dgv, dilation, first, last):
    """dweight (G, K, S, 2 S) += for n (G, T, S), dgv (G, 2, T, S); groups first..last only."""
    _, time, size = n.shape
    taps = dweight.shape[1]
    flat_n, flat_dgv, flat_dw = n.reshape(-1), dgv.reshape(-1), dweight.reshape(-1)
    for g in range(first, last):
        for m in range(taps):  # the tap that looks m dilations back
            if time - m * dilation > 0:
                for half in range(2):
                    for w in range(0, size, 16):
                        tap = ((g * taps + taps - 1 - m) * 2 * size + half) * size + w
                        out = TileOut(address_of(flat_dw, tap), 2 * size)
                        left = TileLeft(address_of(flat_n, g * time * size), 1, size, 0)
                        right = TileRight(
                            address_of(flat_dgv, ((2 * g + half) * time + m * dilation) * size + w), size, 0
                        )
                        tile_product_16(out, left, right, size, time - m * dilation, 1, 1)


@helper
def to_groups(out, x, width, first, last):
    """out (G, T, S) = x (T, C) regrouped, groups first..last; width is C/G. The padding of out is left alone."""
    for t in range(x.shape[0]):
        for g in range(out.shape[0]):
            if first <= g < last:
                for j in range(width):
                    out[g, t, j] = x[t, g * width + j]


@helper
def normed_to_groups(out, x, rstd, weight, width, first, last):
    """to_groups for the RMSNorm of x (T, C) with its saved rstd (T,) and weight (C,)."""
    for t in range(x.shape[0]):
        r = rstd[t]
        for g in range(out.shape[0]):
            if first <= g < last:
                for j in range(width):
                    out[g, t, j] = x[t, g * width + j] * r * weight[g * width + j]


@helper
def gate_sequence(out, gv, base, width, first, last):
    """Turn the gate's half of gv (G, 2, T, S) into its sigmoid; out (T, C) = base (T, C) + sigmoid * value.

    Groups first..last and their channels only.
    """
    for g in range(gv.shape[0]):
        if first <= g < last:
            gate = gv[g, 0].reshape(-1)
            for i in range(gate.shape[0]):
                gate[i] = _ONE / (_ONE + exp32(-gate[i]))
            for t in range(gv.shape[2]):
                for j in range(width):
                    out[t, g * width + j] = base[t, g * width + j] + gv[g, 0, t, j] * gv[g, 1, t, j]


@helper
def gate_sequence_backward(dgv, dout, gv, width, first, last):
    """dgv (G, 2, T, S) for dout (T, C), gv with the gate's half as its sigmoid. The padding of dgv is left alone.

    Groups first..last only.
    """
    for g in range(gv.shape[0]):
        if first <= g < last:
            for t in range(gv.shape[2]):
                for j in range(width):
                    s, v, d = gv[g, 0, t, j], gv[g, 1, t, j], dout[t, g * width + j]
                    dgv[g, 1, t, j] = d * s
                    dgv[g, 0, t, j] = d * v * s * (_ONE - s)


@helper
def from_groups(out, groups, width, first, last):
    """out (T, C) = groups (G, T, S) regrouped, the channels of groups first..last."""
    for t in range(out.shape[0]):
        for g in range(groups.shape[0]):
            if first <= g < last:
                for j in range(width):
                    out[t, g * width + j] = groups[g, t, j]


@serial_kernel
def _gated_conv_forward(out, gv, n, x, weight, dilation, width):
    for b in range(x.shape[0]):
        out[b] = np.float32(0)
        groups = n.shape[0]
        to_groups(n, x[b], width, 0, groups)
        conv_sequence(gv[b], n, weight, dilation, 0, groups)
        gate_sequence(out[b], gv[b], out[b], width, 0, groups)


@serial_kernel
def _gated_conv_backward(dx, dweight, dgv, dn, n, dout, gv, x, weight_t, dilation, width):
    for b in range(x.shape[0]):
        groups = n.shape[0]
        to_groups(n, x[b], width, 0, groups)
        gate_sequence_backward(dgv, dout[b], gv[b], width, 0, groups)
        conv_sequence_dinput(dn, dgv, weight_t, dilation, 0, groups)
        conv_sequence_dweight(dweight, n, dgv, dilation, 0, groups)
        for t in range(x.shape[1]):
            for g in range(n.shape[0]):
                for j in range(width):
                    dx[b, t, g * width + j] += dn[g, t, j]


def _check_conv(where: str, x: np.ndarray, gate: np.ndarray, value: np.ndarray, groups: int, dilation: int) -> None:
    _check.array(where, "x", x, (None, None, None))
    channels = x.shape[2]
    if groups < 1 or channels % groups:
        raise ValueError(f"{where}: groups must divide the {channels} channels, got {groups}")
    if dilation < 1:
        raise ValueError(f"{where}: dilation must be at least 1, got {dilation}")
    _check.array(where, "gate", gate, (channels, channels // groups, None))
    _check.array(where, "value", value, gate.shape)


def gated_conv_forward(
    x: np.ndarray, gate: np.ndarray, value: np.ndarray, groups: int, dilation: int
) -> tuple[np.ndarray, np.ndarray]:
    """Causal sigmoid(conv(x, gate)) * conv(x, value) for x (B, T, C), gate and value (C, C/groups, K), all float32.

    Returns out (B, T, C) and gv (B, G, 2, T, S), the sigmoid and the value, for the backward pass.
    Cost 4 * B*T*C*K*C/groups flop. Raises ValueError if a shape or dtype is wrong.
    """
    _check_conv("gated_conv_forward", x, gate, value, groups, dilation)
    batch, time, channels = x.shape
    size = padded_width(channels, groups)
    out, gv = np.empty_like(x), np.zeros((batch, groups, 2, time, size), np.float32)
    weight, _ = pack_conv_weights(gate, value, groups)
    n = np.zeros((groups, time, size), np.float32)
    _gated_conv_forward(out, gv, n, x, weight, dilation, channels // groups)
    return out, gv


def gated_conv_backward(
    dout: np.ndarray,
    gv: np.ndarray,
    x: np.ndarray,
    gate: np.ndarray,
    value: np.ndarray,
    groups: int,
    dilation: int,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Gradients dx (B, T, C), dgate and dvalue (C, C/groups, K) for dout (B, T, C) and gv of the forward pass.

    Raises ValueError if a shape or dtype is wrong.
    """
    _check_conv("gated_conv_backward", x, gate, value, groups, dilation)
    batch, time, channels = x.shape
    size, width = padded_width(channels, groups), channels // groups
    _check.array("gated_conv_backward", "dout", dout, x.shape)
    _check.array("gated_conv_backward", "gv", gv, (batch, groups, 2, time, size))
    weight, weight_t = pack_conv_weights(gate, value, groups)
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    dgv = np.zeros((groups, 2, time, size), np.float32)
    dn, n = np.zeros((groups, time, size), np.float32), np.zeros((groups, time, size), np.float32)
    _gated_conv_backward(dx, dweight, dgv, dn, n, dout, gv, x, weight_t, dilation, width)
    dgate, dvalue = unpack_conv_gradient(dweight, width)
    return dx, np.ascontiguousarray(dgate), np.ascontiguousarray(dvalue)
