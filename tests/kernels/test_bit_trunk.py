"""The MatMul-free trunk and its decoding against the NumPy twin, the twin against central differences."""

import itertools

import numpy as np
import pytest
from helpers import assert_as_accurate, normal_arrays, numeric_gradient, wide
from hypothesis import given
from hypothesis import strategies as st

from flashlm_numba.kernels import bit_rows
from flashlm_numba.kernels import reference_mmf as twin
from flashlm_numba.kernels.bit_trunk import lower_bounds, lower_bounds_backward
from flashlm_numba.model.config import ModelConfig
from flashlm_numba.model.parameters import initial_parameters
from flashlm_numba.model.trunks import BitTrunk

BARE = ModelConfig(60, dim=50, ffn_dim=134, mixer="mlgru", linear="bitlinear", n_blocks=3, n_passes=1)
CONFIGS = {
    "bare": BARE,
    "one channel": ModelConfig(9, dim=1, ffn_dim=1, mixer="mlgru", linear="bitlinear", n_blocks=1, n_passes=1),
    "passes": ModelConfig(30, dim=17, ffn_dim=5, mixer="mlgru", linear="bitlinear", n_blocks=2, n_passes=2),
    "ngram copy": ModelConfig(
        9,
        dim=20,
        ffn_dim=30,
        mixer="mlgru",
        linear="bitlinear",
        norm_eps=1e-3,
        n_blocks=2,
        n_passes=1,
        ngram_copy_orders=(1, 2, 1),
        ngram_copy_reach=11,
    ),
}


def random_parameters(config, seed):
    """Random parameters without a ternary weight near the threshold, where a last bit would decide its value."""
    parameters, rng = initial_parameters(config, seed, embedding_std=1.0), np.random.default_rng(seed + 1)
    for name, value in parameters.items():
        if value.ndim == 1 or name == "lower_bounds":
            value += np.float32(0.3) * rng.standard_normal(value.shape, np.float32)
        elif not name.startswith("embedding"):
            half = np.abs(value).mean() / 2
            value[np.abs(np.abs(value) - half) < 0.05 * half] *= np.float32(0.8)
    return parameters


def options(config):
    return {
        "n_passes": config.n_passes,
        "eps": config.norm_eps,
        "ngram_copy_orders": config.ngram_copy_orders,
        "ngram_copy_reach": config.ngram_copy_reach,
    }


def trunk_of(config, parameters):
    trunk = BitTrunk(config)
    trunk.set_weights(parameters)
    return trunk


def hidden(trunk, parameters, ids):
    buffers = trunk.new_buffers(*ids.shape)
    return trunk.forward(buffers, parameters["embedding.weight"], ids.reshape(-1)).copy(), buffers


def decided(config, shape):
    """Parameters and ids for which float32 and float64 round all inputs alike, the smallest seed that gives such."""
    for seed in itertools.count():
        parameters = random_parameters(config, seed)
        ids = np.random.default_rng(seed).integers(0, config.vocab_size, shape).astype(np.int32)
        ((*values,),) = wide([list(parameters.values())])
        exact = dict(zip(parameters, values, strict=True))
        with twin.undecided() as closest:
            twin.trunk_forward(exact, ids, **options(config))
        if closest[0] > 2e-4:
            return parameters, exact, ids


@pytest.mark.parametrize("config", CONFIGS)
def test_the_trunk_and_every_gradient_are_as_accurate_as_numpy(config):
    config = CONFIGS[config]
    parameters, exact, ids = decided(config, (2, 5))
    trunk = trunk_of(config, parameters)
    h, buffers = hidden(trunk, parameters, ids)
    plain, saved32 = twin.trunk_forward(parameters, ids, **options(config))
    truth, saved64 = twin.trunk_forward(exact, ids, **options(config))
    assert_as_accurate(h, plain, truth, 16, "hidden states")
    dout = np.random.default_rng(5).standard_normal(h.shape, np.float32)
    found = trunk.backward(buffers, dout, parameters["embedding.weight"])
    want32, want64 = twin.trunk_backward(dout, saved32), twin.trunk_backward(dout.astype(np.float64), saved64)
    assert found.keys() == want64.keys() - {"embedding.weight"}
    for name, value in found.items():
        assert_as_accurate(value, want32[name], want64[name], 32, name)


