"""The exponential moving average of the weights."""

from __future__ import annotations

import numba
import numpy as np
from numba import prange

from flashlm_numba.kernels import _check
from flashlm_numba.kernels._elementwise import SMALL, thread_share
from flashlm_numba.kernels._jit import helper, kernel, serial_kernel


@helper
def _ema_range(average, value, blend):
    for i in range(average.shape[0]):
        average[i] += blend * (value[i] - average[i])


@kernel
def _ema(average, value, blend, threads):
    """average (N,) += blend * (value (N,) - average). Parallel over n."""
    for th in prange(threads):
        lo, hi = thread_share(average.shape[0], th, threads)
        _ema_range(average[lo:hi], value[lo:hi], blend)


@serial_kernel
def _small_ema(average, value, blend):
    _ema_range(average, value, blend)


def ema_update(average: np.ndarray, value: np.ndarray, decay: float) -> None:
    """average += (1 - decay) * (value - average), in place; float32 arrays of one shape, decay in [0, 1].

    The result is the same for any number of threads. Raises ValueError if a shape or dtype is wrong.

    >>> average = np.zeros(1, np.float32)
    >>> ema_update(average, np.ones(1, np.float32), 0.75)
    >>> float(average[0])
    0.25
    """
    _check.array("ema_update", "average", average, average.shape)
    _check.array("ema_update", "value", value, average.shape)
    blend = np.float32(1 - decay)
    if average.size < SMALL:
        _small_ema(average.reshape(-1), value.reshape(-1), blend)
    else:
        _ema(average.reshape(-1), value.reshape(-1), blend, numba.get_num_threads())
