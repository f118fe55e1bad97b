"""Rows rounded to int8 and int4: the error, the size, and arrays that are refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.model.rounded_rows import ROUNDINGS, round_rows, rows_bytes, widen_rows

KINDS = st.sampled_from(list(ROUNDINGS))


def drawn(seed, rows, columns, size):
    return np.random.default_rng(seed).standard_normal((rows, columns), np.float32) * np.float32(size)


@given(
    st.integers(0, 2**32 - 1),
    st.integers(0, 4),
    st.sampled_from([1, 2, 31, 32, 33, 50, 255, 257]),
    st.sampled_from([0, 1e-9, 1e-6, 0.02, 1, 1e4]),
    KINDS,
)
def test_a_weight_is_off_by_half_a_step_at_most(seed, rows, columns, size, kind):
    weight = drawn(seed, rows, columns, size)
    codes, scales = round_rows(weight, kind)
    assert codes.nbytes + scales.nbytes == rows_bytes(rows, columns, kind)
    found = widen_rows(codes, scales, columns, kind)
    largest, group, _ = ROUNDINGS[kind]
    assert found.shape == weight.shape
    for start in range(0, columns, group):
        part = slice(start, start + group)
        step = np.abs(weight[:, part]).max(axis=1, initial=0, keepdims=True) / largest
        # a float16 scale is off by 2**-11 of itself, or by 2**-25 where it is smallest, times the largest number
        slack = largest * np.maximum(step * 2**-11, 2**-25)
        assert (np.abs(found[:, part] - weight[:, part]) <= 0.5 * step + 1.01 * slack).all()


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 32, 50, 300]), KINDS)
def test_rounding_again_changes_nothing(seed, columns, kind):
    once = widen_rows(*round_rows(drawn(seed, 3, columns, 0.02), kind), columns, kind)
    twice = widen_rows(*round_rows(once, kind), columns, kind)
    # the largest number of a group is not always the largest that there is, so the scale may differ in its last bit
    np.testing.assert_allclose(twice, once, rtol=2**-10, atol=0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 33, 256]), KINDS)
def test_the_product_of_number_and_scale_is_exact(seed, columns, kind):
    codes, scales = round_rows(drawn(seed, 3, columns, 0.02), kind)
    found = widen_rows(codes, scales, columns, kind)
    numbers = codes if kind == "int8" else np.stack([codes & 15, codes >> 4], axis=2).reshape(3, -1)[:, :columns] - 8.0
    wide = numbers.astype(np.float64) * np.repeat(scales.astype(np.float64), ROUNDINGS[kind].group, axis=1)[:, :columns]
    np.testing.assert_array_equal(found, wide)


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e9])
def test_a_row_that_no_scale_fits_is_refused(value):
    weight = np.ones((2, 40), np.float32)
    weight[1, 3] = value
    with pytest.raises(ValueError, match="beyond what int8 can hold"):
        round_rows(weight, "int8")


@pytest.mark.parametrize("change", [lambda c, s: (c[:, :-1], s), lambda c, s: (c, s[:1]), lambda c, s: (c * 1.0, s)])
def test_arrays_that_do_not_fit_are_refused(change):
    codes, scales = change(*round_rows(np.ones((3, 40), np.float32), "int4"))
    with pytest.raises(ValueError, match="40 columns in int4 take 20 bytes and 2 scales per row, got"):
        widen_rows(codes, scales, 40, "int4")
