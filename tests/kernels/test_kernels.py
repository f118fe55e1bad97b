"""The trunk's kernels against their NumPy references, and the references' backward against central differences."""

import numpy as np
import pytest
from helpers import assert_as_accurate, numeric_gradient
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import (
    _math,
    conv,
    embedding,
    glu,
    leaky_average,
    ngram_copy,
    reference,
    rmsnorm,
    ternary,
    ternary_gemv,
)

rows = st.integers(0, 9)
seeds = st.integers(0, 2**32 - 1)
scales = st.sampled_from([1e-3, 1.0, 1e3])


def normal(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def doubles(*arrays):
    return [array.astype(np.float64) for array in arrays]


@given(seeds, st.integers(0, 3), st.sampled_from([0, 1, 2, 7, 40]), st.sampled_from([1, 5, 16]), scales)
def test_average_matches_reference(seed, batch, time, dim, scale):
    rng = np.random.default_rng(seed)
    decay = float(rng.choice([0.0, 0.5, 0.9, 0.98]))
    x, gain, dout = normal(rng, batch, time, dim, scale=scale), normal(rng, dim), normal(rng, batch, time, dim)
    out = leaky_average.leaky_average_forward(x, gain, decay)
    dx, dgain = leaky_average.leaky_average_backward(dout, x, gain, decay)
    x64, gain64, dout64 = doubles(x, gain, dout)
    assert_as_accurate(
        out, reference.leaky_average_forward(x, gain, decay), reference.leaky_average_forward(x64, gain64, decay), 8
    )
    dx32, dgain32 = reference.leaky_average_backward(dout, x, gain, decay)
    dx64, dgain64 = reference.leaky_average_backward(dout64, x64, gain64, decay)
    assert_as_accurate(dx, dx32, dx64, 8, "dx")
    assert_as_accurate(dgain, dgain32, dgain64, 8, "dgain")


def test_average_reference_backward_is_the_derivative():
    rng = np.random.default_rng(1)
    x, gain, dout = rng.standard_normal((2, 6, 3)), rng.standard_normal(3), rng.standard_normal((2, 6, 3))

    def loss():
        return float((reference.leaky_average_forward(x, gain, 0.8) * dout).sum())

    dx, dgain = reference.leaky_average_backward(dout, x, gain, 0.8)
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(dgain, numeric_gradient(loss, gain), rtol=1e-6, atol=1e-8)


def test_average_keeps_the_size_of_independent_tokens():
    x = normal(np.random.default_rng(0), 1, 20_000, 1)
    y = leaky_average.leaky_average_forward(x, np.ones(1, np.float32), 0.9) - x
    assert np.std(y) == pytest.approx(1, abs=0.05)


def test_average_refuses_a_decay_that_does_not_fade():
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\), got 1"):
        leaky_average.leaky_average_forward(np.zeros((1, 2, 3), np.float32), np.zeros(3, np.float32), 1.0)


@given(
    seeds,
    st.integers(0, 3),
    st.integers(0, 40),
    st.integers(1, 5),
    st.integers(1, 5),
    st.sampled_from([1, 2, 7, 50]),
    st.integers(0, 3),
)
def test_ngram_copies_match_reference(seed, batch, time, vocabulary, order, reach, skip):
    rows = np.random.default_rng(seed).integers(0, vocabulary, (batch, time)).astype(np.int32)
    found = ngram_copy.ngram_copies(rows, order, reach, skip)
    np.testing.assert_array_equal(found, reference.ngram_copies(rows, order, reach, skip))
    if time:  # nothing is seen of what comes later, nor of what lies further back
        at = time // 2
        changed = rows.copy()
        changed[:, at] += 1
        np.testing.assert_array_equal(ngram_copy.ngram_copies(changed, order, reach, skip)[:, :at], found[:, :at])
        after = at + reach + order
        np.testing.assert_array_equal(ngram_copy.ngram_copies(changed, order, reach, skip)[:, after:], found[:, after:])


def test_ngram_copies_of_a_text():
    text = np.frombuffer(b"the cat saw the cow and the cat ran", np.uint8).astype(np.int32)[None]
    found = ngram_copy.ngram_copies(text, 5, 100)[0]
    assert bytes(found[-6:-3].tolist()) == b"t s"  # after "he ca", "e cat" and " cat "
    assert found[-3:].tolist() == [-1, -1, -1]
    assert (ngram_copy.ngram_copies(text, 5, 10)[0] == -1).all()


