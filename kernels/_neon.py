"""The int8 products of _ternary_dots.py and ternary_gemm.py for Arm processors with 64 bits, as LLVM code.

A register holds 16 bytes, four times as few as with AVX-512, but there are 32 of them. Bytes are signed on both sides.

    neon      smlal, products of bytes added in int16, of which 128 fit; then sadalp adds pairs of the sums in int32.
              On every such processor, such as a Raspberry Pi 4 (Cortex-A72).
    dotprod   sdot, four products added to an int32 in one instruction: Raspberry Pi 5 (Cortex-A76), Apple M1.
    i8mm      smmla, two rows of eight bytes times two others, added to four int32: Apple M2, Neoverse V1.
              For many rows only. The packed product of one vector would compute everything twice. With four vectors,
              bringing two rows of each side into one register takes most of what smmla saves, so that product uses
              sdot.

The functions build code for llvmlite alone, so that a test compiles them for Arm on any machine
(tests/kernels/test_machine_code.py). Addresses are integers, strides are in bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir

from flashlm_numba.kernels._llvm import build_chunked_loop, build_loop, build_while, declare

FEATURES = {"neon": "+neon", "dotprod": "+dotprod", "i8mm": "+dotprod,+i8mm"}  # what the code of a variant needs
BLOCK_BYTES = 64  # as in _ternary_dots.py
ROWS_AHEAD = 8
SHORT_BLOCKS = 8  # blocks, and
SHORT_GROUPS = 128  # groups of four inputs, whose products, each at most 2 * 128, an int16 can add up

_int8, _int16, _int32, _int64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
BYTES, HALF_BYTES, SHORTS = ir.VectorType(_int8, 16), ir.VectorType(_int8, 8), ir.VectorType(_int16, 8)
INTS, LONGS, FLOATS = ir.VectorType(_int32, 4), ir.VectorType(_int64, 2), ir.VectorType(ir.FloatType(), 4)


def _constant(value: int) -> Any:
    return ir.Constant(_int64, value)


def _splat(kind: Any, value: int) -> Any:
    return ir.Constant(kind, [value] * kind.count)


def _shuffle(builder: Any, a: Any, b: Any, chosen: list[int]) -> Any:
    return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(_int32, len(chosen)), chosen))


def _load(builder: Any, address: Any, kind: Any) -> Any:
    value = builder.load(builder.inttoptr(address, kind.as_pointer()))
    value.align = 1
    return value


def _rows(builder: Any, first: Any, stride: Any, count: int) -> list[Any]:
    return [builder.add(first, builder.mul(stride, _constant(row))) for row in range(count)]


def _sdot(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total (4,) int32 + the products of a and b (16,) int8, four to a lane."""
    return builder.call(declare(builder, "llvm.aarch64.neon.sdot.v4i32.v16i8", INTS, INTS, BYTES, BYTES), [total, a, b])


def _smmla(builder: Any, total: Any, a: Any, b: Any) -> Any:
    """total (2, 2) int32 + a @ b.T for a and b (2, 8) int8."""
    name = "llvm.aarch64.neon.smmla.v4i32.v16i8"
    return builder.call(declare(builder, name, INTS, INTS, BYTES, BYTES), [total, a, b])


def _smlal(builder: Any, sums: list[Any], a: Any, b: Any) -> list[Any]:
    """The sums, two of (8,) int16, + the products of the lower and of the upper half of a and b (16,) int8."""
    smull = declare(builder, "llvm.aarch64.neon.smull.v8i16", SHORTS, HALF_BYTES, HALF_BYTES)
    halves = [list(range(8)), list(range(8, 16))]
    return [
        builder.add(total, builder.call(smull, [_shuffle(builder, a, a, half), _shuffle(builder, b, b, half)]))
        for total, half in zip(sums, halves, strict=True)
    ]


def _saddlp(builder: Any, sums: Any) -> Any:
    """Sums (4,) int32 of pairs of (8,) int16; with an addition, LLVM makes sadalp of it."""
    return builder.call(declare(builder, "llvm.aarch64.neon.saddlp.v4i32.v8i16", INTS, SHORTS), [sums])


