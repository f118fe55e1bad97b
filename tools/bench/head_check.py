"""Checks of results: errors relative to float64, per row, compared with those of plain float32 code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from tools.bench.head_problem import Candidate
from tools.bench.timing import WrongResultError

SLACK = 4.0  # a candidate may err this many times as far as plain float32 NumPy does


def row_errors(found: np.ndarray, truth: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of (difference, scale): each row's largest error, and the largest value of the row.

    A vector is one row. Each row has its own scale, so that a wrong gradient of a rare token cannot hide behind the
    values of a frequent one.
    """
    found, truth = (
        array.reshape(-1, array.shape[-1]) if array.ndim else array.reshape(1, 1) for array in (found, truth)
    )
    for start in range(0, len(truth), 4096):
        here = slice(start, start + 4096)
        yield np.abs(found[here] - truth[here]).max(1), np.abs(truth[here]).max(1)


def relative_error(found: np.ndarray, truth: np.ndarray) -> float:
    """Largest error of a row relative to its largest value; infinite if a row should be zero and is not."""
    worst = 0.0
    for difference, scale in row_errors(found, truth):
        wrong = np.where(scale > 0, difference / np.where(scale > 0, scale, 1), np.where(difference > 0, np.inf, 0))
        worst = max(worst, float(wrong.max()) if np.isfinite(difference).all() else np.inf)
    return worst


def compare(name: str, got: Mapping[str, np.ndarray], float32: Mapping, float64: Mapping) -> float:
    """Largest relative error of got. Raises WrongResultError if it exceeds SLACK times the error of float32."""
    worst = 0.0
    for key, truth in float64.items():
        error, yardstick = relative_error(got[key], truth), relative_error(float32[key], truth)
        allowed = SLACK * (yardstick + float(np.finfo(np.float32).eps))
        if not error <= allowed:
            raise WrongResultError(
                f"{name}: {key} errs by {error:.2g} of its row's largest value; plain float32 errs by {yardstick:.2g}, "
                f"so at most {allowed:.2g} was expected. The kernel is wrong on this machine; please report it."
            )
        worst = max(worst, error)
    return worst


def check(name: str, candidate: Candidate) -> float:
    """Largest relative error of a candidate's loss and gradients. Raises WrongResultError if they are wrong."""
    float32, float64 = candidate.reference(np.float32), candidate.reference(np.float64)
    return compare(name, candidate.run(), float32, float64)
