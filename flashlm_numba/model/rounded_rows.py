"""The embedding's rows in an exported file: float32, or rounded to int8 or int4 with a scale per group.

A row is divided into groups of consecutive weights, the last of which may be shorter. A weight is its whole number
times the group's scale, a float16. This product is exact in float32, so that a model in memory computes with exactly
the numbers in the file.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Rounding(NamedTuple):
    """A way of rounding."""

    largest: int  # whole numbers lie in [-largest, largest]
    group: int  # weights that share a scale
    per_byte: int  # whole numbers in a byte


# A row of v3's width is one group in int8. Four bits need shorter groups: see docs/experiments.md.
ROUNDINGS = {"int8": Rounding(127, 256, 1), "int4": Rounding(7, 32, 2)}


def rows_bytes(rows: int, columns: int, kind: str) -> int:
    """Bytes of (rows, columns) weights and their scales, for a kind in ROWS."""
    if kind == "float":
        return 4 * rows * columns
    _, group, per_byte = ROUNDINGS[kind]
    return rows * (-(-columns // per_byte) + 2 * -(-columns // group))


def round_rows(weight: np.ndarray, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Round weight (V, C) float32 to the nearest numbers of "int8" or "int4". Returns codes and scales.

    codes : int8 (V, C), or for int4 uint8 (V, ceil(C / 2)): the number plus 8, the even columns in the low four bits
    scales : float16 (V, ceil(C / group))
    Raises ValueError if a weight is not finite, or too large for a scale.
    """
    largest, group, per_byte = ROUNDINGS[kind]
    rows, columns = weight.shape
    groups = -(-columns // group)
    scales = np.zeros((rows, groups), np.float16)
    codes = np.zeros((rows, columns), np.int8)
    for g in range(groups):
        part = slice(g * group, (g + 1) * group)
        top = np.abs(weight[:, part]).max(axis=1)
        with np.errstate(over="ignore"):
            scale = (top / np.float32(largest)).astype(np.float16)
        if not np.isfinite(scale).all():
            raise ValueError(f"the largest weight is {top.max():.3g}, beyond what {kind} can hold")
        scales[:, g] = scale
        divisor = np.where(scale > 0, scale, np.float16(1)).astype(np.float32)[:, None]
        numbers = np.rint(weight[:, part] / divisor)
        codes[:, part] = np.where(scale[:, None] > 0, numbers.clip(-largest, largest), 0)
    if per_byte == 1:
        return codes, scales
    nibbles = np.full((rows, columns + columns % 2), 8, np.uint8)
    nibbles[:, :columns] = codes + 8
    return nibbles[:, ::2] | nibbles[:, 1::2] << 4, scales


def widen_rows(codes: np.ndarray, scales: np.ndarray, columns: int, kind: str) -> np.ndarray:
    """The weights (V, columns) float32 of the result of round_rows. Raises ValueError if the arrays do not fit."""
    _, group, per_byte = ROUNDINGS[kind]
    groups, width = -(-columns // group), -(-columns // per_byte)
    expected = (np.int8 if per_byte == 1 else np.uint8), np.float16
    if (codes.dtype, scales.dtype) != expected or codes.shape[1:] != (width,) or scales.shape != (len(codes), groups):
        raise ValueError(
            f"{columns} columns in {kind} take {width} bytes and {groups} scales per row, got {codes.dtype} of shape "
            f"{codes.shape} and {scales.dtype} of shape {scales.shape}"
        )
    if not np.isfinite(scales).all():
        raise ValueError("the scales of the embedding's rows are not finite")
    weight = np.empty((len(codes), columns), np.float32)
    if per_byte == 1:
        weight[...] = codes
    else:
        weight[:, ::2] = codes[:, : -(-columns // 2)] & 15
        weight[:, 1::2] = (codes >> 4)[:, : columns // 2]
        weight -= 8
    for g in range(groups):
        weight[:, g * group : (g + 1) * group] *= scales[:, g : g + 1].astype(np.float32)
    return weight