def _addp(builder: Any, a: Any, b: Any) -> Any:
    """Sums (4,) int32 of the pairs of a, then of those of b."""
    return builder.call(declare(builder, "llvm.aarch64.neon.addp.v4i32", INTS, INTS, INTS), [a, b])


def build_dots(builder: Any, variant: str, weight_rows: int, input_rows: int, args: list[Any]) -> None:
    """Products of so many rows of codes with so many of inputs.

    args : packed, its stride, q, its stride, blocks (at least one), out, its stride; all int64
    """
    packed, packed_stride, q, q_stride, blocks, out, out_stride = args
    rows, xs = _rows(builder, packed, packed_stride, weight_rows), _rows(builder, q, q_stride, input_rows)
    ahead = [builder.add(row, builder.mul(packed_stride, _constant(ROWS_AHEAD))) for row in rows]
    count = weight_rows * input_rows
    pointer = _int8.as_pointer()

    def prefetch(address: Any) -> None:
        function = declare(builder, "llvm.prefetch.p0i8", ir.VoidType(), pointer, _int32, _int32, _int32)
        flags = [ir.Constant(_int32, flag) for flag in (0, 3, 1)]  # to read, keep in every cache, data
        builder.call(function, [builder.inttoptr(address, pointer), *flags])

    def over_blocks(first: Any, last: Any, initial: list[Any], unpack: Callable, add_products: Callable) -> list[Any]:
        """A loop over blocks: sums = add_products(sums, codes, inputs) for each row of codes with each of inputs,
        `initial` holding the sums of one after those of another.
        """
        each = len(initial) // count

        def turn(block: Any, sums: list[Any]) -> list[Any]:
            new = list(sums)
            if input_rows == 1:
                for row in ahead:
                    prefetch(builder.add(row, builder.mul(block, _constant(BLOCK_BYTES))))
            for part in range(0, BLOCK_BYTES, 16):
                codes_at = builder.add(builder.mul(block, _constant(BLOCK_BYTES)), _constant(part))
                x_at = builder.add(builder.mul(block, _constant(4 * BLOCK_BYTES)), _constant(part))
                codes = [unpack(_load(builder, builder.add(row, codes_at), BYTES)) for row in rows]
                for j in range(input_rows):
                    at = builder.add(xs[j], x_at)
                    inputs = [
                        _load(builder, builder.add(at, _constant(BLOCK_BYTES * quarter)), BYTES) for quarter in range(4)
                    ]
                    for r in range(weight_rows):
                        place = each * (j * weight_rows + r)
                        new[place : place + each] = add_products(new[place : place + each], codes[r], inputs)
            return new

        return build_loop(builder, first, last, initial, turn)

    if variant == "neon":
        totals = _short_sums(builder, over_blocks, blocks, count)
    elif input_rows == 1:
        totals = _weighted_sums(builder, over_blocks, blocks, count)
    else:  # the codes are unpacked once for all inputs, and three times as many sums would not fit into the registers
        totals = _plain_sums(builder, over_blocks, blocks, count)
    totals += [_splat(INTS, 0)] * (-count % 4)
    for first in range(0, count, 4):
        a, b, c, d = totals[first : first + 4]
        found = _addp(builder, _addp(builder, a, b), _addp(builder, c, d))
        for lane in range(min(4, count - first)):
            j, r = divmod(first + lane, weight_rows)
            address = builder.add(builder.add(out, builder.mul(out_stride, _constant(j))), _constant(4 * r))
            value = builder.extract_element(found, ir.Constant(_int32, lane))
            builder.store(value, builder.inttoptr(address, _int32.as_pointer())).align = 4


def _unpack(builder: Any, whole: Any) -> list[Any]:
    """The four codes of each byte, in four registers."""
    parts = [whole, *(builder.lshr(whole, _splat(BYTES, shift)) for shift in (2, 4))]
    masked = [builder.and_(part, _splat(BYTES, 3)) for part in parts]
    return [*masked, builder.lshr(whole, _splat(BYTES, 6))]


