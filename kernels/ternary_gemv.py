"""Products of a packed ternary matrix with vectors: int8 activations, exact in int32, or float32 activations.

    quantize_rows   q = round(x * 127 / max|x|), a scale per row (BitNet b1.58, Ma et al. 2024, arXiv:2402.17764)
    ternary_gemv    q @ W.T in int32, then times the scale

The weights are read once for up to 64 rows of activations, at 2 bits each. Memory bandwidth limits the product of a
single vector.
Letters: R rows of W, K columns, N rows of activations, W = 64 * ceil(K / 256) packed bytes per row.
"""

from __future__ import annotations

import functools
import os
import warnings

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check, _ternary_dots
from flashlm_numba.kernels._arm_features import IS_ARM
from flashlm_numba.kernels._jit import exact_kernel, helper, kernel, serial_kernel, strict_helper
from flashlm_numba.kernels._math import ROUNDING, SMALLEST, largest_magnitude
from flashlm_numba.kernels._ternary_dots import (
    AVX2,
    AVX512,
    AVXVNNI,
    BLOCK,
    DOTPROD,
    I8MM,
    NEON,
    VARIANTS,
    VNNI,
    plain,
    products_avx2,
    products_avx512,
    products_avxvnni,
    products_dotprod,
    products_neon,
    products_vnni,
)
from flashlm_numba.kernels.ternary import packed_width

PARALLEL = 2**20  # weights times rows from which on threads are worth waking


@strict_helper
def quantize(q, scales, x):
    """q (N, 4 W), scales (N,) of x (N, K); see quantize_rows."""
    for n in range(x.shape[0]):
        largest = largest_magnitude(x[n])
        if not largest <= np.float32(3.4028235e38):  # NaN or infinity
            scales[n] = np.float32(np.nan)
            q[n] = 0
        elif largest < SMALLEST:
            scales[n] = np.float32(0)
            q[n] = 0
        else:
            scales[n] = largest * np.float32(1 / 127)
            factor = np.float32(127) / largest
            for k in range(x.shape[1]):
                q[n, k] = np.int8(np.int32((x[n, k] * factor + ROUNDING) - ROUNDING))
            for k in range(x.shape[1], q.shape[1]):
                q[n, k] = 0


@exact_kernel
def _quantize_rows(q, scales, x):
    quantize(q, scales, x)


@helper
def _subtract_sums(out, q, first, last):
    """The codes are too large by one."""
    for j in range(q.shape[0]):
        total = np.int32(0)
        for k in range(q.shape[1]):
            total += np.int32(q[j, k])
        for r in range(last - first):
            out[j, first + r] -= total


if IS_ARM:

    @helper
    def ternary_products(out, packed, q, first, last, variant):
        """Columns first..last of out (N, R) int32 = q (N, 4 W) @ W.T, by this variant (its index in VARIANTS)."""
        if variant in (DOTPROD, I8MM):
            products_dotprod(out, packed, q, first, last)
        elif variant == NEON:
            products_neon(out, packed, q, first, last)
        else:
            plain(out, packed, q, first, last)
        _subtract_sums(out, q, first, last)

else:

    @helper
    def ternary_products(out, packed, q, first, last, variant):
        """Columns first..last of out (N, R) int32 = q (N, 4 W) @ W.T, by this variant (its index in VARIANTS)."""
        if variant == VNNI:
            products_vnni(out, packed, q, first, last)
        elif variant == AVX512:
            products_avx512(out, packed, q, first, last)
        elif variant == AVXVNNI:
            products_avxvnni(out, packed, q, first, last)
        elif variant == AVX2:
            products_avx2(out, packed, q, first, last)
        else:
            plain(out, packed, q, first, last)
        _subtract_sums(out, q, first, last)


# the products of one thread: one kernel per variant, so that only the one in use is compiled


