"""NorMuon: momentum that is orthogonalised by the Newton-Schulz iteration and normalised per row.

The work is divided into fixed tasks, so the results are the same, bit for bit, for up to four threads. More threads get
smaller tasks, and BLAS may then round differently.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._blas import gemm_nn, gemm_nt, gemm_tn, sgemm_address
from flashlm_numba.kernels._elementwise import sum_squares
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel, view
from flashlm_numba.kernels._math import flush_denormals, restore_denormals

# rows of a Gram matrix in one task of the Newton-Schulz iteration, for up to so many threads: BLAS packs the same
# matrix again in each, so fewer rows take longer
ROWS = {4: 128, 8: 64, 16: 32}
LEAST_ROWS = 16
# Jordan et al. 2024, "Muon": slope at zero as large as possible; singular values end between 0.7 and 1.2
_A, _B, _C = np.float32(3.4445), np.float32(-4.7750), np.float32(2.0315)


class NorMuonRule(NamedTuple):
    """Hyperparameters of the update rule, which are the same at every step."""

    momentum: float  # share of the momentum that a step keeps
    beta2: float  # share of the rows' second moment that a step keeps
    eps: float  # added to the root of the second moment and to the update's norm
    nesterov: bool  # direction: gradient and momentum blended, or the momentum
    update_rms: float | None  # root mean square of the update before lr; None: the update has the Frobenius norm of
    # the orthogonalised direction, times sqrt(max(1, m / n))
    weight_decay: float = 0.0  # decoupled weight decay
    iterations: int = 5  # Newton-Schulz iterations per step


class Layout(NamedTuple):
    """M matrices (m, n), stored consecutively, and the K tasks of a Newton-Schulz iteration; int64."""

    rows: np.ndarray  # (M,) m
    columns: np.ndarray  # (M,) n
    offsets: np.ndarray  # (M,) of the matrix in x
    gram_offsets: np.ndarray  # (M,) of its Gram matrix (s, s), s = min(m, n)
    task_matrix: np.ndarray  # (K,) the matrix of the task
    task_start: np.ndarray  # (K,) first row of the matrix's Gram matrix
    task_end: np.ndarray  # (K,) end of these rows


def task_rows(threads: int) -> int:
    """Rows of a task for so many threads."""
    return next((rows for most, rows in ROWS.items() if threads <= most), LEAST_ROWS)


class Shares(NamedTuple):
    """The tasks of each thread: thread th does order[bounds[th]:bounds[th + 1]]; int64."""

    gram_order: np.ndarray  # (K,) tasks of the Gram matrices
    gram_bounds: np.ndarray  # (threads + 1,)
    poly_order: np.ndarray  # (K,) tasks of the polynomials
    poly_bounds: np.ndarray  # (threads + 1,)


@serial_kernel
def _normuon_start(x, exp_avg, grad, scale, beta, blend, nesterov):
    """Step the momentum exp_avg (m, n) by grad (m, n); write the direction over its Frobenius norm to x (m, n)."""
    before = flush_denormals()  # the momentum of a unit that is dead fades by beta a step
    total = 0.0
    for i in range(x.shape[0]):
        x_i, exp_avg_i, grad_i = x[i], exp_avg[i], grad[i]
        for j in range(x_i.shape[0]):
            g = grad_i[j] * scale
            mean = exp_avg_i[j] + blend * (g - exp_avg_i[j])
            exp_avg_i[j] = mean
            u = g + beta * (mean - g) if nesterov else mean
            x_i[j] = u
        total += sum_squares(x_i)
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


@view
def _matrix(x, layout, i):
    """Matrix i of x, a view (m, n)."""
    at, m, n = layout.offsets[i], layout.rows[i], layout.columns[i]
    return x[at : at + m * n].reshape(m, n)


@view
def _square(gram, layout, i):
    """The Gram matrix, or polynomial, of matrix i: a view (s, s)."""
    at, s = layout.gram_offsets[i], min(layout.rows[i], layout.columns[i])
    return gram[at : at + s * s].reshape(s, s)


@helper
def _gram_thread(gram, x, layout, shares, blas, th):
    """The thread's tasks of the Gram matrices of x."""
    before = flush_denormals()
    for k in range(shares.gram_bounds[th], shares.gram_bounds[th + 1]):
        task = shares.gram_order[k]
        i, lo, hi = layout.task_matrix[task], layout.task_start[task], layout.task_end[task]
        _gram_task(_square(gram, layout, i), _matrix(x, layout, i), lo, hi, blas)
    restore_denormals(before)


