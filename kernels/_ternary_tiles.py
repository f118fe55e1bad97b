"""Register tiles of ternary_gemm.py: sums of a few rows of activations with a block of outputs, for each processor.

vnni, avxvnni  vpdpbusd: four products of unsigned and signed bytes, added to an int32
avx512, avx2   vpmaddubsw, pairs in int16, each at most 2 * 2 * 127 = 508. 64 of them add up to 32,512 of 32,767, so
               vpmaddwd adds pairs of the sums in int32 only after 64 groups of four inputs.
neon, dotprod, i8mm  see _neon.py
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from flashlm_numba.kernels import _neon
from flashlm_numba.kernels._jit import helper, numba_features
from flashlm_numba.kernels._llvm import allow_features, build_chunked_loop, build_loop, declare
from flashlm_numba.kernels._ternary_dots import FOURFOLD

# lanes, registers of outputs, rows of activations of a tile: as many sums as the registers hold
TILES = {
    "avx2": (8, 2, 5),
    "avxvnni": (8, 2, 6),
    "avx512": (16, 4, 5),
    "vnni": (16, 4, 6),
    "neon": (4, 2, 6),
    "dotprod": (4, 4, 6),
    "i8mm": (4, 2, 8),
}
PAIRED_GROUPS = 64  # groups whose products, each at most 2 * 2 * 127 in a pair, an int16 can add up


_int32, _int64 = ir.IntType(32), ir.IntType(64)


def _constant(value):
    return ir.Constant(_int64, value)


def _load(builder, address, kind):
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _repeat(builder, value, kind):
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_int32, 0))
    return builder.shuffle_vector(first, nothing, ir.Constant(ir.VectorType(_int32, kind.count), [0] * kind.count))


def _x86_sums(builder: Any, variant: str, rows: int, args: list[Any]) -> list[Any]:
    """Sums of `rows` rows of activations with a block's outputs, from minus the rows' `sums`; as _neon.build_tile_sums.

    args : codes, their stride, q, its stride, groups (at least one), sums; all int64
    """
    codes, codes_stride, q, q_stride, groups, sums = args
    lanes, registers, _ = TILES[variant]
    ints, shorts, bytes_ = (ir.VectorType(ir.IntType(32 // n), n * lanes) for n in (1, 2, 4))
    if variant in FOURFOLD:
        add_fours = declare(builder, f"llvm.x86.avx512.vpdpbusd.{FOURFOLD[variant]}", ints, ints, ints, ints)
    elif variant == "avx512":
        pairs = declare(builder, "llvm.x86.avx512.pmaddubs.w.512", shorts, bytes_, bytes_)
        fours = declare(builder, "llvm.x86.avx512.pmaddw.d.512", ints, shorts, shorts)
    else:
        pairs = declare(builder, "llvm.x86.avx2.pmadd.ub.sw", shorts, bytes_, bytes_)
        fours = declare(builder, "llvm.x86.avx2.pmadd.wd", ints, shorts, shorts)
    q_rows = [builder.add(q, builder.mul(q_stride, _constant(j))) for j in range(rows)]
    sums_of_rows = [_load(builder, builder.add(sums, _constant(4 * j)), _int32) for j in range(rows)]
    start = [_repeat(builder, builder.neg(value), ints) for value in sums_of_rows]

    def over_groups(first, last, initial, add_products):
        """A loop over groups, for every register of sums: sum = add_products(sum, code, x)."""

        def turn(group, sums):
            at = builder.add(codes, builder.mul(group, codes_stride))
            here = [_load(builder, builder.add(at, _constant(4 * lanes * r)), ints) for r in range(registers)]
            new = []
            for j in range(rows):
                place = builder.add(q_rows[j], builder.mul(group, _constant(4)))
                x = _repeat(builder, _load(builder, place, _int32), ints)
                new += [add_products(sums[j * registers + r], here[r], x) for r in range(registers)]
            return new

        return build_loop(builder, first, last, initial, turn)

    totals = [value for value in start for _ in range(registers)]
    if variant in FOURFOLD:
        return over_groups(_constant(0), groups, totals, lambda *operands: builder.call(add_fours, operands))
    ones, zero = (ir.Constant(shorts, [value] * (2 * lanes)) for value in (1, 0))

    def add_pairs(total, code, x):
        return builder.add(total, builder.call(pairs, [builder.bitcast(code, bytes_), builder.bitcast(x, bytes_)]))

    def chunk(first, last, wide):
        narrow = over_groups(first, last, [zero] * len(totals), add_pairs)
        return [builder.add(w, builder.call(fours, [n, ones])) for w, n in zip(wide, narrow, strict=True)]

    return build_chunked_loop(builder, groups, PAIRED_GROUPS, totals, chunk)


def _build_tile(builder: Any, variant: str, rows: int, args: list[Any]) -> None:
    """The sums of a tile, scaled, then written or added."""
    *operands, scales, out, out_stride, add = args
    lanes, registers, _ = TILES[variant]
    floats = ir.VectorType(ir.FloatType(), lanes)
    if variant in _neon.FEATURES:
        new = _neon.build_tile_sums(builder, variant, rows, registers, operands)
    else:
        new = _x86_sums(builder, variant, rows, operands)
    written, added, end = (builder.append_basic_block(name) for name in ("write", "add", "end"))
    scaled, places = [], []
    for j in range(rows):
        scale = _repeat(builder, _load(builder, builder.add(scales, _constant(4 * j)), ir.FloatType()), floats)
        for r in range(registers):
            scaled.append(builder.fmul(builder.sitofp(new[j * registers + r], floats), scale))
            place = builder.add(builder.add(out, builder.mul(out_stride, _constant(j))), _constant(4 * lanes * r))
            places.append(builder.inttoptr(place, floats.as_pointer()))
    builder.cbranch(builder.icmp_signed("!=", add, _constant(0)), added, written)
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


def make_tile(variant: str, rows: int) -> Any:
    """An intrinsic: sums of so many rows with a block's outputs, scaled, written or added; strides in bytes."""

    @intrinsic
    def tile(typingctx, codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add):
        def codegen(context, builder, sig, args):
            if variant in _neon.FEATURES:
                allow_features(builder, numba_features(), _neon.FEATURES[variant])
            _build_tile(builder, variant, rows, args)
            return context.get_dummy_value()

        return types.void(*[types.intp] * 10), codegen

    def call(codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add):
        tile(codes, codes_stride, q, q_stride, groups, sums, scales, out, out_stride, add)

    call.__name__ = call.__qualname__ = f"_ternary_tile_{variant}_{rows}"  # see _make_tile in _microkernels.py
    return helper(call)
