"""The conv mixer's unit of work: a share of the channel groups computes what the whole does for them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import conv, conv_mixer
from flashlm_numba.kernels._trunk_regions import Unit
from flashlm_numba.kernels.conv_mixer import ConvConfig, ConvMixer


def make_mixer(rng, groups, width, taps, dilations):
    mixer = ConvMixer(ConvConfig(groups * width, 1, groups, taps, dilations))
    parameters = {}
    for d in range(len(dilations)):
        parameters[f"norms.{d}.weight"] = rng.standard_normal(groups * width, np.float32)
        for kind in ("gates", "values"):
            parameters[f"{kind}.{d}.weight"] = rng.standard_normal((groups * width, width, taps), np.float32)
    mixer.set_weights(0, parameters)
    return mixer


def convolve(mixer, x, shares, d=0, start=0):
    """The first convolution of a sequence x (T, C), by so many shares one after another: what is kept of it."""
    time, dim = x.shape
    activations, scratch = mixer.new_activations(1, 1, time), mixer.new_scratch(1, time)
    activations.mixed[0, 0] = x
    for share in range(shares):
        unit = Unit(0, 0, 0, time, time, 0, share, shares)
        normed = np.zeros((time, dim), np.float32)
        conv_mixer._convolve(d, start, unit, mixer.weights(False), activations, scratch, normed)
    return activations


@given(
    seed=st.integers(0, 2**32 - 1),
    groups=st.sampled_from([1, 2, 3, 5]),
    width=st.sampled_from([1, 4, 17]),
    time=st.sampled_from([1, 2, 13]),
    shares=st.integers(1, 6),
)
def test_shares_of_the_groups_make_the_whole(seed, groups, width, time, shares):
    rng = np.random.default_rng(seed)
    mixer = make_mixer(rng, groups, width, 3, (2,))
    x = rng.standard_normal((time, groups * width), np.float32)
    whole, parts = convolve(mixer, x, 1), convolve(mixer, x, shares)
    for name in whole._fields:
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name), err_msg=name)


def test_a_share_writes_its_own_channels_only():
    rng = np.random.default_rng(0)
    mixer = make_mixer(rng, 4, 3, 2, (1,))
    x = rng.standard_normal((5, 12), np.float32)
    activations, scratch = mixer.new_activations(1, 1, 5), mixer.new_scratch(1, 5)
    activations.mixed[0, 0], activations.mixed[0, 1] = x, np.nan
    unit, normed = Unit(0, 0, 0, 5, 5, 0, 1, 2), np.zeros((5, 12), np.float32)
    conv_mixer._convolve(0, 0, unit, mixer.weights(False), activations, scratch, normed)
    assert np.isnan(activations.mixed[0, 1, :, :6]).all()
    assert np.isfinite(activations.mixed[0, 1, :, 6:]).all()


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
