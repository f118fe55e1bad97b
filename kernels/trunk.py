"""The trunk, forward and backward: R passes of one block, then the final norm.

    x = E[rows] + gains * E[followers]
    R times:  m = rmsnorm(x);  m = m + gain * average(m);  for every dilation:  m = m + gated_conv(rmsnorm(m))
              x1 = x + a m Wo';  h = b relu(n Wg')**2 * (n Wu') with n = rmsnorm(x1);  x = x1 + h Wd'
    out = rmsnorm(x) + gains * E[followers]

The followers (ngram_copy.py) are found for each of O kinds; FlashLM v3 has none. The leaky average
(leaky_average.py) is left out where its decay is 0, as in v3.

One parallel region per direction. A thread owns whole sequences (nothing crosses them) and goes through them by tiles
of about 256 rows, so that its matrix products are large and its scratch stays in cache: register tiles over weights
laid out once a step (_packed_gemm.py) or int8 (ternary_gemm.py), and single-threaded BLAS for the weights' gradients.
The convolutions work on group-major copies (conv.py). The gradients of the weights are summed per thread and reduced in
thread order: the same bits on every run with the same number of threads.
Letters: B batch, T time, N = B*T rows, C channels, I inner width, R passes, D convolutions, G groups, K taps,
S padded group width, P threads, M rows of a tile; O kinds of followers.
"""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels._blas import gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel
from flashlm_numba.kernels._packed_gemm import SPARE_FLOATS, empty_panels, fill_panels, panel_product
from flashlm_numba.kernels._rows import aligned_zeros, clear_rows, copy_rows, gather_rows, scale_rows
from flashlm_numba.kernels._ternary_dots import VARIANTS, check_variant
from flashlm_numba.kernels.conv import (
    conv_sequence,
    conv_sequence_dinput,
    conv_sequence_dweight,
    gate_sequence,
    gate_sequence_backward,
    pack_conv_weights,
    padded_width,
    to_groups,
    unpack_conv_gradient,
)
from flashlm_numba.kernels.glu import glu_backward_rows, glu_rows
from flashlm_numba.kernels.leaky_average import add_average, add_average_backward, average_share
from flashlm_numba.kernels.ngram_copy import add_followers, add_followers_backward, find_followers, kinds
from flashlm_numba.kernels.rmsnorm import rmsnorm_backward_rows, rmsnorm_recompute, rmsnorm_rows
from flashlm_numba.kernels.ternary_gemm import (
    empty_columns,
    fill_columns,
    linear_variant,
    spare_floats,
    ternary_linear_rows,
)
from flashlm_numba.kernels.ternary_wgrad import VNNI, codes_words, weight_gradient_rows

TILE_ROWS = 256
REGISTER = 16  # floats of the widest


@helper
def _add_groups(out, groups, width):
    """out (T, C) = groups (G, T, S) regrouped."""
    for t in range(out.shape[0]):
        for g in range(groups.shape[0]):
            for j in range(width):
                out[t, g * width + j] = groups[g, t, j]


@helper
def _linear(out, x, panels, codes, plain, add, rounding, variant, blas):
    """out (M, R) = x (M, K) @ weight.T, or added to out; x rounded to int8 where there are codes of the weight."""
    q, scales, sums, spare = rounding
    if codes.shape[1] > 0:
        ternary_linear_rows(out, x, plain, codes, q, scales, sums, spare, add, variant, blas)
    else:
        panel_product(out, x, panels, spare.reshape(-1), add)


@helper
def _weight_gradient(out, a, b, rounding, pair, variant, blas):
    """out (R, K) += a (M, R).T @ b (M, K), both rounded to int8 where there is room for them."""
    q, scales, sums, spare = rounding
    codes, shares = pair
    if codes.shape[0] > 0:
        weight_gradient_rows(out, a, b, codes, shares, q, scales, sums, spare, variant, blas)
    else:
        gemm_tn(blas, out, a, b, np.float32(1))


