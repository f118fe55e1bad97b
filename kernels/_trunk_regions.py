"""The trunk's compiled code: one thread's share of the forward and of the backward pass, for any mixer.

    x = E[rows] + gain_in * E[copies]
    for each layer:   x = x + a mixer(rmsnorm(x));   x = x + b relu(n Wg')**2 * (n Wu') Wd'  with n = rmsnorm(x)
    out = rmsnorm(x) + gain_out * E[copies]

A layer is one pass through one block. There are R = passes * L layers, and layer r uses block r % L. FlashLM v3 has one
block and two passes. The n-gram copy (ngram_copy.py) copies in O ways; v3 has none. The mixer is a parameter: its
functions, from a module such as conv_mixer.py, are called by address (_calls.py). The trunk knows no mixer by name.

A pass is a list of steps, which the threads do in one of two orders (_division.py): each thread all of them for its own
sequences, in tiles of about 256 rows; or all threads together one step after another, in as many parallel regions. A
step computes the same in both. The products use register tiles over weights that are packed once per step of training
(_packed_gemm.py), or int8 (ternary_gemm.py). The gradients of the weights use single-threaded BLAS. They are summed in
copies and reduced in order (_gradient_copies.py), which gives the same bits on every run with the same number of
threads.
Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, Q chunks of sequences, M
rows of a part; O ways of copying.
Source: FlashLM v3.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._gradient_copies import clear_copies, sum_copies
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._rows import copy_rows, gather_rows
from flashlm_numba.kernels._steps import BEFORE_MIXER, FFN, FFN_WEIGHTS
from flashlm_numba.kernels._ternary_layer import share_of_outputs, ternary_product, ternary_weight_gradient
from flashlm_numba.kernels._trunk_arrays import Unit
from flashlm_numba.kernels.glu import glu_backward_rows, glu_rows
from flashlm_numba.kernels.ngram_copy import add_copies, add_copies_backward, find_copies
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows, rmsnorm_recompute, rmsnorm_rows

# --- one thread's part, for any mixer ---


@helper
def make_unit(step, part, thread, shape):
    layer, p = shape.steps[step, 0], shape.parts[part]
    block, stage = layer % shape.blocks, shape.steps[step, 2]
    return Unit(stage, layer, block, p[0], p[1], shape.time, shape.tile, thread, p[2], p[3], p[4], p[5], p[6], p[7])


@serial_kernel
def forward_thread(
    turn,
    batch,
    activations,
    scratch,
    weights,
    arithmetic,
    shape,
    mixer_weights,
    mixer_activations,
    mixer_scratch,
):
    region, thread = turn // shape.threads, turn % shape.threads
    table = shape.starts[shape.regions[region, 2]]
    for part in range(table[thread], table[thread + 1]):
        for step in range(shape.regions[region, 0], shape.regions[region, 1]):
            unit, operation = make_unit(step, part, thread, shape), shape.steps[step, 1]
            if operation == BEFORE_MIXER:
                _before_mixer(unit, batch, activations, scratch, weights)
            elif operation == FFN:
                _ffn(unit, batch, activations, scratch, weights, arithmetic, shape.layers)
            else:
                call(
                    shape.mixer_forward,
                    activations.post_mixer[unit.layer, unit.low : unit.high],
                    scratch.mixer_in[unit.place, unit.low - unit.origin : unit.high - unit.origin],
                    unit,
                    mixer_weights,
                    mixer_activations,
                    mixer_scratch,
                    scratch.normed[thread],
                    arithmetic,
                )


@helper
def _before_mixer(unit, batch, activations, scratch, weights):
    layer, low, high = unit.layer, unit.low, unit.high
    x = activations.x[layer, low:high]
    if layer == 0:
        _embed(x, activations.copies, batch, weights, low, unit.time)
    mixer_in = scratch.mixer_in[unit.place, low - unit.origin : high - unit.origin]
    rmsnorm_rows(mixer_in, activations.rstd_mixer[layer, low:high], x, weights.norm1[unit.block])
    copy_rows(activations.post_mixer[layer, low:high], x)


@helper
def _embed(x, copies, batch, weights, low, time):
    """x (M, C) = the embedded rows from row low on and what is copied; copies (O, N) is filled for these rows."""
    high = low + x.shape[0]
    gather_rows(x, batch.embedding, batch.rows[low:high])
    for o in range(weights.copy_order.shape[0]):
        start = low // time * time
        while start < high:  # of each sequence
            end = min(start + time, high)
            find_copies(
                copies[o, start:end],
                batch.rows[start:end],
                max(low - start, 0),
                weights.copy_order[o],
                weights.copy_skip[o],
                weights.copy_reach,
            )
            start += time
        add_copies(x, batch.embedding, copies[o, low:high], weights.gain_in[o])


@helper
def _ffn(unit, batch, activations, scratch, weights, arithmetic, layers):
    layer, block, low, high, thread = unit.layer, unit.block, unit.low, unit.high, unit.thread
    normed, hidden = scratch.normed[thread, : high - low], scratch.inner[thread, : high - low]
    post_mixer, gate_up = activations.post_mixer[layer, low:high], activations.gate_up[layer, low:high]
    rmsnorm_rows(normed, activations.rstd_ffn[layer, low:high], post_mixer, weights.norm2[block])
    ternary_product(
        gate_up,
        normed,
        weights.gate_up_panels[block],
        weights.gate_up_codes[block],
        weights.gate_up_plain[block],
        0,
        arithmetic,
        thread,
    )
    glu_rows(hidden, gate_up, weights.ffn_residual_scale)
    after = activations.x[layer + 1, low:high]
    copy_rows(after, post_mixer)
    ternary_product(
        after,
        hidden,
        weights.down_panels[block],
        weights.down_codes[block],
        weights.down_plain[block],
        1,
        arithmetic,
        thread,
    )
    if layer == layers - 1:
        out = activations.out[low:high]
        rmsnorm_rows(out, activations.rstd_out[low:high], after, weights.final_norm)
        for o in range(weights.gain_out.shape[0]):
            add_copies(out, batch.embedding, activations.copies[o, low:high], weights.gain_out[o])


@serial_kernel
def backward_thread(
    turn,
    batch,
    gradients,
    activations,
    scratch,
    weights,
    arithmetic,
    shape,
    mixer_gradients,
    mixer_weights,
    mixer_activations,
    mixer_scratch,
):
    region, thread = turn // shape.threads, turn % shape.threads
    if region == 0:
        clear_copies(gradients.pool, gradients.segments, thread, shape.threads)
    table = shape.starts[shape.regions[region, 2]]
    for part in range(table[thread], table[thread + 1]):
        for step in range(shape.regions[region, 0], shape.regions[region, 1]):
            unit, operation = make_unit(step, part, thread, shape), shape.steps[step, 1]
            if operation == FFN:
                if unit.layer == shape.layers - 1:
                    _final_norm_backward(unit, batch, gradients, activations, weights)
                _ffn_backward(unit, gradients, activations, scratch, weights, arithmetic)
            elif operation == FFN_WEIGHTS:
                _ffn_weight_gradients(unit, gradients, scratch, arithmetic)
            elif operation == BEFORE_MIXER:
                _before_mixer_backward(unit, batch, gradients, activations, scratch, weights)
            else:
                first, last = unit.low - unit.origin, unit.high - unit.origin
                call(
                    shape.mixer_backward,
                    scratch.dmixer_in[unit.place, first:last],
                    gradients.dx[unit.low : unit.high],
                    scratch.mixer_in[unit.place, first:last],
                    unit,
                    mixer_gradients,
                    mixer_weights,
                    mixer_activations,
                    mixer_scratch,
                    scratch.normed[thread],
                    arithmetic,
                )


@helper
def _final_norm_backward(unit, batch, gradients, activations, weights):
    low, high, copy = unit.low, unit.high, unit.copy
    dx, dout = gradients.dx[low:high], batch.dout[low:high]
    for o in range(gradients.gain_out.shape[1]):
        add_copies_backward(gradients.gain_out[copy, o], dout, batch.embedding, activations.copies[o, low:high])
    rmsnorm_backward_rows(
        dx,
        gradients.final_norm[copy],
        dout,
        activations.x[unit.layer + 1, low:high],
        weights.final_norm,
        activations.rstd_out[low:high],
        False,
    )


@helper
def _ffn_backward(unit, gradients, activations, scratch, weights, arithmetic):
    """dx (M, C), the gradient of a layer's output, becomes that of post_mixer; mixer_in is computed again."""
    layer, block, low, high, thread, place = unit.layer, unit.block, unit.low, unit.high, unit.thread, unit.place
    first, last = low - unit.origin, high - unit.origin
    dx, post_mixer, rstd = gradients.dx[low:high], activations.post_mixer[layer, low:high], activations.rstd_ffn[layer]
    hidden, dgate_up, normed = scratch.hidden[place], scratch.dgate_up[place, first:last], scratch.ffn_in[place]
    dhidden, dnormed = scratch.inner[thread, : high - low], scratch.normed[thread, : high - low]
    # forward: x = post_mixer + hidden Wd', hidden = b relu(gate)**2 * up, [gate, up] = rmsnorm(post_mixer) Wgu'
    copy_rows(scratch.dlayer[place, first:last], dx)
    ternary_product(
        dhidden,
        dx,
        weights.down_panels[block],
        weights.down_codes[block],
        weights.down_plain[block],
        0,
        arithmetic,
        thread,
    )
    gate_up = activations.gate_up[layer, low:high]
    glu_backward_rows(hidden[first:last], dgate_up, dhidden, gate_up, weights.ffn_residual_scale)
    rmsnorm_recompute(normed[first:last], post_mixer, weights.norm2[block], rstd[low:high])
    ternary_product(
        dnormed,
        dgate_up,
        weights.gate_up_panels[block],
        weights.gate_up_codes[block],
        weights.gate_up_plain[block],
        0,
        arithmetic,
        thread,
    )
    dnorm = gradients.norm2[unit.copy, block]
    rmsnorm_backward_rows(dx, dnorm, dnormed, post_mixer, weights.norm2[block], rstd[low:high], True)
    x, rstd_mixer = activations.x[layer, low:high], activations.rstd_mixer[layer, low:high]
    rmsnorm_recompute(scratch.mixer_in[place, first:last], x, weights.norm1[block], rstd_mixer)


