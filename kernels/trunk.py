"""The trunk, forward and backward: several passes through a list of L blocks, then the final norm.

This file holds the Python side: the weights in the kernels' layouts, and the buffers of a batch. The compiled code is
in _trunk_regions.py, which gives the formulas.
Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, O ways of copying.
Source: FlashLM v3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numba
import numpy as np

from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._division import Division, divide
from flashlm_numba.kernels._gradient_copies import allocate, sums
from flashlm_numba.kernels._mixer import Mixer
from flashlm_numba.kernels._packed_gemm import packed_gemm_address
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._steps import backward_steps, forward_steps
from flashlm_numba.kernels._ternary_layer import Arithmetic, TernaryMatrices, arithmetic_variant, new_arithmetic
from flashlm_numba.kernels._trunk_arrays import (
    Activations,
    Batch,
    BatchGradient,
    Gradients,
    Scratch,
    Shape,
    Unit,
    Weights,
)
from flashlm_numba.kernels._trunk_regions import (
    backward_thread,
    forward_thread,
    trunk_backward_region,
    trunk_forward_region,
)
from flashlm_numba.kernels.ngram_copy import copy_kinds
from flashlm_numba.kernels.ternary_gemm import ternary_gemm_address
from flashlm_numba.kernels.ternary_wgrad import ternary_wgrad_address

REGISTER = 16  # floats of the widest
_NO_ROWS, _UNIT = np.empty((1, 0), np.float32), Unit(*[0] * len(Unit._fields))  # for their types


class TrunkConfig(NamedTuple):
    """Settings of the trunk, without those of its mixer."""

    dim: int  # C
    ffn_dim: int  # I
    n_blocks: int  # L
    n_passes: int  # passages through all blocks
    ffn_residual_scale: float = 1.0
    ngram_copy_orders: tuple[int, ...] = ()
    ngram_copy_reach: int = 0
    copy_adds: bool = True  # whether copied rows are added to the output too


class TrunkWeights:
    """The trunk's weights in the kernels' layouts. The model sets them once per step and then calls pack.

    norm1, norm2 (L, C), final_norm (C,), gain_in, gain_out (O, C) float32 : written by the model; gain_out (0, C) where
        nothing is added to the output
    gate_up, down : TernaryMatrices (2 I', C) and (C, I'), where I' is I rounded up to whole registers, so that rows of
        activations begin at their boundaries; `gate`, `up` and `down_values` are views without the padding
    int8 : whether the inputs of ternary products are quantised to int8 per row, forward and backward
    """

    def __init__(self, config: TrunkConfig, mixer: Mixer) -> None:
        self.config, self.mixer = config, mixer
        padded = -(-config.ffn_dim // REGISTER) * REGISTER
        self.norm1, self.norm2 = (np.zeros((config.n_blocks, config.dim), np.float32) for _ in range(2))
        self.final_norm = np.zeros(config.dim, np.float32)
        kinds = copy_kinds(config.ngram_copy_orders)
        self.copy_order, self.copy_skip = (np.array([kind[i] for kind in kinds], np.int64) for i in range(2))
        self.index_order, self.copy_index = np.unique(self.copy_order, return_inverse=True)  # see decode.py
        self.gain_in = np.zeros((len(kinds), config.dim), np.float32)
        self.gain_out = np.zeros((len(kinds) if config.copy_adds else 0, config.dim), np.float32)
        self.gate_up = TernaryMatrices(config.n_blocks, 2 * padded, config.dim)
        self.down = TernaryMatrices(config.n_blocks, config.dim, padded)
        self.gate = self.gate_up.values[:, : config.ffn_dim]
        self.up = self.gate_up.values[:, padded : padded + config.ffn_dim]
        self.down_values = self.down.values[:, :, : config.ffn_dim]
        self.use_int8(False)

    @property
    def layers(self) -> int:
        """R."""
        return self.config.n_blocks * self.config.n_passes

    @property
    def matrices(self) -> list[TernaryMatrices]:
        """All ternary matrices, the mixer's too."""
        return [self.gate_up, self.down, *self.mixer.matrices.values()]

    def use_int8(self, int8: bool, variant: str | None = None) -> None:
        """Choose the arithmetic of the ternary products. Call pack after changing their weights.

        variant : one of _ternary_dots.available(); default: the fastest
        """
        self.int8, self.variant = int8, arithmetic_variant(int8, variant)
        for matrices in self.matrices:
            matrices.use(self.int8, self.variant)
        self._forward, self._backward = self._weights(False), self._weights(True)

    def _weights(self, transposed: bool) -> tuple[Weights, NamedTuple]:
        gate_up, down = (m.transposed if transposed else m.forward for m in (self.gate_up, self.down))
        own = Weights(
            self.norm1,
            self.norm2,
            self.final_norm,
            *gate_up,
            *down,
            np.float32(self.config.ffn_residual_scale),
            self.copy_order,
            self.copy_skip,
            self.config.ngram_copy_reach,
            self.gain_in,
            self.gain_out,
        )
        return own, self.mixer.weights(transposed)

    def read(self, *, transposed: bool) -> tuple[Weights, NamedTuple]:
        """The trunk's and the mixer's weights for a region."""
        return self._backward if transposed else self._forward

    def pack(self) -> None:
        """Fill the layouts from the ternary values."""
        for matrices in self.matrices:
            matrices.pack()


