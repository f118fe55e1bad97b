"""Decoding with the MatMul-free trunk: one token, with a state of one vector per layer.

The products are those of packed weights, 2 bits each, which are read once per token; everything else is the code that
training calls. A token's hidden state therefore has the bits of bit_trunk_forward over the whole text.
Letters: C channels, I FFN width, L blocks, R layers, O ways of copying, H tokens of history, D indexes of S buckets.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._bit_layer import work_functions
from flashlm_numba.kernels._calls import address, call
from flashlm_numba.kernels._jit import helper, serial_kernel, strict_helper
from flashlm_numba.kernels._ternary_dots import VARIANTS
from flashlm_numba.kernels._text import TextState
from flashlm_numba.kernels.bit_trunk import LAYERS, BitBuffers, BitTrunkWeights, bit_trunk_forward
from flashlm_numba.kernels.ngram_copy import add_copies, ngram_copies
from flashlm_numba.kernels.ngram_index import add_to_index, buckets, indexed_copy
from flashlm_numba.kernels.ternary import packed_width
from flashlm_numba.kernels.ternary_gemv import SERIAL


class BitDecodeWeights(NamedTuple):
    """Weights of all blocks."""

    norm1: np.ndarray  # (L, C)
    norm2: np.ndarray  # (L, C)
    hidden_norm: np.ndarray  # (L, C)
    final_norm: np.ndarray  # (C,)
    bounds: np.ndarray  # (L, C)
    value_norm: np.ndarray  # (L, C): of the six layers, then their scales (L,) and packed matrices (L, any, any) uint8
    forget_norm: np.ndarray
    gate_norm: np.ndarray
    out_norm: np.ndarray
    gate_up_norm: np.ndarray
    down_norm: np.ndarray  # (L, I)
    value_scale: np.ndarray
    forget_scale: np.ndarray
    gate_scale: np.ndarray
    out_scale: np.ndarray
    gate_up_scale: np.ndarray
    down_scale: np.ndarray
    value_packed: np.ndarray
    forget_packed: np.ndarray
    gate_packed: np.ndarray
    out_packed: np.ndarray
    gate_up_packed: np.ndarray
    down_packed: np.ndarray
    eps: np.float32
    index_order: np.ndarray  # (D,) int64: n of each index, all different
    copy_index: np.ndarray  # (O,) int64: where to look
    copy_skip: np.ndarray  # (O,) int64
    copy_reach: int
    gain_in: np.ndarray  # (O, C)
    gain_out: np.ndarray  # (O, C); (0, C) where nothing is added to the output
    passes: int  # through all blocks


class BitState(NamedTuple):
    """What a text leaves behind, scratch, and the addresses of what a token calls (_calls.py)."""

    states: np.ndarray  # (R, C): of the recurrences
    history: np.ndarray  # (2 H,) int32: see decode.State
    newest: np.ndarray  # (D, S) int32
    earlier: np.ndarray  # (D, H) int32
    copies: np.ndarray  # (O,) int32
    out: np.ndarray  # (1, C): the hidden state
    x: np.ndarray  # (1, C)
    normed: np.ndarray  # (1, C)
    value: np.ndarray  # (1, C)
    forget: np.ndarray  # (1, C)
    gate: np.ndarray  # (1, C)
    h: np.ndarray  # (1, C)
    gate_up: np.ndarray  # (1, 2 I)
    hidden: np.ndarray  # (1, I)
    row: np.ndarray  # (any,)
    rstd: np.ndarray  # (1,)
    scales: np.ndarray  # (1,)
    q: np.ndarray  # (any,) int8: rounded inputs
    q_sum: np.ndarray  # (1,) int32
    sums: np.ndarray  # (any,) int32: of a product
    inputs: int
    product: int
    norm: int
    gated: int
    swiglu: int
    scan: int


_FIELDS = len(BitState._fields)


@strict_helper
def _write(out, sums, scale, add):
    """Rounded as in training, without a fused multiply-add."""
    for r in range(out.shape[1]):
        value = np.float32(sums[r]) * scale
        out[0, r] = out[0, r] + value if add else value


@helper
def _layer(out, x, norm, scale, packed, add, state):
    """out (1, R) = the layer's output for x (1, K), or added to out; of one matrix."""
    rows, columns, width = packed.shape[0], x.shape[1], 4 * packed.shape[1]
    q, sums = state.q[:width].reshape(1, width), state.sums[:rows].reshape(1, rows)
    call(state.inputs, q, state.scales, state.q_sum, state.rstd, state.row[:columns], x, norm, scale)
    call(state.product, sums, packed, q)
    _write(out, sums[0], state.scales[0], add)


