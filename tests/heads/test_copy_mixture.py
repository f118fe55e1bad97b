"""The n-gram copies beside a head: exactly normalised, right in loss, gradient and sampling, with any head."""

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, numeric_gradient
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, Head, SampledHead, TreeHead
from flashlm_numba.heads.copy_mixture import CopyMixture, CopyShares
from flashlm_numba.heads.tree_shapes import build_tree
from flashlm_numba.kernels import copy_mixture, reference, reference_tree
from flashlm_numba.kernels.copy_mixture import CopyWeights

VOCAB, DIM = 40, 8
NAMES = ("dense", "tree", "sampled")


def scores_problem(seed, rows, ways, vocab, dim):
    """h, embedding, copies and weights."""
    rng = np.random.default_rng(seed)
    h, embedding = (rng.standard_normal((n, dim)).astype(np.float32) for n in (rows, vocab))
    copies = rng.integers(-1, vocab, (rows, ways)).astype(np.int32)
    shapes = (ways,), (ways, dim), (ways,)
    return h, embedding, copies, CopyWeights(*(rng.standard_normal(shape).astype(np.float32) for shape in shapes))


def wide(*arrays):
    return [array.astype(np.float64) for array in arrays]


shapes = st.tuples(
    st.integers(0, 2**32 - 1),
    st.integers(0, 70),
    st.integers(0, 4),
    st.integers(1, 30),
    st.sampled_from([1, 3, 16, 33]),
)


@given(shapes)
def test_scores_match_reference(drawn):
    h, embedding, copies, weights = scores_problem(*drawn)
    scores, matches = copy_mixture.copy_scores(h, embedding, copies, weights)
    want = reference.copy_scores(*wide(h, embedding), copies, *wide(*weights))
    np.testing.assert_array_equal(np.isneginf(scores), copies < 0)
    found = copies >= 0
    assert_as_accurate(scores[found], reference.copy_scores(h, embedding, copies, *weights)[found], want[found])
    products = np.einsum("nc,noc->no", *wide(h, embedding[copies])) * h.shape[1] ** -0.5
    np.testing.assert_allclose(matches[found], products[found], atol=1e-5)


@given(shapes)
def test_shares_match_reference(drawn):
    h, embedding, copies, weights = scores_problem(*drawn)
    row_of_token = np.random.default_rng(drawn[0]).permutation(len(embedding)).astype(np.int32)
    for order in (None, row_of_token):
        rows = copies if order is None else np.where(copies >= 0, order[copies], -1)
        scores = reference.copy_scores(*wide(h, embedding), rows, *wide(*weights))
        want = reference.copy_shares(scores) if copies.size else np.ones((len(h), 1))
        for n in range(min(3, len(h))):
            got = copy_mixture.copy_shares(h[n : n + 1], embedding, copies[n : n + 1], order, weights)
            np.testing.assert_allclose(got, want[n], atol=2e-5)
            np.testing.assert_allclose(got.sum(), 1, rtol=1e-12)


@given(shapes)
def test_gradients_of_scores_match_reference(drawn):
    h, embedding, copies, weights = scores_problem(*drawn)
    dscores = np.random.default_rng(drawn[0]).standard_normal(copies.shape).astype(np.float32)
    _, matches = copy_mixture.copy_scores(h, embedding, copies, weights)
    dh, dembedding, *dweights = (np.ones_like(x) for x in (h, embedding, *weights))
    copy_mixture.copy_scores_backward(
        dscores, matches, h, embedding, copies, weights, dh, dembedding, CopyWeights(*dweights)
    )
    small = reference.copy_scores_backward(dscores, h, embedding, copies, weights.hidden, weights.match)
    true = reference.copy_scores_backward(*wide(dscores, h, embedding), copies, *wide(weights.hidden, weights.match))
    for got, ref32, ref64 in zip((dh, dembedding, *dweights), small, true, strict=True):
        assert_as_accurate(got - 1, ref32, ref64, slack=16)  # added to one, which rounds


