"""Memory bandwidth of a number of threads: the fastest of three plain readers."""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from numba import njit, prange

from tools.bench import timing

MEGABYTES = 512  # beyond most last caches


@njit(parallel=True, fastmath=True)
def _sum(x, threads):
    zero = x[0] - x[0]  # of either kind
    total = zero
    for thread in prange(threads):
        part = x[thread * x.shape[0] // threads : (thread + 1) * x.shape[0] // threads]
        here = zero
        for i in range(part.shape[0]):
            here += part[i]
        total += here
    return total


@njit(parallel=True)
def _or_integers(x, threads):
    total = np.int64(0)
    for thread in prange(threads):
        part = x[thread * x.shape[0] // threads : (thread + 1) * x.shape[0] // threads]
        here = np.int64(0)
        for i in range(0, part.shape[0], 8):  # a word of every cache line
            here |= part[i]
        total += here
    return total


def read_bandwidth(threads: int, *, megabytes: int | None = None, repeats: int = 5) -> dict[str, Any]:
    """GB/s (1e9 bytes) at which this many Numba threads read an array of this size: per reader, and the "best".

    The readers: a sum of float32, a sum of int64, one word of every cache line.
    """
    megabytes = megabytes or MEGABYTES
    words = np.ones(megabytes * 10**6 // 64 * 8, np.int64)
    floats = words.view(np.float32)
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        seconds = timing.measure(
            {
                "sum of float32": lambda: _sum(floats, threads),
                "sum of int64": lambda: _sum(words, threads),
                "a word a line": lambda: _or_integers(words, threads),
            },
            repeats,
        )
    finally:
        numba.set_num_threads(before)
    rates = {name: timing.rate(found, words.nbytes * 1e-9) for name, found in seconds.items()}
    return {"best": max(r["median"] for r in rates.values()), "threads": threads, "megabytes": megabytes, **rates}
