"""The MatMul-free trunk, forward and backward: L blocks of MLGRU mixer and GLU, all of whose matrices are BitLinears.

This file holds the Python side: the weights in the kernels' layouts, and the buffers of a batch. The compiled code is
in _bit_regions.py, which gives the formulas.
Letters: B batch, T time, N = B*T rows, C channels, I FFN width, L blocks, R layers, O ways of copying.
Source: Zhu et al. 2024, arXiv:2406.02528, section 3.3, and the authors' code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numba
import numpy as np

from flashlm_numba.kernels._bit_arrays import BitActivations, BitBatch, BitGradients, BitScratch, BitWeights
from flashlm_numba.kernels._bit_layer import BitMatrices, BitWork, new_work, work_functions
from flashlm_numba.kernels._bit_regions import (
    INPUTS,
    OUTPUTS,
    SCAN,
    WEIGHTS,
    bit_backward_region,
    bit_backward_thread,
    bit_forward_region,
    bit_forward_thread,
)
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._division import ANY, ROWS, SEQUENCES, Division, Stage, divide
from flashlm_numba.kernels._gradient_copies import allocate
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._steps import Step
from flashlm_numba.kernels._ternary_layer import arithmetic_variant
from flashlm_numba.kernels._trunk_arrays import BatchGradient, Shape
from flashlm_numba.kernels.mlgru import REGISTER
from flashlm_numba.kernels.ngram_copy import copy_kinds

_NO_ROWS = np.empty((1, 0), np.float32)  # for its type
LAYERS = ("value", "forget", "gate", "out", "gate_up", "down")  # the BitLinears of a block
_NORMS = ("norm1", "norm2", "hidden_norm")


class BitConfig(NamedTuple):
    """Settings of the trunk."""

    dim: int  # C
    ffn_dim: int  # I
    n_blocks: int  # L
    n_passes: int  # passages through all blocks
    eps: float = 1e-6  # of all norms but the layers' own
    ngram_copy_orders: tuple[int, ...] = ()
    ngram_copy_reach: int = 0
    copy_adds: bool = True  # whether copied rows are added to the output too


def lower_bounds(parameter: np.ndarray) -> np.ndarray:
    """The lower bounds (L, H) of the forget gates for the parameter (L, H), both float32.

    They are sums over the blocks so far of a softmax over all blocks, without the first block's share: zero in the
    first block, and larger in every further one. Source: the authors' code, after arXiv:2311.04823, section 3.2.

    >>> lower_bounds(np.zeros((4, 1), np.float32)).ravel().tolist()
    [0.0, 0.25, 0.5, 0.75]
    """
    shares = _softmax(parameter)
    return (np.cumsum(shares, 0) - shares[0]).astype(np.float32)


def lower_bounds_backward(dbounds: np.ndarray, parameter: np.ndarray) -> np.ndarray:
    """The parameter's gradient (L, H) for that of the bounds (L, H), both float32."""
    shares, later = _softmax(parameter), np.cumsum(dbounds[::-1].astype(np.float64), 0)[::-1]
    dshares = later.copy()  # forward: bound[l] = shares[1] + ... + shares[l]
    dshares[0] = 0
    return (shares * (dshares - (shares * dshares).sum(0))).astype(np.float32)


def _softmax(parameter: np.ndarray) -> np.ndarray:
    """Over the first axis, in float64."""
    shares = np.exp(parameter.astype(np.float64) - parameter.max(0))
    return shares / shares.sum(0)


class BitTrunkWeights:
    """The trunk's weights in the kernels' layouts. The model sets them once per step.

    norm1, norm2, hidden_norm (L, C), final_norm (C,), bounds (L, C), gain_in, gain_out (O, C) float32 : written by the
        model, gain_out (0, C) where nothing is added to the output;  layers : the BitMatrices by name in LAYERS
    """

    def __init__(self, config: BitConfig) -> None:
        self.config, blocks, dim, inner = config, config.n_blocks, config.dim, config.ffn_dim
        self.variant = arithmetic_variant(True)
        self.norm1, self.norm2, self.hidden_norm = (np.zeros((blocks, dim), np.float32) for _ in range(3))
        self.final_norm, self.bounds = np.zeros(dim, np.float32), np.zeros((blocks, dim), np.float32)
        shapes = dict.fromkeys(LAYERS, (dim, dim)) | {"gate_up": (2 * inner, dim), "down": (dim, inner)}
        self.layers = {name: BitMatrices(blocks, *shape, self.variant) for name, shape in shapes.items()}
        kinds = copy_kinds(config.ngram_copy_orders)
        self.copy_order, self.copy_skip = (np.array([kind[i] for kind in kinds], np.int64) for i in range(2))
        self.gain_in = np.zeros((len(kinds), dim), np.float32)
        self.gain_out = np.zeros((len(kinds) if config.copy_adds else 0, dim), np.float32)

    @property
    def n_layers(self) -> int:
        """R."""
        return self.config.n_blocks * self.config.n_passes

    def read(self, *, backward: bool) -> BitWeights:
        """The weights for a region."""
        layers = self.layers
        none = np.empty((self.config.n_blocks, 0, 0, 0), np.float32)
        return BitWeights(
            **{name: getattr(self, name) for name in (*_NORMS, "final_norm", "bounds")},
            eps=np.float32(self.config.eps),
            **{f"{name}_norm": layers[name].norms for name in LAYERS},
            **{f"{name}_scale": layers[name].scales for name in LAYERS},
            **{f"{name}_codes": layers[name].codes for name in LAYERS},
            **{f"{name}_plain": layers[name].plain for name in LAYERS},
            **{f"{name}_panels": layers[name].panels if backward else none for name in LAYERS},
            copy_order=self.copy_order,
            copy_skip=self.copy_skip,
            copy_reach=self.config.ngram_copy_reach,
            gain_in=self.gain_in,
            gain_out=self.gain_out,
        )


