"""The compiled code of the MatMul-free trunk: one thread's share of the forward and of the backward pass.

    x = E[rows] + gain_in * E[copies]
    for each layer:   y = norm1(x);   h = mlgru(forget(y), value(y))          forget, value, ...: BitLinears
                      x = x + out(hidden_norm(gate(y)) * silu(h))
                      a, b = gate_up(norm2(x));   x = x + down(silu(a) * b)
    out = final_norm(x) + gain_out * E[copies]

A pass is a list of steps, as of the other trunk (_trunk_regions.py), which the threads do in the same two orders
(_division.py). The recurrence divides by sequences and channels, everything else by rows, and the gradients of the
weights by sequences and outputs.
Letters: see _bit_arrays.py. Source: Zhu et al. 2024, arXiv:2406.02528, section 3.3, and the authors' code.
"""

from __future__ import annotations

import numpy as np
from numba import prange

from flashlm_numba.kernels._bit_layer import bit_weight_gradient, bitlinear_rows, bitlinear_rows_backward
from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._gradient_copies import clear_copies, sum_copies
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._rows import copy_rows, gather_rows
from flashlm_numba.kernels._trunk_regions import make_unit
from flashlm_numba.kernels.bit_rows import gated_backward, swiglu_backward
from flashlm_numba.kernels.mlgru import mlgru_sequence_backward
from flashlm_numba.kernels.ngram_copy import add_copies, add_copies_backward, find_copies
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows

# operations of a step
INPUTS, SCAN, OUTPUTS, WEIGHTS = range(4)


# --- forward ---


@serial_kernel
def bit_forward_thread(turn, batch, activations, scratch, weights, work, shape):
    region, thread = turn // shape.threads, turn % shape.threads
    table = shape.starts[shape.regions[region, 2]]
    for part in range(table[thread], table[thread + 1]):
        for step in range(shape.regions[region, 0], shape.regions[region, 1]):
            unit, operation = make_unit(step, part, thread, shape), shape.steps[step, 1]
            if operation == INPUTS:
                _inputs(unit, batch, activations, scratch, weights, work)
            elif operation == SCAN:
                _scan(unit, batch, activations, weights, work)
            else:
                _outputs(unit, activations, scratch, weights, work)
                if unit.layer == shape.layers - 1:
                    _end(unit, batch, activations, weights, work)


@helper
def _embed(x, copies, batch, weights, low, time):
    """x (M, C) = the embedded rows from row low on and what is copied; copies (O, N) is filled for these rows."""
    high = low + x.shape[0]
    gather_rows(x, batch.embedding, batch.rows[low:high])
    for o in range(weights.copy_order.shape[0]):
        start = low // time * time
        while batch.search and start < high:  # of each sequence
            end = min(start + time, high)
            order, skip = weights.copy_order[o], weights.copy_skip[o]
            rows = batch.rows[start:end]
            find_copies(copies[o, start:end], rows, max(low - start, 0), order, skip, weights.copy_reach)
            start += time
        add_copies(x, batch.embedding, copies[o, low:high], weights.gain_in[o])


@helper
def _inputs(unit, batch, activations, scratch, weights, work):
    """What the recurrence and its gate read."""
    layer, block, low, high, thread = unit.layer, unit.block, unit.low, unit.high, unit.thread
    x, normed = activations.x[layer, low:high], scratch.normed[thread, : high - low]
    if layer == 0:
        _embed(x, activations.copies, batch, weights, low, unit.time)
    call(work.norm, normed, activations.rstd_norm1[layer, low:high], x, weights.norm1[block], weights.eps)
    rstd = activations.rstd_inputs[layer, low:high]
    bitlinear_rows(
        activations.value[layer, low:high],
        normed,
        rstd,
        weights.value_norm[block],
        weights.value_scale[block],
        weights.value_codes[block],
        weights.value_plain[block],
        0,
        work,
        thread,
    )
    bitlinear_rows(
        activations.forget[layer, low:high],
        normed,
        rstd,
        weights.forget_norm[block],
        weights.forget_scale[block],
        weights.forget_codes[block],
        weights.forget_plain[block],
        0,
        work,
        thread,
    )
    bitlinear_rows(
        activations.gate[layer, low:high],
        normed,
        rstd,
        weights.gate_norm[block],
        weights.gate_scale[block],
        weights.gate_codes[block],
        weights.gate_plain[block],
        0,
        work,
        thread,
    )


