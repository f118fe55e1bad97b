"""The sum of squares against float64, at odd sizes and for any number of threads."""

from __future__ import annotations

import numba
import numpy as np
import pytest

from flashlm_numba.kernels import reference_optim
from flashlm_numba.kernels._elementwise import SMALL
from flashlm_numba.kernels.grad_norm import sum_of_squares

# the compiled runs also cross the threshold of the parallel kernels; in plain Python that takes minutes
LARGE = () if numba.config.DISABLE_JIT else (SMALL, 2 * SMALL + 1_037)


@pytest.mark.parametrize("size", [0, 1, 3, 4_095, 4_097, *LARGE])
def test_sum_of_squares_matches_float64(size):
    # magnitudes whose squares overflow and underflow float32
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32) * np.float32(10) ** (
        np.arange(size, dtype=np.float32) % 60 - 30
    )
    np.testing.assert_allclose(sum_of_squares(x), reference_optim.sum_of_squares(x), rtol=1e-12)
    assert sum_of_squares(np.ones(size, np.float32)) == size  # every element counts


@pytest.mark.parametrize("size", [7, *LARGE[1:]])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sum_of_squares_reveals_what_is_not_finite(size, bad):
    for at in (0, size // 2, size - 1):
        x = np.ones(size, np.float32)
        x[at] = bad
        assert not np.isfinite(sum_of_squares(x))


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
def test_sum_of_squares_is_the_same_for_any_thread_count(threads):
    x = np.random.default_rng(0).standard_normal(3 * SMALL + 517).astype(np.float32)
    sums = set()
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        sums.add(sum_of_squares(x))
    assert len(sums) == 1


def test_sum_of_squares_rejects_wrong_arrays():
    with pytest.raises(ValueError, match="sum_of_squares: x must be float32, got float64"):
        sum_of_squares(np.zeros((2, 3)))