def _new_gradients(weights: TrunkWeights, division: Division) -> tuple[Gradients, Any]:
    """The trunk's and the mixer's, in one pool."""
    (blocks, dim, inner), copies = weights.down.values.shape, division.copies
    shapes = {
        "norm1": (copies.rows, blocks, dim),
        "norm2": (copies.rows, blocks, dim),
        "final_norm": (copies.rows, dim),
        "gain_in": (copies.rows, *weights.gain_in.shape),
        "gain_out": (copies.rows, *weights.gain_out.shape),
        "gate_up": (copies.sequences, blocks, 2 * inner, dim),
        "down": (copies.sequences, blocks, dim, inner),
    }
    mixer = weights.mixer.gradient_shapes(copies)
    pool, segments, arrays = allocate([*shapes.values(), *mixer.values()])
    own, theirs = dict(zip(shapes, arrays, strict=False)), dict(zip(mixer, arrays[len(shapes) :], strict=True))
    dx = aligned_zeros((division.batch * division.time, dim), np.float32)
    return Gradients(dx=dx, pool=pool, segments=segments, **own), weights.mixer.gradients_type(**theirs)


class TrunkBuffers:
    """Saved activations and scratch for batches of one shape (B, T); about 40 KB per token for v3's shape."""

    def __init__(self, weights: TrunkWeights, batch: int, time: int) -> None:
        rows, threads, layers = batch * time, numba.get_num_threads(), weights.layers
        _, dim, inner = weights.down.values.shape
        self.division = division = divide(batch, time, threads)
        self.batch, self.time = batch, time
        copies, kept = len(weights.copy_order), division.places

        def zeros(*shape: int) -> np.ndarray:
            return aligned_zeros(shape, np.float32)

        self.activations = Activations(
            x=zeros(layers + 1, rows, dim),
            post_mixer=zeros(layers, rows, dim),
            rstd_mixer=zeros(layers, rows),
            rstd_ffn=zeros(layers, rows),
            gate_up=zeros(layers, rows, 2 * inner),
            copies=np.zeros((copies, rows), np.int32),
            out=zeros(rows, dim),
            rstd_out=zeros(rows),
        )
        self.scratch = Scratch(
            normed=zeros(threads, division.block, dim),
            inner=zeros(threads, division.block, inner),
            mixer_in=zeros(*kept, dim),
            dmixer_in=zeros(*kept, dim),
            ffn_in=zeros(*kept, dim),
            hidden=zeros(*kept, inner),
            dgate_up=zeros(*kept, 2 * inner),
            dlayer=zeros(*kept, dim),
        )
        self.gradients, self.mixer_gradients = _new_gradients(weights, division)
        self.mixer_activations = weights.mixer.new_activations(layers, batch, time)
        self.mixer_scratch = weights.mixer.new_scratch(division)
        shapes = [matrices.shape for matrices in weights.matrices]
        tile = max(division.tile, division.block)
        self.arithmetic: Arithmetic = new_arithmetic(weights.int8, weights.variant, shapes, tile, threads)
        self._called: dict[bool, tuple[Arithmetic, Shape]] = {}
        self._made_for = self._key(weights, batch, time)

    def _shape(self, weights: TrunkWeights, *, backward: bool) -> Shape:
        """The shape of a pass, without the addresses."""
        division, mixer = self.division, weights.mixer
        steps = (
            backward_steps(weights.layers, mixer.backward_stages())
            if backward
            else forward_steps(weights.layers, mixer.forward_stages())
        )
        return Shape(
            division.time,
            division.tile,
            division.threads,
            weights.layers,
            weights.config.n_blocks,
            np.array([step[:3] for step in steps], np.int64),
            *division.plan([step.divides for step in steps]),
        )

    def forward_functions(self, weights: TrunkWeights) -> dict[str, Callable[[], Any]]:
        """What the forward pass calls by its address (_calls.py), by the name of the field that holds the address.

        Each function compiles one of them, or loads it from the cache, and returns the address. "region" calls all.
        """
        own, mixers = weights.read(transposed=False)
        mixer = mixers, self.mixer_activations, self.mixer_scratch
        shape = self._shape(weights, backward=False)
        rest = self.activations, self.scratch, own, self.arithmetic, shape, *mixer
        x, batch = _NO_ROWS, Batch(_NO_ROWS[0].astype(np.int32), _NO_ROWS)
        return {
            **self._products(weights),
            "mixer_forward": lambda: address(weights.mixer.forward, x, x, _UNIT, *mixer, x, self.arithmetic),
            "forward": lambda: address(forward_thread, 0, batch, *rest),
            "region": lambda: address(trunk_forward_region, batch, *rest),
        }

    def _products(self, weights: TrunkWeights) -> dict[str, Callable[[], Any]]:
        if weights.int8:
            return {"int8_product": lambda: ternary_gemm_address(weights.variant)}
        return {"float_product": packed_gemm_address}

    def backward_functions(self, weights: TrunkWeights) -> dict[str, Callable[[], Any]]:
        """The same of the backward pass."""
        own, mixers = weights.read(transposed=True)
        mixer = self.mixer_gradients, mixers, self.mixer_activations, self.mixer_scratch
        shape = self._shape(weights, backward=True)
        rest = self.gradients, self.activations, self.scratch, own, self.arithmetic, shape, *mixer
        x, batch = _NO_ROWS, BatchGradient(_NO_ROWS, _NO_ROWS)
        return {
            **self._products(weights),
            **({"int8_gradient": ternary_wgrad_address} if weights.int8 else {}),
            "mixer_backward": lambda: address(weights.mixer.backward, x, x, x, _UNIT, *mixer, x, self.arithmetic),
            "backward": lambda: address(backward_thread, 0, batch, *rest),
            "region": lambda: address(trunk_backward_region, batch, *rest),
        }

    def called(self, weights: TrunkWeights, *, backward: bool) -> tuple[Arithmetic, Shape]:
        """The arithmetic and the shape for a region, with the addresses of what it calls."""
        if backward not in self._called:
            functions = self.backward_functions(weights) if backward else self.forward_functions(weights)
            found = {name: function() for name, function in functions.items() if name != "region"}
            pair = self.arithmetic, self._shape(weights, backward=backward)
            own = [{name: at for name, at in found.items() if name in fields._fields} for fields in pair]
            self._called[backward] = pair[0]._replace(**own[0]), pair[1]._replace(**own[1])
        return self._called[backward]

    @staticmethod
    def _key(weights: TrunkWeights, batch: int, time: int) -> tuple[int, int, int, bool, int]:
        return batch, time, numba.get_num_threads(), weights.int8, weights.variant

    def fits(self, weights: TrunkWeights, batch: int, time: int) -> bool:
        """Whether the buffers fit this batch shape, the arithmetic of these weights and the threads in use."""
        return self._made_for == self._key(weights, batch, time)


