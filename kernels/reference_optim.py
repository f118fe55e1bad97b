"""NumPy twins of grad_norm.py, adamw.py, normuon.py and ema.py: the specification, in the dtype of the arguments.

float64 arrays give the true values for judging the kernels, float32 arrays the error of plain float32.
Every function changes its first arguments in place, as its kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from flashlm_numba.kernels.normuon import NorMuonRule

# Jordan et al. 2024, "Muon": slope at zero as large as possible; singular values end between 0.7 and 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def sum_of_squares(x: np.ndarray) -> float:
    """Sum of x**2 over all elements, accumulated in float64."""
    return float(np.sum(np.square(x.astype(np.float64))))


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
    """One step of torch.optim.AdamW: decoupled decay, bias correction, eps added to the corrected root.

    exp_avg : None, with beta1 = 0, keeps no first moment.
    sparse : only the rows with a gradient that is not zero take part, as in torch.optim.SparseAdam.
    """
    if sparse:
        rows = (grad != 0).any(axis=1)
        parts = weight[rows], None if exp_avg is None else exp_avg[rows], exp_avg_sq[rows]
        settings = {"step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": weight_decay}
        adamw_step(*parts, grad[rows], **settings, scale=scale)  # type: ignore[arg-type]
        weight[rows], exp_avg_sq[rows] = parts[0], parts[2]
        if exp_avg is not None:
            exp_avg[rows] = parts[1]
        return
    g = grad * scale
    weight *= 1 - lr * weight_decay
    if exp_avg is None:
        exp_avg = g
    else:
        exp_avg += (1 - beta1) * (g - exp_avg)
    exp_avg_sq *= beta2
    exp_avg_sq += (1 - beta2) * g * g
    root = np.sqrt(exp_avg_sq) / math.sqrt(1 - beta2**step) + eps
    weight -= lr / (1 - beta1**step) * exp_avg / root


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
    """adamw_step of each row of a table (R, C) whose gradient is not zero, its step counted in steps (R,) int64.

    exp_avg_sq (R,) takes the mean square over the row in place of each element's square.
    """
    rows = (grad != 0).any(axis=1)
    if not rows.any():
        return
    g = grad[rows] * scale
    steps[rows] += 1
    t = steps[rows, None]
    exp_avg_sq[rows] = beta2 * exp_avg_sq[rows] + (1 - beta2) * np.square(g).mean(axis=1)
    if exp_avg is None:
        mean = g
    else:
        exp_avg[rows] += (1 - beta1) * (g - exp_avg[rows])
        mean = exp_avg[rows]
    root = np.sqrt(exp_avg_sq[rows, None] / (1 - beta2**t)) + eps
    weight[rows] = (1 - lr * weight_decay) * weight[rows] - lr / (1 - beta1**t) * mean / root


def newton_schulz(x: np.ndarray, steps: int) -> np.ndarray:
    """X <- aX + (bA + cA^2) X with A = X X^T, `steps` times, on the smaller side of x (m, n)."""
    a, b, c = NEWTON_SCHULZ
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.T if tall else x


def normuon_step(
    weights: Sequence[np.ndarray],
    exp_avgs: Sequence[np.ndarray],
    exp_avg_sqs: Sequence[np.ndarray],
    grads: Sequence[np.ndarray],
    rule: NorMuonRule,
    *,
    lr: float,
    scale: float = 1.0,
) -> None:
    """One NorMuon step of every matrix (m, n), with its momentum (m, n) and second moment of rows (m,)."""
    for weight, mean, exp_avg_sq, grad in zip(weights, exp_avgs, exp_avg_sqs, grads, strict=True):
        if weight.size == 0:
            continue
        rows, columns = weight.shape
        g = grad * scale
        mean += (1 - rule.momentum) * (g - mean)
        u = g + rule.momentum * (mean - g) if rule.nesterov else mean
        o = newton_schulz(u / (np.linalg.norm(u) + 1e-7), rule.iterations)
        exp_avg_sq += (1 - rule.beta2) * (np.mean(o * o, axis=1) - exp_avg_sq)
        normed = o / (np.sqrt(exp_avg_sq) + rule.eps)[:, None]
        if rule.update_rms is None:
            size = float(np.linalg.norm(o)) * math.sqrt(max(1.0, rows / columns))
        else:
            size = rule.update_rms * math.sqrt(rows * columns)
        weight *= 1 - lr * rule.weight_decay
        weight -= lr * size / (np.linalg.norm(normed) + rule.eps) * normed


def ema_update(average: np.ndarray, value: np.ndarray, decay: float) -> None:
    """average += (1 - decay) * (value - average)."""
    average += (1 - decay) * (value - average)
