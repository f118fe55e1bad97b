"""The trunk's compiled code: one thread's share of the forward and of the backward pass, for any mixer.

    x = E[rows] + gain_in * E[copies]
    for each layer:   x = x + a mixer(rmsnorm(x));   x = x + b relu(n Wg')**2 * (n Wu') Wd'  with n = rmsnorm(x)
    out = rmsnorm(x) + gain_out * E[copies]

A layer is one pass through one block. There are R = passes * L layers, and layer r uses block r % L. FlashLM v3 has one
block and two passes. The n-gram copy (ngram_copy.py) copies in O ways; v3 has none. The mixer is a parameter: its
functions, from a module such as conv_mixer.py, are called by address (_calls.py). The trunk knows no mixer by name.

There is one parallel region per direction. A thread processes complete sequences, which are independent, in tiles of
about 256 rows, so that its matrix products are large and its scratch stays in cache. The products use register tiles
over weights that are packed once per step (_packed_gemm.py), or int8 (ternary_gemm.py). The gradients of the weights
use single-threaded BLAS. They are summed per thread and reduced in thread order, which gives the same bits on every run
with the same number of threads.
Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, M rows of a tile; O ways
of copying.
Source: FlashLM v3.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numba import prange

from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._rows import clear_rows, copy_rows, gather_rows
from flashlm_numba.kernels._ternary_layer import ternary_product, ternary_weight_gradient
from flashlm_numba.kernels.glu import glu_backward_rows, glu_rows
from flashlm_numba.kernels.ngram_copy import add_copies, add_copies_backward, find_copies
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows, rmsnorm_recompute, rmsnorm_rows


class Shape(NamedTuple):
    """The division of a batch into tiles, and the addresses of the functions that a thread calls (_calls.py)."""

    time: int  # T, rows of a sequence
    tile: int  # sequences of a tile
    threads: int  # P
    layers: int  # R
    blocks: int  # L
    forward: Any = 0  # address of forward_thread
    backward: Any = 0  # of backward_thread
    mixer_forward: Any = 0  # of the mixer's functions: see trunk.Mixer
    mixer_backward: Any = 0
    mixer_clear: Any = 0


class Unit(NamedTuple):
    """The unit of work of a mixer's helper: a tile of complete sequences at one layer, a share of channel groups."""

    layer: int  # r, where activations are kept
    block: int  # r % L, whose weights are read
    low: int  # first row of the tile
    high: int  # last row + 1; high - low is a multiple of time
    time: int  # T
    thread: int  # whose scratch is used
    share: int  # of the channel groups, 0 <= share < shares
    shares: int  # into which the channel groups are divided; 1 today: a thread has them all


class Batch(NamedTuple):
    """The inputs of the forward pass."""

    rows: np.ndarray  # (N,) int32: rows of the embedding
    embedding: np.ndarray  # (V, C)


class BatchGradient(NamedTuple):
    """The inputs of the backward pass."""

    dout: np.ndarray  # (N, C)
    embedding: np.ndarray  # (V, C)


class Weights(NamedTuple):
    """Weights of all blocks, without their mixers'. In the backward pass the layouts are those of the transposes."""

    norm1: np.ndarray  # (L, C): before the mixer
    norm2: np.ndarray  # (L, C): before the FFN
    final_norm: np.ndarray  # (C,)
    gate_up_panels: np.ndarray  # of Layouts, (2 I', C) matrices
    gate_up_codes: np.ndarray
    gate_up_plain: np.ndarray
    down_panels: np.ndarray  # of Layouts, (C, I') matrices
    down_codes: np.ndarray
    down_plain: np.ndarray
    ffn_residual_scale: np.float32
    copy_order: np.ndarray  # (O,) int64: tokens that must be the same
    copy_skip: np.ndarray  # (O,) int64: later occurrences that are passed over
    copy_reach: int  # tokens that an occurrence may lie back
    gain_in: np.ndarray  # (O, C): of the copies, at the input
    gain_out: np.ndarray  # (O, C): at the output


