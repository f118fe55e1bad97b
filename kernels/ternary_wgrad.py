"""Gradients of weights with both operands quantised to int8: out (R, K) += a (M, R).T @ b (M, K).

In float32 this product would take most of the time of training with int8 activations. Both operands are quantised:

    b_m = s_m p_m                          row by row, p_m int8, as in the forward product
    s_m a_mr = t_r q_mr                    column by column over the M rows, q int8
    out_rk += t_r * sum over m of q_mr p_mk

so that the sum over m is a sum of integers, exact in int32. The bytes p are stored with four rows of b interleaved,
(M / 4, K', 4), and q as (R, M). This is the layout of ternary_gemm.py, whose tiles multiply them. On x86 p is stored
unsigned as p + 128, on Arm as it is (BYTE_OFFSET). On processors without vpdpbusd, sdot or smmla the tiles add products
in int16, where these overflow, so BLAS computes the exact product instead. It also does so if a number is not finite,
which makes the problem visible to the caller.
Letters: M rows, R and K columns, K' = K rounded up to blocks of 64.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_tn, sgemm_address
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import helper, serial_kernel, strict_helper
from flashlm_numba.kernels._math import ROUNDING, SMALLEST, _bits_from_float, _float_from_bits, largest_magnitude
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import BYTE_VARIANTS, VARIANTS, available, check_variant
from flashlm_numba.kernels.ternary_gemm import BYTE_OFFSET, COLUMNS, products_of_bytes

_FINITE = np.float32(3.4028235e38)
MOST_ROWS = 2**31 // (127 * 255)  # whose products, each of at most that, an int32 can add up
_MAGNITUDE = np.int32(0x7FFFFFFF)
_OFFSET = np.int32(BYTE_OFFSET)
_OFFSETS = np.uint32(BYTE_OFFSET * 0x01010101).astype(np.int32)  # of the four bytes of a word


@strict_helper
def _byte(x, factor):
    """round(x * factor) as int32."""
    return np.int32((x * factor + ROUNDING) - ROUNDING)


@strict_helper
def _inverse(scale):
    return np.float32(1) / scale if scale > 0 else np.float32(0)


@strict_helper
def _round_rows(codes, shares, b):
    """codes (G, K) of b (M, K), bytes p + BYTE_OFFSET, four a word, and shares (4 G,), its s; whether b is finite."""
    rows, columns = b.shape
    for m in range(4 * codes.shape[0]):
        largest = largest_magnitude(b[m]) if m < rows else np.float32(0)
        if not largest <= _FINITE:
            return False
        shares[m] = largest * np.float32(1 / 127) if largest >= SMALLEST else np.float32(0)
    for g in range(codes.shape[0]):
        first, last = 4 * g, rows - 1
        b0, b1 = b[first], b[min(first + 1, last)]
        b2, b3 = b[min(first + 2, last)], b[min(first + 3, last)]
        f0, f1 = _inverse(shares[first]), _inverse(shares[first + 1])
        f2, f3 = _inverse(shares[first + 2]), _inverse(shares[first + 3])
        for k in range(columns):
            low = (_byte(b0[k], f0) & np.int32(255)) | ((_byte(b1[k], f1) & np.int32(255)) << np.int32(8))
            high = ((_byte(b2[k], f2) & np.int32(255)) << np.int32(16)) | (_byte(b3[k], f3) << np.int32(24))
            codes[g, k] = np.int32((low | high) ^ _OFFSETS)
    return True


@strict_helper
def _round_columns(q, scales, sums, a, first_column, shares):
    """q (R, G), four rows' bytes in a word, of R columns of a (M, any) times shares; scales (R,) t; sums (R,) of q,
    times BYTE_OFFSET.
    """
    rows, columns = a.shape[0], q.shape[0]
    end = first_column + columns
    for r in range(columns):
        sums[r] = 0
    for m in range(rows):
        a_m = a[m, first_column:end]
        for r in range(columns):
            sums[r] = max(sums[r], _bits_from_float(a_m[r] * shares[m]) & _MAGNITUDE)
    for r in range(columns):
        largest = _float_from_bits(sums[r])
        if not largest <= _FINITE:
            return False
        scales[r] = largest * np.float32(1 / 127) if largest >= SMALLEST else np.float32(0)
        sums[r] = 0
    for g in range(q.shape[1]):
        first, last = 4 * g, rows - 1
        a0, a1 = a[first, first_column:end], a[min(first + 1, last), first_column:end]
        a2, a3 = a[min(first + 2, last), first_column:end], a[min(first + 3, last), first_column:end]
        s0, s1, s2, s3 = shares[first], shares[first + 1], shares[first + 2], shares[first + 3]
        for r in range(columns):
            f = _inverse(scales[r])
            q0, q1, q2, q3 = _byte(a0[r] * s0, f), _byte(a1[r] * s1, f), _byte(a2[r] * s2, f), _byte(a3[r] * s3, f)
            sums[r] += _OFFSET * (q0 + q1 + q2 + q3)
            low = (q0 & np.int32(255)) | ((q1 & np.int32(255)) << np.int32(8))
            q[r, g] = np.int32(low | ((q2 & np.int32(255)) << np.int32(16)) | (q3 << np.int32(24)))
    return True


if numba.config.DISABLE_JIT:

    def ternary_wgrad_rows(out, a, b, first, codes, shares, q, scales, sums, spare, variant, blas):
        """As below, exact."""
        gemm_tn(blas, out, a[:, first : first + len(out)], b, np.float32(1))

else:

    @helper
    def ternary_wgrad_rows(out, a, b, first, codes, shares, q, scales, sums, spare, variant, blas):
        """out (R, K) += a[:, first : first + R].T @ b for a (M, any), b (M, K), rounded where the variant (its index in
        VARIANTS) is one of BYTE_VARIANTS.

        More than MOST_ROWS rows are exact too.
        Scratch: codes int32 (M / 4 * K' or more,), shares (M + 3,), q int8 (R * (M + 3),), scales and sums (R,).
        """
        rows, columns, outputs = a.shape[0], b.shape[1], out.shape[0]
        if variant in BYTE_VARIANTS and 0 < rows <= MOST_ROWS:
            groups = (rows + 3) // 4
            width = (columns + COLUMNS - 1) // COLUMNS * COLUMNS
            words = codes[: groups * width].reshape(groups, width)
            here = q[: 4 * groups * outputs]
            if _round_rows(words, shares, b) and _round_columns(
                here.view(np.int32).reshape(outputs, groups), scales, sums, a, first, shares
            ):
                products_of_bytes(out, words, here.reshape(outputs, 4 * groups), sums, scales, spare, variant)
                return
        gemm_tn(blas, out, a[:, first : first + outputs], b, np.float32(1))


def codes_words(rows: int, columns: int) -> int:
    """Words of the scratch `codes`."""
    return -(-rows // 4) * (-(-columns // COLUMNS) * COLUMNS)


@serial_kernel
def _ternary_wgrad(out, a, b, first, codes, shares, q, scales, sums, spare, variant, blas):
    ternary_wgrad_rows(out, a, b, first, codes, shares, q, scales, sums, spare, variant, blas)


def ternary_wgrad_address() -> Any:
    """The address of ternary_wgrad_rows (_calls.py); compiles it, or loads it from the cache."""
    x, floats, ints = np.empty((0, 0), np.float32), np.empty(0, np.float32), np.empty(0, np.int32)
    return address(_ternary_wgrad, x, x, x, 0, ints, floats, np.empty(0, np.int8), floats, ints, floats, 0, 0)


def ternary_wgrad(a: np.ndarray, b: np.ndarray, *, variant: str | None = None) -> np.ndarray:
    """Approximate a.T @ b, (R, K) float32, for a (M, R) and b (M, K) float32, both quantised to int8 if that is fast.

    variant : one of _ternary_dots.available(); default: the best
    It uses one thread. Raises ValueError if a shape or dtype is wrong.

    >>> ternary_wgrad(np.array([[1], [-1]], np.float32), np.array([[3, 0], [0, 3]], np.float32)).round(3).tolist()
    [[3.0, -3.0]]
    """
    _check.array("ternary_wgrad", "a", a, (None, None))
    _check.array("ternary_wgrad", "b", b, (a.shape[0], None))
    index = VARIANTS.index(check_variant(variant) if variant else available()[-1])
    rows, outputs, columns = a.shape[0], a.shape[1], b.shape[1]
    out = np.zeros((outputs, columns), np.float32)
    _ternary_wgrad(
        out,
        a,
        b,
        0,
        aligned_zeros((codes_words(rows, columns),), np.int32),
        np.zeros(rows + 3, np.float32),
        aligned_zeros((outputs * (rows + 3),), np.int8),
        np.zeros(outputs, np.float32),
        np.zeros(outputs, np.int32),
        np.zeros(6 * COLUMNS, np.float32),
        index,
        sgemm_address(),
    )
    return out
