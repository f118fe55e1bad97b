"""The dense head against its NumPy reference."""

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate, numeric_gradient
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead
from flashlm_numba.kernels import dense_head, reference

options = st.fixed_dictionaries(
    {
        "label_smoothing": st.sampled_from([0.0, 0.1]),
        "z_loss": st.sampled_from([0.0, 1e-2]),
        "soft_cap": st.sampled_from([None, 5.0]),
    }
)


def problem(seed, rows, vocab, dim, scale, prior):
    rng = np.random.default_rng(seed)
    h, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((rows, dim), (vocab, dim)))
    targets = rng.integers(0, vocab, rows).astype(np.int32)
    weights = rng.uniform(0, 1, rows).astype(np.float32)
    log_prior = np.log(rng.dirichlet(np.ones(vocab)) + 1e-6).astype(np.float32) if prior else None
    return h * np.float32(scale), weight, targets, weights, log_prior


def run_reference(dtype, h, weight, targets, weights, log_prior, settings):
    h, weight, weights = (array.astype(dtype) for array in (h, weight, weights))
    prior = None if log_prior is None else log_prior.astype(dtype)
    loss, nll, _ = reference.dense_head_forward(h, weight, targets, prior, **settings)
    return loss, nll, *reference.dense_head_backward(weights, h, weight, targets, prior, **settings)


@given(
    st.integers(0, 2**32 - 1),
    st.sampled_from([0, 1, 3, 13]),
    st.sampled_from([1, 2, 50, 513, 1025]),
    st.sampled_from([1, 8, 33]),
    st.sampled_from([0.0, 0.3, 30.0]),
    st.booleans(),
    options,
)
def test_dense_head_matches_reference(seed, rows, vocab, dim, scale, prior, settings):
    arrays = problem(seed, rows, vocab, dim, scale, prior)
    h, weight, targets, weights, log_prior = arrays
    dweight = np.ones_like(weight)
    loss, nll, dh = dense_head.dense_head_forward_backward(
        h, weight, targets, weights, dweight, log_prior=log_prior, **settings
    )
    forward = dense_head.dense_head_forward(h, weight, targets, log_prior=log_prior, **settings)
    np.testing.assert_array_equal(forward[0], loss)
    np.testing.assert_array_equal(forward[1], nll)
    if not rows:
        assert (dweight == 1).all()
        return
    ref32, ref64 = (run_reference(dtype, *arrays, settings) for dtype in (np.float32, np.float64))
    size = float(np.abs(ref64[0]).max())  # a loss is a difference of numbers as large as the logits
    logits = float(np.abs(reference.dense_head_forward(*(a.astype(float) for a in (h, weight)), targets)[2]).max())
    slack = 8 * max(1.0, logits / max(size, 1e-3))
    for name, got, r32, r64 in zip(("loss", "nll"), (loss, nll), ref32, ref64, strict=False):
        assert_as_accurate(got, r32, r64, slack, name)
    # a probability errs by the rounding of the logits, relative to the row's whole weight
    tolerance = 64 * 6e-8 * max(1.0, logits) * max(1.0, 2 * settings["z_loss"] * logits)
    np.testing.assert_allclose(dh, ref64[2], rtol=0, atol=tolerance * np.abs(weight).max() * np.sqrt(dim) + 1e-7)
    np.testing.assert_allclose(dweight - 1, ref64[3], rtol=0, atol=tolerance * max(1.0, np.abs(h).max() * rows) + 1e-6)


@pytest.mark.parametrize("settings", [{}, {"label_smoothing": 0.1, "z_loss": 0.01, "soft_cap": 3.0}])
def test_dense_head_reference_backward_is_the_derivative(settings):
    rng = np.random.default_rng(5)
    h, weight, weights = rng.standard_normal((3, 4)), rng.standard_normal((6, 4)), rng.uniform(0, 1, 3)
    targets, prior = np.array([5, 0, 0]), rng.standard_normal(6)

    def loss():
        return float((reference.dense_head_forward(h, weight, targets, prior, **settings)[0] * weights).sum())

    grads = reference.dense_head_backward(weights, h, weight, targets, prior, **settings)
    for got, array in zip(grads, (h, weight), strict=True):
        np.testing.assert_allclose(got, numeric_gradient(loss, array), rtol=1e-6, atol=1e-8)


