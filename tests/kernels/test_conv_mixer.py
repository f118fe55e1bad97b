"""The conv mixer's unit of work: a share of the channel groups computes what the whole does for them."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import _conv_training, conv
from flashlm_numba.kernels._division import divide
from flashlm_numba.kernels._trunk_arrays import Unit
from flashlm_numba.kernels.conv_mixer import ConvConfig, ConvMixer
from flashlm_numba.kernels.rmsnorm import rmsnorm_forward, rmsnorm_scales


def make_mixer(rng, groups, width, taps, dilations):
    mixer = ConvMixer(ConvConfig(groups * width, 1, groups, taps, dilations))
    parameters = {}
    for d in range(len(dilations)):
        parameters[f"norms.{d}.weight"] = rng.standard_normal(groups * width, np.float32)
        for kind in ("gates", "values"):
            parameters[f"{kind}.{d}.weight"] = rng.standard_normal((groups * width, width, taps), np.float32)
    mixer.set_weights(0, parameters)
    return mixer


def unit(time, share=0, share_end=1, shares=1):
    return Unit(2, 0, 0, 0, time, time, time, 0, 0, 0, 0, share, share_end, shares)


def convolve(mixer, x, cuts):
    """The first convolution of a sequence x (T, C), from each cut of the shares to the next: what is kept of it."""
    division = divide(1, len(x), 1)
    activations, scratch = mixer.new_activations(1, 1, len(x)), mixer.new_scratch(division)
    weights = mixer.weights(False)
    activations.mixed[0, 0] = x
    rmsnorm_scales(activations.rstd[0, 0], activations.mixed[0, 0])
    for first, last in itertools.pairwise(cuts):
        _conv_training._convolve(0, unit(len(x), first, last, cuts[-1]), weights, activations, scratch)
    return activations


@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.sampled_from([1, 2, 3, 5]),
    width=st.sampled_from([1, 4, 17]),
    time=st.sampled_from([1, 2, 13]),
    shares=st.integers(1, 6),
    cut=st.integers(0, 6),
)
def test_shares_of_the_groups_make_the_whole(seed, groups, width, time, shares, cut):
    rng = np.random.default_rng(seed)
    mixer = make_mixer(rng, groups, width, 3, (2,))
    x = rng.standard_normal((time, groups * width), np.float32)
    whole = convolve(mixer, x, [0, 1])
    for cuts in (list(range(shares + 1)), [0, min(cut, shares), shares]):
        parts = convolve(mixer, x, cuts)
        for name in whole._fields:
            np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)


def test_a_share_writes_its_own_channels_only():
    rng = np.random.default_rng(0)
    mixer = make_mixer(rng, 4, 3, 2, (1,))
    activations, scratch = mixer.new_activations(1, 1, 5), mixer.new_scratch(divide(1, 5, 1))
    activations.mixed[0, 0], activations.mixed[0, 1] = rng.standard_normal((5, 12), np.float32), np.nan
    activations.rstd[...] = 1
    _conv_training._convolve(0, unit(5, 1, 2, 2), mixer.weights(False), activations, scratch)
    assert np.isnan(activations.mixed[0, 1, :, :6]).all()
    assert np.isfinite(activations.mixed[0, 1, :, 6:]).all()


@given(seed=st.integers(0, 2**32 - 1), time=st.integers(1, 9), groups=st.integers(1, 4), width=st.integers(1, 5))
def test_the_norm_of_a_share_is_that_of_the_rows(seed, time, groups, width):
    rng = np.random.default_rng(seed)
    x, weight = (rng.standard_normal(shape).astype(np.float32) for shape in ((time, groups * width), groups * width))
    out, rstd = rmsnorm_forward(x, weight)
    again = np.empty_like(rstd)
    rmsnorm_scales(again, x)
    np.testing.assert_allclose(again, rstd, rtol=1e-6)
    found = np.zeros((groups, time, conv.padded_width(groups * width, groups)), np.float32)
    for g in range(groups):
        conv.normed_to_groups(found, x, rstd, weight, width, g, g + 1)
    want = np.zeros_like(found)
    conv.to_groups(want, out, width, 0, groups)
    np.testing.assert_allclose(found, want, rtol=1e-6)


@pytest.mark.parametrize("cut", [0, 1, 2, 3])
def test_gradients_by_ranges_of_groups_are_those_of_all(cut):
    rng = np.random.default_rng(cut)
    groups, time, width = 3, 7, 5
    gate, value = (rng.standard_normal((groups * width, width, 2), np.float32) for _ in range(2))
    weight, weight_t = conv.pack_conv_weights(gate, value, groups)
    size = conv.padded_width(groups * width, groups)
    n, gv = np.zeros((groups, time, size), np.float32), np.zeros((groups, 2, time, size), np.float32)
    conv.to_groups(n, rng.standard_normal((time, groups * width), np.float32), width, 0, groups)
    out = np.zeros((time, groups * width), np.float32)
    conv.conv_sequence(gv, n, weight, 2, 0, groups)
    conv.gate_sequence(out, gv, out, width, 0, groups)
    dout, found = rng.standard_normal(out.shape, np.float32), []
    for ranges in ([(0, groups)], [(0, cut), (cut, groups)]):
        dgv, dn, dweight = np.zeros_like(gv), np.zeros_like(n), np.zeros_like(weight)
        back = np.zeros_like(out)
        for first, last in ranges:
            conv.gate_sequence_backward(dgv, dout, gv, width, first, last)
            conv.conv_sequence_dinput(dn, dgv, weight_t, 2, first, last)
            conv.conv_sequence_dweight(dweight, n, dgv, 2, first, last)
            conv.from_groups(back, dn, width, first, last)
        found.append((dgv, dn, dweight, back))
    for whole, parts in zip(*found, strict=True):
        np.testing.assert_array_equal(parts, whole)
        assert np.abs(whole).max() > 0