@helper
def _forward_rows(
    low, high, time, out, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu, followers, normed, n, h, rounding,
    embedding, rows, orders, reach, gains, norms, branches, conv, dilations, panels, codes, plain, variant, blas,
):  # fmt: skip
    """One tile, rows low..high (whole sequences); normed (M, C), n (G, T, S), h (M, I) and rounding are this thread's
    scratch.
    """
    passes, width, size = x1.shape[0], x.shape[2] // n.shape[0], high - low
    gather_rows(x[0, low:high], embedding, rows[low:high])
    for o in range(orders.shape[0]):
        for start in range(low, high, time):
            find_followers(
                followers[o, start : start + time], rows[start : start + time], orders[o, 0], orders[o, 1], reach
            )
        add_followers(x[0, low:high], embedding, followers[o, low:high], gains[0, o])
    for r in range(passes):
        rmsnorm_rows(xm[r, 0, low:high], rstd[r, 0, low:high], x[r, low:high], norms[0])
        for start in range(low, high, time):
            b, end = start // time, start + time
            if branches[2] > 0:
                add_average(xm[r, 0, start:end], normed[:time], norms[3 + dilations.shape[0]], branches[2], branches[3])
            for d in range(dilations.shape[0]):
                rmsnorm_rows(normed[:time], rstd_m[r, d, start:end], xm[r, d, start:end], norms[3 + d])
                to_groups(n, normed[:time], width)
                conv_sequence(gv[r, d, b], n, conv[d], dilations[d])
                gate_sequence(xm[r, d + 1, start:end], gv[r, d, b], xm[r, d, start:end], width)
        copy_rows(x1[r, low:high], x[r, low:high])
        scale_rows(normed[:size], xm[r, dilations.shape[0], low:high], branches[0])
        _linear(x1[r, low:high], normed[:size], panels[0], codes[0], plain[0], 1, rounding, variant, blas)
        rmsnorm_rows(normed[:size], rstd[r, 1, low:high], x1[r, low:high], norms[1])
        _linear(gu[r, low:high], normed[:size], panels[1], codes[1], plain[1], 0, rounding, variant, blas)
        glu_rows(h[:size], gu[r, low:high], branches[1])
        copy_rows(x[r + 1, low:high], x1[r, low:high])
        _linear(x[r + 1, low:high], h[:size], panels[2], codes[2], plain[2], 1, rounding, variant, blas)
    rmsnorm_rows(out[low:high], rstd_out[low:high], x[passes, low:high], norms[2])
    for o in range(orders.shape[0]):
        add_followers(out[low:high], embedding, followers[o, low:high], gains[1, o])


@kernel
def _trunk_forward(
    out, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu, followers, normed, n, h, q, scales, sums, spare, embedding, rows,
    orders, reach, gains, norms, branches, conv, dilations, panels, codes, plain, variant, blas, time, tile, threads,
):  # fmt: skip
    """tile: sequences in a tile. Parallel over sequences; a row has one writer."""
    batch = rows.shape[0] // time
    for thread in prange(threads):
        first, last = thread * batch // threads, (thread + 1) * batch // threads
        for start in range(first, last, tile):
            _forward_rows(
                start * time, min(start + tile, last) * time, time, out, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu,
                followers, normed[thread], n[thread], h[thread],
                (q[thread], scales[thread], sums[thread], spare[thread]), embedding, rows, orders, reach, gains,
                norms, branches, conv, dilations, panels, codes, plain, variant, blas,
            )  # fmt: skip


