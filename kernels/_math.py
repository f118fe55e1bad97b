"""exp as a polynomial. Numba has no vector library, so np.exp in a loop makes one scalar call per element."""

from __future__ import annotations

import math
import platform

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels._jit import exact_helper, helper, serial_kernel

_LOG2_E = np.float32(1.4426950408889634)
# ln 2 in two parts (Cody & Waite 1980, ch. 6): n * _LN2_HIGH is exact for |n| < 2**9
_LN2_HIGH = np.float32(0.693359375)
_LN2_LOW = np.float32(-2.12194440e-4)
# exp saturates here, so that 2**n stays a normal number; below the low end the result is zero
_LOW, _HIGH = np.float32(-87.0), np.float32(88.0)
# For |x| < 2**22 the low bits of x + ROUNDING are x rounded to an integer, halves to even. This takes two additions
# instead of a rounding and two conversions. Numba's floor goes through 64-bit integers, with which exp took 1.5 times
# as long.
ROUNDING = np.float32(1.5 * 2**23)
SMALLEST = np.float32(2.0**-100)  # a row with no larger number is quantised to zeros, so that 127 / max is finite
# exp(r) on |r| <= ln(2)/2 as 1 + r + r**2 * p(r); Taylor coefficients, remainder 5e-9 relative to float32's 6e-8
_P = tuple(np.float32(1 / math.factorial(i)) for i in range(2, 8))


@intrinsic
def _bits_from_float(typingctx, x):
    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.IntType(32))

    return types.int32(types.float32), codegen


@intrinsic
def _float_from_bits(typingctx, bits):
    def codegen(context, builder, sig, args):
        return builder.bitcast(args[0], ir.FloatType())

    return types.float32(types.int32), codegen


def _flip(builder, bits):
    """bits ^ ((bits >> 31) & 0x7fffffff), which maps floats to integers in the same order, and back."""
    sign = builder.ashr(bits, ir.Constant(ir.IntType(32), 31))
    return builder.xor(bits, builder.and_(sign, ir.Constant(ir.IntType(32), 0x7FFFFFFF)))


@intrinsic
def _rank_from_float(typingctx, x):
    def codegen(context, builder, sig, args):
        return _flip(builder, builder.bitcast(args[0], ir.IntType(32)))

    return types.int32(types.float32), codegen


@intrinsic
def _float_from_rank(typingctx, rank):
    def codegen(context, builder, sig, args):
        return builder.bitcast(_flip(builder, args[0]), ir.FloatType())

    return types.float32(types.int32), codegen


# the x86 flags FTZ and DAZ: results and inputs below 1.2e-38 count as zero
_FLUSH = 0x8040


@intrinsic
def _set_control(typingctx, clear, add):
    """Clear and set bits of this thread's floating-point control word. Returns the previous word."""

    def codegen(context, builder, sig, args):
        int32 = ir.IntType(32)
        place = cgutils.alloca_once(builder, int32)
        pointer = builder.bitcast(place, ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer()])
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.stmxcsr"), [pointer])
        before = builder.load(place)
        builder.store(builder.or_(builder.and_(before, builder.not_(args[0])), args[1]), place)
        builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.sse.ldmxcsr"), [pointer])
        return before

    return types.int32(types.int32, types.int32), codegen


FLUSHES = not numba.config.DISABLE_JIT and platform.machine() in ("x86_64", "AMD64")

if not FLUSHES:

    @helper
    def flush_denormals():
        """Do nothing, on a processor without this control word."""
        return np.int32(0)

    @helper
    def restore_denormals(before):
        """Do nothing."""

else:

    @helper
    def flush_denormals():
        """Treat numbers below 1.2e-38 as zero in this thread. Returns the argument for restore_denormals.

        Processors compute slowly with such numbers, and values that decay by a factor per step reach them.
        """
        return _set_control(np.int32(0), np.int32(_FLUSH))

    @helper
    def restore_denormals(before):
        """Restore the state before flush_denormals, since other code in this thread may need denormals."""
        _set_control(np.int32(_FLUSH), np.int32(before & _FLUSH))


if numba.config.DISABLE_JIT:

    def largest_magnitude(row):
        """Largest |element| of row (n,) float32; NaN if there is one, 0 if n is (the plain twin)."""
        return np.max(np.abs(row), initial=np.float32(0))

    def row_max(row):
        """Largest element of row (n,) float32 (the plain twin)."""
        return np.float32(np.max(row))

    def exp32(x):
        """e**x, float32 (the plain twin)."""
        if x < _LOW:
            return np.float32(0)
        return np.float32(np.exp(np.float64(min(x, _HIGH))))  # NumPy's float32 exp errs by more than 2 ulp

else:

    @helper
    def largest_magnitude(row):
        """Largest |element| of row (n,) float32; NaN if one is NaN, 0 if n is 0. Compares integers; see row_max."""
        best = np.int32(0)
        for i in range(row.shape[0]):
            best = max(best, _bits_from_float(row[i]) & np.int32(0x7FFFFFFF))
        return _float_from_bits(best)

    @helper
    def row_max(row):
        """Largest element of row (n,) float32, n >= 1; NaN if one is NaN (except NaN with the sign bit set).

        It compares integers. The compiler does not vectorise a maximum of floats, because of NaN, and that maximum took
        longer than the exponentials.
        """
        best = np.int32(-(2**31))
        for i in range(row.shape[0]):
            best = max(best, _rank_from_float(row[i]))
        return _float_from_rank(best)

    @exact_helper
    def exp32(x):
        """e**x for float32 x, with an error of at most 2 ulp; 0 below -87 and for -inf, exp(88) above 88, NaN for NaN.

        It vectorises in a plain loop. Source: Cody & Waite 1980, Software Manual for the Elementary Functions, ch. 6.
        """
        y = min(max(x, _LOW), _HIGH)
        shifted = y * _LOG2_E + ROUNDING
        n = shifted - ROUNDING
        r = (y - n * _LN2_HIGH) - n * _LN2_LOW
        p = _P[5]
        p = p * r + _P[4]
        p = p * r + _P[3]
        p = p * r + _P[2]
        p = p * r + _P[1]
        p = p * r + _P[0]
        value = (p * r * r + r) + np.float32(1)
        # 2**n: the low bits of shifted are n, and the shift removes the others
        scale = _float_from_bits((_bits_from_float(shifted) << np.int32(23)) + np.int32(0x3F800000))
        value = value * scale
        value = np.float32(0) if x < _LOW else value
        return value if x == x else x


@serial_kernel
def exp(out, x):
    """Write e**x to out, both (N,) float32. This is the vector form of exp32, for tests and benchmarks."""
    for i in range(x.shape[0]):
        out[i] = exp32(x[i])


@serial_kernel
def largest(out, row):
    """Write the largest element of row (n,) float32, n >= 1, to out (1,). This is row_max as a kernel, for tests."""
    out[0] = row_max(row)
