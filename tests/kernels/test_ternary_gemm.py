"""Many rows times a ternary matrix, rounded to int8: against the NumPy twin, by every variant of this processor."""

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.kernels import _ternary_dots, reference, ternary_gemm
from flashlm_numba.kernels import ternary_wgrad as wgrad
from flashlm_numba.kernels._ternary_layer import new_arithmetic, ternary_weight_gradient
from flashlm_numba.kernels.ternary_wgrad import MOST_ROWS, ternary_wgrad

VARIANTS = _ternary_dots.available()
seeds = st.integers(0, 2**32 - 1)


@pytest.mark.parametrize("variant", VARIANTS)
@given(seeds, st.integers(0, 20), st.sampled_from([0, 1, 3, 4, 5, 64, 683]), st.sampled_from([0, 1, 31, 64, 65, 130]))
@example(0, 13, 683, 1366)
def test_products_match_the_reference(variant, seed, rows, columns, outputs):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, columns), np.float32)
    weight = rng.integers(-1, 2, (outputs, columns)).astype(np.float32)
    codes = ternary_gemm.pack_columns(weight)
    found = ternary_gemm.ternary_gemm(x, weight, codes, variant=variant)
    q, scales = reference.quantize_rows(x)
    exact = reference.ternary_gemv_int8(weight, q)
    if variant == "plain":  # float32 sums of rounded numbers
        assert_as_accurate(found, (q * scales[:, None]) @ weight.T, exact * scales[:, None].astype(np.float64), 8)
    else:  # the sums are exact, and scaled once
        np.testing.assert_array_equal(found, exact.astype(np.float32) * scales[:, None])
    before = rng.standard_normal(found.shape, np.float32)
    added = ternary_gemm.ternary_gemm(x, weight, codes, before.copy(), variant=variant)
    np.testing.assert_allclose(added, before + found, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "plain"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_sums_do_not_overflow(variant, sign):
    columns = 4_096
    weight = np.full((70, columns), sign, np.float32)
    x = np.ones((7, columns), np.float32)
    found = ternary_gemm.ternary_gemm(x, weight, ternary_gemm.pack_columns(weight), variant=variant)
    np.testing.assert_array_equal(found, np.float32(sign * 127 * columns) * np.float32(1 / 127))


@pytest.mark.parametrize("variant", VARIANTS)
def test_rows_that_are_not_finite_stay_so_and_alone(variant):
    weight = np.ones((3, 8), np.float32)
    x = np.ones((4, 8), np.float32)
    x[1, 3], x[2, 0] = np.nan, np.inf
    found = ternary_gemm.ternary_gemm(x, weight, ternary_gemm.pack_columns(weight), variant=variant)
    assert np.isnan(found[1:3]).all()
    np.testing.assert_allclose(found[[0, 3]], 8, rtol=1e-6)


@pytest.mark.skipif(len(VARIANTS) == 1, reason="this processor has the plain loops only")
def test_a_variant_that_computes_wrongly_is_not_used(monkeypatch):
    real = ternary_gemm.KERNELS[VARIANTS[-1]]

    def broken(out, *arguments):
        real(out, *arguments)
        out[-1, -1] += 1

    monkeypatch.setitem(ternary_gemm.KERNELS, VARIANTS[-1], broken)
    ternary_gemm.gemm_variant.cache_clear()
    with pytest.warns(UserWarning, match="computes wrongly on this machine; not used"):
        assert ternary_gemm.gemm_variant() == "plain"
    monkeypatch.undo()
    ternary_gemm.gemm_variant.cache_clear()
    assert ternary_gemm.gemm_variant() == VARIANTS[-1]


def test_what_does_not_fit_is_refused():
    weight = np.ones((3, 8), np.float32)
    with pytest.raises(ValueError, match="only -1, 0 and \\+1"):
        ternary_gemm.pack_columns(weight * 2)
    codes = ternary_gemm.pack_columns(weight)
    with pytest.raises(ValueError, match=r"x must have shape \(any, 8\)"):
        ternary_gemm.ternary_gemm(np.ones((2, 7), np.float32), weight, codes)
    with pytest.raises(ValueError, match="codes must have shape"):
        ternary_gemm.ternary_gemm(np.ones((2, 8), np.float32), weight, codes[:1])


@given(seeds, st.integers(0, 70), st.integers(0, 70), st.integers(0, 130))
def test_weight_gradient_errs_by_its_rounding_only(seed, rows, outputs, columns):
    rng = np.random.default_rng(seed)
    a = (rng.standard_normal((rows, outputs)) * np.exp(2 * rng.standard_normal((rows, 1)))).astype(np.float32)
    b = (rng.standard_normal((rows, columns)) * np.exp(2 * rng.standard_normal((rows, 1)))).astype(np.float32)
    want = a.astype(np.float64).T @ b.astype(np.float64)
    found = ternary_wgrad(a, b)
    twin = reference.ternary_wgrad_int8(a, b) if VARIANTS[-1] in _ternary_dots.FOURFOLD else want
    # the twin divides where the kernel multiplies by the inverse: a number halfway may be rounded to the other side
    np.testing.assert_allclose(found, twin, rtol=0, atol=2e-2 * np.abs(twin).max(initial=0) + 1e-30)
    # half a unit of each operand's rounding
    s = np.abs(b).max(1, initial=0)[:, None] / 127
    t = np.abs(a * s).max(0, initial=0)[:, None] / 127
    p = np.abs(b) / np.where(s > 0, s, 1)
    room = 0.5 * t * p.sum(0) + 0.5 * np.abs(a.T) @ np.broadcast_to(s, b.shape) + 0.25 * rows * t
    assert (np.abs(found - want) <= 1.01 * room + 1e-5 * np.abs(want).max(initial=0) + 1e-30).all()


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="the rounding to bytes reads the bits of a float")
@given(seeds, st.integers(1, 30), st.integers(1, 40), st.integers(0, 40))
def test_columns_are_rounded_the_same_in_any_share(seed, rows, outputs, cut):
    """Several threads divide the outputs of a weight's gradient; each rounds its own columns of the operand."""
    rng = np.random.default_rng(seed)
    a, groups, cut = rng.standard_normal((rows, outputs)).astype(np.float32), -(-rows // 4), min(cut, outputs)
    shares = np.abs(rng.standard_normal(4 * groups)).astype(np.float32)

    def rounded(first, last):
        q = np.zeros((last - first, groups), np.int32)
        scales, sums = np.zeros(last - first, np.float32), np.zeros(last - first, np.int32)
        assert wgrad._round_columns(q, scales, sums, a, first, shares)
        return q, scales, sums

    for whole, *parts in zip(rounded(0, outputs), rounded(0, cut), rounded(cut, outputs), strict=True):
        np.testing.assert_array_equal(np.concatenate(parts), whole)


@given(seeds, st.integers(0, 30), st.integers(1, 40), st.integers(0, 40), st.sampled_from(VARIANTS))
def test_a_share_of_the_outputs_gets_its_rows_of_the_weight_gradient(seed, rows, outputs, cut, variant):
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, outputs), (rows, 70)))
    whole, cut = ternary_wgrad(a, b, variant=variant), min(cut, outputs)
    arithmetic = new_arithmetic(True, _ternary_dots.VARIANTS.index(variant), [(outputs, 70)], rows, 1)
    arithmetic, found = arithmetic._replace(int8_gradient=wgrad.ternary_wgrad_address()), np.zeros_like(whole)
    for first, last in ((0, cut), (cut, outputs)):
        ternary_weight_gradient(found[first:last], a, b, first, arithmetic, 0)
    np.testing.assert_allclose(found, whole, rtol=1e-5, atol=1e-5 * np.abs(whole).max(initial=0))


def test_weight_gradient_of_more_rows_than_an_int32_can_add_up():
    rows = 2 * MOST_ROWS + 5_000
    a, b = np.full((rows, 2), -3, np.float32), np.full((rows, 1), 2, np.float32)
    np.testing.assert_allclose(ternary_wgrad(a, b), np.full((2, 1), -6.0 * rows), rtol=1e-3)


@pytest.mark.parametrize("variant", VARIANTS)
def test_weight_gradient_is_exact_without_bytes_and_shows_what_is_not_finite(variant):
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((9, 5), np.float32), rng.standard_normal((9, 70), np.float32)
    if variant not in _ternary_dots.FOURFOLD:
        np.testing.assert_allclose(ternary_wgrad(a, b, variant=variant), a.T @ b, rtol=1e-4, atol=1e-5)
    b[3, 2] = np.nan
    assert np.isnan(ternary_wgrad(a, b, variant=variant)[:, 2]).all()
    a[1, 1], b[3, 2] = np.inf, 1
    assert not np.isfinite(ternary_wgrad(a, b, variant=variant)[1]).any()
