"""BitLinears inside the trunk's regions: weights, stacked over the blocks, and the work of a layer on some rows.

bitlinear.py has the formulas and the kernels, which are called by address.
Letters: L blocks, M rows, R outputs, K inputs, P threads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.kernels._blas import gemm_tn, sgemm_address
from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._jit import helper, view
from flashlm_numba.kernels._packed_gemm import empty_panels, fill_panels, packed_gemm_address
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import PLAIN
from flashlm_numba.kernels._ternary_layer import share_of_outputs
from flashlm_numba.kernels.bit_rows import gated_address, norm_address, scan_address, swiglu_address
from flashlm_numba.kernels.bitlinear import (
    absmean_ternary,
    bit_inputs_address,
    bit_product_address,
    spare_floats,
)
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows
from flashlm_numba.kernels.ternary import pack_ternary
from flashlm_numba.kernels.ternary_gemm import empty_columns, fill_columns


class BitWork(NamedTuple):
    """Scratch per thread of the layers, and the addresses of the functions that a thread calls."""

    q: np.ndarray  # (P, any) int8: rounded inputs
    scales: np.ndarray  # (P, M) float32
    sums: np.ndarray  # (P, M) int32
    row: np.ndarray  # (P, any) float32
    spare: np.ndarray  # (P, any) float32
    sgemm: int  # address of BLAS's sgemm
    inputs: Any = 0  # addresses (_calls.py), 0 if not in use: of bitlinear's norm and rounding,
    product: Any = 0  # of its product,
    float_product: Any = 0  # of packed_gemm,
    norm: Any = 0  # and of bit_rows' functions
    gated: Any = 0
    swiglu: Any = 0
    scan: Any = 0


@view
def _rounded(q, rows, columns):
    width = (columns + 3) // 4 * 4
    return q[: rows * width].reshape(rows, width)


@helper
def bitlinear_rows(out, x, rstd, norm, scale, codes, plain, add, work, thread):
    """out (M, R) = the layer's output for x (M, K), or added to out; rstd (M,) of its norm is written.

    norm (K,), scale, codes and plain are those of one matrix.
    """
    rows, columns = x.shape
    q, row = _rounded(work.q[thread], rows, columns), work.row[thread, :columns]
    scales, sums, spare = work.scales[thread], work.sums[thread], work.spare[thread]
    call(work.inputs, q, scales, sums, rstd, row, x, norm, scale)
    call(work.product, out, q, plain, codes, scales, sums, spare, add, work.sgemm)


@helper
def bitlinear_rows_backward(dx, dnorm, rounded, dnormed, dout, x, norm, rstd, panels, accumulate, work, thread):
    """dx (M, K) (+)= and dnorm (K,) += for dout (M, R); rounded (M, K): the inputs, for bit_weight_gradient.

    dnormed (M, K): scratch;  panels of the scaled matrix's transpose
    """
    rows, columns = x.shape
    q, row, steps = _rounded(work.q[thread], rows, columns), work.row[thread, :columns], work.scales[thread]
    call(work.inputs, q, steps, work.sums[thread], rstd, row, x, norm, np.float32(1))
    for m in range(rows):
        for k in range(columns):
            rounded[m, k] = np.float32(q[m, k]) * steps[m]
    call(work.float_product, dnormed, dout, panels, work.spare[thread], 0)
    rmsnorm_backward_rows(dx, dnorm, dnormed, x, norm, rstd, accumulate)


@helper
def bit_weight_gradient(dweight, dout, rounded, unit, work):
    """dweight (R, K) += of a unit's share of the outputs, for dout (any, R) and rounded (any, K) of its rows."""
    first, last = share_of_outputs(dweight.shape[0], unit.share, unit.share_end, unit.shares)
    if last > first:
        for low in range(unit.low - unit.origin, unit.high - unit.origin, unit.tile):
            high = min(low + unit.tile, unit.high - unit.origin)
            gemm_tn(work.sgemm, dweight[first:last], dout[low:high, first:last], rounded[low:high], np.float32(1))


def new_work(variant: int, matrices: Sequence[tuple[int, int]], rows: int, threads: int) -> BitWork:
    """BitWork for `threads` threads, for up to `rows` rows times matrices of these shapes (R, K)."""
    widest = max(columns for _, columns in matrices) + 3
    return BitWork(
        q=aligned_zeros((threads, rows * widest), np.int8),
        scales=aligned_zeros((threads, rows), np.float32),
        sums=np.zeros((threads, rows), np.int32),
        row=aligned_zeros((threads, widest), np.float32),
        spare=aligned_zeros((threads, max(spare_floats(variant, rows, *shape) for shape in matrices)), np.float32),
        sgemm=sgemm_address(),
    )


def work_functions(variant: int) -> dict[str, Callable[[], Any]]:
    """Functions that compile what a thread calls, or load it from the cache, by the field that takes the address."""
    return {
        "inputs": bit_inputs_address,
        "product": lambda: bit_product_address(variant),
        "float_product": packed_gemm_address,
        "norm": norm_address,
        "gated": gated_address,
        "swiglu": swiglu_address,
        "scan": scan_address,
    }


class BitMatrices:
    """L matrices (R, K) of one kind, one per block, as ternary values with a scale, and the norms before them.

    values : (L, R, K) int8;  scales : (L,) float32;  norms : (L, K) float32, which the model writes
    codes : (L, G, R', 4) uint8, or plain : (L, R, K) float32 where no int8 instruction serves
    """

    def __init__(self, blocks: int, rows: int, columns: int, variant: int) -> None:
        self.shape, self._variant = (rows, columns), variant
        self.values = np.zeros((blocks, rows, columns), np.int8)
        self.scales = np.ones(blocks, np.float32)
        self.norms = np.ones((blocks, columns), np.float32)
        coded, plain = ((0, 0), (rows, columns)) if variant == PLAIN else ((rows, columns), (0, 0))
        self.codes = aligned_zeros((blocks, *empty_columns(*coded).shape), np.uint8)
        self.plain = np.zeros((blocks, *plain), np.float32)
        self._panels: np.ndarray | None = None
        self._packed: np.ndarray | None = None
        self._stale = True

    def set(self, block: int, weight: np.ndarray) -> None:
        """Take over a block's weight (R, K) float32."""
        values, self.scales[block] = absmean_ternary(weight)
        self.values[block] = values
        if self._variant == PLAIN:
            self.plain[block] = values
        else:
            fill_columns(self.codes[block], values)
        self._stale, self._packed = True, None

    @property
    def panels(self) -> np.ndarray:
        """(L, any, R, 32) float32: of the scaled transposes, for the backward pass, which alone needs them."""
        rows, columns = self.shape
        if self._panels is None:
            self._panels = aligned_zeros((len(self.values), *empty_panels(columns, rows).shape), np.float32)
        if self._stale:
            for block, value in enumerate(self.values):
                fill_panels(self._panels[block], (value * self.scales[block]).T)
            self._stale = False
        return self._panels

    def packed(self) -> np.ndarray:
        """(L, R, any) uint8: for decoding, by pack_ternary. Kept until the next `set`, since every text needs it."""
        if (found := self._packed) is None:
            found = self._packed = np.stack([pack_ternary(value.astype(np.float32)) for value in self.values])
        return found