@helper
def _scan(unit, batch, activations, weights, work):
    layer, time, dim = unit.layer, unit.time, weights.bounds.shape[1]
    first, last = unit.share * dim // unit.shares, unit.share_end * dim // unit.shares
    for start in range(unit.low, unit.high, time):
        end = start + time
        h, before = activations.h[layer, start:end], batch.before[layer]
        forget, value = activations.forget[layer, start:end], activations.value[layer, start:end]
        call(work.scan, h, before, forget, value, weights.bounds[unit.block], first, last)


@helper
def _outputs(unit, activations, scratch, weights, work):
    """The mixer's output, and the GLU."""
    layer, block, low, high, thread = unit.layer, unit.block, unit.low, unit.high, unit.thread
    normed, hidden = scratch.normed[thread, : high - low], scratch.hidden[thread, : high - low]
    gate, h, post_mixer = (
        activations.gate[layer, low:high],
        activations.h[layer, low:high],
        activations.post_mixer[layer, low:high],
    )
    call(work.gated, normed, activations.rstd_gate[layer, low:high], gate, h, weights.hidden_norm[block], weights.eps)
    copy_rows(post_mixer, activations.x[layer, low:high])
    bitlinear_rows(
        post_mixer,
        normed,
        activations.rstd_out_layer[layer, low:high],
        weights.out_norm[block],
        weights.out_scale[block],
        weights.out_codes[block],
        weights.out_plain[block],
        1,
        work,
        thread,
    )
    call(work.norm, normed, activations.rstd_norm2[layer, low:high], post_mixer, weights.norm2[block], weights.eps)
    gate_up = activations.gate_up[layer, low:high]
    bitlinear_rows(
        gate_up,
        normed,
        activations.rstd_gate_up[layer, low:high],
        weights.gate_up_norm[block],
        weights.gate_up_scale[block],
        weights.gate_up_codes[block],
        weights.gate_up_plain[block],
        0,
        work,
        thread,
    )
    call(work.swiglu, hidden, gate_up)
    after = activations.x[layer + 1, low:high]
    copy_rows(after, post_mixer)
    bitlinear_rows(
        after,
        hidden,
        activations.rstd_down[layer, low:high],
        weights.down_norm[block],
        weights.down_scale[block],
        weights.down_codes[block],
        weights.down_plain[block],
        1,
        work,
        thread,
    )


@helper
def _end(unit, batch, activations, weights, work):
    low, high = unit.low, unit.high
    out, after = activations.out[low:high], activations.x[unit.layer + 1, low:high]
    call(work.norm, out, activations.rstd_out[low:high], after, weights.final_norm, weights.eps)
    for o in range(weights.gain_out.shape[0]):
        add_copies(out, batch.embedding, activations.copies[o, low:high], weights.gain_out[o])


# --- backward ---


@serial_kernel
def bit_backward_thread(turn, batch, gradients, activations, scratch, weights, work, shape):
    region, thread = turn // shape.threads, turn % shape.threads
    if region == 0:
        clear_copies(gradients.pool, gradients.segments, thread, shape.threads)
    table = shape.starts[shape.regions[region, 2]]
    for part in range(table[thread], table[thread + 1]):
        for step in range(shape.regions[region, 0], shape.regions[region, 1]):
            unit, operation = make_unit(step, part, thread, shape), shape.steps[step, 1]
            if operation == OUTPUTS:
                if unit.layer == shape.layers - 1:
                    _end_backward(unit, batch, gradients, activations, weights)
                _glu_backward(unit, gradients, activations, scratch, weights, work)
                _out_backward(unit, gradients, activations, scratch, weights, work)
            elif operation == SCAN:
                _scan_backward(unit, gradients, activations, scratch, weights)
            elif operation == INPUTS:
                _inputs_backward(unit, batch, gradients, activations, scratch, weights, work)
            else:
                _weight_gradients(unit, gradients, scratch, work)


@helper
def _end_backward(unit, batch, gradients, activations, weights):
    low, high, copy = unit.low, unit.high, unit.copy
    dx, dout, x = gradients.dx[low:high], batch.dout[low:high], activations.x[unit.layer + 1, low:high]
    for o in range(gradients.gain_out.shape[1]):
        add_copies_backward(gradients.gain_out[copy, o], dout, batch.embedding, activations.copies[o, low:high])
    rstd = activations.rstd_out[low:high]
    rmsnorm_backward_rows(dx, gradients.final_norm[copy], dout, x, weights.final_norm, rstd, False)


