"""The moving average of the weights against its reference, at odd sizes and for any number of threads."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, normal_arrays

from flashlm_numba.kernels import reference_optim
from flashlm_numba.kernels._elementwise import SMALL
from flashlm_numba.kernels.ema import ema_update

# the compiled runs also cross the threshold of the parallel kernels; in plain Python that takes minutes
LARGE = () if numba.config.DISABLE_JIT else (SMALL, 2 * SMALL + 1_037)


@pytest.mark.parametrize("size", [0, 1, 1_025, *LARGE])
def test_ema_update_matches_reference(size):
    average, value = normal_arrays(np.random.default_rng(size), [size] * 2)
    got, ref32, ref64 = average.copy(), average.copy(), average.astype(np.float64)
    ema_update(got, value, 0.99)
    reference_optim.ema_update(ref32, value, 0.99)
    reference_optim.ema_update(ref64, value.astype(np.float64), 0.99)
    assert_as_accurate(got, ref32, ref64)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
def test_ema_update_is_the_same_for_any_thread_count(threads):
    average, value = normal_arrays(np.random.default_rng(0), [3 * SMALL + 517] * 2)
    results = []
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        results.append(average.copy())
        ema_update(results[-1], value, 0.9)
    for other in results[1:]:
        np.testing.assert_array_equal(other, results[0])


def test_ema_update_rejects_wrong_arrays():
    with pytest.raises(ValueError, match="ema_update: value must be C-contiguous"):
        ema_update(np.zeros((2, 3), np.float32), np.zeros((3, 2), np.float32).T, 0.9)
