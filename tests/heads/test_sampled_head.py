"""The sampled head: exact probabilities of the draw, an unbiased partition sum, and dense when all are drawn."""

import itertools
from functools import partial

import numpy as np
import pytest
from helpers import numeric_gradient
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, SampledHead
from flashlm_numba.heads.sampled import draw, inclusion_probabilities


def every_draw(head, targets):
    """(uniform, chance) of every candidate set that the head can draw for these targets.

    The set changes only where the uniform passes the fractional part of a running sum of the probabilities.
    """
    edges = np.unique(np.concatenate([[0.0, 1.0], np.cumsum(head._others(targets)[2]) % 1]))
    return [((low + high) / 2, high - low) for low, high in itertools.pairwise(edges) if high - low > 1e-9]


def mean_over_draws(head, targets, value):
    """Expectation of value(head) over every candidate set."""
    total = 0.0
    for uniform, chance in every_draw(head, targets):
        head._uniform = uniform
        total = total + chance * value(head)
    return total


def make(seed, vocab=24, dim=5, rows=3, candidates=10, **options):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((vocab, dim)).astype(np.float32)
    head = SampledHead(weight, counts=rng.integers(0, 40, vocab), candidates=candidates, **options)
    h = rng.standard_normal((rows, dim)).astype(np.float32)
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    return head, h, targets, rng.uniform(0.2, 1, rows).astype(np.float32)


@given(st.integers(0, 2**32 - 1), st.integers(0, 40), st.floats(0, 1), st.sampled_from([0.1, 1.0, 3.0]))
def test_inclusion_probabilities_are_proportional_up_to_one_and_sum_to_count(seed, n, share, spread):
    sizes = np.exp(np.random.default_rng(seed).standard_normal(n) * spread)
    count = int(share * n)
    p = inclusion_probabilities(sizes, count)
    assert p.sum() == pytest.approx(count)
    assert ((p >= 0) & (p <= 1)).all()
    below = p < 1
    if below.any() and count:
        ratio = p[below] / sizes[below]
        np.testing.assert_allclose(ratio, ratio[0] if ratio.size else 0, rtol=1e-9)
        assert (sizes[~below] * ratio[0] >= 1 - 1e-9).all()


@given(st.integers(0, 2**32 - 1), st.integers(1, 40), st.floats(0, 1), st.floats(0, 1, exclude_max=True))
@example(0, 4, 1.0, 1 - 2**-53)
@example(0, 40, 0.9, 1 - 2**-53)
def test_draw_is_without_replacement_and_of_the_asked_size(seed, n, share, uniform):
    count = int(share * n)
    p = inclusion_probabilities(np.random.default_rng(seed).pareto(1.0, n) + 0.01, count)
    drawn = draw(p, uniform)
    assert len(drawn) == count
    assert len(set(drawn)) == count
    assert (p[drawn] > 0).all()


@pytest.mark.parametrize("seed", range(5))
def test_every_token_is_drawn_with_its_probability(seed):
    head, _, targets, _ = make(seed)
    distinct, others, p = head._others(targets)
    found = np.zeros(head.vocab_size)
    for uniform, chance in every_draw(head, targets):
        found[head.choose(targets, uniform)[0]] += chance
    np.testing.assert_allclose(found[distinct], 1)
    np.testing.assert_allclose(found[others], p, atol=1e-7)


@pytest.mark.parametrize("seed", range(5))
def test_the_partition_sum_is_right_on_average_over_all_candidate_sets(seed):
    head, h, targets, _ = make(seed)
    logits = h.astype(float) @ head.weight.T.astype(float)
    assert len(every_draw(head, targets)) > 3

    def partition_sum(head):
        ids, p = head.choose(targets, head._uniform)
        z = (np.exp(logits[:, ids]) / p).sum(1)
        # and it is what the kernel takes the logarithm of
        _, nll, _ = head.forward_backward(h, targets, np.ones(len(h), np.float32))
        np.testing.assert_allclose(nll, np.log(z) - logits[np.arange(len(h)), targets], rtol=1e-5, atol=1e-5)
        return z

    np.testing.assert_allclose(mean_over_draws(head, targets, partition_sum), np.exp(logits).sum(1), rtol=1e-6)


