"""Drawing from logits in compiled code: the same choice as the plain rule in flashlm_numba/heads/sampling.py."""

from unittest import mock

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.heads import DenseHead, TreeHead
from flashlm_numba.heads.sampling import sample_rows
from flashlm_numba.kernels import dense_inference, draw
from flashlm_numba.kernels.ternary_gemv import quantize_rows

seeds = st.integers(0, 2**32 - 1)


class Fixed:
    """A generator that draws one number."""

    def __init__(self, uniform):
        self.uniform = uniform

    def random(self):
        return self.uniform


def softmax(logits):
    p = np.exp(logits.astype(np.float64) - logits.max())
    return p / p.sum()


@given(st.integers(0, 2**32 - 1), st.integers(1, 5_000), st.sampled_from([0.1, 10.0, 1e4]))
def test_the_sum_of_exponentials(seed, size, scale):
    row = (np.random.default_rng(seed).standard_normal(size) * scale).astype(np.float32)
    wide = row.astype(np.float64)
    want = wide.max() + np.log(np.exp(wide - wide.max()).sum())
    np.testing.assert_allclose(draw.log_sum_exp(row), want, rtol=1e-6, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value")  # of plain Python, without the compiler
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_the_sum_of_exponentials_is_not_finite_with_such_a_logit(value):
    assert draw.log_sum_exp(np.empty(0, np.float32)) == -np.inf
    for at in (0, 70, 2_999):
        row = np.zeros(3_000, np.float32)
        row[at] = value
        assert not np.isfinite(draw.log_sum_exp(row))


@given(seeds, st.sampled_from([1, 2, 63, 64, 65, 1_023, 1_024, 1_025, 2_500]), st.integers(1, 3_000), st.booleans())
def test_the_largest_are_found_in_order(seed, size, count, ties):
    rng = np.random.default_rng(seed)
    row = rng.standard_normal(size).astype(np.float32)
    if ties:
        row = np.round(row).astype(np.float32)
    ids, values = draw.largest(row, count)
    want = np.argsort(-row, kind="stable")[:count]
    np.testing.assert_array_equal(values, row[want])
    np.testing.assert_array_equal(row[ids], values)
    assert len(set(ids.tolist())) == len(want)
    if count == 1:
        assert ids[0] == row.argmax()


@given(seeds, st.sampled_from([1, 2, 1_023, 1_024, 1_025, 2_500]), st.sampled_from([0.1, 1.0, 3.0]))
def test_a_draw_is_where_the_running_sum_passes(seed, size, temperature):
    rng = np.random.default_rng(seed)
    row = (3 * rng.standard_normal(size)).astype(np.float32)
    running = np.cumsum(softmax(row / temperature))
    for uniform in (0.0, 0.5, 1 - 1e-9, *rng.random(5)):
        index = draw.draw(row.copy(), uniform, temperature)
        below = running[index - 1] if index else 0.0
        assert below - 1e-5 <= uniform <= running[index] + 1e-5


@given(seeds, st.integers(1, 50), st.sampled_from([0.3, 1.0, 2.0]), st.sampled_from([None, 1e-9, 0.5, 1.0]))
def test_a_draw_from_sorted_ones_is_the_plain_rule(seed, size, temperature, top_p):
    rng = np.random.default_rng(seed)
    log_p = -np.sort(rng.exponential(2.0, size))
    before = log_p.copy()
    for uniform in rng.random(5):
        want = sample_rows(np.exp(log_p)[None], Fixed(uniform), temperature, size, top_p)[0]
        assert draw.draw_sorted(log_p, uniform, temperature, top_p) == want
    np.testing.assert_array_equal(log_p, before)


@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
@np.errstate(invalid="ignore")  # plain Python warns of what compiled code does not
def test_what_is_no_distribution_is_refused(value):
    with pytest.raises(ValueError, match="must be finite"):
        draw.draw(np.full(3, value, np.float32), 0.5)
    with pytest.raises(ValueError, match="must be finite"):
        draw.draw_sorted(np.full(3, value), 0.5)
    row = np.arange(200, dtype=np.float32)
    row[150] = value
    with pytest.raises(ValueError, match="must be finite"):
        draw.largest(row, 3)
    with pytest.raises(ValueError, match="nothing can be drawn"):
        draw.draw(np.empty(0, np.float32), 0.5)


def test_settings_out_of_range_are_refused():
    row = np.zeros(3, np.float32)
    for temperature in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="temperature must be a number above 0"):
            draw.draw(row, 0.5, temperature)
    with pytest.raises(ValueError, match="top_p must be above 0"):
        draw.draw_sorted(np.zeros(3), 0.5, top_p=0.0)
    with pytest.raises(ValueError, match="count must be at least 1"):
        draw.largest(row, 0)


@pytest.mark.parametrize("temperature", [1e-45, 1e-300, 2e-311, 5e-324])
def test_an_extreme_temperature_takes_the_likeliest(temperature):
    row = np.array([0, 3, 1], np.float32)
    assert draw.draw(row.copy(), 0.999, temperature) == 1
    assert draw.draw_sorted(np.array([-1.0, -2.0]), 0.999, temperature) == 0
    head, h = TreeHead(vocab_size=20, dim=4, seed=1), np.ones((1, 4), np.float32)
    best = head.distribution(h).argmax()
    for options in ({"top_k": 3}, {"top_p": 0.9}, {"top_k": 3, "top_p": 0.9}, {}):
        assert head.sample(h, np.random.default_rng(0), temperature, **options) == [best]