class Activations(NamedTuple):
    """Activations saved for the backward pass."""

    x: np.ndarray  # (R + 1, N, C): input of each layer; the last: of the final norm
    post_mixer: np.ndarray  # (R, N, C)
    rstd_mixer: np.ndarray  # (R, N): of norm1
    rstd_ffn: np.ndarray  # (R, N): of norm2
    gate_up: np.ndarray  # (R, N, 2 I')
    copies: np.ndarray  # (O, N) int32: rows of the embedding, or -1
    out: np.ndarray  # (N, C)
    rstd_out: np.ndarray  # (N,)


class Scratch(NamedTuple):
    """Scratch per thread."""

    normed: np.ndarray  # (P, M, C)
    mixer_in: np.ndarray  # (P, M, C)
    dmixer_in: np.ndarray  # (P, M, C)
    hidden: np.ndarray  # (P, M, I')
    dhidden: np.ndarray  # (P, M, I')
    dgate_up: np.ndarray  # (P, M, 2 I')


class Gradients(NamedTuple):
    """dx, and the gradients of the weights per thread."""

    dx: np.ndarray  # (N, C): of the trunk's input
    norm1: np.ndarray  # (P, L, C)
    norm2: np.ndarray  # (P, L, C)
    final_norm: np.ndarray  # (P, 1, C)
    gate_up: np.ndarray  # (P, L, 2 I', C)
    down: np.ndarray  # (P, L, C, I')
    gain_in: np.ndarray  # (P, O, C)
    gain_out: np.ndarray  # (P, O, C)


# --- one thread's share, for any mixer ---