def test_all_tokens_as_candidates_give_the_dense_loss_and_gradient():
    settings = {"label_smoothing": 0.1, "z_loss": 1e-2, "soft_cap": 3.0}
    prior = np.log(np.random.default_rng(1).dirichlet(np.ones(24))).astype(np.float32)
    head, h, targets, weights = make(1, candidates=24, log_prior=prior, **settings)
    dense = DenseHead(head.weight, log_prior=prior, **settings)
    head.begin(np.random.default_rng(0), full=False)
    got = (*head.forward_backward(h, targets, weights), head.dweight)
    want = (*dense.forward_backward(h, targets, weights), dense.dweight)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_a_full_step_is_the_dense_heads_bit_for_bit():
    head, h, targets, weights = make(2)
    dense = DenseHead(head.weight)
    head.begin(np.random.default_rng(0), full=True)
    for a, b in zip(
        (*head.forward_backward(h, targets, weights), head.dweight),
        (*dense.forward_backward(h, targets, weights), dense.dweight),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def gradient_by_h(head, h, targets, weights):
    return head.forward_backward(h, targets, weights)[2]


def test_the_gradients_bias_falls_as_the_candidates_grow():
    errors = []
    for candidates in (8, 16, 32, 64):
        total = 0.0
        for seed in range(8):
            head, h, targets, weights = make(seed, vocab=64, rows=8, candidates=candidates)
            want = DenseHead(head.weight).forward_backward(h, targets, weights)[2]
            mean = mean_over_draws(head, targets, partial(gradient_by_h, h=h, targets=targets, weights=weights))
            total += float(np.square(mean - want).sum())
        errors.append(total**0.5)
    assert errors[0] > 1.2 * errors[1], errors
    assert errors[1] > 1.2 * errors[2], errors
    assert errors[3] < 1e-4 * errors[2], errors


def test_the_loss_reads_low_on_average():
    head, h, targets, weights = make(4, vocab=64, candidates=12)
    exact = DenseHead(head.weight).forward_backward(h, targets, weights)[0]
    mean = mean_over_draws(head, targets, lambda head: head.forward_backward(h, targets, weights)[0])
    assert (mean < exact).all()


def test_the_gradient_is_that_of_the_sampled_loss():
    head, h, targets, weights = make(5)
    head._uniform = 0.4
    _, _, dh = head.forward_backward(h, targets, weights)
    ids, p = head.choose(targets, 0.4)
    x, rows = h.astype(float), head.weight.astype(float)

    def loss():
        logits = x @ rows.T
        z = (np.exp(logits[:, ids]) / p).sum(1)
        return float((weights * (np.log(z) - logits[np.arange(len(x)), targets])).sum())

    np.testing.assert_allclose(dh, numeric_gradient(loss, x), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(head.dweight, numeric_gradient(loss, rows), rtol=1e-4, atol=1e-5)


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 700]), st.sampled_from([0, 1, 9, 40]), st.integers(1, 50))
def test_any_size_works_and_gradients_stay_with_the_candidates(seed, vocab, rows, candidates):
    head, h, targets, weights = make(seed, vocab=vocab, rows=rows, candidates=candidates)
    head.begin(np.random.default_rng(seed), full=False)
    loss, nll, dh = head.forward_backward(h, targets, weights)
    assert loss.shape == nll.shape == (rows,)
    assert np.isfinite(loss).all()
    assert np.isfinite(dh).all()
    ids, p = head.choose(targets, head._uniform)
    assert len(set(ids)) == len(ids) >= min(vocab, max(candidates // 2, len(set(targets))))
    assert (p[np.searchsorted(ids, targets)] == 1).all()
    others = np.setdiff1d(np.arange(vocab), ids)
    assert not head.dweight[others].any()


def test_sampled_head_rejects_wrong_counts_and_numbers():
    weight = np.zeros((5, 2), np.float32)
    with pytest.raises(ValueError, match=r"counts must be 5 non-negative numbers, got \(4,\)"):
        SampledHead(weight, counts=np.zeros(4), candidates=3)
    with pytest.raises(ValueError, match="candidates must be a whole number of at least 1, got 0"):
        SampledHead(weight, counts=np.zeros(5), candidates=0)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 5\), got 5"):
        SampledHead(weight, counts=np.zeros(5), candidates=3).forward_backward(
            np.zeros((1, 2), np.float32), np.array([5], np.int32), np.ones(1, np.float32)
        )