def test_reference_of_scores_agrees_with_central_differences():
    h, embedding, copies, weights = scores_problem(3, 5, 3, 6, 4)
    x = wide(h, embedding, *weights)
    dscores = np.random.default_rng(0).standard_normal(copies.shape)

    def total():
        scores = reference.copy_scores(x[0], x[1], copies, *x[2:])
        return float((dscores * np.where(copies >= 0, scores, 0)).sum())

    for value, found in zip(x, reference.copy_scores_backward(dscores, x[0], x[1], copies, x[3], x[4]), strict=True):
        np.testing.assert_allclose(found, numeric_gradient(total, value), atol=1e-8)


def test_scores_are_the_same_for_any_number_of_positions_and_threads():
    h, embedding, copies, weights = scores_problem(1, 200, 6, 30, 256)
    scores, matches = copy_mixture.copy_scores(h, embedding, copies, weights)
    gradients = []
    for threads in range(1, numba.config.NUMBA_NUM_THREADS + 1):
        numba.set_num_threads(threads)
        np.testing.assert_array_equal(copy_mixture.copy_scores(h, embedding, copies, weights)[0], scores)
        found = [np.zeros_like(x) for x in (h, embedding, *weights)]
        copy_mixture.copy_scores_backward(
            scores.clip(-9), matches, h, embedding, copies, weights, *found[:2], CopyWeights(*found[2:])
        )
        gradients.append(found)
    for found in gradients[1:]:
        for one, other in zip(found, gradients[0], strict=True):
            np.testing.assert_array_equal(one, other)
    one = copy_mixture.copy_scores(h[7:8], embedding, copies[7:8], weights)[0]
    np.testing.assert_array_equal(one, scores[7:8])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"copies": np.full((5, 2), 6, np.int32)}, r"copies must be in \[-1, 6\), got 6 to 6"),
        ({"h": np.zeros((4, 4), np.float32)}, r"copies must have shape \(4, any\), got \(5, 2\)"),
        ({"weights": CopyWeights(*(np.zeros(3, np.float32),) * 3)}, r"bias must have shape \(2\), got \(3,\)"),
    ],
)
def test_scores_reject_what_does_not_fit(change, message):
    names = dict(zip(("h", "embedding", "copies", "weights"), scores_problem(0, 5, 2, 6, 4), strict=True))
    with pytest.raises(ValueError, match=message):
        copy_mixture.copy_scores(**names | change)


# --- the mixture ---


def make_mixture(name, seed=0, rows=12, **options):
    """A mixture, its h, and targets of which many are copies."""
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 50, VOCAB)
    weight = rng.standard_normal((VOCAB, DIM)).astype(np.float32)
    dweight = np.zeros_like(weight)
    if name == "tree":
        tree = build_tree("clustered", counts, rows=weight)
        nodes = rng.standard_normal((tree.n_nodes - 1, DIM)).astype(np.float32)
        head = TreeHead(tree, weight, dweight, nodes=nodes, **options)
    elif name == "sampled":
        head = SampledHead(weight, dweight, counts=counts, candidates=10, **options)
    else:
        head = DenseHead(weight, dweight, **options)
    h, _, copies, weights = scores_problem(seed, rows, 3, VOCAB, DIM)
    copies[:, 1] = np.where(rng.random(rows) < 0.4, copies[:, 0], copies[:, 1])  # some copies agree
    targets = np.where(rng.random(rows) < 0.5, np.maximum(copies[:, 0], 0), rng.integers(0, VOCAB, rows))
    gradients = CopyWeights(*(np.zeros_like(x) for x in weights))
    shares = CopyShares(weights, gradients, weight, dweight, head.row_of_token)
    return CopyMixture(head, shares, copies), h, targets.astype(np.int32)


