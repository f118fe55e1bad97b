"""Passes over a flat tensor: the share of each thread, and sums that do not depend on the number of threads."""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels._jit import helper

# elements; a smaller tensor is processed serially, because entering a parallel region costs about as much
SMALL = 65_536
# Shares of threads begin at multiples of this many elements. The vector loop and its scalar remainder may round
# differently, and so they process the same elements for any number of threads.
GRAIN = 1_024


@helper
def thread_share(n, thread, threads):
    """Begin and end of this thread's share of n elements, both multiples of GRAIN except for the last end."""
    grains = (n + GRAIN - 1) // GRAIN
    return thread * grains // threads * GRAIN, min((thread + 1) * grains // threads * GRAIN, n)


@helper
def sum_squares(x):
    """Sum of x**2 over x (N,), in float64."""
    total = 0.0
    for i in range(x.shape[0]):
        value = np.float64(x[i])
        total += value * value
    return total