def test_dense_head_chunks_and_threads_agree(monkeypatch):
    h, weight, targets, weights, prior = problem(6, 23, 1100, 24, 1.0, True)
    results = []
    for chunk, threads in ((512, 1), (7, 1), (7, min(2, numba.config.NUMBA_NUM_THREADS))):
        monkeypatch.setattr(dense_head, "MAX_CHUNK", chunk)
        before = numba.get_num_threads()
        numba.set_num_threads(threads)
        dweight = np.zeros_like(weight)
        results.append(
            (
                *dense_head.dense_head_forward_backward(h, weight, targets, weights, dweight, log_prior=prior),
                dweight,
            )
        )
        numba.set_num_threads(before)
    for result in results[1:]:
        for got, want in zip(result, results[0], strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_dense_head_scratch_is_bounded():
    scratch = dense_head.DenseScratch(50_257, 256)
    assert scratch.nbytes <= 128e6


def test_dense_head_rejects_its_weight_as_its_gradient():
    weight = np.zeros((5, 2), np.float32)
    for dweight in (weight, weight[:]):
        with pytest.raises(ValueError, match="DenseHead: dweight must not be weight"):
            DenseHead(weight, dweight)


def test_dense_head_rejects_target_out_of_range():
    h, weight = np.zeros((2, 3), np.float32), np.zeros((5, 3), np.float32)
    with pytest.raises(ValueError, match=r"targets must be in \[0, 5\), got 5 at index 1; check the tokenizer"):
        dense_head.dense_head_forward(h, weight, np.array([0, 5], np.int32))


def test_a_token_that_the_prior_rules_out_has_probability_zero():
    h, weight, targets, weights, _ = problem(7, 5, 700, 8, 1.0, False)
    prior = np.zeros(700, np.float32)
    prior[:600] = -np.inf  # a whole tile and a part of the next
    targets = targets % 100 + 600
    dweight = np.zeros_like(weight)
    loss, nll, dh = dense_head.dense_head_forward_backward(h, weight, targets, weights, dweight, log_prior=prior)
    want, _, want_dh = dense_head.dense_head_forward_backward(
        h, weight[600:].copy(), targets - 600, weights, np.zeros_like(weight[600:])
    )
    np.testing.assert_allclose(loss, want, rtol=1e-5)
    np.testing.assert_array_equal(nll, loss)
    np.testing.assert_allclose(dh, want_dh, rtol=1e-4, atol=1e-6)
    assert not dweight[:600].any()


def test_dense_head_rejects_scratch_of_another_vocabulary():
    h, weight = np.zeros((2, 8), np.float32), np.zeros((1200, 8), np.float32)
    with pytest.raises(
        ValueError, match=r"scratch was made for another vocabulary, width or number of threads, 600 x 8"
    ):
        dense_head.dense_head_forward(h, weight, np.zeros(2, np.int32), scratch=dense_head.DenseScratch(600, 8))


def test_probabilities_in_the_compiled_head_are_exact_to_a_few_units():
    """exp as the fused kernel compiles it: logits 0 and x < 0 give p = e**x / (1 + e**x), which dh hands out.

    (Above 0 the rounding of the float32 log-sum-exp, half a unit of x, would be all there is to see.)
    """
    x = np.concatenate([np.linspace(-86, 0, 1500), -np.geomspace(1e-6, 80, 500)]).astype(np.float32)
    h, weight = x[:, None].copy(), np.array([[0.0], [1.0]], np.float32)
    ones, dweight = np.ones(len(x), np.float32), np.zeros_like(weight)
    zeros = np.zeros(len(x), np.int32)
    _, _, dh = dense_head.dense_head_forward_backward(h, weight, zeros, ones, dweight)
    true = 1 / (1 + np.exp(-x.astype(np.float64)))
    units = np.abs(dh[:, 0] - true) / np.spacing(true.astype(np.float32))
    assert units.max() <= 6, (units.max(), x[units.argmax()])  # two exponentials and a few roundings


@pytest.mark.parametrize("rows", [1, 513, 16_384])
def test_many_rows_are_those_of_one_chunk_after_another(rows):
    h, weight, targets, weights, _ = problem(8, rows, 53, 8, 1.0, False)
    dweight = np.zeros_like(weight)
    loss, nll, dh = dense_head.dense_head_forward_backward(h, weight, targets, weights, dweight)
    want = run_reference(np.float64, h, weight, targets, weights, None, {})
    for got, right in zip((loss, nll, dh, dweight), want, strict=True):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=1e-5 * max(1.0, np.abs(right).max()))


@pytest.mark.parametrize("value", [0.0, 88.0, -500.0, 3e4])
def test_equal_logits_give_the_uniform_distribution(value):
    h, weight = np.full((2, 1), value, np.float32), np.ones((700, 1), np.float32)
    nll = dense_head.dense_head_forward(h, weight, np.array([0, 699], np.int32))[1]
    np.testing.assert_allclose(nll, np.log(700), rtol=1e-3 if value == 3e4 else 1e-4)
