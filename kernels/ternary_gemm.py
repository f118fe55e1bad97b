"""Products of many rows of activations, quantised to int8, with a ternary matrix, for training.

    out (M, R) (+)= scale_m * (q_m . w_r),   q_m = round(x_m * 127 / max|x_m|), w_r ternary

One instruction computes four integer products where float32 needs four instructions. The weights are stored as codes 0,
1, 2 by columns, (K / 4, R', 4) uint8, so that a register holds the codes of four inputs for 16 outputs (8 with AVX2, 4
on Arm). Its product with four inputs, repeated, adds to 16 sums. A tile of sums stays in registers without horizontal
additions. The sums start at minus the sum of the row's q, because the codes are too large by one.

The tiles are in _ternary_tiles.py. Without an int8 instruction BLAS multiplies the quantised inputs in float32, which
differs only by float32 rounding.

Letters: M rows of activations, K inputs, R outputs, R' = R rounded up to blocks of 64.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numba
import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._arm_features import IS_ARM
from flashlm_numba.kernels._blas import gemm_nt, sgemm_address
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import helper, serial_kernel, view
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import (
    I8MM,
    PLAIN,
    VARIANTS,
    VNNI,
    available,
    check_variant,
)
from flashlm_numba.kernels._ternary_tiles import TILES, make_tile
from flashlm_numba.kernels.ternary_gemv import best_variant, quantize

COLUMNS = 64  # outputs of a block


@helper
def _products_plain(out, codes, q, sums, scales, add, spare):
    """Never called: where there is no such instruction, ternary_gemm multiplies by BLAS."""


def _make_products(variant: str) -> Any:
    """out (M, R) (+)= the scaled products of q (M, 4 G) int8 and codes (G, R', 4); spare (rows, 64): scratch."""
    if variant not in available():
        return _products_plain
    lanes, registers, most = TILES[variant]
    block = lanes * registers
    many, one = make_tile(variant, most), make_tile(variant, 1)

    def products(out, codes, q, sums, scales, add, spare):
        groups, width, count, rows = codes.shape[0], codes.shape[1], out.shape[1], out.shape[0]
        if groups == 0:
            for m in range(rows):
                for r in range(0 if add else count):
                    out[m, r] = 0
            return
        p, x, o, s = codes.ctypes.data, q.ctypes.data, out.ctypes.data, spare.ctypes.data
        ps, xs = sums.ctypes.data, scales.ctypes.data
        stride = out.strides[0]
        for r in range(0, count, block):
            whole = r + block <= count
            m = 0
            while m < rows:
                high = most if m + most <= rows else 1
                to, to_stride = (o + m * stride + 4 * r, stride) if whole else (s, 4 * block)
                if high == most:
                    many(
                        p + 4 * r,
                        4 * width,
                        x + m * q.shape[1],
                        q.shape[1],
                        groups,
                        ps + 4 * m,
                        xs + 4 * m,
                        to,
                        to_stride,
                        add if whole else 0,
                    )
                else:
                    one(
                        p + 4 * r,
                        4 * width,
                        x + m * q.shape[1],
                        q.shape[1],
                        groups,
                        ps + 4 * m,
                        xs + 4 * m,
                        to,
                        to_stride,
                        add if whole else 0,
                    )
                if not whole:  # a block that reaches beyond the last output
                    flat = spare.reshape(-1)
                    for j in range(high):
                        for k in range(count - r):
                            value = flat[j * block + k]
                            out[m + j, r + k] = out[m + j, r + k] + value if add else value
                m += high

    products.__name__ = products.__qualname__ = f"_ternary_gemm_{variant}"
    return helper(products)


if numba.config.DISABLE_JIT:
    products_avx2 = products_avxvnni = products_avx512 = products_vnni = _products_plain
    products_neon = products_dotprod = products_i8mm = _products_plain
else:
    products_avx2, products_avxvnni, products_avx512, products_vnni = (_make_products(name) for name in VARIANTS[1:5])
    products_neon, products_dotprod, products_i8mm = (_make_products(name) for name in VARIANTS[5:])

if IS_ARM:
    BYTE_OFFSET = 0  # sdot and smmla multiply signed bytes

    @helper
    def products_of_bytes(out, codes, q, sums, scales, spare, variant):
        """out += the scaled products of codes that are whole bytes, by one of BYTE_VARIANTS."""
        if variant == I8MM:
            products_i8mm(out, codes, q, sums, scales, 1, spare)
        else:
            products_dotprod(out, codes, q, sums, scales, 1, spare)

else:
    BYTE_OFFSET = 128  # vpdpbusd multiplies unsigned by signed bytes

    @helper
    def products_of_bytes(out, codes, q, sums, scales, spare, variant):
        """out += the scaled products of codes that are whole bytes, by one of BYTE_VARIANTS."""
        if variant == VNNI:
            products_vnni(out, codes, q, sums, scales, 1, spare)
        else:
            products_avxvnni(out, codes, q, sums, scales, 1, spare)


@functools.cache
def gemm_variant() -> str:
    """The variant to use: ternary_gemv's best_variant if it agrees with NumPy on this machine, else plain."""
    name = best_variant()
    if name == "plain":
        return name
    rng = np.random.default_rng(0)
    weight = rng.integers(-1, 2, (70, 37)).astype(np.float32)
    x = rng.integers(-127, 128, (13, 37)).astype(np.float32)
    x[:, 0] = 127  # the rounding then changes nothing
    weight[0], weight[1], x[0], x[1] = 1, -1, 127, -127
    if np.allclose(ternary_gemm(x, weight, pack_columns(weight), variant=name), x @ weight.T, rtol=1e-5, atol=1e-3):
        return name
    warnings.warn(f"the {name} kernel of ternary_gemm computes wrongly on this machine; not used", stacklevel=2)
    return "plain"


# out (M, R) = x (M, K) @ weight.T, or added to out (add = 1), x rounded to int8 row by row: one kernel per variant, so
# that only the one in use is compiled. weight (R, K) float32 and codes (G, R', 4) hold the same. Rows of out are
# contiguous. Scratch: q int8, scales and sums (M or more,), spare (6 * 64,) and, for BLAS, at least (M * K,).


@view
def _rounded(q, scales, x, codes):
    """The rounded rows of x in the scratch q: (M, 4 G) int8."""
    rows, width = x.shape[0], 4 * codes.shape[0]
    here = q[: rows * width].reshape(rows, width)
    quantize(here, scales, x)
    return here


@helper
def _add_up(sums, q):
    for m in range(q.shape[0]):
        total = np.int32(0)
        for k in range(q.shape[1]):
            total += np.int32(q[m, k])
        sums[m] = total


@serial_kernel
def _rows_plain(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    rows, columns = x.shape
    rounded = spare[: rows * columns].reshape(rows, columns)
    for m in range(rows):
        for k in range(columns):
            rounded[m, k] = np.float32(here[m, k]) * scales[m]
    gemm_nt(blas, out, rounded, weight, np.float32(add))


@serial_kernel
def _rows_avx2(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_avx2(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_avxvnni(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_avxvnni(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_avx512(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_avx512(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_vnni(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_vnni(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_neon(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_neon(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_dotprod(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_dotprod(out, codes, here, sums, scales, add, spare)


@serial_kernel
def _rows_i8mm(out, x, weight, codes, q, scales, sums, spare, add, blas):
    here = _rounded(q, scales, x, codes)
    _add_up(sums, here)
    products_i8mm(out, codes, here, sums, scales, add, spare)


KERNELS = {
    "plain": _rows_plain,
    "avx2": _rows_avx2,
    "avxvnni": _rows_avxvnni,
    "avx512": _rows_avx512,
    "vnni": _rows_vnni,
    "neon": _rows_neon,
    "dotprod": _rows_dotprod,
    "i8mm": _rows_i8mm,
}


def ternary_gemm_address(variant: int) -> Any:
    """The address of a variant's kernel (_calls.py); compiles it, or loads it from the cache."""
    x, codes, floats = np.empty((0, 0), np.float32), np.empty((0, COLUMNS, 4), np.uint8), np.empty(0, np.float32)
    scratch = np.empty(0, np.int8), floats, np.empty(0, np.int32), floats
    return address(KERNELS[VARIANTS[variant]], x, x, x, codes, *scratch, 0, 0)


@serial_kernel
def _pack_columns(codes, weight):
    """codes (G, R', 4) of weight (R, K); 1 where padded, which is a weight of zero."""
    rows, columns = weight.shape
    for g in range(codes.shape[0]):
        for r in range(codes.shape[1]):
            for i in range(4):
                k = 4 * g + i
                codes[g, r, i] = np.uint8(weight[r, k] + np.float32(1)) if r < rows and k < columns else np.uint8(1)


def empty_columns(rows: int, columns: int) -> np.ndarray:
    """Uninitialised codes for a weight of this shape."""
    return aligned_zeros((-(-columns // 4), -(-rows // COLUMNS) * COLUMNS, 4), np.uint8)


def fill_columns(codes: np.ndarray, weight: np.ndarray) -> None:
    """Write the codes of ternary weight (R, K) float32, with arbitrary strides; unchecked."""
    _pack_columns(codes, weight)


def pack_columns(weight: np.ndarray) -> np.ndarray:
    """Codes (ceil(K / 4), R', 4) uint8 of ternary weight (R, K) float32, laid out for ternary_gemm.

    Raises ValueError if an element is not -1, 0 or +1.

    >>> pack_columns(np.array([[1, 0, -1]], np.float32))[0, 0].tolist()
    [2, 1, 0, 1]
    """
    _check.array("pack_columns", "weight", weight, (None, None))
    if not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("pack_columns: weight must hold only -1, 0 and +1; use ternarize first")
    codes = empty_columns(*weight.shape)
    fill_columns(codes, weight)
    return codes


def spare_floats(variant: int, rows: int, columns: int) -> int:
    """Number of floats of the scratch `spare` for this many rows and inputs."""
    return max(6 * COLUMNS, rows * columns if variant == PLAIN else 0)


def ternary_gemm(
    x: np.ndarray, weight: np.ndarray, codes: np.ndarray, out: np.ndarray | None = None, *, variant: str | None = None
) -> np.ndarray:
    """Approximate x @ weight.T, (M, R) float32, with x (M, K) quantised to int8 per row; added to out (M, R) if given.

    weight : (R, K) float32, ternary;  codes : pack_columns(weight)
    variant : one of _ternary_dots.available(); default: the best
    It uses one thread. Raises ValueError if a shape or dtype is wrong.

    >>> weight = np.array([[1, 1, -1]], np.float32)
    >>> x = np.array([[127, -127, 32]], np.float32)
    >>> ternary_gemm(x, weight, pack_columns(weight)).tolist()
    [[-32.0]]
    """
    _check.array("ternary_gemm", "weight", weight, (None, None))
    rows, columns = weight.shape
    _check.array("ternary_gemm", "x", x, (None, columns))
    _check.array("ternary_gemm", "codes", codes, (-(-columns // 4), -(-rows // COLUMNS) * COLUMNS, 4), np.uint8)
    index = VARIANTS.index(check_variant(variant) if variant else gemm_variant())
    add = out is not None
    if out is None:
        out = np.zeros((len(x), rows), np.float32)
    _check.array("ternary_gemm", "out", out, (len(x), rows))
    KERNELS[VARIANTS[index]](
        out,
        x,
        weight,
        codes,
        np.empty(len(x) * 4 * len(codes), np.int8),
        np.empty(len(x), np.float32),
        np.empty(len(x), np.int32),
        np.empty(spare_floats(index, *x.shape), np.float32),
        int(add),
        sgemm_address(),
    )
    return out