@helper
def _glu_backward(unit, gradients, activations, scratch, weights, work):
    """dx (M, C), the gradient of a layer's output, becomes that of post_mixer."""
    layer, block, low, high, copy = unit.layer, unit.block, unit.low, unit.high, unit.copy
    thread, place, first, last, rows = unit.thread, unit.place, low - unit.origin, high - unit.origin, high - low
    dx, post_mixer = gradients.dx[low:high], activations.post_mixer[layer, low:high]
    gate_up, dgate_up = activations.gate_up[layer, low:high], scratch.dgate_up[place, first:last]
    hidden, dhidden = scratch.hidden[thread, :rows], scratch.dhidden[thread, :rows]
    # forward: x = post_mixer + down(silu(gate) * up), [gate, up] = gate_up(norm2(post_mixer))
    copy_rows(scratch.dlayer[place, first:last], dx)
    call(work.swiglu, hidden, gate_up)
    bitlinear_rows_backward(
        dhidden,
        gradients.down_norm[copy, block],
        scratch.down_in[place, first:last],
        scratch.dinner[thread, :rows],
        dx,
        hidden,
        weights.down_norm[block],
        activations.rstd_down[layer, low:high],
        weights.down_panels[block],
        False,
        work,
        thread,
    )
    swiglu_backward(dgate_up, dhidden, gate_up)
    normed, dnormed, dinput = scratch.normed[thread, :rows], scratch.dnormed[thread, :rows], scratch.dinput[thread]
    rstd = activations.rstd_norm2[layer, low:high]
    call(work.norm, normed, rstd, post_mixer, weights.norm2[block], weights.eps)
    bitlinear_rows_backward(
        dinput[:rows],
        gradients.gate_up_norm[copy, block],
        scratch.gate_up_in[place, first:last],
        dnormed,
        dgate_up,
        normed,
        weights.gate_up_norm[block],
        activations.rstd_gate_up[layer, low:high],
        weights.gate_up_panels[block],
        False,
        work,
        thread,
    )
    dnorm = gradients.norm2[copy, block]
    rmsnorm_backward_rows(dx, dnorm, dinput[:rows], post_mixer, weights.norm2[block], rstd, True)


@helper
def _out_backward(unit, gradients, activations, scratch, weights, work):
    """dgate, and dh of the states' own outputs, from dx (M, C), the gradient of post_mixer."""
    layer, block, low, high, copy = unit.layer, unit.block, unit.low, unit.high, unit.copy
    thread, place, first, last, rows = unit.thread, unit.place, low - unit.origin, high - unit.origin, high - low
    dx, gate, h = gradients.dx[low:high], activations.gate[layer, low:high], activations.h[layer, low:high]
    normed, dinput = scratch.normed[thread, :rows], scratch.dinput[thread, :rows]
    rstd = activations.rstd_gate[layer, low:high]
    # forward: post_mixer = x + out(hidden_norm(gate) * silu(h))
    copy_rows(scratch.dpost[place, first:last], dx)
    call(work.gated, normed, rstd, gate, h, weights.hidden_norm[block], weights.eps)
    bitlinear_rows_backward(
        dinput,
        gradients.out_norm[copy, block],
        scratch.out_in[place, first:last],
        scratch.dnormed[thread, :rows],
        dx,
        normed,
        weights.out_norm[block],
        activations.rstd_out_layer[layer, low:high],
        weights.out_panels[block],
        False,
        work,
        thread,
    )
    dgate, dh = scratch.dgate[place, first:last], scratch.dh[place, first:last]
    dnorm = gradients.hidden_norm[copy, block]
    gated_backward(dgate, dh, dnorm, dinput, gate, h, weights.hidden_norm[block], rstd)


@helper
def _scan_backward(unit, gradients, activations, scratch, weights):
    layer, block, time, dim, place = unit.layer, unit.block, unit.time, weights.bounds.shape[1], unit.place
    first, last = unit.share * dim // unit.shares, unit.share_end * dim // unit.shares
    for start in range(unit.low, unit.high, time):
        end, here, there = start + time, start - unit.origin, start + time - unit.origin
        mlgru_sequence_backward(
            scratch.dforget[place, here:there],
            scratch.dvalue[place, here:there],
            gradients.bounds[unit.copy, block],
            scratch.dh[place, here:there],
            activations.h[layer, start:end],
            scratch.zeros,
            activations.forget[layer, start:end],
            activations.value[layer, start:end],
            weights.bounds[block],
            first,
            last,
        )


