"""AdamW for a tensor, for the rows of a table that have a gradient, and with one second moment per row.

All results are the same, bit for bit, for any number of threads.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._elementwise import SMALL, sum_squares, thread_share
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel

# rows of a table per task: threads take tasks in turn, since the rows that a batch touches lie close together
TABLE_ROWS = 64
# What is smaller counts as zero: the moments of a row that gets no gradient for a thousand steps would fade into
# denormal numbers, with which processors compute slowly (a ten-minute run lost 5 % of its speed). Beside any eps in
# use both are nothing.
TINY, TINY_SQUARE = np.float32(1e-18), np.float32(1e-37)


class AdamWStep(NamedTuple):
    """Numbers of one step of a tensor, float32."""

    scale: np.float32  # factor of the gradient
    keep: np.float32  # factor of the weight: 1 - lr * weight_decay
    blend1: np.float32  # 1 - beta1
    beta2: np.float32  # share of the second moment that a step keeps
    blend2: np.float32  # 1 - beta2
    step_size: np.float32  # lr / (1 - beta1**step)
    root_scale: np.float32  # 1 / sqrt(1 - beta2**step)
    eps: np.float32  # added to the corrected root of the second moment


class RowwiseStep(NamedTuple):
    """Numbers of one step of a table whose rows count their own steps, float64."""

    scale: float  # factor of the gradient
    keep: float  # factor of the weight: 1 - lr * weight_decay
    beta1: float  # share of the first moment that a step keeps
    beta2: float  # share of the second moment that a step keeps
    lr: float  # learning rate
    eps: float  # added to the corrected root of the second moment


# --- one second moment per element ---


@helper
def _adamw_range(weight, exp_avg, exp_avg_sq, grad, step):
    """Step weight and moments (N,) by grad (N,). exp_avg may be (0,): the gradient itself takes its place."""
    if exp_avg.shape[0] == 0:
        for i in range(weight.shape[0]):
            g = grad[i] * step.scale
            g = np.float32(0) if abs(g) <= TINY else g
            v = exp_avg_sq[i] * step.beta2 + step.blend2 * g * g
            v = np.float32(0) if v <= TINY_SQUARE else v
            exp_avg_sq[i] = v
            weight[i] = weight[i] * step.keep - step.step_size * g / (np.sqrt(v) * step.root_scale + step.eps)
        return
    for i in range(weight.shape[0]):
        g = grad[i] * step.scale
        g = np.float32(0) if abs(g) <= TINY else g
        m = exp_avg[i] + step.blend1 * (g - exp_avg[i])
        m = np.float32(0) if abs(m) <= TINY else m
        v = exp_avg_sq[i] * step.beta2 + step.blend2 * g * g
        v = np.float32(0) if v <= TINY_SQUARE else v
        exp_avg[i] = m
        exp_avg_sq[i] = v
        weight[i] = weight[i] * step.keep - step.step_size * m / (np.sqrt(v) * step.root_scale + step.eps)


@kernel
def _adamw(weight, exp_avg, exp_avg_sq, grad, step, threads):
    """As _adamw_range, in one pass over memory. Parallel over n."""
    for th in prange(threads):
        lo, hi = thread_share(weight.shape[0], th, threads)
        _adamw_range(weight[lo:hi], exp_avg[lo:hi], exp_avg_sq[lo:hi], grad[lo:hi], step)


@serial_kernel
def _small_adamw(weight, exp_avg, exp_avg_sq, grad, step):
    _adamw_range(weight, exp_avg, exp_avg_sq, grad, step)


@helper
def _has_gradient(bits):
    """Whether a float32 of a row is neither 0 nor -0; bits (C,) is the row as int32."""
    found = np.int32(0)
    for i in range(bits.shape[0]):
        found |= bits[i]
    return found & np.int32(0x7FFFFFFF) != 0


@kernel
def _sparse_adamw(weight, exp_avg, exp_avg_sq, grad, bits, step, threads):
    """As _adamw_range for the rows of (R, C) that have a gradient; exp_avg may be (R, 0); bits is grad as int32.
    Parallel over tasks of rows.
    """
    tasks = (grad.shape[0] + TABLE_ROWS - 1) // TABLE_ROWS
    for th in prange(threads):
        for task in range(th, tasks, threads):
            for r in range(task * TABLE_ROWS, min((task + 1) * TABLE_ROWS, grad.shape[0])):
                if _has_gradient(bits[r]):
                    _adamw_range(weight[r], exp_avg[r], exp_avg_sq[r], grad[r], step)


def adamw_step(
    weight: np.ndarray,
    exp_avg: np.ndarray | None,
    exp_avg_sq: np.ndarray,
    grad: np.ndarray,
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
    sparse: bool = False,
) -> None:
    """Do one AdamW step in place. All hyperparameters are defined as in torch.optim.AdamW.

    weight, exp_avg, exp_avg_sq, grad : float32, of one shape; the moments exp_avg and exp_avg_sq are zeros before step
        1. If beta1 is 0, exp_avg may be None; the gradient is then the first moment, which is not stored.
    step : number of this step of this tensor, from 1;  lr : learning rate;  weight_decay : decoupled
    scale : factor for the gradient (from clipping)
    sparse : skip rows of a 2-D tensor whose gradient is zero, and their moments, as torch.optim.SparseAdam does with
        rows that are not in a batch
    A gradient or first moment of at most 1e-18 counts as zero, and so does a second moment of at most 1e-37.
    Raises ValueError if a shape or dtype is wrong or step < 1. Moves 28 bytes per element, 20 without exp_avg.
    Source: Loshchilov & Hutter 2019, arXiv:1711.05101, algorithm 2.

    >>> w, m, v, g = np.ones(1, "f"), np.zeros(1, "f"), np.zeros(1, "f"), np.full(1, 7, "f")
    >>> adamw_step(w, m, v, g, step=1, lr=0.5, beta1=0.9, beta2=0.95, eps=1e-8, weight_decay=0.0)
    >>> float(w[0])
    0.5
    """
    if step < 1:
        raise ValueError(f"adamw_step: step counts from 1, got {step}")
    for name, value in (("weight", weight), ("exp_avg_sq", exp_avg_sq), ("grad", grad)):
        _check.array("adamw_step", name, value, weight.shape)
    if sparse and weight.ndim != 2:
        raise ValueError(f"adamw_step: sparse is for tables (rows, columns), got the shape {weight.shape}")
    if exp_avg is not None:
        _check.array("adamw_step", "exp_avg", exp_avg, weight.shape)
    elif beta1:
        raise ValueError(f"adamw_step: beta1 must be 0 where there is no exp_avg, got {beta1}")
    else:
        exp_avg = np.empty((len(weight), 0) if sparse else 0, np.float32)
    f = np.float32
    numbers = AdamWStep(
        scale=f(scale),
        keep=f(1 - lr * weight_decay),
        blend1=f(1 - beta1),
        beta2=f(beta2),
        blend2=f(1 - beta2),
        step_size=f(lr / (1 - beta1**step)),
        root_scale=f(1 / math.sqrt(1 - beta2**step)),
        eps=f(eps),
    )
    if sparse:
        _sparse_adamw(weight, exp_avg, exp_avg_sq, grad, grad.view(np.int32), numbers, numba.get_num_threads())
        return
    flat = weight.reshape(-1), exp_avg.reshape(-1), exp_avg_sq.reshape(-1), grad.reshape(-1)
    if weight.size < SMALL:
        _small_adamw(*flat, numbers)
    else:
        _adamw(*flat, numbers, numba.get_num_threads())


# --- one second moment per row ---


@helper
def _scaled_row(weight, exp_avg, grad, scale, keep, blend1, step_size, root):
    """As _adamw_range for one row (C,), with the corrected root given; exp_avg may be (0,)."""
    if exp_avg.shape[0] == 0:
        for i in range(weight.shape[0]):
            weight[i] = weight[i] * keep - step_size * (grad[i] * scale) / root
        return
    for i in range(weight.shape[0]):
        m = exp_avg[i] + blend1 * (grad[i] * scale - exp_avg[i])
        m = np.float32(0) if abs(m) <= TINY else m
        exp_avg[i] = m
        weight[i] = weight[i] * keep - step_size * m / root


@helper
def _rowwise_row(weight, exp_avg, exp_avg_sq, steps, grad, step, r):
    """Step row r, if it has a gradient; what is one number per row is computed in float64."""
    squares = sum_squares(grad[r])
    if squares == 0:  # no square of a float32 is 0 in float64, but 0's
        return
    steps[r] += 1
    v = step.beta2 * exp_avg_sq[r] + (1 - step.beta2) * (step.scale * step.scale * squares / grad.shape[1])
    exp_avg_sq[r] = np.float32(v)
    root = np.float32(math.sqrt(v / (1 - step.beta2 ** steps[r])) + step.eps)
    step_size = np.float32(step.lr / (1 - step.beta1 ** steps[r]))
    scale, keep, blend1 = np.float32(step.scale), np.float32(step.keep), np.float32(1 - step.beta1)
    _scaled_row(weight[r], exp_avg[r], grad[r], scale, keep, blend1, step_size, root)


@kernel
def _rowwise_adamw(weight, exp_avg, exp_avg_sq, steps, grad, step, threads):
    """Step the rows of weight (R, C), exp_avg (R, C) or (R, 0), exp_avg_sq (R,) and steps (R,) int64 where grad (R, C)
    is not all zero. Parallel over tasks of rows.
    """
    tasks = (grad.shape[0] + TABLE_ROWS - 1) // TABLE_ROWS
    for th in prange(threads):
        for task in range(th, tasks, threads):
            for r in range(task * TABLE_ROWS, min((task + 1) * TABLE_ROWS, grad.shape[0])):
                _rowwise_row(weight, exp_avg, exp_avg_sq, steps, grad, step, r)


def adamw_rowwise_step(
    weight: np.ndarray,
    exp_avg: np.ndarray | None,
    exp_avg_sq: np.ndarray,
    steps: np.ndarray,
    grad: np.ndarray,
    *,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    scale: float = 1.0,
) -> None:
    """Do one step in place for a table with separate AdamW state per row and one second moment per row.

    weight, exp_avg, grad : (R, C) float32; exp_avg may be None where beta1 is 0, as in adamw_step
    exp_avg_sq : (R,) float32, moving average of the mean square of each row's gradient, zeros before step 1
    steps : (R,) int64, number of steps of each row, zeros before step 1; the bias correction uses it
    lr, beta1, beta2, eps, weight_decay, scale : as in adamw_step
    Rows whose gradient is zero do not change, nor do their moments and steps.
    Raises ValueError if a shape or dtype is wrong or steps are negative. Moves 12 bytes per updated element, 20 with
    exp_avg.
    Source: Zhang et al. 2024, "Adam-mini", arXiv:2406.16793, which uses one second moment, a mean of squares, per block
    of parameters. Treating each row of a table as a block with its step count is this project's addition.

    >>> w, v, n, g = np.ones((2, 1), "f"), np.zeros(2, "f"), np.zeros(2, int), np.array([[7], [0]], "f")
    >>> adamw_rowwise_step(w, None, v, n, g, lr=0.5, beta1=0.0, beta2=0.95, eps=1e-8, weight_decay=0.0)
    >>> w.ravel().tolist(), n.tolist()
    ([0.5, 1.0], [1, 0])
    """
    _check.array("adamw_rowwise_step", "weight", weight, (None, None))
    _check.array("adamw_rowwise_step", "exp_avg_sq", exp_avg_sq, weight.shape[:1])
    _check.array("adamw_rowwise_step", "steps", steps, weight.shape[:1], np.int64)
    _check.array("adamw_rowwise_step", "grad", grad, weight.shape)
    if steps.min(initial=0) < 0:
        raise ValueError(f"adamw_rowwise_step: steps must be 0 or more, got {steps.min()}")
    if exp_avg is not None:
        _check.array("adamw_rowwise_step", "exp_avg", exp_avg, weight.shape)
    elif beta1:
        raise ValueError(f"adamw_rowwise_step: beta1 must be 0 where there is no exp_avg, got {beta1}")
    else:
        exp_avg = np.empty((len(weight), 0), np.float32)
    if weight.size:
        numbers = RowwiseStep(
            scale=float(scale),
            keep=1.0 - lr * weight_decay,
            beta1=float(beta1),
            beta2=float(beta2),
            lr=float(lr),
            eps=float(eps),
        )
        _rowwise_adamw(weight, exp_avg, exp_avg_sq, steps, grad, numbers, numba.get_num_threads())
