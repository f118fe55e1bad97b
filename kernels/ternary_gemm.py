"""Products of many rows of activations, quantised to int8, with a ternary matrix, for training.

    out (M, R) (+)= scale_m * (q_m . w_r),   q_m = round(x_m * 127 / max|x_m|), w_r ternary

One instruction computes four integer products where float32 needs four instructions. The weights are stored as codes 0,
1, 2 by columns, (K / 4, R', 4) uint8, so that a register holds the codes of four inputs for 16 outputs (8 with AVX2).
Its product with four inputs, repeated, adds to 16 sums. A tile of sums stays in registers without horizontal additions.
The sums start at minus the sum of the row's q, because the codes are too large by one.

    vnni, avxvnni  vpdpbusd: four products of unsigned and signed bytes, added to an int32
    avx512, avx2   vpmaddubsw, pairs in int16, each at most 2 * 2 * 127 = 508. 64 of them add up to 32,512 of 32,767, so
                   vpmaddwd adds pairs of the sums in int32 only after 64 groups of four inputs.
    others         BLAS on the quantised inputs in float32, which differs only by float32 rounding

Letters: M rows of activations, K inputs, R outputs, R' = R rounded up to blocks of 64.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nt, sgemm_address
from flashlm_numba.kernels._calls import address
from flashlm_numba.kernels._jit import helper, serial_kernel, view
from flashlm_numba.kernels._rows import aligned_zeros
from flashlm_numba.kernels._ternary_dots import (
    FOURFOLD,
    PLAIN,
    VARIANTS,
    available,
    build_chunked_loop,
    build_loop,
    check_variant,
)
from flashlm_numba.kernels.ternary_gemv import best_variant, quantize

COLUMNS = 64  # outputs of a block
# lanes, registers of outputs, rows of activations of a tile: as many sums as the registers hold
TILES = {"avx2": (8, 2, 5), "avxvnni": (8, 2, 6), "avx512": (16, 4, 5), "vnni": (16, 4, 6)}
PAIRED_GROUPS = 64  # groups whose products, each at most 2 * 2 * 127 in a pair, an int16 can add up


def _make_tile(variant: str, rows: int) -> Any:
    """An intrinsic: sums of so many rows with a block's outputs, scaled, written or added; strides in bytes."""
    lanes, registers, _ = TILES[variant]
    int32, int64 = ir.IntType(32), ir.IntType(64)
    ints, floats = ir.VectorType(int32, lanes), ir.VectorType(ir.FloatType(), lanes)
    shorts, bytes_ = ir.VectorType(ir.IntType(16), 2 * lanes), ir.VectorType(ir.IntType(8), 4 * lanes)

    @intrinsic
    def tile(typingctx, codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add):
        signature = types.void(*[types.intp] * 10)

        def codegen(context, builder, sig, args):
            codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add = args

            def constant(value):
                return ir.Constant(int64, value)

            def function(name, result, *arguments):
                return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)

            def load(address, kind):
                value = builder.load(builder.inttoptr(address, kind.as_pointer()))
                value.align = 1
                return value

            def repeat(value, kind):
                nothing = ir.Constant(kind, ir.Undefined)
                first = builder.insert_element(nothing, value, ir.Constant(int32, 0))
                return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(int32, lanes), [0] * lanes))

            if variant in FOURFOLD:
                add_fours = function(f"llvm.x86.avx512.vpdpbusd.{FOURFOLD[variant]}", ints, ints, ints, ints)
            elif variant == "avx512":
                pairs = function("llvm.x86.avx512.pmaddubs.w.512", shorts, bytes_, bytes_)
                fours = function("llvm.x86.avx512.pmaddw.d.512", ints, shorts, shorts)
            else:
                pairs = function("llvm.x86.avx2.pmadd.ub.sw", shorts, bytes_, bytes_)
                fours = function("llvm.x86.avx2.pmadd.wd", ints, shorts, shorts)
            q_rows = [builder.add(q, builder.mul(q_stride, constant(j))) for j in range(rows)]
            start = [repeat(builder.neg(load(builder.add(sums, constant(4 * j)), int32)), ints) for j in range(rows)]

            def over_groups(first, last, initial, add_products):
                """A loop over groups, for every register of sums: sum = add_products(sum, code, x)."""

                def turn(group, sums):
                    at = builder.add(codes, builder.mul(group, codes_stride))
                    here = [load(builder.add(at, constant(4 * lanes * r)), ints) for r in range(registers)]
                    new = []
                    for j in range(rows):
                        x = repeat(load(builder.add(q_rows[j], builder.mul(group, constant(4))), int32), ints)
                        new += [add_products(sums[j * registers + r], here[r], x) for r in range(registers)]
                    return new

                return build_loop(builder, first, last, initial, turn)

            totals = [value for value in start for _ in range(registers)]
            if variant in FOURFOLD:
                new = over_groups(constant(0), groups, totals, lambda *operands: builder.call(add_fours, operands))
            else:
                ones, zero = (ir.Constant(shorts, [value] * (2 * lanes)) for value in (1, 0))

                def add_pairs(total, code, x):
                    found = builder.call(pairs, [builder.bitcast(code, bytes_), builder.bitcast(x, bytes_)])
                    return builder.add(total, found)

                def chunk(first, last, wide):
                    narrow = over_groups(first, last, [zero] * len(totals), add_pairs)
                    return [builder.add(w, builder.call(fours, [n, ones])) for w, n in zip(wide, narrow, strict=True)]

                new = build_chunked_loop(builder, groups, PAIRED_GROUPS, totals, chunk)

            written, added, end = (builder.append_basic_block(name) for name in ("write", "add", "end"))
            scaled, places = [], []
            for j in range(rows):
                scale = repeat(load(builder.add(scales, constant(4 * j)), ir.FloatType()), floats)
                for r in range(registers):
                    scaled.append(builder.fmul(builder.sitofp(new[j * registers + r], floats), scale))
                    place = builder.add(builder.add(out, builder.mul(out_stride, constant(j))), constant(4 * lanes * r))
                    places.append(builder.inttoptr(place, floats.as_pointer()))
            builder.cbranch(builder.icmp_signed("!=", add, constant(0)), added, written)
            for block in (written, added):
                builder.position_at_end(block)
                for value, place in zip(scaled, places, strict=True):
                    if block is added:
                        before = builder.load(place)
                        before.align = 4
                        value = builder.fadd(before, value)
                    builder.store(value, place).align = 4
                builder.branch(end)
            builder.position_at_end(end)
            return context.get_dummy_value()

        return signature, codegen

    def call(codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add):
        tile(codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add)

    call.__name__ = call.__qualname__ = f"_ternary_tile_{variant}_{rows}"  # see _make_tile in _microkernels.py
    return helper(call)


@helper
def _products_plain(out, codes, q, sums, scales, add, spare):
    """Never called: where there is no such instruction, ternary_gemm multiplies by BLAS."""


def _make_products(variant: str) -> Any:
    """out (M, R) (+)= the scaled products of q (M, 4 G) int8 and codes (G, R', 4); spare (rows, 64): scratch."""
    if variant not in available():
        return _products_plain
    lanes, registers, most = TILES[variant]
    block = lanes * registers
    many, one = _make_tile(variant, most), _make_tile(variant, 1)

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
else:
    products_avx2, products_avxvnni, products_avx512, products_vnni = (_make_products(name) for name in VARIANTS[1:])


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


KERNELS = {
    "plain": _rows_plain,
    "avx2": _rows_avx2,
    "avxvnni": _rows_avxvnni,
    "avx512": _rows_avx512,
    "vnni": _rows_vnni,
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