@helper
def _inputs_backward(unit, batch, gradients, activations, scratch, weights, work):
    """dx (M, C), the gradient of post_mixer, becomes that of the layer's input."""
    layer, block, low, high, copy = unit.layer, unit.block, unit.low, unit.high, unit.copy
    thread, place, first, last, rows = unit.thread, unit.place, low - unit.origin, high - unit.origin, high - low
    dx, x, rstd1 = gradients.dx[low:high], activations.x[layer, low:high], activations.rstd_norm1[layer, low:high]
    normed, dnormed, dinput = scratch.normed[thread, :rows], scratch.dnormed[thread, :rows], scratch.dinput[thread]
    rstd = activations.rstd_inputs[layer, low:high]
    call(work.norm, normed, rstd1, x, weights.norm1[block], weights.eps)
    bitlinear_rows_backward(
        dinput[:rows],
        gradients.value_norm[copy, block],
        scratch.value_in[place, first:last],
        dnormed,
        scratch.dvalue[place, first:last],
        normed,
        weights.value_norm[block],
        rstd,
        weights.value_panels[block],
        False,
        work,
        thread,
    )
    bitlinear_rows_backward(
        dinput[:rows],
        gradients.forget_norm[copy, block],
        scratch.forget_in[place, first:last],
        dnormed,
        scratch.dforget[place, first:last],
        normed,
        weights.forget_norm[block],
        rstd,
        weights.forget_panels[block],
        True,
        work,
        thread,
    )
    bitlinear_rows_backward(
        dinput[:rows],
        gradients.gate_norm[copy, block],
        scratch.gate_in[place, first:last],
        dnormed,
        scratch.dgate[place, first:last],
        normed,
        weights.gate_norm[block],
        rstd,
        weights.gate_panels[block],
        True,
        work,
        thread,
    )
    # forward: post_mixer = x + mixer(norm1(x))
    rmsnorm_backward_rows(dx, gradients.norm1[copy, block], dinput[:rows], x, weights.norm1[block], rstd1, True)
    if layer == 0:
        for o in range(activations.copies.shape[0]):
            add_copies_backward(gradients.gain_in[copy, o], dx, batch.embedding, activations.copies[o, low:high])


@helper
def _weight_gradients(unit, gradients, scratch, work):
    """Those of a share of the outputs of each matrix."""
    copy, block, place = unit.copy, unit.block, unit.place
    bit_weight_gradient(gradients.value[copy, block], scratch.dvalue[place], scratch.value_in[place], unit, work)
    bit_weight_gradient(gradients.forget[copy, block], scratch.dforget[place], scratch.forget_in[place], unit, work)
    bit_weight_gradient(gradients.gate[copy, block], scratch.dgate[place], scratch.gate_in[place], unit, work)
    bit_weight_gradient(gradients.out[copy, block], scratch.dpost[place], scratch.out_in[place], unit, work)
    bit_weight_gradient(gradients.gate_up[copy, block], scratch.dgate_up[place], scratch.gate_up_in[place], unit, work)
    bit_weight_gradient(gradients.down[copy, block], scratch.dlayer[place], scratch.down_in[place], unit, work)


# --- regions ---


@kernel
def bit_forward_region(batch, activations, scratch, weights, work, shape):
    """A row, or a share of a row, has one writer."""
    for region in range(shape.regions.shape[0]):
        for index in prange(shape.threads):
            turn = region * shape.threads + np.int64(index)
            call(shape.forward, turn, batch, activations, scratch, weights, work, shape)


@kernel
def bit_backward_region(batch, gradients, activations, scratch, weights, work, shape):
    """The gradients of the weights are cleared and added up here; the sums are in their first copies."""
    for region in range(shape.regions.shape[0]):
        for index in prange(shape.threads):
            turn = region * shape.threads + np.int64(index)
            call(shape.backward, turn, batch, gradients, activations, scratch, weights, work, shape)
    for index in prange(shape.threads):
        sum_copies(gradients.pool, gradients.segments, np.int64(index), shape.threads)
