"""Decoding: process one token with the trunk, with a state whose size does not depend on the length of the text.

The arithmetic is that of trunk.py for a single row. The state contains the mixers' states and the tokens in which the
n-gram copy searches (ngram_copy.py). Ternary weights are read as int8, so that those of all layers fit into the
second-level cache; as float32 they take 2.4 MB (v3's shape) and do not fit. If the trunk quantises the inputs of its
ternary products to int8 (TrunkWeights.int8), decoding does too, with packed weights.
Letters: C channels, I FFN width, L blocks, R layers, O ways of copying, H tokens of history, D indexes of
S buckets.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._microkernels import dot_products_int8
from flashlm_numba.kernels._ternary_layer import TernaryMatrices
from flashlm_numba.kernels._text import TextState
from flashlm_numba.kernels.glu import glu_rows
from flashlm_numba.kernels.ngram_copy import add_copies
from flashlm_numba.kernels.ngram_index import add_to_index, buckets, indexed_copy
from flashlm_numba.kernels.rmsnorm import rmsnorm_recompute, rmsnorm_rows
from flashlm_numba.kernels.ternary import pack_ternary, packed_width
from flashlm_numba.kernels.ternary_gemv import quantize, ternary_products
from flashlm_numba.kernels.trunk import TrunkBuffers, TrunkWeights

REGISTER = 16  # floats


class DecodeWeights(NamedTuple):
    """Weights of all blocks, without their mixers'. One of the two forms of the ternary matrices is empty."""

    norm1: np.ndarray  # (L, C)
    norm2: np.ndarray  # (L, C)
    final_norm: np.ndarray  # (C,)
    gate_up_int8: np.ndarray  # (L, 2 I', C') int8: rows in whole fours, columns in whole registers
    gate_up_packed: np.ndarray  # (L, 2 I', any) uint8: by pack_ternary
    down_int8: np.ndarray  # (L, C', I') int8
    down_packed: np.ndarray  # (L, C, any) uint8
    ffn_residual_scale: np.float32
    index_order: np.ndarray  # (D,) int64: n of each index, all different
    copy_index: np.ndarray  # (O,) int64: where to look
    copy_skip: np.ndarray  # (O,) int64
    copy_reach: int
    gain_in: np.ndarray  # (O, C)
    gain_out: np.ndarray  # (O, C); (0, C) where nothing is added to the output
    passes: int  # through all blocks


class State(NamedTuple):
    """The token history, and scratch. Arrays are padded with zeros, which never change, to complete registers."""

    out: np.ndarray  # (1, C): the hidden state
    history: np.ndarray  # (2 H,) int32: rows of the last H tokens, twice, as in a ring; -1 before the text
    newest: np.ndarray  # (D, S) int32: see ngram_index.py
    earlier: np.ndarray  # (D, H) int32
    copies: np.ndarray  # (O,) int32: what is copied at the last token
    x: np.ndarray  # (1, C)
    mixer_in: np.ndarray  # (C',) padded
    normed: np.ndarray  # (C',) padded
    delta: np.ndarray  # (C',) padded to whole fours
    gate_up: np.ndarray  # (2 I',)
    hidden: np.ndarray  # (I',)
    rstd: np.ndarray  # (1,)
    q: np.ndarray  # (any,) int8: rounded inputs of a packed product
    scales: np.ndarray  # (1,)
    sums: np.ndarray  # (any,) int32
    variant: int  # of the packed products: index in VARIANTS


@helper
def matrix_product(out, x, columns, int8, packed, state):
    """out (R,) = W @ x (columns,), with packed weights and x quantised to int8, or with int8 weights.

    out and x may be padded with zeros to complete registers.
    """
    rows, width = packed.shape[0], 4 * packed.shape[1]
    if rows > 0:
        rounded, sums, scales = state.q[:width].reshape(1, width), state.sums[:rows], state.scales
        quantize(rounded, scales, x[:columns].reshape(1, columns))
        ternary_products(sums.reshape(1, rows), packed, rounded, 0, rows, state.variant)
        for r in range(rows):
            out[r] = np.float32(sums[r]) * scales[0]
    else:
        dot_products_int8(out.reshape(1, out.shape[0]), x.reshape(1, x.shape[0]), int8)


@helper
def _find_copies(state, weights, position, row):
    """Add the row of the token at this position to the history, and find the rows to copy."""
    length = state.earlier.shape[1]
    place = position % length
    state.history[place], state.history[place + length] = row, row
    recent = state.history[place + 1 : place + 1 + length]
    for o in range(state.copies.shape[0]):
        d = weights.copy_index[o]
        state.copies[o] = indexed_copy(
            state.newest[d],
            state.earlier[d],
            recent,
            place,
            weights.index_order[d],
            weights.copy_skip[o],
            weights.copy_reach,
        )
    for d in range(weights.index_order.shape[0]):
        add_to_index(state.newest[d], state.earlier[d], recent, place, weights.index_order[d])


