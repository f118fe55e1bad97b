"""What every head checks about its arguments before it is built, with the sentences of kernels/_check.py."""

from __future__ import annotations

import math

import numpy as np

from flashlm_numba.kernels import _check


def check_options(
    where: str, *, label_smoothing: float = 0.0, z_loss: float = 0.0, soft_cap: float | None = None
) -> None:
    """Raise ValueError unless the loss options are in their ranges."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"{where}: label_smoothing must be between 0 and 1, got {label_smoothing}")
    if not 0 <= z_loss < math.inf:
        raise ValueError(f"{where}: z_loss must be 0 or more, got {z_loss}")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"{where}: soft_cap must be above 0, or None for no cap, got {soft_cap}")


def check_rows(where: str, weight: np.ndarray, dweight: np.ndarray | None) -> None:
    """Raise ValueError unless weight is (V, C) float32, V and C at least 1, and dweight has its shape."""
    _check.array(where, "weight", weight, (None, None))
    if not weight.size:
        raise ValueError(f"{where}: weight must have a row and a column, got {weight.shape}")
    if dweight is not None:
        _check.array(where, "dweight", dweight, weight.shape)


def check_targets(where: str, targets: np.ndarray, vocab_size: int) -> None:
    """Raise ValueError unless targets (N,) are int32 token ids of the vocabulary."""
    _check.array(where, "targets", targets, (None,), np.int32)
    _check.indices(where, "targets", targets, vocab_size, "check the tokenizer's vocabulary size")
