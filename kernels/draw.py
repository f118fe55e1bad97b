"""Choosing the next token: the largest of many logits, and sampling from them, with one thread.

The tree's search and the dense head share these functions. Letters: V logits, K entries kept.
"""

from __future__ import annotations

import math

import numpy as np

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._jit import helper, serial_kernel
from flashlm_numba.kernels._math import exp32, largest_magnitude, row_max

SPAN = 64  # logits that are passed over at once where none of them is large enough
BLOCK = 1024  # probabilities with a sum of their own, so that a draw need not go through all of them one by one
LEAST_TEMPERATURE = 1e-300  # its inverse is finite; only equal logits are both likely at any such temperature


@helper
def sift_down(keys, codes, count):
    """Restore a heap (largest key first) in which only the first entry may be misplaced."""
    i, key, code = 0, keys[0], codes[0]
    while True:
        child = 2 * i + 1
        if child >= count:
            break
        if child + 1 < count and keys[child + 1] > keys[child]:
            child += 1
        if keys[child] <= key:
            break
        keys[i], codes[i] = keys[child], codes[child]
        i = child
    keys[i], codes[i] = key, code


@helper
def sift_up(keys, codes, i, key, code):
    """Insert a new entry at the end i of the heap."""
    while i > 0 and keys[(i - 1) // 2] < key:
        keys[i], codes[i] = keys[(i - 1) // 2], codes[(i - 1) // 2]
        i = (i - 1) // 2
    keys[i], codes[i] = key, code


@helper
def keep_largest(keys, codes, found, key, code):
    """Add an entry to a heap of the len(keys) largest entries, stored as -key, smallest first. Returns their number.

    Among equal keys an arbitrary one is kept; with a single entry, the first.
    """
    if found < keys.shape[0]:
        sift_up(keys, codes, found, -key, code)
        return found + 1
    if -key < keys[0]:
        keys[0], codes[0] = -key, code
        sift_down(keys, codes, found)
    return found


@helper
def put_in_order(keys, codes, found):
    """Sort the entries of keep_largest, largest first, and restore the signs of the keys."""
    for last in range(found - 1, -1, -1):
        key, code = keys[0], codes[0]
        keys[0], codes[0] = keys[last], codes[last]
        sift_down(keys, codes, last)
        keys[last], codes[last] = -key, code


@serial_kernel
def _largest(keys, ids, row):
    """keys (K,) float64, ids (K,) int64: the K largest of row (V,), largest first. False if one is NaN or infinite."""
    found, start = 0, 0
    while start < row.shape[0]:
        part = row[start : start + SPAN]
        if not largest_magnitude(part) < np.inf:  # row_max would miss a NaN with the sign bit set
            return False
        top = row_max(part)
        if found < keys.shape[0] or np.float64(top) > -keys[0]:
            for i in range(part.shape[0]):
                found = keep_largest(keys, ids, found, np.float64(part[i]), start + i)
        start += SPAN
    put_in_order(keys, ids, found)
    return True


@serial_kernel
def _log_sum_exp(row):
    """In blocks, so that the sum is as accurate as that of _draw."""
    top, total, start = row_max(row), 0.0, 0
    while start < row.shape[0]:
        part, block = row[start : start + BLOCK], np.float32(0)
        for i in range(part.shape[0]):
            block += exp32(part[i] - top)
        total += np.float64(block)
        start += BLOCK
    return np.float64(top) + math.log(total)


@helper
def _index_above(values, bar):
    """First index whose cumulative sum exceeds bar; the last index above zero if rounding leaves none."""
    seen = np.float64(values[0])
    i = 0
    while seen <= bar and i < values.shape[0] - 1:
        i += 1
        seen += values[i]
    while values[i] == 0 and i > 0:
        i -= 1
    return i


@serial_kernel
def _draw(row, sums, uniform, temperature):
    """An index of logits row (V,), which become probabilities; sums (blocks,) float64 is scratch."""
    top = row_max(row)
    inverse = np.float32(min(1.0 / temperature, 1e30))  # finite: zero times it must stay zero
    total = 0.0
    for block in range(sums.shape[0]):
        part = row[block * BLOCK : (block + 1) * BLOCK]
        for i in range(part.shape[0]):
            part[i] = exp32((part[i] - top) * inverse)
        sums[block] = 0.0
        for i in range(part.shape[0]):
            sums[block] += np.float64(part[i])
        total += sums[block]
    if not 0 < total < np.inf:
        return -1
    bar = uniform * total
    block = _index_above(sums, bar)
    for before in range(block):
        bar -= sums[before]
    return block * BLOCK + _index_above(row[block * BLOCK : (block + 1) * BLOCK], bar)


@helper
def draw_index(log_p, uniform, temperature, top_p):
    """An index of log_p (K,) float64, largest first, which becomes p; -1 if that is no distribution."""
    top, total = log_p[0], 0.0
    for i in range(log_p.shape[0]):
        log_p[i] = math.exp((log_p[i] - top) / temperature)
        total += log_p[i]
    if not 0 < total < np.inf:
        return -1
    kept = log_p.shape[0]
    if top_p < 1:
        kept, bar, total = 0, top_p * total, 0.0
        while kept == 0 or (total < bar and kept < log_p.shape[0]):
            total += log_p[kept]
            kept += 1
    return _index_above(log_p[:kept], uniform * total)


@serial_kernel
def _draw_sorted(log_p, uniform, temperature, top_p):
    return draw_index(log_p, uniform, temperature, top_p)


def checked_temperature(temperature: float, top_p: float | None) -> float:
    """The temperature, or LEAST_TEMPERATURE if it is lower. Raises ValueError if a setting is out of range."""
    if not 0 < temperature < np.inf:
        raise ValueError(f"temperature must be a number above 0, got {temperature}")
    if top_p is not None and not 0 < top_p <= 1:
        raise ValueError(f"top_p must be above 0 and at most 1, got {top_p}")
    return max(temperature, LEAST_TEMPERATURE)


def largest(row: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices (K,) int64 and values (K,) float64 of the K = min(count, V) largest of row (V,) float32, largest first.

    Among equal values an arbitrary one is taken, for count 1 the first. Raises ValueError if count is below 1 or if a
    value is NaN or infinite.
    """
    _check.array("largest", "row", row, (None,))
    if count < 1:
        raise ValueError(f"largest: count must be at least 1, got {count}")
    count = min(count, len(row))
    keys, ids = np.empty(count), np.empty(count, np.int64)
    if not _largest(keys, ids, row):
        raise ValueError("largest: the logits must be finite; nothing can be chosen from them")
    return ids, keys


def log_sum_exp(row: np.ndarray) -> float:
    """ln of the sum of exp(row) for logits row (V,) float32; NaN or infinite if one of them is.

    >>> round(math.exp(log_sum_exp(np.log(np.array([1, 2, 3], np.float32)))), 5)
    6.0
    """
    _check.array("log_sum_exp", "row", row, (None,))
    return float(_log_sum_exp(row)) if len(row) else -math.inf


def draw(row: np.ndarray, uniform: float, temperature: float = 1.0) -> int:
    """Sample an index from softmax(row / temperature) for logits row (V,) float32, which are overwritten.

    uniform : random number in [0, 1) that determines the sample
    Raises ValueError if temperature is not positive or the logits give no distribution.
    """
    _check.array("draw", "row", row, (None,))
    temperature = checked_temperature(temperature, None)
    index = _draw(row, np.empty(-(-len(row) // BLOCK)), uniform, temperature) if len(row) else -1
    if index < 0:
        raise ValueError("draw: the logits must be finite; nothing can be drawn from them")
    return index


def draw_sorted(log_p: np.ndarray, uniform: float, temperature: float = 1.0, top_p: float | None = None) -> int:
    """Sample an index of log_p (K,) float64, largest first, by p**(1 / temperature) among the first that reach top_p.

    uniform : random number in [0, 1). Raises ValueError if a setting is out of range or there is no distribution.
    """
    _check.array("draw_sorted", "log_p", log_p, (None,), np.float64)
    temperature = checked_temperature(temperature, top_p)
    index = _draw_sorted(log_p.copy(), uniform, temperature, top_p or 1.0) if len(log_p) else -1
    if index < 0:
        raise ValueError("draw_sorted: the probabilities must be finite and not all zero")
    return index