@helper
def _backward_rows(
    low, high, time, dx, dgains, dnorms, dconv, dw_out, dw_gate_up, dw_down, normed, n, h, dh, dgu, dm, dn, dgv,
    rounding, pair, dout, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu, followers, embedding, norms, branches, conv_t,
    dilations, panels_t, codes_t, plain_t, variant, blas,
):  # fmt: skip
    """One tile of the mirror image. dx (N, C) ends as the gradient of the embedded rows; dm, dh, dgu are scratch."""
    passes, width, size = x1.shape[0], x.shape[2] // n.shape[0], high - low
    dx_tile, dm_tile, normed_tile = dx[low:high], dm[:size], normed[:size]
    for o in range(followers.shape[0]):
        add_followers_backward(dgains[1, o], dout[low:high], embedding, followers[o, low:high])
    rmsnorm_backward_rows(dx_tile, dnorms[2], dout[low:high], x[passes, low:high], norms[2], rstd_out[low:high], False)
    for step in range(passes):
        r = passes - 1 - step
        # forward: x = x1 + h Wd', h = b relu(gate)**2 * up, [gate, up] = rmsnorm(x1) Wgu'
        _linear(dh[:size], dx_tile, panels_t[2], codes_t[2], plain_t[2], 0, rounding, variant, blas)
        glu_backward_rows(h[:size], dgu[:size], dh[:size], gu[r, low:high], branches[1])
        _weight_gradient(dw_down, dx_tile, h[:size], rounding, pair, variant, blas)
        rmsnorm_recompute(normed_tile, x1[r, low:high], norms[1], rstd[r, 1, low:high])
        _weight_gradient(dw_gate_up, dgu[:size], normed_tile, rounding, pair, variant, blas)
        _linear(dm_tile, dgu[:size], panels_t[1], codes_t[1], plain_t[1], 0, rounding, variant, blas)
        rmsnorm_backward_rows(dx_tile, dnorms[1], dm_tile, x1[r, low:high], norms[1], rstd[r, 1, low:high], True)
        # forward: x1 = x + a m Wo'
        scale_rows(normed_tile, xm[r, dilations.shape[0], low:high], branches[0])
        _weight_gradient(dw_out, dx_tile, normed_tile, rounding, pair, variant, blas)
        _linear(dm_tile, dx_tile, panels_t[0], codes_t[0], plain_t[0], 0, rounding, variant, blas)
        scale_rows(dm_tile, dm_tile, branches[0])
        for start in range(low, high, time):
            b, end = start // time, start + time
            dm_sequence = dm[start - low : end - low]
            for back in range(dilations.shape[0]):
                d = dilations.shape[0] - 1 - back
                # forward: m = m + gated_conv(rmsnorm(m))
                gate_sequence_backward(dgv, dm_sequence, gv[r, d, b], width)
                rmsnorm_recompute(normed[:time], xm[r, d, start:end], norms[3 + d], rstd_m[r, d, start:end])
                to_groups(n, normed[:time], width)
                conv_sequence_dinput(dn, dgv, conv_t[d], dilations[d])
                conv_sequence_dweight(dconv[d], n, dgv, dilations[d])
                _add_groups(normed[:time], dn, width)
                rmsnorm_backward_rows(
                    dm_sequence, dnorms[3 + d], normed[:time], xm[r, d, start:end], norms[3 + d],
                    rstd_m[r, d, start:end], True,
                )  # fmt: skip
            if branches[2] > 0:
                gain = 3 + dilations.shape[0]
                rmsnorm_recompute(normed[:time], x[r, start:end], norms[0], rstd[r, 0, start:end])
                add_average_backward(dm_sequence, dnorms[gain], normed[:time], norms[gain], branches[2], branches[3])
        rmsnorm_backward_rows(dx_tile, dnorms[0], dm_tile, x[r, low:high], norms[0], rstd[r, 0, low:high], True)
    for o in range(followers.shape[0]):
        add_followers_backward(dgains[0, o], dx_tile, embedding, followers[o, low:high])


