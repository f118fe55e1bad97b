"""A ternary layer inside the trunk's regions: its product and the gradient of its weight, in float32 or in int8.

The layers of one kind are stacked over the blocks: L matrices (R, K), one per block. `TernaryMatrices` holds their
ternary values and the layouts that the products read. `Arithmetic` selects the product and holds its scratch per
thread.
Letters: L blocks, M rows of activations, R outputs, K inputs, P threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from flashlm_numba.kernels._blas import gemm_tn, sgemm_address
from flashlm_numba.kernels._calls import call
from flashlm_numba.kernels._jit import helper
from flashlm_numba.kernels._packed_gemm import SPARE_FLOATS, empty_panels, fill_panels
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import BYTE_VARIANTS, PLAIN, VARIANTS, check_variant
from flashlm_numba.kernels.ternary_gemm import (
    empty_columns,
    fill_columns,
    gemm_variant,
    spare_floats,
)
from flashlm_numba.kernels.ternary_wgrad import codes_words


class Arithmetic(NamedTuple):
    """The arithmetic of ternary products, and its scratch per thread."""

    q: np.ndarray  # (P, any) int8: rounded activations
    scales: np.ndarray  # (P, any) float32: their scales
    sums: np.ndarray  # (P, any) int32
    spare: np.ndarray  # (P, any) float32
    wgrad_codes: np.ndarray  # (P, any) int32: bytes of a weight gradient's operand; (P, 0) where it is not rounded
    wgrad_scales: np.ndarray  # (P, any) float32
    variant: int  # index in VARIANTS
    sgemm: int  # address of BLAS's sgemm
    int8_product: Any = 0  # addresses (_calls.py), 0 if not in use: of ternary_gemm.KERNELS
    float_product: Any = 0  # of packed_gemm
    int8_gradient: Any = 0  # of ternary_wgrad


class Layouts(NamedTuple):
    """The layouts of L matrices, or of their transposes, that the products read; two of the three are empty."""

    panels: np.ndarray  # (L, any, K, 32) float32, in float arithmetic: see _packed_gemm.py
    codes: np.ndarray  # (L, K / 4, R', 4) uint8, in int8: see ternary_gemm.py
    plain: np.ndarray  # (L, R, K) float32, in int8 where no int8 instruction serves


@helper
def ternary_product(out, x, panels, codes, plain, add, arithmetic, thread):
    """out (M, R) = x (M, K) @ weight.T, or added to out. Quantises x to int8 if there are codes of the weight.

    panels, codes, plain : layouts of one matrix, from Layouts
    """
    if codes.shape[1] > 0:
        call(
            arithmetic.int8_product,
            out,
            x,
            plain,
            codes,
            arithmetic.q[thread],
            arithmetic.scales[thread],
            arithmetic.sums[thread],
            arithmetic.spare[thread],
            add,
            arithmetic.sgemm,
        )
    else:
        call(arithmetic.float_product, out, x, panels, arithmetic.spare[thread], add)


@helper
def share_of_outputs(count, share, share_end, shares):
    """First and last + 1 of `count` outputs, from one share to before another; multiples of 8, or count."""
    eights = (count + 7) // 8
    return min(count, share * eights // shares * 8), min(count, share_end * eights // shares * 8)


@helper
def ternary_weight_gradient(out, a, b, first, arithmetic, thread):
    """out (R, K) += a[:, first : first + R].T @ b for a (M, any), b (M, K).

    Quantises both to int8 if there is scratch for it.
    """
    codes = arithmetic.wgrad_codes[thread]
    if out.shape[0] == 0:
        return
    if codes.shape[0] > 0:
        call(
            arithmetic.int8_gradient,
            out,
            a,
            b,
            first,
            codes,
            arithmetic.wgrad_scales[thread],
            arithmetic.q[thread],
            arithmetic.scales[thread],
            arithmetic.sums[thread],
            arithmetic.spare[thread],
            arithmetic.variant,
            arithmetic.sgemm,
        )
    else:
        gemm_tn(arithmetic.sgemm, out, a[:, first : first + out.shape[0]], b, np.float32(1))


def arithmetic_variant(int8: bool, variant: str | None = None) -> int:
    """Index in VARIANTS of the products to use: "plain" in float arithmetic, else the named or the fastest variant."""
    return PLAIN if not int8 else VARIANTS.index(check_variant(variant) if variant else gemm_variant())


def new_arithmetic(
    int8: bool, variant: int, matrices: Sequence[tuple[int, int]], rows: int, threads: int
) -> Arithmetic:
    """Arithmetic with scratch for `threads` threads, for up to `rows` rows times matrices of these shapes (R, K)."""
    widest = max(max(shape) for shape in matrices) + 3 if int8 else 0
    scaled = max(rows, widest)
    words = codes_words(rows, max(columns for _, columns in matrices)) if int8 and variant in BYTE_VARIANTS else 0
    return Arithmetic(
        q=aligned_zeros((threads, (rows + 3) * widest), np.int8),
        scales=aligned_zeros((threads, scaled), np.float32),
        sums=np.zeros((threads, scaled), np.int32),
        spare=aligned_zeros((threads, max(SPARE_FLOATS, spare_floats(variant, rows, widest))), np.float32),
        wgrad_codes=aligned_zeros((threads, words), np.int32),
        wgrad_scales=aligned_zeros((threads, rows + 3), np.float32),
        variant=variant,
        sgemm=sgemm_address(),
    )


class TernaryMatrices:
    """L ternary matrices (R, K) float32 of one kind, one per block, and their layouts for the products.

    values : (L, R, K), which the model writes (`ternarize`); call pack afterwards
    forward, transposed : Layouts for x @ weight.T and for x @ weight
    decoding : what decode.py made of the values for their products with one row; None after pack
    """

    def __init__(self, blocks: int, rows: int, columns: int) -> None:
        self.values = np.zeros((blocks, rows, columns), np.float32)
        self.use(False, PLAIN)

    @property
    def shape(self) -> tuple[int, int]:
        """(R, K)."""
        return self.values.shape[1], self.values.shape[2]

    def use(self, int8: bool, variant: int) -> None:
        """Choose the arithmetic; call pack afterwards."""
        blocks, rows, columns = self.values.shape
        self.decoding: tuple[np.ndarray, np.ndarray] | None = None
        self.forward = _empty_layouts(blocks, rows, columns, int8, variant)
        self.transposed = _empty_layouts(blocks, columns, rows, int8, variant)

    def pack(self) -> None:
        """Fill the layouts from the values."""
        self.decoding = None
        for block, value in enumerate(self.values):
            for layouts, weight in ((self.forward, value), (self.transposed, value.T)):
                if layouts.panels.size:
                    fill_panels(layouts.panels[block], weight)
                if layouts.codes.size:
                    fill_columns(layouts.codes[block], weight)
                if layouts.plain.size:
                    layouts.plain[block] = weight


def _empty_layouts(blocks: int, rows: int, columns: int, int8: bool, variant: int) -> Layouts:
    none = (0, 0)
    shape = (rows, columns)
    panels = empty_panels(*(none if int8 else shape))
    codes = empty_columns(*(shape if int8 else none))
    return Layouts(
        panels=aligned_zeros((blocks, *panels.shape), np.float32),
        codes=aligned_zeros((blocks, *codes.shape), np.uint8),
        plain=np.empty((blocks, *(shape if int8 and variant == PLAIN else none)), np.float32),
    )
