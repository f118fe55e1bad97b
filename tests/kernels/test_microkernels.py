"""The products of few rows in register tiles against NumPy, for both widths of vector registers."""

import functools

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.kernels import _microkernels
from flashlm_numba.kernels._microkernels import TileLeft, TileOut, TileRight, address_of

seeds, few = st.integers(0, 2**32 - 1), st.integers(0, 9)
dims = st.sampled_from([1, 3, 8, 16, 17, 31, 40, 64, 100, 130])


def guarded(rows, width):
    """An array (rows, width) inside a larger one of NaN: the view, and the whole."""
    whole = np.full((rows + 2, width + 3), np.nan, np.float32)
    return whole[1 : rows + 1, 1 : width + 1], whole


def assert_untouched(view, whole):
    view[...] = 0
    assert np.isnan(whole).sum() == whole.size - view.size


SLOW = pytest.mark.slow  # each is compiled here


@pytest.mark.parametrize("kind", [(8, 4), pytest.param((16, 4), marks=SLOW), pytest.param((8, 1), marks=SLOW), (16, 1)])
@given(seed=seeds, rows=few, width=st.integers(0, 13), dim=dims)
@example(seed=0, rows=7, width=11, dim=130)
def test_dot_products_match_numpy(kind, seed, rows, width, dim):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((n, dim)).astype(np.float32) for n in (rows, width))
    if kind[1] == 1:
        w = rng.integers(-128, 128, (width, dim)).astype(np.int8)
    out, whole = guarded(rows, width)
    call("all_dot_products", kind)(out, x, w)
    scale = 1 if kind[1] == 4 else 100
    np.testing.assert_allclose(out, x.astype(np.float64) @ w.T, atol=1e-5 * scale * dim**0.5)
    assert_untouched(out, whole)


@given(seed=seeds, width=st.integers(0, 13), dim=dims)
def test_row_products_match_numpy(seed, width, dim):
    rng = np.random.default_rng(seed)
    x, w = (rng.standard_normal((n, dim)).astype(np.float32) for n in (1, width))
    out, whole = guarded(1, width)
    call("row_products")(out, x, w)
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


@pytest.mark.parametrize(("width", "height"), [(16, 6), (16, 16), (32, 12)])
@given(
    seed=seeds,
    rows=st.integers(0, 27),
    depth=st.integers(1, 5),
    taps=st.integers(1, 3),
    accumulate=st.booleans(),
)
def test_tile_products_match_numpy_and_each_other(width, height, seed, rows, depth, taps, accumulate):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(n).astype(np.float32) for n in (taps * rows * depth + 3, taps * depth * width + 5))
    before = rng.standard_normal((rows, width)).astype(np.float32)

    def found(height):
        out = np.full((rows + 1) * (width + 2), np.nan, np.float32)
        inside = out[1 : 1 + rows * (width + 2)].reshape(rows, width + 2)[:, :width]
        inside[...] = before
        # a (taps, rows, depth) from 3 on, its rows one after another; b (taps, depth, width) from 5 on
        to, left = TileOut(address_of(out, 1), width + 2), TileLeft(address_of(a, 3), depth, 1, rows * depth)
        right = TileRight(address_of(b, 5), width, depth * width)
        call(f"tile_products_{width}", height)(to, left, right, rows, depth, taps, accumulate)
        result = inside.copy()
        inside[...] = np.nan
        assert np.isnan(out).all()  # nothing beside it was written
        return result

    want = np.einsum("tmk,tkw->mw", a[3:].reshape(taps, rows, depth).astype(float), b[5:].reshape(taps, depth, width))
    got = found(height)
    np.testing.assert_allclose(got, want + before * accumulate, atol=1e-5)
    if width == 16:  # the same bits whatever the height
        np.testing.assert_array_equal(got, found(6))


@pytest.mark.parametrize("many", [2, 4])
@given(seed=seeds, rows=st.integers(0, 11), depth=st.integers(1, 5), taps=st.integers(1, 3))
def test_batched_products_match_numpy(many, seed, rows, depth, taps):
    rng = np.random.default_rng(seed)
    a = rng.standard_normal(taps * rows * depth + 3).astype(np.float32)
    b = rng.standard_normal(rows * taps * depth * 32 + 5).astype(np.float32)
    out = np.full((rows + 1) * 34, np.nan, np.float32)
    inside = out[1 : 1 + rows * 34].reshape(rows, 34)[:, :32]
    # a (taps, rows, depth) from 3 on, b (rows, taps, depth, 32) from 5 on
    to, left = TileOut(address_of(out, 1), 34), TileLeft(address_of(a, 3), depth, 1, rows * depth)
    right = TileRight(address_of(b, 5), 32, depth * 32)
    call("batched_products_32", many)(to, left, right, taps * depth * 32, rows, depth, taps)
    left_operand, right_operand = a[3:].reshape(taps, rows, depth), b[5:].reshape(rows, taps, depth, 32)
    want = np.einsum("tmk,mtkw->mw", left_operand.astype(float), right_operand)
    np.testing.assert_allclose(inside, want, atol=1e-5)
    inside[...] = np.nan
    assert np.isnan(out).all()  # nothing beside it was written


@functools.cache
def call(name, key=None):
    """A helper of _microkernels.py, or the one of this key in a table, as a function that Python can call."""
    helper = getattr(_microkernels, name) if key is None else getattr(_microkernels, name)[key]
    return helper if numba.config.DISABLE_JIT else numba.njit(lambda *arguments: helper(*arguments))