@pytest.mark.parametrize("config", ["passes", "ngram copy"])
def test_the_twin_agrees_with_central_differences(config):
    """Without the roundings, through which the gradient passes as if they were not there."""
    config = CONFIGS[config]
    _, parameters, ids = decided(config, (2, 4))
    dout = np.random.default_rng(5).standard_normal((8, config.dim))

    def loss():
        return float((dout * twin.trunk_forward(parameters, ids, rounded=False, **options(config))[0]).sum())

    _, saved = twin.trunk_forward(parameters, ids, rounded=False, **options(config))
    found = twin.trunk_backward(dout, saved)
    for name, value in parameters.items():
        few = value[:1] if value.ndim == 2 and name != "lower_bounds" else value  # a row of each matrix
        gradient = found[name][:1] if few is not value else found[name]
        numeric = numeric_gradient(loss, few)
        np.testing.assert_allclose(gradient, numeric, rtol=1e-5, atol=1e-7 * np.abs(found[name]).max(), err_msg=name)


@pytest.mark.parametrize("config", CONFIGS)
def test_decoding_gives_the_bits_of_the_forward_pass(config):
    config = CONFIGS[config]
    parameters = random_parameters(config, 0)
    embedding, trunk = parameters["embedding.weight"], trunk_of(config, parameters)
    ids = np.random.default_rng(0).integers(0, config.vocab_size, (1, 300)).astype(np.int32)
    h, _ = hidden(trunk, parameters, ids)
    state = trunk.new_state()
    for t, row in enumerate(ids[0]):
        np.testing.assert_array_equal(trunk.step(state, embedding, int(row))[0], h[t], err_msg=str(t))
    mixed, t = trunk.new_state(), 0
    for count in (1, 7, 64, 1, 100):  # read at once, then a token alone
        some = trunk.read(mixed, trunk.new_buffers(1, count), embedding, ids[0, t : t + count])
        np.testing.assert_array_equal(some, h[t : t + count])
        t += count
        np.testing.assert_array_equal(trunk.step(mixed, embedding, int(ids[0, t]))[0], h[t])
        t += 1


@pytest.mark.parametrize("config", ["bare", "ngram copy"])
def test_the_trunk_is_causal_and_its_sequences_independent_bit_for_bit(config):
    config, rng = CONFIGS[config], np.random.default_rng(0)
    parameters = random_parameters(config, 0)
    trunk = trunk_of(config, parameters)
    ids = rng.integers(0, config.vocab_size, (3, 90)).astype(np.int32)
    h = hidden(trunk, parameters, ids)[0].reshape(3, 90, -1)
    for cut in (1, 17, 64, 89):
        changed = ids.copy()
        changed[:, cut:] = rng.integers(0, config.vocab_size, changed[:, cut:].shape)
        got = hidden(trunk, parameters, changed)[0].reshape(h.shape)
        np.testing.assert_array_equal(got[:, :cut], h[:, :cut])
        assert (got[:, cut:] != h[:, cut:]).any()
    np.testing.assert_array_equal(hidden(trunk, parameters, ids[1:2])[0], h[1])


# --- what stands between the layers ---

shapes = st.tuples(st.integers(0, 9), st.integers(1, 70))
scales = st.sampled_from([1e-3, 1.0, 30.0, 300.0])