@helper
def _ffn_weight_gradients(unit, gradients, scratch, arithmetic):
    """Those of a share of the outputs of each matrix."""
    copy, block, place, thread = unit.copy, unit.block, unit.place, unit.thread
    dgate_up, ddown = gradients.gate_up[copy, block], gradients.down[copy, block]
    for low in range(unit.low - unit.origin, unit.high - unit.origin, unit.tile):
        high = min(low + unit.tile, unit.high - unit.origin)
        first, last = share_of_outputs(ddown.shape[0], unit.share, unit.share_end, unit.shares)
        ternary_weight_gradient(
            ddown[first:last],
            scratch.dlayer[place, low:high],
            scratch.hidden[place, low:high],
            first,
            arithmetic,
            thread,
        )
        first, last = share_of_outputs(dgate_up.shape[0], unit.share, unit.share_end, unit.shares)
        ternary_weight_gradient(
            dgate_up[first:last],
            scratch.dgate_up[place, low:high],
            scratch.ffn_in[place, low:high],
            first,
            arithmetic,
            thread,
        )


@helper
def _before_mixer_backward(unit, batch, gradients, activations, scratch, weights):
    layer, block, low, high, copy = unit.layer, unit.block, unit.low, unit.high, unit.copy
    dx, x = gradients.dx[low:high], activations.x[layer, low:high]
    dmixer_in = scratch.dmixer_in[unit.place, low - unit.origin : high - unit.origin]
    # forward: post_mixer = x + mixer(rmsnorm(x))
    rstd = activations.rstd_mixer[layer, low:high]
    rmsnorm_backward_rows(dx, gradients.norm1[copy, block], dmixer_in, x, weights.norm1[block], rstd, True)
    if layer == 0:
        for o in range(activations.copies.shape[0]):
            add_copies_backward(gradients.gain_in[copy, o], dx, batch.embedding, activations.copies[o, low:high])