def bit_steps(layers: int, dim: int, *, backward: bool) -> list[Step]:
    """The steps of a pass, in order, and how each divides among threads."""
    scan = Stage(SEQUENCES, -(-dim // REGISTER))
    if backward:
        order = [(OUTPUTS, Stage(ROWS)), (SCAN, scan), (INPUTS, Stage(ROWS)), (WEIGHTS, Stage(SEQUENCES, ANY))]
    else:
        order = [(INPUTS, Stage(ROWS)), (SCAN, scan), (OUTPUTS, Stage(ROWS))]
    through = reversed(range(layers)) if backward else range(layers)
    return [Step(layer, operation, 0, divides) for layer in through for operation, divides in order]


def _new_gradients(weights: BitTrunkWeights, division: Division) -> BitGradients:
    config, copies = weights.config, division.copies
    blocks, dim = config.n_blocks, config.dim
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(_NORMS, (copies.rows, blocks, dim))
    shapes |= {"final_norm": (copies.rows, dim)}
    shapes |= {f"{name}_norm": (copies.rows, *weights.layers[name].norms.shape) for name in LAYERS}
    shapes |= {"gain_in": (copies.rows, *weights.gain_in.shape), "gain_out": (copies.rows, *weights.gain_out.shape)}
    shapes |= {"bounds": (copies.sequences, blocks, dim)}
    shapes |= {name: (copies.sequences, blocks, *weights.layers[name].shape) for name in LAYERS}
    pool, segments, arrays = allocate(list(shapes.values()))
    dx = aligned_zeros((division.batch * division.time, dim), np.float32)
    return BitGradients(dx=dx, pool=pool, segments=segments, **dict(zip(shapes, arrays, strict=True)))


class BitBuffers:
    """Saved activations and scratch for batches of one shape (B, T). The backward pass makes what only it needs."""

    def __init__(self, weights: BitTrunkWeights, batch: int, time: int) -> None:
        rows, threads, layers = batch * time, numba.get_num_threads(), weights.n_layers
        dim, inner, copies = weights.config.dim, weights.config.ffn_dim, len(weights.copy_order)
        self.division = division = divide(batch, time, threads)
        self.batch, self.time = batch, time
        wide = ("value", "forget", "gate", "h", "post_mixer")
        factors = [name for name in BitActivations._fields if name.startswith("rstd_") and name != "rstd_out"]
        self.activations = BitActivations(
            x=_zeros(layers + 1, rows, dim),
            gate_up=_zeros(layers, rows, 2 * inner),
            **{name: _zeros(layers, rows, dim) for name in wide},
            **{name: _zeros(layers, rows) for name in factors},
            copies=np.zeros((copies, rows), np.int32),
            out=_zeros(rows, dim),
            rstd_out=_zeros(rows),
        )
        self.before = np.zeros((layers, dim), np.float32)
        self._weights, self._threads = weights, threads
        self._scratch: dict[bool, BitScratch] = {}
        self._gradients: BitGradients | None = None
        tile = max(division.tile, division.block)
        shapes = [matrices.shape for matrices in weights.layers.values()]
        self.work: BitWork = new_work(weights.variant, shapes, tile, threads)
        self._called: dict[bool, tuple[BitWork, Shape]] = {}

    @property
    def gradients(self) -> BitGradients:
        """The results of the backward pass."""
        if self._gradients is None:
            self._gradients = _new_gradients(self._weights, self.division)
        return self._gradients

    def scratch(self, *, backward: bool) -> BitScratch:
        """For a direction; that of the backward pass serves both."""
        for made, scratch in self._scratch.items():
            if made >= backward:
                return scratch
        dim, inner, division, threads = self._weights.config.dim, self._weights.config.ffn_dim, self.division, 0
        kept = division.places if backward else (0, 0)
        threads, block = (self._threads if backward else 0), division.block
        two_dims = ("dlayer", "dpost", "dvalue", "dforget", "dgate", "dh")
        inputs = ("value_in", "forget_in", "gate_in", "out_in", "gate_up_in")
        self._scratch[backward] = BitScratch(
            normed=_zeros(self._threads, block, dim),
            dnormed=_zeros(threads, block, dim),
            dinput=_zeros(threads, block, dim),
            hidden=_zeros(self._threads, block, inner),
            dhidden=_zeros(threads, block, inner),
            dinner=_zeros(threads, block, inner),
            **{name: _zeros(*kept, dim) for name in (*two_dims, *inputs)},
            dgate_up=_zeros(*kept, 2 * inner),
            down_in=_zeros(*kept, inner),
            zeros=_zeros(dim),
        )
        return self._scratch[backward]

    def _shape(self, *, backward: bool) -> Shape:
        """The shape of a pass, without the addresses."""
        division, config = self.division, self._weights.config
        steps = bit_steps(self._weights.n_layers, config.dim, backward=backward)
        return Shape(
            division.time,
            division.tile,
            division.threads,
            self._weights.n_layers,
            config.n_blocks,
            np.array([step[:3] for step in steps], np.int64),
            *division.plan([step.divides for step in steps]),
        )

    def functions(self, *, backward: bool) -> dict[str, Callable[[], Any]]:
        """What a pass calls by its address (_calls.py), by the name of the field that holds the address.

        Each function compiles one of them, or loads it from the cache, and returns the address. "region" calls all.
        """
        weights, shape = self._weights.read(backward=backward), self._shape(backward=backward)
        rest = self.activations, self.scratch(backward=backward), weights, self.work, shape
        if backward:
            batch = BatchGradient(_NO_ROWS, _NO_ROWS)
            own = {
                "backward": lambda: address(bit_backward_thread, 0, batch, self.gradients, *rest),
                "region": lambda: address(bit_backward_region, batch, self.gradients, *rest),
            }
        else:
            first = BitBatch(_NO_ROWS[0].astype(np.int32), _NO_ROWS, _NO_ROWS, True)
            own = {
                "forward": lambda: address(bit_forward_thread, 0, first, *rest),
                "region": lambda: address(bit_forward_region, first, *rest),
            }
        return {**work_functions(self._weights.variant), **own}

    def called(self, *, backward: bool) -> tuple[BitWork, Shape]:
        """The work and the shape for a region, with the addresses of what it calls."""
        if backward not in self._called:
            functions = self.functions(backward=backward)
            found = {name: function() for name, function in functions.items() if name != "region"}
            pair = self.work, self._shape(backward=backward)
            own = [{name: at for name, at in found.items() if name in fields._fields} for fields in pair]
            self._called[backward] = pair[0]._replace(**own[0]), pair[1]._replace(**own[1])
        return self._called[backward]

    def fits(self, weights: BitTrunkWeights, batch: int, time: int) -> bool:
        """Whether the buffers fit this batch shape, these weights and the threads in use."""
        return (self.batch, self.time, self._threads) == (batch, time, numba.get_num_threads()) and (
            self._weights is weights
        )


def _zeros(*shape: int) -> np.ndarray:
    return aligned_zeros(shape, np.float32)


def bit_trunk_forward(
    buffers: BitBuffers,
    weights: BitTrunkWeights,
    embedding: np.ndarray,
    rows: np.ndarray,
    before: np.ndarray | None = None,
    *,
    search: bool = True,
) -> np.ndarray:
    """Hidden states (N, C) float32 for rows (B*T,) int32 of embedding (V, C). The result is a view of the buffers.

    before : (R, C), states before the first token of every sequence; default: zeros
    search : find what is copied within each sequence; False: it is in buffers.activations.copies
    rows must be in [0, V); the caller checks this (Model.forward). buffers store the activations for
    bit_trunk_backward, which needs states of zero before. Every number of rows, of threads and every division of a text
    by `before` gives the same bits. Source: arXiv:2406.02528, section 3.3.
    """
    work, shape = buffers.called(backward=False)
    batch = BitBatch(rows, embedding, buffers.before if before is None else before, search)
    scratch = buffers.scratch(backward=False)
    bit_forward_region(batch, buffers.activations, scratch, weights.read(backward=False), work, shape)
    return buffers.activations.out


def bit_trunk_backward(
    buffers: BitBuffers, weights: BitTrunkWeights, dout: np.ndarray, embedding: np.ndarray
) -> Mapping[str, np.ndarray]:
    """Gradients for dout (N, C) float32, after bit_trunk_forward with the same buffers, weights and embedding.

    Returns the fields of BitGradients without the copies, views of the buffers; dx (N, C) is buffers.gradients.dx. The
    caller adds the embedding's gradient, as after trunk_backward.
    """
    work, shape = buffers.called(backward=True)
    gradients, scratch = buffers.gradients, buffers.scratch(backward=True)
    batch = BatchGradient(dout, embedding)
    bit_backward_region(batch, gradients, buffers.activations, scratch, weights.read(backward=True), work, shape)
    skipped = ("dx", "pool", "segments")
    return {name: value[0] for name, value in gradients._asdict().items() if name not in skipped}