def trunk_forward(buffers: TrunkBuffers, weights: TrunkWeights, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Hidden states (N, C) float32 for rows (B*T,) int32 of embedding (V, C). The result is a view of the buffers.

    The ternary products use float32, or inputs quantised to int8 after weights.use_int8. They read the layouts of
    weights.pack. rows must be in [0, V); the caller checks this (Model.forward). buffers store the activations for
    trunk_backward. Cost 2*R*N*3*C*I flop plus that of the mixers. Source: FlashLM v3.
    """
    own, mixers = weights.read(transposed=False)
    arithmetic, shape = buffers.called(weights, backward=False)
    trunk_forward_region(
        Batch(rows, embedding),
        buffers.activations,
        buffers.scratch,
        own,
        arithmetic,
        shape,
        mixers,
        buffers.mixer_activations,
        buffers.mixer_scratch,
    )
    return buffers.activations.out


class TrunkGradients(NamedTuple):
    """The results of trunk_backward, views of the buffers."""

    dx: np.ndarray  # (N, C): of the trunk's input
    gain_in: np.ndarray  # (O, C)
    gain_out: np.ndarray  # (O, C)
    final_norm: np.ndarray  # (C,)
    norm1: np.ndarray  # (L, C)
    norm2: np.ndarray  # (L, C)
    gate: np.ndarray  # (L, I, C)
    up: np.ndarray  # (L, I, C)
    down: np.ndarray  # (L, C, I)
    mixers: list[dict[str, np.ndarray]]  # of each block, by name relative to the mixer


def trunk_backward(
    buffers: TrunkBuffers, weights: TrunkWeights, dout: np.ndarray, embedding: np.ndarray
) -> TrunkGradients:
    """Gradients for dout (N, C) float32, after trunk_forward with the same buffers, weights and embedding.

    The caller adds the embedding's gradient: dx by its rows, and dx and dout by the copies
    (ngram_copy.scatter_copies).
    """
    own, mixers = weights.read(transposed=True)
    arithmetic, shape = buffers.called(weights, backward=True)
    g = buffers.gradients
    trunk_backward_region(
        BatchGradient(dout, embedding),
        g,
        buffers.activations,
        buffers.scratch,
        own,
        arithmetic,
        shape,
        buffers.mixer_gradients,
        mixers,
        buffers.mixer_activations,
        buffers.mixer_scratch,
    )
    ffn_dim, gate_up, mixers = weights.config.ffn_dim, g.gate_up[0], sums(buffers.mixer_gradients)
    return TrunkGradients(
        dx=g.dx,
        gain_in=g.gain_in[0],
        gain_out=g.gain_out[0],
        final_norm=g.final_norm[0],
        norm1=g.norm1[0],
        norm2=g.norm2[0],
        gate=gate_up[:, :ffn_dim],
        up=gate_up[:, gate_up.shape[1] // 2 :][:, :ffn_dim],
        down=g.down[0][:, :, :ffn_dim],
        mixers=[weights.mixer.gradients(b, mixers) for b in range(weights.config.n_blocks)],
    )
