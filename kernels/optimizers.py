"""Optimiser steps: AdamW, NorMuon, the sum of squares of the global norm, and the moving average of weights.

Every result is the same, bit for bit, for any number of threads: work is cut at fixed places, and the threads
only share out the pieces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel
from flashlm_numba.kernels._math import flush_denormals, restore_denormals

# elements; below this a tensor is done serially, since entering a parallel region costs about as much
SMALL = 65_536
# elements a partial sum of squares covers: its float64 sum is a fixed piece of work, whoever does it
BLOCK = 4_096
# Slices of threads begin at multiples of this many elements, so that the vector loop and its scalar rest,
# which may round differently, meet the same elements for any number of threads.
GRAIN = 1_024
# rows of a table whose gradient is looked for at a time: threads take such blocks in turn, since the rows that a batch
# touches lie close together
TABLE_ROWS = 64
# rows of a Gram matrix in one task of the Newton-Schulz iteration: BLAS packs the same matrix again in each
ROWS = 128
# What is smaller counts as zero in AdamW: the moments of a row that gets no gradient for a thousand steps would fade
# into denormal numbers, with which processors compute slowly (a ten-minute run lost 5 % of its speed). Beside any eps
# in use both are nothing.
TINY, TINY_SQUARE = np.float32(1e-18), np.float32(1e-37)
# Jordan et al. 2024, "Muon": slope at zero as large as possible; singular values end between 0.7 and 1.2
_A, _B, _C = np.float32(3.4445), np.float32(-4.7750), np.float32(2.0315)


@helper
def _slice(n, thread, threads):
    """Where this thread's part of n elements begins and ends: multiples of GRAIN, but for the last end."""
    grains = (n + GRAIN - 1) // GRAIN
    return thread * grains // threads * GRAIN, min((thread + 1) * grains // threads * GRAIN, n)


# --- sum of squares ---


@helper
def _block_squares(x):
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        total += value * value
    return total