def _short_sums(builder: Any, over_blocks: Callable, blocks: Any, count: int) -> list[Any]:
    """Sums (4,) int32 by smlal, in int16 for SHORT_BLOCKS."""

    def unpack(whole: Any) -> list[Any]:
        return _unpack(builder, whole)

    def add_products(sums: list[Any], codes: list[Any], inputs: list[Any]) -> list[Any]:
        for code, x in zip(codes, inputs, strict=True):
            sums = _smlal(builder, sums, code, x)
        return sums

    def chunk(first: Any, last: Any, totals: list[Any]) -> list[Any]:
        short = over_blocks(first, last, [_splat(SHORTS, 0)] * (2 * count), unpack, add_products)
        return [
            builder.add(builder.add(total, _saddlp(builder, short[2 * i])), _saddlp(builder, short[2 * i + 1]))
            for i, total in enumerate(totals)
        ]

    return build_chunked_loop(builder, blocks, SHORT_BLOCKS, [_splat(INTS, 0)] * count, chunk)


def _plain_sums(builder: Any, over_blocks: Callable, blocks: Any, count: int) -> list[Any]:
    """Sums (4,) int32 by sdot."""

    def unpack(whole: Any) -> list[Any]:
        return _unpack(builder, whole)

    def add_products(sums: list[Any], codes: list[Any], inputs: list[Any]) -> list[Any]:
        (total,) = sums
        for code, x in zip(codes, inputs, strict=True):
            total = _sdot(builder, total, code, x)
        return [total]

    return over_blocks(_constant(0), blocks, [_splat(INTS, 0)] * count, unpack, add_products)


def _weighted_sums(builder: Any, over_blocks: Callable, blocks: Any, count: int) -> list[Any]:
    """As _plain_sums, with fewer instructions and more registers.

    One shift instead of three: two of the four codes of a byte stay where they are, two and four bits up, and their
    sums are four and sixteen times as large. (Six bits up, 2 would become -128.)
    """

    def unpack(whole: Any) -> list[Any]:
        masked = [builder.and_(whole, _splat(BYTES, 3 << shift)) for shift in (0, 2, 4)]
        return [*masked, builder.lshr(whole, _splat(BYTES, 6))]

    def add_products(sums: list[Any], codes: list[Any], inputs: list[Any]) -> list[Any]:
        once, fourfold, sixteenfold = sums
        once = _sdot(builder, once, codes[0], inputs[0])
        fourfold = _sdot(builder, fourfold, codes[1], inputs[1])
        sixteenfold = _sdot(builder, sixteenfold, codes[2], inputs[2])
        return [_sdot(builder, once, codes[3], inputs[3]), fourfold, sixteenfold]

    sums = over_blocks(_constant(0), blocks, [_splat(INTS, 0)] * (3 * count), unpack, add_products)
    totals = []
    for i in range(count):
        once, *larger = sums[3 * i : 3 * i + 3]
        for shift, total in zip((2, 4), larger, strict=True):
            once = builder.add(once, builder.ashr(total, _splat(INTS, shift)))
        totals.append(once)
    return totals


def _repeat(builder: Any, value: Any, kind: Any) -> Any:
    nothing = ir.Constant(kind, ir.Undefined)
    first = builder.insert_element(nothing, value, ir.Constant(_int32, 0))
    return _shuffle(builder, first, nothing, [0] * kind.count)


