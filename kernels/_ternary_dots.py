"""Dot products of packed ternary rows (kernels/ternary.py) with int8 vectors, exact in int32, in several variants.

    out[j, r] = sum over k of code[r, k] * q[j, k],   code = weight + 1 in {0, 1, 2}

The caller subtracts the sum of q[j], which gives the product with the weights. Shifts and masks turn a 64-byte block of
codes into four registers of codes, each for 64 inputs. x86 multiplies unsigned by signed bytes in two ways:

    avx2, avx512   vpmaddubsw adds pairs of products in int16, and vpmaddwd adds pairs of those in int32. Four results
                   of vpmaddubsw are added in int16: at most 4 * 2 * 2 * 128 = 2,048 of 32,767, without overflow.
    vnni           vpdpbusd adds four products to an int32 in one instruction.

To add a processor (Arm's sdot, AMX), write a function with the signature of `plain`, add its name to VARIANTS and to
available, and add a branch to ternary_gemv.ternary_products. For many rows, do the same in ternary_gemm.py.
"""

from __future__ import annotations

import functools
from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels._jit import helper, target_features

BLOCK_BYTES = 64
BLOCK = 4 * BLOCK_BYTES  # weights


@functools.cache  # asking the compiler takes a fifth of a millisecond
def available() -> list[str]:
    """Names of the variants that Numba can compile here, the fastest last."""
    has = set() if numba.config.DISABLE_JIT else target_features()
    found = ["plain"]
    if "+avx2" in has:
        found.append("avx2")
    if {"+avx2", "+avx512bw"} <= has:
        found.append("avx512")
        if "+avx512vnni" in has:
            found.append("vnni")
    return found


def check_variant(name: str) -> str:
    """Return name. Raises ValueError if this processor has no such variant."""
    if name not in available():
        raise ValueError(f"variant must be one of {', '.join(available())} on this machine, got {name!r}")
    return name


# a kernel takes the index of its variant: compiled once, it holds those that the processor has
VARIANTS = ("plain", "avx2", "avx512", "vnni")
PLAIN, AVX2, AVX512, VNNI = range(len(VARIANTS))


if numba.config.DISABLE_JIT:

    def plain(out, packed, q, first, last):
        """out (J, R) int32, columns first..last, from packed (R, 64 * blocks) uint8 and q (J, 256 * blocks) int8."""
        blocks = packed.shape[1] // BLOCK_BYTES
        bits = packed[first:last].reshape(last - first, blocks, 1, BLOCK_BYTES)
        codes = (bits >> np.array([0, 2, 4, 6], np.uint8)[:, None]) & 3
        out[:, first:last] = q.astype(np.int32) @ codes.reshape(last - first, q.shape[1]).astype(np.int32).T