@serial_kernel
def _fill_history(history, newest, earlier, orders, rows):
    """Add rows (T,), a text from its beginning, of which only the last H tokens matter."""
    length = earlier.shape[1]
    for t in range(max(0, rows.shape[0] - length), rows.shape[0]):
        place = t % length
        history[place], history[place + length] = rows[t], rows[t]
        for d in range(orders.shape[0]):
            add_to_index(newest[d], earlier[d], history[place + 1 : place + 1 + length], place, orders[d])


def make_decode_step(mixer_step: Any, mixer_state: Any, mixer_weights: Any, name: str) -> Any:
    """Make the helper that processes a token with the trunk and this mixer; a short kernel of the mixer calls it.

    mixer_step(x, mixer_in, layer, block, position, weights, state, scratch) : a helper that adds the mixer's output,
        for its input mixer_in (C',), times its residual scale, to x (1, C). It may change mixer_in except the zeros
        beyond C; scratch is the trunk's State.
    mixer_state, mixer_weights : the NamedTuples of the mixer's state and weights
    name : name of the mixer; compiled functions are identified by name

    The kernel takes the fields one by one, because Numba determines the type of a NamedTuple anew at every call: of
    these four, that took a tenth of the time of a token in int8.
    """
    to_state, to_weights = len(State._fields), len(State._fields) + len(DecodeWeights._fields)
    to_mixer_state = to_weights + len(mixer_state._fields)

    def decode_step(embedding, row, position, fields):
        """state.out (1, C): hidden state of the token with this row of the embedding, the position-th of its text.

        fields : those of State, of DecodeWeights, and of the mixer's state and weights
        """
        state, weights = State(*fields[:to_state]), DecodeWeights(*fields[to_state:to_weights])
        own_state = mixer_state(*fields[to_weights:to_mixer_state])
        own_weights = mixer_weights(*fields[to_mixer_state:])
        x, delta, dim, inner = state.x, state.delta, state.x.shape[1], state.gate_up.shape[0] // 2
        blocks = weights.norm1.shape[0]
        mixer_in, normed = state.mixer_in[:dim].reshape(1, dim), state.normed[:dim].reshape(1, dim)
        gate_up, hidden = state.gate_up.reshape(1, 2 * inner), state.hidden.reshape(1, inner)
        copies = state.copies.shape[0]
        for c in range(dim):
            x[0, c] = embedding[row, c]
        if copies > 0:
            _find_copies(state, weights, position, row)
            for o in range(copies):
                add_copies(x, embedding, state.copies[o : o + 1], weights.gain_in[o])
        for layer in range(weights.passes * blocks):
            block = layer % blocks
            rmsnorm_rows(mixer_in, state.rstd, x, weights.norm1[block])
            mixer_step(x, state.mixer_in, layer, block, position, own_weights, own_state, state)
            rmsnorm_rows(normed, state.rstd, x, weights.norm2[block])
            matrix_product(
                state.gate_up, state.normed, dim, weights.gate_up_int8[block], weights.gate_up_packed[block], state
            )
            glu_rows(hidden, gate_up, weights.ffn_residual_scale)
            matrix_product(delta, state.hidden, inner, weights.down_int8[block], weights.down_packed[block], state)
            for c in range(dim):
                x[0, c] += delta[c]
        rmsnorm_rows(state.out, state.rstd, x, weights.final_norm)
        for o in range(weights.gain_out.shape[0]):
            add_copies(state.out, embedding, state.copies[o : o + 1], weights.gain_out[o])

    decode_step.__name__ = decode_step.__qualname__ = f"_decode_step_{name}"
    return helper(decode_step)


def make_prefill(mixer_fill: Any, name: str) -> Any:
    """Make the helper that sets a mixer's state to the end of a text; a short kernel of the mixer calls it.

    mixer_fill(state, x, layer, block, weights, activations) : a helper that reads x (T, C), the mixer's input at this
        layer, which it may change, and the activations that the forward pass over the text saved.
    """

    def prefill(x, activations, weights, mixer_state, mixer_weights, mixer_activations):
        """x (T, C): scratch; activations of the trunk: of a batch of one sequence."""
        blocks = weights.norm1.shape[0]
        for layer in range(activations.post_mixer.shape[0]):
            block = layer % blocks
            rmsnorm_recompute(x, activations.x[layer], weights.norm1[block], activations.rstd_mixer[layer])
            mixer_fill(mixer_state, x, layer, block, mixer_weights, mixer_activations)

    prefill.__name__ = prefill.__qualname__ = f"_prefill_{name}"
    return helper(prefill)


# --- what Python keeps ---


@dataclass(eq=False)
class DecodeState(TextState):
    """State of a text. It takes 1.5 MB for v3's shape."""

    mixer_state: Any = None  # the mixer's NamedTuples
    mixer_weights: Any = None

    def __post_init__(self) -> None:
        self.fields = (*self.state, *self.weights, *self.mixer_state, *self.mixer_weights)


