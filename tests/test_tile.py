"""The products of few rows in register tiles against NumPy, for both widths of vector registers."""

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.kernels import _tile

seeds, few = st.integers(0, 2**32 - 1), st.integers(0, 9)
dims = st.sampled_from([1, 3, 8, 16, 17, 31, 40, 64, 100, 130])


def guarded(rows, width):
    """An array (rows, width) inside a larger one of NaN: the view, and the whole."""
    whole = np.full((rows + 2, width + 3), np.nan, np.float32)
    return whole[1 : rows + 1, 1 : width + 1], whole


def assert_untouched(view, whole):
    view[...] = 0
    assert np.isnan(whole).sum() == whole.size - view.size


@pytest.mark.parametrize("name", ["dot_products_8", "dot_products_16"])
@given(seed=seeds, rows=few, width=st.integers(0, 13), dim=dims)
@example(seed=0, rows=7, width=11, dim=130)
def test_dot_products_match_numpy(name, seed, rows, width, dim):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((n, dim)).astype(np.float32) for n in (rows, width))
    out, whole = guarded(rows, width)
    call(name)(out, x, w)
    np.testing.assert_allclose(out, x.astype(np.float64) @ w.T, atol=1e-5 * dim**0.5)
    assert_untouched(out, whole)


@pytest.mark.parametrize("name", ["short_product_32", "short_product_64"])
@given(seed=seeds, rows=few, depth=few, dim=dims, turned=st.booleans(), beta=st.sampled_from([0.0, 1.0]))
@example(seed=0, rows=7, depth=3, dim=130, turned=True, beta=0.0)
def test_short_product_matches_numpy(name, seed, rows, depth, dim, turned, beta):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((depth, rows) if turned else (rows, depth)).astype(np.float32)
    a = a.T if turned else a
    b = rng.standard_normal((depth, dim)).astype(np.float32)
    out, whole = guarded(rows, dim)
    if beta:
        out[...] = 1
    call(name)(out, a, b, np.float32(beta))
    np.testing.assert_allclose(out, a.astype(np.float64) @ b + beta, atol=1e-5)
    assert_untouched(out, whole)


def call(name, made={}):  # noqa: B006 (compiled once)
    """A helper of _tile.py as a function that Python can call."""
    if numba.config.DISABLE_JIT:
        return getattr(_tile, name)
    if name not in made:
        helper = getattr(_tile, name)
        made[name] = numba.njit(lambda *arguments: helper(*arguments))
    return made[name]