@given(shape=shapes, scale=scales, seed=st.integers(0, 99))
def test_norm_and_gates_are_as_accurate_as_numpy(shape, scale, seed):
    rows, dim = shape
    dout, gate, h, weight = normal_arrays(np.random.default_rng(seed), [shape, shape, shape, dim])
    gate, h, eps = gate * np.float32(scale), h * np.float32(scale), np.float32(1e-6)
    ((wdout, wgate, wh, wweight),) = wide([(dout, gate, h, weight)])
    out, rstd = np.empty_like(gate), np.empty(rows, np.float32)
    bit_rows.norm(out, rstd, gate, weight, eps)
    assert_as_accurate(out, twin.rmsnorm(gate, weight, 1e-6)[0], twin.rmsnorm(wgate, wweight, 1e-6)[0], 8, "norm")
    bit_rows.gated(out, rstd, gate, h, weight, eps)
    plain, plain_rstd = twin.gated_forward(gate, h, weight, 1e-6)
    truth, true_rstd = twin.gated_forward(wgate, wh, wweight, 1e-6)
    assert_as_accurate(out, plain, truth, 8, "gated")
    found = np.empty_like(gate), np.empty_like(gate), np.zeros_like(weight)
    bit_rows.gated_backward(*found, dout, gate, h, weight, rstd)
    plain = twin.gated_backward(dout, gate, h, weight, plain_rstd)
    truth = twin.gated_backward(wdout, wgate, wh, wweight, true_rstd)
    for name, got, want32, want64 in zip(("dh", "dweight"), found[1:], plain[1:], truth[1:], strict=True):
        assert_as_accurate(got, want32, want64, 16, name)
    parts = np.abs(wdout * twin.silu(wh) * wweight * true_rstd[:, None])  # dgate is a difference, 0 for one channel
    np.testing.assert_allclose(found[0], truth[0], rtol=0, atol=4e-6 * parts.max(initial=0) + 1e-30, err_msg="dgate")


@given(shape=shapes, scale=scales, seed=st.integers(0, 99))
def test_swiglu_is_as_accurate_as_numpy(shape, scale, seed):
    rows, inner = shape
    dout, gate_up = normal_arrays(np.random.default_rng(seed), [shape, (rows, 2 * inner)])
    gate_up *= np.float32(scale)
    ((wdout, wgate_up),) = wide([(dout, gate_up)])
    out, dgate_up = np.empty_like(dout), np.empty_like(gate_up)
    bit_rows.swiglu(out, gate_up)
    assert_as_accurate(out, twin.swiglu_forward(gate_up), twin.swiglu_forward(wgate_up), 8, "out")
    bit_rows.swiglu_backward(dgate_up, dout, gate_up)
    assert_as_accurate(
        dgate_up, twin.swiglu_backward(dout, gate_up), twin.swiglu_backward(wdout, wgate_up), 16, "dgate_up"
    )


@given(shape=st.tuples(st.integers(1, 32), st.integers(1, 20)), scale=scales, seed=st.integers(0, 99))
def test_lower_bounds_grow_with_depth_and_agree_with_their_twin(shape, scale, seed):
    dbounds, parameter = normal_arrays(np.random.default_rng(seed), [shape, shape])
    parameter *= np.float32(scale)
    bounds = lower_bounds(parameter)
    assert not bounds[0].any()
    assert (np.diff(bounds, axis=0) >= 0).all()
    assert bounds.max() <= 1
    truth, shares = twin.lower_bounds(parameter.astype(np.float64))
    np.testing.assert_allclose(bounds, truth, atol=1e-6)
    want = twin.lower_bounds_backward(dbounds.astype(np.float64), shares)
    np.testing.assert_allclose(lower_bounds_backward(dbounds, parameter), want, atol=1e-6 * max(1, np.abs(want).max()))


def test_lower_bounds_twin_agrees_with_central_differences():
    dbounds, parameter = wide([normal_arrays(np.random.default_rng(0), [(4, 3), (4, 3)])])[0]
    found = twin.lower_bounds_backward(dbounds, twin.lower_bounds(parameter)[1])
    numeric = numeric_gradient(lambda: float((dbounds * twin.lower_bounds(parameter)[0]).sum()), parameter)
    np.testing.assert_allclose(found, numeric, rtol=1e-6, atol=1e-9)