@kernel
def _trunk_backward(
    dx, dgains, dnorms, dconv, dw_out, dw_gate_up, dw_down, normed, n, h, dh, dgu, dm, dn, dgv, q, scales, sums, spare,
    codes, shares, dout, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu, followers, embedding, norms, branches, conv_t,
    dilations, panels_t, codes_t, plain_t, variant, blas, time, tile, threads,
):  # fmt: skip
    """Weight gradients are per thread, (P, ...), and cleared here."""
    batch = dx.shape[0] // time
    for thread in prange(threads):
        first, last = thread * batch // threads, (thread + 1) * batch // threads
        clear_rows(dgains[thread].reshape(-1, dx.shape[1]))
        clear_rows(dnorms[thread])
        clear_rows(dconv[thread].reshape(-1, dconv.shape[-1]))
        clear_rows(dw_out[thread])
        clear_rows(dw_gate_up[thread])
        clear_rows(dw_down[thread])
        for start in range(first, last, tile):
            _backward_rows(
                start * time, min(start + tile, last) * time, time, dx, dgains[thread], dnorms[thread], dconv[thread],
                dw_out[thread], dw_gate_up[thread], dw_down[thread], normed[thread], n[thread], h[thread],
                dh[thread], dgu[thread], dm[thread], dn[thread], dgv[thread],
                (q[thread], scales[thread], sums[thread], spare[thread]), (codes[thread], shares[thread]),
                dout, x, x1, xm, rstd, rstd_m, rstd_out, gv, gu, followers, embedding, norms, branches, conv_t,
                dilations, panels_t, codes_t, plain_t, variant, blas,
            )  # fmt: skip


