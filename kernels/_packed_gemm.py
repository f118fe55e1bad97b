"""Products of many rows with a weight that is packed once per step, in register tiles.

Panels (P, K, 32) of a weight (R, K), with P = R / 32 rounded up, interleave 32 rows of the weight per input and are
padded with zeros. The trunk's weights do not change during a step, so they are packed once per step. BLAS packs its
operands in every call.
Letters: M rows of inputs, K inputs, R outputs.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._microkernels import (
    HAS_AVX512,
    TileLeft,
    TileOut,
    TileRight,
    address_of,
    tile_product_16,
    tile_product_32,
)
from flashlm_numba.kernels._rows import aligned_zeros

WIDTH = 32
SPARE_ROWS = 24  # of the scratch for outputs that do not fill a register
SPARE_FLOATS = 16 * SPARE_ROWS


@serial_kernel
def _fill_panels(panels, weight):
    rows, columns = weight.shape
    for p in range(panels.shape[0]):
        for k in range(columns):
            for j in range(WIDTH):
                row = p * WIDTH + j
                panels[p, k, j] = weight[row, k] if row < rows else np.float32(0)


def empty_panels(rows: int, columns: int) -> np.ndarray:
    """Uninitialised panels for a weight of shape (R, K)."""
    return aligned_zeros((-(-rows // WIDTH), columns, WIDTH), np.float32)


def fill_panels(panels: np.ndarray, weight: np.ndarray) -> None:
    """Write the panels of weight (R, K) float32, with arbitrary strides; unchecked."""
    _fill_panels(panels, weight)


def _make_packed_gemm(wide: bool) -> Any:
    """With tiles of 12 x 32, for the registers of AVX-512, or of 16 columns."""

    def packed_gemm(out, x, panels, spare, add):
        rows, count, depth = out.shape[0], out.shape[1], x.shape[1]
        to, a = out.reshape(-1), x.reshape(-1)
        left = TileLeft(address_of(a, 0), depth, 1, 0)
        for p in range(panels.shape[0]):
            panel, first, last = panels[p].reshape(-1), p * WIDTH, min(count, (p + 1) * WIDTH)
            if wide and last - first == WIDTH:
                place, right = TileOut(address_of(to, first), count), TileRight(address_of(panel, 0), WIDTH, 0)
                tile_product_32(place, left, right, rows, depth, 1, add)
                continue
            for c in range(first, last, 16):
                right = TileRight(address_of(panel, c - first), WIDTH, 0)
                if c + 16 <= last:
                    tile_product_16(TileOut(address_of(to, c), count), left, right, rows, depth, 1, add)
                    continue
                for m in range(0, rows, SPARE_ROWS):  # a part of a register
                    high = min(SPARE_ROWS, rows - m)
                    some = TileLeft(address_of(a, m * depth), depth, 1, 0)
                    tile_product_16(TileOut(address_of(spare, 0), 16), some, right, high, depth, 1, 0)
                    for i in range(high):
                        for j in range(last - c):
                            value = spare[16 * i + j]
                            out[m + i, c + j] = out[m + i, c + j] + value if add else value

    packed_gemm.__name__ = packed_gemm.__qualname__ = f"_packed_gemm_{'wide' if wide else 'narrow'}"
    return helper(packed_gemm)


# out (M, R) = x (M, K) @ weight.T for the panels (P, K, 32) of weight, or added to out (add = 1); K >= 1. out and x are
# contiguous; spare: at least SPARE_FLOATS of scratch, 1-D.
packed_gemms = {wide: _make_packed_gemm(wide) for wide in (False, True)}
packed_gemm = packed_gemms[HAS_AVX512]


@serial_kernel
def _packed_gemm(out, x, panels, spare, add):
    packed_gemm(out, x, panels, spare, add)


def packed_gemm_address() -> Any:
    """The address of packed_gemm (_calls.py); compiles it, or loads it from the cache."""
    x = np.empty((0, 0), np.float32)
    return address(_packed_gemm, x, x, np.empty((0, 0, WIDTH), np.float32), x.reshape(-1), 0)
