"""NorMuon's kernels against their float64 reference, at odd shapes and for any number of threads."""

from __future__ import annotations

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, copies, normal_arrays, wide
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import _math, normuon, reference_optim
from flashlm_numba.kernels.normuon import NorMuonRule, NorMuonWorkspace, normuon_step

V3 = NorMuonRule(momentum=0.95, beta2=0.999, eps=1e-8, nesterov=False, update_rms=0.2)
PUBLISHED = NorMuonRule(momentum=0.95, beta2=0.95, eps=1e-10, nesterov=True, update_rms=None)
SIDE = 12 if numba.config.DISABLE_JIT else 150


def test_a_momentum_that_fades_away_becomes_zero():
    """Numbers below 1.2e-38 would make every product with them slow; and only these kernels take them for zero."""
    if numba.config.DISABLE_JIT or not _math.FLUSHES:
        pytest.skip("denormal numbers are not flushed here")
    weight, momentum = np.ones((4, 3), np.float32), np.full((4, 3), 1.2e-38, np.float32)
    momentum[0] = 1
    still = np.zeros((4, 3), np.float32)
    normuon_step([weight], [momentum], [np.zeros(4, np.float32)], [still], PUBLISHED._replace(update_rms=0.2), lr=0.1)
    assert momentum[0].tolist() == pytest.approx([0.95] * 3)
    assert not momentum[1:].any()
    assert np.float32(1e-40) * np.float32(0.5) > 0


def check_normuon(shapes, seed, rule, *, lr=10.0, scale=1.0, magnitude=1.0):
    """One step of kernel and references from one random state.

    Errors are judged over all matrices together, each in units of its largest value, and two middling
    matrices are always among them: of a matrix of one or two elements plain float32 can be exact by luck.
    """
    shapes = [*shapes, (30, 20), (20, 30)]
    rng = np.random.default_rng(seed)
    weights = [np.float32(0.1) * w for w in normal_arrays(rng, shapes)]
    exp_avgs, grads = ([np.float32(magnitude) * x for x in normal_arrays(rng, shapes)] for _ in range(2))
    # the rows of an orthogonal direction have mean squares of about one over the longer side
    exp_avg_sqs = [rng.uniform(0.5, 1.5, m).astype(np.float32) / max(m, n) for m, n in shapes]
    state = [weights, exp_avgs, exp_avg_sqs]
    got, ref32, ref64 = copies(state), copies(state), wide(state)
    normuon_step(*got, grads, rule, lr=lr, scale=scale)
    reference_optim.normuon_step(*ref32, grads, rule, lr=lr, scale=scale)
    reference_optim.normuon_step(*ref64, *wide([grads]), rule, lr=lr, scale=scale)
    names = "weight", "exp_avg", "exp_avg_sq"
    for name, mine, plain, truth, start in zip(names, got, ref32, ref64, state, strict=True):
        # before or after: the step can cancel what was there
        units = [max(np.abs(x).max(initial=0) for x in pair) or 1 for pair in zip(truth, start, strict=True)]
        pooled = [
            np.concatenate([(x / unit).ravel() for x, unit in zip(part, units, strict=True)])
            for part in (mine, plain, truth)
        ]
        assert_as_accurate(*pooled, slack=8.0, name=name)


# a learning rate of 10, so that the rounding of the old weights does not hide an error of the update
@pytest.mark.parametrize("rule", [V3, PUBLISHED], ids=["v3", "published"])
@given(
    shapes=st.lists(st.tuples(st.integers(0, SIDE), st.integers(1, SIDE)), min_size=1, max_size=4),
    seed=st.integers(0, 2**32 - 1),
)
def test_normuon_step_matches_reference(rule, shapes, seed):
    check_normuon(shapes, seed, rule._replace(weight_decay=0.01), scale=0.5)


@pytest.mark.parametrize("rule", [V3, PUBLISHED], ids=["v3", "published"])
def test_normuon_step_matches_reference_at_v3_shapes(rule):
    small = bool(numba.config.DISABLE_JIT)
    shapes = [(13, 6), (6, 13), (6, 6), (1, 6)] if small else [(683, 256), (256, 683), (256, 256), (1, 256)]
    check_normuon([*shapes, (5, 1), (0, 4), (4, 0)], 0, rule)


@pytest.mark.parametrize("magnitude", [1e-12, 1e12])
def test_normuon_step_takes_gradients_of_any_size(magnitude):
    check_normuon([(30, 70), (70, 30)], 1, V3, magnitude=magnitude)


@pytest.mark.parametrize("rule", [V3, PUBLISHED], ids=["v3", "published"])
def test_normuon_step_leaves_the_weights_where_the_gradient_is_zero(rule):
    shapes = [(1, 6), (6, 1), (4, 7)]
    weights = normal_arrays(np.random.default_rng(0), shapes)
    before = copies([weights])[0]
    exp_avgs, grads = ([np.zeros(s, np.float32) for s in shapes] for _ in range(2))
    exp_avg_sqs = [np.zeros(s[0], np.float32) for s in shapes]
    normuon_step(weights, exp_avgs, exp_avg_sqs, grads, rule, lr=0.02)
    for got, want in zip(weights, before, strict=True):
        np.testing.assert_array_equal(got, want)