@given(seeds, st.integers(0, 9), st.sampled_from([1, 15, 16, 17, 256, 300]))
def test_logits_of_one_position(seed, vocab, dim):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((1, dim), np.float32), rng.standard_normal((vocab, dim), np.float32)
    assert_as_accurate(
        dense_inference.dense_logits(x, weight), x @ weight.T, x.astype(np.float64) @ weight.T.astype(np.float64)
    )
    q, scales = quantize_rows(weight)
    rounded = q[:, :dim] * scales[:, None]
    found = dense_inference.dense_logits_int8(x, q, scales)
    assert_as_accurate(found, x @ rounded.T, x.astype(np.float64) @ rounded.T.astype(np.float64))
    reach = 0.5001 * scales * np.abs(x).sum()
    assert (np.abs(found - x @ weight.T) <= reach + 1e-5).all()


@pytest.mark.parametrize("threads", [1, 2, 3, 64])
@given(seeds, st.integers(0, 9), st.integers(0, 30), st.sampled_from([0, 1, 15, 16, 17, 256, 300]))
def test_logits_of_several_positions_have_the_bits_of_each_alone(threads, seed, rows, vocab, dim):
    rng = np.random.default_rng(seed)
    x, weight = rng.standard_normal((rows, dim), np.float32), rng.standard_normal((vocab, dim), np.float32)
    x[rows // 2 :] *= np.float32(1e30)  # some are not finite
    q, scales = quantize_rows(weight)
    with mock.patch.object(dense_inference.numba, "get_num_threads", return_value=threads):
        for product, matrix in (
            (dense_inference.dense_logits, (weight,)),
            (dense_inference.dense_logits_int8, (q, scales)),
        ):
            found = product(x, *matrix)
            assert found.shape == (rows, vocab)
            for n in range(rows):
                alone = product(x[n : n + 1], *matrix)[0]
                if numba.config.DISABLE_JIT:  # NumPy's products of one row and of several may round in different ways
                    np.testing.assert_allclose(found[n], alone, rtol=1e-4, atol=1e-5 * np.abs(alone).max(initial=0))
                else:
                    np.testing.assert_array_equal(found[n], alone)


@pytest.mark.parametrize("options", [{}, {"soft_cap": 5.0}, {"prior": True}, {"soft_cap": 5.0, "prior": True}])
@given(seeds, st.integers(1, 60))
def test_the_likeliest_are_exact_with_int8_rows(options, seed, count):
    rng = np.random.default_rng(seed)
    vocab, options = 500, dict(options)
    if options.pop("prior", False):
        options["log_prior"] = rng.standard_normal(vocab).astype(np.float32)
    head = DenseHead(rng.standard_normal((vocab, 40), np.float32), **options)
    x = rng.standard_normal(40, np.float32)
    want_ids, want = head.top(x, count)
    p = head.distribution(x[None])[0]
    np.testing.assert_allclose(np.exp(want - want[0]), (p / p.max())[want_ids], rtol=1e-4)
    assert set(want_ids.tolist()) == set(np.argsort(-p, kind="stable")[:count].tolist())
    head.use_int8()
    ids, found = head.top(x, count)
    np.testing.assert_array_equal(ids, want_ids)
    np.testing.assert_allclose(found, want, atol=1e-5)


def test_with_int8_rows_tokens_are_drawn_nearly_by_their_probabilities():
    rng = np.random.default_rng(0)
    head = DenseHead(rng.standard_normal((2_000, 64), np.float32) * np.float32(0.3))
    x = rng.standard_normal((1, 64), np.float32)
    p = head.distribution(x)[0]
    head.use_int8()
    logits = head._logits(x, head._int8)
    found = softmax(logits)
    assert 0 < np.abs(found / p - 1).max() < 0.05  # those scored as int8 are a little off
    best = np.argsort(-p)[:40]
    np.testing.assert_allclose(logits[best] - logits[best[0]], np.log(p[best] / p[best[0]]), atol=1e-4)


@pytest.mark.parametrize("int8", [False, True])
def test_the_dense_head_draws_by_its_distribution(int8):
    rng = np.random.default_rng(3)
    head = DenseHead(rng.standard_normal((8, 4), np.float32))
    if int8:
        head.use_int8()
    draws, near = (1_000, 0.09) if numba.config.DISABLE_JIT else (20_000, 0.02)
    h = np.tile(rng.standard_normal((1, 4), np.float32), (draws, 1))
    for settings in ({}, {"temperature": 0.5}, {"top_k": 3}, {"temperature": 2.0, "top_k": 5, "top_p": 0.8}):
        found = np.bincount(head.sample(h, np.random.default_rng(0), **settings), minlength=8) / len(h)
        plain = sample_rows(head.distribution(h), np.random.default_rng(1), **settings)
        want = np.bincount(plain, minlength=8) / len(h)
        assert np.count_nonzero(found) <= settings.get("top_k", 8)
        assert np.abs(found - want).max() < near
    assert (head.sample(h[:3], rng, temperature=0) == head.distribution(h[:1]).argmax()).all()
