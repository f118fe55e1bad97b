"""The optimiser kernels against their float64 references, at odd shapes and for any number of threads."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import _math, optimizers, reference_optim

V3 = {"lr": 0.02, "momentum": 0.95, "beta2": 0.999, "eps": 1e-8, "nesterov": False, "update_rms": 0.2}
PUBLISHED = {"lr": 0.02, "momentum": 0.95, "beta2": 0.95, "eps": 1e-10, "nesterov": True, "update_rms": None}
# the compiled runs also cross the threshold of the parallel kernels; in plain Python that takes minutes
LARGE = () if numba.config.DISABLE_JIT else (optimizers.SMALL, 2 * optimizers.SMALL + 1_037)
SIDE = 12 if numba.config.DISABLE_JIT else 150


def arrays(rng, shapes, dtype=np.float32):
    return [rng.standard_normal(shape).astype(dtype) for shape in shapes]


def wide(lists):
    """Float64 copies of lists of arrays."""
    return [[x.astype(np.float64) for x in part] for part in lists]


def copies(lists):
    return [[x.copy() for x in part] for part in lists]


def test_a_momentum_that_fades_away_becomes_zero():
    """Numbers below 1.2e-38 would make every product with them slow; and only these kernels take them for zero."""
    if numba.config.DISABLE_JIT or not _math.FLUSHES:
        pytest.skip("denormal numbers are not flushed here")
    weight, momentum, second = (
        np.ones((4, 3), np.float32),
        np.full((4, 3), 1.2e-38, np.float32),
        np.zeros(4, np.float32),
    )
    momentum[0] = 1
    optimizers.normuon_step(
        [weight],
        [momentum],
        [second],
        [np.zeros((4, 3), np.float32)],
        lr=0.1,
        momentum=0.95,
        beta2=0.95,
        eps=1e-10,
        nesterov=True,
        update_rms=0.2,
    )
    assert momentum[0].tolist() == pytest.approx([0.95] * 3)
    assert not momentum[1:].any()
    assert np.float32(1e-40) * np.float32(0.5) > 0


# --- sum of squares ---


@pytest.mark.parametrize("size", [0, 1, 3, 4_095, 4_097, *LARGE])
def test_sum_of_squares_matches_float64(size):
    # magnitudes whose squares overflow and underflow float32
    x = np.random.default_rng(size).standard_normal(size).astype(np.float32) * np.float32(10) ** (
        np.arange(size, dtype=np.float32) % 60 - 30
    )
    np.testing.assert_allclose(optimizers.sum_of_squares(x), reference_optim.sum_of_squares(x), rtol=1e-12)
    assert optimizers.sum_of_squares(np.ones(size, np.float32)) == size  # every element counts


@pytest.mark.parametrize("size", [7, *LARGE[1:]])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_sum_of_squares_reveals_what_is_not_finite(size, bad):
    for at in (0, size // 2, size - 1):
        x = np.ones(size, np.float32)
        x[at] = bad
        assert not np.isfinite(optimizers.sum_of_squares(x))


# --- AdamW and the moving average ---


@pytest.mark.parametrize("size", [0, 1, 31, 1_025, *LARGE])
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_step_matches_reference(size, decay):
    rng = np.random.default_rng(size)
    weight, first, second, grad = arrays(rng, [size] * 4)
    state = [[weight, first * np.float32(0.1), np.square(second)]]
    settings = {"step": 3, "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": decay, "scale": 0.3}
    (got,), (ref32,), ref64 = copies(state), copies(state), wide(state)[0]
    optimizers.adamw_step(*got, grad, **settings)
    reference_optim.adamw_step(*ref32, grad, **settings)
    reference_optim.adamw_step(*ref64, grad.astype(np.float64), **settings)
    for name, a, b, c in zip(("weight", "first", "second"), got, ref32, ref64, strict=True):
        assert_as_accurate(a, b, c, name=name)


@given(rows=st.integers(0, 150), columns=st.integers(0, 20), seed=st.integers(0, 99), decay=st.sampled_from([0.0, 0.1]))
def test_lazy_adamw_leaves_rows_without_a_gradient_alone(rows, columns, seed, decay):
    rng = np.random.default_rng(seed)
    weight, first, second, grad = arrays(rng, [(rows, columns)] * 4)
    grad[rng.random(rows) < 0.5] = 0
    grad[rng.random((rows, columns)) < 0.9] = -0.0  # single numbers too, and zeros of both signs
    state = [[weight, first * np.float32(0.1), np.square(second)]]
    settings = {"step": 3, "lr": 0.01, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": decay, "scale": 0.3}
    (got,), (ref32,), ref64 = copies(state), copies(state), wide(state)[0]
    optimizers.adamw_step(*got, grad, **settings, lazy=True)
    reference_optim.adamw_step(*ref32, grad, **settings, lazy=True)
    reference_optim.adamw_step(*ref64, grad.astype(np.float64), **settings, lazy=True)
    idle = ~(grad != 0).any(axis=1)
    for name, before, a, b, c in zip(("weight", "first", "second"), state[0], got, ref32, ref64, strict=True):
        assert_as_accurate(a, b, c, name=name)
        np.testing.assert_array_equal(a[idle], before[idle], err_msg=name)


@pytest.mark.parametrize("shape", [(0, 3), (1, 1), (7, 5), *((n // 8, 8) for n in LARGE[:1])])
@pytest.mark.parametrize("lazy", [False, True])
def test_adamw_without_a_first_moment_is_adamw_with_beta1_of_zero(shape, lazy):
    rng = np.random.default_rng(shape[0])
    weight, second, grad = arrays(rng, [shape] * 3)
    grad[::3] = 0
    settings = {"lr": 0.01, "beta1": 0.0, "beta2": 0.99, "eps": 1e-8, "decay": 0.1, "scale": 0.3, "lazy": lazy}
    start = [[weight, np.square(second)]]
    (got,), (ref32,), ref64, (kept,) = copies(start), copies(start), wide(start)[0], copies(start)
    first = np.zeros(shape, np.float32)
    for step in (1, 2, 3):
        optimizers.adamw_step(got[0], None, got[1], grad, step=step, **settings)
        optimizers.adamw_step(kept[0], first, kept[1], grad, step=step, **settings)
        reference_optim.adamw_step(ref32[0], None, ref32[1], grad, step=step, **settings)
        reference_optim.adamw_step(ref64[0], None, ref64[1], grad.astype(np.float64), step=step, **settings)
    for name, a, b, c, d in zip(("weight", "second"), got, ref32, ref64, kept, strict=True):
        assert_as_accurate(a, b, c, name=name)
        np.testing.assert_allclose(a, d, rtol=1e-6, atol=1e-7, err_msg=name)
    with pytest.raises(ValueError, match="beta1 must be 0 where there is no first moment"):
        optimizers.adamw_step(got[0], None, got[1], grad, step=1, **settings | {"beta1": 0.9})


def test_lazy_adamw_sees_gradients_of_any_size_and_hides_no_nan():
    weight, first, second = (np.zeros((3, 4), np.float32) for _ in range(3))
    grad = np.zeros((3, 4), np.float32)
    grad[0, 3], grad[1, 0] = np.nan, 1e-10
    optimizers.adamw_step(
        weight, first, second, grad, step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-12, decay=0.0, lazy=True
    )
    assert np.isnan(weight[0, 3])
    assert weight[1, 0] < -0.09
    assert not weight[2].any()
    with pytest.raises(ValueError, match="lazy is for tables"):
        optimizers.adamw_step(
            *(np.zeros(3, np.float32) for _ in range(4)),
            step=1,
            lr=0.1,
            beta1=0.9,
            beta2=0.9,
            eps=1e-8,
            decay=0.0,
            lazy=True,
        )


@given(
    rows=st.integers(0, 150),
    columns=st.integers(0, 20),
    seed=st.integers(0, 99),
    decay=st.sampled_from([0.0, 0.1]),
    beta1=st.sampled_from([None, 0.0, 0.9]),
    beta2=st.sampled_from([0.0, 0.99]),
)
def test_adamw_rows_step_matches_reference(rows, columns, seed, decay, beta1, beta2):
    rng = np.random.default_rng(seed)
    weight, first, grad = arrays(rng, [(rows, columns)] * 3)
    (second,) = arrays(rng, [(rows,)])
    first = None if beta1 is None else first * np.float32(0.1)
    steps = rng.integers(1, 2_000, rows)
    settings = {"lr": 0.01, "beta1": beta1 or 0.0, "beta2": beta2, "eps": 1e-8, "decay": decay, "scale": 0.3}
    starts = [weight, first, np.square(second), steps]
    got, ref32 = ([None if x is None else x.copy() for x in starts] for _ in range(2))
    ref64 = [x if x is None or x is steps else x.astype(np.float64) for x in starts]
    ref64[3] = steps.copy()
    stepped = np.zeros(rows, int)
    for share in (0.5, 0.9, 1.0):
        now = grad.copy()
        now[rng.random(rows) < share] = 0
        now[rng.random((rows, columns)) < 0.8] = -0.0  # single numbers too, and zeros of both signs
        before = [x if x is None else x.copy() for x in got]
        optimizers.adamw_rows_step(*got, now, **settings)
        reference_optim.adamw_rows_step(*ref32, now, **settings)
        reference_optim.adamw_rows_step(*ref64, now.astype(np.float64), **settings)
        idle = ~(now != 0).any(axis=1)
        stepped += ~idle
        for name, old, new in zip(("weight", "first", "second", "steps"), before, got, strict=True):
            if new is not None:
                np.testing.assert_array_equal(new[idle], old[idle], err_msg=name)
    np.testing.assert_array_equal(got[3], steps + stepped)
    for name, a, b, c in zip(("weight", "first", "second"), got, ref32, ref64, strict=False):
        if a is not None:
            assert_as_accurate(a, b, c, name=name)


def test_adamw_rows_step_of_one_column_is_adamw_of_each_row():
    rng = np.random.default_rng(0)
    (weight,) = arrays(rng, [(200, 1)])
    first, second, steps = np.zeros((200, 1), np.float32), np.zeros(200, np.float32), np.zeros(200, np.int64)
    single = [[weight[[r]], first[[r]], second[[r], None]] for r in range(200)]
    settings = {"lr": 0.01, "beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "decay": 0.1, "scale": 0.3}
    for _ in range(4):
        (grad,) = arrays(rng, [(200, 1)])
        grad[rng.random(200) < 0.5] = 0
        optimizers.adamw_rows_step(weight, first, second, steps, grad, **settings)
        for r in np.flatnonzero(grad):
            optimizers.adamw_step(*single[r], grad[[r]], step=int(steps[r]), **settings)
    np.testing.assert_allclose(weight[:, 0], [w.item() for w, _, _ in single], rtol=1e-6)
    np.testing.assert_allclose(second, [v.item() for _, _, v in single], rtol=1e-6)


def test_adamw_rows_step_sees_gradients_of_any_size_and_hides_no_nan():
    grad = np.zeros((5, 4), np.float32)
    grad[0, 3], grad[1, 0], grad[2, 1], grad[3, 2] = np.nan, 1e-10, 1e-44, 1e15
    weight, second, steps = np.zeros((5, 4), np.float32), np.zeros(5, np.float32), np.zeros(5, np.int64)
    settings = {"lr": 0.1, "beta1": 0.0, "beta2": 0.9, "eps": 1e-12, "decay": 0.0}
    optimizers.adamw_rows_step(weight, None, second, steps, grad, **settings)
    assert np.isnan(weight[0]).all()  # the row's one moment is NaN
    assert weight[1, 0] < -0.19  # 0.1 times the root of the 4 columns
    assert np.abs(weight[2]).max() < 1e-30
    assert weight[3, 2] < -0.19
    assert not weight[4].any()
    assert steps.tolist() == [1, 1, 1, 1, 0]
    with pytest.raises(ValueError, match="beta1 must be 0 where there is no first moment"):
        optimizers.adamw_rows_step(weight, None, second, steps, grad, **settings | {"beta1": 0.9})
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        optimizers.adamw_rows_step(weight, None, second, steps - 1, grad, **settings)
    with pytest.raises(ValueError, match=r"adamw_rows_step: steps must be int64, got int32"):
        optimizers.adamw_rows_step(weight, None, second, steps.astype(np.int32), grad, **settings)


def test_adamw_step_of_zero_gradient_only_decays():
    weight = np.full(40, 2, np.float32)
    zeros = [np.zeros(40, np.float32) for _ in range(3)]
    settings = {"step": 1, "lr": 0.5, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
    optimizers.adamw_step(weight, *zeros, decay=0.0, **settings)
    np.testing.assert_array_equal(weight, 2)
    optimizers.adamw_step(weight, *zeros, decay=0.5, **settings)
    np.testing.assert_array_equal(weight, 1.5)


@pytest.mark.parametrize("size", [40, *LARGE[:1]])
def test_adamw_moments_fade_to_zero_and_are_never_denormal(size):
    """Processors are slow with denormal numbers: a run would slow down as the moments of rare rows fade."""
    weight, first, second = (np.full(size, value, np.float32) for value in (0.5, 1e-3, 1e-6))
    grad = np.logspace(-44, 0, size).astype(np.float32)
    settings = {"lr": 1e-3, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.0}
    smallest = np.finfo(np.float32).tiny
    for step in range(1, 1_500 if size == 40 else 3):
        optimizers.adamw_step(weight, first, second, grad if step == 1 else np.zeros_like(grad), step=step, **settings)
        for moment in (first, second):
            assert not ((moment != 0) & (np.abs(moment) < smallest)).any()
    if size == 40:
        assert not first.any()
        assert not second[:10].any()


def test_adamw_hides_no_nan():
    weight, first, second = (np.ones(3, np.float32) for _ in range(3))
    grad = np.array([np.nan, np.inf, 0], np.float32)
    with np.errstate(invalid="ignore"):
        optimizers.adamw_step(weight, first, second, grad, step=1, lr=0.1, beta1=0.9, beta2=0.9, eps=1e-8, decay=0.0)
    assert np.isnan(weight).tolist() == [True, True, False]
    assert np.isnan(first).tolist() == [True, False, False]


@pytest.mark.parametrize("size", [0, 1, 1_025, *LARGE])
def test_ema_update_matches_reference(size):
    average, value = arrays(np.random.default_rng(size), [size] * 2)
    got, ref32, ref64 = average.copy(), average.copy(), average.astype(np.float64)
    optimizers.ema_update(got, value, 0.99)
    reference_optim.ema_update(ref32, value, 0.99)
    reference_optim.ema_update(ref64, value.astype(np.float64), 0.99)
    assert_as_accurate(got, ref32, ref64)


# --- NorMuon ---


def check_normuon(shapes, seed, settings, magnitude=1.0):
    """One step of kernel and references from one random state.

    Errors are judged over all matrices together, each in units of its largest value, and two middling
    matrices are always among them: of a matrix of one or two elements plain float32 can be exact by luck.
    """
    shapes = [*shapes, (30, 20), (20, 30)]
    rng = np.random.default_rng(seed)
    weights = [np.float32(0.1) * w for w in arrays(rng, shapes)]
    momenta, grads = ([np.float32(magnitude) * x for x in arrays(rng, shapes)] for _ in range(2))
    # the rows of an orthogonal direction have mean squares of about one over the longer side
    seconds = [rng.uniform(0.5, 1.5, m).astype(np.float32) / max(m, n) for m, n in shapes]
    state = [weights, momenta, seconds]
    got, ref32, ref64 = copies(state), copies(state), wide(state)
    optimizers.normuon_step(*got, grads, **settings)
    reference_optim.normuon_step(*ref32, grads, **settings)
    reference_optim.normuon_step(*ref64, *wide([grads]), **settings)
    names = "weight", "momentum", "second"
    for name, mine, plain, truth, start in zip(names, got, ref32, ref64, state, strict=True):
        # before or after: the step can cancel what was there
        units = [max(np.abs(x).max(initial=0) for x in pair) or 1 for pair in zip(truth, start, strict=True)]
        pooled = [
            np.concatenate([(x / unit).ravel() for x, unit in zip(part, units, strict=True)])
            for part in (mine, plain, truth)
        ]
        assert_as_accurate(*pooled, slack=8.0, name=name)


# a learning rate of 10, so that the rounding of the old weights does not hide an error of the update
@pytest.mark.parametrize("settings", [V3, PUBLISHED], ids=["v3", "published"])
@given(
    shapes=st.lists(st.tuples(st.integers(0, SIDE), st.integers(1, SIDE)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_normuon_step_matches_reference(settings, shapes, seed):
    check_normuon(shapes, seed, {**settings, "lr": 10.0, "decay": 0.01, "scale": 0.5})


@pytest.mark.parametrize("settings", [V3, PUBLISHED], ids=["v3", "published"])
def test_normuon_step_matches_reference_at_v3_shapes(settings):
    small = bool(numba.config.DISABLE_JIT)
    shapes = [(13, 6), (6, 13), (6, 6), (1, 6)] if small else [(683, 256), (256, 683), (256, 256), (1, 256)]
    check_normuon([*shapes, (5, 1), (0, 4), (4, 0)], 0, {**settings, "lr": 10.0})


@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_normuon_step_takes_gradients_of_any_size(magnitude):
    check_normuon([(30, 70), (70, 30)], 1, {**V3, "lr": 10.0}, magnitude)


@pytest.mark.parametrize("settings", [V3, PUBLISHED], ids=["v3", "published"])
def test_normuon_step_leaves_the_weights_where_the_gradient_is_zero(settings):
    shapes = [(1, 6), (6, 1), (4, 7)]
    weights = arrays(np.random.default_rng(0), shapes)
    before = copies([weights])[0]
    momenta, grads = ([np.zeros(s, np.float32) for s in shapes] for _ in range(2))
    seconds = [np.zeros(s[0], np.float32) for s in shapes]
    optimizers.normuon_step(weights, momenta, seconds, grads, **settings)
    for got, want in zip(weights, before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_normuon_update_has_the_stated_norm():
    shape = (40, 10)
    grads = arrays(np.random.default_rng(0), [shape])
    for settings in (V3, PUBLISHED):
        weights, momenta, seconds = [np.zeros(shape, "f")], [np.zeros(shape, "f")], [np.zeros(40, "f")]
        optimizers.normuon_step(weights, momenta, seconds, grads, **{**settings, "lr": 1.0})
        if settings is V3:
            want = 0.2 * np.sqrt(400)
        else:
            direction = grads[0].astype(np.float64)
            orthogonal = reference_optim.newton_schulz(direction / np.linalg.norm(direction), 5)
            want = np.linalg.norm(orthogonal) * np.sqrt(40 / 10)
        np.testing.assert_allclose(np.linalg.norm(weights[0]), want, rtol=1e-5)


def test_newton_schulz_tasks_cover_every_row_once_and_share_the_work():
    workspace = optimizers.NorMuonWorkspace([(683, 256), (683, 256), (256, 683), (256, 256), (1, 256)])
    for costs, plan in ((workspace._gram_costs, slice(0, 2)), (workspace._poly_costs, slice(2, 4))):
        for threads in (1, 2, 3, 40):
            order, bounds = workspace.plan(threads)[plan]
            assert sorted(order) == list(range(len(workspace.tasks)))
            assert bounds[0] == 0
            assert bounds[-1] == len(order)
            busy = [costs[order[bounds[th] : bounds[th + 1]]].sum() for th in range(threads)]
            if threads == 2:
                assert max(busy) < 1.03 * min(busy)


# --- all of them ---


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
def test_every_kernel_gives_the_same_for_any_thread_count(threads):
    rng = np.random.default_rng(0)
    size = 3 * optimizers.SMALL + 517
    flat = [*arrays(rng, [size] * 2), np.abs(arrays(rng, [size])[0]), *arrays(rng, [size])]
    shapes = [(200, 70), (70, 200), (130, 130), (1, 70)]
    matrices = [arrays(rng, shapes), arrays(rng, shapes), [np.ones(s[0], np.float32) for s in shapes]]
    grads = arrays(rng, shapes)
    results = []
    for count in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        threads(count)
        weight, first, second, grad = copies([flat])[0]
        result = [optimizers.sum_of_squares(grad)]
        optimizers.adamw_step(
            weight, first, second, grad, step=2, lr=0.1, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, scale=0.7
        )
        optimizers.ema_update(grad, weight, 0.9)
        mine = copies(matrices)
        optimizers.normuon_step(*mine, grads, **V3)
        results.append([*result, weight, first, second, grad, *(x for part in mine for x in part)])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(a, b)


def test_public_functions_reject_wrong_arrays():
    x = np.zeros((2, 3), np.float32)
    settings = {"lr": 0.1, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "decay": 0.0}
    with pytest.raises(ValueError, match="sum_of_squares: x must be float32, got float64"):
        optimizers.sum_of_squares(x.astype(np.float64))
    with pytest.raises(ValueError, match=r"adamw_step: grad must have shape \(2, 3\), got \(3, 2\)"):
        optimizers.adamw_step(x, x.copy(), x.copy(), np.zeros((3, 2), np.float32), step=1, **settings)
    with pytest.raises(ValueError, match="adamw_step: step counts from 1, got 0"):
        optimizers.adamw_step(x, x.copy(), x.copy(), x.copy(), step=0, **settings)
    with pytest.raises(ValueError, match="ema_update: value must be C-contiguous"):
        optimizers.ema_update(x, np.zeros((3, 2), np.float32).T, 0.9)
    with pytest.raises(ValueError, match=r"normuon_step: seconds\[0\] must have shape \(2,?\), got \(3,\)"):
        optimizers.normuon_step([x], [x.copy()], [np.zeros(3, np.float32)], [x.copy()], **V3)
    with pytest.raises(ValueError, match="the workspace is for 1 matrices, got 1 weights, 2 momenta"):
        optimizers.normuon_step([x], [x, x], [x], [x], workspace=optimizers.NorMuonWorkspace([(2, 3)]), **V3)
    with pytest.raises(ValueError, match=r"NorMuon takes matrices \(m, n\), got a tensor of shape \(3,\)"):
        optimizers.NorMuonWorkspace([(3,)])
