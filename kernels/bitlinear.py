"""BitLinear: RMSNorm, inputs rounded to int8 per row, a ternary weight with one scale.

    y = rmsnorm(x, norm);   q_m = round(y_m * 127 / max|y_m|)             rounded, halves to even
    t = round(W / s) in -1, 0, +1, with s = mean|W|
    out_m = s * max|y_m| / 127 * (q_m . t)

The sum of integers is exact, so the result does not depend on the product that computes it. Norm and rounding are one
pass over a row. Gradients are float32, and pass straight through both roundings:

    dW = dout' (q * max|y| / 127),   dy = dout (s t),   then the norm's

Letters: M rows, K inputs, R outputs, G groups of four inputs, L blocks.
Source: Zhu et al. 2024, arXiv:2406.02528, section 3.2; after Ma et al. 2024, arXiv:2402.17764. The epsilon and the
least magnitudes are those of the authors' code.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import exact_kernel, serial_kernel, strict_helper
from flashlm_numba.kernels._math import ROUNDING, largest_magnitude
from flashlm_numba.kernels._packed_gemm import SPARE_FLOATS, empty_panels, fill_panels, packed_gemm
from flashlm_numba.kernels._ternary_dots import PLAIN, VARIANTS, check_variant
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows
from flashlm_numba.kernels.ternary_gemm import (
    COLUMNS,
    gemm_variant,
    pack_columns,
    products_avx2,
    products_avx512,
    products_avxvnni,
    products_dotprod,
    products_i8mm,
    products_neon,
    products_vnni,
)

EPS = np.float32(1e-6)  # of a layer's norm
LEAST = np.float32(1e-5)  # of a row's largest magnitude and of a matrix's mean magnitude
_ONE, _FINITE = np.float32(1), np.float32(3.4028235e38)


# --- weights ---


@exact_kernel
def _absmean_ternary(out, weight):
    """out of weight, both 1-D. Returns the scale."""
    total, largest, alike = 0.0, np.float32(0), True  # float64, in order: the same scale for any thread count
    for i in range(weight.shape[0]):
        largest = max(largest, abs(weight[i]))
    for i in range(weight.shape[0]):
        size = abs(weight[i])
        total += size
        alike &= size == largest or size == np.float32(0)
    scale = max(largest if alike else np.float32(total / max(weight.shape[0], 1)), LEAST)
    half = np.float32(0.5) * scale
    for i in range(weight.shape[0]):
        w = weight[i]
        out[i] = np.float32(1 if w > half else 0) - np.float32(1 if w < -half else 0)
    return scale


def absmean_ternary(weight: np.ndarray, out: np.ndarray | None = None) -> tuple[np.ndarray, np.float32]:
    """Ternary values of weight (any shape) float32, and the scale s: weight is about s times them.

    s = mean|w|, at least 1e-5; the values are w / s rounded, halves to even, and clamped to -1, 0, +1. A matrix that is
    s times ternary values already, as an exported one is, keeps exactly these. Writes to out (float32) if given.
    Raises ValueError if an array is not contiguous float32.
    Source: arXiv:2406.02528, section 3.2. The mean is summed in float64 in order and rounded to float32.

    >>> values, scale = absmean_ternary(np.array([[1, -4, 0.5, 2.5]], np.float32))
    >>> values.tolist(), float(scale)
    ([[0.0, -1.0, 0.0, 1.0]], 2.0)
    """
    out = np.empty_like(weight) if out is None else out
    _check.array("absmean_ternary", "weight", weight, weight.shape)
    _check.array("absmean_ternary", "out", out, weight.shape)
    return out, np.float32(_absmean_ternary(out.reshape(-1), weight.reshape(-1)))


# --- norm and rounding ---


@strict_helper
def _round_row(out, y, scale):
    """out (any,) int8 = y (K,) in 127 steps of its largest magnitude, then zeros. Returns the step times scale.

    The step is NaN if y is not finite.
    """
    largest = largest_magnitude(y)
    if not largest <= _FINITE:
        for k in range(out.shape[0]):
            out[k] = 0
        return np.float32(np.nan)
    largest = max(largest, LEAST)
    factor = np.float32(127) / largest
    for k in range(y.shape[0]):
        out[k] = np.int8(np.int32((y[k] * factor + ROUNDING) - ROUNDING))
    for k in range(y.shape[0], out.shape[0]):
        out[k] = 0
    return largest / np.float32(127) * scale


@serial_kernel
def _bit_inputs(q, scales, sums, rstd, row, x, weight, scale):
    """q (M, any) int8, zero beyond K, its sums (M,) int32, scales (M,) = scale times the steps, and rstd (M,).

    x (M, K); weight (K,) of the norm; row (K,): scratch
    """
    dim = x.shape[1]
    for m in range(x.shape[0]):
        total = np.float32(0)
        for k in range(dim):
            total += x[m, k] * x[m, k]
        r = _ONE / np.float32(math.sqrt(total / np.float32(max(dim, 1)) + EPS))
        for k in range(dim):
            row[k] = x[m, k] * r * weight[k]
        rstd[m], scales[m] = r, _round_row(q[m], row, scale)
        count = np.int32(0)
        for k in range(q.shape[1]):
            count += np.int32(q[m, k])
        sums[m] = count


def bit_inputs_address() -> Any:
    """The address of _bit_inputs (_calls.py); compiles it, or loads it from the cache.

    Training and decoding call the same code, so that they round to the same bits.
    """
    row, x = np.empty(0, np.float32), np.empty((0, 0), np.float32)
    q, sums = np.empty((0, 0), np.int8), np.empty(0, np.int32)
    return address(_bit_inputs, q, row, sums, row, row, x, row, _ONE)


# --- products: out (M, R) = scales * (q @ t.T), or added to out (add = 1), one kernel per variant ---
# q (M, 4 G) int8; t as codes (G, R', 4), or plain (R, K) float32; scales, sums of _bit_inputs; spare: scratch, at least
# spare_floats


@strict_helper
def _scaled(out, products, scales, add):
    """Without a fused multiply-add, as the other variants and decoding."""
    for m in range(out.shape[0]):
        for r in range(out.shape[1]):
            value = products[m, r] * scales[m]
            out[m, r] = out[m, r] + value if add else value


@serial_kernel
def _product_plain(out, q, plain, codes, scales, sums, spare, add, blas):
    """By BLAS; sums of integers below 2**24 are exact in float32."""
    rows, outputs, columns = out.shape[0], plain.shape[0], plain.shape[1]
    x = spare[: rows * columns].reshape(rows, columns)
    for m in range(rows):
        for k in range(columns):
            x[m, k] = np.float32(q[m, k])
    products = spare[rows * columns : rows * columns + rows * outputs].reshape(rows, outputs)
    gemm_nt(blas, products, x, plain, np.float32(0))
    _scaled(out, products, scales, add)


@serial_kernel
def _product_avx2(out, q, plain, codes, scales, sums, spare, add, blas):
    products_avx2(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_avxvnni(out, q, plain, codes, scales, sums, spare, add, blas):
    products_avxvnni(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_avx512(out, q, plain, codes, scales, sums, spare, add, blas):
    products_avx512(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_vnni(out, q, plain, codes, scales, sums, spare, add, blas):
    products_vnni(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_neon(out, q, plain, codes, scales, sums, spare, add, blas):
    products_neon(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_dotprod(out, q, plain, codes, scales, sums, spare, add, blas):
    products_dotprod(out, codes, q, sums, scales, add, spare)


@serial_kernel
def _product_i8mm(out, q, plain, codes, scales, sums, spare, add, blas):
    products_i8mm(out, codes, q, sums, scales, add, spare)


PRODUCTS = {
    "plain": _product_plain,
    "avx2": _product_avx2,
    "avxvnni": _product_avxvnni,
    "avx512": _product_avx512,
    "vnni": _product_vnni,
    "neon": _product_neon,
    "dotprod": _product_dotprod,
    "i8mm": _product_i8mm,
}
EXACT_COLUMNS = 2**24 // 128  # inputs of a layer, beyond which a sum might not be exact in float32


def bit_product_address(variant: int) -> Any:
    """The address of a variant's product (_calls.py); compiles it, or loads it from the cache."""
    row, x, codes = np.empty(0, np.float32), np.empty((0, 0), np.float32), np.empty((0, COLUMNS, 4), np.uint8)
    q, sums = np.empty((0, 0), np.int8), np.empty(0, np.int32)
    return address(PRODUCTS[VARIANTS[variant]], x, q, x, codes, row, sums, row, 0, 0)


