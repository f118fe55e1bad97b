"""Small matrix products with the result in registers: for shapes where BLAS spends its time packing.

    out[m, w] (+)= sum over t < T, k < K of  a[t, m, k] * b[t, k, w]

with any strides for a, so that the taps of a convolution are one product, and w contiguous. The width of a tile is
fixed when it is made (whole vector registers); rows go by blocks. 2 x 32 and 6 x 16 floats keep the sixteen
registers of AVX2 busy without spilling; wider tiles were slower.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from flashlm_numba.kernels._jit import helper


def _make_tile(rows: int, width: int) -> Any:
    """An intrinsic for `rows` rows: addresses as integers, strides and counts in elements."""
    vector = ir.VectorType(ir.FloatType(), width)
    int64 = ir.IntType(64)
    name = types.intp

    @intrinsic
    def tile(typingctx, a, am, ak, at, b, bk, bt, depth, taps, out, om, accumulate):
        signature = types.void(*[name] * 12)

        def codegen(context, builder, sig, args):
            a, am, ak, at, b, bk, bt, depth, taps, out, om, accumulate = args
            four, one, zero = (ir.Constant(int64, value) for value in (4, 1, 0))
            am, ak, at, bk, bt, om = (builder.mul(x, four) for x in (am, ak, at, bk, bt, om))
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
            b_row = load(builder.add(b_tap, builder.mul(k, bk)))
            a_column = builder.add(a_tap, builder.mul(k, ak))
            new = []
            for r in range(rows):
                scalar = builder.load(builder.inttoptr(builder.add(a_column, a_rows[r]), ir.FloatType().as_pointer()))
                undefined = ir.Constant(vector, ir.Undefined)
                first = builder.insert_element(undefined, scalar, ir.Constant(ir.IntType(32), 0))
                lanes = ir.Constant(ir.VectorType(ir.IntType(32), width), [0] * width)
                new.append(builder.call(fma, [builder.shuffle_vector(first, undefined, lanes), b_row, partial[r]]))
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

    def call(a, am, ak, at, b, bk, bt, depth, taps, out, om, accumulate):
        tile(a, am, ak, at, b, bk, bt, depth, taps, out, om, accumulate)

    # Compiled functions are known by their names, across the files of the cache too: each tile needs its own.
    call.__name__ = call.__qualname__ = f"_tile_{rows}_{width}"
    return helper(call)


if numba.config.DISABLE_JIT:

    def _plain(width):
        def product(out, o0, om, a, a0, am, ak, at, b, b0, bk, bt, rows, depth, taps, accumulate):
            if rows == 0:
                return
            m, k, t, w = np.arange(rows), np.arange(depth), np.arange(taps), np.arange(width)
            left = a[a0 + t[:, None, None] * at + m[:, None] * am + k * ak]
            right = b[b0 + t[:, None, None] * bt + k[:, None] * bk + w]
            value = np.einsum("tmk,tkw->mw", left, right)
            where = o0 + m[:, None] * om + w
            out[where] = out[where] + value if accumulate else value

        return product

    tile_product_16 = _plain(16)
    tile_product_32 = _plain(32)

else:
    _tile_1_16, _tile_4_16, _tile_6_16 = (_make_tile(rows, 16) for rows in (1, 4, 6))
    _tile_1_32, _tile_2_32 = (_make_tile(rows, 32) for rows in (1, 2))

    @helper
    def tile_product_16(out, o0, om, a, a0, am, ak, at, b, b0, bk, bt, rows, depth, taps, accumulate):
        """out[o0 + m*om + w] (+)= sum over t, k of a[a0 + t*at + m*am + k*ak] * b[b0 + t*bt + k*bk + w], w < 16.

        out, a, b: 1-D contiguous float32 (views of whole buffers); rows >= 0, depth >= 1, taps >= 1; unchecked.
        """
        pout, pa, pb = out.ctypes.data + 4 * o0, a.ctypes.data + 4 * a0, b.ctypes.data + 4 * b0
        m = 0
        while m + 6 <= rows:
            _tile_6_16(pa + 4 * m * am, am, ak, at, pb, bk, bt, depth, taps, pout + 4 * m * om, om, accumulate)
            m += 6
        if m + 4 <= rows:
            _tile_4_16(pa + 4 * m * am, am, ak, at, pb, bk, bt, depth, taps, pout + 4 * m * om, om, accumulate)
            m += 4
        while m < rows:
            _tile_1_16(pa + 4 * m * am, am, ak, at, pb, bk, bt, depth, taps, pout + 4 * m * om, om, accumulate)
            m += 1

    @helper
    def tile_product_32(out, o0, om, a, a0, am, ak, at, b, b0, bk, bt, rows, depth, taps, accumulate):
        """The same for w < 32."""
        pout, pa, pb = out.ctypes.data + 4 * o0, a.ctypes.data + 4 * a0, b.ctypes.data + 4 * b0
        m = 0
        while m + 2 <= rows:
            _tile_2_32(pa + 4 * m * am, am, ak, at, pb, bk, bt, depth, taps, pout + 4 * m * om, om, accumulate)
            m += 2
        if m < rows:
            _tile_1_32(pa + 4 * m * am, am, ak, at, pb, bk, bt, depth, taps, pout + 4 * m * om, om, accumulate)
