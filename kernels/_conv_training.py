"""The conv mixer's training: the serial kernels of its stages, forward and backward. See conv_mixer.py.

A stage does a share of the work on some rows (_division.py). A convolution divides by channel groups, and the leaky
average by channels, over all time; the norm before each convolution and the ternary layer divide by rows, over all
channels. The convolutions work on group-major copies (conv.py), one sequence at a time.
Letters: B batch, T time, N = B*T rows, C channels, L blocks, R layers, D convolutions, G groups, K taps, S padded group
width, P threads, Q chunks of sequences, M rows of a part; X, Y see _division.Division.places.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._rows import scale_rows
from flashlm_numba.kernels._ternary_layer import share_of_outputs, ternary_product, ternary_weight_gradient
from flashlm_numba.kernels.conv import (
    conv_sequence,
    conv_sequence_dinput,
    conv_sequence_dweight,
    from_groups,
    gate_sequence,
    gate_sequence_backward,
    normed_to_groups,
)
from flashlm_numba.kernels.leaky_average import add_leaky_average, add_leaky_average_backward
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows, rmsnorm_scales


class ConvWeights(NamedTuple):
    """Weights of all blocks. In the backward pass conv and the layouts are those of the transposes."""

    norms: np.ndarray  # (L, D, C): before each convolution
    leaky_gain: np.ndarray  # (L, C)
    conv: np.ndarray  # (L, D, G, K, S, 2 S), or (L, D, G, K, 2 S, S) transposed: see pack_conv_weights
    dilations: np.ndarray  # (D,) int64
    out_panels: np.ndarray  # of Layouts, (C, C) matrices
    out_codes: np.ndarray
    out_plain: np.ndarray
    residual_scale: np.float32
    leaky_decay: np.float32  # 0: there is no leaky average
    leaky_share: np.float32  # of the new token: sqrt(1 - leaky_decay**2)


class ConvActivations(NamedTuple):
    """Activations saved for the backward pass."""

    mixed: np.ndarray  # (R, D + 1, N, C): input of each convolution; the last: of the ternary layer
    rstd: np.ndarray  # (R, D, N): of the norm before each convolution
    gate_value: np.ndarray  # (R, D, B, G, 2, T, S): sigmoid of the gate, and the value


class ConvScratch(NamedTuple):
    """Scratch: within a stage, per thread; and between stages. The padding of the groups is always zero."""

    grouped: np.ndarray  # (P, G, T, S)
    dgrouped: np.ndarray  # (P, G, T, S)
    dgate_value: np.ndarray  # (P, G, 2, T, S)
    out_in: np.ndarray  # (X, Y, C): input of the ternary layer
    dnormed: np.ndarray  # (X, Y, C): gradient of a convolution's input


class ConvGradients(NamedTuple):
    """Copies of the gradients; see _division.Copies."""

    norms: np.ndarray  # (P, L, D, C)
    leaky_gain: np.ndarray  # (P or Q, L, C)
    conv: np.ndarray  # (P or Q, L, D, G, K, S, 2 S)
    out: np.ndarray  # (P or Q, L, C, C)


# --- forward, in the stages leaky average; norm, convolution, of each dilation; ternary layer ---


@helper
def _convolve(d, unit, weights, activations, scratch):
    """One convolution: a share of its channel groups."""
    time, layer, block = unit.time, unit.layer, unit.block
    grouped = scratch.grouped[unit.thread]
    groups, width = grouped.shape[0], weights.norms.shape[2] // grouped.shape[0]
    first, last = unit.share * groups // unit.shares, unit.share_end * groups // unit.shares
    for start in range(unit.low, unit.high, time):
        end = start + time
        before, after = activations.mixed[layer, d, start:end], activations.mixed[layer, d + 1, start:end]
        gate_value = activations.gate_value[layer, d, start // time]
        rstd = activations.rstd[layer, d, start:end]
        normed_to_groups(grouped, before, rstd, weights.norms[block, d], width, first, last)
        conv_sequence(gate_value, grouped, weights.conv[block, d], weights.dilations[d], first, last)
        gate_sequence(after, gate_value, before, width, first, last)


@helper
def _average(x, unit, weights, activations, scratch):
    """The first convolution's input from the mixer's input x: a share of the channels."""
    dim = x.shape[1]
    first, last = unit.share * dim // unit.shares, unit.share_end * dim // unit.shares
    mixed = activations.mixed[unit.layer, 0, unit.low : unit.high]
    for m in range(x.shape[0]):
        mixed_m, x_m = mixed[m, first:last], x[m, first:last]
        for c in range(mixed_m.shape[0]):
            mixed_m[c] = x_m[c]
    if weights.leaky_decay > 0:
        gain = weights.leaky_gain[unit.block]
        for start in range(0, x.shape[0], unit.time):
            sequence = mixed[start : start + unit.time]
            add_leaky_average(sequence, scratch[0], gain, weights.leaky_decay, weights.leaky_share, first, last)


@serial_kernel
def conv_forward(out, x, unit, weights, activations, scratch, normed, arithmetic):
    """See _mixer.Mixer.forward."""
    layer, block, low, high = unit.layer, unit.block, unit.low, unit.high
    count = weights.dilations.shape[0]
    d = (unit.stage - 1) // 2
    if unit.stage == 0:
        _average(x, unit, weights, activations, normed)
    elif d < count and unit.stage % 2 == 1:
        rmsnorm_scales(activations.rstd[layer, d, low:high], activations.mixed[layer, d, low:high])
    elif d < count:
        _convolve(d, unit, weights, activations, scratch)
    else:
        out_in = normed[: high - low]
        scale_rows(out_in, activations.mixed[layer, count, low:high], weights.residual_scale)
        ternary_product(
            out,
            out_in,
            weights.out_panels[block],
            weights.out_codes[block],
            weights.out_plain[block],
            1,
            arithmetic,
            unit.thread,
        )


# --- backward: ternary layer, its weights; convolution, norm, of each dilation, the last first; leaky average ---


@helper
def _out_backward(dx, dout, unit, weights, activations, scratch, arithmetic):
    layer, block, low, high = unit.layer, unit.block, unit.low, unit.high
    # forward: out += residual_scale * m Wo'
    out_in = scratch.out_in[unit.place, low - unit.origin : high - unit.origin]
    scale_rows(out_in, activations.mixed[layer, weights.dilations.shape[0], low:high], weights.residual_scale)
    ternary_product(
        dx,
        dout,
        weights.out_panels[block],
        weights.out_codes[block],
        weights.out_plain[block],
        0,
        arithmetic,
        unit.thread,
    )
    scale_rows(dx, dx, weights.residual_scale)


@helper
def _out_weight_gradient(dout, unit, gradients, scratch, arithmetic):
    """That of a share of the outputs."""
    gradient = gradients.out[unit.copy, unit.block]
    first, last = share_of_outputs(gradient.shape[0], unit.share, unit.share_end, unit.shares)
    out_in = scratch.out_in[unit.place, unit.low - unit.origin : unit.high - unit.origin]
    for low in range(0, dout.shape[0], unit.tile):
        high = min(low + unit.tile, dout.shape[0])
        ternary_weight_gradient(gradient[first:last], dout[low:high], out_in[low:high], first, arithmetic, unit.thread)


@helper
def _convolve_backward(dm, d, unit, gradients, weights, activations, scratch):
    """dnormed from dm (M, C), the gradient of what _convolve wrote: a share of the channel groups."""
    time, layer, block, thread = unit.time, unit.layer, unit.block, unit.thread
    grouped, dgrouped, dgate_value = scratch.grouped[thread], scratch.dgrouped[thread], scratch.dgate_value[thread]
    groups, width = grouped.shape[0], dm.shape[1] // grouped.shape[0]
    first, last = unit.share * groups // unit.shares, unit.share_end * groups // unit.shares
    dilation, dconv = weights.dilations[d], gradients.conv[unit.copy, block, d]
    for start in range(unit.low, unit.high, time):
        end = start + time
        dm_b, before = dm[start - unit.low : end - unit.low], activations.mixed[layer, d, start:end]
        rstd = activations.rstd[layer, d, start:end]
        # forward: after = before + gated_conv(rmsnorm(before))
        gate_sequence_backward(dgate_value, dm_b, activations.gate_value[layer, d, start // time], width, first, last)
        normed_to_groups(grouped, before, rstd, weights.norms[block, d], width, first, last)
        conv_sequence_dinput(dgrouped, dgate_value, weights.conv[block, d], dilation, first, last)
        conv_sequence_dweight(dconv, grouped, dgate_value, dilation, first, last)
        dnormed = scratch.dnormed[unit.place, start - unit.origin : end - unit.origin]
        from_groups(dnormed, dgrouped, width, first, last)


@helper
def _norm_backward(dm, d, unit, gradients, weights, activations, scratch):
    """dm (M, C), the gradient of what _convolve wrote, becomes that of what it read."""
    layer, block, low, high = unit.layer, unit.block, unit.low, unit.high
    before, rstd = activations.mixed[layer, d, low:high], activations.rstd[layer, d, low:high]
    dnormed = scratch.dnormed[unit.place, low - unit.origin : high - unit.origin]
    dnorm = gradients.norms[unit.copy, block, d]
    rmsnorm_backward_rows(dm, dnorm, dnormed, before, weights.norms[block, d], rstd, True)


@helper
def _average_backward(dx, x, unit, gradients, weights):
    """dx (M, C) becomes the gradient of the mixer's input x (M, C), which it destroys: a share of the channels."""
    dim, block = x.shape[1], unit.block
    first, last = unit.share * dim // unit.shares, unit.share_end * dim // unit.shares
    dgain, gain = gradients.leaky_gain[unit.copy, block], weights.leaky_gain[block]
    for start in range(0, x.shape[0], unit.time):
        dx_b, x_b = dx[start : start + unit.time], x[start : start + unit.time]
        add_leaky_average_backward(dx_b, dgain, x_b, gain, weights.leaky_decay, weights.leaky_share, first, last)


@serial_kernel
def conv_backward(dx, dout, x, unit, gradients, weights, activations, scratch, normed, arithmetic):
    """See _mixer.Mixer.backward."""
    d = weights.dilations.shape[0] - unit.stage // 2
    if unit.stage == 0:
        _out_backward(dx, dout, unit, weights, activations, scratch, arithmetic)
    elif unit.stage == 1:
        _out_weight_gradient(dout, unit, gradients, scratch, arithmetic)
    elif d >= 0 and unit.stage % 2 == 0:
        _convolve_backward(dx, d, unit, gradients, weights, activations, scratch)
    elif d >= 0:
        _norm_backward(dx, d, unit, gradients, weights, activations, scratch)
    else:
        _average_backward(dx, x, unit, gradients, weights)
