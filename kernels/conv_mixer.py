"""The conv mixer of FlashLM v3: a sequence of gated causal dilated convolutions, then a ternary layer.

    m = x;   m = m + gain * leaky_average(m)                       (v3 has no leaky average)
    for each dilation:  m = m + gated_conv(rmsnorm(m))
    mixer(x) = m Wo'

The convolutions work on group-major copies (conv.py), one sequence at a time. They process a share of the channel
groups, so that several threads can divide a sequence. The norm before each convolution and the ternary layer need all
channels.
Letters: B batch, T time, N = B*T rows, C channels, L blocks, R layers, D convolutions, G groups, K taps, S padded group
width, P threads, M rows of a tile.
Source: FlashLM v3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._microkernels import TileLeft, TileOut, TileRight, address_of, batched_product_32
from flashlm_numba.kernels._rows import aligned_zeros, clear_rows, copy_rows, scale_rows
from flashlm_numba.kernels._ternary_layer import TernaryMatrices, ternary_product, ternary_weight_gradient
from flashlm_numba.kernels.conv import (
    conv_sequence,
    conv_sequence_dinput,
    conv_sequence_dweight,
    from_groups,
    gate_sequence,
    gate_sequence_backward,
    pack_conv_weights,
    padded_width,
    to_groups,
    unpack_conv_gradient,
)
from flashlm_numba.kernels.decode import make_decode_step, make_prefill, matrix_product
from flashlm_numba.kernels.leaky_average import (
    add_leaky_average,
    add_leaky_average_backward,
    add_leaky_average_next,
    leaky_share,
)
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows, rmsnorm_recompute, rmsnorm_rows


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
    """Scratch per thread; the padding of the groups is always zero."""

    grouped: np.ndarray  # (P, G, T, S)
    dgrouped: np.ndarray  # (P, G, T, S)
    dgate_value: np.ndarray  # (P, G, 2, T, S)


class ConvGradients(NamedTuple):
    """Of each thread."""

    norms: np.ndarray  # (P, L, D, C)
    leaky_gain: np.ndarray  # (P, L, C)
    conv: np.ndarray  # (P, L, D, G, K, S, 2 S)
    out: np.ndarray  # (P, L, C, C)


# --- training ---


@helper
def _convolve(d, start, unit, weights, activations, scratch, normed):
    """One convolution of the sequence that starts at row `start`: a share of its channel groups."""
    time, layer, block = unit.time, unit.layer, unit.block
    end, b = start + time, start // time
    grouped, gate_value = scratch.grouped[unit.thread], activations.gate_value[layer, d, b]
    groups = grouped.shape[0]
    width = normed.shape[1] // groups
    first, last = unit.share * groups // unit.shares, (unit.share + 1) * groups // unit.shares
    before, after = activations.mixed[layer, d, start:end], activations.mixed[layer, d + 1, start:end]
    rmsnorm_rows(normed[:time], activations.rstd[layer, d, start:end], before, weights.norms[block, d])
    to_groups(grouped, normed[:time], width, first, last)
    conv_sequence(gate_value, grouped, weights.conv[block, d], weights.dilations[d], first, last)
    gate_sequence(after, gate_value, before, width, first, last)


@serial_kernel
def _forward(out, x, unit, weights, activations, scratch, normed, arithmetic):
    """See trunk.Mixer.forward."""
    layer, block, low = unit.layer, unit.block, unit.low
    size, count = unit.high - low, weights.dilations.shape[0]
    for start in range(low, unit.high, unit.time):
        end = start + unit.time
        mixed = activations.mixed[layer, 0, start:end]
        copy_rows(mixed, x[start - low : end - low])
        if weights.leaky_decay > 0:
            add_leaky_average(
                mixed, normed[: unit.time], weights.leaky_gain[block], weights.leaky_decay, weights.leaky_share
            )
        for d in range(count):
            _convolve(d, start, unit, weights, activations, scratch, normed)
    scale_rows(normed[:size], activations.mixed[layer, count, low : unit.high], weights.residual_scale)
    ternary_product(
        out,
        normed[:size],
        weights.out_panels[block],
        weights.out_codes[block],
        weights.out_plain[block],
        1,
        arithmetic,
        unit.thread,
    )


@helper
def _convolve_backward(dm, d, start, unit, gradients, weights, activations, scratch, normed):
    """dm (T, C), the gradient of what _convolve wrote, becomes that of what it read."""
    time, layer, block, thread = unit.time, unit.layer, unit.block, unit.thread
    end, b = start + time, start // time
    grouped, dgrouped, dgate_value = scratch.grouped[thread], scratch.dgrouped[thread], scratch.dgate_value[thread]
    groups = grouped.shape[0]
    width = normed.shape[1] // groups
    first, last = unit.share * groups // unit.shares, (unit.share + 1) * groups // unit.shares
    before, rstd = activations.mixed[layer, d, start:end], activations.rstd[layer, d, start:end]
    dilation = weights.dilations[d]
    # forward: after = before + gated_conv(rmsnorm(before))
    gate_sequence_backward(dgate_value, dm, activations.gate_value[layer, d, b], width, first, last)
    rmsnorm_recompute(normed[:time], before, weights.norms[block, d], rstd)
    to_groups(grouped, normed[:time], width, first, last)
    conv_sequence_dinput(dgrouped, dgate_value, weights.conv[block, d], dilation, first, last)
    conv_sequence_dweight(gradients.conv[thread, block, d], grouped, dgate_value, dilation, first, last)
    from_groups(normed[:time], dgrouped, width, first, last)
    rmsnorm_backward_rows(
        dm, gradients.norms[thread, block, d], normed[:time], before, weights.norms[block, d], rstd, True
    )


@serial_kernel
def _backward(dx, dout, x, unit, gradients, weights, activations, scratch, normed, arithmetic):
    """See trunk.Mixer.backward."""
    layer, block, low, thread = unit.layer, unit.block, unit.low, unit.thread
    size, count = unit.high - low, weights.dilations.shape[0]
    # forward: out += residual_scale * m Wo'
    scale_rows(normed[:size], activations.mixed[layer, count, low : unit.high], weights.residual_scale)
    ternary_weight_gradient(gradients.out[thread, block], dout, normed[:size], arithmetic, thread)
    ternary_product(
        dx,
        dout,
        weights.out_panels[block],
        weights.out_codes[block],
        weights.out_plain[block],
        0,
        arithmetic,
        thread,
    )
    scale_rows(dx, dx, weights.residual_scale)
    for start in range(low, unit.high, unit.time):
        dm = dx[start - low : start - low + unit.time]
        for back in range(count):
            _convolve_backward(dm, count - 1 - back, start, unit, gradients, weights, activations, scratch, normed)
        if weights.leaky_decay > 0:
            add_leaky_average_backward(
                dm,
                gradients.leaky_gain[thread, block],
                x[start - low : start - low + unit.time],
                weights.leaky_gain[block],
                weights.leaky_decay,
                weights.leaky_share,
            )


@serial_kernel
def _clear(gradients, thread):
    clear_rows(gradients.leaky_gain[thread])
    conv = gradients.conv[thread]
    clear_rows(conv.reshape(-1, conv.shape[-1]))
    for block in range(gradients.out.shape[1]):
        clear_rows(gradients.norms[thread, block])
        clear_rows(gradients.out[thread, block])


# --- decoding ---


class ConvDecodeWeights(NamedTuple):
    """Weights for decoding. One of the two forms of the ternary matrices is empty; see decode.DecodeMatrix."""

    norms: np.ndarray  # (L, D, C)
    leaky_gain: np.ndarray  # (L, C)
    conv: np.ndarray  # (L * D, G, K, S, 2 S): Numba is slow to determine the type of more than five dimensions
    dilations: np.ndarray  # (D,) int64
    out_int8: np.ndarray  # (L, C', C'') int8
    out_packed: np.ndarray  # (L, C, any) uint8
    residual_scale: np.float32
    leaky_decay: np.float32
    leaky_share: np.float32


class ConvState(NamedTuple):
    """State of the mixer in a text, and scratch.

    For every layer and dilation a convolution needs its last (K - 1) * dilation + 1 normalised inputs. They are stored
    in ring buffers of twice as many rows, at p and at p + length. The last rows are therefore always contiguous, and
    the taps of a convolution are one product with constant strides.
    """

    rings: np.ndarray  # (any,)
    starts: np.ndarray  # (R, D) int64: where a ring begins
    lengths: np.ndarray  # (D,) int64
    averages: np.ndarray  # (R, C): the leaky average of every layer
    grouped: np.ndarray  # (G, 1, S)
    gate_value: np.ndarray  # (G, 2, 1, S)
    normed: np.ndarray  # (1, C)
    rstd: np.ndarray  # (1,)


@helper
def _put(state, layer, d, position, row):
    """Write row (1, C) as the input of this position to both places of the ring buffer."""
    groups, _, size = state.grouped.shape
    to_groups(state.grouped, row, row.shape[1] // groups, 0, groups)
    flat, stride = state.grouped.reshape(-1), groups * size
    rings, start, length = state.rings, state.starts[layer, d], state.lengths[d]
    for place in (position % length, position % length + length):
        for i in range(stride):
            rings[start + place * stride + i] = flat[i]


@helper
def _step(x, mixer_in, layer, block, position, weights, state, scratch):
    """See decode.make_decode_step."""
    groups, _, size = state.grouped.shape
    dim, taps, stride = x.shape[1], weights.conv.shape[2], groups * size
    m = mixer_in[:dim].reshape(1, dim)
    flat_gate_value, rings, delta = state.gate_value.reshape(-1), state.rings, scratch.delta
    if weights.leaky_decay > 0:
        add_leaky_average_next(
            m[0], state.averages[layer], weights.leaky_gain[block], weights.leaky_decay, weights.leaky_share
        )
    count = weights.dilations.shape[0]
    for d in range(count):
        rmsnorm_rows(state.normed, state.rstd, m, weights.norms[block, d])
        _put(state, layer, d, position, state.normed)
        oldest = state.starts[layer, d] + (position % state.lengths[d] + 1) * stride
        flat_w, dilation = weights.conv[block * count + d].reshape(-1), weights.dilations[d]
        for w in range(0, 2 * size, 32):  # a row per group, each with its own weights
            to = TileOut(address_of(flat_gate_value, w), 2 * size)
            left = TileLeft(address_of(rings, oldest), size, 1, dilation * stride)
            right = TileRight(address_of(flat_w, w), 2 * size, 2 * size * size)
            batched_product_32(to, left, right, taps * size * 2 * size, groups, size, taps)
        gate_sequence(m, state.gate_value, m, dim // groups, 0, groups)
    scale_rows(m, m, weights.residual_scale)
    matrix_product(delta, mixer_in, dim, weights.out_int8[block], weights.out_packed[block], scratch)
    for c in range(dim):
        x[0, c] += delta[c]


@helper
def _fill(state, x, layer, block, weights, activations):
    """See decode.make_prefill."""
    time = x.shape[0]
    if weights.leaky_decay > 0:
        for t in range(time):
            add_leaky_average_next(
                x[t], state.averages[layer], weights.leaky_gain[block], weights.leaky_decay, weights.leaky_share
            )
    for d in range(weights.dilations.shape[0]):
        for t in range(max(0, time - state.lengths[d]), time):
            rstd = activations.rstd[layer, d, t : t + 1]
            rmsnorm_recompute(state.normed, activations.mixed[layer, d, t : t + 1], weights.norms[block, d], rstd)
            _put(state, layer, d, t, state.normed)


_decode = make_decode_step(_step, ConvState, ConvDecodeWeights, "conv")
_fill_states = make_prefill(_fill, "conv")


@serial_kernel
def _decode_step(embedding, row, position, *fields):
    _decode(embedding, row, position, fields)


@serial_kernel
def _prefill(x, activations, weights, mixer_state, mixer_weights, mixer_activations):
    _fill_states(x, activations, weights, mixer_state, mixer_weights, mixer_activations)


# --- what Python keeps ---


class ConvConfig(NamedTuple):
    """Settings of the conv mixer of every block."""

    dim: int  # C
    n_blocks: int  # L
    groups: int  # G
    kernel_size: int  # K
    dilations: tuple[int, ...]  # of the D convolutions
    residual_scale: float = 1.0
    leaky_decay: float = 0.0


class ConvMixer:
    """The conv mixers of L blocks: weights in the kernels' layouts, buffers, regions. See trunk.Mixer."""

    forward, backward, clear = staticmethod(_forward), staticmethod(_backward), staticmethod(_clear)
    decode_region = staticmethod(_decode_step)
    prefill_region = staticmethod(_prefill)

    def __init__(self, config: ConvConfig) -> None:
        self.config = config
        blocks, count, groups, taps = config.n_blocks, len(config.dilations), config.groups, config.kernel_size
        size = self._size = padded_width(config.dim, groups)
        self._dilations = np.array(config.dilations, np.int64)
        self._norms = np.zeros((blocks, count, config.dim), np.float32)
        self._leaky_gain = np.zeros((blocks, config.dim), np.float32)
        self._conv = aligned_zeros((blocks, count, groups, taps, size, 2 * size), np.float32)
        self._conv_t = aligned_zeros((blocks, count, groups, taps, 2 * size, size), np.float32)
        self._scalars = (
            np.float32(config.residual_scale),
            np.float32(config.leaky_decay),
            leaky_share(config.leaky_decay),
        )
        self._out = TernaryMatrices(blocks, config.dim, config.dim)
        self.matrices = {"out.weight": self._out}

    def set_weights(self, block: int, parameters: dict[str, np.ndarray]) -> None:
        """Take over a block's norms.I.weight, gates.I.weight, values.I.weight and, if there is one, leaky.weight."""
        for d in range(len(self.config.dilations)):
            self._norms[block, d] = parameters[f"norms.{d}.weight"]
            gate, value = parameters[f"gates.{d}.weight"], parameters[f"values.{d}.weight"]
            self._conv[block, d], self._conv_t[block, d] = pack_conv_weights(gate, value, self.config.groups)
        if self.config.leaky_decay:
            self._leaky_gain[block] = parameters["leaky.weight"]

    def weights(self, transposed: bool) -> ConvWeights:
        """For a direction."""
        conv, out = (self._conv_t, self._out.transposed) if transposed else (self._conv, self._out.forward)
        return ConvWeights(self._norms, self._leaky_gain, conv, self._dilations, *out, *self._scalars)

    def new_activations(self, layers: int, batch: int, time: int) -> ConvActivations:
        """About 20 KB per token for v3's shape."""
        config, count = self.config, len(self.config.dilations)
        return ConvActivations(
            mixed=aligned_zeros((layers, count + 1, batch * time, config.dim), np.float32),
            rstd=aligned_zeros((layers, count, batch * time), np.float32),
            gate_value=aligned_zeros((layers, count, batch, config.groups, 2, time, self._size), np.float32),
        )

    def new_scratch(self, threads: int, time: int) -> ConvScratch:
        """Of each thread."""
        groups, size = self.config.groups, self._size
        return ConvScratch(
            grouped=aligned_zeros((threads, groups, time, size), np.float32),
            dgrouped=aligned_zeros((threads, groups, time, size), np.float32),
            dgate_value=aligned_zeros((threads, groups, 2, time, size), np.float32),
        )

    def new_gradients(self, threads: int) -> ConvGradients:
        """Of each thread."""
        arrays = self._norms, self._leaky_gain, self._conv, self._out.values
        return ConvGradients(*(aligned_zeros((threads, *array.shape), np.float32) for array in arrays))

    def gradients(self, block: int, found: ConvGradients) -> dict[str, np.ndarray]:
        """A block's, by name as in set_weights, and out.weight's; summed over the threads."""
        norms = found.norms[:, block].sum(0)
        named = {"out.weight": found.out[:, block].sum(0)}
        if self.config.leaky_decay:
            named["leaky.weight"] = found.leaky_gain[:, block].sum(0)
        for d, dconv in enumerate(found.conv[:, block].sum(0)):
            gate, value = unpack_conv_gradient(dconv, self.config.dim // self.config.groups)
            named |= {f"norms.{d}.weight": norms[d], f"gates.{d}.weight": gate, f"values.{d}.weight": value}
        return named

    def decode_weights(self, *forms: np.ndarray) -> ConvDecodeWeights:
        """For decoding; forms: out as int8 and packed."""
        int8, packed = forms
        conv = self._conv.reshape(-1, *self._conv.shape[2:])
        return ConvDecodeWeights(self._norms, self._leaky_gain, conv, self._dilations, int8, packed, *self._scalars)

    def new_state(self, layers: int) -> ConvState:
        """Before the first token."""
        config, count = self.config, len(self.config.dilations)
        lengths = (config.kernel_size - 1) * self._dilations + 1
        floats = 2 * lengths * config.groups * self._size
        starts = np.concatenate([[0], np.cumsum(np.tile(floats, layers))])
        return ConvState(
            rings=np.zeros(int(starts[-1]), np.float32),
            starts=starts[:-1].reshape(layers, count).astype(np.int64),
            lengths=lengths,
            averages=np.zeros((layers, config.dim), np.float32),
            grouped=np.zeros((config.groups, 1, self._size), np.float32),
            gate_value=np.zeros((config.groups, 2, 1, self._size), np.float32),
            normed=np.zeros((1, config.dim), np.float32),
            rstd=np.zeros(1, np.float32),
        )
