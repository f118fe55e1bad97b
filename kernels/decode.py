"""Decoding: one token through the trunk, with a state whose size does not depend on the length of the text.

The arithmetic is that of kernels/trunk.py for a single row. Of the past only the running average is needed, a row for
every pass, the tokens among which a follower is looked for (ngram_copy.py), and what the convolutions still see: the
last L = (K - 1) * dilation + 1 of their normalised inputs, for every pass and dilation. These and the tokens stand in
rings of 2 L rows that are written twice, at p and at p + L, so that the last L rows always lie one after another and
the taps of a convolution are one product with even strides. Rows before the text are zero, as in training. The ternary
weights are read as int8: both passes then find them in the second cache, which float32's 2.4 MB (v3's shape) would
overflow. Where the trunk rounds the inputs of its ternary products to int8 (TrunkWeights.int8), so does this, with
packed weights.
Letters: C channels, I inner width, R passes, D convolutions, G groups, K taps, S padded group width, O kinds of
followers, H tokens of history.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._microkernels import (
    TileLeft,
    TileOut,
    TileRight,
    address_of,
    dot_products_int8,
    tile_product_32,
)
from flashlm_numba.kernels._rows import scale_rows
from flashlm_numba.kernels.conv import gate_sequence, to_groups
from flashlm_numba.kernels.glu import glu_rows
from flashlm_numba.kernels.leaky_average import add_average_next
from flashlm_numba.kernels.ngram_copy import add_followers, follower
from flashlm_numba.kernels.rmsnorm import rmsnorm_recompute, rmsnorm_rows
from flashlm_numba.kernels.ternary import pack_ternary, packed_width
from flashlm_numba.kernels.ternary_gemv import quantize, ternary_products
from flashlm_numba.kernels.trunk import TrunkBuffers, TrunkWeights

REGISTER = 16  # floats


@helper
def _put(rings, start, length, position, row, groups, width):
    """Write row (1, C) as the input of this position into its ring, in both places."""
    stride = groups.shape[0] * groups.shape[2]
    to_groups(groups, row, width)
    flat = groups.reshape(-1)
    for place in (position % length, position % length + length):
        for i in range(stride):
            rings[start + place * stride + i] = flat[i]


@helper
def _find(found, history, position, row, orders, reach):
    """Put the position-th token's row into history (2 H,), in both places; found (O,) = its followers or -1."""
    length = history.shape[0] // 2
    place = position % length
    history[place], history[place + length] = row, row
    for o in range(orders.shape[0]):
        found[o] = follower(history[place + 1 : place + 1 + length], length - 1, orders[o, 0], orders[o, 1], reach)


@helper
def _add(x, delta):
    for c in range(x.shape[1]):
        x[0, c] += delta[c]


@helper
def _linear(out, x, columns, weight, packed, q, scales, sums, variant):
    """out (R,) = W @ x (columns,), by the packed weights with x rounded to int8, or by those as int8.

    Both may be longer, by zeros, to fill whole registers.
    """
    rows, width = packed.shape[0], 4 * packed.shape[1]
    if rows > 0:
        rounded, products = q[:width].reshape(1, width), sums[:rows].reshape(1, rows)
        quantize(rounded, scales, x[:columns].reshape(1, columns))
        ternary_products(products, packed, rounded, 0, rows, variant)
        for r in range(rows):
            out[r] = np.float32(sums[r]) * scales[0]
    else:
        dot_products_int8(out.reshape(1, out.shape[0]), x.reshape(1, x.shape[0]), weight)


