"""Copies of the gradients of weights, of which threads add to different ones: allocation, clearing and sum.

All arrays lie in one flat pool, so that clearing and summing know neither their names nor their shapes.
Letters: P threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from flashlm_numba.kernels._jit import strict_helper
from flashlm_numba.kernels._rows import LINE, aligned_zeros

_GRAIN = LINE // 4  # floats; no two threads write to one line


def allocate(shapes: Sequence[tuple[int, ...]]) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
    """Arrays of these shapes (copies, ...) in one pool.

    Returns pool (any,) float32, segments (arrays, 3) int64 and the arrays. A segment is the first float of an array in
    the pool, its copies, and the floats of a copy.
    """
    segments, end = [], 0
    for shape in shapes:
        segments.append((end, shape[0], int(np.prod(shape[1:]))))
        end += -(-int(np.prod(shape)) // _GRAIN) * _GRAIN
    pool = aligned_zeros((end,), np.float32)
    arrays = [
        pool[first : first + copies * size].reshape(shape)
        for (first, copies, size), shape in zip(segments, shapes, strict=True)
    ]
    return pool, np.array(segments, np.int64), arrays


def sums(arrays: Any) -> Any:
    """A NamedTuple of arrays (copies, ...) without their first axis: the sums, after sum_copies."""
    return type(arrays)(*(array[0] for array in arrays))


@strict_helper
def clear_copies(pool, segments, thread, threads):
    """Set a thread's share of the pool to zero: of an array with a copy per thread, its own copy."""
    for s in range(segments.shape[0]):
        first, copies, size = segments[s, 0], segments[s, 1], segments[s, 2]
        low, high = thread * copies * size // threads, (thread + 1) * copies * size // threads
        part = pool[first + low : first + high]
        for i in range(part.shape[0]):
            part[i] = np.float32(0)


@strict_helper
def sum_copies(pool, segments, thread, threads):
    """Add the other copies of each array to its first one, in order; a thread's share of the floats."""
    for s in range(segments.shape[0]):
        first, copies, size = segments[s, 0], segments[s, 1], segments[s, 2]
        grains = (size + _GRAIN - 1) // _GRAIN
        low, high = thread * grains // threads * _GRAIN, min((thread + 1) * grains // threads * _GRAIN, size)
        total = pool[first + low : first + max(low, high)]
        for copy in range(1, copies):
            other = pool[first + copy * size + low : first + copy * size + max(low, high)]
            for i in range(total.shape[0]):
                total[i] += other[i]
