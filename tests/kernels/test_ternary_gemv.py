"""The packed ternary products: bit for bit the integer NumPy reference, by every variant that this processor has."""

import warnings

import numba
import numpy as np
import pytest
from helpers import assert_as_accurate
from hypothesis import example, given
from hypothesis import strategies as st

from flashlm_numba.kernels import _ternary_dots, reference, ternary, ternary_gemv

VARIANTS = _ternary_dots.available()
seeds = st.integers(0, 2**32 - 1)
columns = st.sampled_from([0, 1, 3, 255, 256, 257, 512, 700])


def packed_and_plain(rng, rows, width):
    weight = rng.integers(-1, 2, (rows, width)).astype(np.float32)
    return ternary.pack_ternary(weight), weight


@pytest.mark.parametrize("variant", VARIANTS)
@given(seeds, st.integers(0, 11), st.integers(0, 9), columns)
@example(0, 67, 64, 256)
def test_integer_product_is_exact(variant, seed, rows, inputs, width):
    rng = np.random.default_rng(seed)
    packed, weight = packed_and_plain(rng, rows, width)
    q = np.zeros((inputs, 4 * packed.shape[1]), np.int8)
    q[:, :width] = rng.integers(-128, 128, (inputs, width))
    found = ternary_gemv.ternary_gemv_int8(packed, q, variant=variant)
    np.testing.assert_array_equal(found, reference.ternary_gemv_int8(weight, q[:, :width]))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize("value", [-128, 127])
def test_the_largest_sums_do_not_overflow(variant, sign, value):
    """Every product at its largest: in int16, 512 would be lost by saturation after 64 sums."""
    width = 65_536
    packed = ternary.pack_ternary(np.full((5, width), sign, np.float32))
    q = np.full((3, width), value, np.int8)
    found = ternary_gemv.ternary_gemv_int8(packed, q, variant=variant)
    assert (found == sign * value * width).all()


@pytest.mark.skipif(numba.config.DISABLE_JIT, reason="plain Python's sums do not overflow")
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("value", [-128, 127])
def test_the_longest_rows_do_not_overflow(variant, value):
    """Sums of codes of 2 that just fit into int32."""
    packed = np.full((2, 64 * 32_767), 0xAA, np.uint8)
    q = np.full((1, 4 * packed.shape[1]), value, np.int8)
    found = ternary_gemv.ternary_gemv_int8(packed, q, variant=variant)
    assert (found == value * q.shape[1]).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_large_product_on_threads_is_exact(variant, threads):
    threads(2)
    rng = np.random.default_rng(1)
    packed, weight = packed_and_plain(rng, 1_031, 1_100)
    q, _ = ternary_gemv.quantize_rows(rng.standard_normal((2, 1_100), np.float32))
    assert packed.shape[0] * q.size >= ternary_gemv.PARALLEL
    found = ternary_gemv.ternary_gemv_int8(packed, q, variant=variant)
    np.testing.assert_array_equal(found, reference.ternary_gemv_int8(weight, q[:, :1_100]))


@given(seeds, st.integers(0, 4), columns, st.sampled_from([1e-20, 1.0, 1e30]))
def test_quantized_rows_match_the_reference(seed, rows, width, scale):
    x = np.random.default_rng(seed).standard_normal((rows, width), np.float32) * np.float32(scale)
    q, scales = ternary_gemv.quantize_rows(x)
    want_q, want_scales = reference.quantize_rows(x)
    np.testing.assert_array_equal(scales, want_scales)
    np.testing.assert_array_equal(q[:, :width], want_q)
    assert not q[:, width:].any()
    # half a step, and the rounding of the product
    assert (np.abs(q[:, :width] * scales[:, None].astype(np.float64) - x) <= 0.5001 * scales[:, None]).all()


def test_rows_without_a_size_or_not_finite():
    x = np.array([[0, 0], [1e-38, 0], [np.inf, 1], [1, np.nan], [3e38, -3e38]], np.float32)
    q, scales = ternary_gemv.quantize_rows(x)
    assert q[:, :2].tolist() == [[0, 0], [0, 0], [0, 0], [0, 0], [127, -127]]
    np.testing.assert_array_equal(scales, np.array([0, 0, np.nan, np.nan, np.float32(3e38) * np.float32(1 / 127)]))


@given(seeds, st.integers(1, 4), st.sampled_from([1, 256, 683]))
def test_float_product_errs_by_the_rounding_of_its_inputs(seed, inputs, width):
    rng = np.random.default_rng(seed)
    packed, weight = packed_and_plain(rng, 9, width)
    x = rng.standard_normal((inputs, width), np.float32)
    q, scales = reference.quantize_rows(x)
    rounded = q * scales[:, None]
    doubles = rounded.astype(np.float64) @ weight.T.astype(np.float64)
    assert ternary_gemv.ternary_gemv(packed, x).dtype == np.float32
    assert_as_accurate(ternary_gemv.ternary_gemv(packed, x), rounded @ weight.T, doubles)


def test_the_variant_can_be_forced(monkeypatch):
    for name in VARIANTS:
        ternary_gemv.best_variant.cache_clear()
        monkeypatch.setenv("FLASHLM_NUMBA_TERNARY", name)
        assert ternary_gemv.best_variant() == name
    ternary_gemv.best_variant.cache_clear()
    monkeypatch.setenv("FLASHLM_NUMBA_TERNARY", "sse9")
    with pytest.raises(ValueError, match="FLASHLM_NUMBA_TERNARY must be one of plain"):
        ternary_gemv.best_variant()
    monkeypatch.delenv("FLASHLM_NUMBA_TERNARY")
    assert ternary_gemv.best_variant() == VARIANTS[-1]


@pytest.mark.skipif(len(VARIANTS) == 1, reason="this processor has the plain loops only")
def test_a_variant_that_computes_wrongly_is_not_used(monkeypatch):
    real = ternary_gemv.SERIAL["plain"]

    def broken(out, packed, q):
        real(out, packed, q)
        out[-1, -1] += 1

    monkeypatch.delenv("FLASHLM_NUMBA_TERNARY", raising=False)
    for variant in VARIANTS[1:]:
        monkeypatch.setitem(ternary_gemv.SERIAL, variant, broken)
    ternary_gemv.best_variant.cache_clear()
    with pytest.warns(UserWarning, match="computes wrongly on this machine; not used"):
        assert ternary_gemv.best_variant() == "plain"
    monkeypatch.undo()
    ternary_gemv.best_variant.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ternary_gemv.best_variant() == VARIANTS[-1]


@pytest.mark.parametrize(
    ("packed", "q", "message"),
    [
        ((2, 65), (1, 260), "whole blocks of 64 bytes"),
        ((2, 64), (1, 255), r"q must have shape \(any, 256\)"),
        ((0, 64 * 2**15), (0, 4 * 64 * 2**15), "at most 8,388,607 columns"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(packed, q, message):
    with pytest.raises(ValueError, match=message):
        ternary_gemv.ternary_gemv_int8(np.zeros(packed, np.uint8), np.zeros(q, np.int8))


def test_an_unknown_variant_is_refused():
    with pytest.raises(ValueError, match="variant must be one of plain"):
        ternary_gemv.ternary_gemv_int8(np.zeros((1, 64), np.uint8), np.zeros((1, 256), np.int8), variant="mmx")
