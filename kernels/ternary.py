"""Ternary weights: {-1, 0, +1} by a threshold at the mean magnitude, and their packed form.

Packing (2 bits a weight): codes 0, 1, 2 stand for -1, 0, +1. A row of K weights is padded with zeros to whole blocks
of 128; byte j (0 <= j < 32) of a block holds the weights j, j + 32, j + 64, j + 96 at bits 0, 2, 4, 6, so that one
32-byte vector, shifted and masked, gives four vectors of weights beside 128 consecutive inputs.
Letters: R rows, K columns, W = 32 * ceil(K / 128) packed bytes a row.
"""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import exact_kernel, serial_kernel

BLOCK = 128  # weights
BLOCK_BYTES = 32


@exact_kernel
def _ternarize(out, weight):
    """out = sign(weight) where |weight| > mean|weight|, else 0; both 1-D. Returns the threshold."""
    total = 0.0  # float64, in order: the same threshold for any thread count
    for i in range(weight.shape[0]):
        total += abs(weight[i])
    threshold = np.float32(total / max(weight.shape[0], 1))
    for i in range(weight.shape[0]):
        w = weight[i]
        out[i] = np.float32(1 if w > threshold else 0) - np.float32(1 if w < -threshold else 0)
    return threshold


def ternarize(weight: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """Ternary values of weight (any shape) float32: +1 where w > mean|w|, -1 where w < -mean|w|, else 0 (float32).

    The gradient is passed straight through: d weight = d out (Bengio et al. 2013, arXiv:1308.3432), so there is no
    backward function. Writes to out if given. Raises ValueError if an array is not contiguous float32.
    Source of the rule: FlashLM v3; the mean is summed in float64 in order and rounded to float32.

    >>> ternarize(np.array([[0.1, -2, 3, 0.2]], np.float32)).tolist()
    [[0.0, -1.0, 1.0, 0.0]]
    """
    out = np.empty_like(weight) if out is None else out
    _check.array("ternarize", "weight", weight, weight.shape)
    _check.array("ternarize", "out", out, weight.shape)
    _ternarize(out.reshape(-1), weight.reshape(-1))
    return out


@serial_kernel
def _pack_ternary(out, weight):
    rows, columns = weight.shape
    for r in range(rows):
        for block in range(out.shape[1] // 32):
            for j in range(32):
                byte = 0
                for part in range(4):
                    k = block * 128 + part * 32 + j
                    code = 1
                    if k < columns:
                        code = 1 + (1 if weight[r, k] > 0 else 0) - (1 if weight[r, k] < 0 else 0)
                    byte |= code << (2 * part)
                out[r, block * 32 + j] = byte


@serial_kernel
def _unpack_ternary(out, packed):
    rows, columns = out.shape
    for r in range(rows):
        for k in range(columns):
            byte = packed[r, k // 128 * 32 + k % 32]
            out[r, k] = np.float32(np.int32((byte >> (2 * (k % 128 // 32))) & 3) - 1)


@serial_kernel
def _ternary_matvec(out, packed, x):
    """out (R,) = W x for packed (R, W) and x (128 * blocks,), zero where padded."""
    for r in range(packed.shape[0]):
        total = np.float32(0)
        for block in range(packed.shape[1] // 32):
            codes = packed[r, block * 32 : block * 32 + 32]
            inputs = x[block * 128 : block * 128 + 128]
            for j in range(32):
                byte = np.int32(codes[j])
                total += np.float32((byte & 3) - 1) * inputs[j]
                total += np.float32(((byte >> 2) & 3) - 1) * inputs[j + 32]
                total += np.float32(((byte >> 4) & 3) - 1) * inputs[j + 64]
                total += np.float32(((byte >> 6) & 3) - 1) * inputs[j + 96]
        out[r] = total


def pack_ternary(weight: np.ndarray) -> np.ndarray:
    """Pack ternary weight (R, K) float32 of -1, 0, +1 into (R, 32 * ceil(K / 128)) uint8, 2 bits a weight.

    Raises ValueError if an element is not -1, 0 or +1. The layout is in the module's docstring.

    >>> pack_ternary(np.array([[1, 0, -1]], np.float32)).shape
    (1, 32)
    """
    _check.array("pack_ternary", "weight", weight, (None, None))
    if not np.isin(weight, (-1, 0, 1)).all():
        raise ValueError("pack_ternary: weight must hold only -1, 0 and +1; use ternarize first")
    blocks = -(-weight.shape[1] // BLOCK)
    out = np.empty((weight.shape[0], blocks * BLOCK_BYTES), np.uint8)
    _pack_ternary(out, weight)
    return out


def unpack_ternary(packed: np.ndarray, columns: int) -> np.ndarray:
    """The weight (R, columns) float32 that pack_ternary packed. Raises ValueError if the width does not fit."""
    _check.array("unpack_ternary", "packed", packed, (None, -(-columns // BLOCK) * BLOCK_BYTES), np.uint8)
    out = np.empty((packed.shape[0], columns), np.float32)
    _unpack_ternary(out, packed)
    return out


def ternary_matvec(packed: np.ndarray, x: np.ndarray) -> np.ndarray:
    """W @ x (R,) float32 for W packed (R, 32 * ceil(K / 128)) uint8 and x (K,) float32, one thread.

    Raises ValueError if the widths do not fit.

    >>> packed = pack_ternary(np.array([[1, 0, -1]], np.float32))
    >>> ternary_matvec(packed, np.array([5, 6, 7], np.float32)).tolist()
    [-2.0]
    """
    _check.array("ternary_matvec", "x", x, (None,))
    blocks = -(-x.shape[0] // BLOCK)
    _check.array("ternary_matvec", "packed", packed, (None, blocks * BLOCK_BYTES), np.uint8)
    padded = np.zeros(blocks * BLOCK, np.float32)
    padded[: x.shape[0]] = x
    out = np.empty(packed.shape[0], np.float32)
    _ternary_matvec(out, packed, padded)
    return out
