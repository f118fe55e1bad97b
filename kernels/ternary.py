"""Ternary weights {-1, 0, +1}, with a threshold relative to the mean magnitude, and their packed form.

Packing takes 2 bits per weight. The codes 0, 1, 2 stand for -1, 0, +1. A row of K weights is padded with zeros to
blocks of 256. Byte j (0 <= j < 64) of a block holds the weights j, j + 64, j + 128, j + 192 at bits 0, 2, 4, 6.
Shifting and masking one cache line then gives four vectors of weights for 256 consecutive inputs.
Letters: R rows, K columns, W = 64 * ceil(K / 256) packed bytes per row.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import exact_kernel, serial_kernel
from flashlm_numba.kernels._ternary_dots import BLOCK, BLOCK_BYTES


@exact_kernel
def _ternarize(out, weight, share):
    """out = sign(weight) where |weight| > share * mean|weight|, else 0; both 1-D. Returns the threshold."""
    total = 0.0  # float64, in order: the same threshold for any thread count
    for i in range(weight.shape[0]):
        total += abs(weight[i])
    threshold = share * np.float32(total / max(weight.shape[0], 1))
    for i in range(weight.shape[0]):
        w = weight[i]
        out[i] = np.float32(1 if w > threshold else 0) - np.float32(1 if w < -threshold else 0)
    return threshold


def ternarize(weight: np.ndarray, out: np.ndarray | None = None, *, threshold: float = 1.0) -> np.ndarray:
    """Ternary values of weight (any shape) float32: +1 if w > t, -1 if w < -t, else 0, with t = threshold * mean|w|.

    There is no backward function, because the straight-through estimator passes the gradient unchanged: d weight = d
    out (Bengio et al. 2013, arXiv:1308.3432). Ternarising a result again does not change it, because its mean, or the
    threshold, is below one.
    threshold is in [0, 1]. Writes to out (float32) if given. Raises ValueError if an array is not contiguous float32.
    Source of the rule: FlashLM v3, with threshold 1. A threshold of 0.5 is equivalent to rounding w / mean|w| (Ma et
    al. 2024, arXiv:2402.17764, section 2). The mean is summed in float64 in order and rounded to float32.

    >>> ternarize(np.array([[0.1, -2, 3, 0.2]], np.float32)).tolist()
    [[0.0, -1.0, 1.0, 0.0]]
    """
    out = np.empty_like(weight) if out is None else out
    _check.array("ternarize", "weight", weight, weight.shape)
    _check.array("ternarize", "out", out, weight.shape)
    if not 0 <= threshold <= 1:
        raise ValueError(f"ternarize: threshold must be in [0, 1], got {threshold}")
    _ternarize(out.reshape(-1), weight.reshape(-1), np.float32(threshold))
    return out


@serial_kernel
def _pack_ternary(out, weight):
    rows, columns = weight.shape
    for r in range(rows):
        for block in range(out.shape[1] // 64):
            for j in range(64):
                byte = 0
                for part in range(4):
                    k = block * 256 + part * 64 + j
                    code = 1
                    if k < columns:
                        code = 1 + (1 if weight[r, k] > 0 else 0) - (1 if weight[r, k] < 0 else 0)
                    byte |= code << (2 * part)
                out[r, block * 64 + j] = byte


@serial_kernel
def _unpack_ternary(out, packed):
    rows, columns = out.shape
    for r in range(rows):
        for k in range(columns):
            byte = packed[r, k // 256 * 64 + k % 64]
            out[r, k] = np.float32(np.int32((byte >> (2 * (k % 256 // 64))) & 3) - 1)


def packed_width(columns: int) -> int:
    """Packed bytes of a row with this many weights."""
    return -(-columns // BLOCK) * BLOCK_BYTES


def pack_ternary(weight: np.ndarray) -> np.ndarray:
    """Pack ternary weight (R, K) float32 of -1, 0, +1 into (R, 64 * ceil(K / 256)) uint8, 2 bits per weight.

    Raises ValueError if an element is not -1, 0 or +1. The layout is in the module's docstring.

    >>> pack_ternary(np.array([[1, 0, -1]], np.float32)).shape
    (1, 64)
    """
    _check.array("pack_ternary", "weight", weight, (None, None))
    if not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("pack_ternary: weight must hold only -1, 0 and +1; use ternarize first")
    out = np.empty((weight.shape[0], packed_width(weight.shape[1])), np.uint8)
    _pack_ternary(out, weight)
    return out


def unpack_ternary(packed: np.ndarray, columns: int) -> np.ndarray:
    """The weight (R, columns) float32 that pack_ternary packed. Raises ValueError if the width does not fit."""
    _check.array("unpack_ternary", "packed", packed, (None, packed_width(columns)), np.uint8)
    out = np.empty((packed.shape[0], columns), np.float32)
    _unpack_ternary(out, packed)
    return out
