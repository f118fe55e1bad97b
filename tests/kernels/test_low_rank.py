"""kernels/low_rank.py against float64, at odd sizes and for any number of threads."""

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import low_rank

SIZE = st.sampled_from([0, 1, 3, 17, 63, 130] if not numba.config.DISABLE_JIT else [0, 1, 5])
MANY = st.sampled_from([0, 1, 5, 255, 257, 600] if not numba.config.DISABLE_JIT else [0, 1, 7])


@given(rows=MANY, rank=SIZE, columns=SIZE, accumulate=st.booleans(), seed=st.integers(0, 9))
def test_rows_and_gradients_are_the_products(rows, rank, columns, accumulate, seed):
    rng = np.random.default_rng(seed)
    coords, basis, drows, dcoords, dbasis = (
        rng.standard_normal(shape).astype(np.float32)
        for shape in ((rows, rank), (rank, columns), (rows, columns), (rows, rank), (rank, columns))
    )
    a, b, d = (x.astype(np.float64) for x in (coords, basis, drows))

    def check(found, old, left, right):
        """As close as float32 sums of so many products can be: by the size of what is added, which may cancel."""
        size = float((np.abs(left) @ np.abs(right)).max(initial=0)) + float(np.abs(old).max(initial=0))
        bound = 2 * np.finfo(np.float32).eps * (1 + left.shape[1] ** 0.5) * size
        np.testing.assert_allclose(found, left @ right + old, rtol=0, atol=bound)

    found = low_rank.low_rank_rows(coords, basis, np.full((rows, columns), np.nan, np.float32))
    check(found, np.zeros((rows, columns)), a, b)
    before = dcoords.copy(), dbasis.copy()
    if not accumulate:
        dcoords[...], dbasis[...] = np.nan, np.nan
    low_rank.low_rank_backward(dcoords, dbasis, drows, coords, basis, accumulate=accumulate)
    check(dcoords, before[0] * accumulate, d, b.T)
    check(dbasis, before[1] * accumulate, a.T, d)


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
def test_any_number_of_threads_gives_the_same_bits(threads):
    rng = np.random.default_rng(0)
    coords, basis, drows = (rng.standard_normal(s).astype(np.float32) for s in ((700, 48), (48, 200), (700, 200)))
    results = []
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        dcoords, dbasis = np.empty_like(coords), np.empty_like(basis)
        low_rank.low_rank_backward(dcoords, dbasis, drows, coords, basis, accumulate=False)
        rows = low_rank.low_rank_rows(coords, basis, np.empty_like(drows))
        results.append([x.tobytes() for x in (dcoords, dbasis, rows)])
    assert all(result == results[0] for result in results)


def test_wrong_shapes_are_refused():
    a, b = np.zeros((4, 2), np.float32), np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match="low_rank_rows: basis must have shape"):
        low_rank.low_rank_rows(a, np.zeros((3, 3), np.float32), np.zeros((4, 3), np.float32))
    with pytest.raises(ValueError, match="low_rank_backward: drows must have shape"):
        low_rank.low_rank_backward(a.copy(), b.copy(), np.zeros((4, 2), np.float32), a, b)
