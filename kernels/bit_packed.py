"""The MatMul-free trunk for large models: weights of 2 bits, on all threads, up to 64 tokens at a time.

These are the next tokens of one text, or one token of each of several texts. The weights are read once for them, and
stay packed. Hidden states have the bits of bit_trunk_forward and of bit_decode_step, whatever the number of threads and
of tokens or texts read at once. _bit_packed_regions.py has the compiled code. The embedding is left to the caller.
Letters: M rows, N texts, C channels, I FFN width, L blocks, R layers, V outputs, K inputs, W packed bytes per row, P
threads.
Source: Zhu et al. 2024, arXiv:2406.02528, section 3.3.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numba
import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._bit_layer import work_functions
from flashlm_numba.kernels._bit_packed_regions import (
    LINE,
    MOST_ROWS,
    PRODUCTS,
    ROWS_AT_ONCE,
    PackedWeights,
    PackedWork,
    outputs_region,
    outputs_thread,
    packed_region,
    packed_thread,
)
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import VARIANTS, check_variant
from flashlm_numba.kernels.bit_rows import norm
from flashlm_numba.kernels.bit_trunk import LAYERS, BitConfig, BitTrunkWeights
from flashlm_numba.kernels.bitlinear import EXACT_COLUMNS, _bit_inputs
from flashlm_numba.kernels.ternary import packed_width
from flashlm_numba.kernels.ternary_gemv import SERIAL, best_variant

__all__ = ["MOST_ROWS", "PackedTrunk", "matrix_shapes", "packed_outputs"]

_ALIGNMENT = 64  # bytes: of a matrix in `codes`


def matrix_shapes(dim: int, ffn_dim: int) -> dict[str, tuple[int, int]]:
    """Outputs and inputs of the matrices of a block, by name in LAYERS."""
    return dict.fromkeys(LAYERS, (dim, dim)) | {"gate_up": (2 * ffn_dim, dim), "down": (dim, ffn_dim)}


class PackedTrunk:
    """The trunk's weights, which stay packed, and scratch. One call at a time; a state per text (new_state).

    weights : PackedWeights, which the caller writes; matrix() is a view of one of its matrices
    The copies of BitConfig's n-grams are left to the caller, as is the embedding.
    """

    def __init__(self, config: BitConfig, *, variant: str | None = None) -> None:
        self.config, blocks, dim, inner = config, config.n_blocks, config.dim, config.ffn_dim
        self.variant = check_variant(variant) if variant else best_variant()
        self.shapes = matrix_shapes(dim, inner)
        places, size = np.zeros((blocks, len(LAYERS)), np.int64), 0
        for block in range(blocks):
            for matrix, (rows, columns) in enumerate(self.shapes.values()):
                places[block, matrix] = size
                size += -(-rows * packed_width(columns) // _ALIGNMENT) * _ALIGNMENT
        ones: dict[str, Any] = {name: np.ones((blocks, dim), np.float32) for name in ("norm1", "norm2", "hidden_norm")}
        self.weights = PackedWeights(
            **ones,
            final_norm=np.ones(dim, np.float32),
            bounds=np.zeros((blocks, dim), np.float32),
            norms=np.ones((blocks, len(LAYERS) - 1, dim), np.float32),
            down_norm=np.ones((blocks, inner), np.float32),
            scales=np.ones((blocks, len(LAYERS)), np.float32),
            codes=aligned_zeros((size,), np.uint8),
            places=places,
            eps=np.float32(config.eps),
        )
        self._work: dict[tuple[bool, int], PackedWork] = {}

    @classmethod
    def from_trunk(cls, trunk: BitTrunkWeights, *, variant: str | None = None) -> PackedTrunk:
        """The same weights, packed."""
        made = cls(trunk.config, variant=variant)
        own = made.weights
        for name in ("norm1", "norm2", "hidden_norm", "final_norm", "bounds"):
            getattr(own, name)[...] = getattr(trunk, name)
        for matrix, (name, layer) in enumerate(trunk.layers.items()):
            (own.norms[:, matrix] if name != "down" else own.down_norm)[...] = layer.norms
            own.scales[:, matrix] = layer.scales
            for block, packed in enumerate(layer.packed()):
                made.matrix(block, name)[...] = packed
        return made

    def matrix(self, block: int, name: str) -> np.ndarray:
        """A matrix of LAYERS, (R, W) uint8, packed as by pack_ternary. It is a view: write the weights there."""
        rows, columns = self.shapes[name]
        width, start = packed_width(columns), self.weights.places[block, LAYERS.index(name)]
        return self.weights.codes[start : start + rows * width].reshape(rows, width)

    def new_state(self) -> np.ndarray:
        """The state before the first token of a text, (R, C) float32."""
        return np.zeros((self.config.n_blocks * self.config.n_passes, self.config.dim), np.float32)

    def read(self, state: np.ndarray, x: np.ndarray) -> np.ndarray:
        """Hidden states (M, C) float32 of the next tokens of a text, for their rows of the embedding x (M, C) float32.

        state : (R, C), which becomes that after these tokens
        All threads work on it. Raises ValueError if a shape or dtype is wrong.
        """
        _check.array("PackedTrunk.read", "x", x, (None, self.config.dim))
        _check.array("PackedTrunk.read", "state", state, (len(state), self.config.dim))
        out = np.empty_like(x)
        for start in range(0, len(x), MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            self._read(out[part], state[:, None], x[part])
        return out

    def read_each(self, states: Sequence[np.ndarray], x: np.ndarray) -> np.ndarray:
        """Hidden states (N, C) float32 of the next token of each of N texts, for their rows x (N, C) float32.

        states : of the texts, (R, C) each, all different; they become those after these tokens
        The result has the bits of N calls of `read`. Raises ValueError if a shape or dtype is wrong.
        """
        _check.array("PackedTrunk.read_each", "x", x, (len(states), self.config.dim))
        out = np.empty_like(x)
        for start in range(0, len(x), MOST_ROWS):
            part = slice(start, start + MOST_ROWS)
            together = np.stack(states[part], axis=1)
            self._read(out[part], together, x[part])
            for n, state in enumerate(states[part]):
                state[...] = together[:, n]
        return out

    def _read(self, out: np.ndarray, states: np.ndarray, x: np.ndarray) -> None:
        """out (M, C) = hidden states for M <= MOST_ROWS rows x (M, C) of N texts, as many each; states (R, N, C)."""
        threads = numba.get_num_threads()
        work = self._work_for(len(x), threads)
        work.x[...] = x
        stages = len(states) * PRODUCTS * (1 if len(x) == 1 else 2)
        packed_region(stages, threads, states, work, self.weights)
        norm(out, work.rstd.reshape(-1), work.x, self.weights.final_norm, self.weights.eps)

    def _work_for(self, rows: int, threads: int) -> PackedWork:
        """Scratch for this many rows; kept for one row and for many."""
        single, key = rows == 1, (rows == 1, threads)
        if key not in self._work:
            self._work[key] = self._new_work(1 if single else MOST_ROWS, threads)
        work = self._work[key]
        few = ("x", "value", "forget", "gate", "h", "gate_up")
        return work if len(work.x) == rows else work._replace(**{name: getattr(work, name)[:rows] for name in few})

    def _new_work(self, rows: int, threads: int) -> PackedWork:
        dim, inner, sets = self.config.dim, self.config.ffn_dim, threads if rows == 1 else 1
        widest = max(dim, inner)
        own: dict[str, Any] = {name: aligned_zeros((rows, dim), np.float32) for name in PackedWork._fields[2:6]}
        addresses: dict[str, Any] = dict.fromkeys(PackedWork._fields[-7:], 0)
        work = PackedWork(
            x=aligned_zeros((rows, dim), np.float32),
            rstd=np.zeros((sets, rows), np.float32),
            **own,
            gate_up=aligned_zeros((rows, 2 * inner), np.float32),
            normed=aligned_zeros((sets, rows * widest), np.float32),
            row=aligned_zeros((threads, -(-widest // LINE) * LINE), np.float32),
            q=aligned_zeros((sets, 3, rows * 4 * packed_width(widest)), np.int8),
            steps=np.zeros((sets, 3, rows), np.float32),
            totals=np.zeros((sets, 3, rows), np.int32),
            sums=aligned_zeros((threads, rows * ROWS_AT_ONCE), np.int32),
            **addresses,
        )
        found = {name: function() for name, function in self.functions(work).items() if name != "region"}
        return work._replace(**found)

    def functions(self, work: PackedWork) -> dict[str, Callable[[], Any]]:
        """Functions that compile what a region calls, or load it from the cache, by the field of PackedWork."""
        shared = work_functions(VARIANTS.index(self.variant))
        return {
            **{name: shared[name] for name in ("inputs", "norm", "gated", "swiglu", "scan")},
            "product": lambda: _product_address(self.variant),
            "thread": lambda: address(packed_thread, 0, 1, self.new_state()[:, None], work, self.weights),
        }


def _product_address(variant: str) -> Any:
    q, sums, packed = np.empty((0, 0), np.int8), np.empty((0, 0), np.int32), np.empty((0, 0), np.uint8)
    return address(SERIAL[variant], sums, packed, q)


def packed_outputs(
    x: np.ndarray, norm: np.ndarray, packed: np.ndarray, scale: float, *, variant: str | None = None
) -> np.ndarray:
    """The outputs (M, V) float32 of a BitLinear with packed weights (V, W) uint8 and their scale, on all threads.

    x (M, K), norm (K,) float32;  variant : one of _ternary_dots.available(); default: the best
    Every variant and number of threads gives the same bits. Raises ValueError if a shape or dtype is wrong.
    The twin is reference_mmf.bitlinear_forward.

    >>> from flashlm_numba.kernels.ternary import pack_ternary
    >>> packed = pack_ternary(np.array([[1, -1, 0]], np.float32))
    >>> outputs = packed_outputs(np.array([[3, -3, 0]], np.float32), np.ones(3, np.float32), packed, 2.0)
    >>> round(float(outputs[0, 0]), 3)  # 2 * (sqrt(1.5) + sqrt(1.5))
    4.899
    """
    _check.array("packed_outputs", "x", x, (None, None))
    _check.array("packed_outputs", "norm", norm, (x.shape[1],))
    _check.array("packed_outputs", "packed", packed, (None, packed_width(x.shape[1])), np.uint8)
    if x.shape[1] > EXACT_COLUMNS:
        raise ValueError(f"packed_outputs: x can have at most {EXACT_COLUMNS:,} columns, got {x.shape[1]:,}")
    threads, out = numba.get_num_threads(), np.empty((len(x), len(packed)), np.float32)
    most, row = min(len(x), MOST_ROWS), np.empty(x.shape[1], np.float32)
    q = aligned_zeros((most, 4 * packed.shape[1]), np.int8)
    steps, totals, rstd = np.empty(most, np.float32), np.empty(most, np.int32), np.empty(most, np.float32)
    sums = np.empty((threads, most * ROWS_AT_ONCE), np.int32)
    product = _product_address(check_variant(variant) if variant else best_variant())
    function = address(outputs_thread, 0, threads, out, packed, q, steps, sums, product)
    for start in range(0, len(x), MOST_ROWS):
        some = x[start : start + MOST_ROWS]
        m = len(some)
        _bit_inputs(q[:m], steps[:m], totals[:m], rstd[:m], row, some, norm, np.float32(scale))
        outputs_region(function, threads, out[start : start + m], packed, q[:m], steps[:m], sums, product)
    return out
