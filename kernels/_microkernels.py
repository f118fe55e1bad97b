"""Small matrix products with the result in registers, for shapes for which BLAS spends its time packing.

    out[m, w] (+)= sum over t < T, k < K of  a[t, m, k] * b[t, k, w]

The strides of a are arbitrary, so that the taps of a convolution are one product; w is contiguous. The width of a tile,
in complete vector registers, is fixed when the tile is made. Rows are processed in blocks. Tiles of 6 x 16 floats use
the sixteen registers of AVX2 without spilling; wider tiles were slower. AVX-512 has twice as many registers of twice
the width, so its tiles are higher. With too few sums per tile, each multiplication waits for the previous one.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels._jit import helper, target_features


class TileOut(NamedTuple):
    """The output of a tile product: element (m, w) is m * row_stride + w floats after start."""

    start: Any  # by address_of, as below
    row_stride: int


class TileLeft(NamedTuple):
    """The operand with arbitrary strides: a[t, m, k] is t * tap_stride + m * row_stride + k * depth_stride floats
    after start.
    """

    start: Any
    row_stride: int
    depth_stride: int
    tap_stride: int


class TileRight(NamedTuple):
    """The operand with contiguous rows: b[t, k, w] is t * tap_stride + k * depth_stride + w floats after start."""

    start: Any
    depth_stride: int
    tap_stride: int


def _make_tile(rows: int, width: int, batched: bool = False) -> Any:
    """An intrinsic for `rows` rows of a TileOut, TileLeft and TileRight; counts in elements.

    batched: every row has its own right operand, b_row floats after that of the row before; otherwise b_row is unused.
    """
    vector = ir.VectorType(ir.FloatType(), width)
    int64 = ir.IntType(64)

    @intrinsic
    def tile(typingctx, out, a, b, depth, taps, accumulate, b_row):
        operands = (types.NamedUniTuple(types.intp, len(kind._fields), kind) for kind in (TileOut, TileLeft, TileRight))
        signature = types.void(*operands, *[types.intp] * 4)

        def codegen(context, builder, sig, args):
            out, om = cgutils.unpack_tuple(builder, args[0], 2)
            a, am, ak, at = cgutils.unpack_tuple(builder, args[1], 4)
            b, bk, bt = cgutils.unpack_tuple(builder, args[2], 3)
            depth, taps, accumulate, b_row = args[3:]
            four, one, zero = (ir.Constant(int64, value) for value in (4, 1, 0))
            am, ak, at, bk, bt, om, bm = (builder.mul(x, four) for x in (am, ak, at, bk, bt, om, b_row))
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{width}f32"
            )

            def load(address):
                value = builder.load(builder.inttoptr(address, vector.as_pointer()))
                value.align = 4
                return value

            def phis(kind, initial, block):
                made = [builder.phi(kind) for _ in initial]
                for phi, value in zip(made, initial, strict=True):
                    phi.add_incoming(value, block)
                return made

            out_rows = [builder.add(out, builder.mul(om, ir.Constant(int64, r))) for r in range(rows)]
            a_rows = [builder.mul(am, ir.Constant(int64, r)) for r in range(rows)]
            b_rows = [builder.mul(bm, ir.Constant(int64, r)) for r in range(rows if batched else 1)]
            entry = builder.block
            names = ("load_out", "taps", "depth", "end_taps", "done")
            load_out, over_taps, over_depth, end_taps, done = (builder.append_basic_block(n) for n in names)
            builder.cbranch(builder.icmp_signed("!=", accumulate, zero), load_out, over_taps)

            builder.position_at_end(load_out)
            loaded = [load(address) for address in out_rows]
            builder.branch(over_taps)

            builder.position_at_end(over_taps)
            (t,) = phis(int64, [zero], entry)
            t.add_incoming(zero, load_out)
            sums = phis(vector, [ir.Constant(vector, [0.0] * width)] * rows, entry)
            for phi, value in zip(sums, loaded, strict=True):
                phi.add_incoming(value, load_out)
            a_tap, b_tap = builder.add(a, builder.mul(t, at)), builder.add(b, builder.mul(t, bt))
            builder.branch(over_depth)

            builder.position_at_end(over_depth)
            (k,) = phis(int64, [zero], over_taps)
            partial = phis(vector, sums, over_taps)
            b_depth = builder.add(b_tap, builder.mul(k, bk))
            b_values = [load(builder.add(b_depth, offset)) for offset in b_rows]
            a_column = builder.add(a_tap, builder.mul(k, ak))
            new = []
            for r in range(rows):
                scalar = builder.load(builder.inttoptr(builder.add(a_column, a_rows[r]), ir.FloatType().as_pointer()))
                undefined = ir.Constant(vector, ir.Undefined)
                first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
                spread, b_value = builder.shuffle_vector(first, undefined, lanes), b_values[r if batched else 0]
                new.append(builder.call(fma, [spread, b_value, partial[r]]))
            k_next = builder.add(k, one)
            k.add_incoming(k_next, over_depth)
            for phi, value in zip(partial, new, strict=True):
                phi.add_incoming(value, over_depth)
            builder.cbranch(builder.icmp_signed("<", k_next, depth), over_depth, end_taps)

            builder.position_at_end(end_taps)
            t_next = builder.add(t, one)
            t.add_incoming(t_next, end_taps)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(value, end_taps)
            builder.cbranch(builder.icmp_signed("<", t_next, taps), over_taps, done)

            builder.position_at_end(done)
            for address, value in zip(out_rows, new, strict=True):
                builder.store(value, builder.inttoptr(address, vector.as_pointer())).align = 4
            return context.get_dummy_value()

        return signature, codegen

    def call(out, a, b, depth, taps, accumulate, b_row=0):
        tile(out, a, b, depth, taps, accumulate, b_row)

    # Compiled functions are known by their names, across the files of the cache too: each tile needs its own.
    call.__name__ = call.__qualname__ = f"_tile_{rows}_{width}{'_batched' * batched}"
    return helper(call)


def _make_dots(rows: int, lanes: int, size: int) -> Any:
    """An intrinsic for the products of `rows` rows of x with four of w: out[j, k] = x[j] . w[k], k < 4.

    size: bytes of an element of w, 4 for float32, 1 for int8, which becomes float32 on the way. depth is a multiple of
    lanes (and so of four); addresses as integers, strides and depth in elements. Four sums
    come together in three shuffles and additions, where four separate reductions would take as long as
    the products of 256 channels.
    """
    vector, four_floats = (ir.VectorType(ir.FloatType(), width) for width in (lanes, 4))
    int64 = ir.IntType(64)

    @intrinsic
    def dots(typingctx, w, w_stride, x, x_stride, depth, out, out_stride):
        signature = types.void(*[types.intp] * 7)

        def codegen(context, builder, sig, args):
            w, w_stride, x, x_stride, depth, out, out_stride = args
            four = ir.Constant(int64, 4)
            x_stride, out_stride, end = (builder.mul(v, four) for v in (x_stride, out_stride, depth))
            w_stride = builder.mul(w_stride, ir.Constant(int64, size))
            fma = cgutils.get_or_insert_function(
                builder.module, ir.FunctionType(vector, [vector] * 3), f"llvm.fma.v{lanes}f32"
            )

            def row(base, stride, r):
                return builder.add(base, builder.mul(stride, ir.Constant(int64, r)))

            def load(base, at):
                value = builder.load(builder.inttoptr(builder.add(base, at), vector.as_pointer()))
                value.align = 4
                return value

            def load_weights(base, at):  # at counts the bytes of floats
                if size == 4:
                    return load(base, at)
                whole = ir.VectorType(ir.IntType(8), lanes)
                place = builder.add(base, builder.lshr(at, ir.Constant(int64, 2)))
                value = builder.load(builder.inttoptr(place, whole.as_pointer()))
                value.align = 1
                return builder.sitofp(builder.sext(value, ir.VectorType(ir.IntType(32), lanes)), vector)

            def pick(a, b, first, second):  # in every four lanes, two of a in turn with two of b
                chosen = [q + i for q in range(0, lanes, 4) for i in (first, lanes + first, second, lanes + second)]
                return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), lanes), chosen))

            def pick_pairs(a, b, first):
                chosen = [
                    q + i for q in range(0, lanes, 4) for i in (first, first + 1, lanes + first, lanes + first + 1)
                ]
                return builder.shuffle_vector(a, b, ir.Constant(ir.VectorType(ir.IntType(32), lanes), chosen))

            w_rows = [row(w, w_stride, r) for r in range(4)]
            x_rows = [row(x, x_stride, r) for r in range(rows)]
            entry = builder.block
            loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
            builder.branch(loop)

            builder.position_at_end(loop)
            at = builder.phi(int64)
            at.add_incoming(ir.Constant(int64, 0), entry)
            sums = [builder.phi(vector) for _ in range(4 * rows)]
            w_values = [load_weights(base, at) for base in w_rows]
            new = []
            for r in range(rows):
                value = load(x_rows[r], at)
                new += [builder.call(fma, [w_values[k], value, sums[4 * r + k]]) for k in range(4)]
            following = builder.add(at, ir.Constant(int64, 4 * lanes))
            at.add_incoming(following, loop)
            for phi, value in zip(sums, new, strict=True):
                phi.add_incoming(ir.Constant(vector, [0.0] * lanes), entry)
                phi.add_incoming(value, loop)
            builder.cbranch(builder.icmp_signed("<", following, end), loop, done)

            builder.position_at_end(done)
            for r in range(rows):
                a, b, c, d = new[4 * r : 4 * r + 4]
                ab = builder.fadd(pick(a, b, 0, 1), pick(a, b, 2, 3))  # in every four lanes: a, b, a, b
                cd = builder.fadd(pick(c, d, 0, 1), pick(c, d, 2, 3))
                found, width = builder.fadd(pick_pairs(ab, cd, 0), pick_pairs(ab, cd, 2)), lanes  # a, b, c, d
                while width > 4:
                    width //= 2
                    low, high = (
                        builder.shuffle_vector(
                            found,
                            found,
                            ir.Constant(ir.VectorType(ir.IntType(32), width), list(range(start, start + width))),
                        )
                        for start in (0, width)
                    )
                    found = builder.fadd(low, high)
                address = builder.inttoptr(row(out, out_stride, r), four_floats.as_pointer())
                builder.store(found, address).align = 4
            return context.get_dummy_value()

        return signature, codegen

    def call(w, w_stride, x, x_stride, depth, out, out_stride):
        dots(w, w_stride, x, x_stride, depth, out, out_stride)

    call.__name__ = call.__qualname__ = f"_dots_{rows}_{lanes}_{size}"  # see _make_tile
    return helper(call)


def _make_prefetch(write: int) -> Any:
    """An intrinsic that asks for the cache line at an address, to read it or to write it; any address is allowed."""
    byte_pointer, int32 = ir.IntType(8).as_pointer(), ir.IntType(32)

    @intrinsic
    def prefetch(typingctx, address):
        def codegen(context, builder, sig, args):
            kind = ir.FunctionType(ir.VoidType(), [byte_pointer, int32, int32, int32])
            function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
            flags = [ir.Constant(int32, flag) for flag in (write, 3, 1)]  # keep in every cache; data
            builder.call(function, [builder.inttoptr(args[0], byte_pointer), *flags])
            return context.get_dummy_value()

        return types.void(types.intp), codegen

    return prefetch


if numba.config.DISABLE_JIT:

    def address_of(data, offset):
        return data[offset:]

    def _plain(width):
        def product(out, a, b, rows, depth, taps, accumulate):
            if rows == 0:
                return
            m, k, t, w = np.arange(rows), np.arange(depth), np.arange(taps), np.arange(width)
            left = a.start[t[:, None, None] * a.tap_stride + m[:, None] * a.row_stride + k * a.depth_stride]
            right = b.start[t[:, None, None] * b.tap_stride + k[:, None] * b.depth_stride + w]
            value = np.einsum("tmk,tkw->mw", left, right)
            where = m[:, None] * out.row_stride + w
            out.start[where] = out.start[where] + value if accumulate else value

        return product

    HAS_AVX512 = False
    tile_product_16, tile_product_32 = _plain(16), _plain(32)
    tile_products_16, tile_products_32 = {6: tile_product_16, 16: tile_product_16}, {12: tile_product_32}

    def batched_product_32(out, a, b, b_row, rows, depth, taps):
        for m in range(rows):
            to = TileOut(out.start[m * out.row_stride :], out.row_stride)
            left = TileLeft(a.start[m * a.row_stride :], a.row_stride, a.depth_stride, a.tap_stride)
            tile_product_32(to, left, TileRight(b.start[m * b_row :], b.depth_stride, b.tap_stride), 1, depth, taps, 0)

    batched_products_32 = {4: batched_product_32, 2: batched_product_32}

    def dot_products(out, x, w):
        out[...] = x @ w.T.astype(np.float32)

    def row_products(out, x, w):
        out[0] = w @ x[0]

    def short_product(out, a, b, beta):
        out[...] = a @ b if beta == 0 else out * np.float32(beta) + a @ b

    dot_products_int8 = dot_products
    all_dot_products = {(lanes, size): dot_products for lanes in (8, 16) for size in (4, 1)}
    short_product_32 = short_product_64 = short_product

else:
    _prefetch_read, _prefetch_write = _make_prefetch(0), _make_prefetch(1)
    HAS_AVX512 = "+avx512f" in target_features()

    @helper
    def address_of(data, offset):
        """Address of element offset of data, 1-D contiguous float32. Its owner must stay alive; the address does not
        keep it so. (In plain Python, where no kernel is compiled, the array from there on.)
        """
        return np.int64(data.ctypes.data) + 4 * offset

    @helper
    def _out_row(out, m):
        return TileOut(out.start + 4 * m * out.row_stride, out.row_stride)

    @helper
    def _left_row(a, m):
        return TileLeft(a.start + 4 * m * a.row_stride, a.row_stride, a.depth_stride, a.tap_stride)

    def _make_tile_product(width, many, some):
        """For tiles of `many` rows, then of `some`, then of one."""
        tile_many, tile_some, tile_one = (_make_tile(rows, width) for rows in (many, some, 1))

        def tile_product(out, a, b, rows, depth, taps, accumulate):
            m = 0
            while m + many <= rows:
                tile_many(_out_row(out, m), _left_row(a, m), b, depth, taps, accumulate)
                m += many
            while m + some <= rows:
                tile_some(_out_row(out, m), _left_row(a, m), b, depth, taps, accumulate)
                m += some
            while m < rows:
                tile_one(_out_row(out, m), _left_row(a, m), b, depth, taps, accumulate)
                m += 1

        tile_product.__name__ = tile_product.__qualname__ = f"_tile_product_{width}_{many}"  # see _make_tile
        return helper(tile_product)

    # tile_product(out, a, b, rows, depth, taps, accumulate) for a TileOut, TileLeft and TileRight:
    # out[m, w] (+)= sum over t < taps, k < depth of a[t, m, k] * b[t, k, w], m < rows, w < 16 or 32; rows >= 0,
    # depth >= 1, taps >= 1; unchecked. The same bits whatever the height of the tiles.
    tile_products_16 = {6: _make_tile_product(16, 6, 4), 16: _make_tile_product(16, 16, 4)}
    tile_products_32 = {12: _make_tile_product(32, 12, 3)}  # for the registers of AVX-512
    tile_product_16, tile_product_32 = tile_products_16[16 if HAS_AVX512 else 6], tile_products_32[12]

    def _make_batched_product(width, many):
        """For tiles of `many` rows, then of one."""
        tile_many, tile_one = (_make_tile(rows, width, batched=True) for rows in (many, 1))

        def batched_product(out, a, b, b_row, rows, depth, taps):
            m = 0
            while m < rows:
                right = TileRight(b.start + 4 * m * b_row, b.depth_stride, b.tap_stride)
                if m + many <= rows:
                    tile_many(_out_row(out, m), _left_row(a, m), right, depth, taps, 0, b_row)
                    m += many
                else:
                    tile_one(_out_row(out, m), _left_row(a, m), right, depth, taps, 0, b_row)
                    m += 1

        batched_product.__name__ = batched_product.__qualname__ = f"_batched_product_{width}_{many}"  # see _make_tile
        return helper(batched_product)

    # batched_product(out, a, b, b_row, rows, depth, taps): as tile_product, but row m has its own right operand, b_row
    # floats after that of row m - 1. The sums of one row wait for one another; those of several rows do not.
    batched_products_32 = {many: _make_batched_product(32, many) for many in (4, 2)}
    batched_product_32 = batched_products_32[4 if HAS_AVX512 else 2]

    @helper
    def row_products(out, x, w):
        """out (1, K) = x (1, C) @ w (K, C).T for rows that are not in the cache: read as they lie, one after another.

        Four at a time (dot_products) are four places at once, which the processor does not foresee; asking for them
        helps, and is still a fifth slower than this.
        """
        for k in range(w.shape[0]):
            total = np.float32(0)
            for c in range(w.shape[1]):
                total += x[0, c] * w[k, c]
            out[0, k] = total

    def _make_dot_products(lanes, most, size):
        """For registers of `lanes` floats; most: rows of x at a time, as many as keep the sums in registers."""
        one, two, many = (_make_dots(rows, lanes, size) for rows in (1, 2, most))

        def dot_products(out, x, w):
            rows, width, dim = x.shape[0], w.shape[0], x.shape[1]
            whole = dim - dim % lanes if dim >= lanes else 0
            aligned = width - width % 4 if whole > 0 else 0
            pw, px, po = w.ctypes.data, x.ctypes.data, out.ctypes.data
            sw, sx, so = w.strides[0] // size, x.strides[0] // 4, out.strides[0] // 4
            for k in range(0, aligned, 4):
                for row in range(k + 8, k + 12):  # the processor's own prefetching stops at the end of a page
                    for line in range(0, size * whole, 64):
                        _prefetch_read(pw + size * row * sw + line)
                j = 0
                while j + most <= rows:
                    many(pw + size * k * sw, sw, px + 4 * j * sx, sx, whole, po + 4 * (j * so + k), so)
                    j += most
                if j + 2 <= rows:
                    two(pw + size * k * sw, sw, px + 4 * j * sx, sx, whole, po + 4 * (j * so + k), so)
                    j += 2
                if j < rows:
                    one(pw + size * k * sw, sw, px + 4 * j * sx, sx, whole, po + 4 * (j * so + k), so)
            for j in range(rows):
                for k in range(aligned if whole == dim else 0, width):
                    total = out[j, k] if k < aligned else np.float32(0)
                    for c in range(whole if k < aligned else 0, dim):
                        total += x[j, c] * np.float32(w[k, c])
                    out[j, k] = total

        dot_products.__name__ = dot_products.__qualname__ = f"_dot_products_{lanes}_{size}"
        return helper(dot_products)

    def _make_short_product(tile_rows, width):
        """For tiles of tile_rows (2 or 4) x width floats."""
        one, two, many = (_make_tile(rows, width) for rows in (1, 2, tile_rows))

        def short_product(out, a, b, beta):
            rows, dim, depth = out.shape[0], out.shape[1], a.shape[1]
            pa, pb, po = np.int64(a.ctypes.data), np.int64(b.ctypes.data), np.int64(out.ctypes.data)
            am, ak, sb, so = a.strides[0] // 4, a.strides[1] // 4, b.strides[0] // 4, out.strides[0] // 4
            add = np.int64(beta != 0)
            whole = dim - dim % width if depth > 0 else 0
            m = 0
            while m < rows:
                count = tile_rows if m + tile_rows <= rows else 2 if m + 2 <= rows else 1
                for c in range(0, whole, width):
                    if add == 0:  # nothing has read these lines before, so nothing has fetched them
                        for row in range(m + tile_rows, m + 2 * tile_rows):
                            for line in range(0, 4 * width, 64):
                                _prefetch_write(po + 4 * (row * so + c) + line)
                    to = TileOut(po + 4 * (m * so + c), so)
                    left, right = TileLeft(pa + 4 * m * am, am, ak, 0), TileRight(pb + 4 * c, sb, 0)
                    if count == tile_rows:
                        many(to, left, right, depth, 1, add)
                    elif count == 2:
                        two(to, left, right, depth, 1, add)
                    else:
                        one(to, left, right, depth, 1, add)
                m += count
            for m in range(rows if whole < dim else 0):
                for c in range(whole, dim):
                    if add == 0:
                        out[m, c] = np.float32(0)
                for k in range(depth):
                    for c in range(whole, dim):
                        out[m, c] += a[m, k] * b[k, c]

        short_product.__name__ = short_product.__qualname__ = f"_short_product_{tile_rows}_{width}"
        return helper(short_product)

    # by lanes and bytes of an element of w
    all_dot_products = {(8, 4): _make_dot_products(8, 2, 4), (16, 4): _make_dot_products(16, 4, 4)}
    all_dot_products |= {(8, 1): _make_dot_products(8, 2, 1), (16, 1): _make_dot_products(16, 4, 1)}
    short_product_32, short_product_64 = _make_short_product(2, 32), _make_short_product(4, 64)
    # Products with few rows or little depth, where BLAS spends its time packing:
    # dot_products(out, x, w): out (J, K) = x (J, C) @ w (K, C).T; dot_products_int8: the same for w of int8
    # short_product(out, a, b, beta): out (M, W) = a (M, K) @ b (K, W) + beta * out, beta 0 or 1; any strides for a
    # Float32; the last axis of the others is contiguous, the rows of out too (unchecked).
    if HAS_AVX512:
        dot_products, dot_products_int8 = all_dot_products[16, 4], all_dot_products[16, 1]
        short_product = short_product_64
    else:
        dot_products, dot_products_int8 = all_dot_products[8, 4], all_dot_products[8, 1]
        short_product = short_product_32