@serial_kernel
def forward_thread(
    thread,
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
    sequences = batch.rows.shape[0] // shape.time
    first, last = thread * sequences // shape.threads, (thread + 1) * sequences // shape.threads
    normed, hidden = scratch.normed[thread], scratch.hidden[thread]
    for start in range(first, last, shape.tile):
        low, high = start * shape.time, min(start + shape.tile, last) * shape.time
        size = high - low
        _embed(activations.x[0, low:high], activations.copies, batch, weights, low, shape.time)
        for layer in range(shape.layers):
            block = layer % shape.blocks
            x, post_mixer = activations.x[layer, low:high], activations.post_mixer[layer, low:high]
            mixer_in = scratch.mixer_in[thread, :size]
            rmsnorm_rows(mixer_in, activations.rstd_mixer[layer, low:high], x, weights.norm1[block])
            copy_rows(post_mixer, x)
            unit = Unit(layer, block, low, high, shape.time, thread, 0, 1)
            call(
                shape.mixer_forward,
                post_mixer,
                mixer_in,
                unit,
                mixer_weights,
                mixer_activations,
                mixer_scratch,
                normed,
                arithmetic,
            )
            rmsnorm_rows(normed[:size], activations.rstd_ffn[layer, low:high], post_mixer, weights.norm2[block])
            gate_up = activations.gate_up[layer, low:high]
            ternary_product(
                gate_up,
                normed[:size],
                weights.gate_up_panels[block],
                weights.gate_up_codes[block],
                weights.gate_up_plain[block],
                0,
                arithmetic,
                thread,
            )
            glu_rows(hidden[:size], gate_up, weights.ffn_residual_scale)
            after = activations.x[layer + 1, low:high]
            copy_rows(after, post_mixer)
            ternary_product(
                after,
                hidden[:size],
                weights.down_panels[block],
                weights.down_codes[block],
                weights.down_plain[block],
                1,
                arithmetic,
                thread,
            )
        out = activations.out[low:high]
        rmsnorm_rows(out, activations.rstd_out[low:high], activations.x[shape.layers, low:high], weights.final_norm)
        for o in range(weights.copy_order.shape[0]):
            add_copies(out, batch.embedding, activations.copies[o, low:high], weights.gain_out[o])


@helper
def _embed(x, copies, batch, weights, low, time):
    """x (M, C) = the embedded rows from row low on and what is copied; copies (O, N) is filled for these rows."""
    high = low + x.shape[0]
    gather_rows(x, batch.embedding, batch.rows[low:high])
    for o in range(weights.copy_order.shape[0]):
        for start in range(low, high, time):
            find_copies(
                copies[o, start : start + time],
                batch.rows[start : start + time],
                weights.copy_order[o],
                weights.copy_skip[o],
                weights.copy_reach,
            )
        add_copies(x, batch.embedding, copies[o, low:high], weights.gain_in[o])


@serial_kernel
def backward_thread(
    thread,
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
    sequences = batch.dout.shape[0] // shape.time
    first, last = thread * sequences // shape.threads, (thread + 1) * sequences // shape.threads
    _clear(gradients, thread)
    call(shape.mixer_clear, mixer_gradients, thread)
    normed = scratch.normed[thread]
    for start in range(first, last, shape.tile):
        low, high = start * shape.time, min(start + shape.tile, last) * shape.time
        size = high - low
        dx, dout = gradients.dx[low:high], batch.dout[low:high]
        for o in range(activations.copies.shape[0]):
            add_copies_backward(gradients.gain_out[thread, o], dout, batch.embedding, activations.copies[o, low:high])
        rmsnorm_backward_rows(
            dx,
            gradients.final_norm[thread, 0],
            dout,
            activations.x[shape.layers, low:high],
            weights.final_norm,
            activations.rstd_out[low:high],
            False,
        )
        for back in range(shape.layers):
            layer = shape.layers - 1 - back
            block = layer % shape.blocks
            _ffn_backward(dx, gradients, activations, scratch, weights, arithmetic, layer, block, low, high, thread)
            # forward: post_mixer = x + mixer(rmsnorm(x))
            x, rstd = activations.x[layer, low:high], activations.rstd_mixer[layer, low:high]
            mixer_in, dmixer_in = scratch.mixer_in[thread, :size], scratch.dmixer_in[thread, :size]
            rmsnorm_recompute(mixer_in, x, weights.norm1[block], rstd)
            unit = Unit(layer, block, low, high, shape.time, thread, 0, 1)
            call(
                shape.mixer_backward,
                dmixer_in,
                dx,
                mixer_in,
                unit,
                mixer_gradients,
                mixer_weights,
                mixer_activations,
                mixer_scratch,
                normed,
                arithmetic,
            )
            rmsnorm_backward_rows(dx, gradients.norm1[thread, block], dmixer_in, x, weights.norm1[block], rstd, True)
        for o in range(activations.copies.shape[0]):
            add_copies_backward(gradients.gain_in[thread, o], dx, batch.embedding, activations.copies[o, low:high])


@helper
def _ffn_backward(dx, gradients, activations, scratch, weights, arithmetic, layer, block, low, high, thread):
    """dx (M, C), the gradient of a layer's output, becomes that of post_mixer."""
    size = high - low
    hidden, dhidden = scratch.hidden[thread, :size], scratch.dhidden[thread, :size]
    dgate_up, normed = scratch.dgate_up[thread, :size], scratch.normed[thread, :size]
    dnormed = scratch.dmixer_in[thread, :size]
    post_mixer, rstd = activations.post_mixer[layer, low:high], activations.rstd_ffn[layer, low:high]
    # forward: x = post_mixer + hidden Wd', hidden = b relu(gate)**2 * up, [gate, up] = rmsnorm(post_mixer) Wgu'
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
    glu_backward_rows(hidden, dgate_up, dhidden, activations.gate_up[layer, low:high], weights.ffn_residual_scale)
    ternary_weight_gradient(gradients.down[thread, block], dx, hidden, arithmetic, thread)
    rmsnorm_recompute(normed, post_mixer, weights.norm2[block], rstd)
    ternary_weight_gradient(gradients.gate_up[thread, block], dgate_up, normed, arithmetic, thread)
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
    rmsnorm_backward_rows(dx, gradients.norm2[thread, block], dnormed, post_mixer, weights.norm2[block], rstd, True)


@helper
def _clear(gradients, thread):
    clear_rows(gradients.norm1[thread])
    clear_rows(gradients.norm2[thread])
    clear_rows(gradients.final_norm[thread])
    clear_rows(gradients.gain_in[thread])
    clear_rows(gradients.gain_out[thread])
    for block in range(gradients.gate_up.shape[1]):
        clear_rows(gradients.gate_up[thread, block])
        clear_rows(gradients.down[thread, block])


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
    """Parallel over sequences; a row has one writer."""
    for index in prange(shape.threads):
        call(
            shape.forward,
            np.int64(index),
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
    """Parallel over sequences; the gradients of the weights are per thread, and cleared here."""
    for index in prange(shape.threads):
        call(
            shape.backward,
            np.int64(index),
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
