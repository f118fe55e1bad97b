"""BitLinear against its NumPy twin, and the twin against central differences."""

import numpy as np
import pytest
from helpers import assert_as_accurate, normal_arrays, numeric_gradient, wide
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import reference_mmf as twin
from flashlm_numba.kernels._ternary_dots import available
from flashlm_numba.kernels.bitlinear import absmean_ternary, bitlinear_backward, bitlinear_forward

shapes = st.tuples(st.integers(0, 20), st.integers(0, 90), st.integers(1, 300))  # M, R, K
scales = st.sampled_from([1e-6, 1e-3, 1.0, 1e5])


def problem(seed, shape, scale=1.0):
    """x whose normed rows are whole multiples of their largest magnitude / 127, so that no rounding is undecided."""
    rows, outputs, columns = shape
    rng = np.random.default_rng(seed)
    dout, x, norm, weight = normal_arrays(rng, [(rows, outputs), (rows, columns), columns, (outputs, columns)])
    norm = 1 + norm * np.float32(0.1)
    steps = np.rint(x / np.maximum(np.abs(x).max(1, keepdims=True), 1e-9) * 127)
    x = (steps / norm * np.float32(scale)).astype(np.float32)
    half = np.abs(weight).mean() / 2 if weight.size else 0
    weight[np.abs(np.abs(weight) - half) < 0.05 * half] *= np.float32(0.8)
    return dout, x, norm, weight


@given(shape=shapes, scale=scales, seed=st.integers(0, 99))
def test_bitlinear_is_as_accurate_as_numpy(shape, scale, seed):
    dout, x, norm, weight = problem(seed, shape, scale)
    ((wide_dout, *wide_inputs),) = wide([(dout, x, norm, weight)])
    out, rstd = bitlinear_forward(x, norm, weight)
    plain, saved32 = twin.bitlinear_forward(x, norm, weight)
    truth, saved64 = twin.bitlinear_forward(*wide_inputs)
    assert_as_accurate(out, plain, truth, 8, "out")
    found = bitlinear_backward(dout, x, norm, weight, rstd)
    want32, want64 = twin.bitlinear_backward(dout, saved32), twin.bitlinear_backward(wide_dout, saved64)
    for name, got, plain, truth in zip(("dx", "dnorm", "dweight"), found, want32, want64, strict=True):
        assert_as_accurate(got, plain, truth, 16, name)


@given(shape=shapes, seed=st.integers(0, 99))
@pytest.mark.parametrize("variant", available())
def test_every_product_gives_the_same_bits(variant, shape, seed):
    _, x, norm, weight = problem(seed, shape)
    out, rstd = bitlinear_forward(x, norm, weight, variant=variant)
    plain, rstd_plain = bitlinear_forward(x, norm, weight, variant="plain")
    np.testing.assert_array_equal(out, plain)
    np.testing.assert_array_equal(rstd, rstd_plain)


@given(shape=shapes, seed=st.integers(0, 99))
def test_a_row_gives_the_same_bits_alone(shape, seed):
    _, x, norm, weight = problem(seed, shape)
    out, _ = bitlinear_forward(x, norm, weight)
    for m in range(len(x)):
        np.testing.assert_array_equal(bitlinear_forward(x[m : m + 1], norm, weight)[0][0], out[m])


def test_bitlinear_backward_twin_agrees_with_central_differences():
    """Without the rounding, through which the gradient passes as if it were not there."""
    ((dout, x, norm, weight),) = wide([problem(1, (3, 4, 5))])

    def out():
        return twin.bitlinear_forward(x, norm, weight, rounded=False)

    found = twin.bitlinear_backward(dout, out()[1])
    for name, value, gradient in zip(("x", "norm", "weight"), (x, norm, weight), found, strict=True):
        numeric = numeric_gradient(lambda: float((dout * out()[0]).sum()), value)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@given(shape=st.tuples(st.integers(0, 9), st.integers(0, 9)), scale=scales, seed=st.integers(0, 99))
def test_absmean_ternary_agrees_with_its_twin_and_keeps_its_own_result(shape, scale, seed):
    (weight,) = normal_arrays(np.random.default_rng(seed), [shape])
    weight *= np.float32(scale)
    values, size = absmean_ternary(weight)
    want, want_size = twin.absmean_ternary(weight)
    np.testing.assert_array_equal(values, want)
    assert size == want_size
    again, size_again = absmean_ternary(values * size)
    np.testing.assert_array_equal(again, values)
    assert size_again == (size if values.any() else np.float32(1e-5))


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_row_that_is_not_finite_gives_nan(bad):
    _, x, norm, weight = problem(2, (3, 4, 9))
    x[1, 4] = bad
    out, _ = bitlinear_forward(x, norm, weight)
    assert np.isnan(out[1]).all()
    assert np.isfinite(out[[0, 2]]).all()


def test_a_row_of_zeros_gives_zeros():
    out, _ = bitlinear_forward(np.zeros((2, 5), np.float32), np.ones(5, np.float32), np.ones((3, 5), np.float32))
    assert not out.any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": np.zeros((2, 4), np.float32)}, "x must have shape"),
        ({"norm": np.zeros(4, np.float32)}, "norm must have shape"),
        ({"weight": np.zeros((2, 3))}, "weight must be float32"),
        ({"weight": np.zeros((1, 2**18), np.float32)}, "x must have shape"),
    ],
)
def test_bitlinear_rejects_wrong_arrays(change, message):
    inputs = {"x": np.zeros((2, 3), np.float32), "norm": np.zeros(3, np.float32)}
    inputs |= {"weight": np.zeros((2, 3), np.float32)} | change
    with pytest.raises(ValueError, match=message):
        bitlinear_forward(**inputs)