def test_normuon_update_has_the_stated_norm():
    shape = (40, 10)
    grads = normal_arrays(np.random.default_rng(0), [shape])
    for rule in (V3, PUBLISHED):
        weights, exp_avgs, exp_avg_sqs = [np.zeros(shape, "f")], [np.zeros(shape, "f")], [np.zeros(40, "f")]
        normuon_step(weights, exp_avgs, exp_avg_sqs, grads, rule, lr=1.0)
        if rule is V3:
            want = 0.2 * np.sqrt(400)
        else:
            direction = grads[0].astype(np.float64)
            orthogonal = reference_optim.newton_schulz(direction / np.linalg.norm(direction), 5)
            want = np.linalg.norm(orthogonal) * np.sqrt(40 / 10)
        np.testing.assert_allclose(np.linalg.norm(weights[0]), want, rtol=1e-5)


def test_newton_schulz_tasks_cover_every_row_once_and_share_the_work():
    workspace = NorMuonWorkspace([(683, 256), (683, 256), (256, 683), (256, 256), (1, 256)])
    for threads in (1, 2, 3, 4, 8, 16, 32, 40, 64):
        plan = workspace.plan(threads)
        rows = [np.zeros(min(shape), int) for shape in workspace.shapes]
        for matrix, start, end in zip(
            plan.layout.task_matrix, plan.layout.task_start, plan.layout.task_end, strict=True
        ):
            rows[matrix][start:end] += 1
        assert all((row == 1).all() for row in rows)
        for kind in ("gram", "poly"):
            costs = getattr(plan, f"{kind}_costs")
            order, bounds = getattr(plan.shares, f"{kind}_order"), getattr(plan.shares, f"{kind}_bounds")
            assert sorted(order) == list(range(len(plan.layout.task_matrix)))
            assert bounds[0] == 0
            assert bounds[-1] == len(order)
            busy = [costs[order[bounds[th] : bounds[th + 1]]].sum() for th in range(threads)]
            if threads == 2:
                assert max(busy) < 1.03 * min(busy)
            if threads in (4, 8, 16):
                assert max(busy) < 1.3 * np.mean(busy)


def test_many_threads_agree_to_rounding(monkeypatch):
    """The smaller tasks of more threads: here as many as there are, with the plan for 64."""
    rng = np.random.default_rng(0)
    shapes = [(200, 70), (70, 200), (130, 130), (1, 70)]
    start = [*(normal_arrays(rng, shapes) for _ in range(2)), [np.ones(s[0], np.float32) for s in shapes]]
    grads, results = normal_arrays(rng, shapes), []
    for rows in (128, 16):
        monkeypatch.setattr(normuon, "task_rows", lambda threads, rows=rows: rows)
        mine = copies(start)
        normuon_step(*mine, grads, PUBLISHED, lr=0.02)
        results.append([x for part in mine for x in part])
    for one, two in zip(*results, strict=True):
        np.testing.assert_allclose(one, two, rtol=0, atol=1e-5 * np.abs(one).max())


@pytest.mark.skipif(bool(numba.config.DISABLE_JIT), reason="plain Python has one thread")
@pytest.mark.parametrize("rule", [V3, PUBLISHED], ids=["v3", "published"])
def test_normuon_step_is_the_same_for_up_to_four_threads(rule, threads):
    rng = np.random.default_rng(0)
    shapes = [(200, 70), (70, 200), (130, 130), (1, 70)]
    start = [*(normal_arrays(rng, shapes) for _ in range(2)), [np.ones(s[0], np.float32) for s in shapes]]
    grads = normal_arrays(rng, shapes)
    results = []
    for count in range(1, min(4, numba.config.NUMBA_NUM_THREADS) + 1):
        threads(count)
        mine = copies(start)
        normuon_step(*mine, grads, rule, lr=0.02)
        results.append([x for part in mine for x in part])
    for other in results[1:]:
        for one, two in zip(results[0], other, strict=True):
            np.testing.assert_array_equal(one, two)


def test_normuon_step_rejects_wrong_arrays():
    x = np.zeros((2, 3), np.float32)
    with pytest.raises(ValueError, match=r"normuon_step: exp_avg_sqs\[0\] must have shape \(2,?\), got \(3,\)"):
        normuon_step([x], [x.copy()], [np.zeros(3, np.float32)], [x.copy()], V3, lr=0.02)
    with pytest.raises(ValueError, match="the workspace is for 1 matrices, got 1 weights, 2 exp_avgs"):
        normuon_step([x], [x, x], [x], [x], V3, lr=0.02, workspace=NorMuonWorkspace([(2, 3)]))
    with pytest.raises(ValueError, match=r"NorMuon takes matrices \(m, n\), got a tensor of shape \(3,\)"):
        NorMuonWorkspace([(3,)])