else:

    @helper
    def plain(out, packed, q, first, last):
        """out (J, R) int32, columns first..last, from packed (R, 64 * blocks) uint8 and q (J, 256 * blocks) int8."""
        for r in range(last - first):
            codes = packed[first + r]
            for j in range(q.shape[0]):
                total = np.int32(0)
                for block in range(codes.shape[0] // 64):
                    here = codes[block * 64 : block * 64 + 64]
                    x = q[j, block * 256 : block * 256 + 256]
                    for i in range(64):
                        byte = np.int32(here[i])
                        total += (byte & 3) * np.int32(x[i])
                        total += ((byte >> 2) & 3) * np.int32(x[i + 64])
                        total += ((byte >> 4) & 3) * np.int32(x[i + 128])
                        total += (byte >> 6) * np.int32(x[i + 192])
                out[j, first + r] = total


def _make_dots(variant: str, weight_rows: int, input_rows: int) -> Any:
    """An intrinsic: the products of so many rows of codes with so many of inputs; addresses, strides in bytes."""
    width = 32 if variant == "avx2" else 64
    lanes = width // 4
    int16, int32, int64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    bytes_, shorts, ints = (
        ir.VectorType(kind, width // size) for kind, size in ((ir.IntType(8), 1), (int16, 2), (int32, 4))
    )

    @intrinsic
    def dots(typingctx, packed, packed_stride, q, q_stride, blocks, out, out_stride):
        signature = types.void(*[types.intp] * 7)

        def codegen(context, builder, sig, args):
            packed, packed_stride, q, q_stride, blocks, out, out_stride = args

            def function(kind, name):
                return cgutils.get_or_insert_function(builder.module, kind, name)

            def constant(value):
                return ir.Constant(int64, value)

            def load(address):
                value = builder.load(builder.inttoptr(address, bytes_.as_pointer()))
                value.align = 1
                return value

            if variant == "avx2":
                pairs = function(ir.FunctionType(shorts, [bytes_, bytes_]), "llvm.x86.avx2.pmadd.ub.sw")
                fours = function(ir.FunctionType(ints, [shorts, shorts]), "llvm.x86.avx2.pmadd.wd")
            elif variant == "avx512":
                pairs = function(ir.FunctionType(shorts, [bytes_, bytes_]), "llvm.x86.avx512.pmaddubs.w.512")
                fours = function(ir.FunctionType(ints, [shorts, shorts]), "llvm.x86.avx512.pmaddw.d.512")
            else:
                add_fours = function(ir.FunctionType(ints, [ints, ints, ints]), "llvm.x86.avx512.vpdpbusd.512")
            ones, three = ir.Constant(shorts, [1] * (2 * lanes)), ir.Constant(bytes_, [3] * width)

            def add_products(total, codes, inputs):
                if variant == "vnni":
                    for code, x in zip(codes, inputs, strict=True):
                        total = builder.call(add_fours, [total, builder.bitcast(code, ints), builder.bitcast(x, ints)])
                    return total
                found = None
                for code, x in zip(codes, inputs, strict=True):
                    product = builder.call(pairs, [code, x])
                    found = product if found is None else builder.add(found, product)
                return builder.add(total, builder.call(fours, [found, ones]))

            rows = [builder.add(packed, builder.mul(packed_stride, constant(r))) for r in range(weight_rows)]
            xs = [builder.add(q, builder.mul(q_stride, constant(j))) for j in range(input_rows)]
            entry = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            block = builder.phi(int64)
            block.add_incoming(constant(0), entry)
            totals = [builder.phi(ints) for _ in range(weight_rows * input_rows)]
            for phi in totals:
                phi.add_incoming(ir.Constant(ints, [0] * lanes), entry)
            new = list(totals)
            for half in range(0, BLOCK_BYTES, width):
                codes_at = builder.add(builder.mul(block, constant(BLOCK_BYTES)), constant(half))
                x_at = builder.add(builder.mul(block, constant(BLOCK)), constant(half))
                for r in range(weight_rows):
                    whole = builder.bitcast(load(builder.add(rows[r], codes_at)), shorts)
                    codes = []
                    for part in range(4):
                        shifted = builder.lshr(whole, ir.Constant(shorts, [2 * part] * (2 * lanes))) if part else whole
                        codes.append(builder.and_(builder.bitcast(shifted, bytes_), three))
                    for j in range(input_rows):
                        at = builder.add(xs[j], x_at)
                        inputs = [load(builder.add(at, constant(BLOCK_BYTES * part))) for part in range(4)]
                        place = j * weight_rows + r
                        new[place] = add_products(new[place], codes, inputs)
            following = builder.add(block, constant(1))
            block.add_incoming(following, loop)
            for phi, value in zip(totals, new, strict=True):
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, blocks), loop, done)

            builder.position_at_end(done)
            reduce = function(ir.FunctionType(int32, [ints]), f"llvm.vector.reduce.add.v{lanes}i32")
            for j in range(input_rows):
                for r in range(weight_rows):
                    address = builder.add(builder.add(out, builder.mul(out_stride, constant(j))), constant(4 * r))
                    value = builder.call(reduce, [new[j * weight_rows + r]])
                    builder.store(value, builder.inttoptr(address, int32.as_pointer())).align = 4
            return context.get_dummy_value()

        return signature, codegen

    def call(packed, packed_stride, q, q_stride, blocks, out, out_stride):
        dots(packed, packed_stride, q, q_stride, blocks, out, out_stride)

    # see _make_tile in _microkernels.py
    call.__name__ = call.__qualname__ = f"_ternary_dots_{variant}_{weight_rows}_{input_rows}"
    return helper(call)


def _make_variant(variant: str) -> Any:
    """The function for a processor, by tiles of four rows of codes with one of inputs, and of two with four."""
    if variant == "plain" or variant not in available():
        return plain
    four_one, two_four, one_one = (_make_dots(variant, *shape) for shape in ((4, 1), (2, 4), (1, 1)))

    def products(out, packed, q, first, last):
        blocks, stride, q_stride, out_stride = packed.shape[1] // 64, packed.shape[1], q.shape[1], 4 * out.shape[1]
        p, x, o = packed.ctypes.data, q.ctypes.data, out.ctypes.data
        count = q.shape[0]
        r = first
        while blocks > 0 and r + 4 <= last:
            j = 0
            while j + 4 <= count:
                for pair in range(r, r + 4, 2):
                    two_four(
                        p + pair * stride,
                        stride,
                        x + j * q_stride,
                        q_stride,
                        blocks,
                        o + j * out_stride + 4 * pair,
                        out_stride,
                    )
                j += 4
            while j < count:
                four_one(
                    p + r * stride, stride, x + j * q_stride, q_stride, blocks, o + j * out_stride + 4 * r, out_stride
                )
                j += 1
            r += 4
        while blocks > 0 and r < last:
            for j in range(count):
                one_one(
                    p + r * stride, stride, x + j * q_stride, q_stride, blocks, o + j * out_stride + 4 * r, out_stride
                )
            r += 1
        while r < last:  # no columns at all
            for j in range(count):
                out[j, r] = 0
            r += 1

    products.__name__ = products.__qualname__ = f"_ternary_products_{variant}"
    return helper(products)


# the fallback of a variant that the processor lacks is never called: the callers choose from available()
products_avx2, products_avx512, products_vnni = (_make_variant(name) for name in VARIANTS[1:])
