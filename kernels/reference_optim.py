"""NumPy twins of kernels/optimizers.py: the specification, in the dtype of the arrays given.

Float64 arrays give the truth that the kernels are judged by, float32 arrays the error of plain float32.
Every function changes its first arguments in place, as its kernel does.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# Jordan et al. 2024, "Muon": slope at zero as large as possible; singular values end between 0.7 and 1.2
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def sum_of_squares(x: np.ndarray) -> float:
    """Sum of x**2 over all elements, accumulated in float64."""
    return float(np.sum(np.square(x.astype(np.float64))))


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
    """One step of torch.optim.AdamW: decoupled decay, bias correction, eps added to the corrected root.

    first : None, with beta1 = 0, keeps no first moment.
    lazy : only the rows with a gradient that is not zero take part, as in torch.optim.SparseAdam.
    """
    if lazy:
        rows = (grad != 0).any(axis=1)
        parts = weight[rows], None if first is None else first[rows], second[rows]
        settings = {"step": step, "lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "decay": decay}
        adamw_step(*parts, grad[rows], **settings, scale=scale)  # type: ignore[arg-type]
        weight[rows], second[rows] = parts[0], parts[2]
        if first is not None:
            first[rows] = parts[1]
        return
    g = grad * scale
    weight *= 1 - lr * decay
    if first is None:
        first = g
    else:
        first += (1 - beta1) * (g - first)
    second *= beta2
    second += (1 - beta2) * g * g
    root = np.sqrt(second) / math.sqrt(1 - beta2**step) + eps
    weight -= lr / (1 - beta1**step) * first / root


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
    """adamw_step of each row of a table (R, C) whose gradient is not zero, its step counted in steps (R,) int64.

    second (R,) takes the mean square over the row in place of each element's square.
    """
    rows = (grad != 0).any(axis=1)
    if not rows.any():
        return
    g = grad[rows] * scale
    steps[rows] += 1
    t = steps[rows, None]
    second[rows] = beta2 * second[rows] + (1 - beta2) * np.square(g).mean(axis=1)
    if first is None:
        mean = g
    else:
        first[rows] += (1 - beta1) * (g - first[rows])
        mean = first[rows]
    root = np.sqrt(second[rows, None] / (1 - beta2**t)) + eps
    weight[rows] = (1 - lr * decay) * weight[rows] - lr / (1 - beta1**t) * mean / root


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
) -> None:
    """One NorMuon step of every matrix (m, n), with its momentum (m, n) and second moment of rows (m,)."""
    for weight, mean, second, grad in zip(weights, momenta, seconds, grads, strict=True):
        if weight.size == 0:
            continue
        rows, columns = weight.shape
        g = grad * scale
        mean += (1 - momentum) * (g - mean)
        u = g + momentum * (mean - g) if nesterov else mean
        o = newton_schulz(u / (np.linalg.norm(u) + 1e-7), steps)
        second += (1 - beta2) * (np.mean(o * o, axis=1) - second)
        normed = o / (np.sqrt(second) + eps)[:, None]
        if update_rms is None:
            size = float(np.linalg.norm(o)) * math.sqrt(max(1.0, rows / columns))
        else:
            size = update_rms * math.sqrt(rows * columns)
        weight *= 1 - lr * decay
        weight -= lr * size / (np.linalg.norm(normed) + eps) * normed


def ema_update(average: np.ndarray, value: np.ndarray, decay: float) -> None:
    """average += (1 - decay) * (value - average)."""
    average += (1 - decay) * (value - average)