@helper
def _polynomial_thread(y, poly, gram, x, layout, shares, blas, th):
    """The thread's tasks of y from gram and x."""
    before = flush_denormals()
    for k in range(shares.poly_bounds[th], shares.poly_bounds[th + 1]):
        task = shares.poly_order[k]
        i, lo, hi = layout.task_matrix[task], layout.task_start[task], layout.task_end[task]
        poly_i, gram_i = _square(poly, layout, i), _square(gram, layout, i)
        _polynomial_task(_matrix(y, layout, i), poly_i, gram_i, _matrix(x, layout, i), lo, hi, blas)
    restore_denormals(before)


@helper
def _half_thread(half, x, gram, poly, layout, shares, blas, th):
    """The thread's part of half an iteration: of the Gram matrices of the old x, then of the polynomials, the new x."""
    old, new = x[half // 2 % 2], x[(half // 2 + 1) % 2]
    if half % 2 == 0:
        _gram_thread(gram, old, layout, shares, blas, th)
    else:
        _polynomial_thread(new, poly, gram, old, layout, shares, blas, th)


@kernel
def _newton_schulz(x, gram, poly, layout, shares, iterations, blas, threads):
    """Iterate all matrices at once; the result is in x[iterations % 2].

    x (2, sum of m * n), gram and poly (sum of s * s,): the matrices one after another, s = min(m, n)
    Two regions per iteration, since a Gram matrix needs all of x, and a row of the polynomial all of the Gram matrix.
    They are one prange in a loop: Numba would fuse two that follow one another (see _jit.py).
    """
    for half in range(2 * iterations):
        for th in prange(threads):
            _half_thread(half, x, gram, poly, layout, shares, blas, np.int64(th))


@serial_kernel
def _normuon_finish(weight, exp_avg_sq, row_scale, o, lr, keep, beta2, eps, update_rms):
    """Step exp_avg_sq (m,) by the rows' mean squares of o (m, n), and weight (m, n) by o with its rows normed.

    row_scale (m,) float64 is scratch. update_rms < 0: the update has the norm of o times sqrt(max(1, m / n)).
    """
    m, n = o.shape
    control = flush_denormals()
    before, after = 0.0, 0.0
    for i in range(m):
        squares = sum_squares(o[i])
        exp_avg_sq[i] += (1 - beta2) * (squares / n - exp_avg_sq[i])
        row_scale[i] = 1 / (math.sqrt(exp_avg_sq[i]) + eps)
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


class Plan(NamedTuple):
    """The tasks for a number of threads, with their costs in multiply-adds."""

    layout: Layout
    shares: Shares
    gram_costs: np.ndarray  # (K,) int64
    poly_costs: np.ndarray


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
    """Scratch and task plan of normuon_step for matrices of these shapes, allocated once.

    shapes : (m, n) of every matrix, in order
    It takes 8 bytes per element, and 8 per element of the Gram matrices (256 x 256 for 683 x 256).
    """

    def __init__(self, shapes: Sequence[tuple[int, ...]]) -> None:
        for shape in shapes:
            if len(shape) != 2:
                raise ValueError(f"NorMuonWorkspace: NorMuon takes matrices (m, n), got a tensor of shape {shape}")
        self.shapes = [(int(m), int(n)) for m, n in shapes]
        rows, columns = np.array(self.shapes, np.int64).reshape(-1, 2).T.copy()
        self._sides, sizes = np.minimum(rows, columns), rows * columns
        offsets, gram_offsets = np.cumsum(sizes) - sizes, np.cumsum(self._sides**2) - self._sides**2
        self._matrices = rows, columns, offsets, gram_offsets
        self._plans: dict[int, Plan] = {}
        self.x = np.zeros((2, int(sizes.sum())), np.float32)
        self.gram = np.zeros(int((self._sides**2).sum()), np.float32)
        self.poly = np.zeros_like(self.gram)
        self.row_scale = np.zeros(int(rows.max(initial=0)), np.float64)

    def plan(self, threads: int) -> Plan:
        """The tasks of each of so many threads."""
        if threads not in self._plans:
            step, (rows, columns, *_) = task_rows(threads), self._matrices
            tasks = [
                (i, first, min(first + step, int(side)))
                for i, side in enumerate(self._sides)
                for first in range(0, int(side), step)
            ]
            matrix, start, end = np.array(tasks, np.int64).reshape(-1, 3).T.copy()
            side, long_side = self._sides[matrix], np.maximum(rows, columns)[matrix]
            gram_costs = (end - start) * (side - start) * long_side
            poly_costs = (end - start) * side * (side + long_side)
            shares = Shares(*_share_out(gram_costs, threads), *_share_out(poly_costs, threads))
            self._plans[threads] = Plan(Layout(*self._matrices, matrix, start, end), shares, gram_costs, poly_costs)
        return self._plans[threads]

    def matrix(self, i: int, buffer: int) -> np.ndarray:
        """Matrix i of one of the two buffers, (m, n) float32, a view."""
        (m, n), at = self.shapes[i], int(self._matrices[2][i])
        return self.x[buffer, at : at + m * n].reshape(m, n)


def normuon_step(
    weights: Sequence[np.ndarray],
    exp_avgs: Sequence[np.ndarray],
    exp_avg_sqs: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    rule: NorMuonRule,
    *,
    lr: float,
    scale: float = 1.0,
    workspace: NorMuonWorkspace | None = None,
) -> None:
    """Do one NorMuon step in place for every matrix: momentum, Newton-Schulz, row normalisation, update.

    weights, exp_avgs, grads : (m, n) float32 each; exp_avgs are the momenta
    exp_avg_sqs : (m,) float32 each, second moments of the rows of the orthogonalised momentum
    exp_avgs and exp_avg_sqs are zeros before the first step.
    lr : learning rate;  scale : factor for the gradients (from clipping)
    workspace : workspace for these shapes; None: allocate one for this call
    On x86, intermediate numbers below 1.2e-38 count as zero.
    Raises ValueError if a shape or dtype is wrong.
    Cost per matrix of smaller side s and larger side l: iterations * (3 s s l + 2 s s s) flop.
    Source: Li et al. 2025, arXiv:2510.05491, algorithm 1, and the authors' repository.

    >>> rule = NorMuonRule(momentum=0.95, beta2=0.95, eps=1e-10, nesterov=True, update_rms=0.2)
    >>> w, m, v, g = np.zeros((1, 4), "f"), np.zeros((1, 4), "f"), np.zeros(1, "f"), np.ones((1, 4), "f")
    >>> normuon_step([w], [m], [v], [g], rule, lr=0.5)
    >>> print(w.round(4))
    [[-0.1 -0.1 -0.1 -0.1]]
    """
    workspace = workspace or NorMuonWorkspace([weight.shape for weight in weights])
    if not len(weights) == len(exp_avgs) == len(exp_avg_sqs) == len(grads) == len(workspace.shapes):
        raise ValueError(
            f"normuon_step: the workspace is for {len(workspace.shapes)} matrices, got {len(weights)} "
            f"weights, {len(exp_avgs)} exp_avgs, {len(exp_avg_sqs)} exp_avg_sqs and {len(grads)} grads"
        )
    for i, shape in enumerate(workspace.shapes):
        _check.array("normuon_step", f"weights[{i}]", weights[i], shape)
        _check.array("normuon_step", f"exp_avgs[{i}]", exp_avgs[i], shape)
        _check.array("normuon_step", f"exp_avg_sqs[{i}]", exp_avg_sqs[i], shape[:1])
        _check.array("normuon_step", f"grads[{i}]", grads[i], shape)
    f = np.float32
    # Start and finish are a few passes over memory, about a fiftieth of the Newton-Schulz products: serial.
    beta, blend = f(rule.momentum), f(1 - rule.momentum)
    for i in range(len(weights)):
        _normuon_start(workspace.matrix(i, 0), exp_avgs[i], grads[i], f(scale), beta, blend, rule.nesterov)
    threads = numba.get_num_threads()
    plan, scratch = workspace.plan(threads), (workspace.x, workspace.gram, workspace.poly)
    _newton_schulz(*scratch, plan.layout, plan.shares, rule.iterations, sgemm_address(), threads)
    keep = f(1 - lr * rule.weight_decay)
    update_rms = -1.0 if rule.update_rms is None else rule.update_rms
    for i in range(len(weights)):
        if weights[i].size:
            o = workspace.matrix(i, rule.iterations % 2)
            _normuon_finish(
                weights[i], exp_avg_sqs[i], workspace.row_scale, o, lr, keep, rule.beta2, rule.eps, update_rms
            )
