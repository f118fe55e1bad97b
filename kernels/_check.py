"""Argument checks of the public functions, and their error messages."""

from __future__ import annotations

from typing import Any

import numpy as np


def array(where: str, name: str, value: Any, shape: tuple[int | None, ...], dtype: Any = np.float32) -> None:
    """Raise ValueError unless value is a C-contiguous array of this shape (None: any size) and dtype."""
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{where}: {name} must be a NumPy array, got {type(value).__name__}")
    fits = value.ndim == len(shape) and all(
        want is None or have == want for have, want in zip(value.shape, shape, strict=True)
    )
    if not fits:
        want = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{where}: {name} must have shape {want}, got {value.shape}")
    if value.dtype != np.dtype(dtype):
        raise ValueError(f"{where}: {name} must be {np.dtype(dtype)}, got {value.dtype}; use {name}.astype")
    if not value.flags.c_contiguous:
        raise ValueError(f"{where}: {name} must be C-contiguous; use np.ascontiguousarray({name})")


def indices(where: str, name: str, value: np.ndarray, size: int, remedy: str = "") -> None:
    """Raise ValueError unless every element of value is in [0, size)."""
    if value.size == 0 or (value.min() >= 0 and value.max() < size):
        return
    at = int(np.flatnonzero((value < 0) | (value >= size))[0])
    message = f"{where}: {name} must be in [0, {size}), got {int(value.flat[at])} at index {at}"
    raise ValueError(message + (f"; {remedy}" if remedy else ""))