@given(seeds, st.integers(0, 30), st.integers(1, 20), st.integers(1, 6))
def test_gradients_of_ngram_copies_match_reference(seed, rows, dim, vocabulary):
    rng = np.random.default_rng(seed)
    found = rng.integers(-1, vocabulary, rows).astype(np.int32)
    dx, dh = normal(rng, rows, dim), normal(rng, rows, dim)
    weight, gain_in, gain_out, start = (
        normal(rng, vocabulary, dim),
        normal(rng, dim),
        normal(rng, dim),
        normal(rng, vocabulary, dim),
    )
    got, want32, want64 = start.copy(), start.copy(), start.astype(np.float64)
    ngram_copy.scatter_copies(got, dx, dh, found, gain_in, gain_out)
    for want, kind in ((want32, np.float32), (want64, np.float64)):
        for d, gain in ((dx, gain_in), (dh, gain_out)):
            reference.add_copies_backward(d.astype(kind), want, weight.astype(kind), found, gain.astype(kind))
    assert_as_accurate(got, want32, want64, 8, "dweight")


def test_the_references_gradients_of_ngram_copies_are_the_derivatives():
    rng = np.random.default_rng(1)
    x, weight, gain, dout = (rng.standard_normal(shape) for shape in ((6, 3), (4, 3), (3,), (6, 3)))
    found = np.array([-1, 2, 0, 2, -1, 3])

    def loss():
        return float((reference.add_copies(x, weight, found, gain) * dout).sum())

    dweight = np.zeros_like(weight)
    dgain = reference.add_copies_backward(dout, dweight, weight, found, gain)
    np.testing.assert_allclose(dweight, numeric_gradient(loss, weight), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(dgain, numeric_gradient(loss, gain), rtol=1e-6, atol=1e-8)


def test_ngram_copies_refuse_what_they_cannot_read():
    rows, zeros = np.zeros((1, 4), np.int32), np.zeros((4, 3), np.float32)
    with pytest.raises(ValueError, match="ngram_copies: order must be at least 1, got 0"):
        ngram_copy.ngram_copies(rows, 0, 5)
    with pytest.raises(ValueError, match="ngram_copies: skip must be at least 0, got -1"):
        ngram_copy.ngram_copies(rows, 1, 5, -1)
    with pytest.raises(ValueError, match="ngram_copies: reach must be at least 1, got 0"):
        ngram_copy.ngram_copies(rows, 1, 0)
    with pytest.raises(ValueError, match=r"rows must be in \[-1, 4\), got 0 to 4"):
        ngram_copy.scatter_copies(zeros, zeros, zeros, np.array([0, 1, 4, 2], np.int32), zeros[0], zeros[0])


def test_exp_is_exact_to_two_units_over_the_whole_range():
    x = np.concatenate([np.linspace(-87, 88, 400_001), np.linspace(-1e-3, 1e-3, 10_001)]).astype(np.float32)
    out = np.empty_like(x)
    _math.exp(out, x)
    true = np.exp(x.astype(np.float64))
    assert (np.abs(out - true) / np.spacing(true.astype(np.float32))).max() <= 2


def test_exp_of_infinities_nan_and_out_of_range():
    x = np.array([-np.inf, -1e30, -87.5, 0, -0.0, 89, np.inf, np.nan], np.float32)
    out = np.empty_like(x)
    _math.exp(out, x)
    top = np.exp(np.float32(88))
    np.testing.assert_allclose(out, [0, 0, 0, 1, 1, top, top, np.nan], rtol=1e-6)


@given(seeds, rows, st.sampled_from([1, 3, 16, 37]), scales)
def test_rmsnorm_matches_reference(seed, n, dim, scale):
    rng = np.random.default_rng(seed)
    x, weight, dout = normal(rng, n, dim, scale=scale), normal(rng, dim), normal(rng, n, dim)
    out, rstd = rmsnorm.rmsnorm_forward(x, weight)
    dx, dweight = np.zeros_like(x), np.zeros_like(weight)
    rmsnorm.rmsnorm_backward(dout, x, weight, rstd, dx, dweight)
    out32, rstd32 = reference.rmsnorm_forward(x, weight)
    grads32 = reference.rmsnorm_backward(dout, x, weight, rstd32)
    x64, weight64, dout64 = doubles(x, weight, dout)
    out64, rstd64 = reference.rmsnorm_forward(x64, weight64)
    grads64 = reference.rmsnorm_backward(dout64, x64, weight64, rstd64)
    assert_as_accurate(out, out32, out64)
    # dx is a difference of two terms of size dout/rms: with one channel it cancels to nothing but rounding
    slack = 8 * max(
        1.0,
        float(
            np.abs(dout64 * weight64 * rstd64[:, None]).max(initial=0) / (np.abs(grads64[0]).max(initial=1e-30) + 1e-30)
        ),
    )
    assert_as_accurate(dx, grads32[0], grads64[0], slack, "dx")
    assert_as_accurate(dweight, grads32[1], grads64[1], 8, "dweight")


def test_rmsnorm_reference_backward_is_the_derivative():
    rng = np.random.default_rng(1)
    x, weight, dout = rng.standard_normal((3, 5)), rng.standard_normal(5), rng.standard_normal((3, 5))

    def loss():
        return float((reference.rmsnorm_forward(x, weight)[0] * dout).sum())

    dx, dweight = reference.rmsnorm_backward(dout, x, weight, reference.rmsnorm_forward(x, weight)[1])
    np.testing.assert_allclose(dx, numeric_gradient(loss, x), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(dweight, numeric_gradient(loss, weight), rtol=1e-6, atol=1e-8)


@given(seeds, rows, st.sampled_from([1, 2, 19, 32]), scales)
def test_glu_matches_reference(seed, n, inner, scale):
    rng = np.random.default_rng(seed)
    gate_up, dout = normal(rng, n, 2 * inner, scale=scale), normal(rng, n, inner)
    gate_up64, dout64 = doubles(gate_up, dout)
    assert_as_accurate(glu.glu_forward(gate_up), reference.glu_forward(gate_up), reference.glu_forward(gate_up64))
    assert_as_accurate(
        glu.glu_backward(dout, gate_up),
        reference.glu_backward(dout, gate_up),
        reference.glu_backward(dout64, gate_up64),
    )


def test_glu_reference_backward_is_the_derivative():
    rng = np.random.default_rng(2)
    gate_up, dout = rng.standard_normal((3, 8)), rng.standard_normal((3, 4))
    numeric = numeric_gradient(lambda: float((reference.glu_forward(gate_up) * dout).sum()), gate_up)
    np.testing.assert_allclose(reference.glu_backward(dout, gate_up), numeric, rtol=1e-6, atol=1e-8)


@given(seeds, rows, st.sampled_from([1, 5, 300]), st.sampled_from([1, 3, 16]))
def test_embedding_gathers_and_adds_every_row(seed, n, vocab, dim):
    rng = np.random.default_rng(seed)
    weight, dout = normal(rng, vocab, dim), normal(rng, n, dim)
    ids = rng.integers(0, vocab, n).astype(np.int32)
    np.testing.assert_array_equal(embedding.embedding_forward(weight, ids), reference.embedding_forward(weight, ids))
    got, want = normal(rng, vocab, dim), None
    want = got.copy()
    embedding.embedding_backward(got, dout, ids)
    reference.embedding_backward(want, dout, ids)
    np.testing.assert_array_equal(got, want)  # the order of additions is fixed, so bit for bit


def test_embedding_backward_loses_no_update_of_a_frequent_row():
    dweight, dout = np.zeros((3, 8), np.float32), np.ones((5000, 8), np.float32)
    embedding.embedding_backward(dweight, dout, np.full(5000, 2, np.int32))
    assert dweight[2].tolist() == [5000.0] * 8
    assert not dweight[:2].any()


def test_embedding_rejects_a_row_outside_the_vocabulary():
    with pytest.raises(ValueError, match=r"rows must be in \[0, 4\), got 4 at index 1; check the tokenizer"):
        embedding.embedding_forward(np.zeros((4, 2), np.float32), np.array([0, 4], np.int32))


def test_zero_clears_every_element():
    array = np.ones((7, 13), np.float32)
    embedding.zero(array)
    assert not array.any()


@given(seeds, st.integers(0, 5), st.sampled_from([0, 1, 2, 255, 256, 257, 600]))
def test_pack_unpack_round_trip_and_matvec(seed, n, columns):
    rng = np.random.default_rng(seed)
    weight, x = rng.integers(-1, 2, (n, columns)).astype(np.float32), normal(rng, columns)
    packed = ternary.pack_ternary(weight)
    np.testing.assert_array_equal(packed, reference.pack_ternary(weight))
    np.testing.assert_array_equal(ternary.unpack_ternary(packed, columns), weight)
    got = ternary_gemv.ternary_matvec(packed, x)
    # a sum that cancels, which plain NumPy may hit by luck: an ulp of what is summed, where a wrong weight is far more
    room = np.finfo(np.float32).eps * (np.abs(weight) @ np.abs(x))
    assert (np.abs(got - reference.ternary_matvec(*doubles(weight, x))) <= room).all()


thresholds = st.sampled_from([0.0, 0.5, 0.7, 1.0])


@given(seeds, st.sampled_from([(0, 3), (1, 1), (5, 7), (64, 33)]), scales, thresholds)
def test_ternarize_matches_reference_exactly(seed, shape, scale, threshold):
    weight = normal(np.random.default_rng(seed), *shape, scale=scale)
    found = ternary.ternarize(weight, threshold=threshold)
    np.testing.assert_array_equal(found, reference.ternarize(weight, threshold))


@given(seeds, st.sampled_from([(0, 3), (1, 1), (5, 7), (64, 33)]), st.booleans(), thresholds)
def test_ternarize_leaves_its_own_result_as_it_is(seed, shape, equal, threshold):
    weight = normal(np.random.default_rng(seed), *shape)
    if equal:  # every magnitude the same, as rounding allows
        weight = np.copysign(np.float32(0.1), weight)
    once = ternary.ternarize(weight, threshold=threshold)
    np.testing.assert_array_equal(ternary.ternarize(once, threshold=threshold), once)


def test_ternarize_at_the_threshold_is_zero():
    assert ternary.ternarize(np.array([1, -1, 1, -1], np.float32)).tolist() == [0, 0, 0, 0]
    assert ternary.ternarize(np.array([1, -3, 0, 4], np.float32), threshold=0.5).tolist() == [0, -1, 0, 1]


def test_ternarize_refuses_a_threshold_that_would_not_keep_its_result():
    with pytest.raises(ValueError, match=r"threshold must be in \[0, 1\], got 1.5"):
        ternary.ternarize(np.ones(2, np.float32), threshold=1.5)


def test_pack_rejects_what_is_not_ternary():
    with pytest.raises(ValueError, match="only -1, 0 and \\+1; use ternarize first"):
        ternary.pack_ternary(np.array([[0.5]], np.float32))


conv_shapes = st.tuples(
    st.integers(0, 3),
    st.sampled_from([1, 2, 5, 17, 40]),
    st.sampled_from([(6, 1), (12, 3), (32, 2), (40, 2)]),
)


@given(seeds, conv_shapes, st.sampled_from([1, 4, 64]), st.integers(1, 4))
def test_gated_conv_matches_reference(seed, shape, dilation, taps):
    batch, time, (channels, groups) = shape
    rng = np.random.default_rng(seed)
    x, dout = normal(rng, batch, time, channels), normal(rng, batch, time, channels)
    gate, value = (normal(rng, channels, channels // groups, taps, scale=0.3) for _ in range(2))
    out, gv = conv.gated_conv_forward(x, gate, value, groups, dilation)
    grads = conv.gated_conv_backward(dout, gv, x, gate, value, groups, dilation)
    x64, dout64, gate64, value64 = doubles(x, dout, gate, value)
    assert_as_accurate(
        out,
        reference.gated_conv_forward(x, gate, value, groups, dilation),
        reference.gated_conv_forward(x64, gate64, value64, groups, dilation),
        8,
    )
    grads32 = reference.gated_conv_backward(dout, x, gate, value, groups, dilation)
    grads64 = reference.gated_conv_backward(dout64, x64, gate64, value64, groups, dilation)
    for name, got, ref32, ref64 in zip(("dx", "dgate", "dvalue"), grads, grads32, grads64, strict=True):
        assert_as_accurate(got, ref32, ref64, 8, name)


def test_gated_conv_reference_backward_is_the_derivative():
    rng = np.random.default_rng(3)
    x, dout = rng.standard_normal((2, 7, 4)), rng.standard_normal((2, 7, 4))
    gate, value = rng.standard_normal((4, 2, 3)), rng.standard_normal((4, 2, 3))

    def loss():
        return float((reference.gated_conv_forward(x, gate, value, 2, 2) * dout).sum())

    grads = reference.gated_conv_backward(dout, x, gate, value, 2, 2)
    for got, array in zip(grads, (x, gate, value), strict=True):
        np.testing.assert_allclose(got, numeric_gradient(loss, array), rtol=1e-6, atol=1e-8)


def test_gated_conv_sees_nothing_of_the_future():
    rng = np.random.default_rng(4)
    x = normal(rng, 1, 30, 12)
    gate, value = normal(rng, 12, 4, 4), normal(rng, 12, 4, 4)
    before, _ = conv.gated_conv_forward(x, gate, value, 3, 4)
    x[0, 11] += 1
    after, _ = conv.gated_conv_forward(x, gate, value, 3, 4)
    np.testing.assert_array_equal(before[0, :11], after[0, :11])
    assert (before[0, 11] != after[0, 11]).any()


@given(st.integers(0, 2**32 - 1), st.integers(1, 70), st.sampled_from([1e-30, 1.0, 1e30]))
def test_row_max_is_the_largest(seed, n, scale):
    row = (np.random.default_rng(seed).standard_normal(n) * scale).astype(np.float32)
    if seed % 3 == 0:
        row[seed % n] = (-np.inf, np.inf, -0.0)[seed % 9 // 3]
    out = np.empty(1, np.float32)
    _math.largest(out, row)
    assert out[0] == row.max()


def test_row_max_of_infinities_and_nan():
    for row in ([-np.inf, -np.inf], [-np.inf, np.inf], [1.0, np.nan, 2.0]):
        out, row = np.empty(1, np.float32), np.array(row, np.float32)
        _math.largest(out, row)
        np.testing.assert_array_equal(out[0], row.max())
