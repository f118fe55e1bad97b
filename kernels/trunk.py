"""The trunk, forward and backward: several passes through a list of L blocks, then the final norm.

This file holds the Python side: the weights in the kernels' layouts, the buffers of a batch, and the interface of a
mixer. The compiled code is in _trunk_regions.py, which gives the formulas.
Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, P threads, O ways of copying.
Source: FlashLM v3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numba
import numpy as np

from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._packed_gemm import packed_gemm_address
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_layer import Arithmetic, TernaryMatrices, arithmetic_variant, new_arithmetic
from flashlm_numba.kernels._trunk_regions import (
    Activations,
    Batch,
    BatchGradient,
    Gradients,
    Scratch,
    Shape,
    Unit,
    Weights,
    backward_thread,
    forward_thread,
    trunk_backward_region,
    trunk_forward_region,
)
from flashlm_numba.kernels.ngram_copy import copy_kinds
from flashlm_numba.kernels.ternary_gemm import ternary_gemm_address
from flashlm_numba.kernels.ternary_wgrad import ternary_wgrad_address

TILE_ROWS = 256
REGISTER = 16  # floats of the widest
_NO_ROWS, _UNIT = np.empty((1, 0), np.float32), Unit(*[0] * len(Unit._fields))  # for their types


class Mixer(Protocol):
    """The interface of the mixers of L blocks for the trunk and for decoding: weights and regions.

    Each mixer defines its NamedTuples, which only its helpers read. `matrices` are its ternary matrices.
    """

    matrices: dict[str, TernaryMatrices]  # by the names of their parameters, relative to the block's mixer

    def set_weights(self, block: int, parameters: dict[str, np.ndarray]) -> None:
        """Set a block's parameters, except the ternary matrices, by name within the mixer."""
        ...

    def weights(self, transposed: bool) -> NamedTuple:
        """Weights for the forward pass, or with the layouts of the backward pass."""
        ...

    def new_activations(self, layers: int, batch: int, time: int) -> NamedTuple:
        """Arrays for the activations of R layers that the backward pass needs."""
        ...

    def new_scratch(self, threads: int, time: int) -> NamedTuple:
        """Scratch per thread."""
        ...

    def new_gradients(self, threads: int) -> NamedTuple:
        """Gradients per thread."""
        ...

    def gradients(self, block: int, found: Any) -> dict[str, np.ndarray]:
        """A block's gradients by name within the mixer, summed over the threads."""
        ...

    @property
    def forward(self) -> Any:
        """The serial kernel (out, x, unit, weights, activations, scratch, normed, arithmetic) that adds the mixer's
        output for x (M, C), times its residual scale, to out (M, C). It may change x; normed (any, C) is scratch.
        """
        ...

    @property
    def backward(self) -> Any:
        """The serial kernel (dx, dout, x, unit, gradients, weights, activations, scratch, normed, arithmetic) that
        writes dx (M, C), the gradient of the mixer's input x (M, C). dout (M, C) is the gradient of the sum to which
        the mixer's output was added. It may change x and normed (any, C), and adds the gradients of its weights to
        those of the thread.
        """
        ...

    @property
    def clear(self) -> Any:
        """The serial kernel (gradients, thread) that sets the gradients of a thread to zero."""
        ...

    def decode_weights(self, *forms: np.ndarray) -> NamedTuple:
        """For decoding; forms: each of `matrices` as int8 and packed, in their order (decode.decode_matrices)."""
        ...

    def new_state(self, layers: int) -> NamedTuple:
        """Decoding state before the first token, with the mixer's scratch."""
        ...

    @property
    def decode_region(self) -> Any:
        """The serial kernel (embedding, row, position, *fields of State, DecodeWeights and the mixer's state, weights)
        made with decode.make_decode_step.
        """
        ...

    @property
    def prefill_region(self) -> Any:
        """The serial kernel (x, activations, weights, and the mixer's state, weights, activations) made with
        decode.make_prefill.
        """
        ...


class TrunkConfig(NamedTuple):
    """Settings of the trunk, without those of its mixer."""

    dim: int  # C
    ffn_dim: int  # I
    n_blocks: int  # L
    n_passes: int  # passages through all blocks
    ffn_residual_scale: float = 1.0
    ngram_copy_orders: tuple[int, ...] = ()
    ngram_copy_reach: int = 0