@helper
def _add_to_history(state, place, row):
    length = state.earlier.shape[1]
    state.history[place], state.history[place + length] = row, row


@helper
def _find_copies(state, weights, place):
    """Find what to copy at the last token of the history, and add it to the indexes."""
    recent = state.history[place + 1 : place + 1 + state.earlier.shape[1]]
    for o in range(state.copies.shape[0]):
        d = weights.copy_index[o]
        order, skip, reach = weights.index_order[d], weights.copy_skip[o], weights.copy_reach
        state.copies[o] = indexed_copy(state.newest[d], state.earlier[d], recent, place, order, skip, reach)
    for d in range(weights.index_order.shape[0]):
        add_to_index(state.newest[d], state.earlier[d], recent, place, weights.index_order[d])


@helper
def _mixer(state, weights, layer, block):
    """Adds the mixer's output to state.x."""
    x, normed, h = state.x, state.normed, state.h
    call(state.norm, normed, state.rstd, x, weights.norm1[block], weights.eps)
    norm, scale = weights.value_norm[block], weights.value_scale[block]
    _layer(state.value, normed, norm, scale, weights.value_packed[block], 0, state)
    norm, scale = weights.forget_norm[block], weights.forget_scale[block]
    _layer(state.forget, normed, norm, scale, weights.forget_packed[block], 0, state)
    norm, scale = weights.gate_norm[block], weights.gate_scale[block]
    _layer(state.gate, normed, norm, scale, weights.gate_packed[block], 0, state)
    before, dim = state.states[layer], x.shape[1]
    call(state.scan, h, before, state.forget, state.value, weights.bounds[block], 0, dim)
    for c in range(dim):
        before[c] = h[0, c]
    call(state.gated, normed, state.rstd, state.gate, h, weights.hidden_norm[block], weights.eps)
    _layer(x, normed, weights.out_norm[block], weights.out_scale[block], weights.out_packed[block], 1, state)


@serial_kernel
def _decode_step(embedding, row, position, *fields):
    """state.out (1, C): hidden state of the token with this row of the embedding, the position-th of its text.

    fields : those of BitState and of BitDecodeWeights, one by one as in decode.make_decode_step
    """
    state, weights = BitState(*fields[:_FIELDS]), BitDecodeWeights(*fields[_FIELDS:])
    x, dim, blocks, copies = state.x, state.x.shape[1], weights.norm1.shape[0], state.copies.shape[0]
    for c in range(dim):
        x[0, c] = embedding[row, c]
    if copies > 0:
        place = position % state.earlier.shape[1]
        _add_to_history(state, place, row)
        _find_copies(state, weights, place)
        for o in range(copies):
            add_copies(x, embedding, state.copies[o : o + 1], weights.gain_in[o])
    for layer in range(weights.passes * blocks):
        block = layer % blocks
        _mixer(state, weights, layer, block)
        call(state.norm, state.normed, state.rstd, x, weights.norm2[block], weights.eps)
        norm, scale = weights.gate_up_norm[block], weights.gate_up_scale[block]
        _layer(state.gate_up, state.normed, norm, scale, weights.gate_up_packed[block], 0, state)
        call(state.swiglu, state.hidden, state.gate_up)
        norm, scale = weights.down_norm[block], weights.down_scale[block]
        _layer(x, state.hidden, norm, scale, weights.down_packed[block], 1, state)
    call(state.norm, state.out, state.rstd, x, weights.final_norm, weights.eps)
    for o in range(weights.gain_out.shape[0]):
        add_copies(state.out, embedding, state.copies[o : o + 1], weights.gain_out[o])


@serial_kernel
def _extend_history(history, newest, earlier, orders, rows, position):
    """Add rows (T,), the tokens from this position of a text on."""
    length = earlier.shape[1]
    for t in range(rows.shape[0]):
        place = (position + t) % length
        history[place], history[place + length] = rows[t], rows[t]
        for d in range(orders.shape[0]):
            add_to_index(newest[d], earlier[d], history[place + 1 : place + 1 + length], place, orders[d])


def bit_decode_functions(variant: int) -> dict[str, Any]:
    """The addresses that BitState holds, by field."""
    q, sums, packed = np.empty((0, 0), np.int8), np.empty((0, 0), np.int32), np.empty((0, 0), np.uint8)
    functions = work_functions(variant)
    names = ("inputs", "norm", "gated", "swiglu", "scan")
    return {name: functions[name]() for name in names} | {
        "product": address(SERIAL[VARIANTS[variant]], sums, packed, q)
    }