class TrunkWeights:
    """The trunk's weights as the kernels read them; set once a step.

    norms (4 + D, C): of the block's input, before the GLU, final, then one per convolution; last the average's gain.
    gains (2, O, C): of the followers at the input and at the output, of each kind, in orders (O, 2) int64 as
    induction.kinds says; reach: tokens that they may lie back.
    branches (4,): a and b, what the mixer and the GLU are multiplied by before they are added; the average's decay (0:
    there is none) and the new token's share of it.
    conv (D, G, K, S, 2 S), conv_t (D, G, K, 2 S, S); w_out (C, C), w_gate_up (2 I', C), w_down (C, I'), ternary, where
    I' is I rounded up to whole registers: rows of activations then begin at their boundaries. w_gate, w_up and
    w_down_inner are views without the padding, which is zero.
    int8: whether what the ternary ones are multiplied by is rounded to int8, row by row, forward and backward.
    layouts, layouts_t: what the products with the three, and with their transposes, read: their panels
    (_packed_gemm.py), or with int8 their codes by pack_columns, and where no int8 instruction serves they themselves;
    empty otherwise.
    """

    def __init__(
        self,
        dim: int,
        inner: int,
        groups: int,
        taps: int,
        dilations: tuple[int, ...],
        branches: tuple[float, float] = (1.0, 1.0),
        leaky_decay: float = 0.0,
        orders: tuple[int, ...] = (),
        reach: int = 0,
    ) -> None:
        size, count = padded_width(dim, groups), len(dilations)
        padded = -(-inner // REGISTER) * REGISTER
        self.groups, self.inner = groups, inner
        self.dilations = np.array(dilations, np.int64)
        self.orders, self.reach = np.array(kinds(orders), np.int64).reshape(-1, 2), reach
        self.gains = np.zeros((2, len(orders), dim), np.float32)
        self.norms = np.zeros((4 + count, dim), np.float32)
        self.branches = np.array([*branches, leaky_decay, average_share(leaky_decay)], np.float32)
        self.conv = aligned_zeros((count, groups, taps, size, 2 * size), np.float32)
        self.conv_t = aligned_zeros((count, groups, taps, 2 * size, size), np.float32)
        self.w_out = np.empty((dim, dim), np.float32)
        self.w_gate_up = np.zeros((2 * padded, dim), np.float32)
        self.w_down = np.zeros((dim, padded), np.float32)
        self.w_gate, self.w_up = self.w_gate_up[:inner], self.w_gate_up[padded : padded + inner]
        self.w_down_inner = self.w_down[:, :inner]
        self.use_int8(False)

    def use_int8(self, int8: bool, variant: str | None = None) -> None:
        """Choose the arithmetic of the ternary products; call pack when their weights have changed.

        variant: one of _ternary_dots.available(), default linear_variant().
        """
        name = "plain" if not int8 else check_variant(variant) if variant else linear_variant()
        self.int8, self.variant = int8, VARIANTS.index(name)
        matrices = self.w_out, self.w_gate_up, self.w_down
        self.layouts = self._empty_layouts([w.shape for w in matrices])
        self.layouts_t = self._empty_layouts([w.T.shape for w in matrices])

    def _empty_layouts(self, shapes: list[tuple[int, ...]]) -> tuple[tuple[np.ndarray, ...], ...]:
        plain, none = self.int8 and self.variant == 0, (0, 0)
        return (
            tuple(empty_panels(*(none if self.int8 else shape)) for shape in shapes),
            tuple(empty_columns(*(shape if self.int8 else none)) for shape in shapes),
            tuple(np.empty(shape if plain else none, np.float32) for shape in shapes),
        )

    def pack(self) -> None:
        """Fill the layouts from the ternary weights."""
        matrices = self.w_out, self.w_gate_up, self.w_down
        for layouts, weights in ((self.layouts, matrices), (self.layouts_t, tuple(w.T for w in matrices))):
            for panels, codes, plain, weight in zip(*layouts, weights, strict=True):
                if panels.size:
                    fill_panels(panels, weight)
                if codes.size:
                    fill_columns(codes, weight)
                if plain.size:
                    plain[...] = weight

    def set_conv(self, index: int, gate: np.ndarray, value: np.ndarray) -> None:
        """Pack the convolution of one dilation: gate, value (C, C/G, K) float32."""
        self.conv[index], self.conv_t[index] = pack_conv_weights(gate, value, self.groups)


class TrunkBuffers:
    """Saved activations and scratch for batches of one shape (B, T); about 40 KB a token for v3's shape."""

    def __init__(self, weights: TrunkWeights, passes: int, batch: int, time: int) -> None:
        count, groups, taps, size, _ = weights.conv.shape
        dim, inner = weights.w_down.shape
        rows, threads = batch * time, numba.get_num_threads()
        self.shape = (batch, time, threads, weights.int8, weights.variant)
        self.tile = max(1, TILE_ROWS // max(time, 1))  # sequences
        tile_rows = self.tile * time

        def zeros(*shape: int) -> np.ndarray:
            return aligned_zeros(shape, np.float32)

        self.out, self.dx = zeros(rows, dim), zeros(rows, dim)
        self.x, self.x1 = zeros(passes + 1, rows, dim), zeros(passes, rows, dim)
        self.xm = zeros(passes, count + 1, rows, dim)
        self.rstd, self.rstd_m = zeros(passes, 2, rows), zeros(passes, count, rows)
        self.rstd_out = zeros(rows)
        self.gv = zeros(passes, count, batch, groups, 2, time, size)
        self.gu = zeros(passes, rows, 2 * inner)
        self.followers = np.zeros((len(weights.orders), rows), np.int32)
        # scratch, one per thread; the padding of n and dgv stays zero
        self.normed, self.dm = zeros(threads, tile_rows, dim), zeros(threads, tile_rows, dim)
        self.n, self.dn = zeros(threads, groups, time, size), zeros(threads, groups, time, size)
        self.dgv = zeros(threads, groups, 2, time, size)
        self.h, self.dh = zeros(threads, tile_rows, inner), zeros(threads, tile_rows, inner)
        self.dgu = zeros(threads, tile_rows, 2 * inner)
        # of int8 products
        widest = max(dim, 2 * inner) + 3 if weights.int8 else 0
        scaled = max(tile_rows, widest)
        self.q = aligned_zeros((threads, (tile_rows + 3) * widest), np.int8)
        self.scales, self.sums = zeros(threads, scaled), np.zeros((threads, scaled), np.int32)
        both = codes_words(tile_rows, max(dim, inner)) if weights.int8 and weights.variant == VNNI else 0
        self.codes = aligned_zeros((threads, both), np.int32)
        self.shares = zeros(threads, tile_rows + 3)
        self.spare = zeros(threads, max(SPARE_FLOATS, spare_floats(weights.variant, tile_rows, widest)))
        # weight gradients, one per thread
        self.dgains = zeros(threads, 2, len(weights.orders), dim)
        self.dnorms = zeros(threads, 4 + count, dim)
        self.dconv = zeros(threads, count, groups, taps, size, 2 * size)
        self.dw_out, self.dw_down = zeros(threads, dim, dim), zeros(threads, dim, inner)
        self.dw_gate_up = zeros(threads, 2 * inner, dim)

    def fits(self, weights: TrunkWeights, batch: int, time: int) -> bool:
        """Whether they serve for this shape of batch, these weights' arithmetic and the threads in use."""
        return self.shape == (batch, time, numba.get_num_threads(), weights.int8, weights.variant)


def trunk_forward(buffers: TrunkBuffers, weights: TrunkWeights, embedding: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Hidden states (N, C) float32 of rows (B*T,) int32, rows of embedding (V, C); a view of buffers.out.

    The ternary products are in float32, or, with weights.use_int8, of inputs rounded to int8; they read what
    weights.pack has laid out.
    rows must be in [0, V): the caller checks (Model.forward). Saves in buffers what trunk_backward reads.
    Cost 2*R*N*(2*C*C*K*D/G + C*C + 3*C*I) flop. Source: FlashLM v3.
    """
    b = buffers
    _trunk_forward(
        b.out, b.x, b.x1, b.xm, b.rstd, b.rstd_m, b.rstd_out, b.gv, b.gu, b.followers, b.normed, b.n, b.h,
        b.q, b.scales, b.sums, b.spare, embedding, rows, weights.orders, weights.reach, weights.gains,
        weights.norms, weights.branches, weights.conv, weights.dilations, *weights.layouts, weights.variant,
        sgemm_address(), b.shape[1], b.tile, b.shape[2],
    )  # fmt: skip
    return b.out


def trunk_backward(
    buffers: TrunkBuffers, weights: TrunkWeights, dout: np.ndarray, embedding: np.ndarray
) -> dict[str, np.ndarray]:
    """Gradients for dout (N, C) float32 after trunk_forward with the same buffers, weights and embedding.

    Returns `dx` (N, C), the gradient of the trunk's input (a view of buffers.dx), `gains` (2, O, C), `norms`
    (4 + D, C), `w_out` (C, C), `w_gate`, `w_up` (I, C), `w_down` (C, I), and `gates`, `values` (D, C, C/G, K). The
    embedding's is left to the caller: of dx by its rows, of dx and dout by the followers (induction.scatter_followers).
    """
    b = buffers
    _trunk_backward(
        b.dx, b.dgains, b.dnorms, b.dconv, b.dw_out, b.dw_gate_up, b.dw_down, b.normed, b.n, b.h, b.dh, b.dgu, b.dm,
        b.dn, b.dgv, b.q, b.scales, b.sums, b.spare, b.codes, b.shares, dout, b.x, b.x1, b.xm, b.rstd, b.rstd_m,
        b.rstd_out, b.gv, b.gu, b.followers, embedding, weights.norms, weights.branches, weights.conv_t,
        weights.dilations, *weights.layouts_t, weights.variant, sgemm_address(), b.shape[1], b.tile, b.shape[2],
    )  # fmt: skip
    width = weights.norms.shape[1] // weights.groups
    convs = [unpack_conv_gradient(dconv, width) for dconv in b.dconv.sum(0)]
    dw_gate_up, inner = b.dw_gate_up.sum(0), weights.inner
    return {
        "dx": b.dx,
        "gains": b.dgains.sum(0),
        "norms": b.dnorms.sum(0),
        "w_out": b.dw_out.sum(0),
        "w_gate": dw_gate_up[:inner],
        "w_up": dw_gate_up[len(dw_gate_up) // 2 :][:inner],
        "w_down": b.dw_down.sum(0)[:, :inner],
        "gates": np.stack([gate for gate, _ in convs]),
        "values": np.stack([value for _, value in convs]),
    }