class TrunkWeights:
    """The trunk's weights in the kernels' layouts. The model sets them once per step and then calls pack.

    norm1, norm2 (L, C), final_norm (C,), gain_in, gain_out (O, C) float32 : written by the model
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
        self.gain_in, self.gain_out = (np.zeros((len(kinds), config.dim), np.float32) for _ in range(2))
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


class TrunkBuffers:
    """Saved activations and scratch for batches of one shape (B, T); about 40 KB per token for v3's shape."""

    def __init__(self, weights: TrunkWeights, batch: int, time: int) -> None:
        rows, threads, layers = batch * time, numba.get_num_threads(), weights.layers
        blocks, dim, inner = weights.down.values.shape
        tile = max(1, TILE_ROWS // max(time, 1))
        tile_rows = tile * time
        self.batch, self.time = batch, time
        copies = len(weights.copy_order)

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
            normed=zeros(threads, tile_rows, dim),
            mixer_in=zeros(threads, tile_rows, dim),
            dmixer_in=zeros(threads, tile_rows, dim),
            hidden=zeros(threads, tile_rows, inner),
            dhidden=zeros(threads, tile_rows, inner),
            dgate_up=zeros(threads, tile_rows, 2 * inner),
        )
        self.gradients = Gradients(
            dx=zeros(rows, dim),
            norm1=zeros(threads, blocks, dim),
            norm2=zeros(threads, blocks, dim),
            final_norm=zeros(threads, 1, dim),
            gate_up=zeros(threads, blocks, 2 * inner, dim),
            down=zeros(threads, blocks, dim, inner),
            gain_in=zeros(threads, copies, dim),
            gain_out=zeros(threads, copies, dim),
        )
        self.mixer_activations = weights.mixer.new_activations(layers, batch, time)
        self.mixer_scratch = weights.mixer.new_scratch(threads, time)
        self.mixer_gradients = weights.mixer.new_gradients(threads)
        shapes = [matrices.shape for matrices in weights.matrices]
        self.arithmetic: Arithmetic = new_arithmetic(weights.int8, weights.variant, shapes, tile_rows, threads)
        self._shape = Shape(time, tile, threads, layers, blocks)
        self._called: dict[bool, tuple[Arithmetic, Shape]] = {}
        self._made_for = self._key(weights, batch, time)

    def forward_functions(self, weights: TrunkWeights) -> dict[str, Callable[[], Any]]:
        """What the forward pass calls by its address (_calls.py), by the name of the field that holds the address.

        Each function compiles one of them, or loads it from the cache, and returns the address. "region" calls all.
        """
        own, mixers = weights.read(transposed=False)
        mixer = mixers, self.mixer_activations, self.mixer_scratch
        rest = self.activations, self.scratch, own, self.arithmetic, self._shape, *mixer
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
        rest = self.gradients, self.activations, self.scratch, own, self.arithmetic, self._shape, *mixer
        x, batch = _NO_ROWS, BatchGradient(_NO_ROWS, _NO_ROWS)
        return {
            **self._products(weights),
            **({"int8_gradient": ternary_wgrad_address} if weights.int8 else {}),
            "mixer_backward": lambda: address(weights.mixer.backward, x, x, x, _UNIT, *mixer, x, self.arithmetic),
            "mixer_clear": lambda: address(weights.mixer.clear, self.mixer_gradients, 0),
            "backward": lambda: address(backward_thread, 0, batch, *rest),
            "region": lambda: address(trunk_backward_region, batch, *rest),
        }

    def called(self, weights: TrunkWeights, *, backward: bool) -> tuple[Arithmetic, Shape]:
        """The arithmetic and the shape for a region, with the addresses of what it calls."""
        if backward not in self._called:
            functions = self.backward_functions(weights) if backward else self.forward_functions(weights)
            found = {name: function() for name, function in functions.items() if name != "region"}
            pair = (self.arithmetic, self._shape)
            own = [{name: at for name, at in found.items() if name in fields._fields} for fields in pair]
            self._called[backward] = self.arithmetic._replace(**own[0]), self._shape._replace(**own[1])
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
    """The results of trunk_backward, summed over the threads."""

    dx: np.ndarray  # (N, C): of the trunk's input, a view of the buffers
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
    ffn_dim = weights.config.ffn_dim
    gate_up = g.gate_up.sum(0)
    return TrunkGradients(
        dx=g.dx,
        gain_in=g.gain_in.sum(0),
        gain_out=g.gain_out.sum(0),
        final_norm=g.final_norm.sum(0)[0],
        norm1=g.norm1.sum(0),
        norm2=g.norm2.sum(0),
        gate=gate_up[:, :ffn_dim],
        up=gate_up[:, gate_up.shape[1] // 2 :][:, :ffn_dim],
        down=g.down.sum(0)[:, :, :ffn_dim],
        mixers=[weights.mixer.gradients(b, buffers.mixer_gradients) for b in range(weights.config.n_blocks)],
    )
