"""Argument checks of the public functions, and their error messages."""

from __future__ import annotations

from typing import Any

import numpy as np


def array(where: str, name: str, value: Any, shape: tuple[int | None, ...], dtype: Any = np.float32) -> None:
    """Raise ValueError unless value is a C-contiguous array of this shape (None: any size) and dtype."""
    if (
        isinstance(value, np.ndarray)
        and _fits(value.shape, shape)
        and value.dtype == dtype
        and value.flags.c_contiguous
    ):
        return  # at once, since a decoded token is checked a dozen times
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{where}: {name} must be a NumPy array, got {type(value).__name__}")
    if not _fits(value.shape, shape):
        want = "(" + ", ".join("any" if size is None else str(size) for size in shape) + ")"
        raise ValueError(f"{where}: {name} must have shape {want}, got {value.shape}")
    if value.dtype != np.dtype(dtype):
        raise ValueError(f"{where}: {name} must be {np.dtype(dtype)}, got {value.dtype}; use {name}.astype")
    raise ValueError(f"{where}: {name} must be C-contiguous; use np.ascontiguousarray({name})")


def _fits(shape: tuple[int, ...], wanted: tuple[int | None, ...]) -> bool:
    if shape == wanted:
        return True
    if len(shape) != len(wanted):
        return False
    for have, want in zip(shape, wanted, strict=True):  # noqa: SIM110 (a generator would take twice as long)
        if want is not None and have != want:
            return False
    return True


def indices(where: str, name: str, value: np.ndarray, size: int, remedy: str = "") -> None:
    """Raise ValueError unless every element of value is in [0, size)."""
    if value.size == 0 or (value.min() >= 0 and value.max() < size):
        return
    at = int(np.flatnonzero((value < 0) | (value >= size))[0])
    message = f"{where}: {name} must be in [0, {size}), got {int(value.flat[at])} at index {at}"
    raise ValueError(message + (f"; {remedy}" if remedy else ""))