@serial_kernel
def _decode_step(
    out, rings, averages, history, found, starts, lengths, position, x, m_long, normed_long, delta, groups, gv,
    gate_up_long, hidden_long, rstd, q, scales, sums, embedding, row, orders, reach, gains, norms, branches, conv,
    dilations, w_out, w_gate_up, w_down, p_out, p_gate_up, p_down, inner, variant,
):  # fmt: skip
    """out (1, C): hidden state of the token with this row of the embedding, the position-th of its text.

    Scratch named long is padded with zeros, as the weights are, to fill whole registers; the zeros stay.
    """
    passes, count = starts.shape
    group_count, size = groups.shape[0], groups.shape[2]
    dim, width, taps = x.shape[1], x.shape[1] // group_count, conv.shape[2]
    m, normed = m_long[:dim].reshape(1, dim), normed_long[:dim].reshape(1, dim)
    gate_up, hidden = gate_up_long[: 2 * inner].reshape(1, 2 * inner), hidden_long[:inner].reshape(1, inner)
    stride = group_count * size
    flat_gv = gv.reshape(-1)
    for c in range(x.shape[1]):
        x[0, c] = embedding[row, c]
    if found.shape[0] > 0:
        _find(found, history, position, row, orders, reach)
        for o in range(found.shape[0]):
            add_followers(x, embedding, found[o : o + 1], gains[0, o])
    for r in range(passes):
        rmsnorm_rows(m, rstd, x, norms[0])
        if branches[2] > 0:
            add_average_next(m[0], averages[r], norms[3 + count], branches[2], branches[3])
        for d in range(count):
            rmsnorm_rows(normed, rstd, m, norms[3 + d])
            length = lengths[d]
            _put(rings, starts[r, d], length, position, normed, groups, width)
            oldest = starts[r, d] + (position % length + 1) * stride
            flat_w = conv[d].reshape(-1)
            for g in range(group_count):
                for w in range(0, 2 * size, 32):
                    to = TileOut(address_of(flat_gv, g * 2 * size + w), 2 * size)
                    left = TileLeft(address_of(rings, oldest + g * size), stride, 1, dilations[d] * stride)
                    right = TileRight(address_of(flat_w, g * taps * size * 2 * size + w), 2 * size, 2 * size * size)
                    tile_product_32(to, left, right, 1, size, taps, 0)
            gate_sequence(m, gv, m, width)
        scale_rows(m, m, branches[0])
        _linear(delta, m_long, dim, w_out, p_out, q, scales, sums, variant)
        _add(x, delta)
        rmsnorm_rows(normed, rstd, x, norms[1])
        _linear(gate_up_long, normed_long, dim, w_gate_up, p_gate_up, q, scales, sums, variant)
        glu_rows(hidden, gate_up, branches[1])
        _linear(delta, hidden_long, inner, w_down, p_down, q, scales, sums, variant)
        _add(x, delta)
    rmsnorm_rows(out, rstd, x, norms[2])
    for o in range(found.shape[0]):
        add_followers(out, embedding, found[o : o + 1], gains[1, o])


@serial_kernel
def _fill_state(rings, averages, starts, lengths, normed, groups, x, rstd, xm, rstd_m, norms, branches):
    """The rings and averages after a text of T tokens, from what its forward pass saved: x (R + 1, T, C),
    rstd (R, 2, T), xm (R, D + 1, T, C), rstd_m (R, D, T).
    """
    passes, count = starts.shape
    time, width = xm.shape[2], xm.shape[3] // groups.shape[0]
    for r in range(passes):
        if branches[2] > 0:
            for t in range(time):
                rmsnorm_recompute(normed, x[r, t : t + 1], norms[0], rstd[r, 0, t : t + 1])
                add_average_next(normed[0], averages[r], norms[3 + count], branches[2], branches[3])
        for d in range(count):
            for t in range(max(0, time - lengths[d]), time):
                rmsnorm_recompute(normed, xm[r, d, t : t + 1], norms[3 + d], rstd_m[r, d, t : t + 1])
                _put(rings, starts[r, d], lengths[d], t, normed, groups, width)


@dataclass
class DecodeState:
    """Where a text stands: the rings, the averages, the last tokens, their number; and weights and scratch. 1.5 MB for
    v3's shape.
    """

    rings: np.ndarray  # (any,)
    averages: np.ndarray  # (R, C): the running average of every pass
    history: np.ndarray  # (2 H,) int32: rows of the last H tokens, twice, as in a ring; -1 before the text
    found: np.ndarray  # (O,) int32: the followers of the last token
    starts: np.ndarray  # (R, D) int64: where a ring begins
    lengths: np.ndarray  # (D,) int64
    ternary: tuple[np.ndarray, ...]  # w_out, w_gate_up, w_down as int8, padded; or else empty, and
    packed: tuple[np.ndarray, ...]  # the same by pack_ternary, where the trunk rounds its activations to int8
    scratch: tuple[np.ndarray, ...]
    out: np.ndarray  # (1, C)
    position: int = 0


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block


def _as_int8(weight: np.ndarray) -> np.ndarray:
    """weight (R, K) as int8, rows padded to whole fours and columns to whole registers."""
    padded = np.zeros((_whole(weight.shape[0], 4), _whole(weight.shape[1], REGISTER)), np.int8)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    if not np.array_equal(padded[: weight.shape[0], : weight.shape[1]], weight):
        raise ValueError("decode: the weights must be -1, 0 or +1; call Model.sync_weights, which makes them so")
    return padded


