"""Dot products of packed ternary rows (kernels/ternary.py) with int8 vectors, exact in int32, in several variants.

    out[j, r] = sum over k of code[r, k] * q[j, k],   code = weight + 1 in {0, 1, 2}

The caller subtracts the sum of q[j], which gives the product with the weights. Shifts and masks turn a 64-byte block of
codes into four registers of codes, each for 64 inputs. x86 multiplies unsigned by signed bytes in two ways:

    avx2, avx512   vpmaddubsw adds pairs of products in int16, and vpmaddwd adds pairs of those in int32. The results of
                   vpmaddubsw are added in int16 for PAIRED_BLOCKS: at most 16 * 4 * 2 * 2 * 127 = 32,512 of 32,767.
    avxvnni, vnni  vpdpbusd adds four products to an int32 in one instruction: on laptops without AVX-512, and with it.

Arm's variants, neon, dotprod and i8mm, are in _neon.py. To add a processor (AMX), write a function with the signature
of `plain`, add its name to VARIANTS and to available, and add a branch to ternary_gemv.ternary_products. For many rows,
do the same in ternary_gemm.py.
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

from flashlm_numba.kernels import _neon
from flashlm_numba.kernels._arm_features import IS_ARM
from flashlm_numba.kernels._jit import helper, numba_features, target_features
from flashlm_numba.kernels._llvm import allow_features, build_chunked_loop, build_loop

BLOCK_BYTES = 64
BLOCK = 4 * BLOCK_BYTES  # weights
ROWS_AHEAD = 8  # whose codes are asked for while a tile of one row of inputs is multiplied
PAIRED_BLOCKS = 4  # blocks whose products, the larger at most 4 * 2 * 2 * 127 in a pair, an int16 can add up


@functools.cache  # asking the compiler takes a fifth of a millisecond
def available() -> list[str]:
    """Names of the variants that Numba can compile here, the fastest last."""
    has = set() if numba.config.DISABLE_JIT else target_features()
    found = ["plain"]
    if "+avx2" in has:
        found.append("avx2")
        # AVX512-VNNI has the same 256-bit instruction, in another encoding
        if "+avxvnni" in has or {"+avx512vnni", "+avx512vl"} <= has:
            found.append("avxvnni")
    if {"+avx2", "+avx512bw"} <= has:
        found.append("avx512")
        if "+avx512vnni" in has:
            found.append("vnni")
    if IS_ARM and "+neon" in has:
        found.append("neon")
        if "+dotprod" in has:
            found.append("dotprod")
            if "+i8mm" in has:
                found.append("i8mm")
    return found


def check_variant(name: str) -> str:
    """Return name. Raises ValueError if this processor has no such variant."""
    if name not in available():
        raise ValueError(f"variant must be one of {', '.join(available())} on this machine, got {name!r}")
    return name


# a kernel takes the index of its variant: compiled once, it holds those that the processor has
VARIANTS = ("plain", "avx2", "avxvnni", "avx512", "vnni", "neon", "dotprod", "i8mm")
PLAIN, AVX2, AVXVNNI, AVX512, VNNI, NEON, DOTPROD, I8MM = range(len(VARIANTS))
# variants that add products of two whole bytes in int32, and the bits of their registers
FOURFOLD = {"avxvnni": 256, "vnni": 512, "dotprod": 128, "i8mm": 128}
BYTE_VARIANTS = tuple(VARIANTS.index(name) for name in FOURFOLD)


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
    width = 32 if variant in ("avx2", "avxvnni") else 64
    lanes = width // 4
    pieces = 2 if variant == "avx2" else 1  # of a block, one a turn: over whole blocks, LLVM has too few registers
    on_arm = variant in _neon.FEATURES
    int16, int32, int64 = ir.IntType(16), ir.IntType(32), ir.IntType(64)
    bytes_, shorts, ints = (
        ir.VectorType(kind, width // size) for kind, size in ((ir.IntType(8), 1), (int16, 2), (int32, 4))
    )
    count = weight_rows * input_rows

    @intrinsic
    def dots(typingctx, packed, packed_stride, q, q_stride, blocks, out, out_stride):
        signature = types.void(*[types.intp] * 7)

        def codegen(context, builder, sig, args):
            if on_arm:
                allow_features(builder, numba_features(), _neon.FEATURES[variant])
                _neon.build_dots(builder, variant, weight_rows, input_rows, args)
                return context.get_dummy_value()
            packed, packed_stride, q, q_stride, blocks, out, out_stride = args

            def function(kind, name):
                return cgutils.get_or_insert_function(builder.module, kind, name)

            def constant(value):
                return ir.Constant(int64, value)

            def splat(value):
                return ir.Constant(shorts, [value] * (2 * lanes))

            def load(address):
                value = builder.load(builder.inttoptr(address, bytes_.as_pointer()))
                value.align = 1
                return value

            rows = [builder.add(packed, builder.mul(packed_stride, constant(r))) for r in range(weight_rows)]
            xs = [builder.add(q, builder.mul(q_stride, constant(j))) for j in range(input_rows)]

            # rows are short, and the processor's own prefetching stops at the end of a page
            ahead = [builder.add(row, builder.mul(packed_stride, constant(ROWS_AHEAD))) for row in rows]

            def prefetch(address):
                kind = ir.FunctionType(ir.VoidType(), [ir.IntType(8).as_pointer(), int32, int32, int32])
                flags = [ir.Constant(int32, flag) for flag in (0, 3, 1)]  # to read, keep in every cache, data
                builder.call(
                    function(kind, "llvm.prefetch.p0i8"),
                    [builder.inttoptr(address, ir.IntType(8).as_pointer()), *flags],
                )

            def over_blocks(first, last, initial, unpack, add_products):
                """A loop over blocks, or over their pieces: sums = add_products(sums, codes, inputs) for each row of
                codes with each of inputs, `initial` holding the sums of one after those of another.
                """
                each = len(initial) // count

                def turn(piece, sums):
                    new = list(sums)
                    place_of_codes = builder.mul(piece, constant(BLOCK_BYTES // pieces))
                    block, within = piece, constant(0)
                    if pieces == 2:
                        block = builder.lshr(piece, constant(1))
                        within = builder.mul(builder.and_(piece, constant(1)), constant(BLOCK_BYTES // 2))
                    place_of_x = builder.add(builder.mul(block, constant(BLOCK)), within)
                    if input_rows == 1:
                        for row in ahead:
                            prefetch(builder.add(row, place_of_codes))
                    for half in range(0, BLOCK_BYTES // pieces, width):
                        codes_at = builder.add(place_of_codes, constant(half))
                        x_at = builder.add(place_of_x, constant(half))
                        unpacked: dict[int, Any] = {}
                        for j in range(input_rows):  # whose registers serve all rows of codes
                            at = builder.add(xs[j], x_at)
                            inputs = [load(builder.add(at, constant(BLOCK_BYTES * part))) for part in range(4)]
                            for r in range(weight_rows):
                                if r not in unpacked:
                                    unpacked[r] = unpack(builder.bitcast(load(builder.add(rows[r], codes_at)), shorts))
                                place = each * (j * weight_rows + r)
                                added = add_products(new[place : place + each], unpacked[r], inputs)
                                new[place : place + each] = added
                    return new

                return build_loop(builder, first, last, initial, turn)

            if variant in FOURFOLD:
                name = f"llvm.x86.avx512.vpdpbusd.{FOURFOLD[variant]}"
                add_fours = function(ir.FunctionType(ints, [ints, ints, ints]), name)

                def unpack(whole):
                    parts = [whole, *(builder.lshr(whole, splat(shift)) for shift in (2, 4, 6))]
                    return [builder.and_(part, splat(0x0303)) for part in parts]

                def add_products(sums, codes, inputs):
                    (total,) = sums
                    for code, x in zip(codes, inputs, strict=True):
                        total = builder.call(add_fours, [total, builder.bitcast(code, ints), builder.bitcast(x, ints)])
                    return [total]

                zero = ir.Constant(ints, [0] * lanes)
                totals = over_blocks(constant(0), blocks, [zero] * count, unpack, add_products)
            else:
                totals = pair_sums(builder, over_blocks, function, blocks)

            for first in range(0, count, 4):
                sums = added_up(builder, totals[first : first + 4])
                for lane in range(min(4, count - first)):
                    j, r = divmod(first + lane, weight_rows)
                    address = builder.add(builder.add(out, builder.mul(out_stride, constant(j))), constant(4 * r))
                    value = builder.extract_element(sums, ir.Constant(int32, lane))
                    builder.store(value, builder.inttoptr(address, int32.as_pointer())).align = 4
            return context.get_dummy_value()

        return signature, codegen

    def added_up(builder, vectors):
        """The sums of the lanes of up to four registers, in one register of four: three additions for four sums, and
        one for each halving of the width, where separate reductions take as long as the products of 256 weights.
        """
        vectors = vectors + [ir.Constant(ints, [0] * lanes)] * (4 - len(vectors))

        def pick(a, b, chosen):
            lane_of = [4 * q + i % 4 + lanes * (i // 4) for q in range(lanes // 4) for i in chosen]
            return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(int32, lanes), lane_of))

        def fold(a, b):  # in every four lanes, halves of a's sum, then of b's
            return builder.add(pick(a, b, (0, 1, 4, 5)), pick(a, b, (2, 3, 6, 7)))

        ab, cd = fold(*vectors[:2]), fold(*vectors[2:])
        found, width = builder.add(pick(ab, cd, (0, 2, 4, 6)), pick(ab, cd, (1, 3, 5, 7))), lanes
        while width > 4:
            width //= 2
            low, high = (
                builder.shuffle_vector(
                    found, found, ir.Constant(ir.VectorType(int32, width), list(range(at, at + width)))
                )
                for at in (0, width)
            )
            found = builder.add(low, high)
        return found

    def pair_sums(builder, over_blocks, function, blocks):
        """The sums, by vpmaddubsw in int16 for PAIRED_BLOCKS, then by vpmaddwd in int32.

        One shift instead of three: two of the four codes of a byte stay two bits up, so their products are fourfold.
        Four times the sums fit into the lanes, but not into their total.
        """
        names = {
            32: ("llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
            64: ("llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
        }[width]
        pairs = function(ir.FunctionType(shorts, [bytes_, bytes_]), names[0])
        fours = function(ir.FunctionType(ints, [shorts, shorts]), names[1])

        def splat(value):
            return ir.Constant(shorts, [value] * (2 * lanes))

        def unpack(whole):
            high = builder.lshr(whole, splat(4))
            masked = [builder.and_(part, splat(mask)) for part in (whole, high) for mask in (0x0303, 0x0C0C)]
            return [builder.bitcast(code, bytes_) for code in masked]

        def add_products(sums, codes, inputs):
            once, fourfold = sums
            for part in (0, 2):
                once = builder.add(once, builder.call(pairs, [codes[part], inputs[part]]))
                fourfold = builder.add(fourfold, builder.call(pairs, [codes[part + 1], inputs[part + 1]]))
            return [once, fourfold]

        def chunk(first, last, totals):
            found = over_blocks(first, last, [splat(0)] * (2 * count), unpack, add_products)
            new = []
            for place, total in enumerate(totals):
                once, fourfold = found[2 * place : 2 * place + 2]
                both = builder.add(builder.call(fours, [once, splat(4)]), builder.call(fours, [fourfold, splat(1)]))
                new.append(builder.add(total, both))
            return new

        zero, two = (ir.Constant(ints, [value] * lanes) for value in (0, 2))
        turns = builder.mul(blocks, ir.Constant(blocks.type, pieces))
        fourfold = build_chunked_loop(builder, turns, PAIRED_BLOCKS * pieces, [zero] * count, chunk)
        return [builder.ashr(total, two) for total in fourfold]

    def call(packed, packed_stride, q, q_stride, blocks, out, out_stride):
        dots(packed, packed_stride, q, q_stride, blocks, out, out_stride)

    # see _make_tile in _microkernels.py
    call.__name__ = call.__qualname__ = f"_ternary_dots_{variant}_{weight_rows}_{input_rows}"
    return helper(call)


def _make_variant(variant: str) -> Any:
    """The function for a processor, by tiles of four rows of codes with one of inputs, and of one to four with four."""
    if variant == "plain" or variant not in available():
        return plain
    # as many sums as the registers hold: half as many registers, or two sums in each pair, or room for four
    low = {"avx2": 1, "neon": 1, "vnni": 4}.get(variant, 2)
    high_one, low_wide, one_one = (_make_dots(variant, *shape) for shape in ((4, 1), (low, 4), (1, 1)))

    def products(out, packed, q, first, last):
        blocks, stride, q_stride, out_stride = packed.shape[1] // 64, packed.shape[1], q.shape[1], 4 * out.shape[1]
        p, x, o = packed.ctypes.data, q.ctypes.data, out.ctypes.data
        count = q.shape[0]
        r = first
        while blocks > 0 and r + 4 <= last:
            j = 0
            while j + 4 <= count:
                for row in range(r, r + 4, low):
                    low_wide(
                        p + row * stride,
                        stride,
                        x + j * q_stride,
                        q_stride,
                        blocks,
                        o + j * out_stride + 4 * row,
                        out_stride,
                    )
                j += 4
            while j < count:
                high_one(
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
products_avx2, products_avxvnni, products_avx512, products_vnni = (_make_variant(name) for name in VARIANTS[1:5])
products_neon, products_dotprod = (_make_variant(name) for name in ("neon", "dotprod"))  # i8mm's too, see _neon.py