def brute_force(mixture, h):
    """p (N, V) in float64, from the head's own distribution."""
    shares, head = mixture.shares, mixture.head
    by_token = head.weight if head.row_of_token is None else head.weight[head.row_of_token]
    scores = reference.copy_scores(*wide(h, by_token), mixture.copies, *wide(*shares._weights))
    g = reference.copy_shares(scores)
    p = head.distribution(h).astype(np.float64) * g[:, :1]
    for n, o in np.ndindex(*mixture.copies.shape):
        if mixture.copies[n, o] >= 0:
            p[n, mixture.copies[n, o]] += g[n, o + 1]
    return p


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("seed", range(3))
def test_probabilities_are_those_of_brute_force_and_sum_to_one(name, seed):
    mixture, h, targets = make_mixture(name, seed)
    p = brute_force(mixture, h)
    np.testing.assert_allclose(p.sum(1), 1, atol=1e-6)
    np.testing.assert_allclose(mixture.distribution(h), p, atol=1e-6)
    np.testing.assert_allclose(mixture.log_prob(h, targets), np.log(p[np.arange(len(h)), targets]), atol=2e-5)
    logits = mixture.logits(h).astype(np.float64)
    np.testing.assert_allclose(np.exp(logits), p, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_without_copies_it_is_the_head(name):
    mixture, h, targets = make_mixture(name)
    mixture.copies[...] = -1
    np.testing.assert_allclose(mixture.log_prob(h, targets), mixture.head.log_prob(h, targets), rtol=1e-6)
    np.testing.assert_array_equal(mixture.distribution(h), mixture.head.distribution(h))
    weights = np.full(len(h), 1 / len(h), np.float32)
    loss, nll, dh = mixture.forward_backward(h, targets, weights, accumulate=False)
    want = mixture.head.forward_backward(h, targets, weights, accumulate=False)
    for got, value in zip((loss, nll, dh), want, strict=True):
        np.testing.assert_allclose(got, value, rtol=1e-6)


def exact_loss(name, x, head, copies, targets, weights):
    """sum(weights * -ln p) in float64 for x: h, embedding, bias, hidden, match and, of a tree, its node rows."""
    h, embedding = x[:2]
    rows = targets if head.row_of_token is None else head.row_of_token[targets]
    if name == "tree":
        logs = reference_tree.tree_head_log_distribution(h, embedding, x[5], head.tree.spans)
    else:
        logits = reference.dense_head_forward(h, embedding, targets)[2]
        logs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    own = np.exp(logs[np.arange(len(h)), rows])
    copied = copies if head.row_of_token is None else np.where(copies >= 0, head.row_of_token[copies], -1)
    g = reference.copy_shares(reference.copy_scores(h, embedding, copied, *x[2:5]))
    p = g[:, 0] * own + (g[:, 1:] * (copies == targets[:, None])).sum(1)
    return float(-(weights * np.log(p)).sum())


@pytest.mark.parametrize("name", ["dense", "tree"])
def test_gradients_agree_with_central_differences(name):
    mixture, h, targets = make_mixture(name, seed=5)
    head, weights = mixture.head, np.random.default_rng(1).uniform(0, 1, len(h)).astype(np.float32)
    _, nll, dh = mixture.forward_backward(h, targets, weights)
    parts = [h, head.weight, *mixture.shares._weights] + ([head.nodes] if name == "tree" else [])
    found = [dh, head.dweight, *mixture.shares._gradients] + ([head.dnodes] if name == "tree" else [])
    x = wide(*parts)

    def total():
        return exact_loss(name, x, head, mixture.copies, targets, weights.astype(np.float64))

    np.testing.assert_allclose(float(weights @ nll), total(), rtol=1e-5)
    rng = np.random.default_rng(0)
    for value, gradient in zip(x, found, strict=True):
        some = np.unravel_index(rng.permutation(value.size)[:60], value.shape)  # the exact tree is slow
        wanted = numeric_gradient(total, value, places=zip(*some, strict=True))
        np.testing.assert_allclose(gradient[some], wanted[some], atol=2e-5)


def test_gradient_of_the_sampled_head_is_that_of_its_candidates():
    """By central differences of the loss that the call itself returns, in float32."""
    mixture, h, targets = make_mixture("sampled", seed=2)
    head, weights = mixture.head, np.full(len(h), 1 / len(h), np.float32)
    head.begin(np.random.default_rng(0), full=False)
    loss, nll, dh = mixture.forward_backward(h, targets, weights, accumulate=False)
    np.testing.assert_array_equal(loss, nll)
    full = mixture.log_prob(h, targets)
    assert np.abs(nll + full).max() > 1e-3  # the candidates are not all tokens
    at = np.arange(0, len(h), 2)
    np.testing.assert_allclose(mixture.training_log_prob(h, targets, at), -nll[at], atol=1e-5)
    for n, c in ((0, 0), (3, 2), (7, 5)):
        values = []
        for change in (1e-2, -1e-2):
            moved = h.copy()
            moved[n, c] += change
            values.append(float(weights @ mixture.forward_backward(moved, targets, weights)[1]))
        assert abs((values[0] - values[1]) / 2e-2 - dh[n, c]) < 2e-4


def test_gradients_are_added_or_replaced():
    mixture, h, targets = make_mixture("tree")
    weights = np.full(len(h), 1 / len(h), np.float32)
    arrays = [mixture.head.dweight, mixture.head.dnodes, *mixture.shares._gradients]

    def gradients(accumulate):
        mixture.forward_backward(h, targets, weights, accumulate=accumulate)
        return [array.copy() for array in arrays]

    for array in arrays:
        array[...] = 7
    once = gradients(False)
    for one, two in zip(once, gradients(True), strict=True):
        np.testing.assert_allclose(two, 2 * one, atol=1e-6)
    for one, again in zip(once, gradients(False), strict=True):
        np.testing.assert_array_equal(again, one)


def test_other_terms_of_the_loss_count_with_the_heads_part():
    mixture, h, targets = make_mixture("dense", label_smoothing=0.1, z_loss=1e-2)
    weights = np.full(len(h), 1 / len(h), np.float32)
    loss, nll, _ = mixture.forward_backward(h, targets, weights)
    own_loss, own_nll, _ = mixture.head.forward_backward(h, targets, weights)
    g = np.exp(mixture.shares.log_shares(h, mixture.copies)[0][:, 0])
    part = g * np.exp(-own_nll) / np.exp(-nll)
    np.testing.assert_allclose(loss - nll, part * (own_loss - own_nll), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("count", [1, 3, VOCAB, VOCAB + 5])
def test_top_finds_the_likeliest_tokens(name, count):
    for seed in range(4):
        mixture, h, _ = make_mixture(name, seed, rows=1)
        p = brute_force(mixture, h)[0]
        ids, log_p = mixture.top(h[0], count)
        assert len(set(ids.tolist())) == len(ids) == min(count, VOCAB)
        np.testing.assert_allclose(np.exp(log_p), np.sort(p)[::-1][:count], atol=1e-6)
        np.testing.assert_allclose(np.exp(log_p), p[ids], atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
@given(st.integers(0, 2**32 - 1), st.integers(1, VOCAB + 3), st.integers(0, 5))
def test_the_likeliest_of_a_mixture_with_any_tokens(name, seed, count, ways):
    mixture, h, _ = make_mixture(name, seed=seed % 5, rows=1)
    rng = np.random.default_rng(seed)
    tokens, shares = rng.integers(-1, VOCAB, ways).astype(np.int32), rng.dirichlet(np.ones(ways + 1))
    if seed % 3 == 0:
        shares[0] = 0  # all others then have the probability 0
    p = shares[0] * mixture.head.distribution(h)[0].astype(np.float64)
    for token, share in zip(tokens, shares[1:], strict=True):
        p[token] += share * (token >= 0)
    for head in (mixture.head, Head):
        ids, log_p = head.top_mixed(*([mixture.head] if head is Head else []), h[0], count, tokens, shares)
        assert len(set(ids.tolist())) == len(ids) == min(count, VOCAB)
        assert (ids.dtype, log_p.dtype) == (np.int32, np.float64)
        np.testing.assert_allclose(np.exp(log_p), np.sort(p)[::-1][:count], atol=1e-6)
        np.testing.assert_allclose(np.exp(log_p), p[ids], atol=1e-6)


def test_the_likeliest_with_rounded_rows():
    mixture, h, _ = make_mixture("dense", rows=1)
    want = mixture.top(h[0], 7)
    mixture.head.use_int8()
    ids, log_p = mixture.top(h[0], 7)
    np.testing.assert_array_equal(ids, want[0])
    np.testing.assert_allclose(log_p, want[1], atol=0.02)  # their sum is of rounded logits


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"top_k": 4}, {"top_p": 0.8}, {"top_k": 6, "top_p": 0.7}]
)
def test_samples_follow_the_distribution(name, options):
    mixture, h, _ = make_mixture(name, seed=1, rows=1)
    many, rng = 4000, np.random.default_rng(0)
    many_h, many_copies = np.repeat(h, many, axis=0), np.repeat(mixture.copies, many, axis=0)
    got = CopyMixture(mixture.head, mixture.shares, many_copies).sample(many_h, rng, **options)
    p = brute_force(mixture, h)[0] ** (1 / options.get("temperature", 1))
    order = np.argsort(-p, kind="stable")
    kept = order[: options.get("top_k", VOCAB)]
    share = np.cumsum(p[kept]) / p[kept].sum()
    kept = kept[: int(np.searchsorted(share, options.get("top_p", 1))) + 1]
    want = np.zeros(VOCAB)
    want[kept] = p[kept] / p[kept].sum()
    assert np.abs(np.bincount(got, minlength=VOCAB) / many - want).max() < 0.04
    assert set(np.unique(got)) <= set(kept.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_probabilities_of_some_tokens_are_those_of_all(name):
    mixture, h, _ = make_mixture(name, rows=1)
    tokens = np.random.default_rng(0).permutation(VOCAB)[:17].astype(np.int32)
    for one, p in ((mixture, brute_force(mixture, h)[0]), (mixture.head, mixture.head.distribution(h)[0])):
        np.testing.assert_allclose(np.exp(one.log_prob_of(h[0], tokens)), p[tokens], atol=1e-6)
        assert one.log_prob_of(h[0], tokens[:0]).shape == (0,)


def test_a_head_without_a_search_of_its_own_finds_the_likeliest():
    """By the default of the interface."""
    mixture, h, _ = make_mixture("dense", rows=1)
    ids, logits = Head.top(mixture.head, h[0], 5)
    p = mixture.head.distribution(h)[0]
    np.testing.assert_array_equal(ids, np.argsort(-p, kind="stable")[:5])
    np.testing.assert_allclose(logits - logits[0], np.log(p[ids] / p[ids[0]]), atol=1e-5)


def test_temperature_zero_takes_the_likeliest():
    mixture, h, _ = make_mixture("tree", rows=6)
    got = mixture.sample(h, np.random.default_rng(0), temperature=0)
    np.testing.assert_array_equal(got, brute_force(mixture, h).argmax(1))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_k": 3}, {"temperature": 0.5}])
def test_h_that_is_not_finite_is_refused(name, options):
    mixture, h, _ = make_mixture(name)
    h[...] = np.nan
    with pytest.raises(ValueError, match="finite"):
        mixture.sample(h, np.random.default_rng(0), **options)


def test_another_number_of_positions_is_refused():
    mixture, h, targets = make_mixture("dense")
    with pytest.raises(ValueError, match="a row per position, 12, got 5"):
        mixture.distribution(h[:5])
    with pytest.raises(ValueError, match=r"targets must have shape \(12\), got \(5,\)"):
        mixture.log_prob(h, targets[:5])
    with pytest.raises(ValueError, match=r"targets must be in \[0, 40\)"):
        mixture.log_prob(h, targets + np.int32(VOCAB))