# --- regions ---


@kernel
def trunk_forward_region(
    batch,
    activations,
    scratch,
    weights,
    arithmetic,
    shape,
    mixer_weights,
    mixer_activations,
    mixer_scratch,
):
    """A row, or a share of a row, has one writer."""
    for region in range(shape.regions.shape[0]):
        for index in prange(shape.threads):
            call(
                shape.forward,
                region * shape.threads + np.int64(index),
                batch,
                activations,
                scratch,
                weights,
                arithmetic,
                shape,
                mixer_weights,
                mixer_activations,
                mixer_scratch,
            )


@kernel
def trunk_backward_region(
    batch,
    gradients,
    activations,
    scratch,
    weights,
    arithmetic,
    shape,
    mixer_gradients,
    mixer_weights,
    mixer_activations,
    mixer_scratch,
):
    """The gradients of the weights are cleared and added up here; the sums are in their first copies."""
    for region in range(shape.regions.shape[0]):
        for index in prange(shape.threads):
            call(
                shape.backward,
                region * shape.threads + np.int64(index),
                batch,
                gradients,
                activations,
                scratch,
                weights,
                arithmetic,
                shape,
                mixer_gradients,
                mixer_weights,
                mixer_activations,
                mixer_scratch,
            )
    for index in prange(shape.threads):
        sum_copies(gradients.pool, gradients.segments, np.int64(index), shape.threads)