def _whole(size: int, block: int) -> int:
    return -(-size // block) * block


def _int8(matrices: TernaryMatrices) -> np.ndarray:
    """(L, R', K') int8, rows padded to whole fours and columns to whole registers."""
    blocks, rows, columns = matrices.values.shape
    padded = np.zeros((blocks, _whole(rows, 4), _whole(columns, REGISTER)), np.int8)
    padded[:, :rows, :columns] = matrices.values
    if not np.array_equal(padded[:, :rows, :columns], matrices.values):
        raise ValueError("decode: the weights must be -1, 0 or +1; call Model.sync_weights, which makes them so")
    return padded


def decode_matrices(matrices: TernaryMatrices, packed: bool) -> tuple[np.ndarray, np.ndarray]:
    """The matrices as int8 and packed; the unused form has no rows. Kept until they are packed anew.

    Raises ValueError if a weight is not ternary.
    """
    if (found := matrices.decoding) is None:
        blocks = len(matrices.values)
        if packed:
            found = np.empty((blocks, 0, 0), np.int8), np.stack([pack_ternary(value) for value in matrices.values])
        else:
            found = _int8(matrices), np.empty((blocks, 0, 0), np.uint8)
        matrices.decoding = found
    return found


def new_state(weights: TrunkWeights) -> DecodeState:
    """The state before the first token of a text, for the current weights.

    Raises ValueError if a weight is not ternary.
    """
    _, dim, inner = weights.down.values.shape
    orders, widest = weights.copy_order, max(dim, inner)

    def zeros(*shape: int) -> np.ndarray:
        return np.zeros(shape, np.float32)

    history = weights.config.ngram_copy_reach + int(orders.max()) if len(orders) else 0
    indexes = len(weights.index_order)
    state = State(
        out=zeros(1, dim),
        history=np.full(2 * history, -1, np.int32),
        newest=np.full((indexes, buckets(history)), -1, np.int32),
        earlier=np.full((indexes, history), -1, np.int32),
        copies=np.full(len(orders), -1, np.int32),
        x=zeros(1, dim),
        mixer_in=zeros(_whole(dim, REGISTER)),
        normed=zeros(_whole(dim, REGISTER)),
        delta=zeros(_whole(dim, 4)),
        gate_up=zeros(2 * inner),
        hidden=zeros(inner),
        rstd=zeros(1),
        q=np.zeros(4 * packed_width(widest), np.int8),
        scales=zeros(1),
        sums=np.zeros(max(dim, 2 * inner), np.int32),
        variant=weights.variant,
    )
    own = DecodeWeights(
        weights.norm1,
        weights.norm2,
        weights.final_norm,
        *decode_matrices(weights.gate_up, weights.int8),
        *decode_matrices(weights.down, weights.int8),
        np.float32(weights.config.ffn_residual_scale),
        weights.index_order,
        weights.copy_index,
        weights.copy_skip,
        weights.config.ngram_copy_reach,
        weights.gain_in,
        weights.gain_out,
        weights.config.n_passes,
    )
    mixer = weights.mixer
    forms = [form for m in mixer.matrices.values() for form in decode_matrices(m, weights.int8)]
    return DecodeState(
        state,
        own,
        mixer.decode_region,
        mixer_state=mixer.new_state(weights.layers),
        mixer_weights=mixer.decode_weights(*forms),
    )


def decode_step(state: DecodeState, embedding: np.ndarray, row: int) -> np.ndarray:
    """Feed one token. Returns its hidden state (1, C) float32, a view that the next call overwrites.

    row : the token's row of embedding (V, C)
    It uses one thread. The cost is the same at every position: 2*R*3*C*I flop plus that of the mixers. The result
    equals the last row of trunk_forward over the text except for float32 rounding. With int8 activations this rounding
    can change a quantised value by one step. Raises ValueError if row is not in [0, V), or a shape or dtype is wrong,
    and RuntimeError if another thread is using the state.
    """
    _check.array("decode_step", "embedding", embedding, (None, state.state.x.shape[1]))
    if not 0 <= row < len(embedding):
        raise ValueError(f"decode_step: row must be in [0, {len(embedding)}), got {row}")
    with state.alone("decode_step"):
        state.step(embedding, row, state.position, *state.fields)
        state.position += 1
    return state.state.out


def prefill(weights: TrunkWeights, buffers: TrunkBuffers, rows: np.ndarray) -> DecodeState:
    """The state after a text, rows (T,) int32, which trunk_forward has just processed in buffers as a batch of one.

    A text cut to the receptive field gives the same state. Raises ValueError if the batch has several sequences.
    """
    if buffers.batch != 1:
        raise ValueError(f"prefill: the batch must hold one sequence, got {buffers.batch}")
    state, time = new_state(weights), buffers.time
    x = np.empty((time, state.state.x.shape[1]), np.float32)
    weights.mixer.prefill_region(
        x, buffers.activations, state.weights, state.mixer_state, state.mixer_weights, buffers.mixer_activations
    )
    own = state.state
    _fill_history(own.history, own.newest, own.earlier, state.weights.index_order, rows)
    own.copies[...] = buffers.activations.copies[:, -1]
    own.out[...] = buffers.activations.out[-1:]
    state.position = time
    return state
