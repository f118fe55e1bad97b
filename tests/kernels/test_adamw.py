"""AdamW's kernels against their float64 references, at odd shapes and for any number of threads."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, copies, normal_arrays, wide
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import reference_optim
from flashlm_numba.kernels._elementwise import SMALL
from flashlm_numba.kernels.adamw import adamw_rowwise_step, adamw_step

# the compiled runs also cross the threshold of the parallel kernels; in plain Python that takes minutes
LARGE = () if numba.config.DISABLE_JIT else (SMALL, 2 * SMALL + 1_037)


@pytest.mark.parametrize("size", [0, 1, 31, 1_025, *LARGE])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_step_matches_reference(size, decay):
    rng = np.random.default_rng(size)
    weight, exp_avg, exp_avg_sq, grad = normal_arrays(rng, [size] * 4)
    state = [[weight, exp_avg * np.float32(0.1), np.square(exp_avg_sq)]]
    settings = {"step": 3, "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": decay, "scale": 0.3}
    (got,), (ref32,), ref64 = copies(state), copies(state), wide(state)[0]
    adamw_step(*got, grad, **settings)
    reference_optim.adamw_step(*ref32, grad, **settings)
    reference_optim.adamw_step(*ref64, grad.astype(np.float64), **settings)
    for name, a, b, c in zip(("weight", "exp_avg", "exp_avg_sq"), got, ref32, ref64, strict=True):
        assert_as_accurate(a, b, c, name=name)


@given(rows=st.integers(0, 150), columns=st.integers(0, 20), seed=st.integers(0, 99), decay=st.sampled_from([0.0, 0.1]))
def test_sparse_adamw_leaves_rows_without_a_gradient_alone(rows, columns, seed, decay):
    rng = np.random.default_rng(seed)
    weight, exp_avg, exp_avg_sq, grad = normal_arrays(rng, [(rows, columns)] * 4)
    grad[rng.random(rows) < 0.5] = 0
    grad[rng.random((rows, columns)) < 0.9] = -0.0  # single numbers too, and zeros of both signs
    state = [[weight, exp_avg * np.float32(0.1), np.square(exp_avg_sq)]]
    settings = {"step": 3, "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": decay, "scale": 0.3}
    (got,), (ref32,), ref64 = copies(state), copies(state), wide(state)[0]
    adamw_step(*got, grad, **settings, sparse=True)
    reference_optim.adamw_step(*ref32, grad, **settings, sparse=True)
    reference_optim.adamw_step(*ref64, grad.astype(np.float64), **settings, sparse=True)
    idle = ~(grad != 0).any(axis=1)
    for name, before, a, b, c in zip(("weight", "exp_avg", "exp_avg_sq"), state[0], got, ref32, ref64, strict=True):
        assert_as_accurate(a, b, c, name=name)
        np.testing.assert_array_equal(a[idle], before[idle], err_msg=name)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), *((n // 8, 8) for n in LARGE[:1])])
@pytest.mark.parametrize("sparse", [False, True])
def test_adamw_without_a_first_moment_is_adamw_with_beta1_of_zero(shape, sparse):
    rng = np.random.default_rng(shape[0])
    weight, exp_avg_sq, grad = normal_arrays(rng, [shape] * 3)
    grad[::3] = 0
    settings = {
        "lr": 0.01,
        "beta1": 0.0,
        "beta2": 0.99,
        "eps": 1e-8,
        "weight_decay": 0.1,
        "scale": 0.3,
        "sparse": sparse,
    }
    start = [[weight, np.square(exp_avg_sq)]]
    (got,), (ref32,), ref64, (kept,) = copies(start), copies(start), wide(start)[0], copies(start)
    exp_avg = np.zeros(shape, np.float32)
    for step in (1, 2, 3):
        adamw_step(got[0], None, got[1], grad, step=step, **settings)
        adamw_step(kept[0], exp_avg, kept[1], grad, step=step, **settings)
        reference_optim.adamw_step(ref32[0], None, ref32[1], grad, step=step, **settings)
        reference_optim.adamw_step(ref64[0], None, ref64[1], grad.astype(np.float64), step=step, **settings)
    for name, a, b, c, d in zip(("weight", "exp_avg_sq"), got, ref32, ref64, kept, strict=True):
        assert_as_accurate(a, b, c, name=name)
        np.testing.assert_allclose(a, d, rtol=1e-6, atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match="beta1 must be 0 where there is no exp_avg"):
        adamw_step(got[0], None, got[1], grad, step=1, **settings | {"beta1": 0.9})


def test_sparse_adamw_sees_gradients_of_any_size_and_hides_no_nan():
    weight, exp_avg, exp_avg_sq = (np.zeros((3, 4), np.float32) for _ in range(3))
    grad = np.zeros((3, 4), np.float32)
    grad[0, 3], grad[1, 0] = np.nan, 1e-10
    adamw_step(
        weight,
        exp_avg,
        exp_avg_sq,
        grad,
        step=1,
        lr=0.1,
        beta1=0.9,
        beta2=0.9,
        eps=1e-12,
        weight_decay=0.0,
        sparse=True,
    )
    assert np.isnan(weight[0, 3])
    assert weight[1, 0] < -0.09
    assert not weight[2].any()
    with pytest.raises(ValueError, match="sparse is for tables"):
        adamw_step(
            *(np.zeros(3, np.float32) for _ in range(4)),
            step=1,
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            weight_decay=0.0,
            sparse=True,
        )


@given(
    rows=st.integers(0, 150),
    columns=st.integers(0, 20),
    seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 0.1]),
    beta1=st.sampled_from([None, 0.0, 0.9]),
    beta2=st.sampled_from([0.0, 0.99]),
)
def test_adamw_rowwise_step_matches_reference(rows, columns, seed, decay, beta1, beta2):
    rng = np.random.default_rng(seed)
    weight, exp_avg, grad = normal_arrays(rng, [(rows, columns)] * 3)
    (exp_avg_sq,) = normal_arrays(rng, [(rows,)])
    exp_avg = None if beta1 is None else exp_avg * np.float32(0.1)
    steps = rng.integers(1, 2_000, rows)
    settings = {"lr": 0.01, "beta1": beta1 or 0.0, "beta2": beta2, "eps": 1e-8, "weight_decay": decay, "scale": 0.3}
    starts = [weight, exp_avg, np.square(exp_avg_sq), steps]
    got, ref32 = ([None if x is None else x.copy() for x in starts] for _ in range(2))
    ref64 = [x if x is None or x is steps else x.astype(np.float64) for x in starts]
    ref64[3] = steps.copy()
    stepped = np.zeros(rows, int)
    for share in (0.5, 0.9, 1.0):
        now = grad.copy()
        now[rng.random(rows) < share] = 0
        now[rng.random((rows, columns)) < 0.8] = -0.0  # single numbers too, and zeros of both signs
        before = [x if x is None else x.copy() for x in got]
        adamw_rowwise_step(*got, now, **settings)
        reference_optim.adamw_rowwise_step(*ref32, now, **settings)
        reference_optim.adamw_rowwise_step(*ref64, now.astype(np.float64), **settings)
        idle = ~(now != 0).any(axis=1)
        stepped += ~idle
        for name, old, new in zip(("weight", "exp_avg", "exp_avg_sq", "steps"), before, got, strict=True):
            if new is not None:
                np.testing.assert_array_equal(new[idle], old[idle], err_msg=name)
    np.testing.assert_array_equal(got[3], steps + stepped)
    for name, a, b, c in zip(("weight", "exp_avg", "exp_avg_sq"), got, ref32, ref64, strict=False):
        if a is not None:
            assert_as_accurate(a, b, c, name=name)


def test_adamw_rowwise_step_of_one_column_is_adamw_of_each_row():
    rng = np.random.default_rng(0)
    (weight,) = normal_arrays(rng, [(200, 1)])
    exp_avg, exp_avg_sq, steps = np.zeros((200, 1), np.float32), np.zeros(200, np.float32), np.zeros(200, np.int64)
    single = [[weight[[r]], exp_avg[[r]], exp_avg_sq[[r], None]] for r in range(200)]
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.3}
    for _ in range(4):
        (grad,) = normal_arrays(rng, [(200, 1)])
        grad[rng.random(200) < 0.5] = 0
        adamw_rowwise_step(weight, exp_avg, exp_avg_sq, steps, grad, **settings)
        for r in np.flatnonzero(grad):
            adamw_step(*single[r], grad[[r]], step=int(steps[r]), **settings)
    np.testing.assert_allclose(weight[:, 0], [w.item() for w, _, _ in single], rtol=1e-6)
    np.testing.assert_allclose(exp_avg_sq, [v.item() for _, _, v in single], rtol=1e-6)


def test_adamw_rowwise_step_sees_gradients_of_any_size_and_hides_no_nan():
    grad = np.zeros((5, 4), np.float32)
    grad[0, 3], grad[1, 0], grad[2, 1], grad[3, 2] = np.nan, 1e-10, 1e-44, 1e15
    weight, exp_avg_sq, steps = np.zeros((5, 4), np.float32), np.zeros(5, np.float32), np.zeros(5, np.int64)
    settings = {"lr": 0.1, "beta1": 0.0, "beta2": 0.9, "eps": 1e-12, "weight_decay": 0.0}
    adamw_rowwise_step(weight, None, exp_avg_sq, steps, grad, **settings)
    assert np.isnan(weight[0]).all()  # the row's one moment is NaN
    assert weight[1, 0] < -0.19  # 0.1 times the root of the 4 columns
    assert np.abs(weight[2]).max() < 1e-30
    assert weight[3, 2] < -0.19
    assert not weight[4].any()
    assert steps.tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="beta1 must be 0 where there is no exp_avg"):
        adamw_rowwise_step(weight, None, exp_avg_sq, steps, grad, **settings | {"beta1": 0.9})
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        adamw_rowwise_step(weight, None, exp_avg_sq, steps - 1, grad, **settings)
    with pytest.raises(ValueError, match=r"adamw_rowwise_step: steps must be int64, got int32"):
        adamw_rowwise_step(weight, None, exp_avg_sq, steps.astype(np.int32), grad, **settings)


def test_adamw_step_of_zero_gradient_only_decays():
    weight = np.full(40, 2, np.float32)
    zeros = [np.zeros(40, np.float32) for _ in range(3)]
    settings = {"step": 1, "lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    adamw_step(weight, *zeros, weight_decay=0.0, **settings)
    np.testing.assert_array_equal(weight, 2)
    adamw_step(weight, *zeros, weight_decay=0.5, **settings)
    np.testing.assert_array_equal(weight, 1.5)


@pytest.mark.parametrize("size", [40, *LARGE[:1]])
def test_adamw_moments_fade_to_zero_and_are_never_denormal(size):
    """Processors are slow with denormal numbers: a run would slow down as the moments of rare rows fade."""
    weight, exp_avg, exp_avg_sq = (np.full(size, value, np.float32) for value in (0.5, 1e-3, 1e-6))
    grad = np.logspace(-44, 0, size).astype(np.float32)
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    smallest = np.finfo(np.float32).tiny
    for step in range(1, 1_500 if size == 40 else 3):
        adamw_step(weight, exp_avg, exp_avg_sq, grad if step == 1 else np.zeros_like(grad), step=step, **settings)
        for moment in (exp_avg, exp_avg_sq):
            assert not ((moment != 0) & (np.abs(moment) < smallest)).any()
    if size == 40:
        assert not exp_avg.any()
        assert not exp_avg_sq[:10].any()


def test_adamw_hides_no_nan():
    weight, exp_avg, exp_avg_sq = (np.ones(3, np.float32) for _ in range(3))
    grad = np.array([np.nan, np.inf, 0], np.float32)
    with np.errstate(invalid="ignore"):
        adamw_step(weight, exp_avg, exp_avg_sq, grad, step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, weight_decay=0.0)
    assert np.isnan(weight).tolist() == [True, True, False]
    assert np.isnan(exp_avg).tolist() == [True, False, False]


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
@pytest.mark.parametrize("kind", ["all", "sparse", "rowwise"])
def test_adamw_is_the_same_for_any_thread_count(kind, threads):
    rng = np.random.default_rng(0)
    rows, columns = 3 * SMALL // 64 + 5, 67
    weight, exp_avg, exp_avg_sq, grad = normal_arrays(rng, [(rows, columns)] * 4)
    exp_avg_sq = np.square(exp_avg_sq if kind != "rowwise" else exp_avg_sq[:, 0].copy())
    grad[rng.random(rows) < 0.5] = 0
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "scale": 0.7}
    results = []
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        mine = [x.copy() for x in (weight, exp_avg, exp_avg_sq)]
        if kind == "rowwise":
            mine.append(np.full(rows, 3))
            adamw_rowwise_step(*mine, grad, **settings)
        else:
            adamw_step(*mine, grad, step=2, sparse=kind == "sparse", **settings)
        results.append(mine)
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_adamw_step_rejects_wrong_arguments():
    x = np.zeros((2, 3), np.float32)
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.0}
    with pytest.raises(ValueError, match=r"adamw_step: grad must have shape \(2, 3\), got \(3, 2\)"):
        adamw_step(x, x.copy(), x.copy(), np.zeros((3, 2), np.float32), step=1, **settings)
    with pytest.raises(ValueError, match="adamw_step: step counts from 1, got 0"):
        adamw_step(x, x.copy(), x.copy(), x.copy(), step=0, **settings)