def bit_new_state(weights: BitTrunkWeights) -> TextState:
    """The state before the first token of a text, for the current weights."""
    config, orders = weights.config, weights.copy_order
    dim, inner, layers = config.dim, config.ffn_dim, weights.n_layers

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    history = config.ngram_copy_reach + int(orders.max()) if len(orders) else 0
    index_order, copy_index = np.unique(orders, return_inverse=True)
    rows: dict[str, Any] = {name: zeros(1, dim) for name in ("out", "x", "normed", "value", "forget", "gate", "h")}
    state = BitState(
        states=zeros(layers, dim),
        history=np.full(2 * history, -1, np.int32),
        newest=np.full((len(index_order), buckets(history)), -1, np.int32),
        earlier=np.full((len(index_order), history), -1, np.int32),
        copies=np.full(len(orders), -1, np.int32),
        **rows,
        gate_up=zeros(1, 2 * inner),
        hidden=zeros(1, inner),
        row=zeros(max(dim, inner)),
        rstd=zeros(1),
        scales=zeros(1),
        q=np.zeros(4 * packed_width(max(dim, inner)), np.int8),
        q_sum=np.zeros(1, np.int32),
        sums=np.zeros(max(dim, 2 * inner), np.int32),
        **bit_decode_functions(weights.variant),
    )
    own = BitDecodeWeights(
        **{name: getattr(weights, name) for name in ("norm1", "norm2", "hidden_norm", "final_norm", "bounds")},
        **{f"{name}_norm": weights.layers[name].norms for name in LAYERS},
        **{f"{name}_scale": weights.layers[name].scales for name in LAYERS},
        **{f"{name}_packed": weights.layers[name].packed() for name in LAYERS},
        eps=np.float32(config.eps),
        index_order=index_order,
        copy_index=copy_index,
        copy_skip=weights.copy_skip,
        copy_reach=config.ngram_copy_reach,
        gain_in=weights.gain_in,
        gain_out=weights.gain_out,
        passes=config.n_passes,
    )
    return TextState(state, own, _decode_step)


def bit_decode_step(state: TextState, embedding: np.ndarray, row: int) -> np.ndarray:
    """Feed one token. Returns its hidden state (1, C) float32, a view that the next call overwrites.

    row : the token's row of embedding (V, C)
    It uses one thread. The cost is the same at every position, and the result has the bits of the last row of
    bit_trunk_forward over the text. Raises ValueError if row is not in [0, V), or a shape or dtype is wrong, and
    RuntimeError if another thread is using the state.
    """
    _check.array("bit_decode_step", "embedding", embedding, (None, state.state.x.shape[1]))
    if not 0 <= row < len(embedding):
        raise ValueError(f"bit_decode_step: row must be in [0, {len(embedding)}), got {row}")
    with state.alone("bit_decode_step"):
        _decode_step(embedding, row, state.position, *state.fields)
        state.position += 1
    return state.state.out


def bit_read(
    state: TextState, buffers: BitBuffers, weights: BitTrunkWeights, embedding: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    """Feed the next tokens of a state's text, rows (T,) int32, at once. Returns their hidden states (T, C) float32.

    buffers : for one sequence of T tokens;  weights : those of bit_new_state
    The result is a view of the buffers, with the bits of T calls of bit_decode_step. Raises RuntimeError if another
    thread is using the state.
    """
    with state.alone("bit_read"):
        return _read(state, buffers, weights, embedding, rows)


def _read(
    state: TextState, buffers: BitBuffers, weights: BitTrunkWeights, embedding: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    own, copies = state.state, buffers.activations.copies
    length = own.earlier.shape[1]
    if len(copies):
        place = (state.position - 1) % length if state.position else length - 1
        known = own.history[place + 1 : place + 1 + length]
        text = np.concatenate([known[known >= 0], rows])[None]  # a text shorter than the history follows -1
        for o, (order, skip) in enumerate(zip(weights.copy_order, weights.copy_skip, strict=True)):
            found = ngram_copies(text, int(order), weights.config.ngram_copy_reach, int(skip))
            copies[o] = found[0, text.shape[1] - len(rows) :]
    h = bit_trunk_forward(buffers, weights, embedding, rows, own.states, search=False)
    own.states[...] = buffers.activations.h[:, -1]
    if len(rows):
        own.out[...] = h[-1:]
        own.copies[...] = copies[:, -1]
    if len(copies):
        _extend_history(own.history, own.newest, own.earlier, state.weights.index_order, rows, state.position)
    state.position += len(rows)
    return h