def build_tile_sums(builder: Any, variant: str, rows: int, registers: int, args: list[Any]) -> list[Any]:
    """Sums of `rows` rows of activations with 4 * registers outputs, from minus the rows' `sums`.

    args : codes, their stride, q, its stride, groups (at least one), sums; all int64
    Returns rows * registers values (4,) int32, row by row.
    """
    codes, codes_stride, q, q_stride, groups, sums = args
    q_rows = _rows(builder, q, q_stride, rows)
    start = [builder.neg(_load(builder, builder.add(sums, _constant(4 * j)), _int32)) for j in range(rows)]

    def load_codes(group: Any, kind: Any) -> list[Any]:
        at = builder.add(codes, builder.mul(group, codes_stride))
        return [_load(builder, builder.add(at, _constant(16 * r)), kind) for r in range(registers)]

    if variant == "i8mm" and rows % 2 == 0:
        return _square_sums(builder, load_codes, registers, q_rows, start, groups)

    def turn(group: Any, totals: list[Any], add_products: Callable) -> list[Any]:
        here, new = load_codes(group, BYTES), []
        each = len(totals) // (rows * registers)
        for j in range(rows):
            at = builder.add(q_rows[j], builder.mul(group, _constant(4)))
            x = builder.bitcast(_repeat(builder, _load(builder, at, _int32), INTS), BYTES)
            for r in range(registers):
                place = each * (j * registers + r)
                new += add_products(totals[place : place + each], here[r], x)
        return new

    totals = [_repeat(builder, value, INTS) for value in start for _ in range(registers)]
    if variant != "neon":

        def add_fours(sums: list[Any], code: Any, x: Any) -> list[Any]:
            return [_sdot(builder, sums[0], code, x)]

        return build_loop(builder, _constant(0), groups, totals, lambda group, sums: turn(group, sums, add_fours))

    def chunk(first: Any, last: Any, wide: list[Any]) -> list[Any]:
        zeros = [_splat(SHORTS, 0)] * (2 * len(wide))
        short = build_loop(
            builder, first, last, zeros, lambda group, sums: turn(group, sums, lambda *both: _smlal(builder, *both))
        )
        pairs = [_saddlp(builder, value) for value in short]
        return [builder.add(total, _addp(builder, *pairs[2 * i : 2 * i + 2])) for i, total in enumerate(wide)]

    return build_chunked_loop(builder, groups, SHORT_GROUPS, totals, chunk)


def _square_sums(
    builder: Any, load_codes: Callable, registers: int, q_rows: list[Any], start: list[Any], groups: Any
) -> list[Any]:
    """As build_tile_sums, by smmla: two rows of activations times two outputs, eight inputs at a time."""
    pairs = range(0, len(q_rows), 2)
    firsts = [
        _shuffle(builder, _repeat(builder, start[j], INTS), _repeat(builder, start[j + 1], INTS), [0, 1, 4, 5])
        for j in pairs
    ]

    def add_products(totals: list[Any], low: list[Any], high: list[Any], inputs: list[Any]) -> list[Any]:
        """low, high : the codes of four inputs and of the next four;  inputs : eight inputs, int64, of each row"""
        new = list(totals)
        xs = []
        for j in pairs:
            first = builder.insert_element(ir.Constant(LONGS, ir.Undefined), inputs[j], ir.Constant(_int32, 0))
            both = builder.insert_element(first, inputs[j + 1], ir.Constant(_int32, 1))
            xs.append(builder.bitcast(both, BYTES))
        for r, (a, b) in enumerate(zip(low, high, strict=True)):
            for half, chosen in enumerate(([0, 4, 1, 5], [2, 6, 3, 7])):
                code = builder.bitcast(_shuffle(builder, a, b, chosen), BYTES)
                for i, x in enumerate(xs):
                    place = (i * len(low) + r) * 2 + half
                    new[place] = _smmla(builder, new[place], x, code)
        return new

    def turn(pair: Any, totals: list[Any]) -> list[Any]:
        group = builder.mul(pair, _constant(2))
        at = builder.mul(pair, _constant(8))
        inputs = [_load(builder, builder.add(row, at), _int64) for row in q_rows]
        return add_products(totals, load_codes(group, INTS), load_codes(builder.add(group, _constant(1)), INTS), inputs)

    def last_turn(_: Any, totals: list[Any]) -> list[Any]:
        group = builder.sub(groups, _constant(1))
        at = builder.mul(group, _constant(4))
        inputs = [builder.zext(_load(builder, builder.add(row, at), _int32), _int64) for row in q_rows]
        low = load_codes(group, INTS)
        return add_products(totals, low, [_splat(INTS, 0)] * len(low), inputs)

    totals = [value for value in firsts for _ in range(2 * registers)]
    totals = build_while(builder, builder.lshr(groups, _constant(1)), totals, turn)
    totals = build_while(builder, builder.and_(groups, _constant(1)), totals, last_turn)
    found: list[Any] = []
    for i in range(len(pairs)):
        both = [totals[2 * (i * registers + r) : 2 * (i * registers + r) + 2] for r in range(registers)]
        for chosen in ([0, 1, 4, 5], [2, 3, 6, 7]):
            found += [_shuffle(builder, low, high, chosen) for low, high in both]
    return found
