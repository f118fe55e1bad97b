"""Many rows times a weight laid out in panels, against NumPy, for both widths of vector registers."""

import functools

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.kernels import _packed_gemm, _rows

sizes = st.sampled_from([1, 2, 15, 16, 17, 31, 32, 33, 48, 64, 70])


@functools.cache
def product(wide):
    """packed_gemm as a function that Python can call."""
    helper = _packed_gemm.packed_gemms[wide]
    return helper if numba.config.DISABLE_JIT else numba.njit(lambda *arguments: helper(*arguments))


@pytest.mark.parametrize("wide", [False, True])
@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(0, 60), depth=sizes, outputs=sizes, add=st.booleans())
@example(seed=0, rows=50, depth=683, outputs=48, add=False)
@example(seed=0, rows=29, depth=1, outputs=15, add=True)
def test_products_match_numpy(wide, seed, rows, depth, outputs, add):
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal((n, depth), np.float32) for n in (rows, outputs))
    before = rng.standard_normal((rows, outputs), np.float32) if add else np.zeros((rows, outputs), np.float32)
    whole = np.full((rows + 2, outputs), np.nan, np.float32)  # a row of NaN on either side
    whole[1 : rows + 1] = before if add else np.nan
    found = whole[1 : rows + 1]
    panels = _packed_gemm.empty_panels(outputs, depth)
    _packed_gemm.fill_panels(panels, weight)
    spare = np.full(_packed_gemm.SPARE_FLOATS + 16, np.nan, np.float32)
    product(wide)(found, x, panels, spare[: _packed_gemm.SPARE_FLOATS], int(add))
    assert np.isnan(spare[_packed_gemm.SPARE_FLOATS :]).all()
    exact = x.astype(np.float64) @ weight.T.astype(np.float64) + before
    assert_as_accurate(found, before + x @ weight.T, exact, 8)
    assert np.isnan(whole[[0, -1]]).all()


def test_panels_of_a_transpose_hold_its_rows_and_zeros():
    weight = np.arange(12, dtype=np.float32).reshape(3, 4)
    panels = _packed_gemm.empty_panels(4, 3)
    panels[...] = np.nan
    _packed_gemm.fill_panels(panels, weight.T)
    np.testing.assert_array_equal(panels[0, :, :4], weight)
    assert (panels[0, :, 4:] == 0).all()
    assert panels.ctypes.data % 64 == 0


@pytest.mark.parametrize("shape", [(), (0,), (3, 0), (1,), (5, 7)])
@pytest.mark.parametrize("dtype", [np.float32, np.uint8, np.int64])
def test_aligned_arrays_are_zero_writable_and_aligned(shape, dtype):
    found = _rows.aligned_zeros(shape, dtype)
    assert found.shape == shape
    assert found.dtype == dtype
    assert found.flags.c_contiguous
    assert found.ctypes.data % 64 == 0 or found.size == 0
    assert (found == 0).all()
    found[...] = 1