def spare_floats(variant: int, rows: int, outputs: int, columns: int) -> int:
    """Number of floats of the scratch `spare` for this many rows, outputs and inputs."""
    return max(6 * COLUMNS, SPARE_FLOATS, rows * (outputs + columns) if variant == PLAIN else 0)


# --- public ---


@serial_kernel
def _bitlinear_backward(dx, dnorm, dweight, dnormed, rounded, dout, x, norm, rstd, panels, spare, blas):
    if dout.shape[1] > 0:  # else dnormed is zero already
        packed_gemm(dnormed, dout, panels, spare, 0)
    gemm_tn(blas, dweight, dout, rounded, np.float32(1))
    rmsnorm_backward_rows(dx, dnorm, dnormed, x, norm, rstd, False)


def _check_inputs(where: str, x: np.ndarray, norm: np.ndarray, weight: np.ndarray) -> None:
    _check.array(where, "weight", weight, (None, None))
    _check.array(where, "x", x, (None, weight.shape[1]))
    _check.array(where, "norm", norm, (weight.shape[1],))
    if weight.shape[1] > EXACT_COLUMNS:
        raise ValueError(f"{where}: weight can have at most {EXACT_COLUMNS:,} columns, got {weight.shape[1]:,}")


def _inputs(x: np.ndarray, norm: np.ndarray, scale: np.float32) -> tuple[np.ndarray, ...]:
    """q, scales, sums and rstd of _bit_inputs."""
    rows, columns = x.shape
    q, sums = np.empty((rows, -(-columns // 4) * 4), np.int8), np.empty(rows, np.int32)
    scales, rstd, row = np.empty(rows, np.float32), np.empty(rows, np.float32), np.empty(columns, np.float32)
    _bit_inputs(q, scales, sums, rstd, row, x, norm, scale)
    return q, scales, sums, rstd


def bitlinear_forward(
    x: np.ndarray, norm: np.ndarray, weight: np.ndarray, *, variant: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The layer's output (M, R) for x (M, K), norm (K,) and weight (R, K), and rstd (M,) of the norm; all float32.

    variant : one of _ternary_dots.available(); default: the best. All give the same bits.
    It uses one thread. Raises ValueError if a shape or dtype is wrong. Source: arXiv:2406.02528, section 3.2.

    >>> x, weight = np.array([[3, -3]], np.float32), np.array([[2, -2], [1, 1]], np.float32)
    >>> bitlinear_forward(x, np.ones(2, np.float32), weight)[0].round(3).tolist()
    [[3.0, 0.0]]
    """
    _check_inputs("bitlinear_forward", x, norm, weight)
    index = VARIANTS.index(check_variant(variant) if variant else gemm_variant())
    values, scale = absmean_ternary(weight)
    codes = pack_columns(values)
    q, scales, sums, rstd = _inputs(x, norm, scale)
    out = np.empty((len(x), len(weight)), np.float32)
    spare = np.empty(spare_floats(index, len(x), *weight.shape), np.float32)
    PRODUCTS[VARIANTS[index]](out, q, values, codes, scales, sums, spare, 0, sgemm_address())
    return out, rstd


def bitlinear_backward(
    dout: np.ndarray, x: np.ndarray, norm: np.ndarray, weight: np.ndarray, rstd: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """dx (M, K), dnorm (K,) and dweight (R, K) for dout (M, R); rstd and the rest as in bitlinear_forward.

    It uses one thread. Raises ValueError if a shape or dtype is wrong.
    """
    _check_inputs("bitlinear_backward", x, norm, weight)
    _check.array("bitlinear_backward", "dout", dout, (len(x), len(weight)))
    _check.array("bitlinear_backward", "rstd", rstd, (len(x),))
    values, scale = absmean_ternary(weight)
    panels = empty_panels(*values.T.shape)
    fill_panels(panels, (values * scale).T)
    q, steps, _, _ = _inputs(x, norm, np.float32(1))
    rounded = q[:, : x.shape[1]] * steps[:, None]
    dx, dnormed = np.zeros_like(x), np.zeros_like(x)
    dnorm, dweight, spare = np.zeros_like(norm), np.zeros_like(weight), np.empty(SPARE_FLOATS, np.float32)
    blas = sgemm_address()
    _bitlinear_backward(dx, dnorm, dweight, dnormed, rounded, dout, x, norm, rstd, panels, spare, blas)
    return dx, dnorm, dweight
