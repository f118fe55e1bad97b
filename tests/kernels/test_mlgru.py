"""The recurrence of the MatMul-free LM against its NumPy twin, and the twin against central differences."""

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, copies, normal_arrays, numeric_gradient, wide
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import reference_mmf as twin
from flashlm_numba.kernels.mlgru import mlgru_backward, mlgru_forward

shapes = st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 70))
scales = st.sampled_from([1e-3, 1.0, 30.0, 1e4])  # large ones saturate the gates


def problem(seed, shape, scale):
    rng = np.random.default_rng(seed)
    dh, forget, value = normal_arrays(rng, [shape] * 3)
    bound = rng.uniform(0, 1, shape[2]).astype(np.float32)
    bound[rng.uniform(size=len(bound)) < 0.3] = 0  # as in the first block
    return dh, forget * np.float32(scale), value * np.float32(scale), bound


@given(shape=shapes, scale=scales, seed=st.integers(0, 99))
def test_mlgru_is_as_accurate_as_numpy(shape, scale, seed):
    dh, forget, value, bound = problem(seed, shape, scale)
    inputs = forget, value, bound
    (wide_inputs,) = wide([inputs])
    h, truth = mlgru_forward(*inputs), twin.mlgru_forward(*wide_inputs)
    assert_as_accurate(h, twin.mlgru_forward(*inputs), truth, 8, "h")
    found = mlgru_backward(dh, h, *inputs)
    plain = twin.mlgru_backward(dh, h, *inputs)
    exact = twin.mlgru_backward(dh.astype(np.float64), truth, *wide_inputs)
    for name, got, want32, want64 in zip(("dforget", "dvalue", "dbound"), found, plain, exact, strict=True):
        assert_as_accurate(got, want32, want64, 16, name)


def test_mlgru_backward_twin_agrees_with_central_differences():
    (dh, *inputs) = wide([problem(3, (2, 5, 4), 1.0)])[0]
    found = twin.mlgru_backward(dh, twin.mlgru_forward(*inputs), *inputs)
    for name, x, gradient in zip(("forget", "value", "bound"), inputs, found, strict=True):
        numeric = numeric_gradient(lambda: float((dh * twin.mlgru_forward(*inputs)).sum()), x)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-6, atol=1e-8, err_msg=name)


@given(shape=shapes, seed=st.integers(0, 99))
def test_mlgru_has_the_same_bits_for_any_number_of_threads(shape, seed):
    dh, *inputs = problem(seed, shape, 1.0)
    before, found = numba.get_num_threads(), []
    try:
        for threads in (1, 2):
            numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
            h = mlgru_forward(*inputs)
            found.append([h, *mlgru_backward(dh, h, *inputs)])
    finally:
        numba.set_num_threads(before)
    for one, two in zip(*found, strict=True):
        np.testing.assert_array_equal(one, two)


@given(cut=st.integers(1, 19), seed=st.integers(0, 9))
def test_mlgru_is_causal_bit_for_bit(cut, seed):
    _, forget, value, bound = problem(seed, (2, 20, 37), 1.0)
    h = mlgru_forward(forget, value, bound)
    changed = copies([[forget, value]])[0]
    for x in changed:
        x[:, cut:] = np.random.default_rng(seed + 1).standard_normal(x[:, cut:].shape)
    np.testing.assert_array_equal(mlgru_forward(*changed, bound)[:, :cut], h[:, :cut])
    start = np.ascontiguousarray(forget[:, :cut]), np.ascontiguousarray(value[:, :cut])
    np.testing.assert_array_equal(mlgru_forward(*start, bound), h[:, :cut])


def test_mlgru_remembers_everything_at_a_bound_of_one():
    forget, value = np.full((1, 50, 3), -100, np.float32), np.ones((1, 50, 3), np.float32)
    assert not mlgru_forward(forget, value, np.ones(3, np.float32)).any()  # nothing ever enters
    h = mlgru_forward(forget, value, np.zeros(3, np.float32))  # nothing is remembered
    np.testing.assert_allclose(h, twin.silu(value), rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"value": np.zeros((1, 2, 4), np.float32)}, "value must have shape"),
        ({"bound": np.zeros(4, np.float32)}, "bound must have shape"),
        ({"forget": np.zeros((1, 2, 3))}, "forget must be float32"),
    ],
)
def test_mlgru_rejects_wrong_arrays(change, message):
    inputs = {"forget": np.zeros((1, 2, 3), np.float32), "value": np.zeros((1, 2, 3), np.float32)}
    inputs |= {"bound": np.zeros(3, np.float32)} | change
    with pytest.raises(ValueError, match=message):
        mlgru_forward(**inputs)
