"""Passes over a flat tensor: how threads share its elements, and sums that do not depend on the number of threads."""

from __future__ import annotations

import numpy as np

from flashlm_numba.kernels._jit import helper

# elements; below this a tensor is done serially, since entering a parallel region costs about as much
SMALL = 65_536
# Shares of threads begin at multiples of this many elements, so that the vector loop and its scalar rest,
# which may round differently, meet the same elements for any number of threads.
GRAIN = 1_024


@helper
def thread_share(n, thread, threads):
    """Where this thread's share of n elements begins and ends: multiples of GRAIN, but for the last end."""
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