@serial_kernel
def _serial_plain(out, packed, q):
    plain(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_avx2(out, packed, q):
    products_avx2(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_avxvnni(out, packed, q):
    products_avxvnni(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_avx512(out, packed, q):
    products_avx512(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_vnni(out, packed, q):
    products_vnni(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_neon(out, packed, q):
    products_neon(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


@serial_kernel
def _serial_dotprod(out, packed, q):
    products_dotprod(out, packed, q, 0, packed.shape[0])
    _subtract_sums(out, q, 0, packed.shape[0])


SERIAL = {
    "plain": _serial_plain,
    "avx2": _serial_avx2,
    "avxvnni": _serial_avxvnni,
    "avx512": _serial_avx512,
    "vnni": _serial_vnni,
    "neon": _serial_neon,
    "dotprod": _serial_dotprod,
    "i8mm": _serial_dotprod,
}


@kernel
def _ternary_gemv(out, packed, q, variant, threads):
    """Parallel over rows of W, in whole fours."""
    fours = (packed.shape[0] + 3) // 4
    for thread in prange(threads):
        first, last = 4 * (thread * fours // threads), min(4 * ((thread + 1) * fours // threads), packed.shape[0])
        ternary_products(out, packed, q, first, last, variant)


@serial_kernel
def _ternary_matvec(out, packed, x):
    """out (R,) = W x for packed (R, W) and x (256 * blocks,), zero where padded."""
    for r in range(packed.shape[0]):
        total = np.float32(0)
        for block in range(packed.shape[1] // 64):
            codes = packed[r, block * 64 : block * 64 + 64]
            inputs = x[block * 256 : block * 256 + 256]
            for j in range(64):
                byte = np.int32(codes[j])
                total += np.float32((byte & 3) - 1) * inputs[j]
                total += np.float32(((byte >> 2) & 3) - 1) * inputs[j + 64]
                total += np.float32(((byte >> 4) & 3) - 1) * inputs[j + 128]
                total += np.float32(((byte >> 6) & 3) - 1) * inputs[j + 192]
        out[r] = total


def _multiply(out: np.ndarray, packed: np.ndarray, q: np.ndarray, variant: str) -> None:
    index, threads = VARIANTS.index(variant), numba.get_num_threads()
    if threads == 1 or packed.shape[0] * q.size < PARALLEL:
        SERIAL[variant](out, packed, q)
    else:
        _ternary_gemv(out, packed, q, index, threads)


def _agrees_with_plain(variant: str) -> bool:
    """Whether a variant gives what plain loops give: every code beside extreme inputs, and every size of tile."""
    rng = np.random.default_rng(0)
    codes = rng.integers(0, 3, (7, 4, BLOCK // 2), np.uint8)
    packed: np.ndarray = codes[:, 0] | codes[:, 1] << 2 | codes[:, 2] << 4 | codes[:, 3] << 6
    packed[0], packed[1] = 0xAA, 0x00  # nothing but +1, nothing but -1
    q = rng.integers(-128, 128, (5, 4 * packed.shape[1])).astype(np.int8)
    q[0], q[1] = -128, 127
    found, expected = (np.empty((5, 7), np.int32) for _ in range(2))
    SERIAL[variant](found, packed, q)
    SERIAL["plain"](expected, packed, q)
    return np.array_equal(found, expected)


@functools.cache
def best_variant() -> str:
    """The variant that ternary_gemv uses: FLASHLM_NUMBA_TERNARY if set, else the fastest that is correct here.

    The first call checks each variant against the plain loops, and skips one that disagrees with a warning. Raises
    ValueError if this processor lacks the variant named by FLASHLM_NUMBA_TERNARY.
    """
    have = _ternary_dots.available()
    wanted = os.environ.get("FLASHLM_NUMBA_TERNARY")
    if wanted:
        if wanted not in have:
            raise ValueError(f"FLASHLM_NUMBA_TERNARY must be one of {', '.join(have)} on this machine, got {wanted!r}")
        have = [wanted]
    for name in reversed(have):
        if name == "plain" or _agrees_with_plain(name):
            return name
        warnings.warn(f"the {name} kernel of ternary_gemv computes wrongly on this machine; not used", stacklevel=2)
    return "plain"


def quantize_rows(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Quantise x (N, K) float32 per row to q (N, 256 * ceil(K / 256)) int8 and scale (N,) float32, x about q * scale.

    scale = max|x| / 127. q is rounded, halves to even; the padding is zero. A row without values above 2**-100 becomes
    zeros with scale 0. A row that is not finite gets the scale NaN. Raises ValueError for another shape or dtype.

    >>> q, scale = quantize_rows(np.array([[1, -2, 0.5]], np.float32))
    >>> q[0, :3].tolist(), round(float(scale[0]), 4)
    ([64, -127, 32], 0.0157)
    """
    _check.array("quantize_rows", "x", x, (None, None))
    q = np.empty((len(x), 4 * packed_width(x.shape[1])), np.int8)
    scales = np.empty(len(x), np.float32)
    _quantize_rows(q, scales, x)
    return q, scales


def ternary_gemv_int8(packed: np.ndarray, q: np.ndarray, *, variant: str | None = None) -> np.ndarray:
    """Exact q @ W.T, (N, R) int32, for W packed (R, W) uint8 (pack_ternary) and q (N, 4 W) int8 (quantize_rows).

    variant : one of _ternary_dots.available(); default: best_variant(). Large products use all threads.
    Raises ValueError if a shape or dtype is wrong, or K is so large that int32 could overflow (8.3 million).

    >>> from flashlm_numba.kernels.ternary import pack_ternary
    >>> q, _ = quantize_rows(np.array([[1, -2, 0.5]], np.float32))
    >>> ternary_gemv_int8(pack_ternary(np.array([[1, 1, -1]], np.float32)), q).tolist()
    [[-95]]
    """
    _check.array("ternary_gemv_int8", "packed", packed, (None, None), np.uint8)
    _check.array("ternary_gemv_int8", "q", q, (None, 4 * packed.shape[1]), np.int8)
    if packed.shape[1] % _ternary_dots.BLOCK_BYTES:
        raise ValueError(f"ternary_gemv_int8: packed must have whole blocks of 64 bytes, got {packed.shape[1]} bytes")
    if q.shape[1] > (2**31 - 1) // 256:  # codes of 2 beside inputs of -128
        raise ValueError(f"ternary_gemv_int8: at most {(2**31 - 1) // 256:,} columns, got {q.shape[1]:,}")
    variant = _ternary_dots.check_variant(variant) if variant else best_variant()
    out = np.empty((len(q), len(packed)), np.int32)
    _multiply(out, packed, q, variant)
    return out


def ternary_gemv(packed: np.ndarray, x: np.ndarray, *, variant: str | None = None) -> np.ndarray:
    """Approximate x @ W.T, (N, R) float32, for W packed (R, W) uint8 and x (N, K) float32, quantised to int8 per row.

    Raises ValueError as ternary_gemv_int8 does.
    """
    q, scales = quantize_rows(x)
    return ternary_gemv_int8(packed, q, variant=variant).astype(np.float32) * scales[:, None]


def ternary_matvec(packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """W @ x (R,) float32 for W packed (R, 64 * ceil(K / 256)) uint8 and x (K,) float32, not quantised; one thread.

    Raises ValueError if the widths do not fit.

    >>> from flashlm_numba.kernels.ternary import pack_ternary
    >>> packed = pack_ternary(np.array([[1, 0, -1]], np.float32))
    >>> ternary_matvec(packed, np.array([5, 6, 7], np.float32)).tolist()
    [-2.0]
    """
    _check.array("ternary_matvec", "x", x, (None,))
    _check.array("ternary_matvec", "packed", packed, (None, packed_width(x.shape[0])), np.uint8)
    padded = np.zeros(4 * packed.shape[1], np.float32)
    padded[: x.shape[0]] = x
    out = np.empty(packed.shape[0], np.float32)
    _ternary_matvec(out, packed, padded)
    return out