def new_state(weights: TrunkWeights, passes: int) -> DecodeState:
    """The state before the first token of a text, for the trunk's weights as they are now and its number of passes.

    Raises ValueError if a weight that should be ternary is not.
    """
    count, groups, taps, size, _ = weights.conv.shape
    dim, inner = weights.w_down.shape
    lengths = (taps - 1) * weights.dilations + 1
    floats = 2 * lengths * groups * size
    starts = np.concatenate([[0], np.cumsum(np.tile(floats, passes))])

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    long, long_inner = _whole(dim, REGISTER), _whole(inner, REGISTER)
    scratch: tuple[np.ndarray, ...] = (
        zeros(1, dim), zeros(long), zeros(long), zeros(_whole(dim, 4)),  # x, m, normed, delta
        zeros(groups, 1, size), zeros(groups, 2, 1, size),
        zeros(_whole(2 * inner, 4)), zeros(long_inner), zeros(1),  # gate and up, hidden, rstd
    )  # fmt: skip
    scratch += (  # q, scales, sums of the packed products
        np.zeros(4 * packed_width(max(dim, inner)), np.int8), zeros(1), np.zeros(max(dim, 2 * inner), np.int32),
    )  # fmt: skip
    matrices = weights.w_out, weights.w_gate_up, weights.w_down
    ternary: tuple[np.ndarray, ...] = (np.empty((0, 0), np.int8),) * 3
    packed: tuple[np.ndarray, ...] = (np.empty((0, 0), np.uint8),) * 3
    if weights.int8:
        packed = tuple(pack_ternary(weight) for weight in matrices)
    else:
        ternary = tuple(_as_int8(weight) for weight in matrices)
    found = np.full(len(weights.orders), -1, np.int32)
    history = np.full(2 * (weights.reach + int(weights.orders[:, 0].max())) if len(found) else 0, -1, np.int32)
    starts = starts[:-1].reshape(passes, count).astype(np.int64)
    return DecodeState(
        zeros(int(starts[-1, -1] + floats[-1])), zeros(passes, dim), history, found, starts, lengths, ternary, packed,
        scratch, zeros(1, dim),
    )  # fmt: skip


def decode_step(state: DecodeState, weights: TrunkWeights, embedding: np.ndarray, row: int) -> np.ndarray:
    """Feed one token; returns its hidden state (1, C) float32, a view that the next call overwrites.

    row: the token's row of embedding (V, C). One thread, and the same cost at every position: 2*R*(2*C*C*K*D/G + C*C
    + 3*C*I) flop. Equal to the last row of trunk_forward over the whole text but for float32 rounding,
    which with int8 activations can move what is rounded to int8 by a step.
    Raises ValueError if the row is not in [0, V), or a shape or dtype is wrong.
    """
    _check.array("decode_step", "embedding", embedding, (None, weights.w_out.shape[0]))
    if not 0 <= row < len(embedding):
        raise ValueError(f"decode_step: row must be in [0, {len(embedding)}), got {row}")
    _decode_step(
        state.out, state.rings, state.averages, state.history, state.found, state.starts, state.lengths, state.position,
        *state.scratch, embedding, row, weights.orders, weights.reach, weights.gains, weights.norms, weights.branches,
        weights.conv, weights.dilations, *state.ternary, *state.packed, weights.w_down.shape[1], weights.variant,
    )  # fmt: skip
    state.position += 1
    return state.out


def prefill(weights: TrunkWeights, buffers: TrunkBuffers, rows: np.ndarray) -> DecodeState:
    """The state after a text, rows (T,) int32, that trunk_forward has just read into buffers, a batch of one sequence.

    Raises ValueError if the batch holds more. A text cut to the receptive field serves as well as the whole.
    """
    batch, time = buffers.shape[:2]
    if batch != 1:
        raise ValueError(f"prefill: the batch must hold one sequence, got {batch}")
    state = new_state(weights, buffers.x1.shape[0])
    normed, groups = np.empty((1, weights.w_out.shape[0]), np.float32), state.scratch[4]
    _fill_state(
        state.rings, state.averages, state.starts, state.lengths, normed, groups,
        buffers.x, buffers.rstd, buffers.xm, buffers.rstd_m, weights.norms, weights.branches,
    )  # fmt: skip
    length = len(state.history) // 2
    for t in range(max(0, time - length), time):
        state.history[t % length] = state.history[t % length + length] = rows[t]
    state.position = time
    return state