@kernel
def _partial_squares(partial, x, threads):
    """Write the sum of squares of block b of x (N,) to partial (blocks,) float64. Parallel over b."""
    blocks = partial.shape[0]
    for th in prange(threads):
        for b in range(th * blocks // threads, (th + 1) * blocks // threads):
            partial[b] = _block_squares(x[b * BLOCK : min((b + 1) * BLOCK, x.shape[0])])


@serial_kernel
def _small_squares(x):
    total = 0.0
    for b in range((x.shape[0] + BLOCK - 1) // BLOCK):
        total += _block_squares(x[b * BLOCK : min((b + 1) * BLOCK, x.shape[0])])
    return total


def sum_of_squares(x: np.ndarray) -> float:
    """Sum of x**2 over all elements of a C-contiguous float32 array of any shape, accumulated in float64.

    The same for any number of threads. Not finite if an element is not, so the caller checks one number.

    >>> sum_of_squares(np.array([[3.0, 4.0]], np.float32))
    25.0
    """
    _check.array("sum_of_squares", "x", x, (None,) * x.ndim)
    flat = x.reshape(-1)
    if flat.size < SMALL:
        return float(_small_squares(flat))
    partial = np.empty(-(-flat.size // BLOCK), np.float64)
    _partial_squares(partial, flat, numba.get_num_threads())
    return float(partial.sum())  # one thread, one order


# --- AdamW ---


@helper
def _adamw_range(weight, first, second, grad, scale, keep, blend1, beta2, blend2, step_size, root_scale, eps):
    """first (N,), or (0,): the gradient itself takes its place."""
    if first.shape[0] == 0:
        for i in range(weight.shape[0]):
            g = grad[i] * scale
            g = np.float32(0) if abs(g) <= TINY else g
            v = second[i] * beta2 + blend2 * g * g
            v = np.float32(0) if v <= TINY_SQUARE else v
            second[i] = v
            weight[i] = weight[i] * keep - step_size * g / (np.sqrt(v) * root_scale + eps)
        return
    for i in range(weight.shape[0]):
        g = grad[i] * scale
        g = np.float32(0) if abs(g) <= TINY else g
        m = first[i] + blend1 * (g - first[i])
        m = np.float32(0) if abs(m) <= TINY else m
        v = second[i] * beta2 + blend2 * g * g
        v = np.float32(0) if v <= TINY_SQUARE else v
        first[i] = m
        second[i] = v
        weight[i] = weight[i] * keep - step_size * m / (np.sqrt(v) * root_scale + eps)


@kernel
def _adamw(weight, first, second, grad, scale, keep, blend1, beta2, blend2, step_size, root_scale, eps, threads):
    """Step weight, first, second (N,) by grad (N,) in one pass over memory; first may be (0,). Parallel over n."""
    for th in prange(threads):
        lo, hi = _slice(weight.shape[0], th, threads)
        _adamw_range(
            weight[lo:hi], first[lo:hi], second[lo:hi], grad[lo:hi],
            scale, keep, blend1, beta2, blend2, step_size, root_scale, eps,
        )  # fmt: skip


@kernel
def _adamw_rows(
    weight, first, second, grad, bits, scale, keep, blend1, beta2, blend2, step_size, root_scale, eps, threads
):  # fmt: skip
    """As _adamw for the rows of (R, C) where grad is not all zero; first may be (R, 0); bits is grad as int32. Parallel
    over blocks of r.
    """
    blocks = (grad.shape[0] + TABLE_ROWS - 1) // TABLE_ROWS
    for th in prange(threads):
        for b in range(th, blocks, threads):
            for r in range(b * TABLE_ROWS, min((b + 1) * TABLE_ROWS, grad.shape[0])):
                bits_r = bits[r]
                found = np.int32(0)
                for i in range(bits_r.shape[0]):
                    found |= bits_r[i]
                if found & np.int32(0x7FFFFFFF):  # whatever is not 0 or -0
                    _adamw_range(
                        weight[r], first[r], second[r], grad[r],
                        scale, keep, blend1, beta2, blend2, step_size, root_scale, eps,
                    )  # fmt: skip


@serial_kernel
def _small_adamw(weight, first, second, grad, scale, keep, blend1, beta2, blend2, step_size, root_scale, eps):
    _adamw_range(weight, first, second, grad, scale, keep, blend1, beta2, blend2, step_size, root_scale, eps)


def adamw_step(
    weight: np.ndarray,
    first: np.ndarray | None,
    second: np.ndarray,
    grad: np.ndarray,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    scale: float = 1.0,
    lazy: bool = False,
) -> None:
    """One AdamW step, in place, with torch.optim.AdamW's meaning of every number.

    weight, first, second, grad : float32, one shape; first and second are the moments, zeros before step 1; first may
        be None where beta1 is 0: the first moment is then the gradient, and is not kept
    step : number of this step of this tensor, from 1;  lr : learning rate;  decay : decoupled weight decay
    scale : factor of the gradient (the clip)
    lazy : rows (of a tensor with two axes) whose gradient is zero are left as they are, moments too, as
        torch.optim.SparseAdam does with the rows that a batch has not touched
    A gradient or first moment of at most 1e-18 counts as zero, as does a second moment of at most 1e-37.
    Raises ValueError if a shape or dtype is wrong or step < 1. Moves 28 bytes per element, without first 20.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    >>> w, m, v, g = np.ones(1, "f"), np.zeros(1, "f"), np.zeros(1, "f"), np.full(1, 7, "f")
    >>> adamw_step(w, m, v, g, step=1, lr=0.5, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.0)
    >>> float(w[0])
    0.5
    """
    if step < 1:
        raise ValueError(f"adamw_step: step counts from 1, got {step}")
    for name, value in (("weight", weight), ("second", second), ("grad", grad)):
        _check.array("adamw_step", name, value, weight.shape)
    f = np.float32
    if lazy and weight.ndim != 2:
        raise ValueError(f"adamw_step: lazy is for tables (rows, columns), got the shape {weight.shape}")
    if first is not None:
        _check.array("adamw_step", "first", first, weight.shape)
    elif beta1:
        raise ValueError(f"adamw_step: beta1 must be 0 where there is no first moment, got {beta1}")
    else:
        first = np.empty((len(weight), 0) if lazy else 0, f)
    arrays = weight.reshape(-1), first.reshape(-1), second.reshape(-1), grad.reshape(-1)
    scalars = (
        f(scale), f(1 - lr * decay), f(1 - beta1), f(beta2), f(1 - beta2),
        f(lr / (1 - beta1**step)), f(1 / math.sqrt(1 - beta2**step)), f(eps),
    )  # fmt: skip
    if lazy:
        _adamw_rows(weight, first, second, grad, grad.view(np.int32), *scalars, numba.get_num_threads())
    elif weight.size < SMALL:
        _small_adamw(*arrays, *scalars)
    else:
        _adamw(*arrays, *scalars, numba.get_num_threads())


# --- AdamW with one second moment a row ---


@helper
def _adamw_row(weight, first, grad, scale, keep, blend1, step_size, root):
    """As _adamw_range for one row (C,), with the corrected root given; first may be (0,)."""
    if first.shape[0] == 0:
        for i in range(weight.shape[0]):
            weight[i] = weight[i] * keep - step_size * (grad[i] * scale) / root
        return
    for i in range(weight.shape[0]):
        m = first[i] + blend1 * (grad[i] * scale - first[i])
        m = np.float32(0) if abs(m) <= TINY else m
        first[i] = m
        weight[i] = weight[i] * keep - step_size * m / root


@kernel
def _adamw_by_rows(weight, first, second, steps, grad, scale, keep, beta1, beta2, lr, eps, threads):
    """Step the rows of weight (R, C), first (R, C) or (R, 0), second (R,) and steps (R,) int64 where grad (R, C) is not
    all zero. What is one number a row is computed in float64. Parallel over blocks of r.
    """
    blocks = (grad.shape[0] + TABLE_ROWS - 1) // TABLE_ROWS
    for th in prange(threads):
        for b in range(th, blocks, threads):
            for r in range(b * TABLE_ROWS, min((b + 1) * TABLE_ROWS, grad.shape[0])):
                squares = _block_squares(grad[r])
                if squares == 0:  # no square of a float32 is 0 in float64, but 0's
                    continue
                steps[r] += 1
                v = beta2 * second[r] + (1 - beta2) * (scale * scale * squares / grad.shape[1])
                second[r] = np.float32(v)
                root = math.sqrt(v / (1 - beta2 ** steps[r])) + eps
                _adamw_row(
                    weight[r], first[r], grad[r], np.float32(scale), np.float32(keep), np.float32(1 - beta1),
                    np.float32(lr / (1 - beta1 ** steps[r])), np.float32(root),
                )  # fmt: skip


def adamw_rows_step(
    weight: np.ndarray,
    first: np.ndarray | None,
    second: np.ndarray,
    steps: np.ndarray,
    grad: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    scale: float = 1.0,
) -> None:
    """One step, in place, of a table whose every row has an AdamW of its own, with one second moment for the row.

    weight, first, grad : (R, C) float32; first may be None where beta1 is 0, as in adamw_step
    second : (R,) float32, the moving average of the mean square of the row's gradient, zeros before step 1
    steps : (R,) int64, the steps that each row has had, zeros before step 1: bias correction counts those
    lr, beta1, beta2, eps, decay, scale : as in adamw_step
    Rows whose gradient is zero are left as they are, their moments and steps too.
    Raises ValueError if a shape or dtype is wrong, or steps are negative. Moves 12 bytes per element that is stepped,
    with first 20.
    Source: Zhang et al. 2024, "Adam-mini", arXiv:2406.16793: one second moment, a mean of squares, for a block of
    parameters. That every row of a table is one, with a count of its own steps, is ours.

    >>> w, v, n, g = np.ones((2, 1), "f"), np.zeros(2, "f"), np.zeros(2, int), np.array([[7], [0]], "f")
    >>> adamw_rows_step(w, None, v, n, g, lr=0.5, beta1=0.0, beta2=0.95, eps=1e-8, decay=0.0)
    >>> w.ravel().tolist(), n.tolist()
    ([0.5, 1.0], [1, 0])
    """
    _check.array("adamw_rows_step", "weight", weight, (None, None))
    _check.array("adamw_rows_step", "second", second, weight.shape[:1])
    _check.array("adamw_rows_step", "steps", steps, weight.shape[:1], np.int64)
    _check.array("adamw_rows_step", "grad", grad, weight.shape)
    if steps.min(initial=0) < 0:
        raise ValueError(f"adamw_rows_step: steps must be 0 or more, got {steps.min()}")
    if first is not None:
        _check.array("adamw_rows_step", "first", first, weight.shape)
    elif beta1:
        raise ValueError(f"adamw_rows_step: beta1 must be 0 where there is no first moment, got {beta1}")
    else:
        first = np.empty((len(weight), 0), np.float32)
    if weight.size:
        scalars = float(scale), 1.0 - lr * decay, float(beta1), float(beta2), float(lr), float(eps)
        _adamw_by_rows(weight, first, second, steps, grad, *scalars, numba.get_num_threads())


# --- moving average of the weights ---


@helper
def _ema_range(average, value, blend):
    for i in range(average.shape[0]):
        average[i] += blend * (value[i] - average[i])


@kernel
def _ema(average, value, blend, threads):
    """average (N,) += blend * (value (N,) - average). Parallel over n."""
    for th in prange(threads):
        lo, hi = _slice(average.shape[0], th, threads)
        _ema_range(average[lo:hi], value[lo:hi], blend)


@serial_kernel
def _small_ema(average, value, blend):
    _ema_range(average, value, blend)


def ema_update(average: np.ndarray, value: np.ndarray, decay: float) -> None:
    """average += (1 - decay) * (value - average), in place; float32 arrays of one shape, decay in [0, 1].

    Raises ValueError if a shape or dtype is wrong.

    >>> average = np.zeros(1, np.float32)
    >>> ema_update(average, np.ones(1, np.float32), 0.75)
    >>> float(average[0])
    0.25
    """
    _check.array("ema_update", "average", average, average.shape)
    _check.array("ema_update", "value", value, average.shape)
    blend = np.float32(1 - decay)
    if average.size < SMALL:
        _small_ema(average.reshape(-1), value.reshape(-1), blend)
    else:
        _ema(average.reshape(-1), value.reshape(-1), blend, numba.get_num_threads())


# --- NorMuon ---


@serial_kernel
def _normuon_start(x, momentum, grad, scale, beta, blend, nesterov):
    """Step momentum (m, n) by grad (m, n); write the direction over its Frobenius norm to x (m, n)."""
    before = flush_denormals()  # the momentum of a unit that is dead fades by beta a step
    total = 0.0
    for i in range(x.shape[0]):
        x_i, momentum_i, grad_i = x[i], momentum[i], grad[i]
        for j in range(x_i.shape[0]):
            g = grad_i[j] * scale
            mean = momentum_i[j] + blend * (g - momentum_i[j])
            momentum_i[j] = mean
            u = g + beta * (mean - g) if nesterov else mean
            x_i[j] = u
        total += _block_squares(x_i)
    inverse = np.float32(1 / (math.sqrt(total) + 1e-7))
    for i in range(x.shape[0]):
        x_i = x[i]
        for j in range(x_i.shape[0]):
            x_i[j] *= inverse
    restore_denormals(before)


@helper
def _gram_task(gram, x, lo, hi, blas):
    """Rows lo:hi of the symmetric gram (s, s), from the diagonal on, and their mirror image.

    x (m, n) is used on its smaller side: gram = x x^T, or x^T x where m > n.
    """
    if x.shape[0] > x.shape[1]:
        gemm_tn(blas, gram[lo:hi, lo:], x[:, lo:hi], x[:, lo:], np.float32(0))
    else:
        gemm_nt(blas, gram[lo:hi, lo:], x[lo:hi], x[lo:], np.float32(0))
    for r in range(hi, gram.shape[0]):
        for c in range(lo, hi):
            gram[r, c] = gram[c, r]


@helper
def _polynomial_task(y, poly, gram, x, lo, hi, blas):
    """Rows lo:hi of y = (aI + b gram + c gram^2) x, or its columns lo:hi from the right where m > n."""
    gemm_nn(blas, poly[lo:hi], gram[lo:hi], gram, np.float32(0))
    for r in range(lo, hi):
        poly_r, gram_r = poly[r], gram[r]
        for c in range(poly_r.shape[0]):
            poly_r[c] = _C * poly_r[c] + _B * gram_r[c]
        poly_r[r] += _A
    if x.shape[0] > x.shape[1]:
        gemm_nt(blas, y[:, lo:hi], x, poly[lo:hi], np.float32(0))  # poly is symmetric
    else:
        gemm_nn(blas, y[lo:hi], poly[lo:hi], x, np.float32(0))


@kernel
def _newton_schulz(x, gram, poly, table, tasks, gram_order, gram_bounds, poly_order, poly_bounds, steps, blas, threads):
    """Iterate all matrices at once; the result is in x[steps % 2].

    x (2, sum of m * n), gram and poly (sum of s * s,): the matrices one after another, s = min(m, n)
    table (matrices, 4) int64: m, n, offset in x, offset in gram
    tasks (tasks, 3) int64: matrix, first row, end row of its Gram matrix
    Thread th does the tasks order[bounds[th]:bounds[th + 1]]. Two regions a step, since a Gram matrix needs
    all of x, and a row of the polynomial all of the Gram matrix.
    """
    for step in range(steps):
        old = x[step % 2]
        new = x[(step + 1) % 2]
        for th in prange(threads):
            before = flush_denormals()
            for k in range(gram_bounds[th], gram_bounds[th + 1]):
                task = tasks[gram_order[k]]
                m, n, at, at_gram = table[task[0]]
                s = min(m, n)
                _gram_task(
                    gram[at_gram : at_gram + s * s].reshape(s, s),
                    old[at : at + m * n].reshape(m, n),
                    task[1], task[2], blas,
                )  # fmt: skip
            restore_denormals(before)
        for th in prange(threads):
            before = flush_denormals()
            for k in range(poly_bounds[th], poly_bounds[th + 1]):
                task = tasks[poly_order[k]]
                m, n, at, at_gram = table[task[0]]
                s = min(m, n)
                _polynomial_task(
                    new[at : at + m * n].reshape(m, n),
                    poly[at_gram : at_gram + s * s].reshape(s, s),
                    gram[at_gram : at_gram + s * s].reshape(s, s),
                    old[at : at + m * n].reshape(m, n),
                    task[1], task[2], blas,
                )  # fmt: skip
            restore_denormals(before)


@serial_kernel
def _normuon_finish(weight, second, row_scale, o, lr, keep, beta2, eps, update_rms):
    """Step second (m,) by the rows' mean squares of o (m, n), and weight (m, n) by o with its rows normed.

    row_scale (m,) float64 is scratch. update_rms < 0: the update has the norm of o times sqrt(max(1, m / n)).
    """
    m, n = o.shape
    control = flush_denormals()
    before, after = 0.0, 0.0
    for i in range(m):
        squares = _block_squares(o[i])
        second[i] += (1 - beta2) * (squares / n - second[i])
        row_scale[i] = 1 / (math.sqrt(second[i]) + eps)
        before += squares
        after += squares * row_scale[i] * row_scale[i]
    size = update_rms * math.sqrt(m * n) if update_rms >= 0 else math.sqrt(before * max(1.0, m / n))
    factor = lr * size / (math.sqrt(after) + eps)
    for i in range(m):
        weight_i, o_i = weight[i], o[i]
        row_factor = np.float32(factor * row_scale[i])
        for j in range(n):
            weight_i[j] = weight_i[j] * keep - row_factor * o_i[j]
    restore_denormals(control)


def _share_out(costs: np.ndarray, threads: int) -> tuple[np.ndarray, np.ndarray]:
    """Longest task first to the least busy thread: order (tasks,) and bounds (threads + 1,), int64."""
    mine: list[list[int]] = [[] for _ in range(threads)]
    busy = [0.0] * threads
    for task in np.argsort(-costs, kind="stable"):
        th = busy.index(min(busy))
        mine[th].append(int(task))
        busy[th] += float(costs[task])
    order = np.array([task for part in mine for task in part], np.int64)
    return order, np.cumsum([0] + [len(part) for part in mine]).astype(np.int64)


class NorMuonWorkspace:
    """Scratch and work plan of normuon_step for matrices of these shapes, allocated once.

    shapes : (m, n) of every matrix, in order
    Holds 8 bytes per element, and 8 per element of the Gram matrices (256 x 256 for 683 x 256).
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        for shape in shapes:
            if len(shape) != 2:
                raise ValueError(f"NorMuonWorkspace: NorMuon takes matrices (m, n), got a tensor of shape {shape}")
        self.shapes = [(int(m), int(n)) for m, n in shapes]
        sides = np.array([min(shape) for shape in self.shapes], np.int64)
        sizes = np.array([m * n for m, n in self.shapes], np.int64)
        offsets = np.cumsum(sizes) - sizes
        gram_offsets = np.cumsum(sides**2) - sides**2
        self.table = np.empty((len(self.shapes), 4), np.int64)
        for i, (m, n) in enumerate(self.shapes):
            self.table[i] = m, n, offsets[i], gram_offsets[i]
        tasks = [(i, lo, min(lo + ROWS, int(side))) for i, side in enumerate(sides) for lo in range(0, int(side), ROWS)]
        self.tasks = np.array(tasks, np.int64).reshape(-1, 3)
        side, lo, hi = sides[self.tasks[:, 0]], self.tasks[:, 1], self.tasks[:, 2]
        long_side = np.array([max(shape) for shape in self.shapes], np.int64)[self.tasks[:, 0]]
        # multiply-adds
        self._gram_costs = (hi - lo) * (side - lo) * long_side
        self._poly_costs = (hi - lo) * side * (side + long_side)
        self._plans: dict[int, tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = {}
        self.x = np.zeros((2, int(sizes.sum())), np.float32)
        self.gram = np.zeros(int((sides**2).sum()), np.float32)
        self.poly = np.zeros_like(self.gram)
        self.row_scale = np.zeros(max([m for m, _ in self.shapes], default=0), np.float64)

    def plan(self, threads: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Order and bounds of the Gram tasks and of the polynomial's, for this many threads."""
        if threads not in self._plans:
            self._plans[threads] = (
                *_share_out(self._gram_costs, threads),
                *_share_out(self._poly_costs, threads),
            )
        return self._plans[threads]

    def matrix(self, i: int, buffer: int) -> np.ndarray:
        """Matrix i of one of the two buffers, (m, n) float32, a view."""
        m, n, at, _ = (int(value) for value in self.table[i])
        return self.x[buffer, at : at + m * n].reshape(m, n)


def normuon_step(
    weights: Sequence[np.ndarray],
    momenta: Sequence[np.ndarray],
    seconds: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    *,
    lr: float,
    momentum: float,
    beta2: float,
    eps: float,
    nesterov: bool,
    update_rms: float | None,
    decay: float = 0.0,
    steps: int = 5,
    scale: float = 1.0,
    workspace: NorMuonWorkspace | None = None,
) -> None:
    """One NorMuon step of every matrix, in place: momentum, Newton-Schulz, norm of every row, update.

    weights, momenta, grads : (m, n) float32 each;  seconds : (m,) float32 each, second moment of the rows of
        the orthogonalised direction;  momenta and seconds are zeros before the first step
    update_rms : root mean square of the update before lr; None: the update has the Frobenius norm of the
        orthogonalised direction, times sqrt(max(1, m / n))
    decay : decoupled weight decay;  steps : of the Newton-Schulz iteration;  scale : factor of the gradients
    workspace : of these shapes; made for this call where it is None
    On x86 numbers below 1.2e-38 count as zero on the way.
    Raises ValueError if a shape or dtype is wrong.
    Cost per matrix of smaller side s and larger side l: steps * (3 s s l + 2 s s s) flop.
    Source: Li et al. 2025, arXiv:2510.05491, algorithm 1, and the authors' repository.
    """
    workspace = workspace or NorMuonWorkspace([weight.shape for weight in weights])
    if not len(weights) == len(momenta) == len(seconds) == len(grads) == len(workspace.shapes):
        raise ValueError(
            f"normuon_step: the workspace is for {len(workspace.shapes)} matrices, got {len(weights)} "
            f"weights, {len(momenta)} momenta, {len(seconds)} seconds and {len(grads)} grads"
        )
    for i, shape in enumerate(workspace.shapes):
        _check.array("normuon_step", f"weights[{i}]", weights[i], shape)
        _check.array("normuon_step", f"momenta[{i}]", momenta[i], shape)
        _check.array("normuon_step", f"seconds[{i}]", seconds[i], shape[:1])
        _check.array("normuon_step", f"grads[{i}]", grads[i], shape)
    f = np.float32
    # Start and finish are a few passes over memory, about a fiftieth of the Newton-Schulz products: serial.
    for i in range(len(weights)):
        _normuon_start(workspace.matrix(i, 0), momenta[i], grads[i], f(scale), f(momentum), f(1 - momentum), nesterov)
    threads = numba.get_num_threads()
    _newton_schulz(
        workspace.x, workspace.gram, workspace.poly, workspace.table, workspace.tasks,
        *workspace.plan(threads), steps, sgemm_address(), threads,
    )  # fmt: skip
    rms = -1.0 if update_rms is None else update_rms
    for i in range(len(weights)):
        if weights[i].size:
            _normuon_finish(
                weights[i], seconds[i], workspace.row_scale, workspace.matrix(i, steps % 2),
                lr, f(1 - lr * decay), beta2, eps, rms,
            )  # fmt: skip
