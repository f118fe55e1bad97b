"""The compiled code of the MatMul-free trunk on packed weights: a thread's part of a layer, for M rows.

The rows are the next tokens of one text, or of several, as many for each text.

A layer has four products, and threads divide each by its outputs, which are whole lines of 16 floats. So they read
every packed matrix once, whatever M. Between two products stands elementwise work on whole rows:

    PREPARE   norms or gates, then the norm and the rounding of the next product's inputs
    MULTIPLY  this thread's outputs, added to x or not; after value, forget and gate also the recurrence of its channels

For many rows these are two stages, and PREPARE divides by rows. A single row is prepared by each thread for itself,
which takes microseconds, and a layer then has four stages instead of eight. All threads end a stage before one begins
the next. Everything but the integer products is the code that training calls, by its address.
Letters: M rows, C channels, I FFN width, L blocks, R layers, N texts, K inputs of a product, W packed bytes per row,
P threads, S sets of inputs: 1, or P for a single row.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import prange

from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel, strict_helper

LINE = 16  # floats: outputs are divided in these
ROWS_AT_ONCE = 512  # packed rows of a call, whose int32 sums stay in the second-level cache
MOST_ROWS = 64  # M
PRODUCTS = 4  # of a layer: value, forget and gate; out; gate_up; down
VALUE, FORGET, GATE, OUT, GATE_UP, DOWN = range(6)  # the matrices of a block


class PackedWeights(NamedTuple):
    """Weights of all blocks."""

    norm1: np.ndarray  # (L, C)
    norm2: np.ndarray  # (L, C)
    hidden_norm: np.ndarray  # (L, C)
    final_norm: np.ndarray  # (C,)
    bounds: np.ndarray  # (L, C)
    norms: np.ndarray  # (L, 5, C): of the layers up to gate_up
    down_norm: np.ndarray  # (L, I)
    scales: np.ndarray  # (L, 6)
    codes: np.ndarray  # (any,) uint8: the packed matrices (ternary.pack_ternary)
    places: np.ndarray  # (L, 6) int64: where each begins
    eps: np.float32  # of the first four norms


class PackedWork(NamedTuple):
    """Activations and scratch for M rows, and the addresses of what a thread calls (_calls.py)."""

    x: np.ndarray  # (M, C): input and result
    rstd: np.ndarray  # (S, M)
    value: np.ndarray  # (M, C)
    forget: np.ndarray  # (M, C)
    gate: np.ndarray  # (M, C)
    h: np.ndarray  # (M, C)
    gate_up: np.ndarray  # (M, 2 I)
    normed: np.ndarray  # (S, any): (M, C) or (M, I)
    row: np.ndarray  # (P, any)
    q: np.ndarray  # (S, 3, any) int8: (M, 4 W), rounded inputs of the products of a stage
    steps: np.ndarray  # (S, 3, M): scales
    totals: np.ndarray  # (S, 3, M) int32: sums of q
    sums: np.ndarray  # (P, any) int32: (M, ROWS_AT_ONCE)
    thread: int
    product: int
    inputs: int
    norm: int
    gated: int
    swiglu: int
    scan: int


@strict_helper
def _write(out, first, sums, steps, add):
    """Columns from `first` on of out (M, R) = steps * sums, or added to them; sums (M, any).

    Rounded as in training, without fused multiply-adds.
    """
    for m in range(sums.shape[0]):
        step, found = steps[m], sums[m]
        row = out[m, first : first + found.shape[0]]
        for r in range(found.shape[0]):
            value = np.float32(found[r]) * step
            row[r] = row[r] + value if add else value


@helper
def share(count, thread, threads):
    """First and last + 1 of a thread's part of this many outputs."""
    lines = (count + LINE - 1) // LINE
    return min(count, LINE * (thread * lines // threads)), min(count, LINE * ((thread + 1) * lines // threads))


@helper
def multiply_rows(out, first, packed, q, steps, sums, product, add):
    """Columns from `first` on of out (M, R) = the outputs of packed (any, W) for q (M, 4 W), or added to them.

    sums (any,) int32: scratch
    """
    rows = q.shape[0]
    for low in range(0, packed.shape[0], ROWS_AT_ONCE):
        high = min(packed.shape[0], low + ROWS_AT_ONCE)
        found = sums[: rows * (high - low)].reshape(rows, high - low)
        call(product, found, packed[low:high], q)
        _write(out, first + low, found, steps, add)


@helper
def _multiply(out, columns, block, matrix, source, place, add, thread, threads, work, weights):
    """This thread's columns of out (M, R), the outputs of a matrix (R, columns) for the set's inputs `source`."""
    first, last = share(out.shape[1], thread, threads)
    width, rows = (columns + 255) // 256 * 64, work.x.shape[0]
    start = weights.places[block, matrix]
    packed = weights.codes[start + first * width : start + last * width].reshape(last - first, width)
    q = work.q[place, source, : rows * 4 * width].reshape(rows, 4 * width)
    multiply_rows(out, first, packed, q, work.steps[place, source], work.sums[thread], work.product, add)


@helper
def _round(x, norm, scale, target, place, low, high, thread, work):
    """The rows low..high of a set's inputs number `target`, for x (high - low, K)."""
    rows, columns = work.x.shape[0], x.shape[1]
    width = (columns + 255) // 256 * 256
    q = work.q[place, target, : rows * width].reshape(rows, width)[low:high]
    steps, totals = work.steps[place, target, low:high], work.totals[place, target, low:high]
    call(work.inputs, q, steps, totals, work.rstd[place, low:high], work.row[thread, :columns], x, norm, scale)


@helper
def _prepare(which, block, place, low, high, thread, work, weights):
    """The inputs of the product number `which`, of the rows low..high."""
    dim, inner, rows = work.x.shape[1], weights.down_norm.shape[1], work.x.shape[0]
    x, rstd = work.x[low:high], work.rstd[place, low:high]
    normed = work.normed[place, : rows * dim].reshape(rows, dim)[low:high]
    if which == 0:
        call(work.norm, normed, rstd, x, weights.norm1[block], weights.eps)
        for target in range(3):
            norm, scale = weights.norms[block, target], weights.scales[block, target]
            _round(normed, norm, scale, target, place, low, high, thread, work)
    elif which == 1:
        gate, h = work.gate[low:high], work.h[low:high]
        call(work.gated, normed, rstd, gate, h, weights.hidden_norm[block], weights.eps)
        _round(normed, weights.norms[block, OUT], weights.scales[block, OUT], 0, place, low, high, thread, work)
    elif which == 2:
        call(work.norm, normed, rstd, x, weights.norm2[block], weights.eps)
        norm, scale = weights.norms[block, GATE_UP], weights.scales[block, GATE_UP]
        _round(normed, norm, scale, 0, place, low, high, thread, work)
    else:
        hidden = work.normed[place, : rows * inner].reshape(rows, inner)[low:high]
        call(work.swiglu, hidden, work.gate_up[low:high])
        _round(hidden, weights.down_norm[block], weights.scales[block, DOWN], 0, place, low, high, thread, work)


@helper
def _products(which, layer, block, place, thread, threads, states, work, weights):
    dim, inner = work.x.shape[1], weights.down_norm.shape[1]
    if which == 0:
        _multiply(work.value, dim, block, VALUE, VALUE, place, False, thread, threads, work, weights)
        _multiply(work.forget, dim, block, FORGET, FORGET, place, False, thread, threads, work, weights)
        _multiply(work.gate, dim, block, GATE, GATE, place, False, thread, threads, work, weights)
        first, last = share(dim, thread, threads)
        texts = states.shape[1]
        tokens = work.h.shape[0] // texts
        for n in range(texts):
            start, end, before = n * tokens, (n + 1) * tokens, states[layer, n]
            h, forget, value = work.h[start:end], work.forget[start:end], work.value[start:end]
            call(work.scan, h, before, forget, value, weights.bounds[block], first, last)
            for c in range(first, last):
                before[c] = h[tokens - 1, c]
    elif which == 1:
        _multiply(work.x, dim, block, OUT, 0, place, True, thread, threads, work, weights)
    elif which == 2:
        _multiply(work.gate_up, dim, block, GATE_UP, 0, place, False, thread, threads, work, weights)
    else:
        _multiply(work.x, inner, block, DOWN, 0, place, True, thread, threads, work, weights)


@serial_kernel
def packed_thread(turn, threads, states, work, weights):
    """A thread's part of a stage, turn = stage * threads + thread; see packed_region."""
    stage, thread, rows = turn // threads, turn % threads, work.x.shape[0]
    blocks = weights.norm1.shape[0]
    if rows == 1:
        layer, which = stage // PRODUCTS, stage % PRODUCTS
        block = layer % blocks
        _prepare(which, block, thread, 0, 1, thread, work, weights)
        _products(which, layer, block, thread, thread, threads, states, work, weights)
    else:
        layer, step = stage // (2 * PRODUCTS), stage % (2 * PRODUCTS)
        block, which = layer % blocks, step // 2
        low, high = thread * rows // threads, (thread + 1) * rows // threads
        if step % 2 == 0 and high > low:
            _prepare(which, block, 0, low, high, thread, work, weights)
        elif step % 2 == 1:
            _products(which, layer, block, 0, thread, threads, states, work, weights)


@kernel
def packed_region(stages, threads, states, work, weights):
    """All layers, work.x = the last one's result; states (R, N, C) are those before the rows, then those after them.

    The first M / N rows belong to the first text, the next ones to the second, and so on.
    """
    for stage in range(stages):
        for index in prange(threads):
            call(work.thread, stage * threads + np.int64(index), threads, states, work, weights)


@serial_kernel
def outputs_thread(thread, threads, out, packed, q, steps, sums, product):
    """A thread's columns of out (M, R), the outputs of a BitLinear; see bit_packed.packed_outputs."""
    first, last = share(out.shape[1], thread, threads)
    multiply_rows(out, first, packed[first:last], q, steps, sums[thread], product, False)


@kernel
def outputs_region(function, threads, out, packed, q, steps, sums, product):
    for index in prange(threads):
        call(function, np.int64(index), threads, out, packed, q, steps, sums, product)
