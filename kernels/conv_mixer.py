"""The conv mixer of FlashLM v3: a sequence of gated causal dilated convolutions, then a ternary layer.

    m = x;   m = m + gain * leaky_average(m)                       (v3 has no leaky average)
    for each dilation:  m = m + gated_conv(rmsnorm(m))
    mixer(x) = m Wo'

This file holds what Python keeps, and decoding; the kernels of training are in _conv_training.py.
Letters: B batch, T time, N = B*T rows, C channels, L blocks, R layers, D convolutions, G groups, K taps, S padded group
width.
Source: FlashLM v3.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from flashlm_numba.kernels._conv_training import (
    ConvActivations,
    ConvGradients,
    ConvScratch,
    ConvWeights,
    conv_backward,
    conv_forward,
)
from flashlm_numba.kernels._division import ANY, ROWS, SEQUENCES, Copies, Division, Stage
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._microkernels import TileLeft, TileOut, TileRight, address_of, batched_product_32
from flashlm_numba.kernels._rows import aligned_zeros, scale_rows
from flashlm_numba.kernels._ternary_layer import TernaryMatrices
from flashlm_numba.kernels.conv import gate_sequence, pack_conv_weights, padded_width, unpack_conv_gradient
from flashlm_numba.kernels.decode import make_decode_step, make_prefill, matrix_product
from flashlm_numba.kernels.leaky_average import add_leaky_average_next, leaky_share
from flashlm_numba.kernels.rmsnorm import rmsnorm_recompute, rmsnorm_rows

REGISTER = 16  # channels: floats of the widest register


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
    gate_value: np.ndarray  # (G, 2, 1, S)
    normed: np.ndarray  # (1, C)
    rstd: np.ndarray  # (1,)


@helper
def _put(state, layer, d, position, row):
    """Write row (1, C) as the input of this position to both places of the ring buffer."""
    groups, _, _, size = state.gate_value.shape
    stride, width, rings = groups * size, row.shape[1] // groups, state.rings
    place = state.starts[layer, d] + position % state.lengths[d] * stride
    for start in (place, place + state.lengths[d] * stride):
        if size == width:  # one loop, which the compiler vectorises
            for c in range(stride):
                rings[start + c] = row[0, c]
        else:
            for g in range(groups):
                for j in range(width):
                    rings[start + g * size + j] = row[0, g * width + j]


@helper
def _step(x, mixer_in, layer, block, position, weights, state, scratch):
    """See decode.make_decode_step."""
    groups, _, _, size = state.gate_value.shape
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
    """The conv mixers of L blocks: weights in the kernels' layouts, buffers, regions. See _mixer.Mixer."""

    forward, backward, gradients_type = staticmethod(conv_forward), staticmethod(conv_backward), ConvGradients
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

    def forward_stages(self) -> list[Stage]:
        """As conv_forward numbers them."""
        convolutions = [Stage(ROWS), Stage(SEQUENCES, self.config.groups)] * len(self.config.dilations)
        return [*([self._average_stage] if self.config.leaky_decay else [Stage(ROWS)]), *convolutions, Stage(ROWS)]

    def backward_stages(self) -> list[Stage]:
        """As conv_backward numbers them."""
        convolutions = [Stage(SEQUENCES, self.config.groups), Stage(ROWS)] * len(self.config.dilations)
        return [
            Stage(ROWS),
            Stage(SEQUENCES, ANY),
            *convolutions,
            *([self._average_stage] if self.config.leaky_decay else []),
        ]

    @property
    def _average_stage(self) -> Stage:
        return Stage(SEQUENCES, -(-self.config.dim // REGISTER))

    def new_scratch(self, division: Division) -> ConvScratch:
        """Of each thread, and between stages."""
        groups, size, threads, time = self.config.groups, self._size, division.threads, division.time
        return ConvScratch(
            grouped=aligned_zeros((threads, groups, time, size), np.float32),
            dgrouped=aligned_zeros((threads, groups, time, size), np.float32),
            dgate_value=aligned_zeros((threads, groups, 2, time, size), np.float32),
            out_in=aligned_zeros((*division.places, self.config.dim), np.float32),
            dnormed=aligned_zeros((*division.places, self.config.dim), np.float32),
        )

    def gradient_shapes(self, copies: Copies) -> dict[str, tuple[int, ...]]:
        """Of ConvGradients, by field."""
        return {
            "norms": (copies.rows, *self._norms.shape),
            "leaky_gain": (copies.sequences, *self._leaky_gain.shape),
            "conv": (copies.sequences, *self._conv.shape),
            "out": (copies.sequences, *self._out.values.shape),
        }

    def gradients(self, block: int, found: ConvGradients) -> dict[str, np.ndarray]:
        """A block's, by name as in set_weights, and out.weight's; found: without the copies."""
        named = {"out.weight": found.out[block]}
        if self.config.leaky_decay:
            named["leaky.weight"] = found.leaky_gain[block]
        for d, dconv in enumerate(found.conv[block]):
            gate, value = unpack_conv_gradient(dconv, self.config.dim // self.config.groups)
            named |= {
                f"norms.{d}.weight": found.norms[block, d],
                f"gates.{d}.weight": gate,
                f"values.{d}.weight": value,
            }
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
            gate_value=np.zeros((config.groups, 2, 1, self._size), np.float32),
            normed=np.zeros((1, config.dim), np.float32),
            rstd=np.zeros(1, np.float32),
        )
